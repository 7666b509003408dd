"""`fold`: thresholds and heights of 1 everywhere, and the spikes of the network that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quickspike as qs
from quickspike.conversion import SpikingNetwork
from quickspike.errors import ConversionError, OptionError
from quickspike.models import load_model
from quickspike.operators import Affine
from quickspike.quantisation import quantise
from quickspike.simulation import simulate
from random_networks import LAYERS, NETWORKS, draw, draw_layers


def same(snn: SpikingNetwork, folded: SpikingNetwork, images: Tensor, spiking: bool = True) -> None:
    """Both give the same spikes, in double precision, where rounding moves none."""
    one, other = (simulate(network.with_steps(network.steps).double(), images.double()) for network in (snn, folded))
    assert list(one.spikes) == list(other.spikes)
    for site, counts in one.spikes.items():
        assert torch.equal(counts, other.spikes[site]), site
    assert sum(int(counts.abs().sum()) for counts in one.spikes.values()) > 0 or not spiking
    scale = max(1.0, float(one.logits.detach().abs().max()))
    assert float((one.logits - other.logits).detach().abs().max()) < 1e-9 * scale


def untied(drawn: tuple[SpikingNetwork, Tensor]) -> tuple[SpikingNetwork, Tensor]:
    """The network in double precision with thresholds that no potential meets: rounding alone would say what happens there."""
    snn, images = drawn
    with torch.no_grad():
        for neuron in snn.double().neurons().values():
            neuron.threshold.mul_(1 + 0.1 * torch.rand(neuron.threshold.shape))
    return snn, images


def all_ones(snn: SpikingNetwork) -> bool:
    return all(bool((neuron.threshold == 1).all() and (neuron.amplitude == 1).all()) for neuron in snn.neurons().values())


def scales(snn: SpikingNetwork) -> list[str]:
    return [name for name, layer in snn.network.named_modules() if isinstance(layer, Affine)]


@settings(max_examples=20, deadline=None)
@given(**cast(Any, NETWORKS))
def test_drawn_networks_give_the_same_spikes(**drawn: Any) -> None:
    snn, images = untied(draw(**drawn))
    folded = snn.fold()
    assert all_ones(folded)
    same(snn, folded, images, spiking=False)


@settings(max_examples=12, deadline=None)
@given(**cast(Any, LAYERS))
def test_drawn_layers_give_the_same_spikes(**drawn: Any) -> None:
    snn, images = untied(draw_layers(**drawn))
    folded = snn.fold()
    assert all_ones(folded)
    same(snn, folded, images, spiking=False)


@settings(max_examples=8, deadline=None)
@example(
    bits=2,
    channels=1,
    blocks=[("plain", "overlapping average", False)],
    head="global",
    steps=1,
    seed=0,
    leaky=False,
    strict=False,
    granular=False,
)
@given(bits=st.sampled_from([2, 4, 8]), **cast(Any, NETWORKS))
def test_whole_numbers_times_a_scale_per_channel_give_the_spikes_of_the_quantised_network(bits: int, **drawn: Any) -> None:
    snn, images = untied(draw(**drawn))
    folded = snn.fold(bits)
    assert all_ones(folded)
    same(quantise(snn, bits).network, folded, images, spiking=False)


class Residual(nn.Module):
    """A shortcut without weights, narrowed and widened, behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(2)
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem(x)))
        y = self.conv2(F.relu(self.conv1(x)))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))
        x = F.relu(self.conv3(x) + x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def residual() -> tuple[SpikingNetwork, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(20, 3, 16, 16)
    return qs.convert(Residual(), images, "threshold_balancing", steps=6), images


def test_a_shortcut_without_weights_keeps_a_scale_and_nothing_else_does(residual: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = residual
    folded = snn.fold()
    assert len(scales(folded)) == 2  # one for each shortcut
    assert all_ones(folded)
    same(snn.double(), snn.double().fold(), images)


def test_a_shortcut_between_neurons_alike_needs_none(residual: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = residual
    for neuron in snn.neurons().values():
        neuron.threshold.fill_(0.5)
    # Spikes of height 1/2 behind the pooling of four count in eighths; only they are scaled.
    assert len(scales(snn.fold())) == 1
    same(snn.double(), snn.double().fold(), images)


def test_averages_become_sums(residual: tuple[SpikingNetwork, Tensor]) -> None:
    folded = residual[0].fold()
    pools = [layer for layer in folded.network.modules() if isinstance(layer, nn.AvgPool2d)]
    assert [pool.divisor_override for pool in pools] == [1, 1]
    seen: list[Tensor] = []
    for pool in pools:
        pool.register_forward_hook(lambda _, __, out: seen.append(out))
    folded(residual[1])
    assert all(torch.equal(out, out.round()) and int(out.detach().max()) > 1 for out in seen)


def test_weights_are_those_in_units_of_threshold_and_height() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    snn = qs.convert(model, torch.randn(50, 3), "ultra_low_latency", steps=2)
    first, second = snn.neurons().values()
    heights = first.amplitude * first.threshold if first.scaled else first.amplitude
    assert float((heights - first.threshold).abs().max()) > 0  # so that the two are told apart
    folded = snn.fold().network
    middle = cast(Any, snn.network.get_submodule("2"))
    wanted = middle.weight * heights.reshape(-1) / second.threshold.reshape(-1, 1)
    assert torch.allclose(cast(Any, folded.get_submodule("2")).weight, wanted, rtol=1e-6)
    assert torch.allclose(cast(Any, folded.get_submodule("2")).bias, middle.bias / second.threshold.reshape(-1), rtol=1e-6)
    assert torch.allclose(cast(Any, folded.get_submodule("0")).weight, cast(Any, snn.network.get_submodule("0")).weight / first.threshold)
    assert torch.equal(cast(Any, folded.get_submodule("4")).bias, cast(Any, snn.network.get_submodule("4")).bias)


@pytest.mark.parametrize("options", [{"synchronous": True}, {"signed": True}, {"granularity": "channel"}])
def test_how_neurons_work_stays(options: dict[str, Any], residual: tuple[SpikingNetwork, Tensor]) -> None:
    images = residual[1]
    torch.manual_seed(0)
    snn = qs.convert(Residual(), images, "threshold_balancing", steps=6, **options).double()
    folded = snn.fold()
    same(snn, folded, images)
    for one, other in zip(snn.neurons().values(), folded.neurons().values(), strict=True):
        assert (one.averaged, one.signed, one.strict) == (other.averaged, other.signed, other.strict)
        assert torch.equal(one.initial, other.initial)


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "fast_resnet", "resnet20"])
def test_the_networks_of_the_papers_fold(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    model = load_model(name).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 32, 32))
    snn = qs.convert(model.eval(), images, "threshold_balancing", steps=2).double()
    folded = snn.fold()
    assert all_ones(folded)
    same(snn, folded, images)


def test_it_is_saved_and_loaded(residual: tuple[SpikingNetwork, Tensor], tmp_path: Path) -> None:
    folded = residual[0].fold()
    folded.save(tmp_path / "folded.safetensors")
    again = qs.load(tmp_path / "folded.safetensors")
    assert torch.equal(again(residual[1]), folded(residual[1]))
    assert again.provenance["folded"] is True


def test_the_network_itself_is_not_touched(residual: tuple[SpikingNetwork, Tensor]) -> None:
    snn, _ = residual
    before = {name: tensor.clone() for name, tensor in snn.state_dict().items()}
    code = snn.code
    snn.fold()
    assert snn.code == code
    assert all(torch.equal(tensor, before[name]) for name, tensor in snn.state_dict().items())
    assert "folded" not in snn.provenance


def test_thresholds_of_single_neurons_are_refused(residual: tuple[SpikingNetwork, Tensor]) -> None:
    snn, _ = residual
    site = snn.sites[1]
    neuron = snn.neuron(site.name)
    neuron.threshold = nn.Parameter(torch.rand(site.shape) + 0.5, False)
    with pytest.raises(ConversionError, match=f"{site.name}: thresholds or heights differ within a channel"):
        snn.fold()


def test_an_accelerated_network_is_refused(residual: tuple[SpikingNetwork, Tensor]) -> None:
    with pytest.raises(OptionError, match="made for the fused engine; fold the one it was made from"):
        qs.accelerate(residual[0], "fused").fold()
    with pytest.raises(OptionError, match="bits must be a whole number"):
        residual[0].fold(bits=9)


class Tied(nn.Module):
    """A weight that a layer and a call read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.linear(F.relu(self.linear(x)))), self.linear.weight)


class Axes(nn.Module):
    """Poolings and paddings for maps, on signals with one axis: they go over the channels too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer, self.last = nn.Conv1d(3, 4, 3, padding=1), layer, nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.layer(F.relu(self.conv(x)))).flatten(1))


