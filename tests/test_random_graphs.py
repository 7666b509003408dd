"""Random convolutional networks convert rightly, or are refused by name; nothing else happens."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import quickspike as qs
from quickspike.conversion import SpikingNetwork
from quickspike.errors import UnsupportedOperatorError
from random_graphs import IMAGE, REFUSED, Drawn, RandomGraph, drawn_networks

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


def checked(drawn: Drawn) -> tuple[nn.Module, SpikingNetwork]:
    """The network and its synchronous conversion, after the graph has been compared."""
    net = RandomGraph(drawn)
    before = copy.deepcopy(net.state_dict())
    traced = qs.trace(net, images(1), pieces=64)
    with torch.no_grad():
        assert off(traced.module(images()), net(images())) < (0.05 if any(one.error for one in traced.coverage.findings) else 1e-4)
    ceilings = {"ceiling": "percentile", "percentile": 100.0}
    snn = qs.convert(net, images(8), "threshold_balancing", steps=STEPS, synchronous=True, pieces=64, **ceilings)
    assert unchanged(net, before)
    return net, snn


def right(net: nn.Module, snn: SpikingNetwork) -> None:
    """Layers that wait see no unevenness: what is left is a half step of the largest activation for every neuron."""
    with torch.no_grad():
        inputs = images(8)
        assert off(snn(inputs), net(inputs)) < 0.1
        with tempfile.TemporaryDirectory() as folder:
            snn.save(Path(folder) / "network.safetensors")
            assert torch.equal(qs.load(Path(folder) / "network.safetensors")(inputs[:2]), snn(inputs[:2]))


@drawing
@given(drawn_networks())
def test_a_random_graph_converts_rightly(drawn: Drawn) -> None:
    right(*checked(drawn))


@settings(drawing, max_examples=max(EXAMPLES // 4, 5))
@given(drawn_networks(smooth=True))
def test_with_smooth_activations_too(drawn: Drawn) -> None:
    right(*checked(drawn))


@drawing
@given(drawn_networks(smooth=True, refused=True))
def test_what_does_not_convert_is_refused_by_name(drawn: Drawn) -> None:
    net = RandomGraph(drawn)
    before = copy.deepcopy(net.state_dict())
    refused = any(block[-1] in REFUSED for block in drawn.blocks)
    try:
        traced = qs.trace(net, images(1))
    except UnsupportedOperatorError as error:
        assert refused
        assert "Way out: " in str(error)
        assert not qs.inspect(net, images(1)).convertible
    else:
        assert not refused
        assert qs.inspect(net, images(1)).convertible
        assert traced.sites
    assert unchanged(net, before)


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
