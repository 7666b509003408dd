"""The verbs, in the order in which data flows through them."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quickspike.conversion import SpikingNetwork, prepare, to_spiking
from quickspike.data import Batches, ImageStream
from quickspike.errors import ConversionError, OptionError
from quickspike.graph import Traced, fold, trace
from quickspike.method import Method, create
from quickspike.neuron import Surrogate
from quickspike.options import check_names
from quickspike.piecewise import PIECES
from quickspike.plausibility import warn_of_statistics
from quickspike.provenance import versions
from quickspike.training import History, Train, Trainer, parameter_groups
from quickspike.tuning import Tuning
from quickspike.whitening import whiten

logger = logging.getLogger(__name__)

PATCHED = 5000
"""Training images whose patches are whitened."""


def train(model: nn.Module, trainer: Trainer) -> tuple[nn.Module, History]:
    """Train a source network as it stands.

    Args:
        model: where the training starts; not modified.
        trainer: data, settings and devices.

    Returns:
        A trained copy in evaluation mode on the trainer's device, and the figures of every epoch.

    Raises:
        OptionError: the first convolution is to be whitened, and there is none that reads the images.
    """
    network = copy.deepcopy(model)
    if not trainer.settings.whiten:
        return network, trainer(network, "source")
    images = torch.cat([batch for batch, _ in trainer.data.loader("train", limit=min(PATCHED, trainer.data.size("train")))])
    fixed = whiten(network, images).weight
    groups = parameter_groups(network, [])
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not fixed]
    return network, trainer(network, "source", groups=groups)


def _not_whitened(train: Train | None) -> None:
    if isinstance(train, Trainer) and train.settings.whiten:
        raise OptionError("whiten=True is for training a source network from scratch; here it would undo the first convolution")


def convert(
    model: nn.Module,
    calibration: Batches,
    method: str | Method = "threshold_balancing",
    *,
    surrogate: Surrogate | None = None,
    trainer: Trainer | None = None,
    analog: Sequence[str] = (),
    pieces: int = PIECES,
    **options: Any,
) -> SpikingNetwork:
    """Turn a trained network into a spiking one.

    Args:
        model: the source network; bit-identical afterwards, its training mode included.
        calibration: images as the network was trained on them (normalised), without labels or with (they are not
            used): a tensor `[N, ...]`, or an iterable of tensors, (tensor, label) pairs or dicts.
        method: a method's name or a method object such as `qs.methods.PotentialInit(steps=4)`; "auto" chooses what measures
            best, see `choose`.
        surrogate: derivative of the step function for autograd; by default the method's own.
        trainer: trains a copy of the network with the method's activations before it is converted; without one the
            method is calibrated only.
        analog: names (`head.*`) or operators (`LayerNorm`) of what is computed on real values at every step, see `trace`.
        pieces: straight lines that a smooth activation is approximated by.
        **options: options of the named method (or of `Auto`), for example `steps=8`; `sites={"layer1.*": {"initial": 0.0}}` for some at
            some sites only.

    Returns:
        The spiking network, in evaluation mode.

    Raises:
        UnsupportedOperatorError: the network holds operators that do not convert; each is named with its line.
        DataError: the calibration images are unusable.
        UnknownNameError, OptionError: the method or one of its options does not exist or is out of range.
    """
    if method == "auto":
        return _chosen(model, calibration, surrogate, trainer, analog, pieces, options)
    chosen = _method(method, options)
    images = ImageStream(calibration)
    ann = fit(model, images, chosen, trainer, analog=analog, pieces=pieces)
    return finish(ann, images, chosen, surrogate)


def _chosen(
    model: nn.Module,
    calibration: Batches,
    surrogate: Surrogate | None,
    trainer: Trainer | None,
    analog: Sequence[str],
    pieces: int,
    options: dict[str, Any],
) -> SpikingNetwork:
    from quickspike.choosing import Auto, choose

    if surrogate is not None:
        raise OptionError("method='auto' takes the surrogate of what it chooses; leave surrogate out, or name a method")
    check_names(Auto, options)
    return choose(model, calibration, Auto(**options), trainer=trainer, analog=analog, pieces=pieces).network


def fit(
    model: nn.Module,
    images: ImageStream,
    method: Method,
    trainer: Trainer | None = None,
    *,
    analog: Sequence[str] = (),
    pieces: int = PIECES,
) -> Traced:
    """The source side of a conversion: trace, put the method's activations in, calibrate, and train if there is a trainer.

    Returns:
        The fitted network, batch norm folded: `module` is what the spiking network approximates.

    Raises:
        UnsupportedOperatorError, DataError: see `convert`.
    """
    _not_whitened(trainer)
    if trainer is not None:
        trainer = _taught(trainer, model, method, images.example, analog, pieces)
    warn_of_statistics(model, images.first)
    traced = trace(
        method.source(model),
        images.example,
        trainable=trainer is not None,
        pools_in_front=not method.pools_spikes,
        analog=analog,
        pieces=pieces,
    )
    ann = prepare(traced, method)
    if trainer is not None:
        trainer.fabric.to_device(ann.module)
    method.fit(ann, images, None if trainer is None else _about(trainer, method))
    return ann if ann.folded else fold(ann)


def finish(ann: Traced, images: ImageStream, method: Method, surrogate: Surrogate | None = None) -> SpikingNetwork:
    """The spiking side of a conversion: neurons at the sites of a fitted network, adjusted on images."""
    provenance = {"source": ann.name, "calibration_images": images.samples, "versions": versions(), **ann.choices}
    logger.info("%s: %d sites, %s, %d images", ann.name, len(ann.sites), method, images.samples)
    snn = to_spiking(ann, method, provenance, surrogate).eval()
    method.adjust(snn, images)
    method.refine(snn, ann, images)
    return snn.eval()


def tune(snn: SpikingNetwork, trainer: Trainer, tuning: Tuning | None = None, teacher: nn.Module | None = None) -> SpikingNetwork:
    """Fine-tune a spiking network end to end, as its method does it.

    Args:
        snn: where the training starts; not modified.
        trainer: data, settings and devices.
        tuning: what is learned; weights, thresholds and leaks by default.
        teacher: whose answers are learned if the settings distill, as a rule the source network; not modified. None: the
            trainer's.

    Returns:
        A trained copy in evaluation mode, on the trainer's device.

    Raises:
        ConversionError: the network was accelerated, which leaves it nothing to learn with.
        OptionError: the settings distill, and there is no teacher, or none with these layers.
    """
    if "engine" in snn.provenance:
        raise ConversionError(
            f"a network made for the {snn.provenance['engine']['name']} engine cannot learn; tune the one it was made from"
        )
    _not_whitened(trainer)
    method = Method.from_json(snn.method)
    if teacher is not None:
        trainer = dataclasses.replace(trainer, teacher=teacher)
    if isinstance(trainer, Trainer) and trainer.settings.distill_features and trainer.teacher is not None:
        example, _ = next(iter(trainer.data.loader("train", limit=1)))
        analog, pieces = snn.provenance.get("analog", ()), snn.provenance.get("pieces", PIECES)
        trainer = _guided(trainer, trainer.teacher, method, example, analog, pieces)
    tuned = copy.deepcopy(snn)
    trainer.fabric.to_device(tuned)
    method.tune(tuned, _about(trainer, method, tuning or Tuning()), tuning or Tuning())
    return tuned.eval()


def _taught(trainer: Trainer, model: nn.Module, method: Method, example: Tensor, analog: Sequence[str], pieces: int) -> Trainer:
    """The same trainer, with the source network as the teacher unless it has one."""
    # Whoever trains by other means than ours has a teacher of his own, or none.
    if not isinstance(trainer, Trainer) or (trainer.teacher is not None and not trainer.settings.distill_features):
        return trainer
    teacher = model if trainer.teacher is None else trainer.teacher
    trainer = dataclasses.replace(trainer, teacher=teacher)
    return _guided(trainer, teacher, method, example, analog, pieces) if trainer.settings.distill_features else trainer


def _guided(trainer: Trainer, teacher: nn.Module, method: Method, example: Tensor, analog: Sequence[str], pieces: int) -> Trainer:
    """The same trainer, with the teacher as a graph that has the sites of a network which this method converts."""
    guide = trace(method.source(teacher), example, pools_in_front=not method.pools_spikes, analog=analog, pieces=pieces)
    return dataclasses.replace(trainer, guide=guide)


def _about(train: Train, *settings: Method | Tuning) -> Train:
    """The same training, whose checkpoints remember these settings too."""
    if not isinstance(train, Trainer):
        return train
    about = {f"{one.name}.{key}": value for one in settings for key, value in dataclasses.asdict(one).items()}
    # Checkpoints from before an option came know nothing of it, which stands for its being off; off may be a value, as of members.
    off = {
        f"{one.name}.{field.name}": None
        for one in settings
        for field in dataclasses.fields(one)
        if field.name in getattr(one, "later", ()) and getattr(one, field.name) == field.default and field.default
    }
    return dataclasses.replace(train, about=about | off)


def _method(method: str | Method, options: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return create(method, **options)
    if not isinstance(method, Method):
        raise ConversionError(f"method must be a name or a Method, got {type(method).__name__}")
    if options:
        raise OptionError(f"give {', '.join(options)} to {type(method).__name__}(...), not to convert()")
    return method
