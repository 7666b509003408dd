"""Bytes in, whole numbers out: layers whose weights are whole numbers read spikes as bytes and add in 32-bit integers.

oneDNN's quantised convolution and linear operators do the work. Which layers qualify is seen from the network itself
(whole-number weights of at most 8 bits, inputs that are spikes or sums of few), as `quantise` makes it; the others run
in floating point as before, and `Bytes.rewrite` lists them. Every sum is exact, so spikes are those of the same network in floating point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quickspike.neuron import Neuron, Timed
from quickspike.operators import FUNCTION_NAMES, MAX_POOLS, Affine
from quickspike.processor import largest_pair
from quickspike.quantisation import LARGEST_COUNT, PADS, SUM_POOLS

WEIGHT = 127
LARGEST_SUM = 2**31 - 1
"""Sums are made in 32 bits, where larger ones would come out negative, in silence."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OPERATORS = ("qconv_prepack", "qconv1d_pointwise", "qconv2d_pointwise", "qconv3d_pointwise", "qlinear_prepack", "qlinear_pointwise")


def available() -> bool:
    """True if this build of torch has oneDNN's operators."""
    return all(hasattr(torch.ops.onednn, name) for name in OPERATORS)


class _Packed:
    """Weights as oneDNN lays them out: opaque, never changed, so that copies share them."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __deepcopy__(self, memo: Any) -> _Packed:
        return self


class ByteConv(nn.Module):
    """A convolution of bytes `[N, C, ...]` with weights of 8 bits; exact sums in float32, biases added.

    Args:
        layer: its weights are whole numbers; with one to three axes, any padding.
    """

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        weight = layer.weight.detach().to(torch.int8)
        # (before, after) of the last axis, then of the one before it; torch has worked out "same" here.
        ends = list(layer._reversed_padding_repeated_twice)
        plain = layer.padding_mode == "zeros" and ends[::2] == ends[1::2]
        self.mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.ends: list[int] | None = None if plain else ends
        padding = ends[::2][::-1] if plain else [0] * (weight.ndim - 2)
        self.window: tuple[Any, ...] = (list(layer.stride), padding, list(layer.dilation), layer.groups)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.register_buffer("scales", torch.ones(len(weight)))
        self.register_buffer("zeros", torch.zeros(len(weight), dtype=torch.int32))
        self.packed = _Packed(torch.ops.onednn.qconv_prepack(weight, self.scales, 1.0, 0, *self.window, None))
        self.operator = OPERATORS[weight.ndim - 2]

    def forward(self, x: Tensor) -> Tensor:
        if self.ends is not None:
            x = F.pad(x, self.ends, self.mode)
        quantised = (x, 1.0, 0, self.packed.weight, self.scales, self.zeros, self.bias, *self.window, 1.0, 0, torch.float32)
        return cast(Tensor, getattr(torch.ops.onednn, self.operator)(*quantised, "none", [], ""))


class ByteLinear(nn.Module):
    """A linear layer of bytes `[N, C]`; see `ByteConv`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().to(torch.int8)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.register_buffer("scales", torch.ones(len(weight)))
        self.register_buffer("zeros", torch.zeros(len(weight), dtype=torch.int32))
        self.packed = _Packed(torch.ops.onednn.qlinear_prepack(weight, None))

    def forward(self, x: Tensor) -> Tensor:
        quantised = (x, 1.0, 0, self.packed.weight, self.scales, self.zeros, self.bias, 1.0, 0, torch.float32)
        return cast(Tensor, torch.ops.onednn.qlinear_pointwise(*quantised, "none", [], ""))


