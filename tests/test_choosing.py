"""method="auto" takes what measures best on images that nothing was fitted to, and says why."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike import choosing
from quickspike.augmentation import Augmentation
from quickspike.choosing import Attempt, Auto, choose, refinements_for
from quickspike.cli import main
from quickspike.data import DataSet, ImageStream
from quickspike.errors import DataError, OptionError
from quickspike.evaluation import make_fabric
from quickspike.refinement import REFINEMENTS, Refinement, refinement, refinements_of
from quickspike.refinements import BiasCorrection
from quickspike.training import Trainer, Training
from quickspike.tuning import TUNING


@pytest.fixture(autouse=True)
def few_refinements(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them take a minute."""
    monkeypatch.setattr(choosing, "refinements_for", lambda steps: [("bias_correction:images=60,passes=1",)])


def trainer(digits: DataSet, **settings: float) -> Trainer:
    chosen = Training(**{"epochs": 1, "batch_size": 100, "learning_rate": 0.01, "validation": 200, **settings})
    return Trainer(fabric=make_fabric("cpu"), data=digits, settings=chosen)


def order(attempt: Attempt) -> tuple[float, float]:
    return attempt.measured, -attempt.deviation


def agreement(snn: qs.SpikingNetwork, source: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((snn(images).argmax(1) == source(images).argmax(1)).float().mean())


def test_the_best_of_what_was_measured_is_handed_out(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    before = copy.deepcopy(digits_source.state_dict())
    found = choose(digits_source, digits_calibration, Auto(steps=2, signed=True, synchronous=True))
    # Three factors for each kind, one refinement, a readout that leaks.
    assert len(found.attempts) == 3 * 3 + 2
    best = max(found.attempts, key=order)
    assert found.what == best.what
    # What is handed out was calibrated on everything, what was measured on three images of four.
    assert found.network.provenance["calibration_images"] == len(digits_calibration)
    assert found.network.provenance["chosen"] == json.loads(json.dumps(found.to_json()))
    assert all(torch.equal(value, before[name]) for name, value in digits_source.state_dict().items())


def test_what_measures_was_kept_from_what_calibrates(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    images = digits_calibration[:103]
    seen: list[Tensor] = []
    original = choosing.ImageStream

    def watched(source: list[Tensor]) -> ImageStream:
        seen.append(torch.cat(source))
        return original(source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "ImageStream", watched)
        found = choose(digits_source, [images[:50], images[50:51], images[51:]], Auto(steps=4))
    held_out = images[3::4]
    assert f"{len(held_out)} images held out" in found.measure
    everything, calibrated = seen
    assert torch.equal(everything, images)
    assert torch.equal(calibrated, images[torch.arange(103) % 4 != 3])
    first = qs.convert(digits_source, calibrated, steps=4)
    assert found.attempts[0].what == "threshold_balancing"
    assert found.attempts[0].measured == pytest.approx(agreement(first, digits_source, held_out))


def test_kinds_that_are_not_allowed_are_not_tried(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    found = choose(digits_source, digits_calibration, Auto(steps=2))
    assert not any("signed" in one.what or "synchronous" in one.what for one in found.attempts)
    assert any("not tried" in reason and "signed" in reason and "synchronous" in reason for reason in found.reasons)
    assert found.network.latency == 2


@pytest.mark.parametrize("helps", [True, False])
def test_a_refinement_is_taken_if_and_only_if_it_helps(
    helps: bool, digits_source: nn.Module, digits_calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REFINEMENTS, "_classes", dict(REFINEMENTS._classes))

    @refinement
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Shaken(Refinement):
        name = "shaken"
        paper = BiasCorrection.paper

        def refine(self, snn: qs.SpikingNetwork, ann: object, images: object) -> None:
            for neuron in snn.neurons().values():
                # As fine as for 64 steps, or as coarse as for one.
                neuron.threshold.mul_(1 if helps else 40)
            if helps:
                snn.set_steps(64)

    monkeypatch.setattr(choosing, "refinements_for", lambda steps: [("shaken",)])
    with torch.no_grad():
        found = choose(digits_source, digits_calibration, Auto(steps=1))
    assert found.what.endswith("| shaken") == helps
    assert any(("refinements: threshold" in reason) == helps for reason in found.reasons if reason.startswith("refinements"))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_everything_that_is_tried_can_be_made(steps: int) -> None:
    for names in refinements_for(steps):
        for name in names:
            assert refinements_of([name])
    masks = [name for names in refinements_for(steps) for name in names if name.startswith("residual_mask")]
    assert masks == ([] if steps == 1 else [f"residual_mask:tau={(steps + 1) // 2}"])


def test_what_cannot_follow_is_a_reason_and_no_error(
    digits_source: nn.Module, digits_calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "refinements_for", lambda steps: [("residual_mask:tau=1", "bias_correction")])
    found = choose(digits_source, digits_calibration, Auto(steps=4))
    assert any(reason.startswith("refused: residual_mask:tau=1 | bias_correction (") for reason in found.reasons)


def test_when_the_time_is_up_nothing_new_begins(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    found = choose(digits_source, digits_calibration, Auto(steps=4, max_minutes=1e-9))
    assert len(found.attempts) == 1
    assert any("time was up" in reason for reason in found.reasons)
    assert found.network.steps == 4


def test_training_is_measured_on_validation_images(digits: DataSet, digits_source: nn.Module) -> None:
    way = trainer(digits, epochs=2)
    found = choose(digits_source, way.calibration(300), Auto(steps=1), trainer=way)
    assert found.measure == "accuracy on 200 validation images"
    trained = [one for one in found.attempts if "trained for 2 epochs" in one.what or "fine-tuned for 2 epochs" in one.what]
    assert len(trained) == 2
    best = max(found.attempts, key=lambda one: one.measured)
    assert found.what == best.what
    assert way.accuracy(found.network) == pytest.approx(best.measured)


def test_calibration_images_are_no_validation_images(digits: DataSet) -> None:
    way = trainer(digits, validation=500)
    calibrated = torch.cat([images for images, _ in way.calibration(10_000)])
    assert len(calibrated) == digits.size("train") - 500
    batches = way._batches(way.settings)
    held_out = torch.stack([digits.train[int(index)][0] for index in batches.held_out])
    distances = torch.cdist(held_out.flatten(1), calibrated.flatten(1))
    # The set holds one image twice or so.
    assert int((distances.amin(1) == 0).sum()) <= 2


def test_no_epoch_begins_that_does_not_fit(digits: DataSet, digits_source: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_seconds_of_an_epoch", lambda module, trainer: 1000.0)
    way = trainer(digits, epochs=7)
    found = choose(digits_source, way.calibration(100), Auto(steps=1, max_minutes=10), trainer=way)
    assert not any("epoch" in one.what for one in found.attempts)
    assert sum("0 of 7" in reason for reason in found.reasons) == 2
    monkeypatch.setattr(choosing, "_seconds_of_an_epoch", lambda module, trainer: 590.0)
    found = choose(digits_source, way.calibration(100), Auto(steps=1, max_minutes=10), trainer=way)
    assert sum("for 1 epoch" in one.what for one in found.attempts) == 2


def test_an_epoch_is_timed(digits: DataSet, digits_source: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.deepcopy(digits_source.state_dict())
    # The first batch takes 50 seconds, the second 3.
    clock = iter([0.0, 50.0, 100.0, 103.0])
    monkeypatch.setattr(choosing.time, "perf_counter", lambda: next(clock))
    seconds = choosing._seconds_of_an_epoch(digits_source, trainer(digits))
    assert seconds == pytest.approx(3 * (digits.size("train") - 200) / 100)
    assert all(torch.equal(value, before[name]) for name, value in digits_source.state_dict().items())


def test_networks_that_choose_no_class_are_held_against_their_values(random_images: Callable[..., Tensor]) -> None:
    network = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 1)).double()
    found = choose(network, random_images("perceptron", 100), Auto(steps=8))
    assert found.measure.startswith("closeness")
    assert all(one.measured == pytest.approx(100 - one.deviation) for one in found.attempts)
    assert found.what == max(found.attempts, key=order).what


def test_too_little_to_choose_by_is_refused(digits: DataSet, digits_source: nn.Module, digits_calibration: Tensor) -> None:
    with pytest.raises(DataError, match="at least 20 calibration images"):
        choose(digits_source, digits_calibration[:19])
    spoilt = digits_calibration.clone()
    spoilt[77, 0, 0, 0] = math.nan
    for images in (spoilt, [digits_calibration, digits_calibration[:, :, 1:]], digits_calibration[:0]):
        with pytest.raises(DataError):
            choose(digits_source, images)
    with pytest.raises(DataError, match="at least one image, got 0"):
        trainer(digits).calibration(0)
    with pytest.raises(OptionError, match="validation=1000"):
        choose(digits_source, digits_calibration, trainer=trainer(digits, validation=0))


def test_convert_chooses_by_the_name(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    snn = qs.convert(digits_source, digits_calibration, "auto", steps=2, signed=True)
    assert snn.steps == 2
    assert snn.provenance["chosen"]["reasons"]
    with pytest.raises(OptionError, match="option of auto 'step'; did you mean 'steps'"):
        qs.convert(digits_source, digits_calibration, "auto", step=2)
    with pytest.raises(OptionError, match="leave surrogate out"):
        qs.convert(digits_source, digits_calibration, "auto", surrogate=qs.Surrogate())


def test_the_command_line_says_why(digits_source: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quickspike.models import save_weights

    save_weights(digits_source, tmp_path / "weights.safetensors")
    common = ["digits_cnn", "--weights", str(tmp_path / "weights.safetensors"), "--data", "digits", "--method", "auto", "--steps", "2"]
    main(["convert", *common, "--calibration-images", "200", "--out", str(tmp_path / "n.safetensors")])
    told = capsys.readouterr()
    assert "neurons and ceilings: threshold_balancing" in " ".join(told.out.split())
    assert "nothing was trained: no labelled images were given" in " ".join(told.out.split())
    assert "threshold_balancing scale=0.9: " in told.err
    assert qs.load(tmp_path / "n.safetensors").provenance["chosen"]["attempts"]
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *common, "--refine", "bias_correction", "--out", str(tmp_path / "m.safetensors")])
    assert stopped.value.code == 2
    assert "leave --refine and --at out" in capsys.readouterr().err


def test_train_chooses_too(digits_source: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quickspike.models import save_weights

    save_weights(digits_source, tmp_path / "weights.safetensors")
    common = ["digits_cnn", "--weights", str(tmp_path / "weights.safetensors"), "--data", "digits", "--epochs", "1", "--validation", "200"]
    main(["train", *common, "--method", "auto", "--steps", "1", "--learning-rate", "0.01", "--out", str(tmp_path / "run")])
    assert "accuracy on 200 validation images" in " ".join(capsys.readouterr().out.split())
    assert qs.load(tmp_path / "run" / "network.safetensors").steps == 1


def test_augmentation_and_settings_reach_the_stages(digits: DataSet) -> None:
    way = dataclasses.replace(trainer(digits), augmentation=Augmentation(flip=True), folder=Path("here"))
    stage = choosing._stage(way, "tune", epochs=3, **TUNING)
    assert (stage.settings.epochs, stage.settings.optimiser, stage.settings.learning_rate) == (3, "adam", 1e-4)
    assert stage.folder == Path("here/tune")
    assert stage.augmentation.flip
    assert stage.settings.validation == 200
