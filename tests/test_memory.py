"""A memory budget takes a batch in parts, and changes nothing else."""

from __future__ import annotations

import copy
import itertools
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import quickspike as qs
from quickspike.early_exit import Exit, leads_of
from quickspike.errors import OptionError
from quickspike.memory import Parts, counter_type, in_bytes, keep_freed_memory, parts
from quickspike.neuron import Increment, RunningMean, Timed
from quickspike.simulation import simulate
from random_networks import NETWORKS, draw


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2**31), ("500 MB", 5 * 10**8), ("1.5kib", 1536), ("7", 7), (4096, 4096), ("3 B", 3), ("0.5GB", 5 * 10**8)],
)
def test_amounts(text: str | int, expected: int) -> None:
    assert in_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "2 GiBB", "-1", "0", True, "1e9", "GiB"])
def test_what_is_no_amount(text: object) -> None:
    with pytest.raises(OptionError, match="number with a unit such as 2GiB or 500MB"):
        in_bytes(text)


@pytest.fixture(scope="module")
def chain() -> tuple[qs.SpikingNetwork, Tensor]:
    """One layer of 100 neurons: its currents, spikes and logits are all there is."""
    torch.manual_seed(0)
    images = torch.randn(12, 10)
    model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 4))
    return qs.convert(model, images, "threshold_balancing", steps=8), images


def test_the_parts_follow_from_the_values_that_are_alive(chain: tuple[qs.SpikingNetwork, Tensor]) -> None:
    snn, images = chain
    # Bytes: counters up to 8, potentials, and four copies of the answers while they are put together.
    counters, states, answers = 2 * 100, 2 * 100 * 4, 4 * 4 * 4
    # Constant: the image and its currents. Per step: spikes of one layer and the currents that they cause.
    fixed, each = 3.25 * 4 * (10 + 100), 3.25 * 4 * (100 + 100)
    whole = int(counters + fixed + 8 * each) + 1
    assert parts(snn, images, whole) == Parts(1, 8)
    assert parts(snn, images, 5 * whole) == Parts(5, 8)
    # Those of the steps that go on and of the whole simulation.
    fixed += 2 * counters + 8 * answers
    assert parts(snn, images, int(fixed + states + 5 * each) + 1) == Parts(1, 5)
    assert parts(snn, images, int(fixed + states + each) + 1) == Parts(1, 1)
    with pytest.raises(OptionError, match=r"one sample needs about [\d.]+ KiB \(.*\), more than the [\d.]+ KiB allowed"):
        parts(snn, images, int(fixed + states + each) - 1)
    with pytest.raises(OptionError, match="wait for steps of those before"):
        parts(snn.as_synchronous(), images, whole - 2)
    # The currents of the first layer are read again at every step.
    single = fixed + 2 * states + 4 * 100 + each
    assert parts(snn, images, int(3 * single) + 1, step_by_step=True) == Parts(3, 1)
    with pytest.raises(OptionError, match="one step of it"):
        parts(snn, images, int(single) - 1, step_by_step=True)


@pytest.mark.parametrize(("steps", "kind"), [(1, torch.int8), (127, torch.int8), (128, torch.int16), (32768, torch.int32)])
def test_counters_are_as_small_as_they_can_be(steps: int, kind: torch.dtype) -> None:
    assert counter_type(steps) == kind
    snn = qs.convert(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), torch.ones(2, 1), steps=1)
    with torch.no_grad():
        snn.neuron("1").threshold.fill_(1e-6)
        snn.network.get_submodule("0").bias.fill_(10.0)
        run = snn.with_steps(min(steps, 200)).run(torch.ones(3, 1))
    (counts,) = run.spikes.values()
    assert counts.flatten().tolist() == [min(steps, 200)] * 3
    if steps <= 200:
        assert counts.dtype == kind


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(**NETWORKS)
def test_a_budget_changes_no_spike(**drawn: object) -> None:
    snn, images = draw(**drawn)
    with torch.no_grad():
        expected = simulate(snn, images)
        one = _smallest(snn, images)
        for budget in (one, 3 * one, 10**9):
            found = simulate(snn, images, memory=budget)
            for site, counts in expected.spikes.items():
                assert torch.equal(counts, found.spikes[site]), site
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def _smallest(snn: qs.SpikingNetwork, images: Tensor) -> int:
    low, high = 1, 2**40
    while low < high:
        middle = (low + high) // 2
        try:
            parts(snn, images, middle)
        except OptionError:
            low = middle + 1
        else:
            high = middle
    return low


