"""DIET-SNN: acceptance checks D1 to D9 of its specification (D10 is in test_energy.py), then the method's options."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracles
import quickspike as qs
from quickspike.api import tune
from quickspike.data import DataSet
from quickspike.evaluation import make_fabric
from quickspike.graph import Site
from quickspike.method import Method
from quickspike.methods.diet_snn import DietSNN, find_thresholds, sites_in_blocks
from quickspike.models import load_model
from quickspike.neuron import Neuron, NeuronParameters, Surrogate
from quickspike.training import History, Trainer, Training
from quickspike.tuning import Tuning

F64 = torch.float64
SURROGATE = Surrogate("triangular", scale=0.3)


def tensor(value: object) -> Tensor:
    return torch.tensor(value, dtype=F64)


def unit(theta: float, leak: float, steps: int, constant: bool = False) -> Neuron:
    """A neuron as the paper has it: spikes of height 1, strictly above the threshold, v(0) = 0; everything learns."""
    parameters = NeuronParameters(tensor(theta), leak=leak, scaled=False, strict=True)
    return Neuron(parameters, steps, constant, SURROGATE).requires_grad_(True)


def test_d1_counts_are_the_strict_closed_form() -> None:
    for theta in (7, 10, 16):
        z = torch.arange(-3 * theta, 3 * theta + 1)
        for steps in (1, 2, 3, 5, 8, 16):
            with torch.no_grad():
                out = unit(float(theta), 1.0, steps, constant=True)(z.double()).unflatten(0, (steps, -1))
            for t in range(1, steps + 1):
                expected = oracles.closed_form_count(z.numpy(), 0, theta, t, strict=True)
                assert (out[:t].sum(0).numpy() == expected).all()


@torch.no_grad()
def test_d2_a_leak_keeps_weak_currents_silent() -> None:
    neuron, state, x, leak = unit(1.0, 0.9, 1), None, 0.05, 0.9
    for t in range(1, 301):
        out, state = neuron.scan(tensor([x]), state, 1)
        assert float(out) == 0.0
        assert float(state[0]) == pytest.approx(x * (1 - leak**t) / (1 - leak), abs=1e-12)
    assert float(state[0]) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("leak", [0.5, 0.75, 0.875])
@torch.no_grad()
def test_d2_a_constant_current_fires_only_above_the_share_that_leaks(leak: float) -> None:
    theta, steps = 2.0, 400
    limit = theta * (1 - leak)
    out = unit(theta, leak, steps, constant=True)(tensor([limit / 2, limit, limit * 1.001])).unflatten(0, (steps, -1))
    assert (out.sum(0) > 0).tolist() == [False, False, True]


def code_order(currents: list[float], theta: float, leak: float) -> list[int]:
    """u = leak v + x; o = 1[u > theta]; v = u - theta o: the reset is leaked in the next step."""
    v, spikes = 0.0, []
    for x in currents:
        u = leak * v + x
        spikes.append(int(u > theta))
        v = u - theta * spikes[-1]
    return spikes


def paper_order(currents: list[float], theta: float, leak: float) -> list[int]:
    """u(t) = leak u(t-1) + x - theta o(t-1): the reset is not leaked."""
    u, spike, spikes = 0.0, 0, []
    for x in currents:
        u = leak * u + x - theta * spike
        spike = int(u > theta)
        spikes.append(spike)
    return spikes


def delayed_order(currents: list[float], theta: float, leak: float) -> list[int]:
    """The spike is computed before the current is added."""
    u, spikes = 0.0, []
    for x in currents:
        spikes.append(int(u > theta))
        u = leak * u + x - theta * spikes[-1]
    return spikes


@torch.no_grad()
def spikes_of(currents: list[float], theta: float, leak: float) -> list[int]:
    return [int(value) for value in unit(theta, leak, len(currents))(tensor(currents)[:, None])]


def test_d3_the_current_acts_in_its_own_step() -> None:
    currents = [1.5] * 6
    assert spikes_of(currents, 1.0, 1.0) == [1] * 6
    assert delayed_order(currents, 1.0, 1.0)[:2] == [0, 1]


def test_d3_the_reset_is_leaked() -> None:
    draw = random.Random(0)
    differ = 0
    for _ in range(200):
        # Multiples of 1/8: nothing is rounded at leak 1.
        currents = [draw.randint(-4, 12) / 8 for _ in range(12)]
        assert spikes_of(currents, 1.0, 1.0) == code_order(currents, 1.0, 1.0) == paper_order(currents, 1.0, 1.0)
        assert spikes_of(currents, 1.0, 0.8) == code_order(currents, 1.0, 0.8)
        differ += code_order(currents, 1.0, 0.8) != paper_order(currents, 1.0, 0.8)
    assert differ > 50


def test_a_spike_reaches_the_readout_in_the_same_step() -> None:
    depth = 5
    layers = [layer for _ in range(depth) for layer in (nn.Linear(1, 1, bias=False), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.5)
    snn = qs.convert(network, tensor([[1.0]]), DietSNN(steps=1, height="unit"))
    with torch.no_grad():
        for neuron in snn.neurons().values():
            neuron.threshold.fill_(1.0)
        assert float(snn(tensor([[1.0]]))) == 1.5


def primitive(z: float) -> float:
    """G, whose derivative is 0.3 max(0, 1 - |z|)."""
    if z <= -1:
        return 0.0
    if z >= 1:
        return 0.3
    return 0.3 * (0.5 + z + (z * z if z < 0 else -z * z) / 2)


def central(function: Callable[[float], float], at: float, step: float = 1e-6) -> float:
    return (function(at + step) - function(at - step)) / (2 * step)


def test_d4_surrogate_primitive() -> None:
    points = [-1.7, -1.0, -0.999, -0.4, -1e-9, 0.0, 0.3, 0.8, 1.0, 2.5]
    slopes = SURROGATE.derivative(tensor(points)).tolist()
    for z, slope in zip(points, slopes, strict=True):
        assert slope == pytest.approx(0.3 * max(0, 1 - abs(z)), abs=1e-15)
        assert slope == pytest.approx(central(primitive, z), abs=1e-6)
    assert [primitive(z) for z in (-1.0, 0.0, 1.0)] == [0.0, 0.15, 0.3]
    assert DietSNN().surrogate() == SURROGATE


def unrolled(currents: list[float], theta: float, leak: float) -> tuple[list[int], list[float], list[float]]:
    """Spikes, z, and v after the reset, of the order that is implemented."""
    v, spikes, zs, after = 0.0, [], [], []
    for x in currents:
        u = leak * v + x
        z = u / theta - 1
        spikes.append(int(z > 0))
        v = u - theta * spikes[-1]
        zs.append(z)
        after.append(v)
    return spikes, zs, after


def smooth_loss(currents: list[float], theta: float, leak: float, weights: list[float]) -> float:
    """sum_t w_t G(z_t), hard reset."""
    return sum(w * primitive(z) for w, z in zip(weights, unrolled(currents, theta, leak)[1], strict=True))


D5 = pytest.mark.parametrize(
    ("theta", "leak", "spikes", "loss", "d_leak", "d_theta", "one_step_leak", "one_step_theta"),
    [
        (1.0, 0.90, [0, 1, 0, 1, 0], 0.641362171, 0.964683317, -1.828801063, 0.410850601, -1.046684341),
        (0.8, 0.95, [0, 1, 1, 0, 1], 0.952022843, 1.009592441, -2.592803656, 0.388510056, -1.416092654),
    ],
)


@D5
def test_d5_one_layer(
    theta: float,
    leak: float,
    spikes: list[int],
    loss: float,
    d_leak: float,
    d_theta: float,
    one_step_leak: float,
    one_step_theta: float,
) -> None:
    currents, weights = [0.6] * 5, [1.0] * 5
    neuron = unit(theta, leak, 5)
    out = neuron(tensor(currents)[:, None])
    assert out.flatten().tolist() == spikes
    out.sum().backward()
    assert smooth_loss(currents, theta, leak, weights) == pytest.approx(loss, abs=1e-9)
    assert float(neuron.leak.grad) == pytest.approx(d_leak, abs=1e-9)
    assert float(neuron.threshold.grad) == pytest.approx(d_theta, abs=1e-9)
    assert float(neuron.leak.grad) == pytest.approx(central(lambda value: smooth_loss(currents, theta, value, weights), leak), abs=1e-8)
    assert float(neuron.threshold.grad) == pytest.approx(
        central(lambda value: smooth_loss(currents, value, leak, weights), theta), abs=1e-8
    )
    # What a gradient that forgets the membrane of the step before would be.
    _, zs, after = unrolled(currents, theta, leak)
    slopes = [0.3 * max(0.0, 1 - abs(z)) for z in zs]
    assert sum(s * v / theta for s, v in zip(slopes, [0.0, *after], strict=False)) == pytest.approx(one_step_leak, abs=1e-9)
    assert sum(-s * (z + 1) / theta for s, z in zip(slopes, zs, strict=True)) == pytest.approx(one_step_theta, abs=1e-9)


@pytest.mark.parametrize("constant", [False, True])
def test_d5_one_layer_whose_current_is_given_once_or_at_every_step(constant: bool) -> None:
    neuron = unit(0.8, 0.95, 5, constant)
    current = tensor([0.6] if constant else [[0.6]] * 5).requires_grad_(True)
    neuron(current).sum().backward()
    expected = central(lambda x: smooth_loss([x] * 5, 0.8, 0.95, [1.0] * 5), 0.6)
    assert float(current.grad.sum()) == pytest.approx(expected, abs=1e-8)
    assert float(neuron.leak.grad) == pytest.approx(1.009592441, abs=1e-9)


def test_d6_random_layers() -> None:
    draw, checked = random.Random(1), 0
    while checked < 150:
        steps, inputs = draw.randint(1, 7), 3
        theta, leak = draw.uniform(0.4, 1.5), draw.uniform(0.1, 1.0)
        x = [[draw.uniform(-0.5, 1.5) for _ in range(inputs)] for _ in range(steps)]
        weight = [draw.uniform(-0.5, 1.0) for _ in range(inputs)]
        loss_weights = [draw.uniform(-1, 1) for _ in range(steps)]

        def value(
            theta: float = theta,
            leak: float = leak,
            weight: list[float] = weight,
            x: list[list[float]] = x,
            loss_weights: list[float] = loss_weights,
        ) -> float:
            return smooth_loss([sum(w * p for w, p in zip(weight, row, strict=True)) for row in x], theta, leak, loss_weights)

        currents = [sum(w * p for w, p in zip(weight, row, strict=True)) for row in x]
        if min(abs(z) for z in unrolled(currents, theta, leak)[1]) < 1e-4 or leak > 1 - 1e-5:
            continue
        checked += 1
        neuron, leaf = unit(theta, leak, steps), tensor(weight).requires_grad_(True)
        (neuron((tensor(x) @ leaf)[:, None]).flatten() * tensor(loss_weights)).sum().backward()
        assert float(neuron.threshold.grad) == pytest.approx(central(lambda at: value(theta=at), theta), abs=1e-8)
        assert float(neuron.leak.grad) == pytest.approx(central(lambda at: value(leak=at), leak), abs=1e-8)
        for entry in range(inputs):
            ahead, behind = ([w + step * (i == entry) for i, w in enumerate(weight)] for step in (1e-6, -1e-6))
            assert float(leaf.grad[entry]) == pytest.approx((value(weight=ahead) - value(weight=behind)) / 2e-6, abs=1e-8)


def scan_layer(currents: np.ndarray, theta: float, leak: float) -> np.ndarray:
    """z of a layer, `[T, N]`, hard reset."""
    v, zs = np.zeros(currents.shape[1]), []
    for x in currents:
        u = leak * v + x
        zs.append(u / theta - 1)
        v = u - theta * (zs[-1] > 0)
    return np.array(zs)


G = np.vectorize(primitive)


@pytest.mark.parametrize("seed", range(12))
def test_d7_two_layers(seed: int) -> None:
    """G stands for the spike in both layers; the reset stays hard.

    The first neuron's outputs are shifted to the values of G without a change of their gradient, so that the second
    one sees what it sees in the smooth network. Its own outputs enter a linear loss, whose gradient does not depend on
    them. Then every gradient must be the slope of the smooth network.
    """
    random_state = np.random.default_rng(seed)
    steps = 6
    image, scale = random_state.uniform(-0.5, 1.5, (steps, 4)), np.array([0.9, 0.7, 0.85, 0.6])
    point = [random_state.uniform(-0.4, 1.0, (5, 4)), random_state.uniform(-2.0, 6.0, (3, 5)), *scale]
    loss_weights = random_state.uniform(-1, 1, (steps, 3))

    def network(first: np.ndarray, second: np.ndarray, theta1: float, leak1: float, theta2: float, leak2: float) -> tuple[Any, Any]:
        z1 = scan_layer(image @ first.T, theta1, leak1)
        return z1, scan_layer(G(z1) @ second.T, theta2, leak2)

    def slope(number: int, entry: int) -> float:
        def along(at: float) -> float:
            changed = copy.deepcopy(point)
            if number < 2:
                changed[number].flat[entry] = at
            else:
                changed[number] = at
            return float((loss_weights * G(network(*changed)[1])).sum())

        return central(along, float(np.ravel(point[number])[entry]))

    z1, z2 = network(*point)
    assert min(np.abs(z1).min(), np.abs(z2).min()) > 1e-4
    assert (z1 > 0).any()
    assert (z2 > 0).any()
    first, second = (torch.tensor(weight, requires_grad=True) for weight in point[:2])
    neurons = [unit(float(scale[0]), float(scale[1]), steps), unit(float(scale[2]), float(scale[3]), steps)]
    spikes = neurons[0](torch.tensor(image) @ first.T)
    assert torch.equal(spikes, torch.tensor(z1 > 0).double())
    shifted = spikes + (torch.tensor(G(z1)) - spikes).detach()
    out = neurons[1](shifted @ second.T)
    assert torch.equal(out, torch.tensor(z2 > 0).double())
    (out * torch.tensor(loss_weights)).sum().backward()
    learned = [first, second, neurons[0].threshold, neurons[0].leak, neurons[1].threshold, neurons[1].leak]
    for number, leaf in enumerate(learned):
        expected = [slope(number, entry) for entry in range(leaf.numel())]
        assert leaf.grad.flatten().tolist() == pytest.approx(expected, abs=1e-8)
    assert float(first.grad.abs().max()) > 1e-3


# Thresholds


def rank_value(values: np.ndarray, percent: float = 99.7) -> float:
    """The k-th smallest, k = 1 + round(0.01 percent (N - 1))."""
    return float(np.sort(values, axis=None)[round(0.01 * percent * (values.size - 1))])


def perceptron(seed: int = 0) -> nn.Sequential:
    """Weights are multiples of 1/8, so that no current is ever rounded."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)
    ).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randint(-3, 5, parameter.shape, generator=generator) / 8)
    return network


