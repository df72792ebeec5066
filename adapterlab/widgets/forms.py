"""Loading an adapter from a folder or the Hub, and adding a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from adapterlab.widgets.compat import classes, set_tooltip
from adapterlab.widgets.fold import Fold
from adapterlab.widgets.state import PanelState

EXAMPLE_ID = "ybelkada/opt-350m-lora"
METHODS = {"LoRA": "lora", "IA3": "ia3", "AdaLoRA": "adalora"}


class LoadForm:
    """Calls `on_load(repo_or_path, name_or_None)`."""

    def __init__(self, state: PanelState, on_load: Callable[[str, str | None], object]) -> None:
        self._on_load = on_load
        self.source = classes(
            _text(description="Folder or Hub id", placeholder=f"for example {EXAMPLE_ID}"), "alab-wide"
        )
        self.name = _text(description="Name", placeholder="from the folder or id")
        self.button = w.Button(description="Load")
        set_tooltip(self.button, "lab.load_adapter: read it, check it against this base, and hang it on")
        controls = [self.source, self.name, self.button]
        self.fold = _form("Load an adapter", "gets a row and a column; lab.model stays as it is", controls)
        self.button.on_click(lambda _: self._submit())
        state.observe(lambda _: _lock(self.button, state), ["busy", "closed"])

    def _submit(self) -> None:
        self._on_load(self.source.value.strip(), self.name.value.strip() or None)


class AddForm:
    """Calls `on_add(method, name, config)`, where `config` has `r` and `target_modules` only where given."""

    def __init__(self, state: PanelState, on_add: Callable[[str, str, dict[str, Any]], object]) -> None:
        self._on_add = on_add
        self.method = classes(w.Dropdown(options=list(METHODS.items()), description="Method"), "alab-short")
        self.name = _text(value="default", description="Name")
        self.r = classes(w.BoundedIntText(value=8, min=1, max=4096, description="Rank"), "alab-short")
        self.targets = classes(
            _text(description="Target modules", placeholder="PEFT's choice, or for example q_proj, v_proj"),
            "alab-wide",
        )
        self.button = w.Button(description="Add")
        set_tooltip(self.button, "lab.add_adapter: a new adapter, untrained, so that it changes nothing yet")
        controls = [self.method, self.name, self.r, self.targets, self.button]
        self.fold = _form("Add a new adapter", "untrained: it changes nothing until it is trained", controls)
        self.method.observe(lambda _: self._on_method(), "value")
        self.button.on_click(lambda _: self._submit())
        state.observe(lambda _: _lock(self.button, state), ["busy", "closed"])

    def _on_method(self) -> None:
        self.r.layout.display = "none" if self.method.value == "ia3" else None

    def _submit(self) -> None:
        config: dict[str, Any] = {}
        if self.method.value == "adalora":
            config["init_r"] = self.r.value
        elif self.method.value == "lora":
            config["r"] = self.r.value
        targets = [part.strip() for part in self.targets.value.split(",") if part.strip()]
        if targets:
            config["target_modules"] = targets
        self._on_add(self.method.value, self.name.value.strip(), config)


def _form(title: str, hint: str, controls: list[Any]) -> Fold:
    heading = w.HTML(f'<div class="alab-form-title">{title}<span class="alab-muted"> {hint}</span></div>')
    fold = Fold(title, [heading, classes(w.HBox(controls), "alab-form")])
    classes(fold.body, "alab-inset")
    return fold


def _text(**traits: Any) -> w.Text:
    # Sent when the focus leaves it: a click on the button then always comes after the last letter.
    return w.Text(continuous_update=False, **traits)


def _lock(button: w.Button, state: PanelState) -> None:
    button.disabled = bool(state.busy) or state.closed
