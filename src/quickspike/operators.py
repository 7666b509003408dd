"""The operators a spiking network may hold, in one table.

`trace` accepts nothing else, and a checkpoint can name nothing else: what is not listed here neither converts nor
loads. Most are affine in the signal, so that the mean over time steps of what they give is what they give for the mean.
The others (`ANALOG_LAYERS`, functions that are not `affine`) are computed on running means; see `RunningMean`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Affine(nn.Module):
    """Batch norm in evaluation mode that has no convolution to be folded into: x * weight + bias per channel.

    Args:
        channels: size of axis 1 of the input `[B, C, ...]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.ndim - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        return str(self.channels)


class ReLU(nn.Module):
    """The activation a traced network holds at a site: clamp(x, 0, ceiling); no upper bound where ceiling is None."""

    def __init__(self, ceiling: float | None = None) -> None:
        super().__init__()
        self.ceiling = ceiling

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if self.ceiling is None else x.clamp(0.0, self.ceiling)

    def extra_repr(self) -> str:
        return "" if self.ceiling is None else f"ceiling={self.ceiling:g}"


def shape(x: Tensor) -> tuple[int, ...]:
    """`x.shape` as a plain tuple; the one form in which a graph may ask for sizes."""
    return tuple(x.shape)


_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONVOLUTION[:5], "output_padding", "groups")
_POOL = ("kernel_size", "stride", "padding", "ceil_mode")

LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), (*_CONVOLUTION, "padding_mode")),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (*_TRANSPOSED, "dilation")),
    nn.Linear: ("in_features", "out_features"),
    nn.AvgPool1d: (*_POOL, "count_include_pad"),
    **dict.fromkeys((nn.AvgPool2d, nn.AvgPool3d), (*_POOL, "count_include_pad", "divisor_override")),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), ("output_size",)),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), ("padding",)),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), ("padding", "value")),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), ("padding",)),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), ("padding",)),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), ("padding",)),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners"),
    **dict.fromkeys((nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), ("size", "scale_factor")),
    nn.PixelShuffle: ("upscale_factor",),
    nn.PixelUnshuffle: ("downscale_factor",),
    nn.ChannelShuffle: ("groups",),
    Affine: ("channels",),
}
"""Layer type -> the attributes that rebuild it (its constructor's keywords); weights travel apart."""

ANALOG_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.RMSNorm: ("normalized_shape", "eps", "elementwise_affine"),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), ("num_features", "eps", "affine", "track_running_stats")),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.GLU), ("dim",)),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.SELU, nn.Hardsigmoid), ()),
    nn.GELU: ("approximate",),
    nn.Softplus: ("beta", "threshold"),
    **dict.fromkeys((nn.ELU, nn.CELU), ("alpha",)),
    nn.LeakyReLU: ("negative_slope",),
    nn.PReLU: ("num_parameters",),
    nn.Hardtanh: ("min_val", "max_val"),
    nn.Softshrink: ("lambd",),
    nn.Threshold: ("threshold", "value"),
}
"""Layers that are not affine: computed once in front of the first neuron, and behind it on running means."""

MAX_POOLS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), ("output_size",)),
}

DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
NO_OPERATION_LAYERS = (nn.Identity, *DROPOUT_LAYERS)
"""Layers that do nothing in evaluation mode."""


@dataclass(frozen=True)
class Function:
    """One operator without weights: its name in files, what runs, and every spelling that means the same.

    A string among `spellings` is a tensor method's name.
    """

    name: str
    run: Callable[..., Any]
    spellings: tuple[Any, ...] = ()
    affine: bool = True
    """In the signal. Products are affine as long as only one factor is a signal."""


_ACTIVATIONS = (
    *("silu", "hardswish", "gelu", "mish", "softplus", "logsigmoid", "selu", "hardsigmoid", "elu", "celu", "leaky_relu"),
    *("hardtanh", "softshrink", "threshold"),
)


_ORDERS = ("gt", "ge", "lt", "le")


def _functions() -> tuple[Function, ...]:
    def same(name: str, *more: Any) -> Function:
        return Function(name, getattr(torch, name), (getattr(torch, name), name, *more))

    def analog(name: str, run: Callable[..., Any], *more: Any) -> Function:
        return Function(name, run, (run, name, f"{name}_", *more), affine=False)

    pools = [(f"{kind}avg_pool{n}d", getattr(F, f"{kind}avg_pool{n}d")) for n in (1, 2, 3) for kind in ("", "adaptive_")]
    pools_of_torch = {"avg_pool1d": torch.avg_pool1d, "adaptive_avg_pool1d": torch.adaptive_avg_pool1d}
    convolutions = [(f"{kind}{n}d", getattr(F, f"{kind}{n}d")) for n in (1, 2, 3) for kind in ("conv", "conv_transpose")]
    return (
        Function("add", operator.add, (operator.add, operator.iadd, torch.add, "add", "add_")),
        Function("sub", operator.sub, (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_")),
        Function("mul", operator.mul, (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")),
        Function("div", operator.truediv, (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_")),
        Function("floordiv", operator.floordiv, (operator.floordiv,)),
        Function("neg", operator.neg, (operator.neg, torch.neg, "neg")),
        Function("getitem", operator.getitem, (operator.getitem,)),
        Function("shape", shape),
        Function("cat", torch.cat, (torch.cat, torch.concat, torch.concatenate)),
        Function("pad", F.pad, (F.pad,)),
        Function("reshape", torch.reshape, (torch.reshape, "reshape", "view")),
        Function("linear", F.linear, (F.linear,)),
        Function("interpolate", F.interpolate, (F.interpolate,)),
        Function("pixel_shuffle", F.pixel_shuffle, (F.pixel_shuffle, torch.pixel_shuffle)),
        Function("pixel_unshuffle", F.pixel_unshuffle, (F.pixel_unshuffle, torch.pixel_unshuffle)),
        Function("channel_shuffle", F.channel_shuffle, (F.channel_shuffle, torch.channel_shuffle)),
        same("flatten"),
        same("permute"),
        same("transpose"),
        same("mean"),
        same("sum"),
        same("chunk"),
        same("split"),
        same("stack"),
        same("unbind"),
        Function("expand", torch.Tensor.expand, ("expand",)),
        Function("expand_as", torch.Tensor.expand_as, ("expand_as",)),
        Function("reshape_as", torch.Tensor.reshape_as, ("reshape_as", "view_as")),
        same("squeeze"),
        same("unsqueeze"),
        same("narrow"),
        same("movedim", torch.moveaxis, "moveaxis"),
        same("swapaxes", torch.swapdims, "swapdims"),
        same("unflatten"),
        same("flip"),
        same("roll"),
        same("cumsum"),
        Function("repeat", torch.Tensor.repeat, ("repeat",)),
        # Of sizes.
        Function("mod", operator.mod, (operator.mod,)),
        Function("sym_max", torch.sym_max, (torch.sym_max,)),
        Function("sym_min", torch.sym_min, (torch.sym_min,)),
        *(Function(name, run, (run, pools_of_torch.get(name, run))) for name, run in pools),
        *(Function(name, run, (run, getattr(torch, name))) for name, run in convolutions),
        analog("relu", torch.relu, F.relu, torch.relu_),
        Function("relu6", F.relu6, (F.relu6,), affine=False),
        analog("clamp", torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clip", "clip_"),
        analog("clamp_min", torch.clamp_min, torch.clamp_min_),
        analog("clamp_max", torch.clamp_max, torch.clamp_max_),
        analog("sigmoid", torch.sigmoid, F.sigmoid, torch.sigmoid_),
        analog("tanh", torch.tanh, F.tanh, torch.tanh_),
        analog("softmax", torch.softmax, F.softmax),
        analog("log_softmax", torch.log_softmax, F.log_softmax),
        *(Function(name, getattr(F, name), (getattr(F, name), getattr(F, f"{name}_", name)), affine=False) for name in _ACTIVATIONS),
        *(Function(name, getattr(F, name), (getattr(F, name),), affine=False) for name in ("layer_norm", "group_norm", "normalize", "glu")),
        Function("instance_norm", F.instance_norm, (F.instance_norm,), affine=False),
        Function("rms_norm", F.rms_norm, (F.rms_norm, torch.rms_norm), affine=False),
        analog("prelu", torch.prelu, F.prelu),
        *(analog(name, getattr(torch, name)) for name in ("exp", "log", "sqrt", "rsqrt", "abs", "square", "erf", "round")),
        analog("pow", torch.pow, operator.pow, operator.ipow),
        *(Function(name, getattr(torch, name), (getattr(torch, name), name), affine=False) for name in ("amax", "amin", "logsumexp")),
        *(
            Function(name, getattr(torch, name), (getattr(torch, name), name), affine=False)
            for name in ("maximum", "minimum", "std", "var")
        ),
        *(Function(name, getattr(torch, name), (getattr(torch, name), getattr(operator, name), name), affine=False) for name in _ORDERS),
        Function("where", torch.where, (torch.where, "where"), affine=False),
        Function("einsum", torch.einsum, (torch.einsum,), affine=False),
        Function("matmul", torch.matmul, (torch.matmul, operator.matmul, "matmul", torch.bmm, "bmm"), affine=False),
        Function("scaled_dot_product_attention", F.scaled_dot_product_attention, (F.scaled_dot_product_attention,), affine=False),
    )


FUNCTIONS: dict[str, Function] = {function.name: function for function in _functions()}

SPELLINGS: dict[Any, Function] = {spelling: function for function in FUNCTIONS.values() for spelling in function.spellings}

FUNCTION_NAMES: dict[Any, str] = {function.run: function.name for function in FUNCTIONS.values()}

NOT_AFFINE = frozenset(function.run for function in FUNCTIONS.values() if not function.affine)
"""What runs for functions that are not affine, whatever their arguments."""

NO_OPERATIONS = ("contiguous", "clone", "detach", torch.clone, torch.detach)
"""Functions and methods that change nothing in inference."""

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
"""Nothing in inference, but only if called with training=False: their default is to stay active."""

STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"
"""Module of a function that drops whole branches; likewise, but its fourth argument says so. Not imported for its sake."""

MAX_POOL_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.max_pool1d: nn.MaxPool1d,
    F.max_pool2d: nn.MaxPool2d,
    F.max_pool3d: nn.MaxPool3d,
    torch.max_pool1d: nn.MaxPool1d,
    torch.max_pool2d: nn.MaxPool2d,
    torch.max_pool3d: nn.MaxPool3d,
    F.adaptive_max_pool1d: nn.AdaptiveMaxPool1d,
    F.adaptive_max_pool2d: nn.AdaptiveMaxPool2d,
    F.adaptive_max_pool3d: nn.AdaptiveMaxPool3d,
}


def layer_arguments(layer: nn.Module) -> dict[str, Any]:
    """The constructor keywords that rebuild a listed layer without its weights.

    Raises:
        KeyError: the layer's exact type is not listed (a subclass may compute something else).
    """
    names = (LAYERS | MAX_POOLS | ANALOG_LAYERS)[type(layer)]
    arguments = {name: getattr(layer, name) for name in names}
    if "track_running_stats" in names:
        # Its buffers tell; the flag itself may have been changed afterwards.
        arguments["track_running_stats"] = layer.running_mean is not None
    if type(layer) in (nn.Linear, nn.LayerNorm) or any(name == "in_channels" for name in names):
        arguments["bias"] = layer.bias is not None
    return arguments