def test_a_network_keeps_its_budget(chain: tuple[qs.SpikingNetwork, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    snn, images = chain
    fast = qs.accelerate(snn, "fused", memory="40 kB")
    assert fast.memory == 40_000
    seen: list[int] = []
    fast.network.get_submodule("0").register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    with torch.no_grad():
        assert torch.allclose(fast(images), snn(images), atol=1e-5)
    assert max(seen) < len(images)
    assert sum(seen[1:]) == len(images)


def test_an_accelerated_network_keeps_the_budget_of_its_own_network(chain: tuple[qs.SpikingNetwork, Tensor]) -> None:
    snn = copy.deepcopy(chain[0])
    snn.memory = "40 kB"
    assert qs.accelerate(snn, "fused").memory == "40 kB"
    assert qs.accelerate(snn, "fused", memory="80 kB").memory == 80_000


def test_the_demand_is_measured_once(chain: tuple[qs.SpikingNetwork, Tensor]) -> None:
    snn, images = chain
    snn = snn.with_steps(5)
    seen: list[int] = []
    snn.network.get_submodule("0").register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    with torch.no_grad():
        simulate(snn, images, memory="1GB")
        simulate(snn, images, memory="1GB")
    assert seen == [1, len(images), len(images)]
    assert parts(snn.with_steps(6), images, 10**6) != parts(snn, images, 10**6)


# Peaks, in bytes that torch's allocator counts: the same in every run, whatever the system makes of them


def peak(work: Callable[[], object]) -> tuple[int, int]:
    """(the most bytes that were held at a time, those that are held at the end) by what `work` allocates."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert result is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(held), held[-1]


def pictures() -> tuple[qs.SpikingNetwork, Tensor]:
    """Many neurons, few classes, and max-pooling, whose state has to be kept between steps and which comes before its neurons."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 5))
    return qs.convert(model, images[:4], "threshold_balancing", steps=24), images


@pytest.mark.parametrize("engine", ["reference", "fused", "integer"])
@pytest.mark.parametrize("budget", [400_000, 9_000_000])
def test_the_peak_does_not_grow_with_the_number_of_samples(engine: Literal["reference", "fused", "integer"], budget: int) -> None:
    snn, images = pictures()
    fast = qs.accelerate(snn, engine, memory=budget)
    with torch.no_grad():
        fast(images[:1])  # the demand is found, loops are compiled
    split = parts(fast, images, budget, counted=False)
    assert (split.samples, split.steps < 24) == (1, True) if budget < 10**6 else (split.samples > 1, split.steps == 24)
    few, many = (peak(lambda number=number: fast(images[: number * split.samples]))[0] for number in (1, 4))
    answers = 4 * split.samples * 5 * 4
    assert few <= many <= 1.01 * few + answers
    assert many <= budget


def test_counts_are_the_only_thing_that_grows() -> None:
    snn, images = pictures()
    few, many = (peak(lambda number=number: simulate(snn, images[:number], memory=9_000_000)) for number in (16, 64))
    neurons = 16 * 16 * 16 + 2 * 16 * 8 * 8
    for top, result in (few, many):
        # Beside the result there is one part of the batch.
        assert top - result <= 9_000_000
    growth = 48 * (neurons + 24 * 5 * 4)
    assert many[1] - few[1] == pytest.approx(growth, rel=0.01)
    assert many[0] - few[0] == pytest.approx(growth, rel=0.01)


def test_samples_that_may_stop_keep_within_the_budget() -> None:
    snn, images = pictures()
    with torch.no_grad():
        leads = leads_of(simulate(snn, images).logits)
        exit = Exit((float(leads[5].median()),) * (snn.steps - 1), 0.0, 0.0)
        whole = simulate(snn, images, exit=exit)
        found = simulate(snn, images, exit=exit, memory=2_000_000)
    assert found.stopped is not None
    assert whole.stopped is not None
    assert len(found.stopped.unique()) > 1
    assert torch.equal(found.stopped, whole.stopped)
    assert all(torch.equal(counts, found.spikes[site]) for site, counts in whole.spikes.items())
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-4, atol=1e-5)
    snn.memory = 2_000_000
    top, result = peak(lambda: snn.run(images, exit=exit))
    assert top - result <= 2_000_000
    snn.memory = None
    assert peak(lambda: snn.run(images, exit=exit))[0] > 4_000_000
    with pytest.raises(OptionError, match="one step of it"):
        simulate(snn, images, exit=exit, memory=50_000)


def test_the_demand_itself_is_found_within_it() -> None:
    """Long simulations of large networks: not even one sample fits with all its steps."""
    snn, images = pictures()
    long = snn.with_steps(256)
    top, _ = peak(lambda: parts(long, images, 10**9))
    assert top < 500_000 < 256 * 4 * 16 * 16 * 16


def test_the_answer_in_parts_of_the_steps_is_that_of_all(chain: tuple[qs.SpikingNetwork, Tensor]) -> None:
    snn, images = chain
    fast = qs.accelerate(snn, "fused")
    with torch.no_grad():
        wanted = fast(images[:1])
        for memory in (7_000, 11_000, 10**6):
            fast.memory = memory
            # Layers add up in another order where they have another number of rows.
            torch.testing.assert_close(fast(images[:1]), wanted)
            torch.testing.assert_close(fast.run(images[:1]).logits[-1], wanted)


# Memory that is used again

FAULTS = """
import resource
import sys

import torch

from quickspike.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
    assert keep_freed_memory()
for _ in range(10):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    """64 MiB five times: new pages each time, unless they are kept."""
    faults = {}
    for how in ("kept", "given back"):
        run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        faults[how] = int(run.stdout)
    assert faults["kept"] < 100
    # Pages may be large ones, of 2 MiB.
    assert faults["given back"] >= 5 * 32


def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    keep_freed_memory.cache_clear()
    try:
        assert not keep_freed_memory()
    finally:
        keep_freed_memory.cache_clear()


@pytest.mark.parametrize("layer", [RunningMean(8), Increment(8)], ids=["mean", "increment"])
def test_what_is_kept_between_steps_holds_one_step(layer: Timed) -> None:
    """A view of the last step would keep all of them, in every layer."""
    x, state = torch.randn(8 * 3, 5), None
    for _ in range(2):
        _, state = layer.scan(x[: 4 * 3], state, 4)
        assert state[1].untyped_storage().nbytes() == 3 * 5 * 4
