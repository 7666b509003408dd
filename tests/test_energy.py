"""Energy: acceptance check D10 of diet_snn.md, section 10 of ultra_low_latency.md, and the MAC totals (C9) they rest on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

import quickspike as qs
from quickspike.claims import CLAIMS, E_AC, E_MAC, claim_of, energy_ratio, filled_in, mean_spikes, relative_spikes
from quickspike.energy import Account, Device, energy_of
from quickspike.errors import OptionError, UnknownNameError
from quickspike.operations import Counts, Operations, count_operations


@dataclass(frozen=True)
class Layer:
    """One layer of weights: its multiply-accumulates, and the neurons behind it."""

    macs: int
    neurons: int


def vgg(plan: str, side: int, classes: int) -> list[Layer]:
    """3 x 3 convolutions, pooling by two at P, then linear layers 4096, 4096 and the readout."""
    layers, channels = [], 3
    for entry in plan.split():
        if entry == "P":
            side //= 2
            continue
        outputs = int(entry)
        layers.append(Layer(9 * channels * outputs * side**2, outputs * side**2))
        channels = outputs
    features = channels * side**2
    for outputs in (4096, 4096, classes):
        layers.append(Layer(features * outputs, outputs))
        features = outputs
    return layers


def wide_resnet20() -> list[Layer]:
    """A stem of three convolutions and a pooling, four stages of two blocks; 1 x 1 shortcuts count to a block's second layer."""
    layers = [Layer(9 * inputs * 64 * 32**2, 64 * 32**2) for inputs in (3, 64, 64)]
    channels, side = 64, 16
    for stage, outputs in enumerate((64, 128, 256, 512)):
        side = side // 2 if stage else side
        for _ in range(2):
            size = outputs * side**2
            shortcut = channels * size if channels != outputs else 0
            layers += [Layer(9 * channels * size, size), Layer(9 * outputs * size + shortcut, size)]
            channels = outputs
    return [*layers, Layer(512 * side**2 * 10, 10)]


VGG16 = "64 64 P 128 128 P 256 256 256 P 512 512 512 P 512 512 512"
NETWORKS = {
    "vgg16_cifar10": vgg(VGG16, 32, 10),
    "vgg16_cifar100": vgg(VGG16, 32, 100),
    "vgg16_imagenet": vgg(f"{VGG16} P", 224, 1000),
    "resnet20_cifar10": wide_resnet20(),
    "resnet20_cifar100": wide_resnet20(),
    "vgg6_cifar10": vgg("64 P 128 128 P", 32, 10),
}

# Spikes per neuron over all T, layer by layer, from the authors' result sheet.
RATES = {
    "vgg16_cifar10": "3.35 1.30 1.85 .53 .93 .47 .23 1.27 2.14 1.55 2.31 1.81 1.44 1.01 1.15",
    "vgg16_cifar100": "3.47 1.37 1.97 .73 1.03 .59 .20 .42 .66 .88 1.64 1.23 .73 .34 .17",
    "vgg16_imagenet": "2.08 1.75 2.44 1.20 1.81 1.21 .75 .80 .54 .26 .53 .35 .14 .36 .20",
    "resnet20_cifar10": "3.35 2.54 3.91 1.07 3.18 .87 2.44 1.30 1.50 .64 1.11 .77 .61 .21 .42 .27 .24 .01 .18",
    "resnet20_cifar100": "3.63 3.27 2.32 .26 2.33 .18 1.84 1.11 1.71 .54 .93 .94 .76 .27 .59 .37 .47 .23 .38",
    "vgg6_cifar10": ".68 .58 .11 .12 .25",
}


def rates(name: str) -> list[float]:
    return [float(rate) for rate in RATES[name].split()]


@pytest.mark.parametrize(
    ("name", "macs", "first_share"),
    [
        ("vgg16_cifar10", 338_403_328, 0.00523),
        ("vgg16_cifar100", 338_771_968, 0.00522),
        ("vgg16_imagenet", 15_470_264_320, 0.00560),
        ("vgg6_cifar10", 108_765_184, 0.01627),
        ("resnet20_cifar10", 215_699_456, 0.00820),
    ],
)
def test_c9_multiply_accumulates(name: str, macs: int, first_share: float) -> None:
    total = sum(layer.macs for layer in NETWORKS[name])
    assert total == macs
    assert NETWORKS[name][0].macs / total == pytest.approx(first_share, abs=5e-6)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vgg16_cifar10", 1.652),
        ("vgg16_cifar100", 1.619),
        ("vgg16_imagenet", 1.617),
        ("resnet20_cifar10", 2.545),
        ("resnet20_cifar100", 2.280),
        ("vgg6_cifar10", 0.493),
    ],
)
def test_d10_spikes_weighted_by_neurons(name: str, published: float) -> None:
    neurons = [layer.neurons for layer in NETWORKS[name][:-1]]
    assert round(mean_spikes(rates(name), neurons), 3) == published


