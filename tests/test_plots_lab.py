"""What the lab gives its plots: real frames of tiny models, from which everything is drawn."""

from __future__ import annotations

from typing import Any

from adapterlab import AdapterLab
from adapterlab.plots import draw_svg

ADALORA = {"method": "adalora", "init_r": 6, "target_r": 3, "target_modules": ["q_proj", "v_proj"]}
PAIRS = [("Who are you?", "Arr, a captain."), ("Why?", "Arr!"), ("What is an adapter?", "A chest of numbers.")]


def budget(figure: Any) -> list[tuple[float, float]]:
    """The line of the ranks that were kept; empty where there is no such panel."""
    for ax in figure.axes:
        for line in ax.get_lines():
            if line.get_label() == "kept":
                return list(map(tuple, line.get_xydata()))
    return []


def title(figure: Any) -> str:
    return str(figure.axes[0].get_title(loc="left"))


def test_ranks_say_that_allocation_never_ran_and_later_how_it_went(lab: AdapterLab) -> None:
    config = {key: value for key, value in ADALORA.items() if key != "method"}
    lab.add_adapter("adalora", "ada", **config)
    fresh = lab.plot_ranks("ada")
    assert title(fresh) == "Allocation never ran: every rank is init_r = 6."
    assert budget(fresh) == []
    run = lab.train("ada", PAIRS, max_steps=10, learning_rate=2e-2, disable_tqdm=True)
    trained = lab.plot_ranks("ada")
    assert title(trained) == ""
    assert budget(trained) == list(zip(run.history["step"], run.history["total_rank"]))
    assert budget(trained)[-1][1] == 3 * 2 * lab.model.config.num_hidden_layers


def test_each_plot_of_a_lab_is_drawn_light_and_as_a_part_of_a_page(lab: AdapterLab) -> None:
    lab.add_adapter("lora", "lora", r=4, target_modules=["q_proj", "v_proj"])
    lab.add_adapter("ia3", "ia3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    for draw in (
        lambda: lab.plot_parameters(),
        lambda: lab.plot_memory(),
        lambda: lab.plot_delta_norms("lora"),
        lambda: lab.plot_delta_norms("ia3"),
        lambda: lab.plot_divergence("The ship is behind the wall."),
    ):
        assert draw()._repr_png_()[0].startswith(b"\x89PNG")  # type: ignore[attr-defined]
        assert draw_svg(draw, "a plot").startswith("<svg ")
    assert title(lab.plot_delta_norms("lora")) == "changes nothing yet: ΔW = 0 everywhere"
