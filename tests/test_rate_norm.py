"""Rate norm layers and the rate inference loss: acceptance checks R1 to R10 of their specification."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quickspike.api import finish, fit
from quickspike.data import DataSet, ImageStream
from quickspike.errors import ConversionError
from quickspike.evaluation import make_fabric
from quickspike.graph import Site, Traced
from quickspike.methods.rate_norm import RateNorm, RateNormLayer, fit_curve, mean_omega, measure_fit, omega, rate_inference_loss
from quickspike.networks import digits_cnn
from quickspike.neuron import Neuron
from quickspike.training import Answers, History, Trainer, Training

F64 = torch.float64
SITE = Site("relu", "relu", None, (7,))
SMALLEST = 1e-6
TIMES = (1, 2, 4, 8, 16, 32, 64, 128)


def sigmoid(s: float) -> float:
    return 1 / (1 + math.exp(-s))


def rate_norm(peak: float, scale: float = 2.5, unit: bool = True) -> RateNormLayer:
    made = RateNormLayer(SITE, scale, unit).double().eval()
    made.running_max.fill_(peak)
    made.watched = True
    return made


def neuron(layer: RateNormLayer, steps: int, **options: Any) -> Neuron:
    """The neurons that the method puts in the place of `layer`, under a constant input."""
    return Neuron(RateNorm(**options).neuron(SITE, layer), steps, True).double()


def counts(unit: Neuron, z: Tensor) -> Tensor:
    """Spikes up to and including each step, `[T, ...]`."""
    with torch.no_grad():
        return unit(z).unflatten(0, (unit.steps, -1)).ne(0).cumsum(0)


# R1, R2: the layer


def test_r1_forward_follows_the_updated_maximum() -> None:
    layer = rate_norm(2.0).train()
    generator = torch.Generator().manual_seed(0)
    peak = 2.0
    for factor in (1.0, 3.0, 0.1, -1.0):
        x = factor * torch.randn(40, 7, generator=generator, dtype=F64).abs()
        peak = 0.9 * peak + 0.1 * max(float(x.max()), 0.0)
        out = layer(x)
        assert float(layer.running_max) == pytest.approx(peak, rel=1e-12)
        theta = peak * sigmoid(2.5) + SMALLEST
        assert np.allclose(out.detach().numpy(), np.clip(x.numpy() / theta, 0, 1), rtol=0, atol=1e-12)


def test_r1_evaluation_leaves_the_maximum() -> None:
    layer = rate_norm(2.0)
    x = torch.linspace(-5, 5, 70, dtype=F64).view(10, 7)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            out = layer(x)
        assert float(layer.running_max) == 2.0
        assert np.allclose(out.detach().numpy(), np.clip(x.numpy() / (2 * sigmoid(2.5) + SMALLEST), 0, 1), rtol=0, atol=1e-12)


def test_r1_what_calibration_sees_is_the_largest_value_and_nothing_is_clipped() -> None:
    layer = RateNormLayer(SITE, 2.5, True).train()
    with torch.no_grad():
        for peak in (1.0, 4.0, 2.0):
            x = torch.linspace(-3, peak, 70).view(10, 7)
            assert torch.equal(layer(x), x.relu())
    assert float(layer.running_max) == 4.0


@pytest.mark.parametrize("scale", [-10.0, 0.0, 20.0])
def test_r1_the_threshold_is_positive(scale: float) -> None:
    layer = rate_norm(0.0, scale)
    assert float(layer.threshold.detach()) > 0
    assert not layer(-torch.ones(2, 7, dtype=F64)).any()
    assert float(neuron(layer, 1).threshold) > 0


@pytest.mark.parametrize("unit", [True, False])
def test_r2_gradient_of_the_scale(unit: bool) -> None:
    peak, s, step = 3.0, 0.7, 1e-5
    layer = rate_norm(peak, s, unit)
    theta = peak * sigmoid(s) + SMALLEST
    x = torch.linspace(-1, 1.5 * theta, 60, dtype=F64)

    def forward(scale: float) -> np.ndarray:
        ceiling = peak * sigmoid(scale) + SMALLEST
        return np.clip(x.numpy(), 0, ceiling) / (ceiling if unit else 1)

    difference = (forward(s + step) - forward(s - step)) / (2 * step)
    slope = peak * sigmoid(s) * (1 - sigmoid(s))
    inside = (x.numpy() > 0) & (x.numpy() < theta)
    formula = np.where(inside, -(x.numpy() / theta) * slope / theta, 0) if unit else np.where(x.numpy() > theta, slope, 0)
    assert np.allclose(formula, difference, atol=1e-8)
    for element, expected in enumerate(formula):
        layer.scale.grad = None
        layer(x)[element].backward()
        assert float(layer.scale.grad) == pytest.approx(expected, abs=1e-6)


# R3 to R6: what the theory says


def test_r3_rates_match_at_every_step() -> None:
    layer = rate_norm(1.7)
    theta = 1.7 * sigmoid(2.5) + SMALLEST
    z = torch.from_numpy(np.random.default_rng(0).uniform(-1, 3, 5000))
    rates = np.clip(z.numpy() / theta, 0, 1)
    fired = counts(neuron(layer, 200), z).numpy()
    for t in range(1, 201):
        short = rates - fired[t - 1] / t
        assert short.min() >= -1e-12
        assert short.max() < 1 / t


@pytest.mark.parametrize("law", ["gaussian", "exponential", "uniform"])
@pytest.mark.parametrize(("initial", "factor"), [(0.0, 1.0), (0.5, 0.5)])
def test_r4_the_loss_bounds_the_fit_curve(law: str, initial: float, factor: float) -> None:
    generator = np.random.default_rng(1)
    draw = {
        "gaussian": generator.normal(0.2, 0.4, 4000),
        "exponential": generator.exponential(0.2, 4000),
        "uniform": generator.uniform(0, 1, 4000),
    }
    rates = np.clip(draw[law], 0, 1)
    layer = rate_norm(1.3)
    theta = 1.3 * sigmoid(2.5) + SMALLEST
    fired = counts(neuron(layer, 128, initial=initial), torch.from_numpy(rates * theta))
    curve = fit_curve(fired, torch.from_numpy(rates)).tolist()
    bound = rates.sum() / np.square(rates).sum()
    assert float(omega(torch.from_numpy(rates))) == pytest.approx(bound, rel=1e-6)
    for t in TIMES:
        error = np.square(fired[t - 1].numpy() / t - rates).sum() / np.square(rates).sum()
        assert curve[t - 1] == pytest.approx(error, rel=1e-6)
        assert error <= factor * bound / t
        assert error < 2 * bound / t


def test_r5_rate_inference_loss() -> None:
    binary = (torch.arange(10_000) % 3 == 0).double()
    assert float(omega(binary)) == pytest.approx(1, abs=1e-6)
    assert float(omega(torch.full((100, 10, 10), 0.25))) == pytest.approx(4, abs=1e-6)
    uniform = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    assert float(omega(uniform)) == pytest.approx(1.5, abs=1e-3)
    for c in (0.5, 0.1, 0.9):
        assert float(omega(uniform * c)) == pytest.approx(float(omega(uniform)) / c, rel=1e-5)
    assert float(omega(torch.zeros(4, 7))) == 0
    # Not monotone once many are clipped.
    high = torch.ones(100)
    assert float(omega(torch.cat([high, torch.full((100,), 0.01)]))) == pytest.approx(1.0099, abs=1e-4)
    assert float(omega(torch.cat([high, torch.full((100,), 0.02)]))) == pytest.approx(1.0196, abs=1e-4)


@pytest.mark.parametrize("unit", [False, True])
def test_r6_threshold_balancing(unit: bool) -> None:
    generator = np.random.default_rng(2)
    weights = [generator.normal(0, 0.5, (9, 6)), generator.normal(0, 0.5, (8, 9)), generator.normal(0, 0.5, (4, 8))]
    biases = [generator.normal(0, 0.2, len(weight)) for weight in weights]
    x = generator.normal(0, 1, (50, 6))
    a1 = np.maximum(x @ weights[0].T + biases[0], 0)
    a2 = np.maximum(a1 @ weights[1].T + biases[1], 0)
    max1, max2 = a1.max(), a2.max()
    # The conditions of the specification, with unit thresholds.
    r1 = np.clip(a1 / max1, 0, 1)
    r2 = np.clip(r1 @ (weights[1] * max1 / max2).T + biases[1] / max2, 0, 1)
    assert np.abs(r2 - a2 / max2).max() < 1e-12
    # Heights of theta with the weights as they are fulfil them, up to p = 1 - 2e-9 and the 1e-6 on every threshold.
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        for number in range(3):
            net[2 * number].weight.copy_(torch.from_numpy(weights[number]))
            net[2 * number].bias.copy_(torch.from_numpy(biases[number]))
    images = ImageStream(torch.from_numpy(x))
    method = RateNorm(scale=20, unit_spikes=unit)
    ann = fit(net, images, method)
    snn = finish(ann, images, method)
    first, second = (snn.neuron(site.name) for site in snn.sites)
    assert float(first.threshold) == pytest.approx(max1, rel=1e-5)
    height = 1.0 if unit else float(first.threshold * first.amplitude)
    assert first.scaled is not unit
    assert height == pytest.approx(1 if unit else max1, rel=1e-5)
    if not unit:
        effective = snn.network.get_submodule("2").weight.detach().numpy() * height / float(second.threshold)
        assert np.abs(effective - weights[1] * max1 / max2).max() < 1e-5
        with torch.no_grad():
            rates = snn.with_steps(1000).run(torch.from_numpy(x)).spikes[snn.sites[1].name].numpy() / 1000
        assert np.abs(rates - a2 / max2).max() < 5e-3


# R7 to R9: the two stages


class Recorder:
    """A trainer that notes the state of the network before and after each of its stages."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.fabric = trainer, trainer.fabric
        self.stages: list[tuple[str, dict[str, Tensor], dict[str, Tensor]]] = []

    def __call__(self, module: nn.Module, stage: str, **more: Any) -> History:
        before = self.state(module)
        history = self.trainer(module, stage, **more)
        self.stages.append((stage, before, self.state(module)))
        return history

    def accuracy(self, module: nn.Module) -> float | None:
        return self.trainer.accuracy(module)

    def answers(self, module: nn.Module) -> Answers:
        return self.trainer.answers(module)

    @staticmethod
    def state(module: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in module.state_dict().items()}


