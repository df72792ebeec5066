"""Keep third-party chatter out of people's notebooks, and nothing else: real warnings stay visible."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from adapterlab.guards import put_back

# What each logger says again and again, though there is nothing that the reader could do about it.
KNOWN_NOISE = {
    # once, when bitsandbytes is imported on a CPU with AVX512: it has a slower kernel of its own
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # once per layer and token with 8-bit weights: the cast is how it works
    "bitsandbytes.autograd._functions": ("MatMul8bitLt: inputs will be cast",),
}
# The same for warnings, as regular expressions.
KNOWN_WARNINGS = (
    # once per `generate` of an offloaded model, with the advice to put the ids on "meta": accelerate moves them to where
    # the layers compute
    r"You are calling \.generate\(\) with the `input_ids` being on a device type different .* the model is on meta\.",
)
_LOUD_LOGGERS = ("accelerate", "bitsandbytes", "huggingface_hub", "peft", "torch", "transformers")
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


class _NoiseFilter(logging.Filter):
    """Drops the records whose message begins with one of `beginnings`."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


def silence_known_noise() -> None:
    """Filter the lines of `KNOWN_NOISE` and `KNOWN_WARNINGS` out, for good.

    Imports nothing, and calling it again changes nothing. Each filter sits on the one logger that says the line, or
    knows the warning's words, so everything else still comes through. Nothing is put back afterwards: another thread
    may have changed the warning filters meanwhile.
    """
    for name, beginnings in KNOWN_NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _NoiseFilter) for known in logger.filters):
            logger.addFilter(_NoiseFilter(beginnings))
    first = [getattr(words, "pattern", "") for _, words, *_ in warnings.filters[: len(KNOWN_WARNINGS)]]
    for pattern in KNOWN_WARNINGS:
        if pattern not in first:  # what was set later comes before it
            warnings.filterwarnings("ignore", pattern, UserWarning)


@contextmanager
def quiet() -> Iterator[None]:
    """In the block, the loggers of the libraries underneath say errors only, and warnings are ignored.

    For attempts whose failure is expected. Levels and warning filters are as before afterwards, also after an
    exception. Progress bars are left alone.
    """
    loggers = [logging.getLogger(name) for name in _LOUD_LOGGERS]
    levels = [logger.level for logger in loggers]

    def undo() -> None:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

    with put_back(undo):
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


@contextmanager
def no_conversion_requests() -> Iterator[None]:
    """In the block, transformers does not ask the Hub from a background thread to convert pickled weights.

    It would open a pull request on someone's repository, and talk about it in the middle of the notebook.
    Whoever has set the variable is obeyed.
    """
    before = os.environ.get(_NO_CONVERSION)
    if before is None:
        os.environ[_NO_CONVERSION] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NO_CONVERSION, None)
