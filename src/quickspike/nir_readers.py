"""What programs that read NIR make of its nodes, as one table; and a simulation of a NIR graph by each of their rules.

NIR says what a neuron is as an equation in continuous time. How a time step looks, and what a reset does, every reader
decides for itself, and they disagree. A file is therefore written for one reader (`nir_export`), and what that reader will
answer can be computed here without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quickspike.errors import ConversionError, DataError, OptionError, UnknownNameError
from quickspike.readouts import answers

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "quickspike"
"""Of what we say about a graph, in its metadata."""


@dataclass(frozen=True)
class Reader:
    """One program's reading of NIR; figures of versions are those that it was looked up in."""

    name: str
    version: str
    reset: Literal["subtract", "zero"]
    """What a spike does to the potential."""
    compares: Literal[">", ">="]
    """How the potential is held against the threshold."""
    dt: float = 1e-4
    """Length of a time step in seconds, as the reader takes it: what leaks and resistances are written for."""
    pools: Literal["sum", "average"] = "sum"
    """The pooling that it reads."""
    flattens: bool = True
    """Reads Flatten as NIR means it; else layers behind one are written as convolutions over the whole map."""
    neuron: Literal["IF", "LIF"] = "IF"
    """Node for a neuron without leak."""
    adds: bool = True
    """Adds up what several edges bring to a node, once all of it is there; else files are written as chains, see `nir_chains`."""
    several: bool = False
    """A neuron may fire several times in one step."""
    lowest: float | None = None
    """The potential is never below minus so many thresholds."""
    call: str = ""
    """How a file is read there."""


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("nir", "1.0", reset="zero", compares=">", call="the equations of the NIR paper, one Euler step per time step"),
        Reader(
            "sinabs",
            "3.1",
            reset="subtract",
            compares=">=",
            dt=1.0,
            several=True,
            lowest=1.0,
            adds=False,
            call="sinabs.nir.from_nir(nir.read(FILE), batch_size=B)",
        ),
        Reader(
            "spikingjelly",
            "2.0",
            reset="zero",
            compares=">=",
            dt=1.0,
            pools="average",
            adds=False,
            call="spikingjelly.activation_based.nir_exchange.import_from_nir(FILE, dt=1.0)",
        ),
        Reader(
            "snntorch",
            "1.0",
            reset="zero",
            compares=">",
            pools="average",
            flattens=False,
            neuron="LIF",
            adds=False,
            call="snntorch.import_nir.import_from_nir(nir.read(FILE))",
        ),
        Reader(
            "norse",
            "1.1",
            reset="zero",
            compares=">",
            dt=1e-3,
            flattens=False,
            adds=False,
            call="norse.torch.utils.import_nir.from_nir(nir.read(FILE))",
        ),
    )
}
"""By name. `nir` is the specification itself, for readers that are not listed."""


