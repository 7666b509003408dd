"""A spiking network in whole numbers, as an 8-bit neuromorphic chip computes it: integer weights, biases and thresholds.

Spikes carry 1 instead of their height; the heights go into the weights that read them, and weights are rounded to a
grid per output channel. Currents are then whole numbers in units of that grid, and so are the thresholds that they are
compared with. Nothing else changes: the result is an ordinary `SpikingNetwork`. Since single precision holds whole
numbers below 2^24 exactly, it gives the same spikes however its sums are ordered.
"""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from quickspike.conversion import SpikingNetwork
from quickspike.errors import OptionError
from quickspike.neuron import AccumulatedMaxPool, Neuron, Repeat, Timed
from quickspike.operators import FUNCTION_NAMES, MAX_POOLS, Affine
from quickspike.regrading import Regrading

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
SUM_POOLS = (nn.AvgPool2d, nn.AvgPool3d)
PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
EXACT = 2**24
"""Whole numbers below it are exact in single precision."""
GRADES = 63
"""Largest whole number that stands for the sum of spikes of different heights."""
LARGEST_COUNT = 255
"""Largest whole number that a signal between layers may take: it fits one byte."""
FINEST = 2**20
"""Largest whole number that a bias, a threshold or a height may become: a channel whose weights are tiny or 0 would
otherwise have a grid so fine that nothing fits."""
LARGEST_VALUE = 4.0
"""Of an image whose values become whole numbers; larger ones are rounded as well, but their sums may be inexact."""
CLIPS = tuple(share / 20 for share in range(10, 21))
"""Shares of a channel's largest weight at which its grid may end."""


@dataclass(frozen=True)
class Quantised:
    """A network in whole numbers, and what of it is not."""

    network: SpikingNetwork
    kept: tuple[str, ...]
    """Layers with weights that stay in floating point, each with the reason."""
    sites: tuple[str, ...] = ()
    """Sites whose currents and thresholds are whole numbers."""


@dataclass
class _Grid:
    """What 1 means in the currents of layers that are added to each other, per channel: the coarsest that one wants."""

    wanted: list[Tensor]
    into: _Grid | None = None

    @property
    def root(self) -> _Grid:
        return self if self.into is None else self.into.root

    @property
    def unit(self) -> Tensor:
        """`[C]`; final only after all nodes were read."""
        return torch.stack(self.root.wanted).amax(0)

    def want(self, unit: Tensor) -> None:
        """Let the grid be no finer than `unit` `[C]`."""
        self.root.wanted.append(unit)

    def merge(self, other: _Grid) -> None:
        if other.root is not self.root:
            self.root.wanted += other.root.wanted
            other.root.into = self.root


@dataclass
class _Signal:
    """Whole numbers at a node. Spikes and sums of few of them have a unit that is known; currents share a grid."""

    known: Tensor | None = None
    """`[C]`: what 1 means, of spikes."""
    most: int = 1
    """Largest number, of spikes."""
    grid: _Grid | None = None
    """Of currents."""
    of_image: bool = False
    """Of an image, whose steps are much finer than spikes."""

    @property
    def unit(self) -> Tensor:
        return self.grid.unit if self.grid is not None else cast(Tensor, self.known)


def quantise(snn: SpikingNetwork, bits: int = 8, image_bits: int | None = None) -> Quantised:
    """A copy of `snn` whose layers have whole-number weights of `bits` bits wherever they read spikes.

    The layer that reads the image stays as it is, since its input is no train of spikes, unless the image is rounded to whole
    numbers too (`image_bits`); so does what has no counterpart in whole numbers. Where spikes of different heights are added,
    their sum is a number up to 63.

    Args:
        snn: not modified.
        bits: of a weight with its sign, 2 to 8.
        image_bits: of a value of the image with its sign, 2 to 12: steps such that -4 to 4, which normalised pictures lie
            in, has all of them. Every sum is whole then, and the answer the same in any program, however it orders its sums.
            None: the image as it is.

    Raises:
        OptionError: bits or image_bits is out of range, the network is in half precision, where sums are not exact, spikes have
            signs or are weighted, or neurons have a first run.
    """
    if next(snn.parameters()).dtype in (torch.float16, torch.bfloat16):
        raise OptionError("whole numbers need single precision to be exact; call quantise(snn.float())")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise OptionError(f"bits must be a whole number in [2, 8], got {bits!r}")
    if image_bits is not None and (type(image_bits) is not int or not 2 <= image_bits <= 12):
        raise OptionError(f"image_bits must be a whole number in [2, 12], got {image_bits!r}")
    snn.refuse_first_runs("a network in whole numbers")
    snn.refuse_levels("a network in whole numbers")
    signed = [name for name, neuron in snn.neurons().items() if neuron.signed]
    if signed:
        raise OptionError(f"spikes that are bytes have no sign, but {signed[0]} takes spikes back; convert with signed=False")
    network = copy.deepcopy(snn)
    quantiser = _Quantiser(network, 2 ** (bits - 1) - 1, image_bits)
    quantiser.run()
    network.provenance["weight_bits"] = bits
    if image_bits is not None:
        network.provenance["image_bits"] = image_bits
    return Quantised(network, tuple(quantiser.kept), tuple(quantiser.sites))


