"""Bytes in, whole numbers out: layers whose weights are whole numbers read spikes as bytes and add in 32-bit integers.

oneDNN's quantised convolution and linear operators do the work. Which layers qualify is seen from the network itself
(whole-number weights of at most 8 bits, inputs that are spikes or sums of few), as `quantise` makes it; the others run
in floating point as before. Every sum is exact, so spikes are those of the same network in floating point.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from quickspike.neuron import Neuron
from quickspike.operators import FUNCTION_NAMES, MAX_POOLS, Affine
from quickspike.quantisation import LARGEST_COUNT, PADS

WEIGHT = 127


def available() -> bool:
    """True if this build of torch has oneDNN's operators."""
    return all(hasattr(torch.ops.onednn, name) for name in ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise"))


class _Packed:
    """Weights as oneDNN lays them out: opaque, never changed, so that copies share them."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __deepcopy__(self, memo: Any) -> _Packed:
        return self


class ByteConv2d(nn.Module):
    """A convolution of bytes `[N, C, H, W]` with weights of 8 bits; exact sums in float32, biases added.

    Args:
        layer: its weights are whole numbers.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().to(torch.int8)
        self.window: tuple[Any, ...] = (list(layer.stride), list(cast(tuple[int, ...], layer.padding)), list(layer.dilation), layer.groups)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.register_buffer("scales", torch.ones(len(weight)))
        self.register_buffer("zeros", torch.zeros(len(weight), dtype=torch.int32))
        self.packed = _Packed(torch.ops.onednn.qconv_prepack(weight, self.scales, 1.0, 0, *self.window, None))

    def forward(self, x: Tensor) -> Tensor:
        quantised = (x, 1.0, 0, self.packed.weight, self.scales, self.zeros, self.bias, *self.window, 1.0, 0, torch.float32)
        return cast(Tensor, torch.ops.onednn.qconv2d_pointwise(*quantised, "none", [], ""))


class ByteLinear(nn.Module):
    """A linear layer of bytes `[N, C]`; see `ByteConv2d`."""

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


class ByteSum2d(nn.Module):
    """Sums of windows of bytes that do not overlap: `[N, C, H, W]` to `[N, C, H/k, W/k]`."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.size
        height, width = x.shape[2] // rows * rows, x.shape[3] // columns * columns
        if (height, width) == self.size:
            return x[:, :, :height, :width].sum((2, 3), keepdim=True, dtype=torch.int32).to(torch.uint8)
        parts = [x[:, :, i:height:rows, j:width:columns] for i in range(rows) for j in range(columns)]
        total = parts[0] + parts[1] if len(parts) > 1 else parts[0]
        for part in parts[2:]:
            total += part
        return total

    def extra_repr(self) -> str:
        return f"size={self.size}"


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
    """Rewrites the graph of a spiking network, whose shapes were recorded, so that layers pass bytes on wherever they can."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.most: dict[fx.Node, int | None] = {}
        self.floats: dict[fx.Node, fx.Node] = {}

    def rewrite(self) -> None:
        """In place."""
        for node in list(self.module.graph.nodes):
            self.most[node] = most = self._most(node)
            if most is None:
                for parent in node.all_input_nodes:
                    if self.most[parent] is not None and not self._reads_bytes(node):
                        node.replace_input_with(parent, self._as_float(parent))
        self.module.delete_all_unused_submodules()
        self.module.graph.lint()
        self.module.recompile()

    def _layer(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _reads_bytes(self, node: fx.Node) -> bool:
        return isinstance(self._layer(node), (ByteConv2d, ByteLinear))

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
                return layer.steps
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
        if type(layer) is nn.Conv2d and not isinstance(layer.padding, str) and layer.padding_mode == "zeros" and _whole(layer.weight):
            self._replace(node, ByteConv2d(layer))
            return None
        if type(layer) is nn.Linear and len(dimensions) == 2 and _whole(layer.weight):
            self._replace(node, ByteLinear(layer))
            return None
        if type(layer) is Affine and not bool(layer.bias.any()) and _whole(layer.weight, LARGEST_COUNT) and bool((layer.weight >= 0).all()):
            total = most * int(layer.weight.max())
            if total <= LARGEST_COUNT:
                self._replace(node, ByteScale(layer.weight.detach(), len(dimensions)))
                return total
        if type(layer) is nn.AvgPool2d and layer.divisor_override == 1 and _apart(layer):
            total = most * math.prod(_pair(layer.kernel_size))
            if total <= LARGEST_COUNT:
                self._replace(node, ByteSum2d(_pair(layer.kernel_size)))
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


def _apart(pool: nn.AvgPool2d) -> bool:
    """True if windows do not overlap, and hold nothing but the image."""
    return _pair(pool.kernel_size) == _pair(pool.stride) and not any(_pair(pool.padding)) and not pool.ceil_mode


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