def source() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return digits_cnn(width=4)


def trained(digits: DataSet, calibration: Tensor, validation: int = 100, **options: Any) -> tuple[Recorder, Traced, RateNorm]:
    settings = Training(epochs=1, batch_size=64, learning_rate=0.01, validation=validation)
    recorder = Recorder(Trainer(fabric=make_fabric("cpu"), data=digits, settings=settings))
    method = RateNorm(**{"steps": 64, "speed_epochs": 2, **options})
    return recorder, fit(source(), ImageStream(calibration), method, recorder), method


@pytest.fixture(scope="module")
def stages(digits: DataSet, digits_calibration: Tensor) -> tuple[Recorder, Traced, RateNorm]:
    return trained(digits, digits_calibration[:100], tolerance=100.0)


def layers_of(ann: Traced) -> list[RateNormLayer]:
    return [ann.at(site) for site in ann.sites]


def shut(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if not name.endswith(".scale")}


def test_r7_stage_one_leaves_every_scale(stages: tuple[Recorder, Traced, RateNorm]) -> None:
    recorder, ann, _ = stages
    name, before, after = recorder.stages[0]
    assert name == "accuracy"
    scales = [key for key in before if key.endswith(".scale")]
    assert len(scales) == len(ann.sites)
    for key in scales:
        assert float(before[key]) == float(after[key]) == 10.0
    learned = [key for key in before if key.endswith(".weight")]
    assert all(not torch.equal(before[key], after[key]) for key in learned)
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith(".running_max"))


