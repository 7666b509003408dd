"""method="auto": from what there is to the combination of methods that measures best, with the reasons.

What there is: unlabelled images; labelled training images, if a trainer is given; neurons that the hardware has; a number of
steps; minutes. Four rounds, each on what won the one before: kind of neuron and factor on the ceilings; refinements
without training; a readout that forgets early steps; training. What wins is measured on images that nothing was fitted to: by
the share on which the spiking network chooses the class of the source network, or by accuracy on the trainer's validation
images. Of combinations that measure alike the one nearer to the source network wins, then the one that was tried first,
which is the simpler one.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quickspike.api import convert, finish, fit, tune
from quickspike.capture import copy_of
from quickspike.conversion import SpikingNetwork
from quickspike.coverage import Coverage
from quickspike.data import Batches, ImageStream
from quickspike.errors import DataError, OptionError
from quickspike.evaluation import evaluate, make_fabric
from quickspike.graph import Traced
from quickspike.method import Method, create
from quickspike.neuron import MAX_STEPS, MOST_MEMBERS, MOST_WEIGHTED
from quickspike.options import option, validate
from quickspike.piecewise import PIECES
from quickspike.refinement import refinements_of
from quickspike.searching import Candidate
from quickspike.structure import first
from quickspike.training import Trainer
from quickspike.tuning import TUNING

logger = logging.getLogger(__name__)

KINDS = ("signed", "synchronous", "weighted")
"""Of neurons, beside plain ones: options of every method, and of `Auto`."""
SCALES = (1.0, 0.9, 0.8)
"""Factors on the ceilings: below 1, neurons clip more and fire earlier, which pays in deep networks."""
HELD_OUT = 4
"""One calibration image of so many measures in the rounds without training, and calibrates nothing."""
LEAKY = "leaky_readout"
FEWEST = 20
"""Calibration images that are needed to hold some out."""


@dataclass(frozen=True, kw_only=True)
class Auto:
    """What the choice may make use of."""

    name: ClassVar[str] = "auto"

    steps: int = option(8, "time steps the spiking network runs for", unit="steps", low=1, high=MAX_STEPS)
    synchronous: bool = option(False, "layers may wait for the whole window of the one before: an answer after depth x T steps")
    signed: bool = option(False, "neurons may take spikes back, for hardware with spikes of -1")
    weighted: bool = option(
        False, "spikes may be weighted by their step, 2^T levels in T steps: layers wait as with synchronous; for hardware that shifts"
    )
    members: int = option(
        1,
        "neurons may stand in groups of so many: as many levels in every step for so many times the neurons",
        low=1,
        high=MOST_MEMBERS,
    )
    max_minutes: float = option(0.0, "begin nothing new after so long; 0 for no end", unit="minutes", low=0, high=1e6)

    def __post_init__(self) -> None:
        validate(self)
        if self.weighted and self.steps > MOST_WEIGHTED:
            # Before anything is tried, not when their turn comes.
            raise OptionError(f"{self.name}: weighted spikes have at most {MOST_WEIGHTED} steps, got steps={self.steps}")


@dataclass(frozen=True)
class Attempt:
    """A combination, measured."""

    what: str
    measured: float
    """Percent; of what, says the choice."""
    deviation: float
    """Root mean square distance from what the source network gives, in percent of the latter's; NaN where it was not measured."""
    seconds: float


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    network: SpikingNetwork = field(compare=False, repr=False)
    what: str
    measure: str
    """What the percentages are."""
    attempts: tuple[Attempt, ...]
    reasons: tuple[str, ...]
    """A sentence each, in the order of the rounds."""
    coverage: Coverage = field(compare=False, repr=False)
    """What of the source network converts."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the network."""
        attempts = [asdict(one) | {"deviation": one.deviation if math.isfinite(one.deviation) else None} for one in self.attempts]
        return {"what": self.what, "measure": self.measure, "attempts": attempts, "reasons": list(self.reasons)}


def choose(
    model: nn.Module,
    calibration: Batches,
    auto: Auto | None = None,
    *,
    trainer: Trainer | None = None,
    analog: Sequence[str] = (),
    pieces: int = PIECES,
    progress: Callable[[Attempt], object] | None = None,
) -> Choice:
    """Choose.

    Args:
        model: the source network; not modified.
        calibration: images, see `convert`. All of them calibrate what is handed out.
        auto: what may be made use of; `Auto()` if None.
        trainer: trains and fine-tunes with labelled images, up to as many epochs as it says or as the minutes allow. Its
            validation images are what everything is measured on, and must be no part of `calibration`.
        analog: see `convert`.
        pieces: see `convert`.
        progress: called with every attempt.

    Raises:
        DataError: unusable or too few calibration images.
        OptionError: a trainer without validation images.
        UnsupportedOperatorError: see `convert`.
    """
    return _Rounds(model, calibration, auto or Auto(), trainer, analog, pieces, progress).choice()


