"""What a spiking network does for an image, counted connection by connection: accumulates, multiplications, updates.

A spike causes one accumulate for every connection that it meets: borders and strides are exact, as are spikes that are
met several times (overlapping windows). Average pooling is taken as folded into the layer behind it (its factor goes into
the weights, each spike travels on), spikes that a residual connection brings to a neuron count one accumulate each, and a
layer that reads real values (the image, or an operator that was kept analog) multiplies.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from quickspike.conversion import SpikingNetwork
from quickspike.data import Batches, labelled_batches
from quickspike.errors import ConversionError, DataError, OptionError
from quickspike.neuron import AccumulatedMaxPool, Increment, Neuron, Repeat, RunningMean, Timed, unfold
from quickspike.operators import ANALOG_LAYERS, FUNCTION_NAMES, NOT_AFFINE, Affine
from quickspike.readouts import LeakyReadout

First = Literal["once", "every step"]
"""How often a layer that reads the image works: its input does not change, but hardware may compute it at every step."""

CHUNK = 2_000_000
"""Values of one image times steps times images that are counted at a time."""


@dataclass(frozen=True)
class Counts:
    """Operations of one layer, join or group of neurons; means per image, over all T steps."""

    name: str
    kind: str
    """layer, join (where a residual connection meets currents), neurons, or analog (what is no affine map, on real values)."""
    dense: float = 0.0
    """Multiply-accumulates that the source network does here."""
    multiplies: float = 0.0
    """Multiply-accumulates with real values; one for every value that an operator of kind analog gives, products of matrices
    in full."""
    accumulates: float = 0.0
    """Additions that spikes cause."""
    biases: float = 0.0
    """Additions of a bias."""
    source_biases: float = 0.0
    """Those of the source network."""
    updates: float = 0.0
    """Updates of a membrane potential: neurons times steps."""
    leaks: float = 0.0
    """Multiplications with a leak other than 1."""
    spikes: float = 0.0


@dataclass(frozen=True)
class Operations:
    """All that a spiking network does for an image, and its source network."""

    rows: tuple[Counts, ...]
    images: int
    steps: int
    first: First
    weighted: bool = False
    """Spikes are weighted by their step."""
    members: int = 1
    """Neurons in a group."""

    def total(self, field: str) -> float:
        """Sum of a field of `Counts`."""
        return math.fsum(getattr(row, field) for row in self.rows)

    @property
    def metrics(self) -> dict[str, float]:
        """The names of NeuroBench (Yik et al. 2025), per image; Dense is what all steps would take if every value were set."""
        neurons = self.total("updates")
        return {
            "Dense": self.total("dense") * self.steps,
            "Effective_MACs": self.total("multiplies"),
            "Effective_ACs": self.total("accumulates"),
            "MembraneUpdates": neurons,
            "ActivationSparsity": 1 - self.total("spikes") / neurons if neurons else 0.0,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [asdict(row) for row in self.rows]
        about = {"images": self.images, "steps": self.steps, "first": self.first} | ({"weighted": True} if self.weighted else {})
        about |= {"members": self.members} if self.members > 1 else {}
        return about | {"metrics": self.metrics, "rows": rows}


def count_operations(snn: SpikingNetwork, data: Batches, first: First = "once") -> Operations:
    """Count on images what `snn` does; spikes are those of the simulation.

    Args:
        snn: not modified.
        data: images, with labels or without.
        first: how often a layer that reads the image works.

    Raises:
        ConversionError: an operator whose connections are not plain (bilinear interpolation), or an accelerated network.
        DataError: there are no images, or they are unusable.
        OptionError: no such `first`.
    """
    if first not in ("once", "every step"):
        raise OptionError(f"first must be 'once' or 'every step', got {first!r}")
    if "engine" in snn.provenance:
        raise ConversionError(f"a network made for the {snn.provenance['engine']['name']} engine; count the one it was made from")
    totals: dict[tuple[str, str], dict[str, float]] = {}
    images = 0
    with torch.inference_mode():
        for batch, _ in labelled_batches(data):
            size = max(1, CHUNK // (batch[0].numel() * snn.steps))
            for part in torch.split(batch, size):
                counter = _Counter(snn, first)
                with snn.taking(part):
                    counter.run(part.to(next(snn.parameters())))
                for row, counts in counter.rows.items():
                    known = totals.setdefault(row, dict.fromkeys(counts, 0.0))
                    for field, value in counts.items():
                        known[field] += value
                images += len(part)
    if images == 0:
        raise DataError("there are no images to count operations on")
    rows = (Counts(name, kind, **{field: value / images for field, value in counts.items()}) for (name, kind), counts in totals.items())
    return Operations(tuple(rows), images, snn.steps, first, snn.weighted, snn.members)


class _Signal(NamedTuple):
    """What travels on a wire, both maps of the value's own shape: how many spikes, and where real values."""

    events: Any
    analog: Any
    """Either is None where it is zero all over; tuples of maps where the value is a tuple."""
    timed: bool


