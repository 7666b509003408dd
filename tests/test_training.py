"""The training loop: what it computes, that it can be stopped and continued without a trace, and how it fails."""

from __future__ import annotations

import csv
import dataclasses
import math
import pickle
import random
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim.muon import Muon
from torch import Tensor, nn
from torch.utils.data import Dataset

import quickspike as qs
from quickspike.api import tune
from quickspike.augmentation import Augmentation
from quickspike.data import DataSet, Images
from quickspike.errors import CheckpointError, DataError, OptionError, QuickspikeError
from quickspike.evaluation import make_fabric
from quickspike.files import OutputError
from quickspike.options import options_of
from quickspike.preprocessing import Preprocessing
from quickspike.training import Interrupted, Silent, Trainer, Training, TrainingError, parameter_groups, rate_factor
from quickspike.tuning import Tuning

TIMES = ("seconds", "images_per_second")


def mlp(seed: int = 0) -> nn.Sequential:
    """No batch norm, no dropout: a function of the whole batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def cnn(seed: int = 0) -> nn.Sequential:
    """Batch norm and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(36, 10))
        return nn.Sequential(*layers)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def figures(rows: Any) -> list[dict[str, float]]:
    """Rows without what a clock said."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def csv_figures(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(stream)]


class Stopping(Silent):
    """Presses Ctrl-C after some batches, or at the row of some epoch."""

    def __init__(self, batches: int = -1, epoch: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.batches, self.epoch, self.error, self.seen, self.ended = batches, epoch, error, 0, 0

    def advance(self, samples: int) -> None:
        # The first call says how much was done in an earlier run.
        self.seen += 1
        if self.seen == self.batches + 1:
            raise self.error

    def row(self, stage: str, row: dict[str, float]) -> None:
        if row["epoch"] == self.epoch:
            raise self.error

    def end(self) -> None:
        self.ended += 1


@pytest.fixture(scope="session")
def fabric() -> Any:
    return make_fabric("cpu")


@pytest.fixture(scope="session")
def few(digits: DataSet) -> DataSet:
    """200 training images of the digits."""
    train = digits.train
    assert isinstance(train, Images)
    pixels = train.pixels[:200].permute(0, 2, 3, 1).numpy()
    return dataclasses.replace(digits, train=Images(pixels, train.labels[:200].numpy(), digits.preprocessing, "few"))


@pytest.fixture
def trainer(fabric: Any, few: DataSet) -> Callable[..., Trainer]:
    """trainer(folder=, augmentation=, ..., **settings): on 200 digits; everything is constant and plain unless asked for."""

    def make(**changes: Any) -> Trainer:
        surroundings = {field.name for field in dataclasses.fields(Trainer)} - {"fabric", "data", "settings"}
        around = {name: changes.pop(name) for name in list(changes) if name in surroundings}
        data = changes.pop("data", few)
        plain = {"epochs": 1, "batch_size": 50, "learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
        return Trainer(fabric=changes.pop("fabric", fabric), data=data, settings=Training(**{**plain, **changes}), **around)

    return make


@pytest.fixture(scope="session")
def all_images(few: DataSet) -> tuple[Tensor, Tensor]:
    images, labels = zip(*few.loader("train"), strict=True)
    return torch.cat(images), torch.cat(labels)


# Settings


def test_one_cycle_rises_to_one_and_falls_to_zero() -> None:
    settings = Training(schedule="one_cycle", warmup=0.25)
    assert rate_factor(settings, 0.25) == 1.0
    assert rate_factor(settings, 1.0) == 0.0
    assert rate_factor(settings, 0.625) == pytest.approx(0.5)
    assert 0 < rate_factor(settings, 0.0) < 0.01
    assert rate_factor(settings, 0.125) == pytest.approx(0.5, abs=0.01)
    curve = [rate_factor(settings, i / 400) for i in range(401)]
    assert max(curve) == 1.0
    assert curve[:101] == sorted(curve[:101])
    assert curve[100:] == sorted(curve[100:], reverse=True)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_one_cycle_without_one_of_its_sides(warmup: float) -> None:
    settings = Training(schedule="one_cycle", warmup=warmup)
    curve = [rate_factor(settings, i / 100) for i in range(100)]
    assert curve == sorted(curve, reverse=warmup == 0)
    assert max(curve) == pytest.approx(1, abs=0.011)
    assert min(curve) > 0
    assert rate_factor(settings, 1.0) == 0.0


def test_cosine_falls_from_one_over_half_to_zero() -> None:
    settings = Training(schedule="cosine")
    assert [rate_factor(settings, x) for x in (0.0, 1 / 3, 0.5, 1.0)] == pytest.approx([1, 0.75, 0.5, 0])


def test_step_divides_at_the_milestones_and_not_before() -> None:
    settings = Training(schedule="step", milestones="0.5 0.75", factor=0.1)
    expected = {0.0: 1, 0.4999: 1, 0.5: 0.1, 0.7499: 0.1, 0.75: 0.01, 1.0: 0.01}
    assert [rate_factor(settings, x) for x in expected] == pytest.approx(list(expected.values()))
    assert rate_factor(Training(schedule="step", milestones=""), 0.9) == 1


@pytest.mark.parametrize("epochs", [1, 7, 24, 49, 300])
def test_exponential_multiplies_after_every_epoch(epochs: int) -> None:
    """Exactly at the first step of an epoch, whatever (epoch + step/steps)/epochs rounds to."""
    settings = Training(schedule="exponential", factor=0.9, epochs=epochs)
    for epoch in range(epochs):
        for share in (0, 1 / 3, 10 / 11):
            assert rate_factor(settings, (epoch + share) / epochs) == pytest.approx(0.9**epoch), (epoch, share)


def test_constant_is_constant() -> None:
    assert {rate_factor(Training(schedule="constant"), i / 10) for i in range(11)} == {1.0}


@pytest.mark.parametrize("text", ["half", "0.5 0.4", "0 0.5", "0.5 1", "-0.1", "nan", "0.5 inf", "0.5, 0.6"])
def test_milestones_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="milestones") as caught:
        Training(milestones=text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("owner", [Training, Tuning])
def test_options_out_of_range_are_refused_by_name(owner: type) -> None:
    for name, (declared, kind, _) in options_of(owner).items():
        wrong: list[Any] = [None, "nonsense"] if kind is not str else [None]
        if kind in (int, float):
            assert declared.low is not None, name
            assert declared.high is not None, name
            wrong += [declared.low - 1, declared.high + 1, math.nan, True]
            wrong += [declared.low] if declared.low_open else []
        wrong += [1.5] if kind is int else []
        for value in wrong:
            if name == "milestones" and value is None:
                continue
            with pytest.raises(OptionError, match=rf"\b{name} must be ") as caught:
                owner(**{name: value})
            assert repr(value) in str(caught.value)


def test_options_at_their_limits_are_taken() -> None:
    for name, (declared, kind, _) in options_of(Training).items():
        if kind in (int, float):
            more = {"validation": 1} if name == "patience" else {}
            Training(**{name: kind(declared.high)}, **more)
            if not declared.low_open:
                Training(**{name: kind(declared.low)}, **more)
        for choice in typing.get_args(kind):
            Training(**{name: choice}, validation=1)


@pytest.mark.parametrize("options", [{"patience": 2}, {"keep": "best"}])
def test_choosing_weights_needs_validation_images(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="validation"):
        Training(**options)
    Training(**options, validation=10)


def test_a_stage_may_change_settings_but_only_to_what_is_allowed(trainer: Callable[..., Trainer]) -> None:
    train = trainer(epochs=1)
    assert len(train(mlp(), "a", epochs=3).rows) == 3
    with pytest.raises(OptionError, match="epochs"):
        train(mlp(), "a", epochs=-1)
    assert train.settings.epochs == 1


# What is trained


def nothing_to_learn(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient is 0 everywhere: what moves then is weight decay."""
    return 0.0 * network(images).sum()


