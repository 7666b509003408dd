"""Networks in whole numbers: exact whatever the order of sums, and near the network that they come from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import quickspike as qs
from quickspike.errors import OptionError
from quickspike.neuron import Neuron, NeuronParameters
from quickspike.quantisation import GRADES, grid_of, quantise
from quickspike.simulation import simulate
from random_networks import NETWORKS, draw

WEIGHTED = (nn.Conv2d, nn.Linear)


def kept_layers(kept: tuple[str, ...]) -> set[str]:
    return {entry.partition(":")[0] for entry in kept}


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(**NETWORKS)
def test_sums_are_exact_so_that_precision_changes_no_spike(**drawn: object) -> None:
    snn, images = draw(**drawn)
    before = copy.deepcopy(snn.state_dict())
    quantised = quantise(snn)
    assert all(torch.equal(value, before[name]) for name, value in snn.state_dict().items())
    network = quantised.network
    kept = kept_layers(quantised.kept)
    for name, layer in network.network.named_modules():
        if isinstance(layer, WEIGHTED) and name not in kept:
            assert torch.equal(layer.weight, layer.weight.round())
            assert bool((layer.weight.abs() <= 127).all())
            assert layer.bias is None or torch.equal(layer.bias, layer.bias.round())
    single, double = simulate(network, images), simulate(copy.deepcopy(network).double(), images.double())
    # The layer that reads the image, and what stays in floating point, may round differently; with leaks all may.
    if kept <= {"stem"} and not drawn["leaky"]:
        assert {site: counts.tolist() for site, counts in single.spikes.items()} == {s: c.tolist() for s, c in double.spikes.items()}


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(**NETWORKS)
def test_with_a_whole_image_the_first_layer_is_exact_too(**drawn: object) -> None:
    snn, images = draw(**drawn)
    images = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) / 3
    quantised = quantise(snn, image_bits=10)
    kept = kept_layers(quantised.kept)
    assert "stem" not in kept
    network = quantised.network
    single, double = simulate(network, images), simulate(copy.deepcopy(network).double(), images.double())
    if not kept and not drawn["leaky"]:
        assert {site: counts.tolist() for site, counts in single.spikes.items()} == {s: c.tolist() for s, c in double.spikes.items()}


@pytest.mark.parametrize("bits", [2, 8, 12])
def test_the_image_is_rounded_to_its_steps(bits: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    snn = qs.convert(nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(64, 3), steps=4)
    network = quantise(snn, image_bits=bits).network
    seen: list[Tensor] = []
    network.network.get_submodule("0").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.randn(50, 3).clamp(-4, 4)
    network(images)
    step = 4 / 2 ** (bits - 1)
    assert torch.equal(seen[0], (images / step).round())
    # The layer's weights take the step in.
    unit = network.network.get_submodule("0").weight.abs().amax(1)
    assert bool((unit == 127).all())


@pytest.mark.parametrize("image_bits", [0, 1, 13, 8.0, True, "8"])
def test_image_bits_out_of_range(image_bits: Any) -> None:
    torch.manual_seed(0)
    snn = qs.convert(Two().eval(), torch.randn(8, 3), steps=2)
    with pytest.raises(OptionError, match="image_bits"):
        quantise(snn, image_bits=image_bits)


def test_a_whole_image_in_other_precisions_and_what_it_costs() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3)
    snn = quantise(qs.convert(Two().eval(), images, steps=8), image_bits=10).network
    wanted = snn(images)
    torch.testing.assert_close(copy.deepcopy(snn).double()(images.double()).float(), wanted)
    # Bfloat16 has 8 bits for every number; it is off by that, not by everything.
    assert (copy.deepcopy(snn).bfloat16()(images.bfloat16()).float() - wanted).abs().mean() < 0.1 * wanted.abs().mean()
    layer = next(row for row in qs.count_operations(snn, images).rows if row.name == "first")
    assert layer.kind == "layer"


class Two(nn.Module):
    """One layer on the image, one on spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(3, 6), nn.Linear(6, 5), nn.ReLU()
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.second(self.relu(self.first(x)))))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_the_nearest_on_their_grid_and_thresholds_follow(bits: int) -> None:
    torch.manual_seed(0)
    snn = qs.convert(Two(), torch.randn(40, 3), "threshold_balancing", steps=4)
    first, second = snn.neurons().values()
    heights = (first.amplitude * first.threshold).reshape(-1).expand(6)
    folded = snn.network.second.weight.detach() * heights
    top = 2 ** (bits - 1) - 1
    unit = grid_of(folded, top)
    network = quantise(snn, bits).network
    wanted = (folded / unit[:, None]).round().clamp(-top, top)
    assert torch.equal(network.network.second.weight, wanted)
    assert torch.equal(network.network.second.bias, (snn.network.second.bias.detach() / unit).round())
    theta = network.neuron(list(snn.neurons())[1]).threshold
    # Even, and at least 2: silent channels have next to no threshold.
    assert float((theta - (second.threshold.reshape(-1).expand(5) / unit).clamp_min(2)).abs().max()) <= 1
    assert torch.equal(theta, 2 * (theta / 2).round())


