"""A memory budget takes a batch in parts, and changes nothing else."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import quickspike as qs
from quickspike.errors import OptionError
from quickspike.memory import Parts, in_bytes, keep_freed_memory, parts
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
    counters = 2 * 100 * 8
    # Constant: the image and its currents. Per step: spikes of one layer and the currents that they cause.
    fixed, each = counters + 1.5 * 4 * (10 + 100), 1.5 * 4 * (100 + 100)
    whole = int(fixed + 8 * each) + 1
    assert parts(snn, images, whole) == Parts(1, 8)
    assert parts(snn, images, 5 * whole) == Parts(5, 8)
    assert parts(snn, images, whole - 2) == Parts(1, 7)
    assert parts(snn, images, int(fixed + each) + 1) == Parts(1, 1)
    with pytest.raises(OptionError, match="one sample needs about 0 MiB"):
        parts(snn, images, int(fixed + each) - 1)
    with pytest.raises(OptionError, match="wait for whole windows"):
        parts(snn.as_synchronous(), images, whole - 2)


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
