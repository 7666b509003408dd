"""The search finds what trying everything finds, with less work, and goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quickspike as qs
from quickspike import searching
from quickspike.augmentation import Augmentation
from quickspike.data import DataSet
from quickspike.errors import CheckpointError, OptionError, UnknownNameError
from quickspike.evaluation import make_fabric
from quickspike.searching import Candidate, Found, Trial, _least, front, search
from quickspike.training import Silent, Trainer, Training


@given(st.integers(1, 70), st.integers(1, 64))
def test_the_least_number_is_found(threshold: int, most: int) -> None:
    asked: list[int] = []

    def enough(steps: int) -> bool:
        asked.append(steps)
        return steps >= threshold

    found = _least(enough, most)
    assert found == (threshold if threshold <= most else None)
    assert max(asked) <= most
    assert len(set(asked)) <= 2 * most.bit_length() + 1


def trial(latency: int, accuracy: float, energy: float | None = None) -> Trial:
    return Trial("a", latency, latency, accuracy, 90 - accuracy, energy, 0.0)


def test_the_front_holds_what_nothing_beats() -> None:
    kept = [trial(1, 80, 5.0), trial(2, 85, 4.0), trial(4, 90, 9.0), trial(4, 89, 8.0)]
    beaten = [trial(2, 80, 5.0), trial(4, 84, 4.0), trial(8, 90, 9.0)]
    assert set(front([*beaten, *kept])) == set(kept)
    assert front([trial(1, 80), trial(2, 80)]) == (trial(1, 80),)


def test_what_took_more_than_twice_as_long_hides_nothing() -> None:
    def made(accuracy: float, seconds: float) -> Trial:
        return dataclasses.replace(trial(4, accuracy), seconds=seconds)

    trained, calibrated = made(90, 300.0), made(80, 10.0)
    assert set(front([trained, calibrated])) == {trained, calibrated}
    # The first trial compiles, and a busy machine is slow.
    assert front([made(90, 60.0), calibrated]) == (made(90, 60.0),)
    assert front([made(90, 1900.0), made(80, 1000.0)]) == (made(90, 1900.0),)
    # Time alone is no merit: it is never the same twice.
    assert set(front([made(90, 1.0), made(90, 100.0)])) == {made(90, 1.0), made(90, 100.0)}


CANDIDATES = ("potential_init", Candidate("threshold_balancing"), Candidate("threshold_balancing", {"initial": 0.0}))


@pytest.fixture(scope="module")
def calibration(digits: DataSet) -> Tensor:
    return torch.cat([images for images, _ in digits.loader("train", limit=200)])


def held_out(digits: DataSet) -> list[tuple[Tensor, Tensor]]:
    return list(digits.loader("train", limit=300, last=True))


def test_it_finds_what_trying_everything_finds(digits_source: nn.Module, calibration: Tensor, digits: DataSet) -> None:
    data, allowed, most = held_out(digits), 1.0, 12
    found = search(digits_source, calibration, data, CANDIDATES, max_drop=allowed, most_steps=most, device="cpu")
    everything: dict[str, int] = {}
    for candidate in CANDIDATES:
        one = Candidate(candidate) if isinstance(candidate, str) else candidate
        for steps in range(1, most + 1):
            snn = qs.convert(digits_source, calibration, one.method, steps=steps, **one.options)
            if found.reference - qs.evaluate(snn, data, None, (steps,), device="cpu").accuracy[steps] <= allowed:
                everything[str(one)] = steps
                break
    assert found.best is not None
    assert found.best.steps == min(everything.values())
    assert everything[found.best.candidate] == found.best.steps
    assert sum(one.steps for one in found.trials) < sum(range(1, most + 1)) * len(CANDIDATES) / 3
    assert found.best in found.front
    assert all(one.drop == pytest.approx(found.reference - one.accuracy) for one in found.trials)


def test_a_conversion_that_does_not_depend_on_t_is_simulated_once(
    digits_source: nn.Module, calibration: Tensor, digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, simulated = held_out(digits), list[tuple[int, ...]]()
    real = searching.evaluate

    def counted(snn: qs.SpikingNetwork, images: Any, reference: Any, steps: Any, **more: Any) -> Any:
        simulated.append(tuple(steps))
        return real(snn, images, reference, steps, **more)

    monkeypatch.setattr(searching, "evaluate", counted)
    fixed = {"ceiling": "percentile", "percentile": 99.9}
    candidates = (Candidate("threshold_balancing", fixed), Candidate("threshold_balancing", {**fixed, "signed": True}))
    found = search(digits_source, calibration, data, candidates[:1], max_drop=0.5, most_steps=16, device="cpu")
    assert found.best is not None
    between = {one.steps for one in found.trials} - {1, 2, 4, 8, 16}
    assert between
    assert {steps[-1] for steps in simulated} == {one.steps for one in found.trials} - between
    for one in found.trials:
        snn = qs.convert(digits_source, calibration, "threshold_balancing", steps=one.steps, **fixed)
        assert qs.evaluate(snn, data, None, (one.steps,), device="cpu").accuracy[one.steps] == one.accuracy
    # Neurons of another kind with the same thresholds are another network.
    both = search(digits_source, calibration, data, candidates, max_drop=0.5, most_steps=16, device="cpu")
    kinds = {one.accuracy for one in both.trials if one.steps == found.best.steps}
    assert len([one for one in both.trials if one.steps == found.best.steps]) == 2
    assert len(kinds) == 2


def test_layers_that_wait_count_by_their_latency(digits_source: nn.Module, calibration: Tensor, digits: DataSet) -> None:
    waiting, streaming = Candidate("threshold_balancing", {"synchronous": True}), Candidate("threshold_balancing")
    found = search(digits_source, calibration, held_out(digits), (waiting, streaming), max_drop=2.0, most_steps=8, device="cpu")
    assert found.best is not None
    assert found.best.candidate == "threshold_balancing"
    assert {one.latency // one.steps for one in found.trials if "synchronous" in one.candidate and one.steps > 1} == {4}


def test_nothing_within_the_bound(digits_source: nn.Module, calibration: Tensor, digits: DataSet) -> None:
    found = search(digits_source, calibration, held_out(digits), ("threshold_balancing",), max_drop=0.0, most_steps=1, device="cpu")
    assert found.best is None
    assert len(found.trials) == 1


def test_the_best_is_within_the_energy(digits_source: nn.Module, calibration: Tensor, digits: DataSet) -> None:
    def run(max_energy: float | None) -> Found:
        bounds = {"max_drop": 2.0, "most_steps": 8, "energy": "45nm_int8", "max_energy": max_energy}
        return search(digits_source, calibration, held_out(digits), CANDIDATES, device="cpu", **bounds)

    free = run(None)
    assert free.best is not None
    assert free.best.energy is not None
    same = run(free.best.energy).best
    assert same is not None
    assert (same.candidate, same.steps) == (free.best.candidate, free.best.steps)
    bound = run(free.best.energy * 0.999)
    others = [one for one in free.trials if one.drop <= 2.0 and (one.energy or 0) < free.best.energy]
    assert (bound.best is None) == (not others)
    assert bound.best is None or (bound.best.energy or 0) < free.best.energy
    assert run(0.0).best is None


def test_when_the_time_is_up_nothing_new_begins(digits_source: nn.Module, calibration: Tensor, digits: DataSet, tmp_path: Path) -> None:
    def run(max_seconds: float | None, file: Path | None = tmp_path / "search.json") -> Found:
        bounds = {"max_drop": 2.0, "most_steps": 4, "max_seconds": max_seconds}
        return search(digits_source, calibration, held_out(digits), CANDIDATES[:2], device="cpu", file=file, **bounds)

    hasty = run(1e-9)
    assert (hasty.best, hasty.trials, hasty.complete) == (None, (), False)
    whole = run(None)
    assert whole.complete
    # What the file holds takes no time.
    assert run(1e-9) == whole


def test_it_goes_on_where_it_stopped(
    digits_source: nn.Module, calibration: Tensor, digits: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, data = tmp_path / "search.json", held_out(digits)

    def run(file: Path | None, stop_after: int = 99) -> Found:
        seen: list[Trial] = []

        def watch(one: Trial) -> None:
            seen.append(one)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        return search(
            digits_source, calibration, data, CANDIDATES[:2], most_steps=8, energy="45nm_fp32", device="cpu", file=file, progress=watch
        )

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(file, stop_after=2)
    assert len(json.loads(file.read_text())["trials"]) == 2
    conversions: list[dict[str, Any]] = []
    real = searching.convert

    def counted(model: nn.Module, images: Tensor, *args: Any, **options: Any) -> Any:
        # On fewer images a conversion only tells how long layers wait.
        if len(images) == len(calibration):
            conversions.append(options)
        return real(model, images, *args, **options)

    monkeypatch.setattr(searching, "convert", counted)
    again = run(file)
    # Five trials; the best one's network, of which the file holds figures only, may have to be made again.
    remade = again.best in again.trials[:2]
    assert len(conversions) == len(whole.trials) - 2 + remade
    assert again.network is not None
    assert [(one.candidate, one.steps, one.accuracy, one.energy) for one in again.trials] == [
        (one.candidate, one.steps, one.accuracy, one.energy) for one in whole.trials
    ]
    assert again.best is not None
    assert again.best.energy is not None
    with pytest.raises(CheckpointError, match="belongs to another search"):
        search(digits_source, calibration, data, CANDIDATES[:1], device="cpu", file=file)
    with pytest.raises(CheckpointError, match="belongs to another search"):
        search(digits_source, calibration[:100], data, CANDIDATES[:1], energy="45nm_fp32", device="cpu", file=file)
    file.write_text("{")
    with pytest.raises(CheckpointError, match="not the file of a search"):
        run(file)


def trainer_of(digits: DataSet, folder: Path | None, **settings: Any) -> Trainer:
    chosen = Training(optimiser="adam", learning_rate=2e-3, weight_decay=0.0, batch_size=64, schedule="cosine", **settings)
    return Trainer(fabric=make_fabric("cpu"), data=digits.without_last(300), settings=chosen, folder=folder)


def test_training_gets_by_with_fewer_steps(digits_source: nn.Module, calibration: Tensor, digits: DataSet) -> None:
    data = held_out(digits)
    candidates = (Candidate("threshold_balancing"), Candidate("threshold_balancing", epochs=2))
    bounds = {"max_drop": 1.5, "most_steps": 8, "device": "cpu"}
    trainer = trainer_of(digits, None, distill=0.5)
    before = [parameter.clone() for parameter in digits_source.parameters()]
    plain = search(digits_source, calibration, data, candidates[:1], **bounds)
    found = search(digits_source, calibration, data, candidates, trainer=trainer, **bounds)
    assert plain.best is not None
    assert found.best is not None
    assert found.network is not None
    assert found.best.steps < plain.best.steps
    assert found.best.candidate == "threshold_balancing tuned for 2 epochs"
    assert qs.evaluate(found.network, data, None, (found.best.steps,), device="cpu").accuracy[found.best.steps] == found.best.accuracy
    assert "network" not in found.to_json()
    assert all(torch.equal(old, new) for old, new in zip(before, digits_source.parameters(), strict=True))


def test_half_a_training_is_gone_on_with_and_a_whole_one_is_kept(
    digits_source: nn.Module, calibration: Tensor, digits: DataSet, tmp_path: Path
) -> None:
    data, candidates = held_out(digits), (Candidate("threshold_balancing", epochs=2),)
    file = tmp_path / "search.json"

    class Stops(Silent):
        """Counts epochs, and interrupts the second one."""

        def __init__(self, stop: bool) -> None:
            self.stop, self.epochs = stop, 0

        def advance(self, samples: int) -> None:
            if self.stop and self.epochs == 1:
                raise KeyboardInterrupt

        def row(self, stage: str, row: dict[str, float]) -> None:
            self.epochs += 1

    def run(folder: str, stop: bool = False) -> tuple[Found, int]:
        watcher = Stops(stop)
        trainer = dataclasses.replace(trainer_of(digits, tmp_path / folder), watcher=watcher)
        found = search(digits_source, calibration, data, candidates, max_drop=50, most_steps=1, device="cpu", trainer=trainer, file=file)
        return found, watcher.epochs

    whole, epochs = run("whole")
    assert epochs == 2
    assert run("whole") == (whole, 0)
    file.unlink()
    assert run("whole")[1] == 0
    file.unlink()
    with pytest.raises(KeyboardInterrupt):
        run("half", stop=True)
    again, epochs = run("half")
    assert epochs == 1
    assert again.best is not None
    assert whole.best is not None
    assert dataclasses.replace(again.best, seconds=0.0) == dataclasses.replace(whole.best, seconds=0.0)
    # Another training is another search, and finds nothing of this one.
    file.unlink()
    other = dataclasses.replace(trainer_of(digits, tmp_path / "whole"), augmentation=Augmentation(flip=True), watcher=Stops(True))
    with pytest.raises(KeyboardInterrupt):
        search(digits_source, calibration, data, candidates, max_drop=50, most_steps=1, device="cpu", trainer=other)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"candidates": ()}, "no candidates"),
        ({"max_drop": -1.0}, "max_drop"),
        ({"max_drop": float("nan")}, "max_drop"),
        ({"most_steps": 0}, "most_steps"),
        ({"energy": "lohi"}, "did you mean 'loihi'"),
        ({"max_energy": 5.0}, "max_energy must be >= 0 pJ, with energy=DEVICE"),
        ({"max_energy": -1.0, "energy": "loihi"}, "max_energy"),
        ({"max_seconds": 0.0}, "max_seconds"),
        ({"candidates": (Candidate("qcfs", {"level": 3}),)}, "level"),
        ({"candidates": (Candidate("qcfs", epochs=-1),)}, "epochs must be a whole number >= 0"),
        ({"candidates": (Candidate("qcfs", epochs=1),)}, "need a trainer"),
    ],
)
def test_mistakes_are_refused_before_the_work(options: dict[str, object], text: str, digits_source: nn.Module) -> None:
    arguments: dict[str, object] = {"candidates": ("qcfs",)} | options
    with pytest.raises((OptionError, UnknownNameError), match=text):
        search(digits_source, [], [], **arguments)


def test_unknown_methods_are_refused(digits_source: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="qcsf"):
        search(digits_source, [], [], ("qcsf",))