def inputs(number: int = 40, seed: int = 1) -> Tensor:
    return torch.randint(-4, 9, (number, 6), generator=torch.Generator().manual_seed(seed)).double() / 4


def simulated_thresholds(network: nn.Sequential, images: Tensor, steps: int, percent: float, height: float | None = None) -> list[float]:
    """Layer by layer in NumPy: largest over time of the rank-k current; spikes of earlier layers have the height of
    their threshold, or `height`."""
    signal, found = np.repeat(images.numpy()[None], steps, 0), []
    linear = [layer for layer in network if isinstance(layer, nn.Linear)][:-1]
    for layer in linear:
        currents = signal @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        theta = max(rank_value(current, percent) for current in currents)
        v, spikes = np.zeros(currents.shape[1:]), []
        for current in currents:
            v = v + current
            fires = v > theta
            v = v - theta * fires
            spikes.append(fires * (theta if height is None else height))
        signal = np.array(spikes)
        found.append(theta)
    return found


def test_d8_the_rank_of_known_currents() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
    images = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double()[:, None] + 1
    snn = qs.convert(network, images, DietSNN(scaling=1.0, calibration_batch=1000, calibration_steps=3))
    # k = 1 + round(0.997 * 999) = 997
    assert float(snn.neuron("1").threshold) == 997.0
    half = qs.convert(network, images, DietSNN(scaling=1.0, calibration_batch=1000, calibration_steps=3, percentile=50))
    assert float(half.neuron("1").threshold) == 1 + round(0.5 * 999)


