"""The least number of steps, over methods and their options, that keeps the loss of accuracy within bounds.

For the first candidate T is doubled until the loss is small enough, and then halved in between, which finds the least T
as trying all of them would, as long as accuracy does not fall with more steps. A later candidate that is not good enough
at the latency of the best one so far is left at that; otherwise T is halved below it. Every trial is converted for its
own T, and fine-tuned at it if its candidate says for how many epochs.

One simulation gives the accuracy after every number of steps, but of one network, and most methods fit theirs to T: read
out after 4 steps, a network that was fitted for 16 is worse than one fitted for 4. Where a conversion turns out to be the
same as one for more steps (`rate_norm`, `diet_snn`, ceilings from percentiles), it is not simulated again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from quickspike.api import convert, tune
from quickspike.checkpoint import load
from quickspike.conversion import SpikingNetwork
from quickspike.data import Batches, image_batches, labelled_batches
from quickspike.energy import device_named, energy_of
from quickspike.errors import CheckpointError, OptionError
from quickspike.evaluation import accuracy_of, evaluate, make_fabric
from quickspike.files import write_text
from quickspike.method import create, get
from quickspike.neuron import MOST_WEIGHTED
from quickspike.operations import count_operations
from quickspike.provenance import digest
from quickspike.training import Trainer

A_WHILE = 60.0
"""Seconds by which the wall-clock times of two trials have to differ, to count."""


@dataclass(frozen=True)
class Candidate:
    """A way to convert, and to train afterwards."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    """Of fine-tuning; 0 for none."""

    def __str__(self) -> str:
        tuned = [f"tuned for {self.epochs} epoch{'s' * (self.epochs > 1)}"] * (self.epochs > 0)
        options = {name: value for name, value in sorted(self.options.items()) if name != "refinements"}
        refined = [f"| {one}" for one in self.options.get("refinements", ())]
        return " ".join([self.method, *(f"{name}={value}" for name, value in options.items()), *refined, *tuned])


@dataclass(frozen=True)
class Trial:
    """One conversion, measured."""

    candidate: str
    steps: int
    latency: int
    """Steps until the answer is there; more than `steps` where layers wait for whole windows."""
    accuracy: float
    drop: float
    """Percentage points below the source network."""
    energy: float | None
    """Of an image, in pJ, conservative account; None if not asked for."""
    seconds: float
    """What conversion and measurement took."""


@dataclass(frozen=True)
class Found:
    """Outcome of a search."""

    best: Trial | None
    """Least latency, then least energy, then highest accuracy within the bounds; None if nothing is within."""
    front: tuple[Trial, ...]
    """Trials that no other one beats in latency, accuracy, energy and time together, by latency; see `front`."""
    trials: tuple[Trial, ...]
    reference: float
    """Accuracy of the source network in percent."""
    max_drop: float
    max_energy: float | None = None
    """Of an image, in pJ."""
    complete: bool = True
    """False: the time was up before all candidates were tried."""
    network: SpikingNetwork | None = field(default=None, compare=False, repr=False)
    """That of the best trial."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the network."""
        return {name: value for name, value in asdict(dataclasses.replace(self, network=None)).items() if name != "network"}


