"""Activations as sums of clamped ReLUs: exact where they are straight, as close as they say where they are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quickspike as qs
from quickspike import piecewise
from quickspike.errors import OptionError, UnsupportedOperatorError
from quickspike.graph import Traced

X = torch.linspace(-9, 9, 3601, dtype=torch.float64)

EXACT: dict[str, tuple[nn.Module, int]] = {
    "leaky": (nn.LeakyReLU(0.1), 2),
    "steep leaky": (nn.LeakyReLU(-0.5), 2),
    "hardtanh": (nn.Hardtanh(-1, 1), 2),
    "uneven hardtanh": (nn.Hardtanh(-0.5, 2), 2),
    "clamp above": (nn.Hardtanh(1, 3), 1),
    "clamp below": (nn.Hardtanh(-3, -1), 1),
    "relu6": (nn.ReLU6(), 1),
    "hardsigmoid": (nn.Hardsigmoid(), 2),
    "softshrink": (nn.Softshrink(0.5), 2),
    "threshold": (nn.Threshold(1.0, 1.0), 1),
}

APPROXIMATED: dict[str, tuple[nn.Module, float]] = {
    "silu": (nn.SiLU(), 0.009),
    "hardswish": (nn.Hardswish(), 0.0095),
    "gelu": (nn.GELU(), 0.0045),
    "gelu tanh": (nn.GELU(approximate="tanh"), 0.0045),
    "mish": (nn.Mish(), 0.007),
    "softplus": (nn.Softplus(), 0.0055),
    "sharp softplus": (nn.Softplus(beta=5.0), 0.001),
    "sigmoid": (nn.Sigmoid(), 0.003),
    "logsigmoid": (nn.LogSigmoid(), 0.0055),
    "tanh": (nn.Tanh(), 0.0046),
    "elu": (nn.ELU(0.7), 0.0017),
    "celu": (nn.CELU(2.0), 0.008),
    "selu": (nn.SELU(), 0.004),
}


def off(lines: piecewise.Piecewise, function: Callable[[Tensor], Tensor], x: Tensor = X) -> float:
    return float((lines(x) - function(x)).abs().max())


@pytest.mark.parametrize("name", EXACT)
def test_straight_ones_are_exact(name: str) -> None:
    layer, count = EXACT[name]
    lines = piecewise.LAYERS[type(layer)](layer, 8)
    assert lines is not None
    assert off(lines, layer) < 1e-12
    assert (len(lines.pieces), lines.error) == (count, 0)


@pytest.mark.parametrize("name", APPROXIMATED)
def test_smooth_ones_are_as_close_as_they_say(name: str) -> None:
    layer, bound = APPROXIMATED[name]
    make = piecewise.LAYERS[type(layer)]
    coarse, usual, fine = (make(layer, pieces) for pieces in (8, 16, 32))
    assert coarse is not None
    assert usual is not None
    assert fine is not None
    wide = torch.linspace(-60, 60, 24001, dtype=torch.float64)
    for lines in (coarse, usual, fine):
        assert off(lines, layer, wide) <= lines.error * 1.001 + 1e-4
    # Twice the pieces: a quarter of the error, as long as the tails do not decide.
    assert fine.error < usual.error / 2.3 < coarse.error / 4
    assert usual.error < bound
    assert len(usual.pieces) <= 16 + 2


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=6, unique=True),
    st.lists(st.floats(-3, 3), min_size=6, max_size=6),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_lines_go_through_their_knots(knots: list[float], values: list[float], left: float, right: float) -> None:
    knots = sorted(round(knot, 2) for knot in knots)
    knots = [knot for index, knot in enumerate(knots) if index == 0 or knot > knots[index - 1]]
    values = values[: len(knots)]
    lines = piecewise.through("drawn", knots, values, left, right)
    ends = torch.tensor([knots[0] - 1, knots[-1] + 1], dtype=torch.float64)
    at = lines(torch.tensor(knots, dtype=torch.float64))
    assert torch.allclose(at, torch.tensor(values, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(lines(ends), torch.tensor([values[0] - left, values[-1] + right], dtype=torch.float64), atol=1e-9)
    # Silent at 0.
    assert all(piece.sign * piece.start >= 0 for piece in lines.pieces)


class Calls(nn.Module):
    """One activation between two convolutions."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5, 4)
        self.activation = activation
        for parameter in self.parameters():
            if parameter.ndim > 1 or parameter.numel() in (6, 5, 4):
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.first(x))
        return self.head(self.second(x).mean((2, 3)))


def drawn(count: int = 3) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(1))