@dataclass(frozen=True)
class _Best:
    """The best combination so far."""

    attempt: Attempt
    network: SpikingNetwork
    method: Method
    trained: bool = False


class _Rounds:
    def __init__(
        self,
        model: nn.Module,
        calibration: Batches,
        auto: Auto,
        trainer: Trainer | None,
        analog: Sequence[str],
        pieces: int,
        progress: Callable[[Attempt], object] | None,
    ) -> None:
        if trainer is not None and not trainer.settings.validation:
            raise OptionError("auto chooses by accuracy on images that are held out of the training; give validation=1000 or so")
        self.started = time.perf_counter()
        self.model, self.auto, self.trainer, self.analog, self.pieces = model, auto, trainer, analog, pieces
        self.progress = progress
        self.attempts: list[Attempt] = []
        self.reasons: list[str] = []
        self.images = list(ImageStream(calibration))
        if trainer is None:
            self.fitted, self.measured = _held_out(self.images)
            self.answers = _answers(model, self.measured)
            what = "closeness (100 - deviation) to" if self.answers is None else "agreement with"
            self.measure = f"{what} the source network on {len(self.measured)} images held out of the calibration"
        else:
            self.fitted = self.images
            self.measure = f"accuracy on {trainer.settings.validation} validation images"

    def choice(self) -> Choice:
        stream = ImageStream(self.fitted)
        ann = fit(self.model, stream, self._method(1.0, "plain"), analog=self.analog, pieces=self.pieces)
        best = self._trained(self._read_out(self._refined(self._scaled(ann, stream), ann, stream), ann, stream))
        network = best.network
        if not best.trained and self.trainer is None:
            self.reasons.append(f"made anew with all {sum(map(len, self.images))} calibration images")
            network = convert(self.model, self.images, best.method, analog=self.analog, pieces=self.pieces)
        choice = Choice(network, best.attempt.what, self.measure, tuple(self.attempts), tuple(self.reasons), ann.coverage)
        network.provenance["chosen"] = choice.to_json()
        return choice

    # Rounds

    def _scaled(self, ann: Traced, stream: ImageStream) -> _Best:
        """Kind of neuron and factor on the ceilings."""
        allowed = {kind: bool(getattr(self.auto, kind)) for kind in KINDS} | {"grouped": self.auto.members > 1}
        kinds = ["plain", *(kind for kind, is_allowed in allowed.items() if is_allowed)]
        found = dict[str, _Best]()
        for kind, scale in itertools.product(kinds, SCALES):
            if found and self._is_late():
                self.reasons.append(f"{kind} neurons with {scale:g} of the ceilings, and what follows, were not tried: the time was up")
                break
            attempt = self._attempt(self._method(scale, kind), ann, stream)
            found[kind] = self._better(found[kind], attempt) if kind in found else attempt
        best = self._better(*found.values())
        figures = ", ".join(f"{kind} {one.attempt.measured:.1f}" for kind, one in found.items())
        self.reasons.append(f"neurons and ceilings: {best.attempt.what} (best of each kind in %: {figures})")
        left_out = [f"{kind} neurons" for kind in allowed if kind not in kinds]
        if left_out:
            self.reasons.append(f"not tried, since not allowed: {', '.join(left_out)}")
        return best

    def _refined(self, start: _Best, ann: Traced, stream: ImageStream) -> _Best:
        """Refinements without training."""
        best, refused = start, list[str]()
        for names in refinements_for(self.auto.steps):
            if self._is_late():
                self.reasons.append(f"refinements from {' | '.join(names)} on were not tried: the time was up")
                break
            method = dataclasses.replace(start.method, refinements=refinements_of(names))
            try:
                best = self._better(best, self._attempt(method, ann, stream))
            except OptionError as error:
                refused.append(f"{' | '.join(names)} ({error})")
        gained = f"{best.attempt.what} ({start.attempt.measured:.1f} -> {best.attempt.measured:.1f} %)"
        self.reasons.append(f"refinements: {gained}" if best is not start else "refinements: none was better than nothing")
        if refused:
            self.reasons.append(f"refused: {'; '.join(refused)}")
        return best

    def _read_out(self, start: _Best, ann: Traced, stream: ImageStream) -> _Best:
        """A readout that forgets early steps, behind whatever won."""
        if start.network.steps == 1:
            return start
        if self._is_late():
            self.reasons.append(f"{LEAKY} was not tried: the time was up")
            return start
        method = dataclasses.replace(start.method, refinements=(*start.method.refinements, *refinements_of([LEAKY])))
        try:
            found = self._attempt(method, ann, stream)
        except OptionError as error:
            self.reasons.append(f"refused: {error}")
            return start
        best = self._better(start, found)
        helped = "" if best is found else ": no better"
        self.reasons.append(f"readout: {LEAKY} ({start.attempt.measured:.1f} -> {found.attempt.measured:.1f} %){helped}")
        return best

    def _trained(self, start: _Best) -> _Best:
        """Training from the source network with a staircase of T levels, and fine-tuning of what is there."""
        trainer = self.trainer
        if trainer is None:
            self.reasons.append("nothing was trained: no labelled images were given")
            return start
        same = {kind: getattr(start.method, kind) for kind in (*KINDS, "members")}
        staircase = create("qcfs", steps=self.auto.steps, levels=start.method.resolution, **same)
        best = self._better(start, *self._from_source(staircase, trainer))
        best = self._better(best, *self._tuned(best, trainer))
        gained = f"{best.attempt.what} ({start.attempt.measured:.1f} -> {best.attempt.measured:.1f} %)"
        self.reasons.append(f"training: {gained}" if best is not start else "training: was no better than none")
        return best

    def _from_source(self, method: Method, trainer: Trainer) -> list[_Best]:
        stream = ImageStream(self.fitted)
        one = fit(self.model, stream, method, analog=self.analog, pieces=self.pieces)
        epochs = self._epochs(one.module, f"training with {method.name}", trainer)
        if not epochs:
            return []
        started = time.perf_counter()
        stage = _stage(trainer, "train", epochs=epochs)
        ann = fit(self.model, stream, method, stage, analog=self.analog, pieces=self.pieces)
        snn = finish(ann, stream, method)
        return [self._seen(f"{_text(method)} trained for {_count(epochs)}", snn, method, started, trained=True)]

    def _tuned(self, best: _Best, trainer: Trainer) -> list[_Best]:
        epochs = self._epochs(best.network, "fine-tuning", trainer)
        if not epochs:
            return []
        started = time.perf_counter()
        teacher = self.model if trainer.settings.taught and trainer.teacher is None else trainer.teacher
        snn = tune(best.network, _stage(trainer, "tune", epochs=epochs, **TUNING), teacher=teacher)
        return [self._seen(f"{best.attempt.what} fine-tuned for {_count(epochs)}", snn, best.method, started, trained=True)]

    def _epochs(self, module: nn.Module, what: str, trainer: Trainer) -> int:
        """How many fit into the time left; 0 if not even one does, with the reason."""
        wanted = trainer.settings.epochs
        left = self._left()
        if not math.isfinite(left):
            return wanted
        seconds = self._shared(_seconds_of_an_epoch(module, trainer))
        fitting = max(0, int(left / seconds))
        if fitting < wanted:
            self.reasons.append(f"{what}: an epoch takes about {seconds / 60:.1f} min, {left / 60:.1f} min are left: {fitting} of {wanted}")
        return min(wanted, fitting)

    # Measuring

    def _attempt(self, method: Method, ann: Traced, stream: ImageStream) -> _Best:
        started = time.perf_counter()
        return self._seen(_text(method), finish(ann, stream, method), method, started)

    def _seen(self, what: str, snn: SpikingNetwork, method: Method, started: float, trained: bool = False) -> _Best:
        measured, deviation = self._measure(snn)
        attempt = Attempt(what, measured, deviation, time.perf_counter() - started)
        self.attempts.append(attempt)
        logger.info("auto: %s: %.2f %%", what, measured)
        if self.progress is not None:
            self.progress(attempt)
        return _Best(attempt, snn, method, trained)

    def _measure(self, snn: SpikingNetwork) -> tuple[float, float]:
        if self.trainer is not None:
            accuracy = self.trainer.accuracy(self.trainer.fabric.to_device(copy.deepcopy(snn)))
            return accuracy or 0.0, math.nan
        device = str(next(snn.parameters()).device)
        images = torch.split(self.measured, 100)
        data: list[Any] = list(images) if self.answers is None else list(zip(images, torch.split(self.answers, 100), strict=True))
        report = evaluate(snn, data, self.model, (snn.steps,), fabric=make_fabric(device))
        deviation = report.deviation[snn.steps]
        return report.accuracy.get(snn.steps, 100 - deviation), deviation

    @staticmethod
    def _better(*found: _Best) -> _Best:
        def order(one: _Best) -> tuple[float, float]:
            deviation = one.attempt.deviation
            return one.attempt.measured, -deviation if math.isfinite(deviation) else -math.inf

        return max(found, key=order)

    # Time

    def _left(self) -> float:
        """Seconds; the same in all processes."""
        if not self.auto.max_minutes:
            return math.inf
        return self._shared(60 * self.auto.max_minutes - (time.perf_counter() - self.started))

    def _is_late(self) -> bool:
        return self._left() <= 0

    def _shared(self, value: float) -> float:
        """That of the first process, so that all decide alike."""
        return value if self.trainer is None else float(self.trainer.fabric.broadcast(value))

    def _method(self, scale: float, kind: str) -> Method:
        options: dict[str, Any] = {one: one == kind for one in KINDS} | {"members": self.auto.members if kind == "grouped" else 1}
        return create("threshold_balancing", steps=self.auto.steps, scale=scale, **options)


