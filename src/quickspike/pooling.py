"""Average pooling in the place of max-pooling, for a network that is trained or fine-tuned afterwards.

Max-pooling converts exactly, but keeps sums over time that hardware may not have; average pooling is a linear layer.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import nn

from quickspike.capture import calls_in, source_of
from quickspike.errors import ConversionError, TraceError
from quickspike.operators import MAX_POOL_FUNCTIONS, MAX_POOLS

logger = logging.getLogger(__name__)

_AVERAGES: dict[type[nn.Module], Any] = {
    nn.MaxPool1d: nn.AvgPool1d,
    nn.MaxPool2d: nn.AvgPool2d,
    nn.MaxPool3d: nn.AvgPool3d,
    nn.AdaptiveMaxPool1d: nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool2d: nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool3d: nn.AdaptiveAvgPool3d,
}


def replace_max_pool(model: nn.Module) -> nn.Module:
    """A copy of `model` whose max-pooling layers average over the same windows; it has to be trained again.

    Padding is left out of the averages, as it is left out of maxima.

    Raises:
        ConversionError: the network has no max-pooling layer, or one whose windows have gaps or that returns indices; or
            max-pooling that cannot be replaced from outside: a function call, or a class of its own.
    """
    network = copy.deepcopy(model)
    if type(network) in MAX_POOLS:
        return _average(network, type(network).__name__)
    _refuse_others(network)
    found = [(path, layer) for path, layer in network.named_modules(remove_duplicate=False) if type(layer) in MAX_POOLS]
    if not found:
        raise ConversionError(f"{type(model).__name__} has no max-pooling layer")
    averages = {layer: _average(layer, path) for path, layer in found}
    for path, layer in found:
        network.set_submodule(path, averages[layer])
    return network


def _refuse_others(network: nn.Module) -> None:
    """Nothing is skipped in silence."""
    for path, layer in network.named_modules():
        if type(layer) not in MAX_POOLS and isinstance(layer, (*MAX_POOLS, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
            kind = type(layer).__name__
            raise ConversionError(f"{path or kind}: {kind} has no average in its place. Way out: a max-pooling layer of torch.nn itself")
    try:
        calls = [node for node in calls_in(network) if node.target in MAX_POOL_FUNCTIONS]
    except TraceError as error:
        name, reason = type(network).__name__, str(error).partition(". Way out: ")[0]
        logger.warning("max-pooling that %s calls as a function, if any, stays: %s. Way out: `inspect` shows what is left", name, reason)
        return
    if calls:
        found = "; ".join(f"{getattr(node.target, '__name__', node.target)} at {source_of(node)}" for node in calls)
        raise ConversionError(
            f"max-pooling that is a function call cannot be replaced from outside: {found}. "
            "Way out: call a layer there (self.pool = nn.MaxPool2d(...)), or write the average by hand (F.avg_pool2d)"
        )


def _average(layer: Any, path: str) -> nn.Module:
    if layer.return_indices:
        raise ConversionError(f"{path}: max-pooling that returns indices has no average in its place")
    kind: Any = _AVERAGES[type(layer)]
    if hasattr(layer, "output_size"):
        adaptive: nn.Module = kind(layer.output_size)
        return adaptive.train(layer.training)
    gaps = layer.dilation if isinstance(layer.dilation, tuple) else (layer.dilation,)
    if any(gap != 1 for gap in gaps):
        raise ConversionError(f"{path}: max-pooling with dilation {layer.dilation} has windows with gaps; an average has none")
    average: nn.Module = kind(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, count_include_pad=False)
    return average.train(layer.training)
