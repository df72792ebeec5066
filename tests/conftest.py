"""What all tests share: quiet third parties, seeded randomness, and small labs."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from jupyterlab_page import what_pages_say
from standins import tiny_llama, tiny_tokenizer, write_adapter
from tiny_adapters import SEEDS, adapter_configs

from adapterlab import AdapterLab

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="run the long profiles: hours of random calls instead of minutes"
    )
    parser.addoption("--sample", type=int, default=1, metavar="N", help="run every N-th test (default: all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--sample")
    stay = items[::every]
    config.hook.pytest_deselected(items=[item for number, item in enumerate(items) if number % every])
    items[:] = stay


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport]:
    """With a browser test that failed goes what its pages show and what their consoles said."""
    report = yield
    if report.failed and item.get_closest_marker("browser") and (said := what_pages_say()):
        report.sections.append(("What the pages say", said))
    return report


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long profiles were asked for."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for the tiny models: a second one costs them more than it brings. The demo model has all."""
    torch.set_num_threads((os.cpu_count() or 1) if request.node.get_closest_marker("demo") else 1)


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of adapters that act on `tiny_llama()`, made and saved by plain PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(root / name, tiny_llama(), config, seed=SEEDS[name])
        for name, config in adapter_configs().items()
    }


@pytest.fixture
def ids() -> torch.Tensor:
    """Input ids of one text: shape (1, 12)."""
    return torch.randint(7, 300, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def lab() -> Iterator[AdapterLab]:
    """A lab on the tiny Llama, without adapters, with a chat template."""
    lab = AdapterLab(tiny_llama(), tokenizer=tiny_tokenizer(chat=True))
    yield lab
    lab.close()


@pytest.fixture
def full_lab(lab: AdapterLab, adapter_folders: dict[str, Path]) -> AdapterLab:
    """The same with five adapters of four methods, base selected."""
    for name, folder in adapter_folders.items():
        lab.load_adapter(folder, name)
    lab.set_adapter(None)
    return lab


@pytest.fixture
def plain_logits(adapter_folders: dict[str, Path], ids: torch.Tensor) -> Callable[[str | None], torch.Tensor]:
    """The oracle: logits of a fresh model with only this adapter, loaded by plain PEFT."""
    from peft import PeftModel

    def compute(name: str | None) -> torch.Tensor:
        model = tiny_llama()
        if name is not None:
            model = PeftModel.from_pretrained(model, adapter_folders[name]).eval()
        with torch.no_grad():
            return model(ids).logits

    return compute