class ByteSum(nn.Module):
    """Sums of windows of bytes `[N, C, ...]`, as an average pooling of that size, stride and padding has them."""

    def __init__(self, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
        super().__init__()
        self.size, self.stride, self.padding = tuple(size), tuple(stride), tuple(padding)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, [end for width in reversed(self.padding) for end in (width, width)])
        if x.shape[2:] == self.size:
            return x.sum(tuple(range(2, x.ndim)), keepdim=True, dtype=torch.int32).to(torch.uint8)
        windows = [(size - width) // step * step + 1 for size, width, step in zip(x.shape[2:], self.size, self.stride, strict=True)]
        total = None
        for place in itertools.product(*map(range, self.size)):
            part = x
            for axis, (start, length, step) in enumerate(zip(place, windows, self.stride, strict=True), 2):
                part = part[(slice(None),) * axis + (slice(start, start + length, step),)]
            total = part.clone() if total is None else total.add_(part)
        return cast(Tensor, total)

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}, padding={self.padding}"


class ByteScale(nn.Module):
    """Each channel times a whole number, in bytes."""

    def __init__(self, factor: Tensor, dimensions: int) -> None:
        super().__init__()
        self.register_buffer("factor", factor.to(torch.uint8).view(-1, *(1,) * (dimensions - 2)))

    def forward(self, x: Tensor) -> Tensor:
        return x * cast(Tensor, self.factor)


