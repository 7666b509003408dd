"""The compiled loops against the reference scan: the same spikes bit for bit, the same gradients up to rounding."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike import kernels
from quickspike.methods.qcfs import Support, quantise
from quickspike.neuron import Neuron, NeuronParameters, Surrogate, SurrogateShape, _Rule, _Scan

SURROGATES: dict[str, Surrogate] = {
    "triangular": Surrogate("triangular", width=0.8, scale=0.3),
    "boxcar": Surrogate("boxcar", width=0.5, scale=2.0),
    "unscaled": Surrogate("boxcar", unscaled=True),
}
# One block; several groups; more channels than a block has places; channels that do not divide a block; one neuron too many.
SHAPES = [(3, 5), (2, 3, 4, 4), (40, 48, 5, 7), (20, 700, 3, 2), (300, 130), (27, 19)]
LAYOUTS = [(shape, last) for shape in SHAPES for last in ([False, True] if len(shape) == 4 else [False])]


def case(shape: tuple[int, ...], steps: int, per_channel: bool, seed: int = 0) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Currents `[T*B, ...]` on a grid, so that some potentials meet thresholds exactly, and (v0, theta, leak, amplitude)."""
    generator = torch.Generator().manual_seed(seed)
    currents = torch.randint(-8, 17, (steps * shape[0], *shape[1:]), generator=generator) / 8
    sizes = (shape[1], *(1,) * (len(shape) - 2)) if per_channel else ()
    theta = torch.randint(4, 12, sizes, generator=generator) / 8
    # Products with it are rounded.
    leak = torch.randint(4, 11, sizes, generator=generator) / 10
    amplitude = torch.rand(sizes, generator=generator) + 0.5
    return currents, (theta * 0.5, theta, leak, amplitude)


