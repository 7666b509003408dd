"""QCFS: train the source network with the staircase that its neurons will have.

T. Bu, W. Fang, J. Ding, P. Dai, Z. Yu, T. Huang, "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency
Spiking Neural Networks", ICLR 2022, arXiv 2303.04347.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from quickspike import kernels
from quickspike.activations import Granularity, LearnedCeiling, ceiling_at, mark
from quickspike.ceilings import learn_ceilings
from quickspike.data import ImageStream
from quickspike.graph import Site, Traced
from quickspike.method import Method, Paper, register
from quickspike.neuron import NeuronParameters, reduced
from quickspike.options import option
from quickspike.training import Train

Support = Literal["inside", "clamp_after", "paper", "triangular"]


@register
@dataclass(frozen=True, kw_only=True)
class QCFS(Method):
    """Quantisation-clip-floor-shift: a = mu clip(floor(z L/mu + 1/2)/L, 0, 1) with a trained ceiling mu (equation 15).

    Neurons get theta = amplitude = mu and v(0) = theta/2. For inputs spread evenly over the cells of the staircase the
    expected conversion error is 0 for every T and L (theorem 3); for T = L and inputs even in time it is 0 exactly.

    Differs from the paper: ceilings start from calibration images (`start=8` for the paper's); its formula for da/dmu is misprinted,
    here it is the derivative of the definition with the floor taken as the identity.
    """

    name: ClassVar[str] = "qcfs"
    paper: ClassVar[Paper] = Paper(
        "T. Bu, W. Fang, J. Ding, P. Dai, Z. Yu, T. Huang",
        "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural Networks",
        2022,
        "2303.04347",
    )

    levels: int = option(
        4, "levels L of the staircase in training; small for T <= 4, larger for the accuracy at large T", low=1, high=65536
    )
    initial: float = option(0.5, "initial potential", unit="theta", low=0, high=1)
    support: Support = option(
        "inside",
        "where the gradient passes: 0 <= z <= mu, half a level further (clamp_after), the paper's printed interval, or triangles at jumps",
    )
    granularity: Granularity = option("layer", "one ceiling per layer (the paper's) or per channel")
    percentile: float = option(
        0.0,
        "share of activations below the ceiling that training starts from; 0 for the ceiling at which the staircase errs least",
        unit="%",
        low=0,
        high=100,
    )
    start: float = option(0.0, "ceiling that training starts from, 8 in the paper; 0 takes it from calibration images", low=0, high=1e6)
    ceiling_decay: float = option(5e-4, "weight decay of the ceilings", low=0, high=1)

    def activation(self, site: Site) -> LearnedCeiling:
        return QuantisedReLU(site, self.granularity, self.levels, self.support)

    def fit(self, ann: Traced, images: ImageStream, train: Train | None = None) -> None:
        drawn = fitting(self, 0.5, train)
        learn_ceilings(ann, images, train, drawn, start=self.start, decay=self.ceiling_decay)

    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        return NeuronParameters(ceiling_at(site, activation).ceiling, initial=self.initial)


class Staircase(Protocol):
    """A method whose activation is a staircase."""

    @property
    def resolution(self) -> int: ...
    @property
    def levels(self) -> int: ...
    @property
    def initial(self) -> float: ...
    @property
    def percentile(self) -> float: ...


def fitting(method: Staircase, shift: float, train: Train | None) -> Callable[[Site, LearnedCeiling], Tensor]:
    """How ceilings of a staircase follow from what was seen: for a training, those of its own levels, without one, of T steps.

    Of few levels a ceiling near the largest activation leaves most activations below the first one, from which a training
    does not recover: `fast_cnn` with L = 1 starts at 67 % of CIFAR-10 with the least squared error.

    Args:
        method: its levels and resolution count.
        shift: of the staircase in training, in levels.
        train: the training, if there is one.
    """

    def drawn(site: Site, ceiling: LearnedCeiling) -> Tensor:
        histogram = ceiling.probe.histogram
        if train is None:
            return histogram.squared_error_ceiling(method.resolution, method.initial)
        if method.percentile:
            return histogram.percentile(method.percentile)
        return histogram.squared_error_ceiling(method.levels, shift)

    return drawn


class QuantisedReLU(LearnedCeiling):
    """The QCFS activation; see `QCFS`."""

    def __init__(self, site: Site, granularity: Granularity, levels: int, support: Support) -> None:
        super().__init__(site, granularity)
        self.levels, self.support = levels, support

    def activate(self, x: Tensor, ceiling: Tensor) -> Tensor:
        return quantise(x, ceiling, self.levels, self.support)


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, mu: Tensor, levels: int, support: Support, shift: float) -> Tensor:
        ctx.save_for_backward(z, mu)
        ctx.levels, ctx.support, ctx.shift = levels, support, shift
        if kernels.staircase_applies(z, mu):
            return kernels.staircase(z, mu, levels, shift)
        return _level(z, mu, levels, shift).mul_(mu).to(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        z, mu = ctx.saved_tensors
        if kernels.staircase_applies(z, mu):
            bounds = None if ctx.support == "triangular" else _bounds(z, mu, ctx.levels, ctx.support)
            found = kernels.staircase_gradients(gradients[0], z, mu, ctx.levels, ctx.shift, bounds)
            return found[0], found[1] if ctx.needs_input_grad[1] else None, None, None, None
        triangular = ctx.support == "triangular"
        inside = _triangles(z, mu, ctx.levels, ctx.shift) if triangular else _inside(z, mu, ctx.levels, ctx.support)
        to_mu = None
        if ctx.needs_input_grad[1]:
            slope = _level(z, mu, ctx.levels, ctx.shift).sub_(inside * (z / mu))
            to_mu = reduced(slope.mul_(gradients[0]), mu)
        return inside.mul_(gradients[0]).to(z), to_mu, None, None, None


def _level(z: Tensor, mu: Tensor, levels: int, shift: float) -> Tensor:
    """Share of mu that is passed on, in at least single precision."""
    wide = z.to(torch.promote_types(z.dtype, mu.dtype))
    return (wide * (levels / mu)).add_(shift).floor_().clamp_(0, levels).div_(levels)


def _triangles(z: Tensor, mu: Tensor, levels: int, shift: float) -> Tensor:
    """2 at the jumps of the staircase, 0 halfway between them and beyond, in at least single precision."""
    climbed = z.to(torch.promote_types(z.dtype, mu.dtype)) * (levels / mu) + shift
    near = (climbed >= 0.5) & (climbed <= levels + 0.5)
    return (climbed - climbed.floor()).mul_(2).sub_(1).abs_().mul_(2).masked_fill_(~near, 0.0)


def _inside(z: Tensor, mu: Tensor, levels: int, support: Support) -> Tensor:
    """1 where the gradient passes, 0 elsewhere."""
    half = mu / (2 * levels)
    if support == "inside":
        return mark(torch.ge, z, 0).mul_(mark(torch.le, z, mu.to(z)))
    if support == "clamp_after":
        return mark(torch.ge, z, -half.to(z)).mul_(mark(torch.lt, z, (mu + half).to(z)))
    return mark(torch.gt, z, -half.to(z)).mul_(mark(torch.lt, z, (mu - half).to(z)))


def _bounds(z: Tensor, mu: Tensor, levels: int, support: Support) -> tuple[Tensor, Tensor]:
    """Least and largest z that `_inside` is 1 for, in single precision; like it, bounds are rounded to the type of z first."""

    def rounded(bound: Tensor) -> Tensor:
        return bound.to(z.dtype).float()

    half = mu / (2 * levels)
    if support == "inside":
        return torch.zeros_like(mu), rounded(mu)
    least = rounded(-half)
    if support == "clamp_after":
        return least, _below(rounded(mu + half))
    return -_below(-least), _below(rounded(mu - half))


def _below(x: Tensor) -> Tensor:
    """The next number below."""
    return torch.nextafter(x, torch.full_like(x, -torch.inf))


def quantise(z: Tensor, mu: Tensor, levels: int, support: Support = "inside", shift: float = 0.5) -> Tensor:
    """Mu * clip(floor(z L/mu + shift)/L, 0, 1) with the straight-through gradient; same shape as `z`."""
    return cast(Tensor, _Quantise.apply(z, mu, levels, support, shift))