@pytest.mark.parametrize(
    ("name", "published", "ratio"),
    [("vgg16_cifar10", 1.483, 3.40), ("vgg16_cifar100", 1.181, 4.25), ("vgg16_imagenet", 1.326, 3.79)],
)
def test_d10_spikes_weighted_by_the_accumulates_they_cause(name: str, published: float, ratio: float) -> None:
    layers = NETWORKS[name]
    driven = [layer.macs for layer in layers[1:]]
    spikes = mean_spikes(rates(name), driven)
    assert round(spikes, 3) == published
    first_share = layers[0].macs / (layers[0].macs + sum(driven))
    assert energy_ratio(first_share, spikes) == pytest.approx(ratio, abs=0.006)


@pytest.mark.parametrize(
    ("first_share", "spikes", "ratio"),
    [
        (0.029, 1.71, 2.83), (0.029, 0.87, 5.15), (0.029, 0.49, 8.19),
        (0.005, 1.65, 3.07), (0.005, 1.57, 3.22),
        (0.005, 2.12, 2.39), (0.005, 1.76, 2.88), (0.005, 1.62, 3.12),
        (0.006, 1.62, 3.11),
        (0.013, 4.68, 1.09), (0.013, 3.79, 1.34), (0.013, 2.55, 1.98),
        (0.013, 3.49, 1.46), (0.013, 2.52, 2.00), (0.013, 2.28, 2.21),
    ],
)  # fmt: skip
def test_d10_energy_ratio(first_share: float, spikes: float, ratio: float) -> None:
    assert round(energy_ratio(first_share, spikes), 2) == ratio


@pytest.mark.parametrize(
    ("first_share", "spikes", "e_mac", "e_ac"),
    [(0.0, 0.202, 3.2, 0.1), (0.00522, 0.034, 3.2, 0.1), (0.0, 0.032, 4.6, 0.9), (0.00522, 0.0054, 4.6, 0.9)],
)
def test_the_spikes_that_159_times_less_energy_takes(first_share: float, spikes: float, e_mac: float, e_ac: float) -> None:
    # spikes are rounded to the last digit given, which moves the ratio by at most 1 in 60
    assert energy_ratio(first_share, spikes, e_mac, e_ac) == pytest.approx(159.2, rel=1 / 60)


def test_the_first_layer_counted_at_both_steps_rules_159_out() -> None:
    assert energy_ratio(2 * 0.00522, 0.0, 3.2, 0.1) < 159.2
    assert energy_ratio(0.00522, 0.0) > 159.2


def test_the_formula() -> None:
    assert (E_MAC, E_AC) == (4.6, 0.9)
    # 2 of 10 operations multiply once, 8 accumulate 1.5 times.
    assert energy_ratio(0.2, 1.5, 5.0, 1.0) == pytest.approx(10 * 5 / (2 * 5 + 8 * 1.5))
    assert energy_ratio(1.0, 7.0) == 1.0
    # The 12 times of the abstract.
    assert energy_ratio(0.005, 0.40) == pytest.approx(12, abs=0.1)


def test_mean_spikes() -> None:
    assert mean_spikes([1.0, 3.0], [3, 1]) == 1.5
    with pytest.raises(ValueError, match="zip"):
        mean_spikes([1.0, 2.0], [1])


# The formulas, filled in


def test_formulas_of_a_network_by_hand() -> None:
    rows = (
        Counts("conv", "layer", dense=100, multiplies=100),
        Counts("relu", "neurons", updates=40, spikes=15),
        Counts("conv2", "layer", dense=300, accumulates=240),
        Counts("relu2", "neurons", updates=20, spikes=9),
        Counts("fc", "layer", dense=100, accumulates=80),
    )
    found = filled_in(Operations(rows, images=10, steps=2, first="once"))
    assert found.keys() == {"diet_snn", "ultra_low_latency"}
    # 24 spikes of 30 neurons; 320 accumulates over 400 connections.
    assert found["diet_snn"] == pytest.approx(4.6 / (4.6 * 0.2 + 0.8 * 0.9 * 24 / 30))
    assert found["ultra_low_latency"] == pytest.approx(3.2 / (3.2 * 0.2 + 0.8 * 0.1 * 320 / 400))


def test_weighted_by_connections_the_formula_is_the_papers_account(digits_source: Any, digits_calibration: Tensor) -> None:
    snn = qs.convert(digits_source, digits_calibration, "ultra_low_latency", steps=2)
    operations = count_operations(snn, digits_calibration[:50])
    assert filled_in(operations)["ultra_low_latency"] == pytest.approx(energy_of(operations, "45nm_int32", "papers").ratio)
    # First layer and neurons apart, it is far from the account that leaves less out.
    assert energy_of(operations, "45nm_int32").ratio < filled_in(operations)["ultra_low_latency"]


def test_a_silent_network_that_multiplies_nowhere_costs_nothing() -> None:
    rows = (Counts("conv", "layer", dense=100), Counts("relu", "neurons", updates=40))
    assert filled_in(Operations(rows, images=1, steps=2, first="once")) == {"diet_snn": math.inf, "ultra_low_latency": math.inf}


