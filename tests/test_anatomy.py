"""The split of the conversion error: it adds up, and a planted fault is named with its site and its source."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import quickspike as qs
from quickspike.anatomy import OWN, PARTS, Anatomy, SiteAnatomy, advice, anatomy_of, main_source, without_spikes
from quickspike.conversion import SpikingNetwork
from quickspike.errors import ConversionError, DataError
from quickspike.models import load_model
from quickspike.neuron import Neuron, unfold
from quickspike.simulation import simulate
from random_networks import NETWORKS, draw

Digits = Callable[[str], SpikingNetwork]


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(**NETWORKS)
def test_the_parts_add_up_to_the_error(**drawn: object) -> None:
    snn, images = draw(**drawn)
    found = anatomy_of(snn, images)
    assert [one.site for one in found.sites] == [site.name for site in snn.sites]
    for one in found.sites:
        assert set(one.shares) == set(one.sizes) == set(one.biases) == set(PARTS)
        if one.error:
            assert sum(one.shares.values()) == pytest.approx(1, abs=1e-4)
        # A root mean square is at most the sum of those of its parts.
        assert one.error <= sum(one.sizes.values()) + 1e-6
        assert one.own <= sum(one.sizes[name] for name in OWN) + 1e-6
        assert sum(one.rates) == pytest.approx(1)
        if one.branches:
            assert sum(one.branches.values()) == pytest.approx(1, abs=1e-3)
    first = found.sites[0]
    # The image is the same at every step and has no error.
    assert first.sizes["inherited"] < 1e-5
    assert first.sizes["unevenness"] < 1e-5
    assert all(one.sizes["neuron"] < 1e-6 for one in found.sites)


def test_the_error_is_that_of_the_mean_output(spiking_digits: Digits, digits_test: tuple[Tensor, Tensor], digits_source: nn.Module) -> None:
    snn, images = spiking_digits("threshold_balancing").with_steps(4), digits_test[0][:100]
    found = {one.site: one for one in anatomy_of(snn, images).sites}
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda *arguments, name=name: seen.__setitem__(name, arguments[2]))
        for network in (snn.network, digits_source)
        for name, module in network.named_modules()
        if isinstance(module, (Neuron, nn.ReLU))
    ]
    with torch.no_grad():
        snn(images)
        outputs = {name: unfold(value, 4).mean(0) for name, value in seen.items()}
        seen.clear()
        digits_source.eval()(images)
    for hook in hooks:
        hook.remove()
    assert outputs.keys() == found.keys()
    for name, out in outputs.items():
        wanted = seen[name].relu()
        unit = wanted.square().mean().sqrt()
        assert found[name].error == pytest.approx(float((out - wanted).square().mean().sqrt() / unit), rel=1e-3)
        assert sum(found[name].biases.values()) == pytest.approx(float((out - wanted).mean() / unit), rel=1e-2, abs=1e-4)
    spikes = simulate(snn, images).spikes
    for name, counts in spikes.items():
        assert found[name].silent == pytest.approx(float((counts == 0).double().mean()))
        assert found[name].saturated == pytest.approx(float((counts == 4).double().mean()))


@pytest.mark.parametrize("quantised", [False, True])
def test_the_network_without_spikes_is_the_source(
    quantised: bool, spiking_digits: Digits, digits_test: tuple[Tensor, Tensor], digits_source: nn.Module
) -> None:
    snn = spiking_digits("threshold_balancing")
    plain = without_spikes(qs.quantise(snn).network if quantised else snn, digits_test[0])
    with torch.no_grad():
        wanted = digits_source.eval()(digits_test[0])
    error = float((plain - wanted).norm() / wanted.norm())
    # In whole numbers its spikes have height 1 and its thresholds are integers: the activations have other units.
    assert error < (0.05 if quantised else 1e-5)


def test_layers_that_wait_for_whole_windows_have_no_unevenness(spiking_digits: Digits, digits_test: tuple[Tensor, Tensor]) -> None:
    streaming = spiking_digits("threshold_balancing").with_steps(4)
    one, other = (anatomy_of(network, digits_test[0][:50]) for network in (streaming, streaming.as_synchronous()))
    assert max(site.sizes["unevenness"] for site in one.sites) > 0.05
    assert max(site.sizes["unevenness"] for site in other.sites) < 1e-4
    assert max(site.outside or 0 for site in one.sites) > 0.01
    assert all(site.outside == 0 for site in other.sites)
    assert all(len(site.rates) == 5 for site in one.sites)


def faults() -> dict[str, tuple[Callable[[Neuron], None], str]]:
    def smaller(neuron: Neuron) -> None:
        neuron.threshold.data /= 10

    def larger(neuron: Neuron) -> None:
        neuron.threshold.data *= 10

    def hard_reset(neuron: Neuron) -> None:
        def forward(current: Tensor) -> Tensor:
            theta, _ = neuron.bounded()
            v, spikes = neuron.initial * theta, []
            for part in unfold(current if not neuron.constant_input else current.repeat(neuron.steps, 1, 1, 1), neuron.steps):
                v = v + part
                fired = (v >= theta).float()
                spikes.append(fired * theta)
                v = v * (1 - fired)
            return torch.cat(spikes)

        neuron.forward = forward

    return {"threshold / 10": (smaller, "clipping"), "threshold x 10": (larger, "quantisation"), "hard reset": (hard_reset, "neuron")}


@pytest.mark.parametrize("site", [0, 1, 2, 3])
@pytest.mark.parametrize("fault", faults())
def test_a_planted_fault_is_named(fault: str, site: int, spiking_digits: Digits, digits_test: tuple[Tensor, Tensor]) -> None:
    snn = spiking_digits("threshold_balancing").with_steps(8)
    plant, source = faults()[fault]
    name = snn.sites[site].name
    plant(snn.neuron(name))
    found = anatomy_of(snn, digits_test[0][:100])
    assert found.worst.site == name
    assert main_source(found.worst.sizes) == source
    assert source in found.worst.advice


CHECKPOINTS = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="needs the published ResNet-20")
@pytest.mark.parametrize("site", [0, 4, 9, 14, 18])
@pytest.mark.parametrize("fault", faults())
def test_a_fault_planted_in_a_published_network_is_named(fault: str, site: int, resnet20: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = copy.deepcopy(resnet20[0]), resnet20[1]
    plant, source = faults()[fault]
    name = snn.sites[site].name
    plant(snn.neuron(name))
    found = anatomy_of(snn, images).worst
    assert (found.site, main_source(found.sizes)) == (name, source)


@pytest.fixture(scope="module")
def resnet20() -> tuple[SpikingNetwork, Tensor]:
    """The network, and images of coloured clouds."""
    images = F.interpolate(torch.randn(124, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size=32, mode="bicubic")
    folder = CHECKPOINTS / "checkpoints"
    model = load_model(f"{folder / 'networks.py'}:resnet20_cifar10", folder / "resnet20_cifar10.th")
    return qs.convert(model, images[:100], steps=8), images[100:]


class Pooled(nn.Module):
    """Max-pooling, and a residual join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.mixed, self.fc = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv(F.relu(self.stem(x))), 2))
        return self.fc(F.relu(x + self.mixed(x)).mean((2, 3)))


