"""Random convolutional networks convert rightly, or are refused by name; nothing else happens."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import quickspike as qs
from quickspike.console import track
from quickspike.errors import UnsupportedOperatorError
from quickspike.files import check_writable, write_text
from quickspike.provenance import commit, machine, versions
from random_graphs import IMAGE, REFUSED, Drawn, RandomGraph, all_networks, drawn_networks

EXAMPLES = int(os.environ.get("QUICKSPIKE_GRAPHS", "12"))
"""Graphs drawn per test."""
STEPS = 256
drawing = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def images(count: int = 3) -> Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(5))


def unchanged(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def off(got: Tensor, wanted: Tensor) -> float:
    """Largest distance, in units of the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))


@dataclass(frozen=True)
class Found:
    """Of a network that converts: how far the outputs are off, in units of the largest."""

    graph: float
    synchronous: float
    weighted: float
    streaming: float
    """After `STREAMED` steps."""


CEILINGS = {"ceiling": "percentile", "percentile": 100.0}
STREAMED = (32, 512)
WEIGHTED = 7
"""127 levels."""


def check(drawn: Drawn) -> Found | None:
    """Everything that must hold for a network; None if it is refused by name."""
    net = RandomGraph(drawn)
    before = copy.deepcopy(net.state_dict())
    refused = any(block[-1] in REFUSED for block in drawn.blocks)
    try:
        traced = qs.trace(net, images(1), pieces=64)
    except UnsupportedOperatorError as error:
        assert refused
        assert "Way out: " in str(error)
        assert not qs.inspect(net, images(1)).convertible
        assert unchanged(net, before)
        return None
    assert not refused
    assert traced.sites
    with torch.no_grad():
        graph = off(traced.module(images()), net(images()))
    assert graph < (0.05 if any(one.error for one in traced.coverage.findings) else 1e-4)
    found = Found(graph, synchronous(net), weighted(net), streaming(net, traced.module))
    assert unchanged(net, before)
    return found


def synchronous(net: nn.Module) -> float:
    """Layers that wait see no unevenness: what is left is a half step of the largest activation for every neuron."""
    inputs = images(8)
    snn = qs.convert(net, inputs, steps=STEPS, synchronous=True, pieces=64, **CEILINGS)
    with torch.no_grad():
        error = off(snn(inputs), net(inputs))
    assert error < 0.1
    return error


def weighted(net: nn.Module) -> float:
    """A few weighted steps give what powers of two as many plain ones do; rounding moves a spike now and then."""
    inputs = images(8)
    snn = qs.convert(net, inputs, steps=WEIGHTED, weighted=True, pieces=64, **CEILINGS)
    with torch.no_grad():
        found, wanted = snn(inputs), snn.rate_coded()(inputs)
        error = off(found, net(inputs))
    assert off(found, wanted) < 0.02
    assert error < 0.1
    return error


def streaming(net: nn.Module, lines: nn.Module) -> float:
    """Time folded into the batch gives what a run step by step gives, and the error falls as T rises; the file does too."""
    inputs = images(4)
    snn = qs.convert(net, inputs, steps=STREAMED[1], pieces=64, **CEILINGS)
    with torch.no_grad():
        wanted, logits = lines(inputs), snn.run(inputs).logits
        early, late = (off(logits[steps - 1], wanted) for steps in STREAMED)
        few = snn.with_steps(5)
        assert torch.allclose(qs.simulate(few, inputs, step_by_step=True).logits, few.run(inputs).logits, rtol=1e-3, atol=1e-3)
        with tempfile.TemporaryDirectory() as folder:
            few.save(Path(folder) / "network.safetensors")
            assert torch.equal(qs.load(Path(folder) / "network.safetensors")(inputs[:2]), few(inputs[:2]))
    assert late < max(0.5 * early, 0.03), (early, late)
    return late


@drawing
@given(drawn_networks())
def test_a_random_graph_converts_rightly(drawn: Drawn) -> None:
    assert check(drawn) is not None


@settings(drawing, max_examples=max(EXAMPLES // 4, 5))
@given(drawn_networks(smooth=True))
def test_with_smooth_activations_too(drawn: Drawn) -> None:
    assert check(drawn) is not None


@drawing
@given(drawn_networks(refused=True).filter(lambda drawn: any(block[-1] in REFUSED for block in drawn.blocks)))
def test_what_does_not_convert_is_refused_by_name(drawn: Drawn) -> None:
    assert check(drawn) is None


ORDER = {
    "plain": (("plain", "nn.Conv2d", "behind", "nn.ReLU", "nothing"),) * 3,
    "residual": (
        ("residual", "nn.Conv2d", "behind", "F.relu", "nn.AvgPool2d"),
        ("residual of spikes", "grouped", "none", "nn.ReLU", "nothing"),
    ),
    "concatenated": (
        ("concatenated", "nn.Conv2d", "in front", "nn.ReLU", "nn.MaxPool2d"),
        ("shared", "depthwise", "none", "x.relu()", "nothing"),
    ),
    "gated": (("gate", "nn.Conv2d", "behind", "nn.ReLU", "nothing"), ("square", "nn.ConvTranspose2d", "none", "nn.ReLU", "nothing")),
}


@pytest.mark.parametrize("name", ORDER)
def test_the_error_falls_as_the_number_of_steps_rises(name: str) -> None:
    """Streaming, nothing clipped: what every neuron still owes after T steps is a spike or so, hence slope -1."""
    net, inputs = RandomGraph(Drawn(ORDER[name], "flatten", 3)), images(8)
    times = (32, 64, 128, 256, 512, 1024)
    errors = []
    with torch.no_grad():
        for steps in times:
            snn = qs.convert(net, inputs, steps=steps, ceiling="percentile", percentile=100.0)
            errors.append(float((snn(inputs) - net(inputs)).abs().mean()))
    slope = np.polyfit(np.log(times), np.log(errors), 1)[0]
    assert -1.2 < slope < -0.8, errors


def main(count: int, out: Path) -> None:
    """`make graphs`: as many networks, always the same ones, one line that says how it went, and a report."""
    check_writable(out)
    found: list[Found | None] = []
    bar = iter(track(range(count), "random graphs"))
    started = time.perf_counter()

    @settings(drawing, max_examples=count, derandomize=True, database=None)
    @given(all_networks())
    def every(drawn: Drawn) -> None:
        next(bar, None)
        found.append(check(drawn))

    # A network that fails is drawn again and again, to find a smaller one: then there is no report, but an error.
    every()
    right = [one for one in found if one is not None]
    worst = {field.name: float(f"{max(getattr(one, field.name) for one in right):.2g}") for field in dataclasses.fields(Found)}
    refused = len(found) - len(right)
    sys.stdout.write(
        f"{len(found)} random graphs: {len(right)} converted, {refused} refused by name, 0 wrong, 0 crashes; largest relative errors: "
        f"{', '.join(f'{name} {error:g}' for name, error in worst.items())} (T = {STEPS} synchronous, {WEIGHTED} weighted, "
        f"{STREAMED[1]} streaming)\n"
    )
    report = {
        "networks": len(found),
        "converted": len(right),
        "refused_by_name": refused,
        "largest_relative_errors": worst,
        "steps": {"synchronous": STEPS, "weighted": WEIGHTED, "streaming": STREAMED[1]},
        "seconds": round(time.perf_counter() - started),
        **{"commit": commit(), "machine": machine(), "versions": versions()},
    }
    write_text(out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    # As in the tests: these networks are too small to share out.
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