def both(currents: Tensor, parameters: tuple[Tensor, ...], rule: _Rule, seed: int = 1) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(outputs, gradients of the currents and of the four parameters), compiled and of the reference."""
    found = []
    for scan in (kernels.fused, lambda *arguments: _Scan.apply(*arguments)[0]):
        x = currents.clone(memory_format=torch.preserve_format).requires_grad_(True)
        leaves = tuple(value.clone().requires_grad_(True) for value in parameters)
        assert kernels.applies(x, leaves, rule.steps, rule.surrogate.shape)
        out = scan(x, *leaves, rule)
        generator = torch.Generator().manual_seed(seed)
        # Positive, so that sums do not cancel and the last digits count.
        towards = (torch.rand(out.shape, generator=generator) + 0.5).to(out.dtype)
        found.append((out.detach(), *torch.autograd.grad(out, (x, *leaves), towards)))
    return found[0], found[1]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(compiled: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> None:
    assert torch.equal(compiled[0], reference[0])
    assert compiled[0].stride() == reference[0].stride()
    names = ("currents", "v0", "theta", "leak", "amplitude")
    for name, found, wanted in zip(names, compiled[1:], reference[1:], strict=True):
        assert found.dtype == wanted.dtype, name
        assert found.shape == wanted.shape, name
        # The reference adds up in another order, and rounds half-precision gradients at the end only, as the loops do.
        scale = float(wanted.float().abs().max())
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2}[found.dtype]
        torch.testing.assert_close(
            found.float(), wanted.float(), rtol=tolerance, atol=tolerance * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS, ids=str)
def test_the_loops_are_the_reference(shape: tuple[int, ...], per_channel: bool, channels_last: bool, surrogate: str, threads: int) -> None:
    steps = 3
    currents, parameters = case(shape, steps, per_channel)
    if channels_last:
        currents = currents.contiguous(memory_format=torch.channels_last)
    check(*both(currents, parameters, _Rule(steps, False, False, SURROGATES[surrogate])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 9, 150])
def test_steps_boundaries_and_precision(steps: int, constant: bool, strict: bool, dtype: torch.dtype) -> None:
    currents, parameters = case((4, 24, 6, 6), 1 if constant else steps, per_channel=True)
    currents = currents.to(dtype).contiguous(memory_format=torch.channels_last)
    compiled, reference = both(currents, parameters, _Rule(steps, constant, strict, SURROGATES["triangular"]))
    assert 0.05 < float(reference[0].ne(0).float().mean()) < 0.95
    check(compiled, reference)


def test_strict_firing_differs_on_this_data() -> None:
    """Else the test above would not see a loop that forgets it."""
    currents, parameters = case((4, 24, 6, 6), 2, per_channel=True)
    (loose, *_), (strict, *_) = (both(currents, parameters, _Rule(2, False, flag, SURROGATES["triangular"]))[0] for flag in (False, True))
    assert not torch.equal(loose, strict)


def test_parameters_single_and_per_channel_mix() -> None:
    currents, (v0, theta, _, _) = case((6, 10, 4, 4), 2, per_channel=True)
    mixed = (v0, theta, torch.tensor(0.75), torch.tensor(1.5))
    check(*both(currents.contiguous(memory_format=torch.channels_last), mixed, _Rule(2, False, False, SURROGATES["boxcar"])))


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    currents, parameters = case((60, 48, 5, 7), 2, per_channel=True)
    rule = _Rule(2, False, False, SURROGATES["triangular"])
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(both(currents, parameters, rule)[0])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("currents", "theta", "shape"),
    [
        pytest.param(torch.ones(2, 3, dtype=torch.float64), torch.tensor(1.0), "boxcar", id="double precision"),
        pytest.param(torch.ones(2, 3), torch.ones(2, 3), "boxcar", id="a threshold per neuron"),
        pytest.param(torch.ones(2, 3), torch.tensor(1.0), "arctan", id="a smooth surrogate"),
        pytest.param(torch.ones(4, 6)[:, ::2], torch.tensor(1.0), "boxcar", id="gaps in memory"),
        pytest.param(torch.ones(0, 3), torch.tensor(1.0), "boxcar", id="nothing"),
    ],
)
def test_the_rest_is_left_to_the_reference(currents: Tensor, theta: Tensor, shape: SurrogateShape) -> None:
    assert not kernels.applies(currents, (theta,), 2, shape)


# As an operator


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks at it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("constant", [False, True])
def test_the_operator_keeps_torchs_rules(constant: bool, dtype: torch.dtype) -> None:
    currents, parameters = case((2, 6, 3, 3), 1 if constant else 3, per_channel=True)
    settings = kernels._plain(_Rule(3, constant, False, SURROGATES["triangular"]))
    inputs = [currents.to(dtype).contiguous(memory_format=torch.channels_last), *parameters]
    torch.library.opcheck(kernels.fire_operator, (*(value.clone().requires_grad_(True) for value in inputs), None, *settings))
    torch.library.opcheck(kernels.fire_operator, (*inputs, torch.uint8, *settings))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_network_compiles_without_graph_breaks_and_learns(backend: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    snn = qs.convert(model, images, "ultra_low_latency", steps=2).to(memory_format=torch.channels_last)
    for neuron in snn.neurons().values():
        neuron.threshold.requires_grad_(True)
    learned = [parameter for parameter in snn.parameters() if parameter.requires_grad]
    torch.compiler.reset()
    found = []
    for network in (snn, torch.compile(snn, backend=backend, fullgraph=True)):
        logits = network(images)
        found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), learned)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_an_exported_network_calls_the_operator() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()
    for precision in ("fp32", "bf16"):
        snn = qs.accelerate(qs.convert(model, images, "threshold_balancing", steps=2), "fused", precision=precision)
        with torch.no_grad():
            program = torch.export.export(snn, (images,), strict=True)
            assert "quickspike.fire" in str(program.graph)
            torch.testing.assert_close(program.module()(images), snn(images))


CACHED = """
import torch

from quickspike import kernels, loops
from quickspike.neuron import Surrogate, _Rule

