"""Activations other than ReLU as sums of clamped ReLUs, each of which becomes one group of neurons.

    f(x) = constant + sum over k of weight_k * clamp(sign_k (x - start_k), 0, ceiling_k)

Activations that consist of straight lines are such a sum exactly (LeakyReLU, Hardtanh, Hardsigmoid). Smooth ones are
approximated by straight lines that bend where the curvature is; their asymptotes are kept. All pieces start from
x = 0 and run outwards, so that neurons are silent where the input is small.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECES = 16
"""Straight lines between the asymptotes of a smooth activation."""


@dataclass(frozen=True)
class Piece:
    """One clamped ReLU."""

    weight: float
    sign: int
    """1: rises to the right of `start`; -1: to the left."""
    start: float
    ceiling: float | None
    """None: without bound."""

    @property
    def is_relu(self) -> bool:
        """True for clamp(x, 0, ceiling) itself."""
        return (self.weight, self.sign, self.start) == (1, 1, 0)

    @property
    def numbers(self) -> tuple[float, ...]:
        """All that have to be finite."""
        return self.weight, self.start, self.ceiling or 0.0


@dataclass(frozen=True)
class Piecewise:
    """An activation as a constant and a sum of pieces."""

    name: str
    constant: float
    pieces: tuple[Piece, ...]
    error: float = 0.0
    """Largest distance from the activation; 0: exact."""

    def __call__(self, x: Tensor) -> Tensor:
        """The sum, same shape as `x`."""
        total = torch.full_like(x, self.constant)
        for piece in self.pieces:
            part = (piece.sign * (x - piece.start)).clamp_min(0)
            total = total + piece.weight * (part if piece.ceiling is None else part.clamp_max(piece.ceiling))
        return total


def through(name: str, knots: list[float], values: list[float], left: float, right: float, error: float = 0.0) -> Piecewise:
    """The continuous function with these `values` at these ascending `knots`, and slopes `left` and `right` beyond them."""
    if not any(knot == 0 for knot in knots):
        at = float(np.interp(0.0, knots, values))
        if knots[0] > 0:
            at = values[0] - left * knots[0]
        elif knots[-1] < 0:
            at = values[-1] - right * knots[-1]
        place = sum(knot < 0 for knot in knots)
        knots, values = [*knots[:place], 0.0, *knots[place:]], [*values[:place], at, *values[place:]]
    zero = knots.index(0)
    slopes = [left, *(np.diff(values) / np.diff(knots)).tolist(), right]
    pieces = []
    for index in range(zero, len(knots)):
        ceiling = knots[index + 1] - knots[index] if index + 1 < len(knots) else None
        pieces.append(Piece(slopes[index + 1], 1, knots[index], ceiling))
    for index in range(zero, -1, -1):
        ceiling = knots[index] - knots[index - 1] if index else None
        pieces.append(Piece(-slopes[index], -1, knots[index], ceiling))
    return Piecewise(name, values[zero], tuple(piece for piece in pieces if piece.weight), error)


def clamped(low: float | None, high: float | None) -> Piecewise:
    """clamp(x, low, high); None: no bound."""
    knots = [bound for bound in (low, high) if bound is not None]
    return through("clamp", knots, list(knots), 0.0 if low is not None else 1.0, 0.0 if high is not None else 1.0)


def leaky(slope: float) -> Piecewise:
    """The identity above 0, slope times x below."""
    return through("leaky_relu", [0.0], [0.0], slope, 1.0)


def hardsigmoid() -> Piecewise:
    """clamp(x/6 + 1/2, 0, 1)."""
    return through("hardsigmoid", [-3.0, 3.0], [0.0, 1.0], 0.0, 0.0)


def softshrink(bound: float) -> Piecewise:
    """Pulls x towards 0 by `bound`."""
    return through("softshrink", [-bound, bound], [0.0, 0.0], 1.0, 1.0)


@dataclass(frozen=True)
class Smooth:
    """A smooth activation and its asymptotes, each a (slope, height at 0)."""

    run: Callable[[Tensor], Tensor]
    left: tuple[float, float]
    right: tuple[float, float]


_SELU, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
SMOOTH: dict[str, Smooth] = {
    "silu": Smooth(F.silu, (0, 0), (1, 0)),
    "hardswish": Smooth(F.hardswish, (0, 0), (1, 0)),
    "gelu": Smooth(F.gelu, (0, 0), (1, 0)),
    "gelu_tanh": Smooth(functools.partial(F.gelu, approximate="tanh"), (0, 0), (1, 0)),
    "quick_gelu": Smooth(lambda x: x * torch.sigmoid(1.702 * x), (0, 0), (1, 0)),
    "mish": Smooth(F.mish, (0, 0), (1, 0)),
    "softplus": Smooth(F.softplus, (0, 0), (1, 0)),
    "sigmoid": Smooth(torch.sigmoid, (0, 0), (0, 1)),
    "logsigmoid": Smooth(F.logsigmoid, (1, 0), (0, 0)),
    "tanh": Smooth(torch.tanh, (0, -1), (0, 1)),
    "selu": Smooth(F.selu, (0, -_SELU * _SELU_SCALE), (_SELU_SCALE, 0)),
}


def elu(alpha: float, pieces: int = PIECES) -> Piecewise:
    """The identity above 0, alpha (exp(x) - 1) below."""
    return approximated("elu", Smooth(lambda x: F.elu(x, alpha), (0, -alpha), (1, 0)), pieces)


def celu(alpha: float, pieces: int = PIECES) -> Piecewise:
    """The identity above 0, alpha (exp(x / alpha) - 1) below."""
    return approximated("celu", Smooth(lambda x: F.celu(x, alpha), (0, -alpha), (1, 0)), pieces)


def softplus(beta: float, pieces: int = PIECES) -> Piecewise:
    """log(1 + exp(beta x)) / beta; the threshold of torch is beyond what an approximation can tell."""
    return approximated("softplus", Smooth(lambda x: F.softplus(x, beta, 100.0), (0, 0), (1, 0)), pieces)


@functools.lru_cache(maxsize=64)
def smooth(name: str, pieces: int = PIECES) -> Piecewise:
    """The approximation of an activation of `SMOOTH`.

    Raises:
        KeyError: no such activation.
    """
    return approximated(name, SMOOTH[name], pieces)


REACH = 30.0
"""Beyond this an activation is its asymptote, to single precision."""


def approximated(name: str, function: Smooth, pieces: int) -> Piecewise:
    """Straight lines between asymptotes, `pieces` of them.

    Knots lie so densely that the squared error, weighted by how likely a value is, is spread evenly: as the fifth root of
    weight times squared curvature (de Boor, A Practical Guide to Splines, 1978, chapter XII). Heights are the
    least-squares ones. How far the asymptotes reach inwards is tried out.
    """
    wide = np.linspace(-REACH, REACH, 30001)
    y = _at(function, wide)
    left, right = (np.abs(y - (slope * wide + height)) for slope, height in (function.left, function.right))
    if not (left[0] < 1e-3 and right[-1] < 1e-3):
        raise ValueError(f"it is not near its asymptotes at x = {-REACH:g} and {REACH:g}")
    best: Piecewise | None = None
    for tolerance in np.geomspace(3e-4, 0.1, 16):
        # Between the last places where the function is its asymptotes, but for the tolerance.
        start, end = float(wide[np.argmax(left > tolerance)]), float(wide[::-1][np.argmax((right > tolerance)[::-1])])
        if end - start < 1e-3:
            continue
        x = np.linspace(start, end, 2001)
        knots = _knots(x, _at(function, x), pieces)
        ends = function.left[0] * start + function.left[1], function.right[0] * end + function.right[1]
        lines = through(name, knots, _heights(x, _at(function, x), knots, ends), function.left[0], function.right[0])
        # The largest error may lie on a knot.
        error = max(float(np.abs(_at(lines, at) - _at(function, at)).max()) for at in (wide, x, np.array(knots)))
        if best is None or error < best.error:
            best = Piecewise(name, lines.constant, lines.pieces, error)
    if best is None:
        raise ValueError(f"{name} leaves its asymptotes nowhere")
    return best


def _at(function: Smooth | Piecewise, x: np.ndarray) -> np.ndarray:
    run: Callable[[Tensor], Tensor] = function.run if isinstance(function, Smooth) else function
    values: np.ndarray = run(torch.from_numpy(x)).numpy()
    return values


def _likely(x: np.ndarray) -> np.ndarray:
    """How much an error at `x` weighs: most pre-activations lie around 0, behind batch norm with a deviation near 1."""
    density: np.ndarray = np.exp(-np.square(x) / 2) + 0.02
    return density


def _knots(x: np.ndarray, y: np.ndarray, pieces: int) -> list[float]:
    """`pieces` + 1 places, one of them 0 if that lies inside."""
    density = (_likely(x) * np.square(np.gradient(np.gradient(y, x), x))) ** 0.2
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    knots = np.interp(np.linspace(0, mass[-1], pieces + 1), mass, x)
    knots[0], knots[-1] = x[0], x[-1]
    if x[0] < 0 < x[-1]:
        # Pieces start from 0: the knot next to it moves there.
        knots[1 + int(np.argmin(np.abs(knots[1:-1])))] = 0.0
    return sorted(set(knots.tolist()))


def _heights(x: np.ndarray, y: np.ndarray, knots: list[float], ends: tuple[float, float]) -> list[float]:
    """Heights at the knots that fit best; those at the ends are given, and the one at 0 is exact."""
    heights = [ends[0], *[0.0] * (len(knots) - 2), ends[1]]
    free = [index for index in range(1, len(knots) - 1) if knots[index] != 0]
    if len(free) < len(knots) - 2:
        heights[knots.index(0.0)] = float(np.interp(0.0, x, y))
    hats = np.stack([np.interp(x, knots, np.eye(len(knots))[index]) for index in range(len(knots))], 1)
    weight = np.sqrt(_likely(x))
    found = np.linalg.lstsq(hats[:, free] * weight[:, None], (y - hats @ np.array(heights)) * weight, rcond=None)[0]
    for index, height in zip(free, found.tolist(), strict=True):
        heights[index] = height
    return heights


# The activations of torch, by function and by layer


def _clamp_of(pieces: int, min: float | None = None, max: float | None = None) -> Piecewise | None:
    low = None if min is None or min == -math.inf else float(min)
    high = None if max is None or max == math.inf else float(max)
    if low is None and high is None:
        raise ValueError("no bounds")
    if low is not None and high is not None and not low < high:
        raise ValueError("its bounds leave nothing")
    return clamped(low, high)


def _gelu_of(pieces: int, approximate: str = "none") -> Piecewise:
    return smooth("gelu" if approximate == "none" else "gelu_tanh", pieces)


def _threshold_of(pieces: int, threshold: float, value: float) -> Piecewise | None:
    return clamped(float(threshold), None) if threshold == value else None


def _same(name: str) -> tuple[tuple[str, ...], Callable[..., Piecewise | None]]:
    return (), lambda pieces: smooth(name, pieces)


FUNCTIONS: dict[str, tuple[tuple[str, ...], Callable[..., Piecewise | None]]] = {
    "relu": ((), lambda pieces: clamped(0.0, None)),
    "relu6": ((), lambda pieces: clamped(0.0, 6.0)),
    "clamp": (("min", "max"), _clamp_of),
    "clamp_min": (("min",), _clamp_of),
    "clamp_max": (("max",), _clamp_of),
    "hardtanh": (("min_val", "max_val"), lambda pieces, min_val=-1.0, max_val=1.0: _clamp_of(pieces, min_val, max_val)),
    "leaky_relu": (("negative_slope",), lambda pieces, negative_slope=0.01: leaky(float(negative_slope))),
    "prelu": (("weight",), lambda pieces: None),
    "threshold": (("threshold", "value"), _threshold_of),
    "hardsigmoid": ((), lambda pieces: hardsigmoid()),
    "softshrink": (("lambd",), lambda pieces, lambd=0.5: softshrink(float(lambd))),
    "gelu": (("approximate",), _gelu_of),
    "softplus": (("beta", "threshold"), lambda pieces, beta=1.0, threshold=20.0: softplus(float(beta), pieces)),
    "elu": (("alpha",), lambda pieces, alpha=1.0: elu(float(alpha), pieces)),
    "celu": (("alpha",), lambda pieces, alpha=1.0: celu(float(alpha), pieces)),
    **{name: _same(name) for name in ("silu", "hardswish", "mish", "logsigmoid", "selu", "sigmoid", "tanh")},
}
"""By the function's name: names of its arguments after the signal, and what it is a sum of; None if it is none."""

