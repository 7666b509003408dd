"""Average pooling in the place of max-pooling, for a network that is trained or fine-tuned afterwards.

Max-pooling converts exactly, but keeps sums over time that hardware may not have; average pooling is a linear layer.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from quickspike.errors import ConversionError
from quickspike.operators import MAX_POOLS

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

    Padding is left out of the averages, as it is left out of maxima. Max-pooling that is a function call cannot be
    replaced from outside; `inspect` shows what is left.

    Raises:
        ConversionError: the network has no max-pooling layer, or one whose windows have gaps or that returns indices.
    """
    network = copy.deepcopy(model)
    if type(network) in MAX_POOLS:
        return _average(network, type(network).__name__)
    found = [(path, layer) for path, layer in network.named_modules(remove_duplicate=False) if type(layer) in MAX_POOLS]
    if not found:
        raise ConversionError(
            f"{type(model).__name__} has no max-pooling layer; calls of F.max_pool2d and the like have to be changed by hand"
        )
    averages = {layer: _average(layer, path) for path, layer in found}
    for path, layer in found:
        network.set_submodule(path, averages[layer])
    return network


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
