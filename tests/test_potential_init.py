"""Potential initialisation: acceptance checks O1 to O10 of its specification."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracles
import quickspike as qs
from quickspike.activations import ClippedReLU, LearnedCeiling, clip
from quickspike.api import finish, fit
from quickspike.data import DataSet, ImageStream
from quickspike.evaluation import make_fabric
from quickspike.graph import Site, Traced, swap, trace
from quickspike.methods.potential_init import PotentialInit
from quickspike.networks import digits_cnn
from quickspike.neuron import Neuron, NeuronParameters
from quickspike.training import Trainer, Training

F64 = torch.float64
POINTS = 400_000
FRACTIONS = pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75])


def midpoints(number: int = POINTS) -> Tensor:
    return (torch.arange(number, dtype=F64) + 0.5) / number


def neuron(theta: float, fraction: float, steps: int = 1, **more: object) -> Neuron:
    return Neuron(NeuronParameters(torch.tensor(theta, dtype=F64), initial=fraction, **more), steps, True)


def transmitted(z: Tensor, steps: int, fraction: float, theta: float = 1.0) -> Tensor:
    """The mean output for a constant input; one step at a time, since T times 400,000 values need much memory."""
    unit, total, state = neuron(theta, fraction), torch.zeros_like(z), None
    for _ in range(steps):
        out, state = unit.scan(z, state, 1)
        total += out
    return total / steps


@FRACTIONS
@pytest.mark.parametrize("theta", [8, 16])
def test_o1_closed_form(theta: int, fraction: float) -> None:
    z = torch.arange(-3 * theta, 3 * theta + 1)
    v0 = int(theta * fraction)
    for steps in (1, 2, 3, 5, 8, 16):
        out = neuron(float(theta), fraction, steps)(z.double()).unflatten(0, (steps, -1)) / theta
        for t in range(1, steps + 1):
            expected = oracles.closed_form_count(z.numpy(), v0, theta, t)
            assert (out[:t].sum(0).numpy() == expected).all()


@pytest.mark.parametrize(
    ("fraction", "mean", "square"),
    [(0.0, 0.0625, 0.0052083), (0.25, 0.03125, 0.0022786), (0.5, 0.0, 0.0013021), (0.75, -0.03125, 0.0022786)],
)
def test_o2_o3_mean_and_mean_square_error(fraction: float, mean: float, square: float) -> None:
    z = midpoints()
    error = z - transmitted(z, 8, fraction)
    assert float(error.mean()) == pytest.approx(mean, abs=1e-5)
    assert float(error.square().mean()) == pytest.approx(square, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 32])
def test_o3_half_a_threshold_divides_the_mean_square_by_four(steps: int) -> None:
    z = midpoints(100_000)
    floor, rounded = ((z - transmitted(z, steps, fraction)).square().mean() for fraction in (0.0, 0.5))
    assert float(floor / rounded) == pytest.approx(4, abs=1e-4)


def test_o4_the_least_error_is_at_half_and_symmetric() -> None:
    z = midpoints(40_000)
    errors = [float((z - transmitted(z, 8, k / 20)).square().mean()) for k in range(20)]
    assert min(range(20), key=errors.__getitem__) == 10
    for k in range(1, 10):
        assert errors[10 - k] == pytest.approx(errors[10 + k], abs=1e-6)
    for k in range(20):
        assert errors[k] == pytest.approx(((1 - k / 20) ** 3 + (k / 20) ** 3) / (3 * 8**2), abs=1e-6)


def test_o5_mean_error_of_each_cell() -> None:
    z = midpoints()
    phi = transmitted(z, 4, 0.5)
    cell = (phi * 4).round().long()
    means = [float((z - phi)[cell == k].mean()) for k in range(5)]
    weights = [float((cell == k).double().mean()) for k in range(5)]
    assert means == pytest.approx([0.0625, 0, 0, 0, -0.0625], abs=1e-6)
    assert weights == pytest.approx([0.125, 0.25, 0.25, 0.25, 0.125], abs=1e-6)


@pytest.mark.parametrize("theta", [1.0, 0.75, 2.5])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_o6_largest_error(steps: int, theta: float) -> None:
    z = torch.linspace(0, theta, 20_001, dtype=F64)
    assert float((z - transmitted(z, steps, 0.5, theta)).abs().max()) <= theta / (2 * steps) + 1e-9


def test_o7_equivalent_forms() -> None:
    generator = torch.Generator().manual_seed(0)
    theta, steps = 2.0, 16
    currents = torch.randint(-16, 33, (steps, 500), generator=generator).double() / 16
    half = Neuron(NeuronParameters(torch.tensor(theta, dtype=F64), initial=0.5), steps, False)(currents)
    primed = Neuron(NeuronParameters(torch.tensor(theta, dtype=F64)), steps + 1, False)
    out = primed(torch.cat([torch.full((1, 500), theta / 2, dtype=F64), currents]))
    assert not out[0].any()
    assert torch.equal(out[1:], half)
    unit = Neuron(NeuronParameters(torch.tensor(1.0, dtype=F64), initial=0.5, scaled=False), steps, False)
    assert torch.equal(unit(currents / theta) * theta, half)
    z = torch.arange(-64, 129, dtype=F64) / 32
    shifted = neuron(theta, 0.0, steps)(z + theta / (2 * steps)).unflatten(0, (steps, -1))
    assert torch.equal(shifted.sum(0), neuron(theta, 0.5, steps)(z).unflatten(0, (steps, -1)).sum(0))


@pytest.mark.parametrize("theta", [7.0, 16.0])
def test_o8_first_spike(theta: float) -> None:
    z = torch.arange(1, int(theta) + 1)
    first = {}
    for fraction in (0.0, 0.5):
        fired = neuron(theta, fraction, int(theta))(z.double()).unflatten(0, (int(theta), -1)).ne(0)
        first[fraction] = (fired.long().argmax(0) + 1).tolist()
        assert fired.any(0).all()
        assert first[fraction] == [math.ceil(theta * (1 - fraction) / current) for current in z.tolist()]
    assert first[0.5] == [math.ceil(late / 2) for late in first[0.0]]


def converted(network: nn.Module, images: Tensor, **options: object) -> qs.SpikingNetwork:
    return qs.convert(network, images, PotentialInit(ceiling="percentile", percentile=100, **options))


@pytest.mark.parametrize("name", ["chain", "perceptron"])
def test_o9_a_network_approaches_its_clipped_source(
    name: str, random_network: Callable[..., nn.Module], random_images: Callable[..., Tensor]
) -> None:
    source, calibration, images = random_network(name), random_images(name, 60, seed=1), random_images(name, 64, seed=2)
    half, zero = (converted(source, calibration, steps=128, initial=initial) for initial in ("half", "zero"))
    clipped = swap(trace(source, images), lambda site, _: ClippedReLU(half.neuron(site.name).threshold)).module
    with torch.no_grad():
        target = clipped(images)
        error = {key: (snn.run(images).logits - target).abs().mean((1, 2)) for key, snn in (("half", half), ("zero", zero))}
    for steps in (4, 8, 16):
        assert error["half"][steps - 1] < error["zero"][steps - 1]
    assert error["half"][127] < 0.04 * target.abs().mean()


def test_o10_the_second_batch_starts_at_half_a_threshold(
    random_network: Callable[..., nn.Module], random_images: Callable[..., Tensor]
) -> None:
    source, images = random_network("chain"), random_images("chain", 20)
    used, fresh = (converted(source, images, steps=8) for _ in range(2))
    with torch.no_grad():
        used.run(images * 3)
        assert torch.equal(used.run(images).logits, fresh.run(images).logits)
        # The readout has no threshold: nothing is added to its first step.
        dark = used.with_steps(1).run(torch.zeros_like(images[:1]))
    for site in used.sites:
        assert float(used.neuron(site.name).initial) == 0.5
    assert torch.equal(dark.logits[0], used.outputs(torch.zeros_like(images[:1]))[0])


# The method's options

SITE = Site("block.relu", "relu", None, (4, 50, 50))


@pytest.mark.parametrize(("initial", "value"), [("half", 0.5), ("zero", 0.0), ("constant", 0.3)])
def test_constant_initial_potentials(initial: str, value: float) -> None:
    assert float(PotentialInit(initial=initial, fraction=0.3).initial_potential(SITE)) == pytest.approx(value)


@pytest.mark.parametrize(("initial", "spread"), [("uniform", 1 / 12**0.5), ("gaussian", 1 / 6)])
def test_drawn_initial_potentials(initial: str, spread: float) -> None:
    method = PotentialInit(initial=initial, seed=3)
    drawn = method.initial_potential(SITE)
    assert drawn.shape == SITE.shape
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(drawn.std()) == pytest.approx(spread, abs=0.01)
    assert torch.equal(drawn, method.initial_potential(SITE))
    other = Site("block.relu_2", "relu", None, SITE.shape)
    assert not torch.equal(drawn, method.initial_potential(other))
    assert not torch.equal(drawn, PotentialInit(initial=initial, seed=4).initial_potential(SITE))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("initial", ["half", "uniform"])
def test_every_site_is_initialised(
    initial: str, granularity: str, random_network: Callable[..., nn.Module], random_images: Callable[..., Tensor]
) -> None:
    images = random_images("chain", 20)
    snn = converted(random_network("chain"), images, steps=4, initial=initial, granularity=granularity)
    for site in snn.sites:
        unit = snn.neuron(site.name)
        assert unit.initial.shape == (() if initial == "half" else site.shape)
        assert unit.threshold.shape == (() if granularity == "layer" else (site.channels, 1, 1))
        assert float(unit.leak) == float(unit.amplitude) == 1
        assert unit.scaled
        assert not unit.strict
        largest = float(unit.threshold.max())
        with torch.no_grad():
            peak = float(np.max(peaks(random_network("chain"), images)[site.name]))
        assert largest == pytest.approx(peak, rel=1e-6)


def peaks(network: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.numpy()}))
    network(images)
    return seen


# Trained ceilings


@pytest.mark.parametrize("shape", [(), (3, 1, 1)])
def test_only_clipped_elements_move_a_ceiling(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    x, g = generator.normal(0.5, 1.5, (2, 4, 3, 2, 2))
    mu, step = generator.uniform(0.7, 1.5, shape), 1e-6

    def loss(ceiling: np.ndarray, values: np.ndarray) -> float:
        return float((g * np.minimum(np.maximum(values, 0), ceiling)).sum())

    ceiling, values = torch.tensor(mu, requires_grad=True), torch.tensor(x, requires_grad=True)
    (torch.from_numpy(g) * clip(values, ceiling)).sum().backward()
    assert ceiling.grad.shape == shape
    for index in np.ndindex(shape):
        shift = np.zeros(shape)
        shift[index] = step
        difference = (loss(mu + shift, x) - loss(mu - shift, x)) / (2 * step)
        assert float(ceiling.grad[index]) == pytest.approx(difference, rel=1e-5)
        own = np.broadcast_to(shift > 0, x.shape) & (x > mu)
        assert float(ceiling.grad[index]) == pytest.approx(float(g[own].sum()), rel=1e-5)
    assert np.allclose(values.grad.numpy(), g * ((x > 0) & (x < mu)))


def test_a_ceiling_that_clips_nothing_gets_no_gradient() -> None:
    ceiling = torch.tensor(3.0, dtype=F64, requires_grad=True)
    clip(torch.linspace(-4, 2.9, 50, dtype=F64), ceiling).sum().backward()
    assert float(ceiling.grad) == 0


@pytest.mark.parametrize(("wanted", "moves"), [(-1.0, True), (1.0, False)])
def test_a_ceiling_below_zero_acts_positive_and_can_climb_back(wanted: float, moves: bool) -> None:
    """A step against the gradient has to lead up; one further down is not taken."""
    layer = LearnedCeiling(SITE, "layer")
    layer.started = True
    with torch.no_grad():
        layer.mu.fill_(-0.5)
    assert 0 < float(layer.ceiling.detach()) < 1e-6
    out = layer(torch.linspace(-1, 1, 20))
    assert float(out.detach().min()) >= 0
    (wanted * out.sum()).backward()
    assert (float(layer.mu.grad) != 0) is moves
    assert float(layer.mu.grad) == pytest.approx(-10.0 * moves)


def fitted(digits: DataSet, images: Tensor, method: PotentialInit, trained: bool = True, **settings: float) -> Traced:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = digits_cnn(width=4)
    chosen = Training(**{"epochs": 1, "batch_size": 64, "learning_rate": 0.01, **settings})
    trainer = Trainer(fabric=make_fabric("cpu"), data=digits, settings=chosen)
    return fit(network, ImageStream(images), method, trainer if trained else None)


def ceilings_of(ann: Traced) -> list[Tensor]:
    return [ann.at(site).mu.detach().clone() for site in ann.sites]


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_ceilings_are_trained_and_become_thresholds(granularity: str, digits: DataSet, digits_calibration: Tensor) -> None:
    images, method = digits_calibration[:100], PotentialInit(steps=4, granularity=granularity)
    ann = fitted(digits, images, method)
    start = ceilings_of(fitted(digits, images, method, epochs=0))
    snn = finish(ann, ImageStream(images), method)
    for site, mu, before in zip(ann.sites, ceilings_of(ann), start, strict=True):
        assert mu.shape == (() if granularity == "layer" else (site.channels, 1, 1)[: len(site.shape)])
        assert not torch.equal(mu, before)
        # A channel that was all but silent may have been pushed below 0.
        assert float(mu.max()) > 0.01
        mu = mu.clamp_min(1e-8)
        assert torch.equal(snn.neuron(site.name).threshold.detach(), mu)
        assert float(snn.neuron(site.name).initial) == 0.5
        assert float(snn.neuron(site.name).amplitude) == 1
        # The source that the spiking network approximates clips there.
        with torch.no_grad():
            assert torch.equal(ann.at(site)(torch.full((1, *site.shape), 1e9)), mu.expand(1, *site.shape))
    quiet = torch.cat([images for images, _ in digits.loader("test", limit=40)])
    with torch.no_grad():
        wanted, given = ann.module(quiet), snn.with_steps(512)(quiet)
    assert float((given - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())


def test_without_training_the_calibrated_ceilings_stay(digits: DataSet, digits_calibration: Tensor) -> None:
    images, percentile = digits_calibration[:100], {"ceiling": "percentile", "percentile": 99.0}
    untrained = fitted(digits, images, PotentialInit(start=4.0, **percentile), trained=False)
    for site, mu in zip(untrained.sites, ceilings_of(untrained), strict=True):
        seen = untrained.at(site).probe.histogram
        assert torch.equal(mu, seen.percentile(99.0).float().reshape(()))
    # Training starts there too, or where it is told to; no epoch moves nothing.
    here = ceilings_of(fitted(digits, images, PotentialInit(**percentile), epochs=0))
    assert [float(mu) for mu in here] == pytest.approx([float(mu) for mu in ceilings_of(untrained)], rel=1e-3)
    told = ceilings_of(fitted(digits, images, PotentialInit(start=4.0, **percentile), epochs=0))
    assert [float(mu) for mu in told] == [4.0] * len(untrained.sites)


def test_weight_decay_of_the_ceilings(digits: DataSet, digits_calibration: Tensor) -> None:
    """At 50 nothing is clipped, so that decay alone moves a ceiling: by 1 - rate * decay at every step of plain descent."""
    settings = {"momentum": 0.0, "schedule": "constant", "weight_decay": 0.25}
    steps = digits.size("train") // 64
    for decay in (0.0, 0.5):
        ann = fitted(digits, digits_calibration[:50], PotentialInit(start=50.0, ceiling_decay=decay), **settings)
        expected = 50 * (1 - 0.01 * decay) ** steps
        assert [float(mu) for mu in ceilings_of(ann)] == pytest.approx([expected] * len(ann.sites), rel=1e-4)


def test_thresholds_stay_positive_when_training_pushes_ceilings_below_zero(digits: DataSet, digits_calibration: Tensor) -> None:
    # Momentum carries a ceiling that decays this fast past 0.
    images, method = digits_calibration[:50], PotentialInit(start=1.0, ceiling_decay=1.0)
    ann = fitted(digits, images, method, learning_rate=0.9, weight_decay=0.0, clip=1e-3, momentum=0.5, schedule="constant")
    stored = ceilings_of(ann)
    assert min(float(mu) for mu in stored) < 0
    snn = finish(ann, ImageStream(images), method)
    for site in ann.sites:
        assert float(snn.neuron(site.name).threshold) > 0
    with torch.no_grad():
        assert torch.isfinite(snn(images)).all()
        assert torch.isfinite(ann.module(images)).all()
