"""QCFS: acceptance checks Q1 to Q4 of its specification, and training with the staircase."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracles
from quickspike.api import finish, fit
from quickspike.data import DataSet, ImageStream
from quickspike.evaluation import make_fabric
from quickspike.graph import Site
from quickspike.methods.qcfs import QCFS, QuantisedReLU, quantise
from quickspike.methods.slip_relu import SlipReLU
from quickspike.networks import digits_cnn
from quickspike.neuron import Neuron
from quickspike.training import Trainer, Training

F64 = torch.float64
SITE = Site("relu", "relu", None, (6,))
SUPPORTS = pytest.mark.parametrize("support", ["inside", "clamp_after", "paper", "triangular"])


@pytest.fixture(autouse=True)
def own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def activation(mu: float, levels: int, support: str = "inside", dtype: torch.dtype = F64) -> QuantisedReLU:
    """What the method puts at a site, with the ceiling as training left it."""
    made = QCFS(levels=levels, support=support).activation(SITE)
    assert isinstance(made, QuantisedReLU)
    made = made.to(dtype).eval()
    with torch.no_grad():
        made.mu.fill_(mu)
    made.started = True
    return made


def neuron(layer: QuantisedReLU, steps: int, **options: float) -> Neuron:
    return Neuron(QCFS(steps=steps, **options).neuron(SITE, layer), steps, True)


def transmitted(unit: Neuron, z: Tensor, steps: int) -> Tensor:
    """Mean output under a constant input."""
    total, state = torch.zeros_like(z), None
    with torch.no_grad():
        for _ in range(steps):
            out, state = unit.scan(z, state, 1)
            total += out
    return total / steps


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("levels", [2, 4, 8])
def test_q1_counts_equal_levels(levels: int, dtype: torch.dtype) -> None:
    for mu in (7, 8, 10, 16, 24, 60):
        z = torch.arange(-3 * mu, 3 * mu + 1)
        layer = activation(mu, levels, dtype=dtype)
        # In integers: half a level is mu/(2L), so counts are those of theta = 2 mu, v0 = mu and the input 2 z.
        expected = oracles.closed_form_count(2 * z.numpy(), mu, 2 * mu, levels)
        with torch.no_grad():
            level = layer(z.to(dtype)).double() * levels / mu
            fired = neuron(layer, levels)(z.to(dtype)).unflatten(0, (levels, -1)).ne(0).sum(0)
        assert np.allclose(level.numpy(), expected, rtol=0, atol=1e-5)
        assert (fired.numpy() == expected).all()


@pytest.mark.parametrize(("levels", "steps", "floored"), [(4, 2, -0.125), (4, 8, 0.0625), (8, 3, -0.104167), (8, 32, 0.046875)])
@pytest.mark.parametrize("mu", [1.0, 2.5])
def test_q2_the_mean_error_is_zero(mu: float, levels: int, steps: int, floored: float) -> None:
    number = 9_600
    # The edges of both staircases lie between these points, so that the mean is exact.
    z = mu * (torch.arange(number, dtype=F64) + 0.5) / number
    layer = activation(mu, levels)
    with torch.no_grad():
        error = transmitted(neuron(layer, steps), z, steps) - layer(z)
    assert float(error.mean()) == pytest.approx(0, abs=1e-5 * mu)
    # Without the shift of 1/2 and from v0 = 0.
    unshifted = mu * np.floor(z.numpy() * levels / mu) / levels
    error = transmitted(neuron(layer, steps, initial=0.0), z, steps) - torch.from_numpy(unshifted)
    assert float(error.mean()) == pytest.approx(mu * floored, abs=1e-5 * mu)


def definition(z: np.ndarray, mu: float, levels: int) -> np.ndarray:
    return mu * np.clip(np.floor(z * levels / mu + 0.5) / levels, 0, 1)


@SUPPORTS
def test_q3_all_supports_give_the_same_values(support: str) -> None:
    generator = np.random.default_rng(0)
    for levels in (1, 2, 4, 8):
        z = torch.from_numpy(generator.normal(0, 3, 3000))
        assert np.allclose(quantise(z, torch.tensor(2.3, dtype=F64), levels, support).numpy(), definition(z.numpy(), 2.3, levels))


@pytest.mark.parametrize("levels", [2, 4])
@pytest.mark.parametrize(
    ("support", "below", "above", "low_in", "high_in"),
    [("inside", 0, 0, True, True), ("clamp_after", 1, 1, True, False), ("paper", 1, -1, False, False)],
)
def test_q3_supports(support: str, below: int, above: int, low_in: bool, high_in: bool, levels: int) -> None:
    """Ceiling 1 and grid points that are binary fractions, so that both ends are hit exactly."""
    low, high = -below / (2 * levels), 1 + above / (2 * levels)
    z = (torch.arange(-64, 129, dtype=F64) / 64).requires_grad_()
    activation(1.0, levels, support)(z).sum().backward()
    values = z.detach().numpy()
    inside = (low < values) & (values < high) | low_in * (values == low) | high_in * (values == high)
    wrong = values[z.grad.numpy() != inside]
    assert not len(wrong), wrong


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("shift", [0.5, 0.25])
def test_the_triangular_gradient_peaks_at_the_jumps(levels: int, shift: float) -> None:
    """Quarters of a level are binary fractions under the ceiling 1; out = mu f(z/mu), so that z da/dz + mu da/dmu = a."""
    z = (torch.arange(-8, 9 * levels, dtype=F64) / (8 * levels)).requires_grad_()
    mu = torch.ones((), dtype=F64, requires_grad=True)
    for at in range(len(z)):
        out = quantise(z[at], mu, levels, "triangular", shift)
        to_z, to_mu = torch.autograd.grad(out, (z, mu))
        climbed = float(z[at].detach()) * levels + shift
        jump = round(climbed)
        assert float(to_z[at]) == (2 - 4 * abs(climbed - jump) if 1 <= jump <= levels else 0)
        assert float((z[at] * to_z[at] + mu * to_mu - out).detach()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("support", ["inside", "clamp_after"])
@pytest.mark.parametrize("levels", [2, 4, 8])
def test_q4_gradient_of_the_ceiling(levels: int, support: str) -> None:
    """Central differences of the definition in which the floor only adds the residue that it adds here."""
    mu, step = 1.7, 1e-6
    z = np.random.default_rng(1).uniform(-1, 3, 400)

    def with_residue(ceiling: float) -> np.ndarray:
        if support == "inside":
            here = np.clip(z / mu, 0, 1)
            residue = np.floor(levels * here + 0.5) / levels - here
            return ceiling * (np.clip(z / ceiling, 0, 1) + residue)
        here = z * levels / mu + 0.5
        residue = np.floor(here) - here
        return ceiling * np.clip((z * levels / ceiling + 0.5 + residue) / levels, 0, 1)

    assert np.allclose(with_residue(mu), definition(z, mu, levels))
    difference = (with_residue(mu + step) - with_residue(mu - step)) / (2 * step)
    # Where the clip is about to act, a difference sees both of its sides.
    plain = np.minimum(np.abs(z), np.abs(z - mu)) > 1e-3
    layer = activation(mu, levels, support)
    for value, expected in zip(z[plain], difference[plain], strict=True):
        edge = support == "clamp_after" and np.floor(value * levels / mu + 0.5) in (0, levels)
        layer.mu.grad = None
        layer(torch.tensor([value], dtype=F64)).sum().backward()
        if not edge:
            assert float(layer.mu.grad) == pytest.approx(expected, abs=1e-6)
        else:
            assert float(layer.mu.grad) == pytest.approx(definition(np.array([value]), mu, levels)[0] / mu - value / mu, abs=1e-6)


@SUPPORTS
def test_q4_a_clipped_element_moves_the_ceiling_by_one(support: str) -> None:
    layer = activation(1.5, 4, support)
    layer(torch.tensor([2.5, 4.0, -3.0], dtype=F64)).sum().backward()
    assert float(layer.mu.grad) == pytest.approx(2)


def test_q4_the_gradient_sums_over_what_a_channel_shares() -> None:
    site = Site("relu", "relu", None, (3, 2, 2))
    layer = QCFS(granularity="channel").activation(site).double().eval()
    layer.started = True
    z = torch.from_numpy(np.random.default_rng(2).uniform(-0.5, 2, (5, 3, 2, 2)))
    layer(z).sum().backward()
    assert layer.mu.shape == (3, 1, 1)
    for channel in range(3):
        one = activation(1.0, 4)
        one(z[:, channel].reshape(-1)).sum().backward()
        assert float(layer.mu.grad[channel]) == pytest.approx(float(one.mu.grad), rel=1e-6)


# The way through the method


def test_neurons_get_the_ceiling_and_half_of_it(random_network: Callable[..., nn.Module], random_images: Callable[..., Tensor]) -> None:
    images = random_images("chain", 30)
    method = QCFS(steps=3, levels=5)
    ann = fit(random_network("chain"), ImageStream(images), method)
    snn = finish(ann, ImageStream(images), method)
    for site in ann.sites:
        unit, layer = snn.neuron(site.name), ann.at(site)
        assert float(unit.threshold) == pytest.approx(float(layer.ceiling.detach()), rel=1e-6)
        assert (float(unit.initial), float(unit.amplitude), float(unit.leak)) == (0.5, 1.0, 1.0)
        assert unit.scaled
        assert not unit.strict
        assert layer.levels == 5


def test_without_training_the_ceiling_fits_the_staircase_of_the_steps(random_images: Callable[..., Tensor]) -> None:
    network = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    images = random_images("perceptron", 200)
    with torch.no_grad():
        values = network[0](images).relu().numpy().ravel()
    for steps in (2, 8):
        ann = fit(network, ImageStream(images), QCFS(steps=steps, start=8.0))
        mu = float(ann.at(ann.sites[0]).ceiling.detach())
        best = oracles.least_squared_error(values, steps, 0.5, candidates=600)
        assert oracles.squared_error(values, mu, steps, 0.5) <= best * 1.02


def trainer(digits: DataSet, **settings: float) -> Trainer:
    chosen = Training(**{"epochs": 1, "batch_size": 64, "learning_rate": 0.01, "validation": 100, **settings})
    return Trainer(fabric=make_fabric("cpu"), data=digits, settings=chosen)


def source() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return digits_cnn(width=4)


def test_training_starts_where_it_is_told_to(digits: DataSet, digits_calibration: Tensor) -> None:
    stream = ImageStream(digits_calibration[:100])
    ann = fit(source(), stream, QCFS(start=8.0), trainer(digits, epochs=0))
    assert [float(ann.at(site).ceiling.detach()) for site in ann.sites] == [8.0] * len(ann.sites)
    ann = fit(source(), stream, QCFS(percentile=100), trainer(digits, epochs=0))
    peaks = [float(ann.at(site).probe.histogram.maximum.max()) for site in ann.sites]
    assert [float(ann.at(site).ceiling.detach()) for site in ann.sites] == pytest.approx(peaks)


@pytest.mark.parametrize("method", [QCFS(levels=2, steps=16), SlipReLU(levels=2, steps=16)], ids=lambda method: method.name)
def test_a_training_starts_at_the_ceilings_of_least_squared_error_for_its_own_levels(
    method: QCFS | SlipReLU, digits: DataSet, digits_calibration: Tensor
) -> None:
    stream = ImageStream(digits_calibration[:100])
    ann = fit(source(), stream, method, trainer(digits, epochs=0))
    for site in ann.sites:
        ceiling = ann.at(site)
        wanted = ceiling.probe.finish(ceiling.probe.histogram.squared_error_ceiling(2, 0.5))
        assert torch.equal(ceiling.ceiling.detach(), wanted)
        assert float(wanted) < 0.9 * float(ceiling.probe.histogram.maximum.max())
    for_steps = fit(source(), stream, method)
    assert all(bool(ann.at(site).ceiling.detach() < for_steps.at(site).ceiling.detach()) for site in ann.sites)


def test_training_moves_the_ceilings_and_what_comes_out_is_the_twin(digits: DataSet, digits_test: tuple[Tensor, Tensor]) -> None:
    stream = ImageStream(digits_test[0][:60])
    method = QCFS(steps=4, levels=4, start=3.0, synchronous=True)
    ann = fit(source(), stream, method, trainer(digits))
    ceilings = [float(ann.at(site).ceiling.detach()) for site in ann.sites]
    assert all(mu > 0 and mu != 3.0 for mu in ceilings)
    ann.module.double()
    snn = finish(ann, stream, method)
    images = digits_test[0][:60].double()
    with torch.no_grad():
        wanted = ann.module(images)
        assert float((snn(images) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    assert [float(snn.neuron(site.name).threshold) for site in ann.sites] == pytest.approx(ceilings, rel=1e-6)
