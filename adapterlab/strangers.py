"""Files that strangers made are read with limits: ordinary files alone, no more bytes than such a file ever has, and what
they say is shown without the letters that change how other text looks."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from adapterlab.errors import AdapterLabError

# The largest in use: an AdaLoRA of a 400B model names 3 MB of triplets; an index of 3,000 shards has 10 MB.
MOST_CONFIG_BYTES = 32_000_000


def read_bytes(path: Path, most: int = MOST_CONFIG_BYTES) -> bytes:
    """The content of an ordinary file of at most `most` bytes. Raises OSError or ValueError, in words, for anything else:
    a pipe would be waited for, a device never ends."""
    # A pipe that nobody writes into is opened at once, so that what it is can be asked of what was opened.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no ordinary file")
        content = b"" if about.st_size > most else file.read(most + 1)
    if about.st_size > most or len(content) > most:
        raise ValueError(f"it has more than {most / 1e6:.0f} MB")
    return content


def read_json(path: Path, most: int = MOST_CONFIG_BYTES) -> Any:
    """What a JSON file says, with or without a byte order mark. Raises OSError or ValueError, in words."""
    content = read_bytes(path, most)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def refuse_odd_file(path: Path) -> None:
    """Raise `AdapterLabError` unless `path` is an ordinary file, before a reader that would wait or never end opens it."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # nothing there, a loop of links, or a name that can't be
        raise AdapterLabError(f"{str(path)!r} can't be read: {getattr(error, 'strerror', None) or error}.") from error
    if not stat.S_ISREG(mode):
        raise AdapterLabError(f"{str(path)!r} can't be read: it is no ordinary file.")