def test_r7_stage_two_leaves_everything_else(stages: tuple[Recorder, Traced, RateNorm]) -> None:
    recorder, _, method = stages
    assert [stage for stage, _, _ in recorder.stages[1:]] == ["speed1", "speed2"]
    assert {float(value) for key, value in recorder.stages[1][1].items() if key.endswith(".scale")} == {method.scale}
    for _, before, after in recorder.stages[1:]:
        assert any(key.endswith("running_mean") for key in before)
        for key, value in shut(before).items():
            assert torch.equal(value, after[key]), key
        for values in (before, after):
            assert len({float(value) for key, value in values.items() if key.endswith(".scale")}) == 1
        scale = next(key for key in before if key.endswith(".scale"))
        assert float(before[scale]) != float(after[scale])


def test_r7_all_layers_share_one_scale(stages: tuple[Recorder, Traced, RateNorm]) -> None:
    recorder, ann, method = stages
    layers = layers_of(ann)
    assert len({id(layer.scale) for layer in layers}) == 1
    assert float(layers[0].scale.detach()) == float(recorder.stages[-1][2][f"{ann.sites[0].name}.scale"])
    snn = finish(ann, ImageStream(torch.zeros(1, 1, 8, 8)), method)
    for site, layer in zip(ann.sites, layers, strict=True):
        share = (float(snn.neuron(site.name).threshold) - SMALLEST) / float(layer.running_max)
        assert share == pytest.approx(sigmoid(float(layer.scale.detach())), rel=1e-5)
        assert float(snn.neuron(site.name).initial) == 0


