"""How much of a batch, and how many steps, fit into a given memory at a time; and memory that is used again."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from quickspike.errors import OptionError
from quickspike.neuron import Timed

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WORKSPACE = 1.5
"""Room for what libraries need beside the values themselves, as a multiple of these."""
COUNTER = 8
"""Bytes of the spike counter of a neuron."""


_DEMANDS: WeakKeyDictionary[SpikingNetwork, dict[Any, tuple[float, float]]] = WeakKeyDictionary()


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


def parts(snn: SpikingNetwork, images: Tensor, memory: int) -> Parts:
    """The largest parts of a batch, and only where one sample does not fit of the steps, that stay within `memory` bytes.

    The estimate is the largest sum of the values that are alive at the same time, times 1.5.

    Raises:
        OptionError: not even one step of one sample fits.
    """
    fixed, each = _demand(snn, images[:1])
    whole = fixed + each * _passes(snn)
    if whole <= memory:
        return Parts(int(memory // whole), snn.steps)
    steps = int((memory - fixed) // each)
    if steps < 1 or snn.summed or snn.synchronous:
        needed = whole if snn.synchronous else fixed + each
        why = "its layers wait for whole windows" if snn.synchronous else "one step of it"
        raise OptionError(f"one sample needs about {needed / 2**20:.0f} MiB ({why}), more than the {memory / 2**20:.0f} MiB allowed")
    return Parts(1, steps)


def _demand(snn: SpikingNetwork, image: Tensor) -> tuple[float, float]:
    """(bytes of one sample that do not depend on the number of steps, bytes of every step).

    Found once for a network, number of steps and kind of image: it takes a simulation of one sample.
    """
    known = _DEMANDS.setdefault(snn, {})
    key = (snn.steps, tuple(image.shape), image.dtype, next(snn.parameters()).dtype)
    if key not in known:
        known[key] = _measured(snn, image)
    return known[key]


def _measured(snn: SpikingNetwork, image: Tensor) -> tuple[float, float]:
    probe = _Alive(snn.network)
    with torch.no_grad():
        probe.run(image)
    counters = COUNTER * sum(math.prod(site.shape) for site in snn.sites)
    return counters + WORKSPACE * probe.constant, WORKSPACE * probe.timed / _passes(snn)


def _passes(snn: SpikingNetwork) -> int:
    """Steps that a simulation holds at a time."""
    return 1 if snn.summed else snn.steps


class _Alive(fx.Interpreter):
    """Runs one sample and keeps account of the values that are alive."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sizes: dict[fx.Node, tuple[int, int]] = {}
        self.constant, self.timed = 0, 0
        self.time = set[fx.Node]()
        self.left = {node: set(node.users) for node in module.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        layer = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, Timed) or any(parent in self.time for parent in n.all_input_nodes):
            self.time.add(n)
        size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and n.op != "get_attr")
        self.sizes[n] = (0, size) if n in self.time else (size, 0)
        constant, timed = (sum(column) for column in zip(*self.sizes.values(), strict=True))
        self.constant, self.timed = max(self.constant, constant), max(self.timed, timed)
        for parent in n.all_input_nodes:
            self.left[parent].discard(n)
            if not self.left[parent]:
                self.sizes.pop(parent, None)
        return value
