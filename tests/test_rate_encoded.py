"""Rate-encoded conversion: acceptance checks E1 to E11 of its specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.api import finish, fit
from quickspike.data import DataSet, ImageStream, load_data
from quickspike.errors import ConversionError, DataError
from quickspike.evaluation import make_fabric
from quickspike.graph import Site, Traced, trace
from quickspike.methods.rate_encoded import LevelReLU, RateEncoded, channel_rates, train_thresholds
from quickspike.networks import digits_cnn
from quickspike.neuron import Neuron, NeuronParameters
from quickspike.operations import Operations, count_operations
from quickspike.preprocessing import Preprocessing
from quickspike.training import History, Trainer, Training

F64 = torch.float64
SITE = Site("relu", "relu", None, (1,))
EXACT = [(1, 2.5), (2, 3), (8, 10), (16, 20)]
PUBLISHED = [(1, 4), *EXACT, (32, 40), (200, 250), (500, 500), (100, 25), (200, 25), (10, 5)]
FLAT = {"unit": "one"}


@pytest.fixture(autouse=True)
def own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def level_relu(method: RateEncoded, dtype: torch.dtype = F64, site: Site = SITE) -> LevelReLU:
    """The activation as it is after a calibration."""
    made = method.activation(site)
    assert isinstance(made, LevelReLU)
    made.start(method)
    return made.to(dtype).eval()


def neuron(method: RateEncoded, *, averaged: bool = False, constant: bool = False, dtype: torch.dtype = F64) -> Neuron:
    parameters = method.neuron(SITE, level_relu(method, dtype))
    parameters = NeuronParameters(**{**vars(parameters), "averaged": averaged})
    return Neuron(parameters, method.steps, constant).to(dtype)


def counts(unit: Neuron, current: Tensor) -> Tensor:
    """Spikes of the whole window; a constant current `[N]` goes step by step, since T values of each need much memory."""
    with torch.no_grad():
        if not unit.constant_input:
            return unit(current).unflatten(0, (unit.steps, -1)).ne(0).sum(0)
        total, state = torch.zeros(current.shape, dtype=torch.int64), None
        for _ in range(unit.steps):
            out, state = unit.scan(current, state, 1)
            total += out.ne(0)
        return total


def random_spikes(number: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """`[T, ...]` spikes of 0 and 1, `number` of them at random times."""
    order = torch.rand(steps, *number.shape, generator=generator).argsort(0).argsort(0)
    return (order < number).double()


def perceptron(sizes: tuple[int, ...], seed: int = 0, spread: float = 1.0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for given, made in pairwise(sizes):
        linear = nn.Linear(given, made).double()
        with torch.no_grad():
            linear.weight.copy_(spread * torch.randn(made, given, generator=generator, dtype=F64) / given**0.5)
            linear.bias.copy_(0.2 * torch.randn(made, generator=generator, dtype=F64))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def twins(network: nn.Module, images: Tensor, method: RateEncoded) -> tuple[Traced, qs.SpikingNetwork]:
    stream = ImageStream(images)
    ann = fit(network, stream, method)
    return ann, finish(ann, stream, method)


def activations(ann: Traced, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(what goes in, what comes out) at every site."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        ann.at(site).register_forward_hook(lambda _, args, out, name=site.name: seen.update({name: (args[0], out)})) for site in ann.sites
    ]
    with torch.no_grad():
        ann.module(images)
    for handle in handles:
        handle.remove()
    return seen


# E1, E2: the spiking network is the twin of the quantised one


Numbers = list[Fraction]


def affine(weight: list[Numbers], bias: Numbers, x: Numbers) -> Numbers:
    return [sum((w * value for w, value in zip(row, x, strict=True)), b) for row, b in zip(weight, bias, strict=True)]


def exact_levels(layers: list[tuple[list[Numbers], Numbers]], x: Numbers, steps: int, levels: Fraction) -> list[list[int]]:
    """Counts of every layer of the quantised network, the input's first."""
    found = [[min(max(math.floor(levels * value), 0), steps) for value in x]]
    for weight, bias in layers:
        u = affine(weight, bias, [n / levels for n in map(Fraction, found[-1])])
        found.append([min(max(math.floor(levels * value), 0), steps) for value in u])
    return found