@pytest.mark.parametrize("speed_epochs", [0, 1])
def test_r7_training_needs_no_validation_images(speed_epochs: int, digits: DataSet, digits_calibration: Tensor) -> None:
    recorder, ann, _ = trained(digits, digits_calibration[:50], validation=0, speed_epochs=speed_epochs)
    assert len(recorder.stages) == 1 + speed_epochs
    assert (float(layers_of(ann)[0].scale.detach()) != 2.5) == bool(speed_epochs)


def answers_of(module: nn.Module) -> Answers:
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    return lambda images: frozen(images).detach()


class Scripted:
    """Lowers the scale in each stage, by 1 if nothing is said, and tells accuracies as they were written down."""

    def __init__(self, accuracies: list[float | None], steps: tuple[float, ...] = ()) -> None:
        self.accuracies: Iterator[float | None] = iter(accuracies)
        self.steps = iter(steps or [1.0] * 99)
        self.fabric = make_fabric("cpu")

    def __call__(self, module: nn.Module, stage: str, **more: Any) -> History:
        if stage != "accuracy":
            (group,) = more["groups"]
            (scale,) = group["params"]
            assert group["weight_decay"] == 0
            with torch.no_grad():
                scale -= next(self.steps)
        return History(stage)

    def accuracy(self, module: nn.Module) -> float | None:
        return next(self.accuracies)

    def answers(self, module: nn.Module) -> Answers:
        return answers_of(module)


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [([90, 89.5, 80], 1.5), ([90, 80, 70], 2.5), ([90, 80, 89.2], 0.5), ([90, 91, 92], 0.5), ([None, None, None], 0.5)],
)
def test_the_last_scale_within_the_tolerance_is_kept(accuracies: list[float | None], kept: float) -> None:
    method = RateNorm(tolerance=1.0, speed_epochs=2)
    images = ImageStream(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    ann = fit(source(), images, method, Scripted(accuracies))
    assert [float(layer.scale.detach()) for layer in layers_of(ann)] == pytest.approx([kept] * len(ann.sites))


@pytest.mark.parametrize(
    ("steps", "accuracies", "kept"),
    [
        ((1.0, -2.0), [90, 90, 90], 1.5),
        ((-1.0, -1.0), [90, 90, 90], 2.5),
        ((1.0, -0.5), [90, 80, 90], 2.0),
        ((-1.0, -1.0), [None, None, None], 2.5),
    ],
    ids=["slower again", "slower from the start", "faster than the best that is accurate enough", "slower, nothing held out"],
)
def test_a_scale_that_is_no_faster_is_not_kept(steps: tuple[float, ...], accuracies: list[float | None], kept: float) -> None:
    """A higher scale has higher thresholds, lower rates and a higher Omega."""
    images = ImageStream(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    ann = fit(source(), images, RateNorm(tolerance=1.0, speed_epochs=2), Scripted(accuracies, steps))
    assert [float(layer.scale.detach()) for layer in layers_of(ann)] == pytest.approx([kept] * len(ann.sites))


@pytest.mark.parametrize("unit", [False, True])
def test_mean_omega_is_that_of_the_layers_and_logits(unit: bool, digits_calibration: Tensor) -> None:
    images = digits_calibration[:50]
    ann = fit(source(), ImageStream(images), RateNorm(unit_spikes=unit, scale=0.0))
    seen: list[np.ndarray] = []
    layers = layers_of(ann)
    handles = [
        layer.register_forward_hook(lambda layer, _, out: seen.append((out / (1 if unit else layer.threshold)).numpy())) for layer in layers
    ]
    with torch.no_grad():
        logits = ann.module(images).double().numpy()
    for handle in handles:
        handle.remove()
    rates = [*seen, np.maximum(logits, 0) / logits.max()]
    assert all(rate.min() >= 0 and rate.max() <= 1 + 1e-6 for rate in rates)
    assert mean_omega(ann, images) == pytest.approx(np.mean([rate.sum() / np.square(rate).sum() for rate in rates]), rel=1e-4)


def test_r8_in_mixed_precision_too(digits: DataSet, digits_calibration: Tensor) -> None:
    """The reference rounds as the network does, so that at the start their answers are the same to the bit."""
    fabric = make_fabric("cpu", "bf16-mixed")
    train = Trainer(fabric=fabric, data=digits, settings=Training(epochs=1, batch_size=64, learning_rate=0.01))
    ann = fit(source(), ImageStream(digits_calibration[:100]), RateNorm(speed_epochs=0), train)
    reference, losses = train.answers(ann.module), []
    images = digits_calibration[:64].contiguous(memory_format=torch.channels_last)
    with fabric.autocast():
        assert torch.equal(reference(images), ann.module(images).float())
    stage = RateNorm(weight=0.0, speed_epochs=1, tolerance=100.0)

    def watched(module: nn.Module, name: str, *, loss: Any = None, **more: Any) -> History:
        def noted(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            losses.append(loss(network, images, targets))
            return losses[-1]

        return train(module, name, loss=noted, **more)

    watched.answers, watched.accuracy = train.answers, train.accuracy
    stage._speed_up(ann, layers_of(ann), digits_calibration[:50], watched)
    assert float(losses[0].detach()) == pytest.approx(0, abs=3e-7)
    for layer in layers_of(ann):
        assert float(layer.scale.detach()) == pytest.approx(2.5, abs=1e-4)


def test_r8_the_reference_of_the_cosine_does_not_move() -> None:
    """The loss that stage 2 gets, on a network whose scale has changed since."""
    values: list[float] = []
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    class Probing(Scripted):
        def __call__(self, module: nn.Module, stage: str, **more: Any) -> History:
            for _ in range(2):
                if stage != "accuracy":
                    values.append(float(more["loss"](module, images, torch.zeros(8)).detach()))
                super().__call__(module, stage, **more)
            return History(stage)

    fit(source(), ImageStream(images), RateNorm(weight=0.0, speed_epochs=2, tolerance=100.0), Probing([1.0, 1.0, 1.0]))
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] > 1e-6
    assert values[3] > values[2] > values[1]


def frozen_reference(ann: Traced) -> Answers:
    for layer in layers_of(ann):
        layer.omega = None
    return answers_of(ann.module)


def test_r8_the_loss_at_the_start_is_zero_and_flat(stages: tuple[Recorder, Traced, RateNorm], digits_calibration: Tensor) -> None:
    _, ann, _ = stages
    scale = layers_of(ann)[0].scale
    loss = rate_inference_loss(layers_of(ann), frozen_reference(ann), 0.0)
    scale.grad = None
    value = loss(ann.module, digits_calibration[:64], torch.zeros(64))
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert float(scale.grad) == pytest.approx(0, abs=1e-6)
    scale.grad = None


def test_r8_without_weight_the_scale_stays(digits: DataSet, digits_calibration: Tensor) -> None:
    recorder, ann, _ = trained(digits, digits_calibration[:50], weight=0.0, speed_epochs=1, tolerance=100.0)
    assert [stage for stage, _, _ in recorder.stages] == ["accuracy", "speed1"]
    for layer in layers_of(ann):
        assert float(layer.scale.detach()) == pytest.approx(2.5, abs=1e-4)


def test_r8_the_loss_is_one_minus_cosine_plus_the_mean_over_layers_and_logits(
    stages: tuple[Recorder, Traced, RateNorm], digits_calibration: Tensor
) -> None:
    _, ann, _ = stages
    layers, images = layers_of(ann), digits_calibration[:64]
    reference = frozen_reference(ann)
    seen: list[np.ndarray] = []

    def note(layer: RateNormLayer, _: tuple[Tensor], out: Tensor) -> None:
        seen.append((out / layer.threshold).detach().double().numpy())

    handles = [layer.register_forward_hook(note) for layer in layers]
    start = float(layers[0].scale.detach())
    try:
        with torch.no_grad():
            layers[0].scale.fill_(0.0)
        value = float(rate_inference_loss(layers, reference, 0.3)(ann.module, images, torch.zeros(64)).detach())
    finally:
        with torch.no_grad():
            logits, wanted = ann.module(images).double().numpy(), reference(images).double().numpy()
            layers[0].scale.fill_(start)
        for handle in handles:
            handle.remove()
    rates = [*seen[: len(layers)], np.maximum(logits, 0) / logits.max()]
    omegas = [float(rate.sum() / np.square(rate).sum()) for rate in rates]
    cosine = (logits * wanted).sum(1) / np.linalg.norm(logits, axis=1) / np.linalg.norm(wanted, axis=1)
    assert len(omegas) == len(ann.sites) + 1
    assert value == pytest.approx(1 - cosine.mean() + 0.3 * np.mean(omegas), rel=1e-4)
    assert 1 - cosine.mean() > 1e-5


def test_r9_a_lower_scale(stages: tuple[Recorder, Traced, RateNorm], digits_calibration: Tensor) -> None:
    _, ann, _ = stages
    layers, images = layers_of(ann), digits_calibration[:64]
    scale, start = layers[0].scale, float(layers[0].scale.detach())
    first: list[Tensor] = []
    handle = layers[0].register_forward_hook(lambda layer, _, out: first.append((out / layer.threshold).detach()))
    thresholds: list[list[float]] = []
    try:
        for s in (2.5, 1.5, 0.0, -2.0):
            with torch.no_grad():
                scale.fill_(s)
                ann.module(images)
            thresholds.append([float(layer.threshold.detach()) for layer in layers])
    finally:
        handle.remove()
        with torch.no_grad():
            scale.fill_(start)
    for (before, after), (slower, faster) in zip(pairwise(thresholds), pairwise(first), strict=True):
        assert all(low < high for low, high in zip(after, before, strict=True))
        assert bool((faster >= slower).all())
    assert bool((first[-1] > first[0]).any())


def test_r9_a_small_step_on_the_loss_lowers_it(stages: tuple[Recorder, Traced, RateNorm], digits_calibration: Tensor) -> None:
    _, ann, _ = stages
    layers, images = layers_of(ann), digits_calibration[:64]
    scale, start = layers[0].scale, float(layers[0].scale.detach())

    def mean_omega() -> Tensor:
        ann.module(images)
        return torch.stack([layer.omega for layer in layers]).mean()

    try:
        with torch.no_grad():
            scale.fill_(2.5)
        scale.grad = None
        before = mean_omega()
        before.backward()
        with torch.no_grad():
            scale -= 0.1 * scale.grad
        after = float(mean_omega().detach())
    finally:
        scale.grad = None
        with torch.no_grad():
            scale.fill_(start)
    assert after < float(before.detach()) - 1e-5


# R10: conversion


@pytest.mark.parametrize("unit", [False, True])
def test_r10_the_network_approaches_its_source(
    unit: bool, random_network: Callable[..., nn.Module], random_images: Callable[..., Tensor]
) -> None:
    images = random_images("perceptron", 60)
    stream, method = ImageStream(images), RateNorm(unit_spikes=unit)
    network = random_network("perceptron")
    ann = fit(network, stream, method)
    snn = finish(ann, stream, method)
    with torch.no_grad():
        wanted = ann.module(images)
        z = network[0](images)
        theta = float(z.max()) * sigmoid(2.5) + SMALLEST
        errors = []
        for steps in (32, 128, 512):
            run = snn.with_steps(steps).run(images)
            errors.append(float((run.logits[-1] - wanted).abs().mean()))
            phi = run.spikes[snn.sites[0].name] * theta / steps
            assert float((phi - z.clamp(0, theta)).abs().max()) <= theta / steps + 1e-6
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02 * float(wanted.abs().mean())
    for site in snn.sites:
        unit_of = snn.neuron(site.name)
        assert (unit_of.scaled, float(unit_of.amplitude), float(unit_of.leak)) == (not unit, 1.0, 1.0)
        assert not unit_of.strict


@pytest.mark.parametrize(("initial", "factor"), [(0.0, 1.0), (0.5, 0.5)])
def test_the_measured_fit_stays_below_the_bound(
    initial: float, factor: float, stages: tuple[Recorder, Traced, RateNorm], digits_test: tuple[Tensor, Tensor]
) -> None:
    _, ann, _ = stages
    images = digits_test[0][:40]
    method = RateNorm(steps=64, initial=initial)
    snn = finish(ann, ImageStream(images), method)
    found = measure_fit(snn, ann, images)
    assert list(found) == [site.name for site in ann.sites]
    first = found[ann.sites[0].name]
    assert len(first["curve"]) == len(first["bound"]) == 64
    for t in range(1, 65):
        assert first["bound"][t - 1] == pytest.approx(first["omega"] / t)
        assert first["curve"][t - 1] <= factor * first["omega"] / t
    # The last point, from the counts of an ordinary run and the source's activations.
    seen: dict[int, Tensor] = {}
    handles = [layer.register_forward_hook(lambda layer, _, out: seen.update({id(layer): out})) for layer in layers_of(ann)]
    with torch.no_grad():
        ann.module(images)
        run = snn.run(images)
    for handle in handles:
        handle.remove()
    for site in ann.sites:
        layer = ann.at(site)
        rates = (seen[id(layer)] / layer.threshold).detach().double().numpy()
        error = np.square(run.spikes[site.name].numpy() / 64 - rates).sum() / np.square(rates).sum()
        assert found[site.name]["curve"][63] == pytest.approx(error, rel=1e-4)
        assert found[site.name]["omega"] == pytest.approx(rates.sum() / np.square(rates).sum(), rel=1e-4)


def test_a_layer_that_saw_nothing_or_a_foreign_one_is_refused() -> None:
    with pytest.raises(ConversionError, match="no images"):
        RateNorm().neuron(SITE, RateNormLayer(SITE, 2.5, False))
    with pytest.raises(ConversionError, match="expected a RateNormLayer"):
        RateNorm().neuron(SITE, nn.ReLU())
