"""Files and folders that are there whole or not at all: written beside their place, flushed to the disk, then renamed.

A process killed at any moment leaves the old or the new. What it was writing stays beside as `.<name>.<…>.part`, and goes
with the next save in that place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from adapterlab.errors import AdapterLabError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_YOUNG = 3600  # seconds
_LONGEST = 60  # letters of a target's name in the names of what is made beside it
_CURRENT = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM}


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be filled; at the end it takes `folder`'s place, or after an error it is gone.

    Its files get the rights that the user's new files have (safetensors would write them for the owner alone). Raises
    `AdapterLabError` where it can't be written, or Python works in it; then what was there is still there.
    """
    with explained(folder):
        target = _resolved(folder)
        _check_nobody_stands_in(target)
    with explained(folder), scratch_beside(target) as scratch:
        built = scratch / "new"
        built.mkdir()
        yield built
        _settle(built)
        replace_folder(built, target)


def write_text(path: Path, text: str) -> Path:
    """Write a file whole, in UTF-8; a reader finds the old one or the new one. Gives back the path as it was given."""
    with explained(path), scratch_beside(target := _resolved(path)) as scratch:
        built = scratch / "new"
        with built.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(built, target)
        _flush(target.parent)
    return path


def _resolved(path: Path) -> Path:
    """Where it really is, so that a link stays a link to what is new."""
    return Path(os.path.realpath(path))


def _check_nobody_stands_in(target: Path) -> None:
    """A folder that is exchanged takes the working directory with it, and then this process has none."""
    try:
        here = _resolved(Path.cwd())
    except OSError:  # there is none already
        return
    if target in (here, *here.parents):
        raise AdapterLabError(
            f"{str(target)!r} can't be written: Python works in {str(here)!r}, and it would be replaced as a whole. "
            "Name another folder, such as one inside it, or go elsewhere first (os.chdir)."
        )


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder of one's own on the disk of `target`, which is gone afterwards. What processes that were killed have left
    beside it goes first. Raises `OSError`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name[:_LONGEST]}."
    _sweep(target.parent, prefix)
    scratch = target.parent / f"{prefix}{secrets.token_hex(8)}.part"
    scratch.mkdir()
    lock = _lock(scratch)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def replace_folder(built: Path, folder: Path) -> None:
    """Put `built` where `folder` is. What was there goes to where `built` was.

    Where the system has no exchange in one step (Windows, some network disks), there is an instant with neither; a process
    killed just then leaves both in the scratch folder.
    """
    if not _put(built, folder) and not _exchange(built, folder):
        aside = built.with_name("old")
        os.rename(folder, aside)
        try:
            os.rename(built, folder)
        except BaseException:
            os.rename(aside, folder)
            raise
    _flush(folder.parent)


def _put(built: Path, folder: Path) -> bool:
    """Give `built` the name `folder`, unless there is something of that name."""
    if folder.exists():
        return False
    try:
        os.rename(built, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was quicker
            raise
        return False
    return True


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says of writing to `path` into an `AdapterLabError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, UnicodeEncodeError, ValueError) as error:
        words = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise AdapterLabError(f"{str(path)!r} can't be written: {words}.") from error


def _settle(built: Path) -> None:
    """Give everything below the rights of new files, and have it on the disk before it gets its name."""
    rights = built.stat().st_mode & 0o666
    for root, folders, files in os.walk(built):
        for name in files:
            path = os.path.join(root, name)
            os.chmod(path, rights)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for name in folders:
            _flush(Path(root, name))
    _flush(built)


def _flush(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that."""
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a disk that has no such thing
            raise
    finally:
        os.close(handle)


def _lock(scratch: Path) -> int | None:
    """Hold a lock on the folder as long as this process lives, so that others see that somebody writes there."""
    if fcntl is None:
        return None
    handle = os.open(scratch, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a disk without locks: then nobody sweeps there either
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the scratch folders whose process is gone."""
    if fcntl is None:
        return
    for path in parent.iterdir():
        if not (path.name.startswith(prefix) and path.name.endswith(".part")):
            continue
        with contextlib.suppress(OSError):  # somebody else sweeps, or it is not ours to remove
            _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        young = time.time() - path.stat().st_mtime < _YOUNG
        if any(path.iterdir()) or not young:  # an empty one's lock may be still to come
            shutil.rmtree(path)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders take each other's place in one step; False where that can't be done."""
    swap = _swap()
    if swap is None:
        return False
    if swap(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


@functools.cache
def _swap() -> Callable[[bytes, bytes], int] | None:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = library.renamex_np
            return lambda one, other: int(swap(one, other, ctypes.c_uint(_EXCHANGE)))
        rename = library.renameat2
    except (OSError, AttributeError, TypeError):
        return None
    return lambda one, other: int(rename(_CURRENT, one, _CURRENT, other, ctypes.c_uint(_EXCHANGE)))