class _Quantiser(Regrading):
    """Reads nodes and chooses their grids; weights and thresholds are rounded once all grids are final."""

    def __init__(self, snn: SpikingNetwork, top: int, image_bits: int | None) -> None:
        super().__init__(snn)
        self.top, self.image_bits = top, image_bits
        self.signals: dict[fx.Node, _Signal | None] = {}
        self.timed = set[fx.Node]()
        self.kept: list[str] = []
        self.sites: list[str] = []

    def read(self, node: fx.Node) -> None:
        if isinstance(self._layer(node), Timed) or self.timed & set(node.all_input_nodes):
            self.timed.add(node)
        self.signals[node] = self._signal(node)
        if node.op == "placeholder" and self.image_bits is not None:
            self._round_image(node, self.image_bits)

    def _round_image(self, image: fx.Node, bits: int) -> None:
        """Let everything read the image in whole numbers."""
        unit = LARGEST_VALUE / 2 ** (bits - 1)
        users = list(image.users)
        with self.module.graph.inserting_after(image):
            scaled = self.module.graph.call_function(operator.mul, (image, 1 / unit))
        with self.module.graph.inserting_after(scaled):
            whole = self.module.graph.call_function(torch.round, (scaled,))
        for user in users:
            user.replace_input_with(image, whole)
        whole.meta = dict(image.meta)
        self.signals[whole] = _Signal(torch.full((self._shape(image)[0],), unit).to(self.like), 2 ** (bits - 1), of_image=True)

    # What a node gives

    def _signal(self, node: fx.Node) -> _Signal | None:
        layer = self._layer(node)
        if isinstance(layer, Neuron):
            return self._neuron(node, layer)
        parents = node.all_input_nodes
        if all(self.signals[parent] is None for parent in parents):
            if type(layer) in LAYERS:
                self.kept.append(f"{node.target}: reads {'real numbers' if self.timed & set(parents) else 'no spikes'}")
            return None
        signal = self._whole(node, layer)
        if signal is None:
            for parent in parents:
                self._leave(node, parent)
            if any(True for _ in (layer.parameters() if layer is not None else ())) and not isinstance(layer, Affine):
                self.kept.append(f"{node.target}: {type(layer).__name__} has no form in whole numbers here")
        return signal

    def _whole(self, node: fx.Node, layer: Any) -> _Signal | None:
        """The whole numbers that `node` gives; None if they end here."""
        x = self.signals[_operand(node)] if node.args and isinstance(node.args[0], fx.Node) else None
        if node.op == "call_function":
            return self._function(node, x)
        if x is None or layer is None:
            return None
        if type(layer) in LAYERS and x.known is not None:
            return self._weighted(node, layer, x)
        if type(layer) in SUM_POOLS and x.known is not None:
            return self._sum_pool(node, layer.kernel_size, layer.stride, layer.padding, layer, x)
        if type(layer) in (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d) and x.known is not None:
            return self._adaptive_pool(node, x)
        if type(layer) in (*PADS, Repeat):
            return x
        if type(layer) is nn.Flatten and layer.start_dim == 1 and x.known is not None:
            return self._flattened(node, x)
        if isinstance(layer, AccumulatedMaxPool) or type(layer) in MAX_POOLS:
            # Whole numbers of both signs may stand for anything; heights below 0 would turn the order round.
            return x if x.grid is not None or bool((x.unit > 0).all()) else None
        return None

    def _function(self, node: fx.Node, x: _Signal | None) -> _Signal | None:
        name = FUNCTION_NAMES.get(node.target)
        if name == "add" and len(node.all_input_nodes) == 2 and len(node.args) == 2 and not node.kwargs:
            return self._sum(node)
        if name == "cat" and _option(node, 1, "dim", 0) == 1:
            return self._joined(node)
        if name in ("avg_pool2d", "avg_pool3d") and len(node.all_input_nodes) > 1:
            return None  # its size is computed
        if name in ("avg_pool2d", "avg_pool3d") and x is not None and x.known is not None:
            kind: Any = SUM_POOLS[name == "avg_pool3d"]
            pool = kind(*node.args[1:], **node.kwargs)
            return self._sum_pool(node, pool.kernel_size, pool.stride, pool.padding, pool, x)
        if name in ("adaptive_avg_pool2d", "adaptive_avg_pool3d") and x is not None and x.known is not None:
            return self._adaptive_pool(node, x)
        if name in ("flatten", "reshape") and x is not None:
            before, after = self._shape(_operand(node)), self._shape(node)
            if len(after) > 1 and after[0] == before[0]:
                return x
            return self._flattened(node, x) if x.known is not None and after == (math.prod(before),) else None
        return None

    def _neuron(self, node: fx.Node, neuron: Neuron) -> _Signal | None:
        current = self.signals[_operand(node)]
        theta, _ = neuron.bounded()
        height = neuron.amplitude * theta if neuron.scaled else neuron.amplitude
        channels = self._shape(node)[0]
        if height.numel() not in (1, channels):
            # A height of its own for every neuron stays where it is.
            self._leave(node, _operand(node))
            return None
        known = height.detach().reshape(-1).expand(channels).clone()

        def write() -> None:
            neuron.scaled = False
            neuron.amplitude = nn.Parameter(torch.ones_like(neuron.amplitude), False)

        self.later.append(write)
        if current is not None and current.grid is not None:
            self._in_units(neuron, current.grid, node)
        else:
            self._leave(node, _operand(node))
        return _Signal(known)

    def _in_units(self, neuron: Neuron, grid: _Grid, node: fx.Node) -> None:
        """Let the threshold be a whole number of the grid."""
        self.sites.append(str(node.target))
        channels, *rest = self._shape(node)
        shape = (-1, *(1,) * len(rest))
        theta = neuron.bounded()[0].detach()
        grid.want(theta.expand(self._shape(node)).reshape(channels, -1).amax(1) / FINEST)

        def write() -> None:
            theta = neuron.bounded()[0].detach() / grid.unit.reshape(shape)
            # Even, so that half of it is whole too.
            neuron.threshold = nn.Parameter((2 * (theta / 2).round()).clamp_min(2), False)

        self.later.append(write)

    def _weighted(self, node: fx.Node, layer: Any, x: _Signal) -> _Signal | None:
        if type(layer) is nn.Linear and len(self._shape(node)) != 1:
            return None
        weight = layer.weight.detach() * per_input(layer, cast(Tensor, x.known))
        unit = grid_of(weight, self.top)
        if layer.bias is not None:
            unit = unit.maximum(layer.bias.detach().abs() / FINEST)
        rounded = (weight / _rows(unit, weight)).abs().flatten(1).sum(1) * x.most
        bias = 0 if layer.bias is None else (layer.bias.detach() / unit).abs()
        if bool((rounded + bias >= EXACT / 2).any()):
            self.kept.append(f"{node.target}: its sums could leave what is exact")
            self._leave(node, _operand(node))
            return None
        grid = _Grid([unit])

        def write() -> None:
            rows = _rows(grid.unit, weight)
            layer.weight = nn.Parameter((weight / rows).round().clamp_(-self.top, self.top), layer.weight.requires_grad)
            if layer.bias is not None:
                layer.bias = nn.Parameter((layer.bias.detach() / rows.flatten()).round(), layer.bias.requires_grad)

        self.later.append(write)
        return _Signal(grid=grid)

    def _adaptive_pool(self, node: fx.Node, x: _Signal) -> _Signal | None:
        before, after = self._shape(_operand(node))[1:], self._shape(node)[1:]
        if any(a % b for a, b in zip(before, after, strict=True)):
            return None
        size = tuple(a // b for a, b in zip(before, after, strict=True))
        return self._sum_pool(node, size, size, 0, None, x)

    def _sum_pool(self, node: fx.Node, size: Any, stride: Any, padding: Any, pool: Any, x: _Signal) -> _Signal | None:
        """An average pooling that adds up instead; the division goes into the unit."""
        dimensions = len(self._shape(node)) - 1
        size = (size,) * dimensions if isinstance(size, int) else tuple(size)
        most = x.most * math.prod(size)
        partial = pool is not None and (pool.ceil_mode or not (pool.count_include_pad or not _any(padding)))
        if most > LARGEST_COUNT or partial or (pool is not None and pool.divisor_override):
            return None
        kind = SUM_POOLS[dimensions - 2]
        name = str(node.target) if node.op == "call_module" else node.name
        node.op, node.args, node.kwargs = "call_module", node.args[:1], {}
        node.target = self._add(f"{name}_sum".replace(".", "_"), kind(size, stride, padding, divisor_override=1))
        return _Signal(cast(Tensor, x.known) / math.prod(size), most)

    def _flattened(self, node: fx.Node, x: _Signal) -> _Signal:
        channels, *rest = self._shape(_operand(node))
        return _Signal(cast(Tensor, x.known).reshape(channels, 1).expand(-1, math.prod(rest)).flatten(), x.most, of_image=x.of_image)

    def _joined(self, node: fx.Node) -> _Signal | None:
        parts = [self.signals[part] for part in cast(list[fx.Node], node.args[0])]
        if any(part is None or part.known is None for part in parts):
            return None
        spikes = cast(list[_Signal], parts)
        if len({part.of_image for part in spikes}) > 1:
            return None  # one grid for weights that differ by the steps of the image would leave nothing of these
        known, most = torch.cat([cast(Tensor, part.known) for part in spikes]), max(part.most for part in spikes)
        return _Signal(known, most, of_image=spikes[0].of_image)

    def _sum(self, node: fx.Node) -> _Signal | None:
        left, right = _operand(node), _operand(node, 1)
        a, b = self.signals[left], self.signals[right]
        if a is None or b is None or self._shape(left) != self._shape(right) or a.of_image or b.of_image:
            return None
        if a.grid is not None and b.grid is not None:
            a.grid.merge(b.grid)
            return _Signal(grid=a.grid)
        for position, (spikes, current) in enumerate(((a, b), (b, a))):
            if current.grid is not None:
                self._scale(node, position, cast(Tensor, spikes.known), current.grid)
                return _Signal(grid=current.grid)
        first, second = cast(Tensor, a.known), cast(Tensor, b.known)
        if a.most + b.most <= GRADES and torch.equal(first, second):
            return _Signal(first, a.most + b.most)
        unit = (first * a.most + second * b.most) / GRADES
        self._scale(node, 0, first, _Grid([unit]))
        self._scale(node, 1, second, _Grid([unit]))
        # Two halves may both round up.
        return _Signal(unit, GRADES + 1)

    def _scale(self, node: fx.Node, position: int, unit: Tensor, grid: _Grid) -> None:
        """Let an operand of a sum count in units of `grid`."""
        factor = Affine(len(unit))
        grid.want(unit.abs() / FINEST)
        self._insert(node, _operand(node, position), factor, "scaled")

        def write() -> None:
            factor.weight.copy_((unit / grid.unit).round())

        self.later.append(write)

    def _leave(self, node: fx.Node, parent: fx.Node) -> None:
        """Let `node` read real numbers of `parent`."""
        signal = self.signals[parent]
        if signal is None:
            return
        channels = self._shape(parent)[0]
        back = Affine(channels)
        self._insert(node, parent, back, "real")

        def write() -> None:
            back.weight.copy_(signal.unit)

        self.later.append(write)

    def _insert(self, node: fx.Node, parent: fx.Node, layer: Affine, name: str) -> None:
        layer.requires_grad_(False)
        target = self._add(f"{parent.name}_{name}", layer)
        with self.module.graph.inserting_before(node):
            between = self.module.graph.call_module(target, (parent,))
        node.replace_input_with(parent, between)


def grid_of(weight: Tensor, top: int) -> Tensor:
    """`[C_out]`: the unit in which weights `[C_out, ...]`, as whole numbers in -top..top, have the least squared error."""
    flat = weight.flatten(1)
    largest = flat.abs().amax(1).clamp_min(torch.finfo(flat.dtype).tiny * top)
    units = torch.stack([largest * (share / top) for share in CLIPS])
    errors = torch.stack([((flat / unit[:, None]).round().clamp(-top, top) * unit[:, None] - flat).square().sum(1) for unit in units])
    return units.gather(0, errors.argmin(0, keepdim=True))[0]


def _operand(node: fx.Node, position: int = 0) -> fx.Node:
    return cast(fx.Node, node.args[position])


def _rows(unit: Tensor, weight: Tensor) -> Tensor:
    """`unit` `[C_out]` as it broadcasts over a weight."""
    return unit.reshape(-1, *(1,) * (weight.ndim - 1))


def per_input(layer: Any, unit: Tensor) -> Tensor:
    """`unit` of the inputs `[C_in]` as it broadcasts over the layer's weight `[C_out, C_in/groups, ...]`."""
    groups = getattr(layer, "groups", 1)
    rows = unit.reshape(groups, 1, -1).expand(-1, layer.weight.shape[0] // groups, -1).flatten(0, 1)
    return rows.reshape(*rows.shape, *(1,) * (layer.weight.ndim - 2))


def _any(padding: Any) -> bool:
    return bool(padding) if isinstance(padding, int) else any(padding)


def _option(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
