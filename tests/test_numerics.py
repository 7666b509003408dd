"""What docs/numerics.md says: the firing rule at its boundary in every precision and engine, and which results are the same bytes."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.conversion import SpikingNetwork
from quickspike.engines.integer import ByteConv, ByteLinear
from quickspike.models import load_model
from quickspike.neuron import AccumulatedMaxPool, Neuron, NeuronParameters
from quickspike.readouts import readout
from quickspike.simulation import Run, simulate

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "numerics.md").read_text()


class Format(NamedTuple):
    """A floating-point format: the bits of its mantissa, and the exponent of its smallest number."""

    bits: int
    least: int


FORMATS = {torch.float32: Format(24, -149), torch.float64: Format(53, -1074), torch.bfloat16: Format(8, -133)}
KINDS = ("plain", "strict", "leaky", "to zero", "signed", "signed and leaky", "averaged", "averaged and signed")


# The rule as the page has it, in exact fractions that are rounded where the page says so


def rounded(value: Fraction, to: Format) -> Fraction:
    """The nearest number of the format, ties to even."""
    if not value:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    place = Fraction(2) ** max(exponent - to.bits + 1, to.least)
    return round(value / place) * place


def documented(currents: list[float], theta: float, initial: float, leak: float, kind: str, to: Format) -> list[int]:
    """The spikes of one neuron."""
    exact = [Fraction(current) for current in currents]
    if kind.startswith("averaged"):
        # Sums of these tests are exact; their quotient need not be.
        exact = [rounded(sum(exact, Fraction(0)) / len(exact), to)] * len(exact)
    level, v, left, spikes = Fraction(theta), rounded(Fraction(initial) * Fraction(theta), to), 0, []
    for current in exact:
        m = rounded(current + rounded(Fraction(leak) * v, to), to)
        fires = m > level if kind == "strict" else m >= level
        spike = 1 if fires else -1 if "signed" in kind and m < 0 and left > 0 else 0
        v = Fraction(0) if spike and kind == "to zero" else rounded(m - spike * level, to)
        left += spike
        spikes.append(spike)
    return spikes


def make(theta: Tensor, kind: str, initial: float, leak: float, steps: int, constant: bool = False) -> Neuron:
    flags = {"strict": kind == "strict", "to_zero": kind == "to zero", "signed": "signed" in kind, "averaged": "averaged" in kind}
    # Heights of 1, so that outputs are spikes.
    return Neuron(NeuronParameters(theta, initial, leak, 1.0, scaled=False, **flags), steps, constant)


def beside(value: Tensor, places: int) -> Tensor:
    """The number that many places above, or below."""
    for _ in range(abs(places)):
        value = torch.nextafter(value, torch.full_like(value, math.copysign(math.inf, places)))
    return value


def near(theta: Tensor, steps: int, seed: int) -> Tensor:
    """Currents `[steps, N]` at theta and shares of it, and beside them, in any order; zeros of both signs and the smallest number too."""
    dtype = theta.dtype
    shares = [theta, theta / 2, theta / 3, -theta, -theta / 2, 2 * theta, theta / 10, -theta / 10]
    tiny = torch.tensor(2.0 ** FORMATS[dtype].least, dtype=torch.float64).to(dtype)
    values = [beside(share, places) for share in shares for places in (-1, 0, 1)]
    values += [torch.zeros((), dtype=dtype), -torch.zeros((), dtype=dtype), tiny, -tiny]
    drawn = torch.randint(len(values), (steps, 60), generator=torch.Generator().manual_seed(seed))
    return torch.stack(values)[drawn]


SMALLEST = 1e-8
"""Thresholds never act below it."""
THETAS = (1.0, 0.1, 1 / 3, 0.7, 12345.678, 3e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_step_at_the_boundary_is_that_of_the_documented_rule(dtype: torch.dtype, kind: str) -> None:
    """Whole numbers of the format's places decide; thresholds are mostly numbers that no format holds."""
    steps, leak, on_boundary = 8 if "averaged" not in kind else 6, 0.9 if "leaky" in kind else 1.0, 0
    for seed, value in enumerate(THETAS):
        theta, initial = torch.tensor(value, dtype=torch.float64).to(dtype), (0.0, 0.5, 0.3)[seed % 3]
        currents = near(theta, steps, seed)
        if "averaged" in kind:
            # Whole multiples of a share of theta of few digits, so that sums are exact; many end on multiples of theta.
            unit = torch.tensor(2.0 ** (math.frexp(value)[1] - 3), dtype=dtype)
            theta = (theta / unit).round() * unit if seed % 2 else theta
            currents = torch.randint(-3, 9, (steps, 60), generator=torch.Generator().manual_seed(seed)).to(dtype) * unit
        neuron = make(theta, kind, initial, leak, steps)
        wanted = torch.tensor(
            [
                documented(column, float(theta), float(neuron.initial), float(neuron.leak), kind, FORMATS[dtype])
                for column in currents.T.tolist()
            ]
        ).T
        for compiled in (False, True):
            neuron.compiled = compiled
            out = neuron(currents.contiguous())
            assert (out.double() != wanted).nonzero().tolist() == [], (value, compiled)
        # The same rule with the boundary on the other side tells others apart, or nothing here lies on it.
        other = {"plain": "strict", "strict": "plain"}.get(kind)
        if other:
            others = [documented(column, float(theta), float(neuron.initial), 1.0, other, FORMATS[dtype]) for column in currents.T.tolist()]
            on_boundary += int((wanted != torch.tensor(others).T).sum())
    assert on_boundary > 30 or kind not in ("plain", "strict")


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_leak_and_charge_are_two_roundings(dtype: torch.dtype) -> None:
    """A fused multiply-add has one, and puts another spike into some of these."""
    theta, leak, to = torch.tensor(0.7).to(dtype), torch.tensor(0.9).to(dtype), FORMATS[dtype]
    first = (torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.6).to(dtype)
    second = torch.stack([beside(theta - leak * one, index % 5 - 2) for index, one in enumerate(first)])
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    wanted = [documented([*pair], float(theta), 0.0, float(leak), "plain", to)[1] for pair in pairs]
    once = [rounded(Fraction(b) + Fraction(float(leak)) * Fraction(a), to) >= Fraction(float(theta)) for a, b in pairs]
    assert sum(one != other for one, other in zip(wanted, once, strict=True)) > 10
    for compiled in (False, True):
        neuron = make(theta, "plain", 0.0, float(leak), 2)
        neuron.compiled = compiled
        assert neuron(torch.stack([first, second]))[1].tolist() == wanted


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_one_place_below_theta_nothing_fires(dtype: torch.dtype, strict: bool) -> None:
    for value in (*THETAS, SMALLEST):
        theta = torch.tensor(value, dtype=torch.float64).to(dtype)
        currents = torch.stack([beside(theta, places) for places in (-1, 0, 1)])
        for constant in (False, True):
            for compiled in (False, True):
                neuron = make(theta, "strict" if strict else "plain", 0.0, 1.0, 1, constant)
                neuron.compiled = compiled
                assert neuron(currents).tolist() == [0.0, float(not strict), 1.0]


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_currents_meet_thresholds_of_float32(compiled: bool) -> None:
    """0.1 is no number of bfloat16: the nearest one, above, fires, and the one below it does not."""
    nearest = torch.tensor(0.1, dtype=torch.bfloat16)
    currents = torch.stack([beside(nearest, -1), nearest])
    assert float(nearest) > float(torch.tensor(0.1))
    neuron = make(torch.tensor(0.1), "plain", 0.0, 1.0, 1)
    neuron.compiled = compiled
    assert neuron(currents).tolist() == [0.0, 1.0]
    # Potentials keep what bfloat16 would lose: 300 currents of 2^-12 reach 0.07.
    small = torch.full((300, 1), 2.0**-12, dtype=torch.bfloat16)
    slow = make(torch.tensor(0.07), "plain", 0.0, 1.0, 300)
    slow.compiled = compiled
    assert slow(small).flatten().nonzero().flatten().tolist() == [math.ceil(0.07 * 2**12) - 1]