def test_pools_and_joins_are_told_apart() -> None:
    torch.manual_seed(0)
    images = torch.rand(20, 1, 12, 12)
    snn = qs.convert(Pooled(), images, steps=3)
    stem, pooled, joined = anatomy_of(snn, images).sites
    assert (stem.sizes["max-pooling"], joined.sizes["max-pooling"]) == (0, 0)
    # The largest of several values that err is too large.
    assert pooled.sizes["max-pooling"] > 0.01
    assert pooled.biases["max-pooling"] > 0
    assert joined.branches.keys() == {pooled.site, "mixed"}
    assert sum(joined.branches.values()) == pytest.approx(1, abs=1e-3)
    assert stem.branches == pooled.branches == {}


def test_a_branch_is_called_by_the_layer_that_it_comes_from() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return F.relu(self.second(x) + F.pad(x, (0, 0, 0, 0, 1, 1))).mean((2, 3))

    torch.manual_seed(0)
    images = torch.rand(20, 1, 8, 8)
    first, joined = anatomy_of(qs.convert(Padded(), images, steps=3), images).sites
    assert joined.branches.keys() == {first.site, "second"}


def test_spikes_that_are_taken_back_are_subtracted() -> None:
    """Two neurons that fire at steps 2, 4, 7 and at step 4 drive one by +1 and -2: it fires at 2, 3, takes back at 4, 5, fires at 7, 8."""
    images = torch.tensor([[0.4, 0.15]])
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
    first.weight.data, second.weight.data = torch.eye(2), torch.tensor([[1.0, -2.0]])
    source = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
    snn = qs.convert(source, images, "threshold_balancing", steps=8, initial=0.5, signed=True)
    for name, theta in (("1", 1.0), ("3", 0.5)):
        snn.neuron(name).threshold.data.fill_(theta)
    seen: list[Tensor] = []
    snn.neuron("3").register_forward_hook(lambda *given: seen.append(given[2]))
    found = anatomy_of(snn, images).sites[1]
    assert seen[0].sign().flatten().tolist() == [0, 1, 1, -1, -1, 0, 1, 1]
    # 0.25 at first, 3 - 2 came in, two spikes of 0.5 went out.
    assert found.outside == 0
    assert [place for place, share in enumerate(found.rates) if share] == [2]
    assert (found.silent, found.saturated) == (0, 0)


