"""Do images look like those that a network was trained on? What can be seen without labels is said, and nothing is refused."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from quickspike.capture import copy_of
from quickspike.errors import QuickspikeError

logger = logging.getLogger(__name__)

BRIGHT = 2.0
"""Pixels are at most 1 once they were scaled, and negative somewhere once they were normalised, too."""
SEEN = 10
"""Batches after which a batch norm remembers what images are like: 0.9 of its mean comes from the last 22."""
SOME = 64
"""Images that are held against what it remembers."""
AWAY, WIDER = 1.0, 2.5
"""Deviations by which the means of most channels may be off, and the factor for the deviations themselves. Other images of the
same kind stay below 0.3 and 1.3; pixels between 0 and 1 in the place of normalised ones are 3 to 5 times too narrow."""


def warn_of_pixels(images: Tensor, what: str) -> None:
    """Say so where images `[B, ...]` look like pixels that nobody scaled, or like `[B, H, W, C]`.

    Args:
        images: floating point, finite.
        what: they are, for the message.
    """
    if images.ndim != 4:
        return
    channels, height, width = images.shape[1:]
    if width in (3, 4) and width < min(channels, height) and channels > 4:
        logger.warning(
            "%s have the shape %s, which looks like [B, H, W, C]; networks take [B, C, H, W]: images.permute(0, 3, 1, 2)",
            what,
            list(images.shape),
        )
    low, high = torch.stack(images.aminmax()).tolist()
    if channels in (1, 3, 4) and low >= 0 and high > BRIGHT:
        logger.warning(
            "%s lie between %g and %g, as if they were pixels between 0 and 255; unless the network was trained on such, divide by 255 "
            "and normalise as in its training",
            what,
            low,
            high,
        )


def warn_of_statistics(model: nn.Module, images: Tensor) -> None:
    """Say so where the first batch norm of `model` sees other means and deviations than it remembers from its training.

    Args:
        model: not modified; without a batch norm, or with one that has seen little, there is nothing to compare with.
        images: `[B, ...]`, a few are enough.
    """
    if not any(map(_remembers, model.modules())):
        return
    try:
        seen = _first_norm(copy_of(model), images[:SOME])
    except (QuickspikeError, RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        # The network cannot run on them, and whoever runs it next says why.
        return
    if seen is None:
        return
    norm, x = seen
    axes = [axis for axis in range(x.ndim) if axis != 1]
    std = (norm.running_var + norm.eps).sqrt()
    away = float(((x.mean(axes) - norm.running_mean).abs() / std).median())
    wider = float((x.var(axes, correction=0).sqrt() / std).median())
    if away > AWAY or not 1 / WIDER < wider < WIDER:
        logger.warning(
            "the calibration images do not look like those that the network was trained on: in front of its first batch norm, means are "
            "off by %.1f deviations, and deviations %.2g times those of the training; scale and normalise images as was done there",
            away,
            wider,
        )


class _Seen(Exception):
    def __init__(self, norm: Any, x: Tensor) -> None:
        self.norm, self.x = norm, x


def _remembers(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer.running_mean is None or layer.num_batches_tracked is None:
        return False
    return int(layer.num_batches_tracked) >= SEEN and math.isfinite(float(layer.running_mean.sum()))


def _first_norm(private: nn.Module, images: Tensor) -> tuple[Any, Tensor] | None:
    """The batch norm that is called first, and what comes into it."""

    def stop(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        raise _Seen(norm, arguments[0])

    for layer in private.modules():
        if _remembers(layer):
            layer.register_forward_pre_hook(stop)
    parameter = next(private.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            private(images.to(parameter))
    except _Seen as seen:
        return seen.norm, seen.x
    return None
