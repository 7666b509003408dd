"""Inputs that nobody should trust, read in child processes that are watched: what comes of each, and what must not.

Allowed is a result, or an error of the package in one line that names the file. A fault is anything else: another exception, a
process that dies or hangs, a pickle that is opened, a program that is started, a file that appears, memory beyond a multiple of
the input's size.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickspike.cli import main
from quickspike.errors import QuickspikeError

SECONDS = 30.0
"""Of a processor's time after which a trial counts as hanging; a clock on the wall would blame it for a busy machine."""
PATIENCE = 20 * SECONDS
"""On that clock, for a trial that waits for something."""
FREE = 48 * 2**20
"""Bytes that any reading may take, however small its input: buffers, caches, imports."""
SAFETY = 2**30
"""Bytes of address space beyond which the child gets no more, so that a fault does not take the machine along."""
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
TOUCH = "__import__('pathlib').Path('marker').touch()"
"""Code that leaves a file behind if something runs it."""


class Fault(AssertionError):
    """What must not happen."""


@dataclass(frozen=True)
class Trial:
    """One input, and how it is read."""

    kind: str
    """Of what was done to the input."""
    read: Callable[[Path], str]
    """Reads the file and says what it was."""
    data: bytes = b""
    name: str = "input"
    multiple: float = 24
    """Bytes of memory that a byte of the input may cost."""
    names_file: bool = True
    """An error has to name the file."""
    leaves: bool = False
    """Reading may leave files."""


@dataclass(frozen=True)
class Outcome:
    """What came of a trial."""

    kind: str
    what: str
    """The class of the error, or what the input was read as."""
    detail: str = ""
    fault: bool = False
    peak: int = 0
    """Bytes that the process grew by at most."""
    seconds: float = 0.0
    """Of a processor's time."""


def run(trials: Sequence[Trial], step: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """All trials, one child after the other: a child that dies costs the trial that it was at."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(trials):
        rest = trials[len(outcomes) :]
        found, status = _child(rest, step)
        if len(found) < len(rest):
            dead = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
            hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
            found.append(Outcome(rest[len(found)].kind, "hung" if hung else "died", f"the process ended with {dead}", fault=True))
            step(found[-1])
        outcomes += found
    return outcomes


def _child(trials: Sequence[Trial], step: Callable[[Outcome], None]) -> tuple[list[Outcome], int]:
    folder = Path(tempfile.mkdtemp())
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            _work(trials, folder, write_end)
            os._exit(0)
        finally:
            os._exit(70)
    os.close(write_end)
    outcomes: list[Outcome] = []
    with os.fdopen(read_end) as stream:
        for line in stream:
            outcomes.append(Outcome(**json.loads(line)))
            step(outcomes[-1])
    status = os.waitpid(child, 0)[1]
    shutil.rmtree(folder, ignore_errors=True)
    return outcomes, status


def _work(trials: Sequence[Trial], folder: Path, results: int) -> None:
    os.chdir(folder)
    for kind in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(kind, signal.SIG_DFL)
    events: list[str] = []
    sys.addaudithook(lambda event, arguments: events.append(f"{event} {arguments}") if event in FORBIDDEN else None)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for trial in trials:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        outcome = _watched(trial, folder, events)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(results, (json.dumps(vars(outcome)) + "\n").encode())


def _watched(trial: Trial, folder: Path, events: list[str]) -> Outcome:
    path = folder / trial.name
    path.write_bytes(trial.data)
    events.clear()
    before, started = _reset_peak(), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + SAFETY, resource.RLIM_INFINITY))
    try:
        what, detail, fault = _judged(trial, path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    peak, seconds = max(0, _status("VmHWM") - before), time.process_time() - started
    strangers = sorted(other.name for other in folder.iterdir() if other != path)
    if trial.leaves and "marker" not in strangers:
        left, strangers = strangers, []
    else:
        left = strangers
    if events:
        what, detail, fault = "ran code", events[0], True
    elif strangers:
        what, detail, fault = "left files", ", ".join(strangers), True
    elif peak > FREE + trial.multiple * len(trial.data) and not fault:
        what, detail, fault = "took memory", f"{peak / 2**20:.0f} MiB for {len(trial.data)} bytes; {what}: {detail}", True
    for name in left:
        stranger = folder / name
        shutil.rmtree(stranger) if stranger.is_dir() else stranger.unlink()
    path.unlink(missing_ok=True)
    return Outcome(trial.kind, what, detail[:400], fault, peak, round(seconds, 4))


def _judged(trial: Trial, path: Path) -> tuple[str, str, bool]:
    """(what, detail, whether it is a fault)."""
    try:
        return trial.read(path), "", False
    except QuickspikeError as error:
        kind, text = type(error).__name__, str(error)
        if wanted := _wanted_memory(error):
            return "asked for memory", f"{kind}: {text} <- {wanted}", True
        if trial.names_file and str(path) not in text:
            return "error without the file", f"{kind}: {text}", True
        return kind, text, False
    except Fault as error:
        return "fault", str(error), True
    except BaseException as error:
        return type(error).__name__, str(error), True


def _wanted_memory(error: BaseException | None) -> str:
    """What was asked for and not there, if that is behind an error: on a machine that has more it would have been taken."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return f"{type(error).__name__}: {error}"[:200]
        error = error.__cause__ or error.__context__
    return ""


def _status(field: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _reset_peak() -> int:
    """Begin a new peak of the memory in use; the memory in use now."""
    # What was freed and kept would be used first, and hide what a trial takes.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def by_command(*arguments: Any) -> str:
    """The command line with these arguments: it works, or ends with status 2 and one line.

    Raises:
        QuickspikeError: with that line.
        Fault: anything else happened.
    """
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        code = leaving.code
    if code in (0, None):
        return "exit status 0"
    shown = err.getvalue()
    lines = [line for line in shown.splitlines() if line.startswith("quickspike: error: ")]
    if code != 2 or "Traceback" in shown or len(lines) != 1 or not shown.rstrip("\n").endswith(lines[0]):
        raise Fault(f"exit status {code}, {shown!r}")
    raise QuickspikeError(lines[0])


@contextlib.contextmanager
def warned() -> Any:
    """What the package warns of meanwhile, as a list of texts."""
    texts: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler, logger = Listening(logging.WARNING), logging.getLogger("quickspike")
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