def test_bad_layers_are_listed_worst_first(spiking_digits: Digits, digits_test: tuple[Tensor, Tensor]) -> None:
    found = anatomy_of(spiking_digits("threshold_balancing").with_steps(2), digits_test[0][:30])
    assert [one.own for one in found.bad] == sorted((one.own for one in found.sites if one.advice), reverse=True)
    assert len(found.bad) > 1


def test_advice_is_given_where_it_is_needed() -> None:
    def site(error: float, own: float, source: str, initial: float = 0.5) -> SiteAnatomy:
        parts = dict.fromkeys(PARTS, 0.0) | {source: error}
        shares = dict.fromkeys(PARTS, 0.0) | {source: 1.0}
        return SiteAnatomy("a.relu", error, own, shares, parts, parts, {}, 0.0, 0.0, initial, 0.0, ())

    assert advice(site(0.01, 0.01, "clipping")) == ""
    assert advice(site(0.5, 0.5, "clipping")).startswith(
        "a.relu: error 50 % of the activations, 100 % of it clipping; raise the percentile"
    )
    assert "theta/2" in advice(site(0.5, 0.5, "quantisation", initial=0.0))
    assert "theta/2" not in advice(site(0.5, 0.5, "quantisation"))
    assert "sites before it" in advice(site(0.5, 0.0, "inherited"))
    assert "before" not in advice(site(0.5, 0.5, "clipping"))
    mixed = site(0.5, 0.1, "clipping")
    mixed = dataclasses.replace(mixed, shares=mixed.shares | {"clipping": 0.2, "inherited": 0.8})
    assert "20 % of it clipping (80 % comes from the sites before it); raise" in advice(mixed)


def test_what_has_no_anatomy_is_refused(spiking_digits: Digits, digits_test: tuple[Tensor, Tensor]) -> None:
    snn = spiking_digits("threshold_balancing")
    with pytest.raises(DataError, match="no images"):
        anatomy_of(snn, [])
    with pytest.raises(DataError, match="NaN or infinite"):
        anatomy_of(snn, digits_test[0][:3] * float("nan"))
    windows = qs.accelerate(qs.quantise(snn).network.as_synchronous(), "count")
    with pytest.raises(ConversionError, match="count engine"):
        anatomy_of(windows, digits_test[0])


def test_it_is_plain_data_and_leaves_the_network_alone(spiking_digits: Digits, digits_test: tuple[Tensor, Tensor]) -> None:
    snn = spiking_digits("threshold_balancing")
    before = {name: value.clone() for name, value in snn.state_dict().items()}
    found: Anatomy = anatomy_of(snn, digits_test[0][:10])
    assert found.to_json()["sites"][0]["shares"].keys() == set(PARTS)
    assert all(torch.equal(value, before[name]) for name, value in snn.state_dict().items())