def reader_of(name: str) -> Reader:
    """The reader of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in READERS:
        raise UnknownNameError("NIR reader", name, READERS)
    return READERS[name]


@dataclass(frozen=True)
class Played:
    """What a NIR graph gave."""

    outputs: Tensor
    """Of every step, `[T, B, K]`."""
    spikes: Mapping[str, Tensor]
    """Spikes of every neuron in T steps by node, `[B, ...]`."""
    leak: float | None = None
    """Of the readout, see `quickspike.readouts`."""

    @property
    def logits(self) -> Tensor:
        """The readout after every step, `[T, B, K]`."""
        return answers(self.outputs, self.leak)


@torch.no_grad()
def play(graph: Any, images: Tensor, steps: int, reader: str = "nir") -> Played:
    """Present `images` to a NIR graph for some steps, by the rules of a reader, in float32.

    Args:
        graph: `nir.NIRGraph` without cycles.
        images: `[B, ...]`, the same at every step.
        steps: T.
        reader: see `READERS`.

    Raises:
        ConversionError: the graph holds a node that is not played here, a cycle, or not one Input and one Output.
        OptionError: steps < 1.
        DataError: the images do not fit the graph.
        UnknownNameError: no such reader.
    """
    start, end = _ends(graph)
    shape = pair(graph.nodes[start].input_type["input"])
    if images.shape[1:] != shape:
        raise DataError(f"this graph takes images of shape [B, {', '.join(map(str, shape))}], got {list(images.shape)}")
    if steps < 1:
        raise OptionError(f"steps must be >= 1, got {steps}")
    images = images.float()
    rules, order = reader_of(reader), in_order(graph)
    parents = {name: [a for a, b in graph.edges if b == name] for name in order}
    layers = {name: _layer(name, graph.nodes[name], rules) for name in order}
    outputs, spikes = list[Tensor](), dict[str, Tensor]()
    for _ in range(steps):
        values: dict[str, Tensor] = {}
        for name in order:
            layer = layers[name]
            x = images if not parents[name] else _added([values[parent] for parent in parents[name]])
            values[name] = layer(x)
            if isinstance(layer, _Neurons):
                spikes[name] = values[name] + spikes.get(name, 0)
        outputs.append(values[end])
    return Played(torch.stack(outputs), spikes, readout_leak(graph))


def readout_leak(graph: Any) -> float | None:
    """What the metadata of a graph of ours say of its readout; None where all steps count alike."""
    text = graph.metadata.get(KEY, "{}")
    try:
        leak: float | None = json.loads(text.decode() if isinstance(text, bytes) else text).get("readout_leak")
    except (ValueError, TypeError, AttributeError) as error:
        raise ConversionError(f"the metadata under {KEY!r} are damaged ({error}); export the network again") from error
    return leak


def _ends(graph: Any) -> tuple[str, str]:
    """The names of the Input and of the Output."""
    found = [[name for name, node in graph.nodes.items() if type(node).__name__ == kind] for kind in ("Input", "Output")]
    if [len(names) for names in found] != [1, 1]:
        raise ConversionError(f"a graph with one Input and one Output is wanted, got {len(found[0])} and {len(found[1])}")
    return found[0][0], found[1][0]


def in_order(graph: Any) -> list[str]:
    """The names of the nodes so that none comes before what it reads.

    Raises:
        ConversionError: there is no such order.
    """
    waiting = {name: {a for a, b in graph.edges if b == name} for name in graph.nodes}
    order: list[str] = []
    while waiting:
        ready = sorted(name for name, parents in waiting.items() if not parents - set(order))
        if not ready:
            raise ConversionError(
                f"the NIR graph has a cycle through {', '.join(sorted(waiting)[:5])}; recurrent networks are not read here"
            )
        order += ready
        for name in ready:
            del waiting[name]
    return order


def _added(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


class _Neurons:
    """IF and LIF nodes, step by step, by the rules of a reader."""

    def __init__(self, node: Any, rules: Reader) -> None:
        self.rules = rules
        self.theta, self.v_reset = tensor(node.v_threshold), tensor(node.v_reset)
        self.leak, self.gain = dynamics(node, rules)
        self.v: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        rules, theta = self.rules, self.theta
        v = self.gain * x if self.v is None else self.leak * self.v + self.gain * x
        fired = self._fired(v)
        self.v = v - fired * theta if rules.reset == "subtract" else torch.where(fired > 0, self.v_reset, v)
        if rules.lowest is not None:
            self.v = self.v.maximum(-rules.lowest * theta)
        return fired

    def _fired(self, v: Tensor) -> Tensor:
        if self.rules.several:
            return (v / self.theta).trunc().clamp_min(0)
        above = v > self.theta if self.rules.compares == ">" else v >= self.theta
        return above.to(v)


def dynamics(node: Any, rules: Reader) -> tuple[Tensor, Tensor]:
    """(leak, weight of the current) of a step of an IF or LIF node."""
    r = tensor(node.r)
    if type(node).__name__ == "IF":
        # Readers leave r out or ask for the one that gives currents a weight of 1.
        return torch.ones_like(r), r if rules.name == "nir" else torch.ones_like(r)
    tau = tensor(node.tau).double()
    if rules.name == "sinabs":
        return (-1 / tau).exp().float(), torch.ones_like(r)
    if rules.name == "norse":
        # It reads no r.
        return (1 - rules.dt / tau).float(), (rules.dt / tau).float()
    return (1 - rules.dt / tau).float(), (r.double() * rules.dt / tau).float()


def tensor(values: Any) -> Tensor:
    """A node's array as float32."""
    return torch.from_numpy(np.ascontiguousarray(values)).float()


def pair(value: Any) -> tuple[int, ...]:
    """Sizes along the axes of a map, as NIR holds them."""
    return tuple(int(size) for size in np.atleast_1d(value))


def _layer(name: str, node: Any, rules: Reader) -> Callable[[Tensor], Tensor]:
    kind = type(node).__name__
    if kind in ("IF", "LIF"):
        return _Neurons(node, rules)
    if kind not in _MAKERS:
        raise ConversionError(f"{name}: a node {kind} is not read here; known are IF, LIF, {', '.join(sorted(_MAKERS))}")
    return _MAKERS[kind](node)


def _convolution(node: Any) -> Callable[[Tensor], Tensor]:
    weight, bias = tensor(node.weight), tensor(node.bias)
    run: Any = F.conv1d if weight.ndim == 3 else F.conv2d
    padding = node.padding if isinstance(node.padding, str) else pair(node.padding)
    window = (pair(node.stride), padding, pair(node.dilation), int(node.groups))
    return lambda x: run(x, weight, bias, *window)


def _sum_pool(node: Any) -> Callable[[Tensor], Tensor]:
    size, stride, padding = pair(node.kernel_size), pair(node.stride), pair(node.padding)
    return lambda x: F.avg_pool2d(x, size, stride, padding, divisor_override=1)


def _average_pool(node: Any) -> Callable[[Tensor], Tensor]:
    size, stride, padding = pair(node.kernel_size), pair(node.stride), pair(node.padding)
    return lambda x: F.avg_pool2d(x, size, stride, padding)


def _flatten(node: Any) -> Callable[[Tensor], Tensor]:
    start, end = int(node.start_dim), int(node.end_dim)
    return lambda x: x.flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)


def _affine(node: Any) -> Callable[[Tensor], Tensor]:
    weight = tensor(node.weight)
    bias = tensor(node.bias) if hasattr(node, "bias") else None
    return lambda x: F.linear(x, weight, bias)


def _scale(node: Any) -> Callable[[Tensor], Tensor]:
    scale = tensor(node.scale)
    return lambda x: x * scale


def _as_it_is(node: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x


_MAKERS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "Input": _as_it_is,
    "Output": _as_it_is,
    "Conv1d": _convolution,
    "Conv2d": _convolution,
    "Affine": _affine,
    "Linear": _affine,
    "Scale": _scale,
    "SumPool2d": _sum_pool,
    "AvgPool2d": _average_pool,
    "Flatten": _flatten,
}


__all__ = ["READERS", "Played", "Reader", "in_order", "play", "reader_of"]