def exact_spikes(current: Numbers, theta: Fraction, steps: int) -> list[list[int]]:
    """Spikes `[T][N]` of plain integrate-and-fire neurons under a constant current."""
    v, out = [Fraction(0)] * len(current), []
    for _ in range(steps):
        m = [value + z for value, z in zip(v, current, strict=True)]
        out.append([int(value >= theta) for value in m])
        v = [value - theta if value >= theta else value for value in m]
    return out


def exact_asg(layers: list[tuple[list[Numbers], Numbers]], x: Numbers, steps: int, levels: Fraction) -> list[list[int]]:
    """Counts of every layer of the spiking network with averaged currents and theta = C."""
    c = steps / levels
    x = [Fraction(min(max(math.floor(levels * value), 0), steps)) / levels for value in x]
    spikes = exact_spikes(x, c, steps)
    found = [[sum(column) for column in zip(*spikes, strict=True)]]
    for weight, bias in layers:
        currents = [affine(weight, bias, [c * s for s in step]) for step in spikes]
        mean = [sum(column, Fraction(0)) / steps for column in zip(*currents, strict=True)]
        spikes = exact_spikes(mean, c, steps)
        found.append([sum(column) for column in zip(*spikes, strict=True)])
    return found


@pytest.mark.parametrize(("steps", "levels"), EXACT)
def test_e1_twins_in_exact_arithmetic(steps: int, levels: float) -> None:
    generator = np.random.default_rng(steps)
    sizes = (5, 7, 7, 7)
    layers = [
        (
            [[Fraction(int(n), 64) for n in generator.integers(-40, 64, given)] for _ in range(made)],
            [Fraction(int(n), 64) for n in generator.integers(-20, 24, made)],
        )
        for given, made in pairwise(sizes)
    ]
    pixels = generator.integers(0, 256, (6, 5))
    network = perceptron((*sizes, 3))
    with torch.no_grad():
        for number, (weight, bias) in enumerate(layers):
            network[2 * number].weight.copy_(torch.tensor([[float(w) for w in row] for row in weight]))
            network[2 * number].bias.copy_(torch.tensor([float(b) for b in bias]))
    images = torch.from_numpy(pixels / 255)
    method = RateEncoded(steps=steps, levels=levels, encode_input=True, **FLAT)
    ann, snn = twins(network, images, method)
    seen, run = activations(ann, images), snn.run(images)
    assert len(snn.sites) == 4
    for row in range(len(pixels)):
        x = [Fraction(int(k), 255) for k in pixels[row]]
        wanted = exact_levels(layers, x, steps, Fraction(levels))
        assert exact_asg(layers, x, steps, Fraction(levels)) == wanted
        for site, expected in zip(snn.sites, wanted, strict=True):
            assert run.spikes[site.name][row].tolist() == expected
            assert (seen[site.name][1][row] * levels).tolist() == pytest.approx(expected, abs=1e-5)
    used = {int(n) for site in snn.sites[1:] for n in run.spikes[site.name].flatten()}
    assert used >= ({0, 1} if steps == 1 else {0, 1, 2, steps})


@pytest.mark.parametrize(("steps", "levels"), [*EXACT, (200, 25)])
@pytest.mark.parametrize("encode", [True, False])
def test_e2_twins_in_double_precision(encode: bool, steps: int, levels: float) -> None:
    network = perceptron((6, 20, 20, 20, 5), seed=1, spread=2.0)
    images = torch.rand(200, 6, generator=torch.Generator().manual_seed(2), dtype=F64)
    ann, snn = twins(network, images, RateEncoded(steps=steps, levels=levels, encode_input=encode, **FLAT))
    seen = activations(ann, images)
    with torch.no_grad():
        run, wanted = snn.run(images), ann.module(images)
    for site in snn.sites:
        level = seen[site.name][1] * levels
        assert torch.equal(run.spikes[site.name], level.round().long())
        assert float((level - level.round()).abs().max()) < 1e-5
    assert float((run.logits[-1] - wanted).abs().max()) <= 1e-9