class Computed(nn.Module):
    """A pooling whose size is that of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.last(F.avg_pool2d(x, x.size(-1)).flatten(1))


AXES = (nn.MaxPool2d((3, 1), 1, (1, 0)), nn.AvgPool2d(2), nn.ZeroPad2d(1), nn.AdaptiveAvgPool2d((4, 2)))


@pytest.mark.parametrize(
    ("model", "shape"), [(Tied(), (5,)), *((Axes(layer), (3, 8)) for layer in AXES), (Computed(), (3, 8, 8))], ids=lambda one: str(one)[:24]
)
def test_what_units_do_not_pass_through(model: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    images = torch.randn(20, *shape)
    model(images)
    snn, _ = untied((qs.convert(model.eval(), images, "threshold_balancing", steps=5, granularity="channel"), images))
    folded = snn.fold()
    assert all_ones(folded)
    same(snn, folded, images)


def test_heights_of_zero_count_nothing() -> None:
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.a(x)) + F.relu(self.b(x)))

    images = torch.randn(20, 3)
    snn = qs.convert(Sum(), images, steps=4).double()
    next(iter(snn.neurons().values())).amplitude.fill_(0.0)
    # Spikes of height 0 are none where they are counted, and spikes in the folded network.
    assert torch.allclose(snn(images.double()), snn.fold()(images.double()), atol=1e-12)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
def test_whole_numbers_under_a_reset_to_zero(bits: int, strict: bool, residual: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = residual
    hard = snn.with_steps(12).with_reset("zero").double()
    for neuron in hard.neurons().values():
        neuron.strict = strict
    same(quantise(hard, bits).network, hard.fold(bits), images)


class Once(nn.Module):
    """A weight of a layer that reads spikes, and of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.linear(F.relu(self.first(x)))), self.linear.weight)


def test_weights_that_are_read_by_name_stay_when_layers_are_rounded() -> None:
    torch.manual_seed(0)
    images = torch.randn(40, 5)
    snn, _ = untied((qs.convert(Once(), images, steps=8), images))
    same(snn, snn.fold(), images)
    wanted, found = snn(images.double()).detach(), quantise(snn).network(images.double()).detach()
    assert float((found - wanted).abs().mean()) < 0.1 * float(wanted.abs().mean())
