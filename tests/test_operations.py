"""Operations counted by the network against operations counted one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import quickspike as qs
from quickspike.conversion import SpikingNetwork
from quickspike.energy import DEVICES, Device, energy_of, register_device
from quickspike.errors import ConversionError, DataError, OptionError, UnknownNameError
from quickspike.operations import Counts, Operations, count_operations
from quickspike.simulation import simulate
from random_networks import NETWORKS, draw


def targets(size: int, out: int, kernel: int, stride: int, padding: int) -> list[int]:
    """How many windows see each place of an axis."""
    return [sum(0 <= place - (index * stride - padding) < kernel for index in range(out)) for place in range(size)]


def three_layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 4),
    )


@pytest.mark.parametrize("first", ["once", "every step"])
@pytest.mark.parametrize("leak", [1.0, 0.5])
def test_three_layers_by_hand(first: str, leak: float) -> None:
    images, steps = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)), 3
    snn = qs.convert(three_layers(), images, steps=steps)
    for neuron in snn.neurons().values():
        neuron.leak.data.fill_(leak)
    counted = count_operations(snn, images, first)
    rows = {(row.name, row.kind): row for row in counted.rows}
    one, other = (counts.double().mean(0) for counts in simulate(snn, images).spikes.values())
    assert one.sum() > 0
    assert other.sum() > 0
    # 4 x 4 pixels, 3 x 3 windows with a border: 10 of 12 taps along an axis lie inside.
    first_macs = 10 * 10 * 2
    often = 1 if first == "once" else steps
    seen = torch.tensor(targets(4, 2, 3, 2, 1), dtype=torch.float64)
    assert seen.tolist() == [1, 2, 1, 1]
    # Each spike of the first layer meets the windows that see its place, in each of three channels.
    second = float((one.sum(0) * seen[:, None] * seen[None, :]).sum() * 3)
    # Each spike of the second layer travels through the pooling to all four outputs.
    third = float(other.sum() * 4)
    expected = {
        ("0", "layer"): Counts("0", "layer", first_macs, first_macs * often, 0, 32 * often, 32),
        ("1", "neurons"): Counts("1", "neurons", updates=32 * steps, leaks=0 if leak == 1 else 32 * steps, spikes=float(one.sum())),
        ("2", "layer"): Counts("2", "layer", 5 * 5 * 2 * 3, 0, second),
        ("3", "neurons"): Counts("3", "neurons", updates=12 * steps, leaks=0 if leak == 1 else 12 * steps, spikes=float(other.sum())),
        ("6", "layer"): Counts("6", "layer", 12, 0, third, 4 * steps, 4),
    }
    assert rows.keys() == expected.keys()
    for key, row in expected.items():
        for field in Counts.__dataclass_fields__:
            assert getattr(rows[key], field) == pytest.approx(getattr(row, field)), (key, field)
    assert counted.metrics == pytest.approx(
        {
            "Dense": (first_macs + 150 + 12) * steps,
            "Effective_MACs": first_macs * often,
            "Effective_ACs": second + third,
            "MembraneUpdates": 44 * steps,
            "ActivationSparsity": 1 - float(one.sum() + other.sum()) / (44 * steps),
        }
    )


def spikes_into(snn: SpikingNetwork, name: str, images: Tensor) -> Tensor:
    """What a layer reads, `[T*B, ...]`."""
    seen: list[Tensor] = []
    hook = snn.network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    snn(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
        nn.Conv2d(4, 8, 3, groups=2, padding=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
    ],
    ids=str,
)
def test_accumulates_of_a_layer_one_spike_at_a_time(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3)
    )
    images = torch.rand(2, 2, 6, 5)
    model(images)
    snn = qs.convert(model.eval(), images, steps=2)
    (row,) = (row for row in count_operations(snn, images).rows if row.name == "2")
    spikes = spikes_into(snn, "2", images).ne(0)
    # Where a weight of a connection is pushed, the output moves: as often as there are connections.
    plain = copy.deepcopy(layer)
    plain.bias = None
    plain.weight.data.fill_(1.0)
    total = 0.0
    for place in spikes.nonzero().tolist():
        x = torch.zeros_like(spikes[:1], dtype=torch.float32)
        x[0, place[1], place[2], place[3]] = 1
        # 1 for a connection, 2 where a reflected border makes two.
        total += float(plain(x).detach().sum())
    assert row.accumulates == pytest.approx(total / 2)
    assert row.multiplies == 0


class Residual(nn.Module):
    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.conv, self.head, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 1), head, nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv(x))
        return self.fc(self.head(x).flatten(1))


def test_a_residual_connection_accumulates_every_spike_once() -> None:
    torch.manual_seed(1)
    images = torch.rand(3, 1, 6, 6)
    model = Residual(nn.Identity())
    model(images)
    snn = qs.convert(model, images, steps=2)
    first, second = (float(counts.double().sum()) / 3 for counts in simulate(snn, images).spikes.values())
    rows = {(row.name, row.kind): row for row in count_operations(snn, images).rows}
    (join,) = (row for (_, kind), row in rows.items() if kind == "join")
    assert join.accumulates == pytest.approx(first)
    assert rows["conv", "layer"].accumulates == pytest.approx(3 * first)
    assert rows["fc", "layer"].accumulates == pytest.approx(2 * second)


HALVES, THIRDS = [(0, 2), (2, 4), (4, 6)], [(0, 2), (1, 4), (3, 6), (5, 6)]
HEADS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "adaptive": (nn.AdaptiveAvgPool2d((4, 3)), lambda e: sums(e, [(0, 2), (1, 3), (3, 5), (4, 6)], HALVES)),
    "overlapping": (
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        lambda e: sums(e, THIRDS, THIRDS),
    ),
    "function": (
        lambda x: F.avg_pool2d(x, 2, count_include_pad=False),
        lambda e: sums(e, HALVES, HALVES),
    ),
    "mean": (lambda x: x.mean((2, 3)), lambda e: e.sum((2, 3))),
    "one axis": (lambda x: F.avg_pool1d(x.flatten(2), 4, 4), lambda e: e.flatten(2).unflatten(2, (9, 4)).sum(3)),
    "slices": (lambda x: torch.cat(x[:, :, ::2].chunk(3, 3)[::2], 1), lambda e: e[:, :, ::2][..., [0, 1, 4, 5]]),
    "padding": (lambda x: F.pad(x, (1, 0, 2, 0)), lambda e: e),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.0), lambda e: 4 * e),
    "scaled": (lambda x: x * 0.5 - x / 4, lambda e: 2 * e),
}


def sums(events: Tensor, rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> Tensor:
    """Sums over windows."""
    return torch.stack([events[:, :, top:bottom, left:right].sum((2, 3)) for top, bottom in rows for left, right in columns])


@pytest.mark.parametrize("head", HEADS)
def test_spikes_travel_through_pools_and_shapes(head: str) -> None:
    torch.manual_seed(1)
    images = torch.rand(3, 1, 6, 6)
    module, gathered = HEADS[head]
    model = Residual(module)
    model(images)
    snn = qs.convert(model, images, steps=3)
    last = list(simulate(snn, images).spikes.values())[-1].double()
    (row,) = (row for row in count_operations(snn, images).rows if row.name == "fc")
    assert row.accumulates == pytest.approx(float(gathered(last).sum()) * 2 / 3)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(**NETWORKS)
def test_counts_of_random_networks_are_consistent(**drawn: object) -> None:
    snn, images = draw(**drawn)
    counted = count_operations(snn, images)
    spikes = simulate(snn, images).spikes
    neurons = {row.name: row for row in counted.rows if row.kind == "neurons"}
    for site, counts in spikes.items():
        assert neurons[site].spikes == pytest.approx(float(counts.double().sum()) / len(images))
        assert neurons[site].updates == counts[0].numel() * snn.steps
    layers = [row for row in counted.rows if row.kind == "layer"]
    assert sum(row.multiplies > 0 for row in layers) == 1
    for row in layers:
        assert row.multiplies in (0.0, row.dense)
    alone = [count_operations(snn, image[None]) for image in images]
    assert counted.total("accumulates") == pytest.approx(sum(one.total("accumulates") for one in alone) / len(images))


def test_an_image_that_has_to_be_computed_again_costs_as_often() -> None:
    images = torch.rand(2, 1, 4, 4)
    snn = qs.convert(three_layers(), images, steps=4)
    once, often = (count_operations(snn, images, first) for first in ("once", "every step"))
    assert often.total("multiplies") == 4 * once.total("multiplies")
    assert often.total("accumulates") == once.total("accumulates")


def test_what_cannot_be_counted_is_refused() -> None:
    images = torch.rand(2, 1, 6, 6)
    model = Residual(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"))
    model(images)
    snn = qs.convert(model, images, steps=2)
    with pytest.raises(ConversionError, match="bilinear interpolation"):
        count_operations(snn, images)
    snn = qs.convert(three_layers(), torch.rand(2, 1, 4, 4), steps=2)
    with pytest.raises(OptionError, match="first must be"):
        count_operations(snn, torch.rand(2, 1, 4, 4), "twice")
    with pytest.raises(DataError, match="no images"):
        count_operations(snn, [])
    with pytest.raises(DataError, match="NaN or infinite"):
        count_operations(snn, torch.full((2, 1, 4, 4), float("nan")))
    windows = qs.accelerate(qs.quantise(snn).network.as_synchronous(), "count")
    with pytest.raises(ConversionError, match="made for the count engine; count the one it was made from"):
        count_operations(windows, torch.rand(2, 1, 4, 4))
    with pytest.raises(ConversionError, match="made for the integer engine"):
        count_operations(qs.accelerate(snn, "integer"), torch.rand(2, 1, 4, 4))


# Energy

ROWS = (
    Counts("a", "layer", dense=100, multiplies=100, biases=10, source_biases=10),
    Counts("b", "neurons", updates=40, leaks=20, spikes=8),
    Counts("c", "layer", dense=1000, accumulates=300, biases=30, source_biases=6),
)


def test_energy_is_operations_times_constants() -> None:
    operations = Operations(ROWS, 1, 2, "once")
    papers = energy_of(operations, "45nm_fp32", "papers")
    assert papers.spiking == pytest.approx(100 * 4.6 + 300 * 0.9)
    assert papers.source == pytest.approx(1100 * 4.6)
    assert papers.ratio == pytest.approx(1100 * 4.6 / (460 + 270))
    full = energy_of(operations, "45nm_int32")
    assert full.spiking == pytest.approx(100 * 3.2 + (300 + 40 + 40 + 8) * 0.1 + 20 * 3.1)
    assert full.source == pytest.approx(1100 * 3.2 + 16 * 0.1)
    assert sum(full.parts.values()) == pytest.approx(full.spiking)
    assert any("once" in caveat for caveat in full.caveats)


def test_memory_is_charged_for_every_operand() -> None:
    operations = Operations(ROWS, 1, 2, "once")
    less, more = (energy_of(operations, "45nm_int8", account) for account in ("conservative", "memory"))
    # 8 bits at 20 pJ per 64; two operands of a multiply-accumulate, three of an accumulate, two of an update.
    assert more.spiking - less.spiking == pytest.approx(2.5 * (2 * 100 + 3 * 300 + 2 * 40))
    assert more.source - less.source == pytest.approx(2.5 * 2 * 1100)
    assert more.parts["memory"] == pytest.approx(more.spiking - less.spiking)
    assert any("32 KiB" in caveat for caveat in more.caveats)
    assert any("memory traffic" in caveat for caveat in less.caveats)
    assert energy_of(operations, "loihi", "memory").spiking == energy_of(operations, "loihi").spiking


def test_a_chip_without_multipliers_leaves_the_first_layer_to_others() -> None:
    found = energy_of(Operations(ROWS, 1, 2, "every step"), "loihi")
    assert found.spiking == pytest.approx(100 * 4.6 + (300 + 40) * 23.6 + 40 * 81)
    assert any("loihi does not multiply" in caveat for caveat in found.caveats)
    assert any("each of 2 steps" in caveat for caveat in found.caveats)


def test_devices_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickspike.energy.DEVICES", dict(DEVICES))
    assert (qs.Device, qs.register_device) == (Device, register_device)
    register_device(Device("mine", add=1.0, multiply=9.0, source="measured"))
    assert energy_of(Operations(ROWS, 1, 2, "once"), "mine", "papers").spiking == 100 * 10 + 300
    with pytest.raises(UnknownNameError, match="unknown device 'miney'; did you mean 'mine'"):
        energy_of(Operations(ROWS, 1, 2, "once"), "miney")
    with pytest.raises(OptionError, match="account must be"):
        energy_of(Operations(ROWS, 1, 2, "once"), "mine", "best")
    with pytest.raises(OptionError, match="add must be a number of pJ"):
        Device("x", add=float("nan"), multiply=1.0, source="")


def test_every_device_has_a_source() -> None:
    for device in DEVICES.values():
        assert len(device.source) > 10
        assert device.mac is None or device.mac == pytest.approx(device.add + (device.multiply or 0))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_counts_are_those_of_neurobench(stride: int, padding: int) -> None:
    """Yik et al. 2025, Effective_ACs, Effective_MACs and Dense, on what its counter covers: no pooling, no joins."""
    layers = pytest.importorskip("neurobench.metrics.utils.layers", reason="needs neurobench: pip install 'quickspike[bench]'")
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=stride, padding=padding),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=stride, padding=padding, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(12),
        nn.ReLU(),
        nn.Linear(12, 5),
    )
    images = torch.rand(6, 2, 11, 9, generator=torch.Generator().manual_seed(0))
    network(images)
    snn = qs.convert(network, images, steps=4)
    seen: list[tuple[nn.Module, Tensor]] = []
    spiking = [layer for layer in snn.network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_pre_hook(lambda layer, given: seen.append((layer, given[0]))) for layer in spiking]
    simulate(snn, images)
    for hook in hooks:
        hook.remove()
    counted = dict.fromkeys(("Effective_MACs", "Effective_ACs", "Dense"), 0.0)
    for layer, values in seen:
        # A spike of height theta is an accumulate with theta in the weights; NeuroBench takes ones for spikes.
        spikes = values if values is seen[0][1] else (values != 0).float()
        done, binary = layers.single_layer_MACs(spikes, layer)
        counted["Effective_ACs" if binary else "Effective_MACs"] += done / len(images)
        # The image is read once here; NeuroBench's Dense has every layer at every step.
        often = snn.steps if values is seen[0][1] else 1
        counted["Dense"] += often * layers.single_layer_MACs(spikes, layer, total=True)[0] / len(images)
    metrics = count_operations(snn, images).metrics
    assert counted["Effective_ACs"] > 0
    assert {name: metrics[name] for name in counted} == pytest.approx(counted)