def search(
    model: nn.Module,
    calibration: Batches,
    data: Batches,
    candidates: Sequence[Candidate | str],
    *,
    max_drop: float = 1.0,
    most_steps: int = 64,
    energy: str | None = None,
    max_energy: float | None = None,
    max_seconds: float | None = None,
    device: str = "auto",
    trainer: Trainer | None = None,
    file: str | Path | None = None,
    progress: Callable[[Trial], object] | None = None,
) -> Found:
    """Search.

    Args:
        model: the source network; not modified.
        calibration: images, see `convert`; like `data`, gone through more than once.
        data: labelled images that accuracy is measured on; what is chosen by them is to be reported on others.
        candidates: methods by name, or with options and epochs of fine-tuning. Put what costs little first: it bounds the
            steps of those that are trained.
        max_drop: percentage points of accuracy that may be lost.
        most_steps: the largest T that is tried; of weighted spikes, the largest that they can have if that is less.
        energy: a device of `quickspike.energy`, if energy counts.
        max_energy: what an image may take on that device, in pJ.
        max_seconds: after so long no new trial begins; those that `file` holds cost no time.
        device: see `quickspike.evaluation.make_fabric`.
        trainer: how candidates with epochs are fine-tuned; `data` must be no part of what it trains on. Its teacher is
            the source network unless it has one. In its folder each training has one of its own, which an interrupted
            search goes on from.
        file: trials go there as they are made, and are not made again by a search that finds them there.
        progress: called with every trial.

    Raises:
        OptionError: no candidates, a number out of range, an option that a method does not have, or epochs and no trainer.
        UnknownNameError: no such method or device.
        CheckpointError: `file` belongs to another search.
        OutputError: `file` cannot be written.
    """
    chosen = [Candidate(one) if isinstance(one, str) else one for one in candidates]
    _check(chosen, max_drop, most_steps, max_seconds)
    if trainer is None and any(candidate.epochs for candidate in chosen):
        raise OptionError("search: candidates with epochs need a trainer that fine-tunes them")
    if energy is not None:
        device_named(energy)
    if max_energy is not None and (energy is None or not (math.isfinite(max_energy) and max_energy >= 0)):
        raise OptionError(f"search: max_energy must be >= 0 pJ, with energy=DEVICE to count on, got {max_energy!r} with {energy!r}")
    limit = None if max_seconds is None else time.perf_counter() + max_seconds
    reference = accuracy_of(model, data, make_fabric(device))

    def within(trial: Trial) -> bool:
        return trial.drop <= max_drop and (max_energy is None or (trial.energy or 0.0) <= max_energy)

    kept = None if file is None else Path(file)
    trials_of = _Trials(model, calibration, data, reference, energy, device, trainer, kept, progress, limit, within)
    latency, complete = math.inf, True
    try:
        for candidate in chosen:

            def enough(steps: int, candidate: Candidate = candidate) -> bool:
                return trials_of.trial(candidate, steps).drop <= max_drop

            weighted = create(candidate.method, steps=1, **candidate.options).weighted
            most = min(most_steps, MOST_WEIGHTED) if weighted else most_steps
            if math.isfinite(latency):
                # More steps than these would be no gain; a candidate that fails even there is left at that.
                most = trials_of.steps_within(candidate, latency, most)
                least = _between(enough, 0, most) if enough(most) else None
            else:
                least = _least(enough, most)
            # Energy grows with T: what takes too much with the least T takes too much with any.
            if least is not None and within(trials_of.trial(candidate, least)):
                latency = min(latency, trials_of.trial(candidate, least).latency)
    except _TimeIsUp:
        complete = False
    trials = tuple(trials_of.trials)
    best = min(filter(within, trials), key=_order, default=None)
    network = None if best is None else trials_of.network_of(best, chosen)
    return Found(best, front(trials), trials, reference, max_drop, max_energy, complete, network)


class _TimeIsUp(Exception):
    """Ends the search; no error."""


def _check(candidates: Sequence[Candidate], max_drop: float, most_steps: int, max_seconds: float | None) -> None:
    if not candidates:
        raise OptionError("search: no candidates; name at least one method")
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise OptionError(f"search: max_drop must be >= 0 percentage points, got {max_drop!r}")
    if not isinstance(most_steps, int) or most_steps < 1:
        raise OptionError(f"search: most_steps must be a whole number >= 1, got {most_steps!r}")
    if max_seconds is not None and not max_seconds > 0:
        raise OptionError(f"search: max_seconds must be > 0, got {max_seconds!r}")
    for candidate in candidates:
        get(candidate.method)
        create(candidate.method, steps=1, **candidate.options)
        if not isinstance(candidate.epochs, int) or candidate.epochs < 0:
            raise OptionError(f"search: epochs must be a whole number >= 0, got {candidate.epochs!r}")


def _least(enough: Callable[[int], bool], most: int) -> int | None:
    """The least number up to `most` that is enough, if all above it are; None if `most` is not."""
    low, high = 0, 1
    while high < most and not enough(high):
        low, high = high, high * 2
    high = min(high, most)
    return _between(enough, low, high) if enough(high) else None