@pytest.mark.parametrize("name", ["chain", "residual", "pooled", "concat"])
def test_e2_twins_with_calibrated_units(name: str, random_network: Callable[..., nn.Module], random_images: Callable[..., Tensor]) -> None:
    images = random_images(name, 20)
    ann, snn = twins(random_network(name), images, RateEncoded(steps=8, levels=10))
    seen = activations(ann, images)
    with torch.no_grad():
        run, wanted = snn.run(images), ann.module(images)
    for site in snn.sites:
        unit = float(ann.at(site).unit)
        assert torch.equal(run.spikes[site.name], (seen[site.name][1] / unit * 10).round().long())
        assert float(snn.neuron(site.name).threshold) == pytest.approx(0.8 * unit, rel=1e-6)
    assert float((run.logits[-1] - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


@pytest.mark.parametrize(("steps", "levels"), EXACT)
def test_e2_single_precision_layer_by_layer(steps: int, levels: float) -> None:
    network = perceptron((6, 60, 60, 60, 5), seed=3, spread=2.0).float()
    images = torch.rand(200, 6, generator=torch.Generator().manual_seed(4))
    method = RateEncoded(steps=steps, levels=levels, encode_input=True, **FLAT)
    ann, _ = twins(network, images, method)
    different = total = 0
    for site in ann.sites:
        current, out = activations(ann, images)[site.name]
        fired = counts(Neuron(method.neuron(site, ann.at(site)), steps, True), current)
        different += int((fired != (out * levels).round()).sum())
        total += fired.numel()
    assert total > 30_000
    assert different < 1e-3 * total


def test_e2_the_order_of_spikes_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    steps, levels = 8, 10
    method = RateEncoded(steps=steps, levels=levels, guard=1e-9, **FLAT)
    weight = torch.randint(-64, 65, (30, 12), generator=generator).double() / 64
    number = torch.randint(0, steps + 1, (200, 12), generator=generator)
    unit = neuron(method, averaged=True)
    expected = None
    for _ in range(4):
        current = steps / levels * random_spikes(number, steps, generator) @ weight.T
        found = counts(unit, current.flatten(0, 1))
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
    exact = torch.floor_divide(number @ (64 * weight.T).long(), 64).clamp(0, steps)
    assert torch.equal(expected, exact)


@pytest.mark.parametrize(("steps", "levels"), [(8, 10), (32, 40), (200, 25)])
@pytest.mark.parametrize(("dtype", "guard"), [(torch.float32, 1e-3), (F64, 1e-9)])
def test_e2b_ties_of_averages(dtype: torch.dtype, guard: float, steps: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(6)
    number = torch.randint(0, steps + 1, (4, 5000), generator=generator)
    expected = number.sum(0) // 4
    method = RateEncoded(steps=steps, levels=levels, guard=guard, **FLAT)
    with torch.no_grad():
        level = level_relu(method, dtype)((number.to(dtype) / levels).mean(0)) * levels
    assert torch.equal(level.round().long(), expected)
    unit = neuron(method, averaged=True, dtype=dtype)
    spikes = torch.stack([random_spikes(row, steps, generator) for row in number]).to(dtype) * unit.amplitude
    assert torch.equal(counts(unit, spikes.mean(0).flatten(0, 1).detach()), expected)


@pytest.mark.parametrize(("steps", "levels"), [(1, 2.5), (2, 3), (8, 10), (32, 40), (200, 25)])
@pytest.mark.parametrize(("dtype", "guard"), [(torch.float32, 1e-3), (F64, 1e-3), (F64, 1e-9)])
def test_e2b_ties_in_a_converted_network(dtype: torch.dtype, guard: float, steps: int, levels: float) -> None:
    """Grid values through the identity: in double precision the smallest guard is enough, on both sides."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2)).to(dtype)
    with torch.no_grad():
        network[0].weight.fill_(1.0)
    wanted = torch.arange(steps + 1)[:, None]
    images = wanted.to(dtype) / levels
    ann, snn = twins(network, images, RateEncoded(steps=steps, levels=levels, guard=guard, **FLAT))
    assert torch.equal((activations(ann, images)["1"][1] * levels).round().long(), wanted)
    assert torch.equal(snn.run(images).spikes["1"], wanted)


# E3, E4: guard and epsilon


@pytest.mark.parametrize(("steps", "levels"), PUBLISHED)
def test_e3_lowered_thresholds_round_up(steps: int, levels: float) -> None:
    # Enough points for the last digit: each of the T + 1 edges lies between two of them.
    number, epsilon = {(200, 250): 14_000, (200, 25): 15_000}.get((steps, levels), 12_000), 1e-3
    c = steps / levels
    method = RateEncoded(steps=steps, levels=levels, guard=0.0, epsilon=epsilon, **FLAT)
    u = (torch.arange(number, dtype=F64) + 0.5) * (c / number)
    exact = torch.div(steps * (2 * torch.arange(number) + 1), 2 * number, rounding_mode="floor")
    with torch.no_grad():
        assert torch.equal((level_relu(method)(u) * levels).round().long(), exact)
    difference = counts(neuron(method, constant=True), u) - exact
    assert int(difference.min()) == 0
    assert int(difference.max()) == 1
    assert float(difference.double().mean()) == pytest.approx(epsilon * (steps + 1) / (2 * c), abs=1e-4)


@pytest.mark.parametrize(("steps", "levels"), [(8, 10), (16, 20), (32, 40), (200, 25)])
def test_e4_grid_currents_in_single_precision(steps: int, levels: int) -> None:
    wanted = torch.arange(steps + 1)
    current = wanted.float() / levels
    wrong = {}
    for guard, epsilon in ((0.0, 1e-3), (1e-3, 0.0), (0.0, 0.0)):
        method = RateEncoded(steps=steps, levels=levels, guard=guard, epsilon=epsilon, **FLAT)
        wrong[guard, epsilon] = int((counts(neuron(method, constant=True, dtype=torch.float32), current) != wanted).sum())
    assert wrong[0.0, 1e-3] == 0
    assert wrong[1e-3, 0.0] == 0
    assert wrong[0.0, 0.0] > 0, "without either the check would see nothing"


# E5: what a layer receives


@pytest.mark.parametrize(("steps", "levels"), EXACT)
def test_e5_the_mean_current_is_that_of_the_levels(steps: int, levels: float) -> None:
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(10, 6, generator=generator, dtype=F64)
    _, snn = twins(perceptron((6, 9, 8, 4)), images, RateEncoded(steps=steps, levels=levels, **FLAT))
    number = torch.randint(0, steps + 1, (50, 9), generator=generator)
    first = snn.neuron(snn.sites[0].name)
    linear = snn.network.get_submodule("2")
    with torch.no_grad():
        current = linear(first.amplitude * random_spikes(number, steps, generator)).mean(0)
        expected = number.double() / levels @ linear.weight.T + linear.bias
    assert float((current - expected).abs().max()) <= 1e-9
    assert not first.scaled
    assert float(first.amplitude) == pytest.approx(steps / levels)


# E6: the activation


@pytest.mark.parametrize(("steps", "levels"), PUBLISHED)
def test_e6_values_and_gradient(steps: int, levels: float) -> None:
    c = steps / levels
    layer = level_relu(RateEncoded(steps=steps, levels=levels, guard=0.0, **FLAT))
    # Binary fractions, which the ends of the range are for a power of two.
    u = torch.cat([torch.arange(-160, 1200, dtype=F64) / 128 * max(c, 1), torch.tensor([0.0, c], dtype=F64)])
    out = layer(u.requires_grad_())
    n = np.clip(np.floor(levels * u.detach().numpy()), 0, steps)
    assert np.allclose(out.detach().numpy(), n / levels, atol=1e-12)
    for g in (0.3, 5.0, -0.7, -3.0, 1.0):
        u.grad = None
        layer(u).backward(torch.full_like(u, g))
        inside = (u.detach().numpy() >= 0) & (u.detach().numpy() <= c)
        assert np.allclose(u.grad.numpy(), max(min(g, 1), -1) * inside)


def test_e6_the_range_without_levels_is_a_plain_clip() -> None:
    layer = level_relu(RateEncoded(steps=8, levels=10, **FLAT))
    layer.quantised = False
    u = torch.linspace(-1, 2, 50, dtype=F64)
    assert np.allclose(layer(u).numpy(), np.clip(u.numpy(), 0, 0.8))


def test_a_unit_scales_the_levels() -> None:
    method = RateEncoded(steps=8, levels=10, guard=0.0)
    layer = level_relu(RateEncoded(steps=8, levels=10, guard=0.0, **FLAT))
    layer.unit.fill_(2.5)
    u = torch.linspace(-1, 4, 300, dtype=F64)
    expected = np.clip(np.floor(10 * u.numpy() / 2.5), 0, 8)
    assert np.allclose(layer(u).numpy(), 2.5 * expected / 10)
    fired = counts(Neuron(method.neuron(SITE, layer), 8, True), u)
    assert float((fired.numpy() == expected).mean()) > 0.99
    layer.quantised = False
    assert np.allclose(layer(u).numpy(), np.clip(u.numpy(), 0, 2.0))


# E7, E8: pixels as spikes


def encoder(steps: int, levels: float, channels: int = 3, expansion: str = "none") -> tuple[Traced, qs.SpikingNetwork, Tensor]:
    """The 256 values of a pixel as an image of 16 x 16 in every channel."""
    pixels = (torch.arange(256).view(1, 1, 16, 16) / 255).repeat(1, channels, 1, 1)
    copies = 1 if expansion == "none" else 6
    network = nn.Sequential(nn.Conv2d(channels * copies, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2))
    ann, snn = twins(network, pixels, RateEncoded(steps=steps, levels=levels, encode_input=True, expansion=expansion, **FLAT))
    return ann, snn, pixels


@pytest.mark.parametrize(("steps", "levels"), [*EXACT, (32, 40), (8, 8)])
def test_e7_input_encoder(steps: int, levels: float) -> None:
    ann, snn, pixels = encoder(steps, levels)
    site = snn.sites[0]
    assert site.encodes_input
    assert not any(other.encodes_input for other in snn.sites[1:])
    expected = [min(math.floor(Fraction(levels) * k / 255), steps) for k in range(256)]
    trains = snn.neuron(site.name)(pixels).detach().unflatten(0, (steps, -1)).ne(0)[:, 0].flatten(2)
    for channel in range(3):
        assert trains[:, channel].sum(0).tolist() == expected
        assert (activations(ann, pixels)[site.name][1][0, channel].flatten() * levels).round().long().tolist() == expected
        for pixel in range(256):
            times = trains[:, channel, pixel].nonzero().flatten()
            gaps = times.diff().tolist()
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("expansion", "offsets"), [("cifar10", (-1, 1, 0, -1, 1, 0)), ("cifar100", (0, 1, -1, 0, 1, -1))])
@pytest.mark.parametrize(("steps", "levels"), [(1, 2.5), (8, 10)])
def test_e8_input_channel_expansion(steps: int, levels: float, expansion: str, offsets: tuple[int, ...]) -> None:
    ann, snn, pixels = encoder(steps, levels, expansion=expansion)
    site = snn.sites[0]
    assert site.shape == (18, 16, 16)
    values = activations(ann, pixels)[site.name][1][0].flatten(1)
    fired = snn.run(pixels).spikes[site.name][0].flatten(1)
    for copy, offset in enumerate(offsets):
        expected = [min(math.floor((Fraction(levels) + offset) * k / 255), steps) for k in range(256)]
        for channel in range(3 * copy, 3 * copy + 3):
            assert fired[channel].tolist() == expected
            assert values[channel].tolist() == pytest.approx([n / levels for n in expected], abs=1e-6)


def test_e8_copies_switch_at_three_brightnesses() -> None:
    ann, snn, pixels = encoder(1, 2.5, expansion="cifar10")
    site = snn.sites[0]
    for copy, edge in enumerate((2 / 3, 2 / 7, 2 / 5)):
        for brightness, expected in ((edge - 1e-3, 0), (edge + 1e-3, 1)):
            image = torch.full_like(pixels, brightness)
            assert (activations(ann, image)[site.name][1][0, 3 * copy] * 2.5).round().unique().tolist() == [expected]
            assert snn.run(image).spikes[site.name][0, 3 * copy].unique().tolist() == [expected]


def test_e8_the_channels_of_an_image_are_not_mixed() -> None:
    ann, _, pixels = encoder(8, 10, expansion="cifar10")
    image = pixels.clone()
    image[:, 1] = 0
    values = activations(ann, image)[ann.sites[0].name][1][0]
    assert [bool(values[channel].any()) for channel in range(18)] == [True, False, True] * 6


def test_pixels_outside_the_range_are_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 2))
    for bad in (-0.1, 1.1):
        images = torch.full((2, 3, 2, 2), 0.5)
        images[1, 0, 0, 0] = bad
        with pytest.raises(DataError, match=r"pixels.*\[0, 1\]"):
            qs.convert(network, images, RateEncoded(encode_input=True))


# E9: thresholds trained per channel


def three_channels() -> nn.Sequential:
    """Inputs a = 1/2 (spikes at 2 and 4) and b = 1/4 (spike at 4) of four steps; a - 2b, 2b and a go into the channels."""
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for layer, weight in ((0, [[1, 0], [0, 1]]), (2, [[1, -2], [0, 2], [1, 0]])):
            network[layer].weight.copy_(torch.tensor(weight))
            network[layer].bias.zero_()
    return network


def test_e9_thresholds_follow_the_gap_of_each_channel() -> None:
    rate, images = 0.1, torch.tensor([[0.5, 0.25], [0.0, 0.0]], dtype=F64)
    method = RateEncoded(steps=4, train_thresholds=True, threshold_rate=rate, **FLAT)
    plain = qs.convert(three_channels(), images, RateEncoded(steps=4, synchronous=False, **FLAT))
    assert plain.run(images).spikes["3"].tolist() == [[1, 1, 2], [0, 0, 0]]
    twin = qs.convert(three_channels(), images, RateEncoded(steps=4, **FLAT))
    assert twin.run(images).spikes["3"].tolist() == [[0, 2, 2], [0, 0, 0]]
    snn = qs.convert(three_channels(), images, method)
    # The mean over two images of one spike too many, and of one too few, in four steps.
    expected = [1 + rate * 1 / 8, 1 - rate * 1 / 8, 1.0]
    assert snn.neuron("3").threshold.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(snn.neuron("3").threshold[2]) == 1.0
    assert snn.neuron("1").threshold.tolist() == [1.0, 1.0]
    assert not snn.synchronous
    assert (snn.latency, twin.latency) == (4, 8)


def test_e9_the_update_is_in_units_of_the_range() -> None:
    images = torch.tensor([[0.5, 0.25]], dtype=F64)
    network = three_channels()
    snn = qs.convert(network, images, RateEncoded(steps=4, levels=2, train_thresholds=True, **FLAT))
    # C = 2: currents of half the threshold of before.
    assert snn.neuron("3").amplitude == 2.0
    assert snn.neuron("1").threshold.tolist() == [2.0, 2.0]
    doubled = qs.convert(network, images * 2, RateEncoded(steps=4, levels=2, train_thresholds=True, **FLAT))
    assert doubled.neuron("3").threshold.tolist() == pytest.approx([2 + 0.01 * 2 / 4, 2 - 0.01 * 2 / 4, 2.0], rel=1e-6)


def test_e9_constant_currents_change_nothing() -> None:
    generator = torch.Generator().manual_seed(8)
    network = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3)).double()
    images = torch.rand(20, 2, 6, 6, generator=generator, dtype=F64)
    for options in ({"epsilon": 1e-3, "guard": 0.0}, {}):
        method = RateEncoded(steps=8, levels=10, train_thresholds=True, threshold_passes=3, **FLAT, **options)
        threshold = qs.convert(network, images, method).neuron("1").threshold
        before = qs.convert(network, images, RateEncoded(steps=8, levels=10, **FLAT, **options)).neuron("1").threshold
        assert float(before) == pytest.approx(0.8 - options.get("epsilon", 0.0), abs=1e-6)
        assert threshold.shape == (5, 1, 1)
        assert torch.equal(threshold, before.expand(5, 1, 1))


def test_e9_thresholds_stay_positive_and_rates_come_closer() -> None:
    images = torch.rand(60, 6, generator=torch.Generator().manual_seed(9), dtype=F64)
    network = perceptron((6, 12, 12, 12, 4), seed=10, spread=2.5)
    snn = qs.convert(network, images, RateEncoded(steps=8, levels=10, synchronous=False, **FLAT))
    twin = snn.as_synchronous()

    def gap() -> float:
        wanted, given = twin.run(images).spikes, snn.run(images).spikes
        return sum(float((channel_rates(wanted[site.name], 8) - channel_rates(given[site.name], 8)).abs().sum()) for site in snn.sites)

    before = gap()
    train_thresholds(snn, ImageStream(images), 0.1, 30)
    assert gap() < 0.7 * before
    assert not any(unit.averaged for unit in snn.neurons().values())
    train_thresholds(snn, ImageStream(images), 10.0, 5)
    for site in snn.sites:
        unit = snn.neuron(site.name)
        assert float(unit.threshold.min()) >= 0.8e-3 * (1 - 1e-6)
        assert not unit.threshold.requires_grad


def test_channel_rates() -> None:
    fired = np.random.default_rng(11).integers(0, 9, (4, 3, 2, 5))
    assert channel_rates(torch.from_numpy(fired), 8).tolist() == pytest.approx((fired.mean((0, 2, 3)) / 8).tolist(), rel=1e-6)


# E10: streaming


def test_e10_streaming_at_one_step_and_at_eight() -> None:
    generator = torch.Generator().manual_seed(12)
    share = {}
    for steps, levels in ((1, 2.5), (8, 10)):
        method = RateEncoded(steps=steps, levels=levels, **FLAT)
        weight = torch.randn(40, 30, generator=generator, dtype=F64) / 30**0.5
        number = torch.randint(0, steps + 1, (400, 30), generator=generator)
        current = (steps / levels * random_spikes(number, steps, generator) @ weight.T * 2).flatten(0, 1)
        streaming, asg = (counts(neuron(method, averaged=averaged), current) for averaged in (False, True))
        exact = np.clip(np.floor(current.unflatten(0, (steps, -1)).mean(0).numpy() * levels + 1e-3), 0, steps)
        assert (asg.numpy() == exact).all()
        gap = (streaming - asg).abs()
        share[steps] = float((gap > 0).double().mean())
        if steps == 8:
            assert float((gap == 1).double().sum() / (gap > 0).double().sum()) > 0.5
    assert share[1] == 0
    assert 0.05 < share[8] < 0.6


# E11: batch norm and where C goes


@pytest.fixture
def normed() -> nn.Sequential:
    generator = torch.Generator().manual_seed(13)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)
    )
    network = network.double().eval()
    with torch.no_grad():
        for norm in (network[1], network[4]):
            for values in (norm.weight, norm.bias, norm.running_mean):
                values.copy_(0.3 * torch.randn(values.shape, generator=generator, dtype=F64) + (values is norm.weight))
            norm.running_var.copy_(0.5 + torch.rand(norm.running_var.shape, generator=generator, dtype=F64))
    return network


def test_e11_weights_carry_the_range_and_biases_do_not(normed: nn.Sequential) -> None:
    generator = torch.Generator().manual_seed(14)
    images = torch.rand(30, 2, 8, 8, generator=generator, dtype=F64)
    steps, levels, c = 8, 10, 0.8
    snn = qs.convert(normed, images, RateEncoded(steps=steps, levels=levels, **FLAT))
    with torch.no_grad():
        before = snn.run(images)
    for conv, norm in ((0, 1), (3, 4)):
        factor = normed[norm].weight / torch.sqrt(normed[norm].running_var + normed[norm].eps)
        folded = snn.network.get_submodule(str(conv))
        bias = normed[norm].bias + (normed[conv].bias - normed[norm].running_mean) * factor
        assert torch.allclose(folded.weight, normed[conv].weight * factor.view(-1, 1, 1, 1), rtol=0, atol=1e-12)
        assert torch.allclose(folded.bias, bias, rtol=0, atol=1e-12)
    # By hand into the published form: unit spikes, every linear map that reads spikes times C, biases as they are.
    with torch.no_grad():
        for site in snn.sites:
            assert float(snn.neuron(site.name).threshold) == pytest.approx(c)
            snn.neuron(site.name).amplitude.fill_(1.0)
        for layer in ("3", "7"):
            snn.network.get_submodule(layer).weight.mul_(c)
        after = snn.run(images)
    for site in snn.sites:
        assert torch.equal(before.spikes[site.name], after.spikes[site.name])
    assert torch.allclose(before.logits, after.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"synchronous": False}, {"train_thresholds": True}], ids=["averaged", "streaming", "trained"])
def test_with_pixels_as_spikes_no_layer_multiplies(options: dict[str, Any]) -> None:
    data = load_data("digits", preprocessing=Preprocessing((0.0,), (1.0,)))

    def counted(**more: Any) -> Operations:
        snn = qs.convert(digits_cnn(width=4), data.loader("train", limit=50), "rate_encoded", steps=4, **options, **more)
        return count_operations(snn, data.loader("test", limit=10))

    encoded, plain = counted(encode_input=True), counted()
    first_layer = plain.rows[0].dense
    assert plain.total("multiplies") > 0
    assert plain.total("multiplies") <= first_layer
    assert encoded.total("multiplies") == encoded.total("leaks") == 0
    assert encoded.metrics["Effective_MACs"] == 0
    first = next(row for row in encoded.rows if row.kind == "layer")
    assert (first.dense, first.accumulates > 0) == (first_layer, True)


# Training


class Watched:
    """A training that only notes whether the layers quantise in its stages."""

    def __init__(self, ann_of: Callable[[nn.Module], list[LevelReLU]]) -> None:
        self.fabric, self.ann_of = make_fabric("cpu"), ann_of
        self.stages: list[tuple[str, list[bool], dict[str, Any]]] = []

    def __call__(self, module: nn.Module, stage: str, **more: Any) -> History:
        self.stages.append((stage, [layer.quantised for layer in self.ann_of(module)], more))
        return History(stage)

    def accuracy(self, module: nn.Module) -> float | None:
        return None


@pytest.mark.parametrize("encode", [False, True])
def test_the_range_is_trained_before_the_levels(encode: bool) -> None:
    train = Watched(lambda module: [layer for layer in module.modules() if isinstance(layer, LevelReLU)])
    images = torch.rand(20, 6, generator=torch.Generator().manual_seed(15), dtype=F64)
    method = RateEncoded(steps=4, clamp_epochs=3, encode_input=encode)
    ann = fit(perceptron((6, 8, 7, 3)), ImageStream(images), method, train)
    assert [stage for stage, _, _ in train.stages] == ["clamp", "ann"]
    assert train.stages[0][1] == [True] * encode + [False, False]
    assert train.stages[0][2]["epochs"] == 3
    assert all(train.stages[1][1])
    assert all(ann.at(site).quantised for site in ann.sites)


def test_a_trained_network_and_its_twin(digits: DataSet) -> None:
    data = load_data("digits", preprocessing=Preprocessing((0.0,), (1.0,)))
    images = torch.cat([batch for batch, _ in data.loader("test", limit=100)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = digits_cnn(width=4)
    trainer = Trainer(fabric=make_fabric("cpu"), data=data, settings=Training(epochs=1, batch_size=64, learning_rate=0.01, validation=100))
    stream, method = ImageStream(images), RateEncoded(steps=8, levels=10, encode_input=True, clamp_epochs=1)
    ann = fit(network, stream, method, trainer)
    assert not torch.equal(ann.module.get_submodule("model.0").weight, trace(network, images).module.get_submodule("0").weight)
    ann.module.double()
    snn = finish(ann, stream, method)
    with torch.no_grad():
        wanted = ann.module(images.double())
        assert float((snn(images.double()) - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())
    assert snn.latency == 8 * len(snn.sites)


def test_a_layer_that_saw_nothing_or_a_foreign_one_is_refused() -> None:
    method = RateEncoded()
    with pytest.raises(ConversionError, match="no images"):
        method.neuron(SITE, method.activation(SITE))
    with pytest.raises(ConversionError, match="expected a LevelReLU"):
        method.neuron(SITE, nn.ReLU())
