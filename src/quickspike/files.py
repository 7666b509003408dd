"""Whole files or none: written under a temporary name in the same folder, then renamed.

What is written is put together in memory first. Libraries that write by themselves report a full disk as errors of all
kinds, or not at all: HDF5 ends the process when it closes a file that did not fit.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
import time
from pathlib import Path

from quickspike.errors import QuickspikeError

ABANDONED = 3600.0
"""Seconds after which what lies under a temporary name counts as left by a process that was killed."""


class OutputError(QuickspikeError):
    """A file or folder cannot be written."""


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write a whole file, or leave what was there.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        # mkstemp gives 0600; the finished file gets what any new file of this user gets.
        temporary.chmod(0o666 & ~_umask())
        temporary.write_bytes(data)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file, or leave what was there.

    Raises:
        OutputError: see `write_bytes`.
    """
    write_bytes(path, text.encode())


def clear_abandoned(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.part"):
        # Another process may be writing one, or removing it.
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def check_writable(path: str | Path) -> None:
    """Raise OutputError now rather than after the long work, if `path` cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
