"""The verbs, in the order in which data flows through them."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from quickspike.conversion import SpikingNetwork, prepare, to_spiking
from quickspike.data import Batches, ImageStream
from quickspike.errors import ConversionError, OptionError
from quickspike.graph import Traced, trace
from quickspike.method import Method, create
from quickspike.neuron import Surrogate
from quickspike.provenance import versions

logger = logging.getLogger(__name__)


def convert(
    model: nn.Module,
    calibration: Batches,
    method: str | Method = "threshold_balancing",
    *,
    surrogate: Surrogate | None = None,
    **options: Any,
) -> SpikingNetwork:
    """Turn a trained network into a spiking one.

    Args:
        model: the source network; bit-identical afterwards, its training mode included.
        calibration: images as the network was trained on them (normalised), without labels or with (they are not
            used): a tensor `[N, ...]`, or an iterable of tensors, (tensor, label) pairs or dicts.
        method: a method's name or a method object such as `qs.methods.PotentialInit(steps=4)`.
        surrogate: derivative of the step function for autograd; triangular by default.
        **options: options of the named method, for example `steps=8`.

    Returns:
        The spiking network, in evaluation mode.

    Raises:
        UnsupportedOperatorError: the network holds operators that do not convert; each is named with its line.
        DataError: the calibration images are unusable.
        UnknownNameError, OptionError: the method or one of its options does not exist or is out of range.
    """
    chosen = _method(method, options)
    images = ImageStream(calibration)
    traced = trace(model, images.example)
    return convert_traced(traced, images, chosen, surrogate)


def convert_traced(traced: Traced, images: ImageStream, method: Method, surrogate: Surrogate | None = None) -> SpikingNetwork:
    """`convert` for a network that is traced already, so that several methods can share one trace."""
    ann = prepare(traced, method)
    method.fit(ann, images)
    provenance = {"source": traced.name, "calibration_images": images.samples, "versions": versions()}
    logger.info("%s: %d sites, %s, %d images", traced.name, len(traced.sites), method, images.samples)
    return to_spiking(ann, method, provenance, surrogate).eval()


def _method(method: str | Method, options: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return create(method, **options)
    if not isinstance(method, Method):
        raise ConversionError(f"method must be a name or a Method, got {type(method).__name__}")
    if options:
        raise OptionError(f"give {', '.join(options)} to {type(method).__name__}(...), not to convert()")
    return method