def test_biases_and_norms_have_no_weight_decay(trainer: Callable[..., Trainer]) -> None:
    network = cnn()
    before = weights_of(network)
    # mode=eval: running preprocessing are none of the optimiser's.
    trainer(weight_decay=0.5)(network, "a", loss=nothing_to_learn, mode=nn.Module.eval)
    after = weights_of(network)
    for name, old in before.items():
        if name in ("0.weight", "5.weight"):
            torch.testing.assert_close(after[name], old * (1 - 0.1 * 0.5) ** 4)
        else:
            assert torch.equal(after[name], old), name


def test_special_parameters_get_a_group_of_their_own(trainer: Callable[..., Trainer]) -> None:
    network = mlp()
    groups = parameter_groups(network, [network[3].weight, network[3].bias], weight_decay=0.25, rate=2.0)
    assert sum(len(group["params"]) for group in groups) == 4
    before = weights_of(network)
    trainer(weight_decay=0.5)(network, "a", loss=nothing_to_learn, groups=groups)
    for name, decay in {"1.weight": 0.1 * 0.5, "1.bias": 0, "3.weight": 0.2 * 0.25, "3.bias": 0.2 * 0.25}.items():
        torch.testing.assert_close(network.state_dict()[name], before[name] * (1 - decay) ** 4)


def test_nothing_outside_the_groups_is_trained(trainer: Callable[..., Trainer]) -> None:
    network = mlp()
    before = weights_of(network)
    trainer(weight_decay=0.1, momentum=0.9)(network, "a", groups=[{"params": [network[1].bias]}, {"params": []}])
    after = weights_of(network)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["1.bias"]
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad] == ["1.bias"]