@pytest.mark.parametrize(("height", "unit_height"), [("threshold", None), ("unit", 1.0)])
@pytest.mark.parametrize("percent", [99.7, 80.0])
def test_d8_the_loudest_step_of_a_running_simulation(height: str, unit_height: float | None, percent: float) -> None:
    network, images = perceptron(), inputs()
    expected = simulated_thresholds(network, images, 30, percent, unit_height)
    method = DietSNN(height=height, percentile=percent, calibration_steps=30, calibration_batch=40, scaling=1.0)
    snn = qs.convert(network, images, method)
    assert [float(neuron.threshold) for neuron in snn.neurons().values()] == expected
    # A step on its own shows less than the loudest one.
    assert expected[1:] != simulated_thresholds(network, images, 1, percent, unit_height)[1:]
    assert snn.steps == 5
    # All are scaled at the end: no layer is found behind layers that are scaled already.
    scaled = qs.convert(network, images, DietSNN(**(vars(method) | {"scaling": 0.25})))
    assert [float(neuron.threshold) for neuron in scaled.neurons().values()] == [0.25 * theta for theta in expected]


def test_d8_a_layer_does_not_depend_on_later_ones() -> None:
    images = inputs()
    plain = qs.convert(perceptron(), images, DietSNN(calibration_steps=20))
    changed = perceptron()
    with torch.no_grad():
        changed[4].weight.mul_(-3)
        changed[4].bias.add_(7)
    other = qs.convert(changed, images, DietSNN(calibration_steps=20))
    for name in ("1", "3"):
        assert torch.equal(plain.neuron(name).threshold, other.neuron(name).threshold)
    assert not torch.equal(plain.neuron("5").threshold, other.neuron("5").threshold)
    # Nor on thresholds that stood there before.
    again = copy.deepcopy(plain)
    with torch.no_grad():
        for neuron in again.neurons().values():
            neuron.threshold.fill_(123.0)
    find_thresholds(again, images, 20, 99.7)
    for name, neuron in again.neurons().items():
        assert 0.7 * float(neuron.threshold) == pytest.approx(float(plain.neuron(name).threshold), rel=1e-12)