one = torch.ones(1)
kernels.count(torch.ones(1, 1), 0 * one, one, one, _Rule(2, True, False, Surrogate()), 1, torch.uint8)
print(sum(loops.count.stats.cache_hits.values()), sum(loops.count.stats.cache_misses.values()))
"""


def test_what_is_compiled_serves_the_next_process(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True, check=True)
        found.append(run.stdout.split())
    assert found == [["0", "1"], ["1", "0"]]


# Counts without steps


def beside(x: Tensor, ulps: int) -> Tensor:
    """The numbers that many places above (or below)."""
    for _ in range(abs(ulps)):
        x = torch.nextafter(x, torch.full_like(x, float("inf") if ulps > 0 else float("-inf")))
    return x


def near_the_levels(theta: Tensor, initial: Tensor, steps: int) -> Tensor:
    """Currents `[B, C]` whose potential ends at or next to a multiple of theta, and others, some of them extreme."""
    levels = torch.arange(-2, steps + 3, dtype=torch.float64)[:, None]
    exact = ((levels * theta.double() - initial.double()) / steps).float()
    rest = torch.rand(64, theta.numel(), generator=torch.Generator().manual_seed(steps)) * 3 * theta - theta
    extreme = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])[:, None]
    parts = [beside(exact, ulps) for ulps in (-3, -1, 0, 1, 3)] + [rest, extreme.expand(-1, theta.numel())]
    parts += [beside(theta.expand(1, -1), ulps) for ulps in (-2, -1, 0, 1, 2)]
    return torch.cat(parts)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("start", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 64, 255])
def test_counts_are_those_of_the_steps(steps: int, start: float, strict: bool) -> None:
    theta = torch.rand(37, generator=torch.Generator().manual_seed(1)) * 5 + 0.01
    initial = theta * start
    currents = near_the_levels(theta, initial, steps)
    rule = _Rule(steps, True, strict, Surrogate())
    out, _ = _Scan.apply(currents, initial, theta, torch.ones(37), torch.ones(37), rule)
    expected = out.unflatten(0, (steps, -1)).ne(0).sum(0).to(torch.int32)
    assert torch.equal(kernels.count(currents, initial, theta, torch.ones(37), rule, 1, torch.int32), expected)
    assert len(expected.unique()) == steps + 1


def test_counts_need_no_steps_where_nothing_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """The direct way is taken: with levels that fit no step, the steps would give other counts."""
    theta, initial = torch.tensor(1.0), torch.tensor(0.5)
    currents = (torch.arange(8 * 512) % 8).float().reshape(8, 512) / 8
    rule = _Rule(8, True, False, Surrogate())
    expected = kernels.count(currents, initial, theta, torch.tensor(1.0), rule, 1, torch.int32)
    assert torch.equal(expected, (8 * currents).to(torch.int32))
    monkeypatch.setattr(kernels, "_firing_level", lambda theta, strict: torch.full_like(theta, 1e9))
    assert torch.equal(kernels.count(currents, initial, theta, torch.tensor(1.0), rule, 1, torch.int32), expected)
    leaking = kernels.count(currents, initial, theta, torch.tensor(0.9), rule, 1, torch.int32)
    assert not bool(leaking.any())


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 64, 128])
@pytest.mark.parametrize("strict", [False, True])
def test_whole_numbers_that_end_on_a_multiple_of_the_threshold_are_counted_as_step_by_step(steps: int, strict: bool) -> None:
    theta = torch.tensor([2.0, 6.0, 40.0, 2.0**12]).view(4, 1, 1)
    # Every whole sum, and so every multiple of theta; halves and sums too large for exact steps among them.
    sums = torch.arange(-200, 200 + 42 * steps).float()
    sums = torch.cat([sums, 2.0**12 * torch.arange(-2, steps + 3), torch.arange(64) / 2, torch.tensor([2.0**23, 2.0**23 + 2, -(2.0**24)])])
    current = sums.expand(1, 4, 1, -1).contiguous(memory_format=torch.channels_last)
    counts = []
    for compiled in (True, False):
        neuron = Neuron(NeuronParameters(theta, 0.5, 1.0, 1.0, False, strict), steps, constant_input=False)
        neuron.counts, neuron.compiled = True, compiled
        with torch.no_grad():
            counts.append(neuron(current))
    assert torch.equal(counts[0], counts[1])
    assert int(counts[0].max()) == steps


def staircases(z: Tensor, ceiling: Tensor, levels: int, support: Support, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """(levels times ceiling, gradient of z, gradient of the ceiling) as `qcfs.quantise` gives them."""
    z, ceiling = z.clone(memory_format=torch.preserve_format).requires_grad_(True), ceiling.clone().requires_grad_(True)
    out = quantise(z, ceiling, levels, support, shift)
    # Positive, so that sums do not cancel and the last digits count; whole eighths, which no type rounds.
    towards = (torch.randint(4, 12, out.shape, generator=torch.Generator().manual_seed(3)) / 8).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, (z, ceiling), towards)


def staircase_case(shape: tuple[int, ...], per_channel: bool, channels_last: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(inputs below, on, between and above the levels and the ends of all supports, ceilings)."""
    currents, (_, ceiling, _, _) = case(shape, 1, per_channel)
    z = currents.to(dtype)
    return (z.contiguous(memory_format=torch.channels_last) if channels_last else z), ceiling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", ["inside", "clamp_after", "paper", "triangular"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS, ids=str)
