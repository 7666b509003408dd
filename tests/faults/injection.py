"""Runs the command line in a process of its own, forked from this one, and lets something happen to it there.

What happens is set up by functions that the new process calls before the command; they need nothing of the command but that
it ends in system calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Setup = Callable[[], None]
CHANGES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "tempfile.mkstemp", "tempfile.mkdtemp"})
"""Audit events before which a process may be stopped: all by which Python code reads or changes files."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit status; of a process that a signal ended, minus its number."""
    out: str
    err: str
    seconds: float


def run(arguments: list[str], folder: Path, *setups: Setup, after: float | None = None, send: int = signal.SIGKILL) -> Ended:
    """Run a command in `folder`.

    Args:
        arguments: of the command line.
        folder: its working directory.
        setups: called in the new process, in this order.
        after: seconds, counted from the first line of the command, after which the signal `send` is sent.
        send: its number.
    """
    sys.stdout.flush()
    pipes = [os.pipe() for _ in range(3)]
    with warnings.catch_warnings():
        # Python warns of threads, which this process has none of that matter.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _command(arguments, folder, setups, pipes)
    for _, write in pipes:
        os.close(write)
    texts, started, begun = [b"", b"", b""], time.monotonic(), False
    deadline = None
    with selectors.DefaultSelector() as selector:
        for number, (read, _) in enumerate(pipes):
            selector.register(read, selectors.EVENT_READ, number)
        while selector.get_map():
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            for key, _ in selector.select(left):
                data = os.read(key.fd, 65536)
                texts[key.data] += data
                if not data:
                    selector.unregister(key.fd)
            if texts[2] and not begun:
                begun = True
                deadline = None if after is None else time.monotonic() + after
            if deadline is not None and time.monotonic() >= deadline:
                os.kill(pid, send)
                deadline = None
    for read, _ in pipes:
        os.close(read)
    _, status = os.waitpid(pid, 0)
    out, err = (text.decode(errors="replace") for text in texts[:2])
    return Ended(os.waitstatus_to_exitcode(status), out, err, time.monotonic() - started)


def _command(arguments: list[str], folder: Path, setups: tuple[Setup, ...], pipes: list[tuple[int, int]]) -> None:
    from quickspike import cli

    code: Any = 0
    try:
        for number, (_, write) in enumerate(pipes[:2], 1):
            os.dup2(write, number)
        os.chdir(folder)
        sys.argv = ["quickspike", *arguments]
        os.environ["COLUMNS"] = "400"
        for setup in setups:
            setup()
        os.write(pipes[2][1], b"begun")
        try:
            cli.main(arguments)
            sys.stdout.flush()
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:
            traceback.print_exc()
            code = 1
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


class Operations:
    """Counts what a process does to files in a folder, and stops it at one of these operations, before it is done."""

    def __init__(self, folder: Path, at: int | None = None, send: int = signal.SIGKILL) -> None:
        self.folder, self.at, self.send = str(folder.resolve()) + os.sep, at, send
        self._shared = mmap.mmap(-1, 8)

    @property
    def count(self) -> int:
        """Operations so far, also of a process that is gone."""
        return int(struct.unpack("q", self._shared[:8])[0])

    def __call__(self) -> None:
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(self.folder):  # noqa: PTH100 - Path.resolve asks the disk
            return
        self._shared[:8] = struct.pack("q", self.count + 1)
        if self.count == self.at:
            os.kill(os.getpid(), self.send)


def killed_at_size(size: int) -> Setup:
    """The kernel ends the process in the middle of a write, with `size` bytes of the file written."""

    def setup() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return setup


def full_at_size(size: int) -> Setup:
    """No file can have more than `size` bytes; writing fails as on a full disk, in the middle."""

    def setup() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return setup


def small_memory(spare: int) -> Setup:
    """The process can have `spare` bytes more than it has."""

    def setup() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, resource.RLIM_INFINITY))

    return setup


def without_privileges() -> None:
    """Permissions of files hold, for the superuser too.

    Raises:
        OSError: it cannot be had here.
    """
    if os.geteuid() != 0:
        return
    # Version 3 of the interface: two blocks of effective, permitted and inheritable capabilities.
    header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def clock(move: Callable[[float], float]) -> Setup:
    """What clocks show, in seconds since the start; `move` makes it of how many there were."""

    def setup() -> None:
        real, begin = time.monotonic, time.monotonic()
        before = {name: getattr(time, name)() for name in ("time", "perf_counter")}
        for name, value in before.items():
            setattr(time, name, lambda value=value: value + move(real() - begin))
            setattr(time, f"{name}_ns", lambda value=value: int(1e9 * (value + move(real() - begin))))

    return setup


def full_output() -> None:
    """Nothing can be printed."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A file system of that size at `folder`; False if there cannot be one here."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            # Lazily: networks that were loaded from there may still be about.
            subprocess.run(["umount", "-l", str(folder)], check=True)
