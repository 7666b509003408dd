"""All scales into the weights: neurons whose thresholds are 1 and whose spikes are 1, as event-driven hardware has them.

A signal may be counted in any unit, per channel: spikes in their height, currents in the threshold of the neurons that
they reach. Weights take both in, w' = w unit_in / unit_out and b' = b / unit_out, as weight normalisation does (Rueckauer et
al., Front. Neurosci. 11:682, 2017), and what is computed stays the same. Currents that are added to each other have one unit
in common. Where that leaves two wishes open, the threshold of a neuron and the height of spikes on a shortcut that leads
there, a scale per channel stays in the graph as a layer of its own (`Affine`).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quickspike.conversion import SpikingNetwork
from quickspike.errors import ConversionError, OptionError
from quickspike.neuron import AccumulatedMaxPool, Neuron, Repeat
from quickspike.operators import FUNCTION_NAMES, MAX_POOLS, Affine
from quickspike.quantisation import PADS, SUM_POOLS, per_input, quantise
from quickspike.regrading import Regrading

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Affine)
"""Layers that take units in."""
UPSAMPLING = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


@dataclass
class _Unit:
    """What 1 means in a signal, per channel `[C]`; known at once, or chosen once all nodes were read."""

    channels: int
    given: Callable[[], Tensor] | None = None
    """Units that are decided elsewhere."""
    wanted: list[Tensor] = field(default_factory=list)
    """What neurons would like; the first one gets it."""
    into: _Unit | None = None

    @property
    def root(self) -> _Unit:
        return self if self.into is None else self.into.root

    @property
    def free(self) -> bool:
        return self.root.given is None

    @property
    def value(self) -> Tensor:
        """Final only after all nodes were read."""
        root = self.root
        if root.given is not None:
            return root.given()
        # Double, as a share of it may be wanted that single precision does not hold.
        return root.wanted[0] if root.wanted else _ones(root.channels)

    def want(self, value: Tensor) -> None:
        self.root.wanted.append(value)

    def merge(self, other: _Unit) -> None:
        """One unit for both, which are free."""
        if other.root is not self.root:
            self.root.wanted += other.root.wanted
            other.root.into = self.root


def fold(snn: SpikingNetwork, bits: int | None = None) -> SpikingNetwork:
    """A copy of `snn` in which every neuron has theta = 1 and spikes of height 1; see `SpikingNetwork.fold`.

    Raises:
        OptionError: bits is out of range, the network was accelerated, or neurons have a first run or weigh their spikes.
        ConversionError: thresholds or heights are not the same within a channel.
    """
    if "engine" in snn.provenance:
        raise OptionError(f"this network was made for the {snn.provenance['engine']['name']} engine; fold the one it was made from")
    snn.refuse_first_runs("a folded network")
    snn.refuse_levels("a folded network")
    network = copy.deepcopy(snn) if bits is None else _whole(snn, bits)
    _Folder(network).run()
    network.provenance["folded"] = True
    return network


def _whole(snn: SpikingNetwork, bits: int) -> SpikingNetwork:
    """`snn` in whole numbers, with potentials half-way between those that count.

    In whole numbers potentials often meet thresholds, and once both are divided by theta only rounding would say what
    happens there. Half a unit up, or down where m > theta fires, no potential meets one, and each stays on its side.
    """
    quantised = quantise(snn, bits)
    for name in quantised.sites:
        neuron = quantised.network.neuron(name)
        theta, leak = neuron.bounded()
        if not bool((leak == 1).all()):
            continue
        grid = 1 / snn.steps if neuron.averaged else 1.0
        places = neuron.initial * theta / grid
        # Products of halves with even numbers may be off by a rounding.
        places = torch.where((places - places.round()).abs() < 1e-4, places.round(), places)
        if neuron.to_zero:
            # A reset to 0 forgets where it began, so that the half unit goes into the threshold.
            begin = (places.ceil() if neuron.strict else places.floor()) * grid
            between = theta + (grid / 2 if neuron.strict else -grid / 2)
            neuron.threshold, neuron.initial = nn.Parameter(between, False), nn.Parameter(begin / between, False)
            continue
        middle = places.ceil() - 0.5 if neuron.strict else places.floor() + 0.5
        neuron.initial = nn.Parameter(middle * grid / theta, False)
    return quantised.network


class _Folder(Regrading):
    """Reads nodes and chooses their units; weights take them in once all are final."""

    def __init__(self, snn: SpikingNetwork) -> None:
        super().__init__(snn)
        self.units: dict[fx.Node, _Unit | None] = {}

    def read(self, node: fx.Node) -> None:
        self.units[node] = self._unit(node)

    # What a node gives

    def _unit(self, node: fx.Node) -> _Unit | None:
        """The unit of what `node` gives; None where 1 means 1."""
        layer, parents = self._layer(node), node.all_input_nodes
        if isinstance(layer, Neuron):
            return self._neuron(node, layer)
        if isinstance(layer, WEIGHTED):
            return self._weighted(node, layer)
        if not parents or all(self.units[parent] is None for parent in parents):
            return None
        unit = self._kept(node, layer)
        if unit is None:
            for parent in parents:
                self._in_ones(node, parent)
        return unit

    def _neuron(self, node: fx.Node, neuron: Neuron) -> _Unit:
        theta, _ = neuron.bounded()
        height = neuron.amplitude * theta if neuron.scaled else neuron.amplitude
        channels = self._shape(node)[0]
        thresholds, heights = (self._per_channel(node, value.detach(), channels) for value in (theta, height))
        parent = node.all_input_nodes[0]
        current = self.units[parent]
        if current is not None and current.free:
            current.want(thresholds)
        self._scaled(node, parent, lambda: thresholds)

        def write() -> None:
            neuron.scaled = False
            neuron.threshold = nn.Parameter(torch.ones_like(neuron.threshold), False)
            neuron.amplitude = nn.Parameter(torch.ones_like(neuron.amplitude), False)

        self.later.append(write)
        return _Unit(channels, lambda: heights)

    def _per_channel(self, node: fx.Node, value: Tensor, channels: int) -> Tensor:
        spread = value.expand(self._shape(node)).reshape(channels, -1)
        if not bool((spread == spread[:, :1]).all()):
            raise ConversionError(
                f"{node.target}: thresholds or heights differ within a channel, and no weight is that of one neuron alone; "
                "convert with granularity layer or channel"
            )
        return spread[:, 0].clone()

    def _weighted(self, node: fx.Node, layer: Any) -> _Unit | None:
        if type(layer) is nn.Linear and len(self._shape(node)) != 1:
            for parent in node.all_input_nodes:
                self._in_ones(node, parent)
            return None
        before = self.units[node.all_input_nodes[0]]
        after = _Unit(self._shape(node)[0])

        def write() -> None:
            out = after.value.to(layer.weight)
            into = None if before is None else before.value.to(layer.weight)
            layer.weight = nn.Parameter(_refolded(layer, into, out), layer.weight.requires_grad)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach() / out, layer.bias.requires_grad)

        self.later.append(write)
        return after

    def _kept(self, node: fx.Node, layer: Any) -> _Unit | None:
        """The unit that passes through `node`; None if it can pass through no further."""
        if node.op == "call_function":
            return self._function(node)
        parent = node.all_input_nodes[0]
        unit, axes = self.units[parent], re.search(r"([123])d$", type(getattr(layer, "pool", layer)).__name__)
        if unit is None or layer is None or (axes and int(axes[1]) != len(self._shape(parent)) - 1):
            return None  # a layer for more axes goes over channels too
        if isinstance(layer, (Repeat, *PADS, *UPSAMPLING)):
            return unit
        if isinstance(layer, AccumulatedMaxPool) or type(layer) in MAX_POOLS:
            # A height below 0 would turn the order round.
            return unit if unit.free or bool((unit.value > 0).all()) else None
        if type(layer) in SUM_POOLS:
            return self._sum_pool(node, layer, unit)
        if type(layer) in ADAPTIVE:
            return self._adaptive_pool(node, unit)
        if type(layer) is nn.Flatten and layer.start_dim == 1:
            return self._flattened(node, unit)
        return None

    def _function(self, node: fx.Node) -> _Unit | None:
        name, unit = FUNCTION_NAMES.get(node.target), self.units[node.all_input_nodes[0]]
        if name == "add" and len(node.all_input_nodes) == 2 and len(node.args) == 2 and not node.kwargs:
            return self._sum(node)
        if name == "cat" and (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) == 1:
            return self._joined(node)
        if unit is None:
            return None
        if name in ("avg_pool2d", "avg_pool3d") and len(node.all_input_nodes) > 1:
            return unit  # of a size that is computed
        if name in ("avg_pool2d", "avg_pool3d"):
            kind: Any = SUM_POOLS[name == "avg_pool3d"]
            return self._sum_pool(node, kind(*node.args[1:], **node.kwargs), unit)
        if name in ("adaptive_avg_pool2d", "adaptive_avg_pool3d"):
            return self._adaptive_pool(node, unit)
        if name in ("flatten", "reshape"):
            return self._flattened(node, unit)
        if name == "mean":
            return self._mean(node, unit)
        if name == "pad":
            return self._padded(node, unit)
        if name == "getitem":
            return unit if _leaves_channels(node.args[1]) else None
        return unit if name == "interpolate" and len(self._shape(node)) > 1 else None

    def _sum(self, node: fx.Node) -> _Unit | None:
        left, right = cast(list[fx.Node], list(node.args))
        if self._shape(left) != self._shape(right):
            return None
        free = [unit for unit in (self.units[left], self.units[right]) if unit is not None and unit.free]
        if not free:
            own = self.units[left]
            if own is not None and bool((own.value == 0).any()):
                own = None  # nothing can be counted in heights of 0
                self._in_ones(node, left)
            self._scaled(node, right, lambda: torch.ones(self._shape(node)[0]) if own is None else own.value)
            return own
        for more in free[1:]:
            free[0].merge(more)
        for parent in (left, right):
            unit = self.units[parent]
            if unit is None or not unit.free:
                self._scaled(node, parent, lambda: free[0].value)
        return free[0]

    def _joined(self, node: fx.Node) -> _Unit:
        parts = [(self._shape(part)[0], self.units[part]) for part in cast(list[fx.Node], node.args[0])]
        return _Unit(
            self._shape(node)[0],
            lambda: torch.cat(
                [torch.ones(channels).to(self.like) if unit is None else unit.value.to(self.like) for channels, unit in parts]
            ),
        )

    def _sum_pool(self, node: fx.Node, pool: Any, unit: _Unit) -> _Unit:
        """An average pooling that adds up instead; the division goes into the unit."""
        dimensions = len(self._shape(node)) - 1
        size, stride, padding = (_each(value, dimensions) for value in (pool.kernel_size, pool.stride, pool.padding))
        if pool.ceil_mode or pool.divisor_override or (any(padding) and not pool.count_include_pad):
            return unit
        return self._summed(node, size, stride, padding, unit)

    def _adaptive_pool(self, node: fx.Node, unit: _Unit) -> _Unit:
        before, after = self._shape(node.all_input_nodes[0])[1:], self._shape(node)[1:]
        if any(a % b for a, b in zip(before, after, strict=True)):
            return unit
        size = tuple(a // b for a, b in zip(before, after, strict=True))
        return self._summed(node, size, size, (0,) * len(size), unit)

    def _summed(self, node: fx.Node, size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], unit: _Unit) -> _Unit:
        name = str(node.target) if node.op == "call_module" else node.name
        layer = _sums(size, stride, padding)
        node.op, node.args, node.kwargs = "call_module", (node.all_input_nodes[0],), {}
        node.target = self._add(f"{name}_sum".replace(".", "_"), layer)
        return _Unit(unit.channels, lambda: unit.value / math.prod(size))

    def _mean(self, node: fx.Node, unit: _Unit) -> _Unit | None:
        """A mean over the whole map, as the sum pooling that it is."""
        parent = node.all_input_nodes[0]
        before = self._shape(parent)
        given: dict[str, Any] = {**dict(zip(("dim", "keepdim"), node.args[1:], strict=False)), **node.kwargs}
        dims = given.get("dim")
        axes = {dim % (len(before) + 1) for dim in ((dims,) if isinstance(dims, int) else dims or ())}
        if axes != set(range(2, len(before) + 1)) or len(before) not in (3, 4) or given.get("dtype") is not None:
            return None
        size = before[1:]
        if given.get("keepdim"):
            return self._summed(node, size, size, (0,) * len(size), unit)
        with self.module.graph.inserting_before(node):
            name = self._add(f"{node.name}_sum", _sums(size, size, (0,) * len(size)))
            pooled = self.module.graph.call_module(name, (parent,))
        node.target, node.args, node.kwargs = torch.flatten, (pooled, 1), {}
        return _Unit(unit.channels, lambda: unit.value / math.prod(size))

    def _flattened(self, node: fx.Node, unit: _Unit) -> _Unit | None:
        before, after = self._shape(node.all_input_nodes[0]), self._shape(node)
        if len(after) > 1 and after[0] == before[0]:
            return unit
        if after != (math.prod(before),):
            return None
        return _Unit(after[0], lambda: unit.value.repeat_interleave(math.prod(before[1:])))

    def _padded(self, node: fx.Node, unit: _Unit) -> _Unit | None:
        """Zeros mean the same in every unit; channels of zeros are counted in ones."""
        pads, mode, value = padding_of(node)
        if mode != "constant" or value or len(pads) > 2 * len(self._shape(node)):
            return None
        before, after = pads[-2:] if len(pads) == 2 * len(self._shape(node)) else (0, 0)
        return _Unit(self._shape(node)[0], lambda: F.pad(unit.value, (before, after), value=1.0)) if before or after else unit

    # Scales that no weight takes in

    def _in_ones(self, node: fx.Node, parent: fx.Node) -> None:
        """Let `node` read what 1 means 1 in."""
        unit = self.units[parent]
        if unit is not None and unit.free:
            unit.want(_ones(unit.channels))
        if unit is not None:
            self._scaled(node, parent, lambda: torch.ones(unit.channels))

    def _scaled(self, node: fx.Node, parent: fx.Node, wanted: Callable[[], Tensor]) -> None:
        """Let `node` read `parent` in the unit `wanted`, through a layer that scales it if that is another one."""

        def write() -> None:
            target, unit = wanted().to(self.like), self.units[parent]
            own = torch.ones_like(target) if unit is None else unit.value.to(self.like)
            if torch.equal(own, target):
                return
            layer = Affine(len(target)).requires_grad_(False)
            name = self._add(f"{parent.name}_scaled", layer)
            layer.weight.copy_(own / target)
            with self.module.graph.inserting_before(node):
                between = self.module.graph.call_module(name, (parent,))
            node.replace_input_with(parent, between)

        self.later.append(write)


def _ones(channels: int) -> Tensor:
    return torch.ones(channels, dtype=torch.float64)


def _refolded(layer: Any, into: Tensor | None, out: Tensor) -> Tensor:
    """The weight that reads in the units `into` and gives in the units `out`."""
    weight = cast(Tensor, layer.weight.detach())
    if isinstance(layer, Affine):
        return weight * (1 if into is None else into) / out
    if into is not None:
        weight = weight * per_input(layer, into)
    return weight / out.reshape(-1, *(1,) * (weight.ndim - 1))


def padding_of(node: fx.Node) -> tuple[tuple[int, ...], str, float]:
    """(widths, mode, value) of a call of torch's `pad`."""
    names = ("input", "pad", "mode", "value")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return tuple(given["pad"]), given.get("mode", "constant"), given.get("value") or 0.0


def _sums(size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> nn.Module:
    kind: Any = SUM_POOLS[len(size) - 2]
    return cast(nn.Module, kind(size, stride, padding, divisor_override=1))


def _leaves_channels(index: Any) -> bool:
    """True if an index takes all samples and channels, and a part of the places."""
    return (
        isinstance(index, tuple) and len(index) > 1 and all(isinstance(part, slice) for part in index) and index[:2] == (slice(None),) * 2
    )


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


__all__ = ["fold"]