def test_a_later_stage_trains_again_what_an_earlier_one_left_out(trainer: Callable[..., Trainer]) -> None:
    network = mlp()
    train = trainer()
    train(network, "a", groups=[{"params": [network[1].bias]}])
    before = weights_of(network)
    train(network, "b")
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_groups_without_a_parameter_are_a_users_error(trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(QuickspikeError, match="parameter"):
        trainer()(mlp(), "a", groups=[{"params": []}])


def test_rate_multiplies_the_learning_rate_of_its_group(trainer: Callable[..., Trainer]) -> None:
    moved = {}
    for rate in (1.0, 0.5, 0.0):
        network = mlp()
        start = weights_of(network)
        groups = [{"params": [network[3].weight], "rate": rate}, {"params": [network[3].bias]}]
        trainer(batch_size=200)(network, "a", groups=groups)
        moved[rate] = {name: network.state_dict()[name] - start[name] for name in ("3.weight", "3.bias")}
    assert moved[1.0]["3.weight"].abs().max() > 1e-3
    torch.testing.assert_close(moved[0.5]["3.weight"], moved[1.0]["3.weight"] * 0.5, rtol=1e-3, atol=1e-7)
    assert not moved[0.0]["3.weight"].any()
    assert torch.equal(moved[0.5]["3.bias"], moved[1.0]["3.bias"])


def test_the_schedule_reaches_every_group_at_every_step(trainer: Callable[..., Trainer]) -> None:
    """With a gradient of 1 and no momentum, a weight moves by the sum of its learning rates."""
    settings = Training(epochs=3, schedule="one_cycle", warmup=0.25, learning_rate=0.1)
    network = mlp()
    before = weights_of(network)

    def slope(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return sum(parameter.sum() for parameter in network.parameters()) + 0 * network(images).sum()

    groups = [{"params": [network[1].weight]}, {"params": [network[3].weight], "rate": 3.0}]
    history = trainer(epochs=3, schedule="one_cycle", warmup=0.25)(network, "a", loss=slope, groups=groups)
    rates = [0.1 * rate_factor(settings, step / 12) for step in range(12)]
    torch.testing.assert_close(network[1].weight, before["1.weight"] - sum(rates))
    torch.testing.assert_close(network[3].weight, before["3.weight"] - 3 * sum(rates))
    assert [row["learning_rate"] for row in history.rows] == pytest.approx([rates[3], rates[7], rates[11]])


def test_after_step_is_called_after_every_step_and_has_the_last_word(trainer: Callable[..., Trainer]) -> None:
    network = mlp()
    calls = []

    def bound() -> None:
        assert not torch.is_grad_enabled()
        calls.append(float(network[3].weight.abs().max()))
        network[3].weight.clamp_(-0.1, 0.1)

    trainer(epochs=3, ema=0.5, accumulate=2)(network, "a", after_step=bound)
    assert len(calls) == 3 * 4
    assert min(calls) > 0.1
    # The moving average is one of weights within bounds.
    assert float(network[3].weight.detach().abs().max()) <= 0.1 + 1e-7


def test_mode_is_honoured_and_training_mode_the_default(trainer: Callable[..., Trainer]) -> None:
    modes: list[bool] = []

    def look(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        modes.append(layer.training)
        return network(images).square().mean()

    network = cnn()
    layer, preprocessing = network[3], network[1].running_mean.clone()
    trainer(epochs=2, validation=20)(network, "a", loss=look, mode=nn.Module.eval)
    assert modes == [False] * 6
    assert torch.equal(network[1].running_mean, preprocessing)
    modes.clear()
    trainer(epochs=2, validation=20)(network, "a", loss=look)
    # Validation between the epochs must not leave the network in evaluation mode.
    assert modes == [True] * 6
    assert not torch.equal(network[1].running_mean, preprocessing)
    assert not any(module.training for module in network.modules())


def test_no_epochs_leave_the_weights_alone(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    network = cnn().train()
    before = weights_of(network)
    history = trainer(epochs=0, ema=0.9, keep="best", validation=10, folder=tmp_path)(network, "a")
    assert history.rows == ()
    assert same(weights_of(network), before)
    assert not network.training


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_optimisers_are_those_of_their_libraries(name: str, trainer: Callable[..., Trainer], all_images: tuple[Tensor, Tensor]) -> None:
    network, expected = mlp(), mlp()
    trainer(epochs=5, batch_size=200, optimiser=name, learning_rate=0.01, momentum=0.8, weight_decay=0.1)(network, "a")
    matrices = [parameter for parameter in expected.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in expected.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.01, momentum=0.8, nesterov=True),
        "adam": lambda: torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.999), amsgrad=True),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.999)),
        "muon": lambda: Muon(groups, lr=0.01, momentum=0.8, nesterov=True, betas=(0.8, 0.999)),
    }[name]()
    images, labels = all_images
    for _ in range(5):
        optimiser.zero_grad()
        nn.functional.cross_entropy(expected(images), labels).backward()
        optimiser.step()
    for one, other in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_muon_evens_out_the_directions_of_a_convolutions_step(trainer: Callable[..., Trainer]) -> None:
    def spread(optimiser: str) -> float:
        torch.manual_seed(0)
        convolution = nn.Conv2d(8, 16, 3)
        network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), convolution, nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        network(torch.zeros(1, 1, 8, 8))
        weight = convolution.weight
        before = weight.detach().clone()
        trainer(epochs=1, batch_size=200, optimiser=optimiser, weight_decay=0.0)(network, "a")
        values = torch.linalg.svdvals((weight.detach() - before).flatten(1))
        return float(values.max() / values.min())

    assert spread("muon") < 4
    assert spread("sgd") > 5 * spread("muon")


def test_muon_without_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch, trainer: Callable[..., Trainer]) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim.muon", None)
    with pytest.raises(OptionError, match=r"needs timm 1\.0\.21 or later: pip install 'quickspike\[timm\]'"):
        trainer(optimiser="muon")(mlp(), "a")


# What is computed


@pytest.mark.parametrize("parts", [2, 3, 50, 1000])
def test_a_batch_in_parts_gives_the_weights_of_the_whole_batch(parts: int, trainer: Callable[..., Trainer]) -> None:
    whole, cut = mlp(), mlp()
    one = trainer(epochs=2, momentum=0.9, clip=0.5)(whole, "a")
    other = trainer(epochs=2, momentum=0.9, clip=0.5, accumulate=parts)(cut, "a")
    for expected, found in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert [row["loss"] for row in other.rows] == pytest.approx([row["loss"] for row in one.rows], rel=1e-5)


def test_the_gradient_is_cut_to_the_largest_norm_and_keeps_its_direction(trainer: Callable[..., Trainer]) -> None:
    def moved(clip: float) -> Tensor:
        network = mlp()
        before = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        trainer(batch_size=200, learning_rate=1.0, clip=clip)(network, "a")
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()]) - before

    free = moved(0.0)
    norm = float(free.norm())
    torch.testing.assert_close(moved(norm / 4), free / 4, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(moved(norm * 4), free, rtol=1e-4, atol=1e-7)


def test_the_moving_average_is_the_one_computed_by_hand(trainer: Callable[..., Trainer], all_images: tuple[Tensor, Tensor]) -> None:
    network = cnn()
    path: list[dict[str, Tensor]] = []
    train = trainer(epochs=2, ema=0.3, validation=20)
    history = train(network, "a", after_step=lambda: path.append(weights_of(network)))
    assert len(path) == 6
    expected = path[0]
    # The first two are shorter than asked for.
    for decay, weights in zip((2 / 11, 3 / 12, 0.3, 0.3, 0.3), path[1:], strict=True):
        # Running preprocessing of the batch norm belong to the weights.
        expected = {name: decay * expected[name] + (1 - decay) * tensor for name, tensor in weights.items()}
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(network[1].running_mean, path[-1]["1.running_mean"])
    assert history.rows[-1]["validation_accuracy"] == train.accuracy(network)


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images).double()