CALLS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "F.leaky_relu": (lambda x: F.leaky_relu(x, 0.2, True), 2),
    "F.hardtanh": (lambda x: F.hardtanh(x, -1.0, 2.0), 2),
    "clamp": (lambda x: x.clamp(-1.0, 1.0), 2),
    "clamp max": (lambda x: torch.clamp(x, max=1.0), 2),
    "clamp_max": (lambda x: x.clamp_max(-0.5), 1),
    "clamp_min": (lambda x: x.clamp_min(-0.5), 2),
    "F.hardsigmoid": (lambda x: F.hardsigmoid(x), 2),
    "F.threshold": (lambda x: F.threshold(x, 0.5, 0.5), 1),
    "F.softshrink": (lambda x: F.softshrink(x, 0.3), 2),
    "F.relu6": (lambda x: F.relu6(x), 1),
    "nn.PReLU": (nn.PReLU(6, 0.3), 2),
    "nn.PReLU of one slope": (nn.PReLU(), 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_straight_activation_is_traced_exactly(name: str) -> None:
    activation, count = CALLS[name]
    net, images = Calls(activation), drawn()
    if isinstance(activation, nn.PReLU):
        activation.weight.data = torch.linspace(-0.3, 0.6, activation.num_parameters)
    before = copy.deepcopy(net.state_dict())
    traced = qs.trace(net, images[:1])
    assert len(traced.sites) == count
    assert torch.allclose(traced.module(images), net(images), atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert len(qs.convert(net, images, steps=4).sites) == count


SMOOTH_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.silu": lambda x: F.silu(x, inplace=True),
    "F.gelu": lambda x: F.gelu(x),
    "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "torch.sigmoid": torch.sigmoid,
    "x.sigmoid()": lambda x: x.sigmoid(),
    "x.tanh_()": lambda x: x.tanh_(),
    "F.softplus": lambda x: F.softplus(x, beta=2),
    "F.elu": lambda x: F.elu(x, 0.5, True),
    "F.mish": F.mish,
    "F.hardswish": F.hardswish,
    "nn.SiLU": nn.SiLU(inplace=True),
}


@pytest.mark.parametrize("name", SMOOTH_CALLS)
def test_a_smooth_activation_is_traced_as_closely_as_reported(name: str) -> None:
    net, images = Calls(SMOOTH_CALLS[name]), drawn()
    coverage = qs.inspect(net, images[:1])
    (error,) = {finding.error for finding in coverage.findings if finding.error}
    assert f"off by at most {error:.2g}" in str(coverage)
    coarse, fine = (qs.trace(net, images[:1], pieces=pieces) for pieces in (8, 64))
    assert len(coarse.sites) < len(fine.sites)

    def worst(traced: Traced) -> float:
        return float((traced.module(images) - net(images)).detach().abs().max())

    assert 0 < worst(fine) < worst(coarse) / 3


def test_the_spiking_network_converges_to_the_lines() -> None:
    net, images = Calls(nn.SiLU()), drawn()
    traced = qs.trace(net, images[:1])
    with torch.no_grad():
        errors = [float((qs.convert(net, images, steps=steps)(images) - traced.module(images)).abs().max()) for steps in (16, 64, 256)]
        assert errors[2] < errors[1] < errors[0]
        assert errors[2] < 0.05 * float(net(images).abs().max())


def test_jumps_and_computed_bounds_are_refused_by_name() -> None:
    for activation, text in (
        (nn.Threshold(0.5, 0.0), "jumps"),
        (lambda x: x.clamp(max=x.mean()), "bounds are computed"),
        (lambda x: x.clamp(2.0, 1.0), "bounds"),
        (lambda x: F.prelu(x, x.mean((0, 2, 3))), "slopes"),
    ):
        net: Any = Calls(activation)
        with pytest.raises(UnsupportedOperatorError, match=text):
            qs.trace(net, drawn(1))


@pytest.mark.parametrize("pieces", [1, 65, 2.5])
def test_a_number_of_pieces_out_of_range(pieces: Any) -> None:
    with pytest.raises(OptionError, match="pieces must be a whole number in"):
        qs.trace(Calls(nn.SiLU()), drawn(1), pieces=pieces)


@pytest.mark.parametrize(
    "layer",
    [nn.Hardtanh(float("-inf"), float("inf")), nn.Softplus(beta=-1.0), nn.Softplus(beta=0.01), nn.CELU(50.0), nn.ELU(float("nan"))],
    ids=str,
)
def test_layers_with_strange_numbers_are_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedOperatorError, match=type(layer).__name__):
        qs.trace(Calls(layer), drawn(1))


def test_slopes_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UnsupportedOperatorError, match="LeakyReLU"):
        qs.trace(Calls(nn.LeakyReLU(float("nan"))), drawn(1))
