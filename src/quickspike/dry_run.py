"""A network run without its values: whether its layers fit each other, and how large its signals become, before memory is spent.

A file says what a network is. Shapes are worked out on torch's meta device, where a signal has a size and no content, so that
a network which cannot run is refused when it is loaded, and one that is as large as no machine costs nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from quickspike.errors import CheckpointError
from quickspike.neuron import Neuron
from quickspike.readouts import WeightedMean

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork

LARGEST = 2**30
"""Values of a signal at one step of one image: 4 GiB. More than any network needs; a larger number is a mistake or a hostile file."""
MOST_PARTS = 2**18
"""Likewise, of what takes a signal apart, and of the places in a tuple of sizes."""
SAMPLES = 2
STEPS = 2
"""Enough to see time and batch in the shapes."""


def check_runs(snn: SpikingNetwork) -> None:
    """Refuse a network that cannot take an image of its own input shape.

    Args:
        snn: not modified.

    Raises:
        CheckpointError: a layer does not fit what comes in, a signal is too large, or neurons are of another shape than their site.
    """
    steps = snn.steps
    # Sizes of a signal do not depend on T, only the time that it takes to find them does.
    snn.set_steps(STEPS)
    try:
        outputs = _outputs(snn)
    finally:
        snn.set_steps(steps)
    for output in tree_leaves(outputs):
        if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != STEPS * SAMPLES:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise CheckpointError(f"the network gives {shape}, which is no answer after every step")


def _outputs(snn: SpikingNetwork) -> Any:
    values = {**dict(snn.network.named_parameters()), **dict(snn.network.named_buffers())}
    empty = {f"network.{name}": value.to("meta") for name, value in values.items()}
    dtype = next((value.dtype for value in empty.values() if value.is_floating_point()), torch.float32)
    sites = {site.name: site.shape for site in snn.sites}
    try:
        images = torch.empty(SAMPLES, *snn.input_shape, dtype=dtype, device="meta")
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"no image has the shape {list(snn.input_shape)}") from error
    with torch.no_grad():
        return functional_call(_Sized(snn.network, sites), empty, (images,))


class _Sized(nn.Module):
    """The network, node by node, under the checks of `_Sizes`."""

    def __init__(self, network: fx.GraphModule, sites: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.network, self.sites = network, sites

    def forward(self, images: Tensor) -> Any:
        return _Sizes(self.network, self.sites).run(images)


class _Sizes(fx.Interpreter):
    def __init__(self, network: fx.GraphModule, sites: Mapping[str, Sequence[int]]) -> None:
        super().__init__(network)
        self.sites = sites
        # Its own report of an error is many lines long.
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except CheckpointError as error:
            raise CheckpointError(f"{n.name}: {error}") from error
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{n.name} does not fit what comes in: {reason}") from error
        _check_size(n.name, value)
        wanted = self.sites.get(str(n.target)) if n.op == "call_module" else None
        if wanted is not None and tuple(value.shape[1:]) != tuple(wanted):
            raise CheckpointError(f"{n.target}: neurons of shape {list(value.shape[1:])}, but the site says {list(wanted)}")
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.mul and any(isinstance(value, (str, tuple, list)) for value in args):
            raise CheckpointError("only numbers and signals are multiplied")
        if target in _TAKE_APART and args and isinstance(args[0], Tensor) and max(args[0].shape, default=0) > MOST_PARTS:
            raise CheckpointError(f"a signal of shape {list(args[0].shape)} is taken apart")
        if target in _CONVOLUTIONS:
            _check_convolution(args[0].ndim - 2, **dict(zip(_CONVOLUTIONS[target], args[3:], strict=False)) | kwargs)
        if target in (*_CONVOLUTIONS, F.linear, torch.matmul, torch.einsum):
            _check_types(*args)
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer: Any = self.fetch_attr(target)
        if isinstance(layer, nn.modules.conv._ConvNd):
            sizes = {name: getattr(layer, name) for name in _TRANSPOSED if name != "groups"}
            _check_convolution(len(layer.kernel_size), **sizes)
        if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
            _check_types(*args, layer.weight, layer.bias)
        if isinstance(layer, (Neuron, WeightedMean)):
            if len(args) != 1 or kwargs:
                raise CheckpointError("neurons read one signal")
            return _over_time(args[0], isinstance(layer, Neuron) and layer.constant_input)
        return super().call_module(target, args, kwargs)


_FORWARD = ("stride", "padding", "dilation")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTIONS = {
    getattr(F, f"{kind}{axes}d"): names for kind, names in (("conv", _FORWARD), ("conv_transpose", _TRANSPOSED)) for axes in (1, 2, 3)
}
"""Function -> its arguments behind input, weight and bias."""


def _over_time(x: Tensor, constant: bool) -> Tensor:
    """What neurons make of currents `[T*B, ...]`, or `[B, ...]` where these are the same at every step; how they fire changes no shape."""
    wanted = SAMPLES if constant else STEPS * SAMPLES
    if x.ndim < 2 or len(x) != wanted:
        raise CheckpointError(f"neurons read currents of shape {list(x.shape)}, which are no batch of {wanted}")
    return x.new_empty((STEPS * SAMPLES, *x.shape[1:]))


def _check_types(*operands: Any) -> None:
    """The meta device multiplies values of different types, and of those that are no floating point."""
    types = {one.dtype for one in operands if isinstance(one, Tensor)}
    if len(types) > 1 or not all(one.is_floating_point for one in types):
        raise CheckpointError(f"values of different types are multiplied: {', '.join(sorted(map(str, types)))}")


def _check_convolution(axes: int, **sizes: Any) -> None:
    """The meta device takes strides and the like of another number of axes, and of 0, too."""
    for name, one in sizes.items():
        values = one if isinstance(one, (tuple, list)) else (one,)
        if len(values) not in (1, axes) or (name in ("stride", "dilation") and min(values) < 1):
            raise CheckpointError(f"a convolution along {axes} axes cannot have {name}={one}")


_TAKE_APART: tuple[Callable[..., Any], ...] = (torch.unbind, torch.split, torch.chunk)


def _check_size(name: str, value: Any) -> None:
    leaves = [value] if isinstance(value, (Tensor, int)) else tree_leaves(value)
    if len(leaves) > MOST_PARTS:
        raise CheckpointError(f"{name} gives {len(leaves)} values")
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.numel() > LARGEST * SAMPLES * STEPS:
            raise CheckpointError(f"{name} gives a signal of shape {list(leaf.shape)}, more than {LARGEST:,} values a step")
        if isinstance(leaf, int) and abs(leaf) >= 2**63:
            raise CheckpointError(f"{name} gives a number that is no size")