def test_label_smoothing_is_the_hand_written_loss(trainer: Callable[..., Trainer], all_images: tuple[Tensor, Tensor]) -> None:
    images, labels = all_images
    for smoothing in (0.0, 0.3):
        logs = logits_of(mlp(), images).log_softmax(1)
        wanted = torch.full_like(logs, smoothing / 10)
        wanted[torch.arange(200), labels] += 1 - smoothing
        expected = float(-(wanted * logs).sum(1).mean())
        row = trainer(batch_size=200, label_smoothing=smoothing)(mlp(), "a").rows[0]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_squared_error_is_the_hand_written_loss(trainer: Callable[..., Trainer], all_images: tuple[Tensor, Tensor]) -> None:
    images, labels = all_images
    wanted = torch.eye(10, dtype=torch.float64)[labels]
    expected = float((logits_of(mlp(), images) - wanted).square().mean())
    assert trainer(batch_size=200, loss="squared_error")(mlp(), "a").rows[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_mixed_targets_are_shares_of_the_classes(loss: str, trainer: Callable[..., Trainer]) -> None:
    """One batch of mixed images, seen by a loss of our own, gives the figure that the built-in loss gives."""
    seen: list[float] = []

    def by_hand(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        assert targets.shape == (200, 10)
        torch.testing.assert_close(targets.sum(1), torch.ones(200))
        assert float(targets.max(1).values.min()) < 0.99
        logits = network(images)
        value = -(targets * logits.log_softmax(1)).sum(1).mean() if loss == "cross_entropy" else (logits - targets).square().mean()
        seen.append(float(value.detach()))
        return value

    train = trainer(batch_size=200, loss=loss, augmentation=Augmentation(mixup=1.0))
    train(mlp(), "a", loss=by_hand)
    assert train(mlp(), "a").rows[0]["loss"] == pytest.approx(seen[0], rel=1e-5)


def test_the_loss_of_a_row_is_the_mean_over_the_images_of_the_epoch(trainer: Callable[..., Trainer]) -> None:
    values: list[float] = []

    def loss(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(network(images), targets)
        values.append(float(value.detach()))
        return value

    rows = trainer(epochs=2)(mlp(), "a", loss=loss).rows
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(sum(values[:4]) / 4)
    assert rows[1]["loss"] == pytest.approx(sum(values[4:]) / 4)
    assert all(row["images_per_second"] == pytest.approx(200 / row["seconds"]) for row in rows)


# Which weights are kept


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_when_patience_is_over(patience: int, trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    # So small a rate changes no answer: the first epoch stays the best.
    settings = {"epochs": 9, "patience": patience, "validation": 50, "learning_rate": 1e-9, "folder": tmp_path}
    rows = trainer(**settings)(mlp(), "a").rows
    assert len(rows) == 1 + patience
    assert len(trainer(**settings, resume=True)(mlp(), "a").rows) == 1 + patience


def test_patience_counts_from_the_best_epoch(trainer: Callable[..., Trainer]) -> None:
    rows = trainer(epochs=40, patience=2, validation=50, learning_rate=0.05)(mlp(), "a").rows
    accuracies = [row["validation_accuracy"] for row in rows]
    best = accuracies.index(max(accuracies))
    assert 2 < len(rows) < 40
    assert len(rows) - 1 - best == 2
    for end in range(1, len(rows)):
        assert end - 1 - accuracies.index(max(accuracies[:end])) < 2


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_weights_of_the_best_epoch_are_returned(ema: float, trainer: Callable[..., Trainer]) -> None:
    def final(keep: str, epochs: int) -> tuple[dict[str, Tensor], list[float]]:
        network = cnn()
        steps = 0

        def spoil() -> None:
            nonlocal steps
            steps += 1
            if steps > 6:
                network[5].weight.neg_()

        rows = trainer(epochs=epochs, keep=keep, validation=50, ema=ema)(network, "a", after_step=spoil).rows
        return weights_of(network), [row["validation_accuracy"] for row in rows]

    best, accuracies = final("best", 4)
    assert accuracies[1] > max(accuracies[0], *accuracies[2:])
    assert same(best, final("last", 2)[0])
    assert not same(best, final("last", 4)[0])


def test_of_equally_good_epochs_the_first_is_kept(trainer: Callable[..., Trainer]) -> None:
    network, first = mlp(), mlp()
    settings = {"validation": 50, "learning_rate": 1e-6}
    accuracies = [row["validation_accuracy"] for row in trainer(epochs=3, keep="best", **settings)(network, "a").rows]
    assert len(set(accuracies)) == 1
    trainer(epochs=1, **settings)(first, "a")
    assert same(weights_of(network), weights_of(first))


# Which images are seen


class Untouchable(Dataset[Any]):
    """Test images that nobody may look at."""

    def __len__(self) -> int:
        raise AssertionError("the test images were counted")

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a test image was read")


def numbered(count: int, classes: int = 3, channels: int = 1) -> Images:
    """Images of one brightness each, different for each, so that they tell which they are."""
    pixels = np.zeros((count, 8, 8, channels), np.uint8)
    pixels[:] = np.arange(count)[:, None, None, None]
    preprocessing = Preprocessing((0.0,), (1.0,))
    return Images(pixels, np.arange(count) % classes, preprocessing, "numbered")


def numbered_set(count: int, classes: int = 3, channels: int = 1) -> DataSet:
    images = numbered(count, classes, channels)
    return DataSet("numbered", images, Untouchable(), Preprocessing((0.0,), (1.0,)), tuple(map(str, range(classes))))


def test_validation_images_train_nothing_and_test_images_are_not_touched(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trained: set[int] = set()
    validated: set[int] = set()

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen = (x[:, 0, 0, 0] * 255).round().int().tolist()
            (trained if self.training else validated).update(seen)
            return self.layer(x.flatten(1))

    settings = {"epochs": 4, "batch_size": 30, "validation": 40, "keep": "best", "patience": 4, "ema": 0.9}
    train = trainer(data=numbered_set(130), folder=tmp_path, **settings)
    train.accuracy(Spy())
    held_out = set(validated)
    assert len(held_out) == 40
    for stage in ("a", "b"):
        trained.clear()
        validated.clear()
        train(Spy(), stage)
        assert trained == set(range(130)) - held_out
        # A single image may be shown to the network beforehand, to see whether it fits.
        assert held_out <= validated
        assert len(validated) <= 41


def test_accuracy_is_that_on_the_validation_images(trainer: Callable[..., Trainer]) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(3)[torch.zeros(len(x), dtype=torch.int64)]

    data = numbered_set(130)
    assert trainer(data=data).accuracy(Constant()) is None
    accuracy = trainer(data=data, validation=129, batch_size=16).accuracy(Constant())
    # Of 130 images 44 are of class 0; one of all images is not held out.
    assert any(accuracy == pytest.approx(100 * zeros / 129) for zeros in (43, 44))


# Randomness


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


AUGMENTED = Augmentation(flip=True, crop=1, rotation=5, noise=0.05, cutout=2, mixup=0.2, cutmix=0.5)
FULL = {"epochs": 4, "validation": 50, "ema": 0.8, "momentum": 0.9, "schedule": "one_cycle", "label_smoothing": 0.1}


def test_the_global_random_state_is_left_alone(trainer: Callable[..., Trainer]) -> None:
    before = random_states()
    train = trainer(**FULL, augmentation=AUGMENTED)
    network = cnn()
    train(network, "a")
    train.accuracy(network)
    with pytest.raises(Interrupted):
        trainer(**FULL, augmentation=AUGMENTED, watcher=Stopping(batches=3))(network, "a")
    assert random_states() == before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_global_random_state_is_left_alone_by_workers_too(trainer: Callable[..., Trainer], few: DataSet) -> None:
    data = dataclasses.replace(few, train=Plain(few.train))
    network = cnn()
    train = trainer(data=data, validation=50)
    before = random_states()
    train.accuracy(network)
    assert random_states() == before


class Plain(Dataset[Any]):
    """Images that do not lie in memory, as far as the trainer knows."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before(trainer: Callable[..., Trainer]) -> None:
    one, other, strange = cnn(), cnn(), cnn()
    rows = trainer(**FULL, augmentation=AUGMENTED, seed=3)(one, "a").rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert figures(trainer(**FULL, augmentation=AUGMENTED, seed=3)(other, "a").rows) == figures(rows)
    trainer(**FULL, augmentation=AUGMENTED, seed=4)(strange, "a")
    assert same(weights_of(one), weights_of(other))
    assert not same(weights_of(one), weights_of(strange))


@pytest.mark.parametrize("source", ["shuffling", "dropout", "augmentation"])
def test_the_seed_reaches_every_source_of_randomness(source: str, trainer: Callable[..., Trainer]) -> None:
    def final(seed: int) -> dict[str, Tensor]:
        network = cnn() if source == "dropout" else mlp()
        augmentation = Augmentation(noise=0.1) if source == "augmentation" else Augmentation()
        # In one batch, the order of the images does not matter.
        size = 50 if source == "shuffling" else 200
        trainer(seed=seed, batch_size=size, augmentation=augmentation)(network, "a")
        return weights_of(network)

    one, same_seed, other = final(0), final(0), final(1)
    assert same(one, same_seed)
    assert max(float((one[name] - other[name]).abs().max()) for name in one if one[name].is_floating_point()) > 1e-5


def test_two_epochs_draw_differently(trainer: Callable[..., Trainer]) -> None:
    means: list[float] = []

    def loss(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        means.append(float(images.double().sum()))
        return network(images).square().mean()

    trainer(epochs=3, batch_size=200, augmentation=Augmentation(noise=0.1))(mlp(), "a", loss=loss)
    assert len(set(means)) == 3


# Interrupts


STOPS = {
    "first batch": {"batches": 1},
    "first epoch": {"batches": 2},
    "third epoch": {"batches": 8},
    "row of the second epoch": {"epoch": 2},
    "row of the last epoch": {"epoch": 4},
    "power failure": {"batches": 5, "error": SystemError},
}


@pytest.mark.parametrize(("keep", "optimiser"), [("last", "adam"), ("best", "adam"), ("last", "muon")])
@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    stop: str, keep: str, optimiser: str, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    settings = {**FULL, "keep": keep, "patience": 3, "optimiser": optimiser, "learning_rate": 0.02, "augmentation": AUGMENTED}
    whole = cnn()
    rows = trainer(**settings, folder=tmp_path / "whole")(whole, "source").rows
    error = STOPS[stop].get("error", Interrupted)
    watcher = Stopping(**STOPS[stop])
    with pytest.raises(error) as caught:
        trainer(**settings, folder=tmp_path / "cut", watcher=watcher)(cnn(), "source")
    assert watcher.ended == 1
    if error is Interrupted:
        assert str(tmp_path / "cut" / "source.ckpt") in str(caught.value)
        assert "--resume" in str(caught.value)
    # Other weights to begin with: those of the checkpoint count, in the first epoch too.
    resumed = cnn(seed=17)
    continued = trainer(**settings, folder=tmp_path / "cut", resume=True)(resumed, "source").rows
    assert same(weights_of(whole), weights_of(resumed))
    assert figures(continued) == figures(rows)
    assert csv_figures(tmp_path / "cut") == csv_figures(tmp_path / "whole")
    assert len(csv_figures(tmp_path / "cut")) == 4
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["metrics.csv", "source.ckpt"]


def test_a_finished_training_is_not_repeated(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    settings = {**FULL, "keep": "best", "folder": tmp_path}
    network = cnn()
    rows = trainer(**settings)(network, "source").rows
    again = cnn(seed=5)
    # The watcher would stop any step.
    assert trainer(**settings, resume=True, watcher=Stopping(batches=1))(again, "source").rows == rows
    assert same(weights_of(again), weights_of(network))


def test_without_resume_a_training_starts_anew(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    first, second, third = cnn(), cnn(), cnn()
    trainer(**FULL)(first, "source")
    trainer(**{**FULL, "epochs": 1}, folder=tmp_path)(second, "source")
    trainer(**FULL, folder=tmp_path)(third, "source")
    assert same(weights_of(first), weights_of(third))


def test_an_interrupt_without_a_folder_says_that_nothing_is_kept(trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(Interrupted, match="nothing is kept") as caught:
        trainer(watcher=Stopping(batches=2))(mlp(), "some stage")
    assert "some stage" in str(caught.value)
    assert isinstance(caught.value, KeyboardInterrupt)


def test_a_write_that_fails_leaves_the_checkpoint_before_it(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = cnn(), cnn()
    trainer(**FULL)(whole, "source")
    write, calls = Path.write_bytes, 0

    def failing(path: Path, data: Any) -> int:
        nonlocal calls
        calls += path.name.startswith(".source.ckpt.")
        if calls == 3:
            write(path, b"half")
            raise OSError(28, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing)
        with pytest.raises(OutputError, match="No space left"):
            trainer(**FULL, folder=tmp_path)(cnn(), "source")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "source.ckpt"]
    trainer(**FULL, folder=tmp_path, resume=True)(resumed, "source")
    assert same(weights_of(whole), weights_of(resumed))


# The same for a spiking network


@pytest.fixture(scope="module")
def spiking(few: DataSet) -> Callable[..., qs.SpikingNetwork]:
    def make(method: str, **options: Any) -> qs.SpikingNetwork:
        return qs.convert(cnn().eval(), few.loader("train", limit=100), method, steps=2, **options)

    return make


@pytest.mark.parametrize(("method", "batches"), [("qcfs", 2), ("qcfs", 7), ("diet_snn", 12)])
def test_interrupted_tuning_ends_like_an_uninterrupted_one(
    method: str, batches: int, spiking: Callable[..., qs.SpikingNetwork], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """The batch 12 of diet_snn lies in its second stage."""
    options = {"longer": 3, "leak": 0.95} if method == "diet_snn" else {}
    snn, tuning = spiking(method, **options), Tuning(dropout=0.3, threshold_rate=0.5)
    untouched = weights_of(snn)
    settings = {**FULL, "epochs": 3, "keep": "best", "learning_rate": 0.01, "augmentation": AUGMENTED}
    whole = tune(snn, trainer(**settings, folder=tmp_path / "whole"), tuning)
    with pytest.raises(Interrupted, match=r"\.ckpt"):
        tune(snn, trainer(**settings, folder=tmp_path / "cut", watcher=Stopping(batches=batches)), tuning)
    resumed = tune(snn, trainer(**settings, folder=tmp_path / "cut", resume=True), tuning)
    assert same(weights_of(whole), weights_of(resumed))
    assert csv_figures(tmp_path / "cut") == csv_figures(tmp_path / "whole")
    assert same(untouched, weights_of(snn))
    assert not same(untouched, weights_of(whole))
    # Other threads would add up in another order; the fixture of all tests has set one.
    assert torch.get_num_threads() == 1


def test_tuning_of_another_kind_does_not_go_on_from_a_checkpoint(
    spiking: Callable[..., qs.SpikingNetwork], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    snn = spiking("qcfs")
    with pytest.raises(Interrupted):
        tune(snn, trainer(epochs=2, folder=tmp_path, watcher=Stopping(batches=5)), Tuning(dropout=0.3))
    for other, tuning in ((snn, Tuning(dropout=0.1)), (spiking("qcfs", levels=2), Tuning(dropout=0.3))):
        with pytest.raises(CheckpointError, match=r"tune\.ckpt"):
            tune(other, trainer(epochs=2, folder=tmp_path, resume=True), tuning)


# In mixed precision


class Precisions:
    """Types of what layers of some kind give in training."""

    def __init__(self, module: nn.Module, kind: type[nn.Module]) -> None:
        self.found = set[torch.dtype]()
        self.hooks = [layer.register_forward_hook(self._note) for layer in module.modules() if isinstance(layer, kind)]

    def _note(self, layer: nn.Module, _: Any, out: Tensor) -> None:
        if layer.training:
            self.found.add(out.dtype)


def test_bf16_mixed_trains_and_goes_on_after_an_interrupt(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    mixed = {**FULL, "augmentation": AUGMENTED, "fabric": make_fabric("cpu", "bf16-mixed")}
    whole, plain, resumed = cnn(), cnn(), cnn(seed=3)
    precisions = Precisions(whole, nn.Conv2d)
    rows = trainer(**mixed, folder=tmp_path / "whole")(whole, "source").rows
    assert precisions.found == {torch.bfloat16}
    assert {value.dtype for value in whole.state_dict().values() if value.is_floating_point()} == {torch.float32}
    trainer(**FULL, augmentation=AUGMENTED)(plain, "source")
    assert not same(weights_of(whole), weights_of(plain))
    assert torch.allclose(whole[0].weight, plain[0].weight, atol=0.02)
    with pytest.raises(Interrupted):
        trainer(**mixed, folder=tmp_path / "cut", watcher=Stopping(batches=8))(cnn(), "source")
    continued = trainer(**mixed, folder=tmp_path / "cut", resume=True)(resumed, "source").rows
    assert same(weights_of(whole), weights_of(resumed))
    assert figures(continued) == figures(rows)


@pytest.mark.parametrize("every_step", [False, True])
def test_bf16_mixed_tunes_and_goes_on_after_an_interrupt(
    every_step: bool, spiking: Callable[..., qs.SpikingNetwork], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    snn = spiking("diet_snn", leak=0.95)
    fabric = make_fabric("cpu", "bf16-mixed")
    settings = {**FULL, "epochs": 2, "learning_rate": 0.01, "augmentation": AUGMENTED, "every_step": every_step}
    whole = tune(snn, trainer(**settings, fabric=fabric, folder=tmp_path / "whole"))
    with pytest.raises(Interrupted):
        tune(snn, trainer(**settings, fabric=fabric, folder=tmp_path / "cut", watcher=Stopping(batches=5)))
    resumed = tune(snn, trainer(**settings, fabric=fabric, folder=tmp_path / "cut", resume=True))
    assert same(weights_of(whole), weights_of(resumed))
    assert csv_figures(tmp_path / "cut") == csv_figures(tmp_path / "whole")
    assert {value.dtype for value in whole.state_dict().values() if value.is_floating_point()} == {torch.float32}
    plain = tune(snn, trainer(**settings))
    assert not same(weights_of(whole), weights_of(plain))
    for name, value in weights_of(plain).items():
        assert torch.allclose(weights_of(whole)[name], value, atol=0.05), name


# Checkpoints that do not fit


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.fixture
def stopped(trainer: Callable[..., Trainer], tmp_path: Path) -> Path:
    """The checkpoint of a training that was stopped in its second epoch."""
    with pytest.raises(Interrupted):
        trainer(epochs=3, folder=tmp_path, augmentation=AUGMENTED, watcher=Stopping(batches=6))(cnn(), "source")
    return tmp_path / "source.ckpt"


def refused(trainer: Trainer, network: nn.Module, file: Path, *parts: str) -> None:
    before = weights_of(network)
    with pytest.raises(QuickspikeError) as caught:
        trainer(network, "source")
    for part in (str(file), "remove it", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(before) == set(network.state_dict())


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "text": lambda data: b"hello",
    "truncated": lambda data: data[: len(data) // 2],
    "changed in the middle": lambda data: data[:2000] + bytes(64) + data[2064:],
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(damage: str, stopped: Path, trainer: Callable[..., Trainer]) -> None:
    stopped.write_bytes(DAMAGES[damage](stopped.read_bytes()))
    refused(trainer(epochs=3, folder=stopped.parent, augmentation=AUGMENTED, resume=True), cnn(), stopped)


FOREIGN: dict[str, Any] = {
    "weights": {"0.weight": torch.zeros(3)},
    "list": [1, 2, 3],
    "tensor": torch.zeros(3),
    "settings of another kind": {"settings": 3},
    "nothing but settings": {"settings": dataclasses.asdict(Training())},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(kind: str, trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    torch.save(FOREIGN[kind], tmp_path / "source.ckpt")
    train = Trainer(
        fabric=trainer().fabric, data=trainer().data, settings=Training(), folder=tmp_path, resume=True, watcher=Stopping(batches=1)
    )
    refused(train, cnn(), tmp_path / "source.ckpt")


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_run(form: str, trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    file, victim = tmp_path / "source.ckpt", tmp_path / "victim"
    if form == "torch":
        torch.save({"settings": Evil(victim)}, file)
    else:
        file.write_bytes(pickle.dumps(Evil(victim)))
    refused(trainer(folder=tmp_path, resume=True), cnn(), file)
    assert not victim.exists()


OTHER = {
    "epochs": ({"epochs": 4}, "epochs=3 (now 4)"),
    "batch size": ({"batch_size": 20}, "batch_size=50 (now 20)"),
    "seed": ({"seed": 1}, "seed=0 (now 1)"),
    "moving average": ({"ema": 0.5}, "ema=0.0 (now 0.5)"),
    "augmentation": ({"augmentation": Augmentation(flip=True)}, "crop"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_checkpoint_made_with_other_settings_is_refused(case: str, stopped: Path, trainer: Callable[..., Trainer]) -> None:
    changes, part = OTHER[case]
    settings = {"epochs": 3, "folder": stopped.parent, "augmentation": AUGMENTED, "resume": True, **changes}
    refused(trainer(**settings), cnn(), stopped, part)


@pytest.mark.parametrize("every_step", [False, True])
def test_a_checkpoint_made_before_an_option_came_goes_on_where_it_is_off(
    every_step: bool, stopped: Path, trainer: Callable[..., Trainer]
) -> None:
    state = torch.load(stopped, weights_only=True)
    del state["settings"]["every_step"]
    torch.save(state, stopped)
    settings = {"epochs": 3, "augmentation": AUGMENTED}
    resume = trainer(**settings, folder=stopped.parent, resume=True, every_step=every_step)
    if every_step:
        with pytest.raises(QuickspikeError, match="every_step"):
            resume(cnn(), "source")
        return
    whole, resumed = cnn(), cnn(seed=5)
    trainer(**settings)(whole, "source")
    resume(resumed, "source")
    assert same(weights_of(whole), weights_of(resumed))


def test_a_checkpoint_of_another_network_is_refused(stopped: Path, trainer: Callable[..., Trainer]) -> None:
    settings = {"epochs": 3, "folder": stopped.parent, "augmentation": AUGMENTED, "resume": True}
    refused(trainer(**settings), mlp(), stopped, "network")


@pytest.mark.parametrize("key", ["settings", "rows", "module", "optimiser"])
@pytest.mark.parametrize("value", [3, "x", [3], {3: 4}, {(1, 2): torch.zeros(1)}, None])
def test_a_checkpoint_that_holds_something_else_is_refused(key: str, value: Any, stopped: Path, trainer: Callable[..., Trainer]) -> None:
    whole = stopped.read_bytes()
    torch.save(torch.load(stopped, weights_only=True) | {key: value}, stopped)
    with pytest.raises(CheckpointError, match="remove it") as caught:
        trainer(epochs=3, folder=stopped.parent, augmentation=AUGMENTED, resume=True)(cnn(), "source")
    assert str(stopped) in str(caught.value)
    stopped.write_bytes(whole)


def test_a_checkpoint_of_another_choice_of_parameters_is_refused(stopped: Path, trainer: Callable[..., Trainer]) -> None:
    """The momenta of other parameters would be taken for theirs."""
    network = cnn()
    train = trainer(epochs=3, folder=stopped.parent, augmentation=AUGMENTED, resume=True)
    with pytest.raises(CheckpointError, match="remove it"):
        train(network, "source", groups=[{"params": [network[0].weight]}])


# How it fails


class Logarithm(nn.Module):
    """Gives NaN where its input is negative."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def test_a_loss_that_is_no_number_names_epoch_step_parameter_and_advice(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    network = mlp()
    steps = 0

    def spoil() -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            network[3].weight[0, 0] = math.inf

    watcher = Stopping()
    with pytest.raises(TrainingError) as caught:
        trainer(epochs=3, folder=tmp_path, watcher=watcher)(network, "source", after_step=spoil)
    for part in ("stage source", "epoch 2", "step 3", "parameter 3.weight", "learning rate", "--clip"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert watcher.ended == 1
    # The epoch before it is kept.
    assert len(torch.load(tmp_path / "source.ckpt", weights_only=True)["rows"]) == 1


def test_a_loss_that_is_no_number_names_the_first_layer(trainer: Callable[..., Trainer]) -> None:
    network = mlp()
    network.insert(2, Logarithm())
    with pytest.raises(TrainingError, match=r"epoch 1, step 1: .* the layer 2;"):
        trainer()(network, "source")


def test_a_loss_that_is_no_number_though_the_network_is_finite(trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(TrainingError, match="the loss itself"):
        trainer()(mlp(), "source", loss=lambda network, images, targets: network(images).mean() * math.inf)


def test_weights_that_are_no_numbers_after_the_last_step_are_no_success(trainer: Callable[..., Trainer]) -> None:
    """The loss of a step is that of the weights before it, so that of the last ones is never seen."""
    network = mlp()
    with pytest.raises(TrainingError, match=r"epoch 1.*parameter 3\.bias"):
        trainer(batch_size=200)(network, "source", after_step=lambda: network[3].bias.fill_(math.nan))


@pytest.mark.parametrize("tensorboard", [False, True])
def test_an_unwritable_folder_is_refused(tensorboard: bool, trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        trainer(folder=tmp_path / "file" / "run", tensorboard=tensorboard)(mlp(), "source")


def test_images_that_do_not_fit_the_network_are_a_users_error(trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(QuickspikeError, match=r"\[\d+, 3, 8, 8\]") as caught:
        trainer(data=numbered_set(100, channels=3))(cnn(), "source")
    assert "\n" not in str(caught.value)


def test_labels_beyond_the_classes_of_the_network_are_a_users_error(trainer: Callable[..., Trainer]) -> None:
    for loss in ("cross_entropy", "squared_error"):
        with pytest.raises(QuickspikeError, match=r"\b12\b.*\b10\b"):
            trainer(data=numbered_set(100, classes=12), loss=loss)(cnn(), "source")


def test_a_mistake_in_a_network_is_not_dressed_up_as_wrong_images(trainer: Callable[..., Trainer]) -> None:
    """Once a batch went through, a RuntimeError has another reason."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(64, 10), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 2:
                raise RuntimeError("a mistake of ours")
            return self.layer(x.flatten(1))

    with pytest.raises(RuntimeError, match=r"^a mistake of ours$"):
        trainer()(Broken(), "source")


def test_a_batch_larger_than_the_set_is_the_whole_set(trainer: Callable[..., Trainer]) -> None:
    sizes: list[int] = []

    def loss(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(images))
        return network(images).square().mean()

    trainer(epochs=2, batch_size=1000, validation=20)(mlp(), "source", loss=loss)
    assert sizes == [180, 180]


@pytest.mark.parametrize("validation", [200, 201, 10**6])
def test_more_validation_images_than_there_are_is_refused(validation: int, trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(DataError, match=f"{validation} validation images of 200"):
        trainer(validation=validation)(mlp(), "source")


# What is shown


def test_the_watcher_is_told_of_every_image_once(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    class Counting(Silent):
        def __init__(self) -> None:
            self.total, self.done, self.rows, self.ended = -1, 0, 0, 0

        def begin(self, stage: str, samples: int) -> None:
            self.total = samples

        def advance(self, samples: int) -> None:
            self.done += samples

        def row(self, stage: str, row: dict[str, float]) -> None:
            self.rows += 1

        def end(self) -> None:
            self.ended += 1

    settings = {"epochs": 3, "batch_size": 30, "validation": 20, "accumulate": 4, "folder": tmp_path}
    watcher = Counting()
    trainer(**settings, watcher=watcher)(mlp(), "source")
    assert (watcher.total, watcher.done, watcher.rows, watcher.ended) == (3 * 180, 3 * 180, 3, 1)
    with pytest.raises(Interrupted):
        trainer(**settings, watcher=Stopping(batches=8))(mlp(), "source")
    rest = Counting()
    trainer(**settings, watcher=rest, resume=True)(mlp(), "source")
    assert (rest.total, rest.done, rest.rows) == (3 * 180, 3 * 180, 2)


def test_the_source_of_a_training_is_not_changed(trainer: Callable[..., Trainer]) -> None:
    from quickspike.api import train

    network = cnn()
    before = weights_of(network)
    trained, history = train(network, trainer())
    assert same(before, weights_of(network))
    assert network.training
    assert not trained.training
    assert history.stage == "source"
    assert not same(before, weights_of(trained))


def test_training_learns(digits: DataSet, fabric: Any) -> None:
    """Over 90 % of the test digits after some epochs, and validation accuracy tells the same."""
    from quickspike.evaluation import accuracy_of
    from quickspike.models import load_model

    train = Trainer(
        fabric=fabric, data=digits, settings=Training(epochs=4, batch_size=32, learning_rate=0.1, validation=200, label_smoothing=0.1)
    )
    network = load_model("digits_cnn,width=8")
    rows = train(network, "source").rows
    assert accuracy_of(network, digits.loader("test"), fabric) > 90
    assert rows[-1]["validation_accuracy"] > 90
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("reason", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_a_checkpoint_is_not_blamed_for_too_little_memory(
    reason: Exception, trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that says to remove it would cost the user the training."""
    trainer(**FULL, folder=tmp_path)(cnn(), "source")
    before = (tmp_path / "source.ckpt").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise reason

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(reason)) as caught:
        trainer(**FULL, folder=tmp_path, resume=True)(cnn(), "source")
    assert caught.value is reason
    assert (tmp_path / "source.ckpt").read_bytes() == before


def test_a_checkpoint_that_cannot_be_read_is_not_to_be_removed(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(**FULL, folder=tmp_path)(cnn(), "source")

    def forbidden(path: Path, device: torch.device) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("quickspike.training.read_plain", forbidden)
    with pytest.raises(CheckpointError, match=r"cannot read .*source\.ckpt: Permission denied$"):
        trainer(**FULL, folder=tmp_path, resume=True)(cnn(), "source")
