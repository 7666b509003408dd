"""How much of a batch, and how many steps, fit into a given memory at a time; and memory that is used again."""

from __future__ import annotations

import ctypes
import functools
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from quickspike.errors import OptionError
from quickspike.neuron import Neuron, Timed

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WORKSPACE = 3.25
"""Room for what is needed beside the values themselves, as a multiple of these: oneDNN copies inputs and outputs of a
convolution into its own layout where these are not channels-last, and memory that was freed lies in pieces between what is in
use. Measured on VGG-16 at T = 256: 2.8."""
ANSWERS = 4
"""Copies of what the last layer gave at every step, while they are put together."""


_DEMANDS: WeakKeyDictionary[SpikingNetwork, dict[Any, _Demand]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Parts:
    """Sizes in which a simulation is done."""

    samples: int
    steps: int


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, to use it again, as PyTorch does on GPUs.

    Left to itself, glibc gives large blocks back to the system as they are freed, and every layer then waits for the
    kernel to clear new pages: up to twice the time of a whole simulation. What the process holds no longer shrinks.

    Returns:
        Whether it is done: with glibc. Elsewhere nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, -1))


def in_bytes(memory: str | int) -> int:
    """A number of bytes from a text such as "2GiB" or "500 MB".

    Raises:
        OptionError: it is something else, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(memory)) if not isinstance(memory, bool) else None
    if found is None or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise OptionError(f"memory must be a number with a unit such as 2GiB or 500MB, got {memory!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def out_of_memory(error: BaseException | None) -> bool:
    """Whether there was not enough memory, which says nothing about what was asked for or read.

    PyTorch has no type of its own for the memory of the CPU, and while it saves a file it puts another error in the place of
    the first.
    """
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def counter_type(steps: int) -> torch.dtype:
    """The smallest type for numbers of spikes in `steps` steps; signed, so that differences of two are right too."""
    return next(kind for kind in (torch.int8, torch.int16, torch.int32) if steps <= torch.iinfo(kind).max)


def parts(snn: SpikingNetwork, images: Tensor, memory: int, *, counted: bool = True, step_by_step: bool = False) -> Parts:
    """The largest parts of a batch, and only where one sample does not fit of the steps, that stay within `memory` bytes.

    The estimate is the largest sum of the values that are alive at the same time, times 3.25, and what is kept beside them.

    Args:
        snn: the network.
        images: `[B, ...]`.
        memory: in bytes.
        counted: spikes are counted, and the answers of all steps kept; else only the answer after the last.
        step_by_step: all layers run for one step at a time.

    Raises:
        OptionError: not even one step of one sample fits.
    """
    need = _demand(snn, images[:1])
    counters = counter_type(snn.steps * snn.members).itemsize * need.neurons if counted else 0
    kept = ANSWERS * need.answer * (snn.steps if counted else 1)
    one = 2 * counters + kept + WORKSPACE * need.constant
    if step_by_step:
        # Potentials twice: those of the samples that go on are copied when others stop.
        least = one + need.fed + 2 * need.states + WORKSPACE * need.timed
        if least > memory:
            raise _too_little(least, memory, "one step of it")
        return Parts(int(memory // least), 1)
    whole = counters + WORKSPACE * (need.constant + need.timed * (1 if snn.summed else snn.steps))
    if whole <= memory:
        return Parts(int(memory // whole), snn.steps)
    if snn.summed or snn.synchronous:
        raise _too_little(whole, memory, "its layers wait for steps of those before")
    steps = int((memory - one - need.states) // (WORKSPACE * need.timed))
    if steps < 1:
        raise _too_little(one + need.states + WORKSPACE * need.timed, memory, "one step of it")
    return Parts(1, min(steps, snn.steps))


def _too_little(needed: float, memory: int, why: str) -> OptionError:
    return OptionError(f"one sample needs about {_amount(needed)} ({why}), more than the {_amount(memory)} allowed")


def _amount(size: float) -> str:
    """Bytes in the largest unit of which there is at least one."""
    unit = next((name for name in ("GiB", "MiB", "KiB") if size >= UNITS[name.upper()]), "B")
    return f"{size / UNITS[unit.upper()]:.3g} {unit}"


@dataclass
class _Demand:
    """Bytes of one sample, and its neurons."""

    constant: int = 0
    """Of values that are the same at every step: the most that are alive at the same time."""
    fed: int = 0
    """Of those among them that timed layers read, all together."""
    timed: int = 0
    """Of the values of one step: the most that are alive at the same time."""
    states: int = 0
    """Of potentials and their like, which are kept between steps."""
    answer: int = 0
    """Of what the last layer gives at one step."""
    neurons: int = 0


def _demand(snn: SpikingNetwork, image: Tensor) -> _Demand:
    """Found once for a network and kind of image: it takes a simulation of one sample for one step."""
    known = _DEMANDS.setdefault(snn, {})
    key = (snn.summed, tuple(image.shape), image.dtype, next(snn.parameters()).dtype)
    if key not in known:
        probe = _Alive(snn)
        with torch.no_grad():
            probe.run(image)
        known[key] = probe.demand
    return known[key]


class _Alive(fx.Interpreter):
    """Runs one sample for one step and keeps account of the values that are alive."""

    def __init__(self, snn: SpikingNetwork) -> None:
        super().__init__(snn.network)
        self.summed, self.demand = snn.summed, _Demand()
        self.sizes: dict[fx.Node, tuple[int, int]] = {}
        self.time, self.fed = set[fx.Node](), set[fx.Node]()
        self.left = {node: set(node.users) for node in snn.network.graph.nodes}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, Neuron):
            self.demand.neurons += args[0].numel()
        if self.summed or not isinstance(layer, Timed):
            return super().call_module(target, args, kwargs)
        if isinstance(layer, Neuron) and layer.waits:
            # It waits for all steps, so it cannot run one; and it keeps nothing between steps.
            return torch.zeros_like(args[0], dtype=layer.output)
        out, state = layer.scan(args[0], None, 1)
        self.demand.states += _bytes(state)
        return out

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        layer = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, Timed) or any(parent in self.time for parent in n.all_input_nodes):
            self.time.add(n)
        size = 0 if n.op == "get_attr" else _bytes(value)
        if n.op == "output":
            self.demand.answer = size
        self.sizes[n] = (0, size) if n in self.time else (size, 0)
        if n in self.time:
            new = set(n.all_input_nodes) - self.time - self.fed
            self.demand.fed += sum(self.sizes[parent][0] for parent in new)
            self.fed |= new
        constant, timed = (sum(column) for column in zip(*self.sizes.values(), strict=True))
        self.demand.constant, self.demand.timed = max(self.demand.constant, constant), max(self.demand.timed, timed)
        for parent in n.all_input_nodes:
            self.left[parent].discard(n)
            if not self.left[parent]:
                self.sizes.pop(parent, None)
        return value


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