def _between(enough: Callable[[int], bool], low: int, high: int) -> int:
    """The least number above `low` that is enough; `high` is."""
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def _order(trial: Trial) -> tuple[float, float, float]:
    return trial.latency, trial.energy or 0.0, -trial.accuracy


def front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The Pareto front: trials that no other one beats, by latency.

    One trial beats another that it equals or surpasses in latency, accuracy and energy, and surpasses in one of them, unless
    it took more than twice as long, and a minute longer (`seconds`: conversion, training, measurement): what a training
    gained is not to hide what is to be had without one. Time is measured and never the same twice, so that smaller
    differences, such as what is compiled in the first trial, say nothing, and no trial beats another by its time alone.

    Args:
        trials: of one search, or with energies of one device; a trial without energy counts as one that takes none.
    """

    def beats(one: Trial, other: Trial) -> bool:
        pairs = [(one.latency, other.latency), (-one.accuracy, -other.accuracy), (one.energy or 0.0, other.energy or 0.0)]
        if one.seconds > max(2 * other.seconds, other.seconds + A_WHILE):
            return False
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return tuple(sorted((trial for trial in trials if not any(beats(other, trial) for other in trials)), key=_order))


class _Trials:
    """Makes trials, each once, and keeps them in a file."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Batches,
        data: Batches,
        reference: float,
        energy: str | None,
        device: str,
        trainer: Trainer | None,
        file: Path | None,
        progress: Callable[[Trial], object] | None,
        limit: float | None,
        within: Callable[[Trial], bool],
    ) -> None:
        self.limit, self.within = limit, within
        self.best: tuple[Trial, SpikingNetwork] | None = None
        self.model, self.calibration, self.data, self.reference = model, calibration, data, reference
        self.energy, self.device, self.trainer, self.file, self.progress = energy, device, trainer, file, progress
        self.about = {} if file is None and trainer is None else self._about()
        self.known: dict[tuple[str, int], Trial] = {}
        self.trials: list[Trial] = []
        self.accuracies: dict[str, dict[int, float]] = {}
        """Of networks that were simulated, by `_likeness`: accuracy after every number of steps."""
        if file is not None and file.exists():
            self._read(file)

    def trial(self, candidate: Candidate, steps: int) -> Trial:
        """Convert and measure, or remember.

        Raises:
            _TimeIsUp: it would have to be made, and the time is up.
        """
        key = str(candidate), steps
        if key not in self.known:
            if self.limit is not None and time.perf_counter() >= self.limit:
                raise _TimeIsUp
            self.known[key] = self._made(candidate, steps)
            self._write()
        found = self.known[key]
        if found not in self.trials:
            self.trials.append(found)
            if self.progress is not None:
                self.progress(found)
        return found

    def network(self, candidate: Candidate, steps: int) -> SpikingNetwork:
        """Convert, and fine-tune unless the network lies in the trainer's folder already."""
        if not candidate.epochs or self.trainer is None:
            return convert(self.model, self.calibration, candidate.method, steps=steps, **candidate.options)
        settings = dataclasses.replace(self.trainer.settings, epochs=candidate.epochs)
        teacher = (self.trainer.teacher or self.model) if settings.taught else None
        folder = None if self.trainer.folder is None else self.trainer.folder / self._name(candidate, steps)
        whole = None if folder is None else folder / "network.safetensors"
        if whole is not None and whole.exists():
            return load(whole)
        snn = convert(self.model, self.calibration, candidate.method, steps=steps, **candidate.options)
        tuned = tune(snn, dataclasses.replace(self.trainer, settings=settings, folder=folder, resume=True, teacher=teacher))
        if whole is not None:
            tuned.save(whole)
        return tuned

    def network_of(self, trial: Trial, candidates: Sequence[Candidate]) -> SpikingNetwork:
        """The network of a trial; one that only the file knows is made again."""
        if self.best is not None and self.best[0] == trial:
            return self.best[1]
        return self.network(next(one for one in candidates if str(one) == trial.candidate), trial.steps)

    def _name(self, candidate: Candidate, steps: int) -> str:
        """Of a folder that holds this training of this search and no other."""
        key = json.dumps([str(candidate), steps, self.about], sort_keys=True, default=str)
        return f"{candidate.method}_t{steps}_{sha256(key.encode()).hexdigest()[:12]}"

    def steps_within(self, candidate: Candidate, latency: float, most: int) -> int:
        """The largest T, from 1 to `most`, whose latency is no larger. The graph shows it, whatever it is calibrated on."""
        few = next(image_batches(self.calibration))[:8]
        snn = convert(self.model, few, candidate.method, steps=2, **candidate.options)
        least, beyond = 1, most + 1
        while beyond - least > 1:
            middle = (least + beyond) // 2
            snn.set_steps(middle)
            least, beyond = (middle, beyond) if snn.latency <= latency else (least, middle)
        return least

    def _made(self, candidate: Candidate, steps: int) -> Trial:
        started = time.perf_counter()
        snn = self.network(candidate, steps)
        accuracy = self._accuracy(snn, steps)
        cost = None if self.energy is None else energy_of(count_operations(snn, _first(self.data)), self.energy).spiking
        seconds = time.perf_counter() - started
        trial = Trial(str(candidate), steps, snn.latency, accuracy, self.reference - accuracy, cost, seconds)
        if self.within(trial) and (self.best is None or _order(trial) < _order(self.best[0])):
            self.best = trial, snn
        return trial

    def _accuracy(self, snn: SpikingNetwork, steps: int) -> float:
        """Of the network after its T steps; from an earlier simulation if one was of the same network for more steps."""
        if snn.synchronous:
            # Its windows are as long as T: another T is another network.
            return evaluate(snn, self.data, None, (steps,), device=self.device).accuracy[steps]
        known = self.accuracies.setdefault(_likeness(snn), {})
        if steps not in known:
            known |= evaluate(snn, self.data, None, range(1, steps + 1), device=self.device).accuracy
        return known[steps]

    def _about(self) -> dict[str, Any]:
        weights = [value for _, value in sorted(self.model.state_dict().items())]
        calibration = (images for images, _ in labelled_batches(self.calibration))
        data = (tensor for batch in labelled_batches(self.data) for tensor in batch if tensor is not None)
        digests = {"model": digest(weights), "calibration": digest(calibration), "data": digest(data)}
        return {**digests, "reference": self.reference, "energy": self.energy, "training": self._training()}

    def _training(self) -> dict[str, Any] | None:
        """What trainings depend on but for their epochs."""
        if self.trainer is None:
            return None
        settings = {name: value for name, value in asdict(self.trainer.settings).items() if name != "epochs"}
        data = {"data": self.trainer.data.name, "images": self.trainer.data.size("train")}
        return data | settings | {"augmentation": asdict(self.trainer.augmentation)}

    def _read(self, file: Path) -> None:
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            trials = [Trial(**trial) for trial in saved["trials"]]
            about = saved["about"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: not the file of a search ({error}); remove it or name another") from error
        if about != self.about:
            raise CheckpointError(f"{file}: belongs to another search ({about}); remove it or name another")
        self.known = {(trial.candidate, trial.steps): trial for trial in trials}

    def _write(self) -> None:
        if self.file is not None:
            saved = {"about": self.about, "trials": [asdict(trial) for trial in self.known.values()]}
            write_text(self.file, json.dumps(saved, indent=2, allow_nan=False) + "\n")


def _likeness(snn: SpikingNetwork) -> str:
    """The same for two streaming networks that differ in nothing but T."""
    tensors = digest(value for _, value in sorted(snn.state_dict().items()))
    kinds = [
        (name, neuron.scaled, neuron.strict, neuron.signed, neuron.to_zero, neuron.weighted, neuron.members, neuron.first_run)
        for name, neuron in snn.neurons().items()
    ]
    return f"{tensors} {kinds} {snn.readout_leak} {snn.code}"


def _first(data: Batches) -> list[Any]:
    """The first batch."""
    for batch in data:
        return [batch]
    return []