def test_potentials_of_a_network_in_bfloat16_lose_small_currents() -> None:
    counts = {}
    for dtype in (torch.bfloat16, torch.float32):
        neuron = make(torch.ones((), dtype=dtype), "plain", 0.5, 1.0, 1000, constant=True)
        counts[dtype] = int(neuron(torch.tensor([0.0019], dtype=dtype)).sum())
    assert counts == {torch.bfloat16: 0, torch.float32: 2}


@pytest.mark.parametrize("compiled", [False, True])
def test_zeros_of_both_signs_take_nothing_back(compiled: bool) -> None:
    """A signed neuron that has fired stands at 0: neither 0.0 nor -0.0 is below it, the smallest negative number is."""
    tiny = 2.0**-149
    for last, wanted in ((0.0, 0.0), (-0.0, 0.0), (tiny, 0.0), (-tiny, -1.0)):
        neuron = make(torch.tensor(1.0), "signed", 0.0, 1.0, 2)
        neuron.compiled = compiled
        assert neuron(torch.tensor([[1.0], [last]])).flatten().tolist() == [1.0, wanted], last


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["plain", "signed"])
def test_silence_is_a_zero_without_a_sign_also_under_negative_heights(kind: str, compiled: bool) -> None:
    """-0.0 equals 0.0 and is other bytes, which a reference and a compiled loop must not differ in."""
    neuron = Neuron(NeuronParameters(torch.tensor(1.0), amplitude=-1.5, signed=kind == "signed"), 3, False)
    neuron.compiled = compiled
    currents = torch.tensor([[0.5, 1.0], [0.25, -1.5], [-0.9, 0.0]])
    out = neuron(currents)
    assert not bool(torch.signbit(out[out == 0]).any())
    assert out[:, 1].tolist() == [-1.5, 1.5 if kind == "signed" else 0.0, 0.0]