def _held_out(batches: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(batches that calibrate, images that measure).

    Raises:
        DataError: too few.
    """
    count = sum(map(len, batches))
    if count < FEWEST:
        raise DataError(f"auto needs at least {FEWEST} calibration images to hold some out, got {count}; give more, or name a method")
    fitted, measured, seen = list[Tensor](), list[Tensor](), 0
    for batch in batches:
        out = (torch.arange(seen, seen + len(batch)) + 1) % HELD_OUT == 0
        seen += len(batch)
        measured.append(batch[out])
        if not bool(out.all()):
            fitted.append(batch[~out])
    return fitted, torch.cat(measured)


def _answers(model: nn.Module, images: Tensor) -> Tensor | None:
    """The classes that the source network chooses, `[N]`; None if it chooses none, one for each image."""
    like = next(model.parameters(), torch.empty(0))
    source = copy_of(model).eval()
    with torch.inference_mode():
        outputs = [first(source(part.to(like))) for part in torch.split(images, 100)]
    if outputs[0].ndim != 2 or outputs[0].shape[1] < 2:
        return None
    return torch.cat([output.argmax(1) for output in outputs]).cpu()


def _text(method: Method) -> str:
    """Method and what of it is not as usual."""
    usual = create(method.name, steps=method.steps)
    names = [one.name for one in dataclasses.fields(method) if one.name not in ("steps", "sites")]
    return str(Candidate(method.name, {name: value for name in names if (value := getattr(method, name)) != getattr(usual, name)}))


def _count(epochs: int) -> str:
    return f"{epochs} epoch{'s' * (epochs != 1)}"


def refinements_for(steps: int) -> list[tuple[str, ...]]:
    """What may follow a conversion for so many steps, what costs least first."""
    weights = "weight_calibration:reach=network"
    found = [
        ("bias_correction",),
        ("potential_correction:granularity=channel",),
        (weights,),
        ("bias_correction", weights),
        (weights, "bias_correction"),
        ("offset_shift",),
        ("offset_shift", "bias_correction"),
    ]
    # A mask needs steps to look at, and others that count.
    return [*found, (f"residual_mask:tau={(steps + 1) // 2}",)] if steps > 1 else found


def _stage(trainer: Trainer, name: str, **changes: Any) -> Trainer:
    """The trainer with other settings, and a folder of its own for the stage."""
    folder = None if trainer.folder is None else trainer.folder / name
    return dataclasses.replace(trainer, settings=dataclasses.replace(trainer.settings, **changes), folder=folder)


def _seconds_of_an_epoch(module: nn.Module, trainer: Trainer) -> float:
    """From the second of two batches; the first compiles."""
    copied = trainer.fabric.to_device(copy.deepcopy(module)).train()
    for parameter in copied.parameters():
        parameter.requires_grad_()
    size = min(trainer.settings.batch_size, trainer.data.size("train")) // trainer.fabric.world_size
    images = next(iter(trainer.data.loader("train", batch_size=max(1, size))))[0].to(trainer.fabric.device)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.enable_grad(), trainer.fabric.autocast():
            loss = first(copied(images)).float().square().mean()
        torch.autograd.backward(loss)
        seconds = time.perf_counter() - started
    return seconds * (trainer.data.size("train") - trainer.settings.validation) / len(images) / trainer.fabric.world_size