LAYERS: dict[type[nn.Module], Callable[[Any, int], Piecewise | None]] = {
    nn.ReLU: lambda layer, pieces: clamped(0.0, None),
    nn.ReLU6: lambda layer, pieces: clamped(0.0, 6.0),
    nn.Hardtanh: lambda layer, pieces: _clamp_of(pieces, layer.min_val, layer.max_val),
    nn.LeakyReLU: lambda layer, pieces: leaky(layer.negative_slope),
    nn.PReLU: lambda layer, pieces: leaky(0.0),
    nn.Threshold: lambda layer, pieces: _threshold_of(pieces, layer.threshold, layer.value),
    nn.Hardsigmoid: lambda layer, pieces: hardsigmoid(),
    nn.Softshrink: lambda layer, pieces: softshrink(layer.lambd),
    nn.GELU: lambda layer, pieces: _gelu_of(pieces, layer.approximate),
    nn.Softplus: lambda layer, pieces: softplus(layer.beta, pieces),
    nn.ELU: lambda layer, pieces: elu(layer.alpha, pieces),
    nn.CELU: lambda layer, pieces: celu(layer.alpha, pieces),
    nn.SiLU: lambda layer, pieces: smooth("silu", pieces),
    nn.Hardswish: lambda layer, pieces: smooth("hardswish", pieces),
    nn.Mish: lambda layer, pieces: smooth("mish", pieces),
    nn.Sigmoid: lambda layer, pieces: smooth("sigmoid", pieces),
    nn.LogSigmoid: lambda layer, pieces: smooth("logsigmoid", pieces),
    nn.Tanh: lambda layer, pieces: smooth("tanh", pieces),
    nn.SELU: lambda layer, pieces: smooth("selu", pieces),
}
"""The same by the layer's type."""