def test_the_grid_has_the_least_squared_error_of_its_candidates() -> None:
    weight = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    for top in (1, 7, 127):
        unit = grid_of(weight, top)
        assert bool((unit > 0).all())

        def error(unit: Tensor, top: int = top) -> Tensor:
            return ((weight / unit[:, None]).round().clamp(-top, top) * unit[:, None] - weight).square().sum(1)

        for share in (0.5, 0.7, 1.0):
            assert bool((error(unit) <= error(weight.abs().amax(1).clamp_min(1e-9) * share / top) + 1e-6).all())


@pytest.mark.parametrize(("bits", "loss"), [(8, 1.0), (4, 3.0)])
def test_digits_lose_next_to_nothing(
    bits: int, loss: float, spiking_digits: Callable[[str], qs.SpikingNetwork], digits_test: tuple[Tensor, Tensor]
) -> None:
    snn, (images, labels) = spiking_digits("threshold_balancing"), digits_test

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((network(images).argmax(1) == labels).double().mean())

    assert accuracy(snn) > 98
    assert accuracy(quantise(snn, bits).network) >= accuracy(snn) - loss


def test_values_stay_near_those_of_the_network() -> None:
    torch.manual_seed(3)
    model, images = Two(), torch.randn(400, 3)
    snn = qs.convert(model, images, "threshold_balancing", steps=16)
    wanted = snn(images)
    spread = float(wanted.detach().std())
    errors = [float((quantise(snn, bits).network(images) - wanted).detach().square().mean().sqrt()) / spread for bits in (8, 6, 4)]
    assert errors[0] < 0.05
    assert errors[0] < errors[2]


class Added(nn.Module):
    """Spikes of two heights, added, and read by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.a(x)) + self.relu(self.b(x)))


def test_spikes_of_different_heights_add_up_to_small_whole_numbers() -> None:
    torch.manual_seed(0)
    snn = qs.convert(Added(), torch.randn(50, 3), "threshold_balancing", steps=4)
    seen: list[Tensor] = []
    network = quantise(snn).network
    network.network.last.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    network(torch.randn(20, 3))
    sums = seen[0].detach()
    assert torch.equal(sums, sums.round())
    assert float(sums.min()) == 0
    assert GRADES - 1 <= float(sums.max()) <= GRADES + 1


def test_heights_per_neuron_stay_in_floating_point() -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))
    snn = qs.convert(conv, torch.randn(40, 1, 3), "threshold_balancing", steps=4)
    (site,) = snn.neurons()
    parameters = NeuronParameters(torch.ones(2, 3), amplitude=torch.rand(2, 3) + 0.5)
    snn.network.set_submodule(site, Neuron(parameters, 4, True))
    images = torch.randn(5, 1, 3)
    quantised = quantise(snn)
    assert len(quantised.kept) == 2
    torch.testing.assert_close(quantised.network(images), snn(images))


@pytest.mark.parametrize("bits", [1, 9, 8.0, True, "8"])
def test_bits_out_of_range(bits: object) -> None:
    snn = qs.convert(Two(), torch.randn(4, 3), "threshold_balancing", steps=1)
    with pytest.raises(OptionError, match="bits must be a whole number in"):
        quantise(snn, bits)


def test_it_is_saved_like_any_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 3)
    network = quantise(qs.convert(Two(), images, "threshold_balancing", steps=4), 5).network
    network.save(tmp_path / "network.safetensors")
    loaded = qs.load(tmp_path / "network.safetensors")
    assert torch.equal(loaded(images), network(images))
    assert loaded.provenance["weight_bits"] == 5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_channels_without_weights_neither_fire_by_themselves_nor_spoil_their_layer(scale: float, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Two()
    with torch.no_grad():
        model.second.weight[1:3] *= scale
        if bias:
            model.second.bias[1], model.second.bias[2] = 0.3, -0.3
        else:
            model.second.bias.zero_()
    images = torch.randn(200, 3)
    snn = qs.convert(model, images, "threshold_balancing", steps=8)
    quantised = quantise(snn)
    assert quantised.kept == ("first: reads no spikes",)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in quantised.network.parameters())
    site = list(snn.neurons())[1]
    expected, found = simulate(snn, images).spikes[site], simulate(quantised.network, images).spikes[site]
    assert torch.equal(found[:, 1:3], expected[:, 1:3])
    assert bool(expected[:, 1].any()) == bias
    quantised.network.save(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(qs.accelerate(snn, "integer")(images), quantised.network(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    snn = qs.convert(Two(), torch.randn(8, 3), "threshold_balancing", steps=1).to(dtype)
    with pytest.raises(OptionError, match=r"call quantise\(snn.float\(\)\)"):
        quantise(snn)


@pytest.mark.parametrize("joined", ["added", "concatenated"])
@pytest.mark.parametrize("bits", [4, 10])
def test_an_image_beside_spikes_stays_real(joined: str, bits: int) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3 if joined == "added" else 6, 4, 3)
            self.head = nn.Linear(4 * 36, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            y = y + x if joined == "added" else torch.cat([y, x], 1)
            return self.head(torch.relu(self.second(y)).flatten(1))

    torch.manual_seed(0)
    images = torch.randn(32, 3, 8, 8)
    snn = qs.convert(Beside().eval(), images, "potential_init", steps=8)
    wanted = snn(images)
    away = [(quantise(snn, image_bits=one).network(images) - wanted).abs().mean() for one in (None, bits)]
    assert away[1] < away[0] + (0.05 if bits == 4 else 0.015)