class _Counter(fx.Interpreter):
    def __init__(self, snn: SpikingNetwork, first: First) -> None:
        super().__init__(snn.network)
        self.snn, self.first = snn, first
        self.signals: dict[fx.Node, _Signal] = {}
        self.rows: dict[tuple[str, str], dict[str, float]] = {}
        self.left = {node: len(node.users) for node in snn.network.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        layer = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        signal = self._signal(n, layer, value)
        if signal is not None:
            self.signals[n] = signal
        for parent in n.all_input_nodes:
            self.left[parent] -= 1
            if not self.left[parent]:
                self.signals.pop(parent, None)
        return value

    def _signal(self, n: fx.Node, layer: Any, value: Any) -> _Signal | None:
        if n.op == "placeholder":
            return _Signal(None, torch.ones_like(value), False)
        inputs = [self.signals[parent] for parent in n.all_input_nodes if parent in self.signals]
        if n.op == "output" or not inputs or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            return None
        timed = isinstance(layer, Timed) or any(signal.timed for signal in inputs)
        if isinstance(layer, Neuron):
            return self._neurons(n, layer, inputs[0], value)
        if isinstance(layer, Repeat):
            return _Signal(None, torch.ones_like(value), True)
        if isinstance(layer, AccumulatedMaxPool):
            spikes = inputs[0].analog is None
            return _Signal(value.ne(0).float() if spikes else None, None if spikes else torch.ones_like(value), True)
        if isinstance(layer, (RunningMean, Increment, LeakyReadout)) or self._is_analog(n, layer):
            self._real(n, layer, value, timed)
            return _Signal(None, torch.ones_like(value), timed)
        ones = _ones(n, layer, self._constant)
        if ones is not None:
            self._layer(n, layer, ones, inputs[0], value)
            return _Signal(None, torch.ones_like(value), timed)
        name = FUNCTION_NAMES.get(n.target)
        if name in ("add", "sub"):
            return self._join(n, value, timed)
        if name in ("mul", "div", "neg"):
            return inputs[0]
        return _Signal(self._moved(n, layer, 0), self._moved(n, layer, 1), timed)

    def _constant(self, node: fx.Node) -> Any:
        return self.env[node]

    def _count(self, name: str, kind: str, **counts: float) -> None:
        known = self.rows.setdefault((name, kind), {})
        for field, value in counts.items():
            known[field] = known.get(field, 0.0) + value

    def _is_analog(self, n: fx.Node, layer: Any) -> bool:
        factors = [arg for arg in n.args if isinstance(arg, fx.Node) and arg in self.signals]
        product = FUNCTION_NAMES.get(n.target) in ("mul", "div") and len(factors) > 1
        return type(layer) in ANALOG_LAYERS or n.target in NOT_AFFINE or product

    def _real(self, n: fx.Node, layer: Any, value: Tensor, timed: bool) -> None:
        """What works on real values, whatever comes in."""
        inner = 1
        if FUNCTION_NAMES.get(n.target) == "matmul":
            inner = self._read(n.args[0]).shape[-1]
        elif FUNCTION_NAMES.get(n.target) == "scaled_dot_product_attention":
            inner = 2 * self._read(n.args[1]).shape[-2]
        again = self.snn.steps if not timed and self.first == "every step" else 1
        own = isinstance(layer, Timed)
        self._count(
            str(n.target) if layer is not None else n.name,
            "analog",
            dense=0.0 if own else float(value.numel() * inner) / (self.snn.steps if timed else 1),
            multiplies=float(value.numel() * inner) * again,
        )

    def _read(self, argument: Any) -> Any:
        return self.env[argument]

    def _neurons(self, n: fx.Node, layer: Neuron, signal: _Signal, value: Tensor) -> _Signal:
        self._arrive(str(n.target), signal.events)
        events = layer.spikes(value.detach()).float()
        leaky = bool(layer.bounded()[1].ne(1).any())
        # Steps that are simulated ahead are updates, too; their spikes go nowhere.
        updates = float(value.numel() * layer.members) * (1 + layer.delay / self.snn.steps if layer.first_run else 1)
        self._count(str(n.target), "neurons", updates=updates, leaks=updates if leaky else 0.0, spikes=_sum(events))
        if layer.members > 1 and self.snn.steps > 1:
            # A spike takes theta/M from all members; at the last step nobody needs it.
            before_last = _sum(unfold(events, self.snn.steps)[:-1])
            self._count(str(n.target), "inhibition", accumulates=before_last * (layer.members - 1))
        return _Signal(events, None, True)

    def _arrive(self, name: str, events: Tensor | None) -> None:
        """Spikes that reach a neuron without a layer in between."""
        if events is not None and (total := _sum(events)):
            self._count(name, "join", accumulates=total)

    def _layer(self, n: fx.Node, layer: Any, ones: Callable[[Tensor], Tensor], signal: _Signal, value: Tensor) -> None:
        samples = len(value) // (self.snn.steps if signal.timed else 1)
        (source,) = [parent for parent in n.all_input_nodes if parent in self.signals][:1]
        one = torch.ones_like(self.env[source][:1], dtype=torch.float32)
        again = self.snn.steps if not signal.timed and self.first == "every step" else 1
        bias = layer.bias if layer is not None else _argument(n, "bias", 2)
        self._count(
            str(n.target) if layer is not None else n.name,
            "layer",
            dense=_sum(ones(one)) * samples,
            multiplies=0.0 if signal.analog is None else _sum(ones(signal.analog.float())) * again,
            accumulates=0.0 if signal.events is None else _sum(ones(signal.events)),
            biases=float(value.numel()) * again if bias is not None else 0.0,
            source_biases=float(value[0].numel()) * samples if bias is not None else 0.0,
        )

    def _join(self, n: fx.Node, value: Tensor, timed: bool) -> _Signal:
        signals = [self.signals[parent] for parent in n.all_input_nodes if parent in self.signals]
        events, analog = None, None
        for signal in signals:
            if signal.events is not None:
                spread = signal.events.expand_as(value)
                events = spread if events is None else events + spread
            if signal.analog is not None:
                spread = signal.analog.expand_as(value)
                analog = spread if analog is None else torch.maximum(analog, spread)
        if events is None or analog is None:
            return _Signal(events, analog, timed)
        # Where spikes meet currents they are added up on the spot, and no spikes any more.
        self._arrive(n.name, events * analog)
        return _Signal(events * (1 - analog), analog, timed)

    def _moved(self, n: fx.Node, layer: Any, index: int) -> Any:
        """One of the maps behind an operator that only moves or gathers values."""
        maps = {parent: self.signals[parent][index] for parent in n.all_input_nodes if parent in self.signals}
        if all(one is None for one in maps.values()):
            return None

        def put(parent: fx.Node) -> Any:
            found = maps.get(parent)
            if parent in maps and found is None:
                return tree_map(lambda value: torch.zeros_like(value, dtype=torch.float32), self.env[parent])
            return self.env[parent] if found is None else tree_map(lambda value: value.float(), found)

        arguments, keywords = fx.node.map_arg(n.args, put), dict(fx.node.map_arg(n.kwargs, put))
        moved = _gather(n, layer)(*arguments, **keywords)
        return moved if index == 0 else tree_map(lambda value: value.ne(0).float(), moved)


def _sum(x: Tensor) -> float:
    return float(x.double().sum())


def _argument(n: fx.Node, name: str, place: int) -> Any:
    return n.args[place] if len(n.args) > place else n.kwargs.get(name)


WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, Affine)