def test_a_layer_without_positive_currents_gets_the_threshold_one(caplog: pytest.LogCaptureFixture) -> None:
    network = perceptron()
    with torch.no_grad():
        network[2].weight.fill_(-1)
        network[2].bias.fill_(-1)
    snn = qs.convert(network, inputs(), DietSNN(scaling=1.0, calibration_steps=4))
    assert float(snn.neuron("3").threshold) == 1.0
    assert "site 3" in caplog.text


@pytest.mark.parametrize("height", ["unit", "threshold", "found"])
def test_the_published_threshold_of_residual_blocks(height: str) -> None:
    """The three layers of the stem keep thresholds from data; all others start at one number, whatever the scaling."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = load_model("resnet20_wide,pool=average,width=2")
        images = torch.rand(8, 3, 32, 32)
    options = {"steps": 2, "scaling": 0.2, "calibration_steps": 4, "calibration_batch": 4, "height": height}
    data, published = (qs.convert(network, images, DietSNN(**options, default_threshold=value)) for value in (0.0, 0.4))
    names = [site.name for site in published.sites]
    assert sites_in_blocks(published) == names[3:]
    for name in names:
        one, other = data.neuron(name), published.neuron(name)
        if name in names[:3]:
            assert torch.equal(one.threshold, other.threshold)
            assert torch.equal(one.amplitude, other.amplitude)
        else:
            assert float(other.threshold.detach()) == pytest.approx(0.4)
            assert float(one.threshold.detach()) != pytest.approx(0.4, rel=1e-3)
            assert float(other.amplitude.detach()) == pytest.approx(0.4 if height == "found" else 1.0)


def test_networks_without_residual_blocks_have_none(digits_calibration: Tensor) -> None:
    plain, with_default = (small(digits_calibration, steps=2, default_threshold=value) for value in (0.0, 0.4))
    assert sites_in_blocks(plain) == []
    for name, neuron in plain.neurons().items():
        assert torch.equal(neuron.threshold, with_default.neuron(name).threshold)


# Fine-tuning


@dataclass(frozen=True, kw_only=True)
class Watching(Trainer):
    """Keeps the leaks as every optimiser step left them, before and after they are put in bounds."""

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    stages: list[tuple[str, int, list[float]]] = field(default_factory=list)

    def __call__(self, module: nn.Module, stage: str, *, after_step: Any = None, **more: Any) -> History:
        neurons = module.neurons().values()
        self.stages.append((stage, module.steps, [neuron.threshold.item() for neuron in neurons]))

        def watch() -> None:
            self.before.extend(neuron.leak.item() for neuron in neurons)
            after_step()
            self.after.extend(neuron.leak.item() for neuron in neurons)

        return super().__call__(module, stage, after_step=watch, **more)


def trainer(digits: DataSet, **settings: Any) -> Watching:
    chosen = {"epochs": 1, "batch_size": 64, "optimiser": "adam", "learning_rate": 0.02, "weight_decay": 0.0, "schedule": "constant"}
    return Watching(fabric=make_fabric("cpu"), data=digits, settings=Training(**(chosen | settings)))


def small(calibration: Tensor, **options: Any) -> qs.SpikingNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = [nn.Linear(64, 24, bias=False), nn.Linear(24, 16, bias=False), nn.Linear(16, 10, bias=False)]
    network = nn.Sequential(nn.Flatten(), linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
    return qs.convert(network, calibration, DietSNN(**({"steps": 4, "calibration_steps": 10} | options)))


def test_d9_the_leak_never_exceeds_one(digits: DataSet, digits_calibration: Tensor) -> None:
    watched = trainer(digits)
    tuned = tune(small(digits_calibration), watched, Tuning())
    assert len(watched.after) == 2 * (1347 // 64)
    assert max(watched.before) > 1
    assert all(0 <= leak <= 1 for leak in watched.after)
    assert min(watched.after) < 1
    assert [neuron.leak.item() for neuron in tuned.neurons().values()] == watched.after[-2:]


def test_d9_dropout_masks_are_constant_over_time(digits_calibration: Tensor) -> None:
    snn, steps = small(digits_calibration, steps=6).train(), 6
    masks: dict[str, list[Tensor]] = {name: [] for name in snn.neurons()}
    compared = 0

    def look(name: str, clean: Neuron, current: Tensor, out: Tensor) -> None:
        nonlocal compared
        spikes, dropped = (values.unflatten(0, (steps, -1)) for values in (clean(current), out))
        fired = spikes.sum(0) > 0
        mask = dropped.sum(0) / spikes.sum(0)
        assert torch.allclose(dropped, torch.where(fired, mask, 0) * spikes)
        assert set(mask[fired].round(decimals=5).tolist()) == {0.0, 2.0}
        compared += int((spikes.ne(0).sum(0) > 1).sum())
        masks[name].append(torch.where(fired, mask, -1))

    for name, neuron in snn.neurons().items():
        clean = copy.deepcopy(neuron).eval()
        neuron.dropout = 0.5
        neuron.register_forward_hook(lambda _, given, out, name=name, clean=clean: look(name, clean, given[0], out))
    with torch.no_grad():
        for _ in range(2):
            snn(digits_calibration[:20])
    assert compared > 200
    assert all(not torch.equal(*pair) for pair in masks.values())


def test_longer_windows_first(digits: DataSet, digits_calibration: Tensor) -> None:
    snn = small(digits_calibration, steps=3, longer=7, shortening=0.5)
    watched = trainer(digits, batch_size=512)
    tuned = tune(snn, watched, Tuning(thresholds=False))
    start = [float(neuron.threshold) for neuron in snn.neurons().values()]
    assert [(stage, steps) for stage, steps, _ in watched.stages] == [("tune7", 7), ("tune", 3)]
    assert watched.stages[0][2] == start
    assert watched.stages[1][2] == pytest.approx([0.5 * theta for theta in start], rel=1e-6)
    assert tuned.steps == snn.steps == 3
    assert all(neuron.steps == 3 for neuron in tuned.neurons().values())


# The method's options


@pytest.mark.parametrize("height", ["threshold", "found", "unit"])
def test_height_of_a_spike(height: str) -> None:
    method = DietSNN(height=height, scaling=0.5, leak=0.75, initial=0.25, calibration_steps=10)
    snn = qs.convert(perceptron(), inputs(), method)
    found = qs.convert(perceptron(), inputs(), DietSNN(**(vars(method) | {"scaling": 1.0})))
    for name, neuron in snn.neurons().items():
        theta = float(found.neuron(name).threshold)
        assert float(neuron.threshold) == theta / 2
        assert (float(neuron.leak), float(neuron.initial), neuron.strict) == (0.75, 0.25, True)
        spike = float(neuron.eval()(torch.full((1, *neuron_shape(snn, name)), 10 * theta, dtype=F64).repeat(snn.steps, 1))[0].max())
        assert spike == {"threshold": theta / 2, "found": theta, "unit": 1.0}[height]


def neuron_shape(snn: qs.SpikingNetwork, name: str) -> tuple[int, ...]:
    return next(site.shape for site in snn.sites if site.name == name)


def test_without_biases_unit_spikes_are_those_of_the_height_that_was_found() -> None:
    network = perceptron()
    for layer in network:
        if isinstance(layer, nn.Linear):
            layer.bias = None
    unit_height, found = (qs.convert(network, inputs(), DietSNN(height=height, scaling=0.5)) for height in ("unit", "found"))
    with torch.no_grad():
        runs = [snn.run(inputs(seed=5)) for snn in (unit_height, found)]
    for name, counts in runs[0].spikes.items():
        assert torch.equal(counts, runs[1].spikes[name])
        assert counts.sum() > 0


def test_no_option_changes_the_source_activation() -> None:
    method: Method = DietSNN()
    x = tensor([-1.0, 0.5, 9.0])
    assert method.activation(Site("relu", "relu", None, (3,)))(x).tolist() == [0.0, 0.5, 9.0]
    assert method.activation(Site("relu", "relu6", 6.0, (3,)))(x).tolist() == [0.0, 0.5, 6.0]