class ByteMax(nn.Module):
    """Max-pooling of bytes."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        # torch's own for bytes counts places in a byte, and refuses maps of more than 255.
        return cast(Tensor, self.pool(x.float())).to(torch.uint8)


class ToFloat(nn.Module):
    """Bytes as float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Bytes:
    """Rewrites the graph of a spiking network, whose shapes were recorded, so that layers pass bytes on wherever they can.

    Args:
        module: the graph.
        reasons: why layers stay in floating point, by name, where that is known already.
        pair: largest sum of two products of bytes; by default what this processor adds without saturating.
    """

    def __init__(self, module: fx.GraphModule, reasons: Mapping[str, str], pair: float | None = None) -> None:
        self.module, self.reasons = module, reasons
        self.pair = largest_pair() if pair is None else pair
        self.most: dict[fx.Node, int | None] = {}
        self.floats: dict[fx.Node, fx.Node] = {}

    def rewrite(self) -> list[str]:
        """In place; what has weights and stays in floating point, each with the reason."""
        kept, timed = list[str](), set[fx.Node]()
        for node in list(self.module.graph.nodes):
            layer, parents = self._layer(node), node.all_input_nodes
            if isinstance(layer, Timed) or any(parent in timed for parent in parents):
                timed.add(node)
            self.most[node] = most = self._most(node)
            if most is None and _has_weights(node, layer) and not self._reads_bytes(node):
                name = str(node.target) if layer is not None else f"{node.name} ({FUNCTION_NAMES.get(node.target)})"
                kept.append(f"{name}: {self.reasons.get(name) or self._reason(node, node in timed)}")
            if most is None or isinstance(layer, Neuron):
                for parent in parents:
                    if self.most[parent] is not None and not self._reads_bytes(node):
                        node.replace_input_with(parent, self._as_float(parent))
        self.module.delete_all_unused_submodules()
        self.module.graph.lint()
        self.module.recompile()
        return list(dict.fromkeys(kept))

    def _reason(self, node: fx.Node, timed: bool) -> str:
        """Why `node`, which has weights, stays in floating point."""
        layer = self._layer(node)
        if not timed:
            return "reads no spikes"
        if layer is None:
            return "has weights of its own, in no layer"
        if type(layer) not in (*CONVOLUTIONS, nn.Linear):
            return f"{type(layer).__name__} has no form in whole numbers here"
        if any(self.most[parent] is None for parent in node.all_input_nodes):
            return "reads real numbers"
        if not _whole(layer.weight):
            return "its weights are no whole numbers of 8 bits"
        overflow = self._overflow(layer, cast(int, self.most[node.all_input_nodes[0]]))
        return overflow or f"{type(layer).__name__} has no form in whole numbers here"

    def _overflow(self, layer: Any, most: int) -> str | None:
        """Why sums of the layer could be wrong where numbers up to `most` come in; None if they cannot."""
        weight = layer.weight.detach().abs().double()
        if 2 * most * float(weight.max()) > self.pair:
            return "sums of its bytes could saturate on this processor, which has no VNNI"
        if most * float(weight.flatten(1).sum(1).max()) > LARGEST_SUM:
            return "its sums could leave 32 bits"
        return None

    def _layer(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _reads_bytes(self, node: fx.Node) -> bool:
        return isinstance(self._layer(node), (ByteConv, ByteLinear))

    def _as_float(self, node: fx.Node) -> fx.Node:
        if node not in self.floats:
            name = f"{node.name}_float"
            self.module.add_submodule(name, ToFloat())
            with self.module.graph.inserting_after(node):
                self.floats[node] = self.module.graph.call_module(name, (node,))
        return self.floats[node]

    def _most(self, node: fx.Node) -> int | None:
        """The largest number that `node` gives in bytes; None if it gives no bytes."""
        layer = self._layer(node)
        if isinstance(layer, Neuron):
            # A height that is not 1 would be lost.
            if layer.scaled or not bool((layer.amplitude == 1).all()):
                return None
            if layer.counts:
                return layer.resolution
            layer.output = torch.uint8
            return 1
        parents = [self.most[parent] for parent in node.all_input_nodes]
        if not parents or any(parent is None for parent in parents):
            return None
        whole = cast(list[int], parents)
        if node.op == "call_function":
            return self._function(node, whole)
        return None if layer is None else self._from_layer(node, layer, whole[0])

    def _function(self, node: fx.Node, parents: list[int]) -> int | None:
        name = FUNCTION_NAMES.get(node.target)
        if name == "add" and len(node.args) == 2 and len(parents) == 2 and sum(parents) <= LARGEST_COUNT:
            return sum(parents)
        if name in ("flatten", "reshape", "cat"):
            return max(parents)
        return None

    def _from_layer(self, node: fx.Node, layer: Any, most: int) -> int | None:
        dimensions = node.meta["tensor_meta"].shape
        if type(layer) in (*CONVOLUTIONS, nn.Linear) and self._overflow(layer, most):
            return None
        if type(layer) in CONVOLUTIONS and _whole(layer.weight):
            self._replace(node, ByteConv(layer))
            return None
        if type(layer) is nn.Linear and len(dimensions) == 2 and _whole(layer.weight):
            self._replace(node, ByteLinear(layer))
            return None
        if type(layer) is Affine and not bool(layer.bias.any()) and _whole(layer.weight, LARGEST_COUNT) and bool((layer.weight >= 0).all()):
            total = most * int(layer.weight.max())
            if total <= LARGEST_COUNT:
                self._replace(node, ByteScale(layer.weight.detach(), len(dimensions)))
                return total
        if type(layer) in SUM_POOLS and layer.divisor_override == 1 and not layer.ceil_mode:
            size, stride, padding = (_each_axis(value, len(dimensions) - 2) for value in (layer.kernel_size, layer.stride, layer.padding))
            total = most * math.prod(size)
            if total <= LARGEST_COUNT:
                self._replace(node, ByteSum(size, stride, padding))
                return total
        if type(layer) in MAX_POOLS:
            self._replace(node, ByteMax(layer))
            return most
        if type(layer) in (*PADS, nn.Flatten):
            return most
        return None

    def _replace(self, node: fx.Node, layer: nn.Module) -> None:
        name = f"{node.name}_bytes"
        self.module.add_submodule(name, layer)
        node.target = name


def _whole(values: Tensor, largest: int = WEIGHT) -> bool:
    return bool((values == values.round()).all()) and bool((values.abs() <= largest).all())


def _each_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _has_weights(node: fx.Node, layer: nn.Module | None) -> bool:
    """True if it multiplies by weights; one for each channel are next to no work."""
    if layer is None:
        return node.op == "call_function" and any(parent.op == "get_attr" for parent in node.all_input_nodes)
    return not isinstance(layer, (Timed, Affine)) and any(True for _ in layer.parameters())