def _ones(n: fx.Node, layer: Any, constant: Callable[[fx.Node], Any]) -> Callable[[Tensor], Tensor] | None:
    """The layer with all weights 1 and no bias: sums over its connections; None if the node is no layer with weights."""
    if isinstance(layer, WEIGHTED):
        plain = copy.deepcopy(layer).float()
        plain.weight.data = torch.ones_like(plain.weight)
        if isinstance(plain, Affine):
            plain.bias.data = torch.zeros_like(plain.bias)
        else:
            plain.bias = None
        return plain
    name = FUNCTION_NAMES.get(n.target, "")
    if name == "linear" or name.startswith("conv"):
        weight = torch.ones_like(constant(_argument(n, "weight", 1)), dtype=torch.float32)
        more = n.args[3:] if len(n.args) > 3 else ()
        keywords = {key: value for key, value in n.kwargs.items() if key not in ("input", "weight", "bias")}
        function: Any = n.target
        return lambda x: function(x, weight, None, *more, **keywords)
    return None


def _gather(n: fx.Node, layer: Any) -> Callable[..., Tensor]:
    """The operator with every connection of strength 1.

    Raises:
        ConversionError: its connections differ in strength.
    """
    name = FUNCTION_NAMES.get(n.target, "")
    if "avg_pool" in name:
        kind: Any = getattr(nn, {"avg_pool": "AvgPool", "adaptive_avg_pool": "AdaptiveAvgPool"}[name[:-2]] + name[-2:])
        return lambda x, *arguments, **keywords: _summed_pool(kind(*arguments, **keywords))(x)
    if isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
        return _summed_pool(layer)
    if name == "mean":
        return torch.sum
    if isinstance(layer, nn.Upsample) or name == "interpolate":
        mode = layer.mode if layer is not None else _argument(n, "mode", 3) or "nearest"
        if mode not in ("nearest", "nearest-exact"):
            raise ConversionError(f"operations of {n.name}: {mode} interpolation weighs spikes by real numbers; use mode='nearest'")
    if isinstance(layer, (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)):
        padding: Any = layer.padding
        return lambda x: F.pad(x, padding)
    if name == "pad":
        return lambda x, pad, mode="constant", value=None: F.pad(x, pad, mode)
    function: Any = layer if layer is not None else n.target
    return cast(Callable[..., Tensor], function)


def _summed_pool(layer: Any) -> Callable[[Tensor], Tensor]:
    """An average pooling that adds up instead."""
    if hasattr(layer, "output_size"):
        return lambda x: layer(x) * _areas(x, layer(x))

    def tuple_of(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes

    axes = int(type(layer).__name__[-2])
    pool = F.avg_pool3d if axes == 3 else F.avg_pool2d
    size, stride, padding = map(tuple_of, (layer.kernel_size, layer.stride, layer.padding))
    if axes == 1:
        return lambda x: F.avg_pool2d(
            x.unsqueeze(-2), (1, *size), (1, *stride), (0, *padding), layer.ceil_mode, divisor_override=1
        ).squeeze(-2)
    return lambda x: pool(x, size, stride, padding, layer.ceil_mode, True, 1)


def _areas(x: Tensor, pooled: Tensor) -> Tensor:
    """Sizes of the windows of an adaptive pooling, broadcastable over its output."""
    areas = torch.ones(())
    for whole, parts in zip(x.shape[2:], pooled.shape[2:], strict=True):
        lengths = [-(-(index + 1) * whole // parts) - index * whole // parts for index in range(parts)]
        areas = areas[..., None] * torch.tensor(lengths, dtype=torch.float32)
    return areas.to(x.device)