def test_denormal_currents_add_up_and_thresholds_end_at_the_smallest() -> None:
    tiny = 2.0**-149
    for compiled in (False, True):
        neuron = make(torch.tensor(0.0), "plain", 0.0, 1.0, 4)
        neuron.compiled = compiled
        smallest = float(torch.tensor(SMALLEST))
        below = float(beside(torch.tensor(SMALLEST), -1))
        out = neuron(torch.tensor([[smallest, below, tiny], [0.0, tiny, tiny], [0.0, smallest - below, tiny], [0.0, 0.0, tiny]]))
        assert out.T.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
        # What two of the smallest numbers leave is not lost: twice the smallest number below 0 is reached, and no spike before.
        signed = make(torch.tensor(1.0), "signed", 0.0, 1.0, 4)
        signed.compiled = compiled
        assert signed(torch.tensor([[1.0], [tiny], [-tiny], [-tiny]])).flatten().tolist() == [1, 0, 0, -1]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["plain", "signed"])
def test_what_is_no_number_never_fires_and_infinity_always_does(kind: str, compiled: bool) -> None:
    neuron = make(torch.tensor(1.0), kind, 0.0, 1.0, 3)
    neuron.compiled = compiled
    currents = torch.tensor([[1.0, 1.0, 1.0], [math.nan, math.inf, -math.inf], [5.0, -9.0, 9.0]])
    assert neuron(currents).T.tolist() == [[1, 0, 0], [1, 1, 1], [1, -1 if kind == "signed" else 0, 0]]