def test_published_figures_come_out_of_their_formulas() -> None:
    assert energy_ratio(0.005, 0.40) == pytest.approx(claim_of("diet_snn").published, abs=0.1)
    assert energy_ratio(0.00522, 0.034, 3.2, 0.1) == pytest.approx(claim_of("ultra_low_latency").published, rel=1 / 60)
    assert relative_spikes(53, 200) == claim_of("rate_norm").published
    for claim in CLAIMS.values():
        assert claim.source.startswith("arXiv ")
        assert claim.caveat
    # Whether the figure can be checked is said where it cannot.
    assert "published" in claim_of("rate_norm").caveat
    assert claim_of("rate_norm").formula.startswith("S / S'")
    with pytest.raises(OptionError, match="has to spike"):
        relative_spikes(5, 0)
    with pytest.raises(UnknownNameError, match="diet_snn"):
        claim_of("diet_sn")


ROWS = (
    Counts("conv", "layer", dense=1000, multiplies=900, biases=7, source_biases=5),
    Counts("fc", "layer", dense=300, accumulates=200, biases=3, source_biases=2),
    Counts("relu", "neurons", updates=64, leaks=11, spikes=13),
)
NEITHER = "routing of spikes and idle power are not counted"
POOLS = "average pooling is folded into the layer behind it"
CACHE = "memory: every operand comes from a cache of 32 KiB, nothing is reused"
OWN = "chip has no figure of memory apart from the others: the account memory adds nothing"
ELSEWHERE = "chip does not multiply: layers that read real values, and the source network, cost as on 45nm_fp32"
FREE = "biases, leaks, updates and resets of neurons cost nothing in this account"


@pytest.mark.parametrize(
    ("device", "account", "parts", "source", "caveats"),
    [
        (
            Device("chip", add=2, multiply=8, source="", access=0.5),
            "papers",
            {"multiply-accumulates": 9000, "accumulates": 400},
            13000,
            (f"memory traffic, {NEITHER}", POOLS, "layers that read the image multiply, once", FREE),
        ),
        (
            Device("chip", add=2, multiply=8, source="", access=0.5),
            "conservative",
            {"multiply-accumulates": 9000, "accumulates": 400, "biases": 20, "leaks": 88, "updates": 128, "resets": 26},
            13014,
            (f"memory traffic, {NEITHER}", POOLS, "layers that read the image multiply, once"),
        ),
        (
            Device("chip", add=2, multiply=8, source="", access=0.5),
            "memory",
            # Words: 2 x 900 + 3 x 200 + 2 x 64.
            {"multiply-accumulates": 9000, "accumulates": 400, "biases": 20, "leaks": 88, "updates": 128, "resets": 26, "memory": 1264},
            14314,
            (NEITHER, POOLS, CACHE, "layers that read the image multiply, once"),
        ),
        (
            Device("chip", add=2, multiply=None, source="", update=5),
            "memory",
            # 4.6 pJ for a multiply-accumulate and 0.9 for an addition on 45nm_fp32.
            {"multiply-accumulates": 4140, "accumulates": 400, "biases": 20, "leaks": 0, "updates": 320, "resets": 0},
            5986.3,
            (NEITHER, POOLS, OWN, "layers that read the image multiply, once", ELSEWHERE),
        ),
    ],
    ids=["papers", "conservative", "memory", "no multiplier"],
)
def test_every_account_by_hand(device: Device, account: Account, parts: dict[str, float], source: float, caveats: tuple[str, ...]) -> None:
    found = energy_of(Operations(ROWS, images=1, steps=4, first="once"), device, account)
    assert (found.device, found.account, found.caveats) == ("chip", account, caveats)
    assert found.parts == pytest.approx(parts)
    assert (found.spiking, found.source) == pytest.approx((sum(parts.values()), source))
    assert found.ratio == pytest.approx(source / sum(parts.values()))
    assert found.to_json() == {
        "device": "chip",
        "account": account,
        "spiking": found.spiking,
        "source": found.source,
        "parts": found.parts,
        "caveats": caveats,
        "ratio": found.ratio,
    }


def test_defaults_and_limits_of_energy() -> None:
    operations = Operations(ROWS, images=1, steps=4, first="every step")
    found = energy_of(operations)
    assert (found.device, found.account) == ("45nm_fp32", "conservative")
    assert "layers that read the image multiply, at each of 4 steps" in found.caveats
    with pytest.raises(OptionError, match=r"^account must be papers, conservative or memory, got 'all'$"):
        energy_of(operations, account="all")
    for name in ("add", "multiply", "update", "access"):
        Device(**{"name": "chip", "add": 1, "multiply": 1, "source": "", name: 0})
        for wrong in (-1e-9, math.inf, math.nan):
            with pytest.raises(OptionError, match=rf"^device chip: {name} must be a number of pJ >= 0, got {wrong!r}$"):
                Device(**{"name": "chip", "add": 1, "multiply": 1, "source": "", name: wrong})
    silent = energy_of(Operations((Counts("conv", "layer", dense=10),), images=1, steps=1, first="once"), account="papers")
    assert silent.ratio == math.inf
    assert silent.to_json()["ratio"] is None
    assert not any("read the image" in caveat for caveat in silent.caveats)
