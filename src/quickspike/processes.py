"""The processes of a run: started, or found started by torchrun, and watched, so that one that dies does not do so in silence."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from subprocess import Popen
from typing import TYPE_CHECKING, Any

from quickspike.errors import OptionError
from quickspike.evaluation import make_fabric

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PERIOD = 0.2
"""Seconds between two looks at the processes."""
LAST = 2.0
"""Seconds that the first process, at its end, waits for that of the others."""


def start(device: str = "auto", precision: str = "32-true", devices: int = 1, nodes: int = 1, strategy: str = "auto") -> Fabric:
    """`make_fabric`, with all processes running.

    Where torchrun started them nothing is started, but their number has to be right: with too small a one each would do all
    the work by itself, and write the same files.

    Raises:
        OptionError: see `make_fabric`; torchrun started another number of processes, or several machines need torchrun.
    """
    _check_number(devices, nodes)
    fabric = make_fabric(device, precision, devices, nodes, strategy)
    with _stdout_kept():
        fabric.launch()
    children: Sequence[Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", ())
    if children:
        _Watch(children).start()
    return fabric


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """What libraries print goes to stderr: older versions of Gloo tell on stdout, below Python, how many peers they found.

    The processes that are started meanwhile keep stderr for both; only the first one prints results.
    """
    try:
        os.fstat(2)
        kept = os.dup(1)
    except OSError:  # one of them is closed
        yield
        return
    sys.stdout.flush()
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _check_number(devices: int, nodes: int) -> None:
    environment: Any = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment:
        return
    here, everywhere = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
    if (devices, devices * nodes) != (here, everywhere):
        raise OptionError(
            f"torchrun started {everywhere} processes, {here} on this machine, but devices={devices} and nodes={nodes} were asked for; "
            f"give --devices {here} --nodes {everywhere // here}"
        )


class _Watch(threading.Thread):
    """Says which process ended, and how; what is left of a run ends by its next exchange, or by Fabric, which says nothing."""

    def __init__(self, children: Sequence[Popen[bytes]]) -> None:
        super().__init__(daemon=True, name="quickspike-watch")
        self.children, self.said, self.over = children, set[int](), threading.Event()
        # A process that has lost another one may end before the next look.
        atexit.register(self.last_look)

    def run(self) -> None:
        while any(child.returncode is None for child in self.children) and not self.over.wait(PERIOD):
            self.look()

    def last_look(self) -> None:
        """Look once more; a process that dies closes its connections a little before it has ended."""
        # The interpreter shall end without this thread.
        self.over.set()
        if self.is_alive():
            self.join()
        end = time.monotonic() + LAST
        while any(child.poll() is None for child in self.children) and time.monotonic() < end:
            time.sleep(PERIOD / 10)
        self.look()

    def look(self) -> None:
        """Report processes that ended otherwise than they should have, each once."""
        for rank, child in enumerate(self.children, 1):
            code = child.poll()
            if code and rank not in self.said:
                self.said.add(rank)
                sys.stderr.write(f"quickspike: process {rank + 1} of {len(self.children) + 1} {how_it_ended(code)}\n")
                sys.stderr.flush()


def how_it_ended(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"ended with exit status {code}; what it said is above"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "no name"
    hint = "; the system does so where memory runs out" if name == "SIGKILL" else ""
    return f"was ended by signal {-code} ({name}){hint}"


__all__ = ["start"]