def test_the_compiled_staircase_is_the_reference(
    shape: tuple[int, ...],
    channels_last: bool,
    per_channel: bool,
    support: Support,
    dtype: torch.dtype,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z, ceiling = staircase_case(shape, per_channel, channels_last, dtype)
    for levels, shift in ((1, 0.5), (3, 0.5), (4, 0.0)):
        assert kernels.staircase_applies(z, ceiling)
        out, to_z, to_ceiling = staircases(z, ceiling, levels, support, shift)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "staircase_applies", lambda *_: False)
            wanted = staircases(z, ceiling, levels, support, shift)
            # The type of z rounds the reference's terms, if it is bfloat16; ends of supports are rounded to it as well, so that
            # only where none of them is rounded does single precision tell the sum.
            exact = staircases(z.float(), ceiling, levels, support, shift) if levels != 3 else wanted
        assert torch.equal(out, wanted[0])
        assert torch.equal(to_z, wanted[1])
        assert out.stride() == to_z.stride() == z.stride()
        if levels != 3 or dtype == torch.float32:
            torch.testing.assert_close(to_ceiling, exact[2], rtol=2e-6, atol=1e-4)


def test_triangles_of_what_is_no_number_pass_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.tensor([[math.nan, 0.25, math.inf, -math.inf]]).expand(40, 4).contiguous()
    compiled = staircases(z, torch.ones(4), 2, "triangular", 0.5)
    monkeypatch.setattr(kernels, "staircase_applies", lambda *_: False)
    reference = staircases(z, torch.ones(4), 2, "triangular", 0.5)
    for found in (compiled, reference):
        assert bool(found[0][:, 0].isnan().all())
        # A quarter is a jump.
        assert bool((found[1][:, 1] >= 1).all())
        assert bool((found[1][:, [0, 2, 3]] == 0).all())
    assert torch.equal(compiled[1], reference[1])


def test_the_staircase_of_nan_is_nan_and_its_gradient_is_not_lost() -> None:
    z = torch.tensor([[math.nan, 0.5, 2.0]]).expand(40, 3).contiguous()
    out, to_z, to_ceiling = staircases(z, torch.ones(3), 2, "inside", 0.5)
    assert bool(out[:, 0].isnan().all())
    assert out[0, 1:].tolist() == [0.5, 1.0]
    assert bool((to_z[:, 1] > 0).all())
    assert bool((to_z[:, 2] == 0).all())
    assert bool(to_ceiling[0].isnan())
    assert bool(to_ceiling[1:].isfinite().all())


@pytest.mark.parametrize(
    ("z", "ceiling"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.ones((), dtype=torch.float64)),
        (torch.zeros(2, 3), torch.ones((), dtype=torch.float64)),
        (torch.zeros(2, 3, 4), torch.ones(4)),
        (torch.zeros(2, 3, 4).transpose(0, 2), torch.ones(())),
        (torch.zeros(0, 3), torch.ones(3)),
        (torch.zeros(2, 3, device="meta"), torch.ones((), device="meta")),
    ],
    ids=["double", "double ceiling", "along the last axis", "gaps in memory", "empty", "another device"],
)
def test_other_staircases_are_left_to_the_reference(z: Tensor, ceiling: Tensor) -> None:
    assert not kernels.staircase_applies(z, ceiling)