@pytest.mark.parametrize("kind", KINDS[:6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_one_by_one_are_those_of_one_call(dtype: torch.dtype, kind: str) -> None:
    theta = torch.tensor(0.7)
    currents = near(theta, 12, 3).to(dtype)
    for compiled in (False, True):
        neuron = make(theta, kind, 0.5, 0.9 if "leaky" in kind else 1.0, 12)
        neuron.compiled = compiled
        parts, state = [], None
        for start, end in ((0, 1), (1, 5), (5, 12)):
            out, state = neuron.scan(currents[start:end].flatten(0, 1), state, end - start)
            parts.append(out)
        assert same_bytes(torch.cat(parts), neuron(currents.flatten(0, 1)))


def test_a_neuron_does_not_see_its_neighbours() -> None:
    """Alone or among others, in any layout of memory and on any number of threads."""
    theta = torch.rand(48, 1, 1, generator=torch.Generator().manual_seed(0)) + 0.2
    currents = torch.randn(4 * 40, 48, 5, 7, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    for kind in ("plain", "signed"):
        neuron = make(theta, kind, 0.5, 0.9, 4)
        whole = neuron(currents)
        alone = torch.stack([neuron(one.flatten(0, 1)) for one in currents.unflatten(0, (4, 40)).split(1, 1)], 1).view(4, 40, 48, 5, 7)
        assert same_bytes(alone.flatten(0, 1), whole)
        try:
            torch.set_num_threads(3)
            assert same_bytes(neuron(currents.contiguous(memory_format=torch.channels_last)), whole)
        finally:
            torch.set_num_threads(before)


# Readouts and pools


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [4, 300, 4096])
def test_the_readout_of_half_precision_is_rounded_once(steps: int, dtype: torch.dtype) -> None:
    """The sum of 4,096 outputs of 25 is no number of float16 any more, and 257 is none of bfloat16."""
    outputs = (25 + torch.randn(steps, 1, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = outputs.double().cumsum(0) / torch.arange(1, steps + 1, dtype=torch.float64).view(-1, 1, 1)
    found = readout(outputs)
    assert found.dtype == dtype
    # Half a place, and the rounding of single precision.
    limit = torch.finfo(dtype).eps / 2 * 1.001
    assert float(((found.double() - exact) / exact).abs().max()) <= limit


def test_step_by_step_reads_out_the_same_in_half_precision(spiking_digits: Callable[[str], SpikingNetwork], digits_test: Any) -> None:
    snn = copy.deepcopy(spiking_digits("threshold_balancing")).bfloat16().with_steps(300)
    images = digits_test[0][:2].bfloat16()
    with torch.no_grad():
        whole, stepped = simulate(snn, images), simulate(snn, images, step_by_step=True)
    assert bool(torch.isfinite(whole.logits).all())
    assert torch.equal(whole.logits[[0, 255, 256, 299]], stepped.logits[[0, 255, 256, 299]])


def test_pools_of_spikes_in_half_precision_lose_none() -> None:
    """In bfloat16 256 + 1 is 256."""
    layer = AccumulatedMaxPool(nn.MaxPool1d(2), 600)
    out = layer(torch.ones(600, 1, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.float().sum(0).flatten().tolist() == [600, 600]


# Whole numbers


def whole_network(weights: list[float], theta: float, steps: int, **flags: Any) -> SpikingNetwork:
    """Every step one spike of 1 through each weight to a neuron of its own."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, len(weights)), nn.ReLU(), nn.Linear(len(weights), 2)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    snn = qs.convert(model, torch.ones(4, 1), "threshold_balancing", steps=steps, synchronous=flags.pop("synchronous", False))
    first, second = snn.neurons().values()
    with torch.no_grad():
        snn.network.get_submodule("2").weight.copy_(torch.tensor(weights)[:, None])
        snn.network.get_submodule("4").weight.copy_(snn.network.get_submodule("4").weight.sign() * 3)
        for neuron, level, initial in ((first, 1.0, 0.0), (second, float(theta), flags.get("initial", 0.0))):
            neuron.scaled, neuron.strict = False, flags.get("strict", False) and neuron is second
            for name, value in (("threshold", level), ("initial", initial), ("amplitude", 1.0), ("leak", 1.0)):
                setattr(neuron, name, nn.Parameter(torch.tensor(value), False))
    snn.provenance["weight_bits"] = 8
    return snn


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_whole_currents_at_theta_and_one_beside_it(steps: int, initial: float, strict: bool) -> None:
    """No engine moves a spike: counts are the floor formula in whole numbers."""
    theta = 100
    weights = [99.0, 100.0, 101.0, 33.0, 34.0, 25.0, 50.0, 49.0, -100.0, 0.0]
    totals = [int(weight) * steps + int(initial * theta) for weight in weights]
    wanted = [min(max(-(-total // theta) - 1 if strict else total // theta, 0), steps) for total in totals]
    for engine, synchronous in (("reference", False), ("fused", False), ("integer", False), ("count", True), ("integer", True)):
        snn = whole_network(weights, theta, steps, strict=strict, initial=initial, synchronous=synchronous)
        fast = qs.accelerate(snn, engine)  # type: ignore[arg-type]
        assert any(isinstance(layer, ByteLinear) for layer in fast.network.modules()) == (engine in ("integer", "count"))
        with torch.no_grad():
            counts = list(simulate(fast, torch.ones(1, 1)).spikes.values())[1]
        assert counts.flatten().tolist() == wanted, (engine, synchronous)


@pytest.mark.parametrize(("fan_in", "fits"), [(66_000, True), (67_000, False)])
def test_sums_that_could_leave_32_bits_stay_in_floating_point(
    fan_in: int, fits: bool, convert_given: Callable[..., SpikingNetwork]
) -> None:
    """127 x 255 x 67,000 is more than 2^31: in 32 bits it would be negative, and no neuron behind it would fire."""
    model = nn.Sequential(nn.Linear(1, fan_in), nn.ReLU(), nn.Linear(fan_in, 1), nn.ReLU(), nn.Linear(1, 1)).eval()
    with torch.no_grad():
        for layer, weight in ((model[0], 1.0), (model[2], 127.0), (model[4], 1.0)):
            layer.weight.fill_(weight)
            layer.bias.zero_()
    parameters = NeuronParameters(torch.tensor(1.0), amplitude=1.0, scaled=False, averaged=True)
    snn = convert_given(model, torch.ones(2, 1), lambda site: parameters, 255).as_synchronous()
    snn.provenance["weight_bits"] = 8
    fast = qs.accelerate(snn, "count")
    kept = fast.provenance["engine"]["in floating point"]
    assert ("2: its sums could leave 32 bits" in kept) == (not fits)
    with torch.no_grad():
        assert [counts.unique().tolist() for counts in simulate(fast, torch.ones(1, 1)).spikes.values()] == [[255], [255]]


# Same bytes


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)


def same_runs(one: Run, other: Run) -> bool:
    return same_bytes(one.logits, other.logits) and all(same_bytes(counts, other.spikes[site]) for site, counts in one.spikes.items())


@pytest.fixture(scope="module")
def network() -> tuple[SpikingNetwork, Tensor]:
    """A ResNet with joins, and images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(7, 3, 32, 32, generator=generator)
    return qs.convert(load_model("resnet20,width=4"), images, "threshold_balancing", steps=4), images


@pytest.mark.parametrize("kind", ["plain", "signed", "synchronous", "leaky"])
def test_fused_and_reference_give_the_same_bytes(kind: str, network: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = copy.deepcopy(network[0]), network[1]
    snn = {"signed": snn.as_signed, "synchronous": snn.as_synchronous}.get(kind, lambda: snn)()
    if kind == "leaky":
        for neuron in snn.neurons().values():
            neuron.leak.data.fill_(0.9)
    with torch.no_grad():
        one, other = (simulate(qs.accelerate(snn, engine), images) for engine in ("reference", "fused"))
    assert same_runs(one, other)
    assert sum(int(counts.ne(0).sum()) for counts in one.spikes.values()) > 1000


@pytest.fixture(scope="module")
def exact(network: tuple[SpikingNetwork, Tensor]) -> tuple[SpikingNetwork, Tensor]:
    """The same in whole numbers, the image too."""
    return qs.quantise(network[0], image_bits=10).network, network[1]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_parts(snn: SpikingNetwork, images: Tensor, size: int) -> Run:
    runs = [simulate(snn, part) for part in images.split(size)]
    return Run(torch.cat([run.logits for run in runs], 1), {site: torch.cat([run.spikes[site] for run in runs]) for site in runs[0].spikes})


def test_whole_numbers_give_the_same_bytes_however_they_are_computed(exact: tuple[SpikingNetwork, Tensor], two_threads: None) -> None:
    """Threads, batches, layouts, steps one by one, within a budget of memory, and every engine for them; the image is whole too."""
    snn, images = exact
    with torch.no_grad():
        torch.set_num_threads(1)
        wanted = simulate(snn, images)
        torch.set_num_threads(2)
        ways = {
            "threads": simulate(snn, images),
            "batches": in_parts(snn, images, 3),
            "layout": simulate(copy.deepcopy(snn).to(memory_format=torch.channels_last), images),
            "memory": simulate(snn, images, memory="1MiB"),
            "step by step": simulate(snn, images, step_by_step=True),
            **{engine: in_parts(qs.accelerate(snn, engine), images, 2) for engine in ("reference", "fused", "integer")},  # type: ignore[arg-type]
        }
    assert any(isinstance(layer, ByteConv) for layer in qs.accelerate(snn, "integer").network.modules())
    assert [way for way, run in ways.items() if not same_runs(run, wanted)] == []


def test_counts_at_once_are_those_of_steps(exact: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = exact[0].as_synchronous(), exact[1]
    with torch.no_grad():
        wanted, found = (simulate(qs.accelerate(snn, engine), images) for engine in ("reference", "count"))  # type: ignore[arg-type]
    assert all(same_bytes(counts, found.spikes[site]) for site, counts in wanted.spikes.items())
    torch.testing.assert_close(found.logits[-1], wanted.logits[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_saved_network_answers_with_the_same_bytes(
    layout: torch.memory_format, network: tuple[SpikingNetwork, Tensor], tmp_path: Path
) -> None:
    """In the same layout of memory, which no file holds."""
    snn, images = copy.deepcopy(network[0]).to(memory_format=layout), network[1]
    for name in ("one", "two"):
        snn.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = qs.load(tmp_path / "one")
    assert all(same_bytes(value, loaded.state_dict()[name]) for name, value in snn.state_dict().items())
    loaded.to(memory_format=layout)
    loaded.save(tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one").read_bytes()
    with torch.no_grad():
        assert same_runs(simulate(loaded, images), simulate(snn, images))


CHAIN = """
import sys

import torch

from quickspike.cli import main

torch.set_num_threads(int(sys.argv[1]))
digits = ["--data", "digits", "--device", "cpu"]
train = [*digits, "--epochs", "1", "--batch-size", "64", "--validation", "100", "--json"]
main(["train", "digits_cnn,width=4,dropout=0.1", *train, "--out", "source", "--noise", "0.05"])
weights = ["--weights", "source/weights.safetensors", "--calibration-images", "200"]
main(["convert", "digits_cnn,width=4,dropout=0.1", *weights, *digits, "--steps", "3", "--json", "--refine", "bias_correction"])
main(["tune", "network.safetensors", *train, "--dropout", "0.1", "--out", "tuned"])
main(["evaluate", "tuned/network.safetensors", *digits, "--engine", "fused", "--out", "report.json", "--json"])
main(["train", "digits_cnn,width=4,dropout=0.1", *train, "--seed", "1", "--out", "other"])
"""
MADE = ("source/weights.safetensors", "network.safetensors", "tuned/network.safetensors")


def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, convert, refine, tune and evaluate: files and figures, with one thread and with two; one of the processes is this one."""
    (tmp_path / "chain.py").write_text(CHAIN)
    # Threads that wait actively for each other hold up everything on a busy machine.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}
    processes = {}
    (tmp_path / "one").mkdir()
    for name, threads in {"one again": 1, "two": 2, "two again": 2}.items():
        (tmp_path / name).mkdir()
        command = [sys.executable, tmp_path / "chain.py", str(threads)]
        with (tmp_path / name / "log").open("w") as log:
            processes[name] = subprocess.Popen(command, cwd=tmp_path / name, stdout=log, stderr=log, env=environment)
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "chain.py"), "1"])
    runpy.run_path(str(tmp_path / "chain.py"))
    for name, process in processes.items():
        assert process.wait(timeout=300) == 0, (tmp_path / name / "log").read_text()[-2000:]
    found: dict[str, Any] = {}
    for name in ("one", *processes):
        folder = tmp_path / name
        report = json.loads((folder / "report.json").read_text())
        figures = {key: report[key] for key in ("samples", "accuracy", "rates", "latency")}
        losses = re.findall(r"^tune,1,[^,]+", (folder / "tuned" / "metrics.csv").read_text(), re.M)
        assert len(losses) == 1
        found[name] = [hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in MADE], figures, losses
        assert (folder / "other" / "weights.safetensors").read_bytes() != (folder / MADE[0]).read_bytes(), "nothing is drawn"
    assert found["one"] == found["one again"]
    assert found["two"] == found["two again"]


# The page


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=["boundary", "bfloat16"])
def test_the_python_in_the_page_runs(code: str) -> None:
    assert "assert" in code
    exec(code, {})


def test_the_page_names_tests_that_are_there() -> None:
    named = 0
    for file, text in re.findall(r"(test_\w+\.py)((?:(?!test_\w+\.py).)*)", PAGE, re.DOTALL):
        source = (ROOT / "tests" / file).read_text()
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in source, (file, name)
            named += 1
    assert named > 15
    references = set(re.findall(r"\[(\d+)\] test_", PAGE))
    used = {number for group in re.findall(r"\[([\d, ]+)\]", PAGE) for number in group.split(", ")}
    assert used == references
