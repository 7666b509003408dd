"""Ultra-low-latency conversion: thresholds and spike heights fitted to the true distribution, then fine-tuning.

G. Datta, P. A. Beerel, "Can Deep Neural Networks be Converted to Ultra Low-Latency Spiking Neural Networks?",
DATE 2022, arXiv 2112.12133.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quickspike.activations import LearnedCeiling, ceiling_at
from quickspike.ceilings import learn_ceilings
from quickspike.data import ImageStream
from quickspike.errors import ConversionError
from quickspike.graph import Site, Traced
from quickspike.method import Method, Paper, register
from quickspike.neuron import NeuronParameters, Surrogate
from quickspike.options import option
from quickspike.training import Train

Criterion = Literal["squared", "signed"]
BETAS = torch.arange(201, dtype=torch.float64) / 100
"""Candidates for beta: 0.00, 0.01, .. 2.00."""


@register
@dataclass(frozen=True, kw_only=True)
class UltraLowLatency(Method):
    """Per layer: theta = alpha mu and a spike height beta theta, from the percentiles of the trained pre-activations.

    The source network's activation is clip(z, 0, mu) with a trained mu. Pre-activations crowd near zero, so that with
    theta = mu hardly any neuron fires within two steps; alpha and beta are searched so that the T-step staircase fits
    the clipped activation at the percentiles 1..99. Fine-tuning then learns weights, thresholds and leaks at that T;
    beta stays, so that the height follows the threshold.

    Differs from the paper: the squared loss is the default, since the paper's signed sum has an exact zero for almost
    every theta; the threshold's gradient and the surrogate are those of the equations (`gradient=published` for those of
    the code); max-pooling accumulates (`pool=spikes` for the paper's); batch norm and biases are allowed; mu starts from
    calibration images (`start=4` for the paper's). Of the published code's slips only the extra factor on the spike
    height can be had (`amplitude_factor`).
    """

    name: ClassVar[str] = "ultra_low_latency"
    paper: ClassVar[Paper] = Paper(
        "G. Datta, P. A. Beerel", "Can Deep Neural Networks be Converted to Ultra Low-Latency Spiking Neural Networks?", 2022, "2112.12133"
    )

    steps: int = option(2, "time steps the spiking network runs for", unit="steps", low=1, high=65536)
    criterion: Criterion = option("squared", "what the search makes least: sum of squared errors, or the paper's absolute sum of errors")
    initial: float = option(0.0, "initial potential; the search takes it into account", unit="theta", low=0, high=1)
    percentile: float = option(
        99.7, "share of activations below the ceiling mu that training starts from", unit="%", low=0, high=100, low_open=True
    )
    start: float = option(0.0, "ceiling that training starts from, 4 in the paper; 0 takes it from calibration images", low=0, high=1e6)
    ceiling_decay: float = option(5e-4, "weight decay of the ceilings mu", low=0, high=1)
    amplitude_factor: float = option(
        1.0, "factor on spike heights; the published code has 1.3 for VGG and 1.5 for ResNet", low=0, high=10, low_open=True
    )
    gradient: Literal["consistent", "published"] = option(
        "consistent", "surrogate gradients of the equations, or those of the published code"
    )
    peak: float = option(
        1.0, "value of the boxcar surrogate: 0.5 keeps its area 1, 1 is the published code's", low=0, high=10, low_open=True
    )
    pool: Literal["accumulated", "spikes"] = option(
        "accumulated", "max-pooling of accumulated currents, or of the spikes of every step (the paper's)"
    )

    @property
    def pools_spikes(self) -> bool:
        return self.pool == "spikes"

    def activation(self, site: Site) -> LearnedCeiling:
        return PercentileCeiling(site)

    def fit(self, ann: Traced, images: ImageStream, train: Train | None = None) -> None:
        def drawn(site: Site, ceiling: LearnedCeiling) -> Tensor:
            return ceiling.probe.histogram.percentile(self.percentile)

        learn_ceilings(ann, images, train, drawn, start=self.start, decay=self.ceiling_decay)
        if train is not None:
            ceilings = [percentiles_at(site, ann.at(site)) for site in ann.sites]
            for ceiling in ceilings:
                ceiling.forget()
            images.feed(ann.module, ceilings)

    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        ceiling = percentiles_at(site, activation)
        mu = float(ceiling.ceiling.detach())
        theta, beta = search(ceiling.percentiles(), mu, self.resolution, self.criterion, self.initial)
        return NeuronParameters(
            torch.tensor(theta, dtype=torch.float32), initial=self.initial, amplitude=beta * self.amplitude_factor, strict=True
        )

    def surrogate(self) -> Surrogate:
        return Surrogate("boxcar", width=1.0, scale=self.peak, unscaled=self.gradient == "published")


class PercentileCeiling(LearnedCeiling):
    """clip(z, 0, mu), one mu per layer, whose probe also gives percentiles of the pre-activation z."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, "layer")

    def forget(self) -> None:
        """Drop what was watched, before the trained network is watched."""
        self.probe.forget()

    def percentiles(self) -> Tensor:
        """P[q] for q = 1..99, float64; values below zero, which never enter the loss, come as 0."""
        return torch.stack([self.probe.histogram.percentile(q)[0] for q in range(1, 100)])


def percentiles_at(site: Site, activation: nn.Module) -> PercentileCeiling:
    """The activation that this method put at `site`.

    Raises:
        ConversionError: something else stands there.
    """
    ceiling = ceiling_at(site, activation)
    if not isinstance(ceiling, PercentileCeiling):
        raise ConversionError(f"site {site.name}: expected a PercentileCeiling, found {type(activation).__name__}")
    return ceiling


def staircase(percentiles: Tensor, theta: Tensor, steps: int, initial: float = 0.0) -> Tensor:
    """theta/T * n, `[..., Q]`: what neurons with beta = 1 give; n = clip(ceil(T p/theta + initial) - 1, 0, T).

    The half-open cells are those of a neuron that fires strictly above theta. A candidate theta is a percentile itself,
    so p = theta does occur: compared with the edges themselves, since T p/theta may round to either side of T.
    """
    edges = theta.unsqueeze(-1) * ((torch.arange(1, steps + 1, dtype=percentiles.dtype) - initial) / steps)
    return (percentiles.clamp_min(0).unsqueeze(-1) > edges).sum(-1) * (theta / steps)


def losses(percentiles: Tensor, mu: float, theta: Tensor, steps: int, criterion: Criterion, initial: float = 0.0) -> Tensor:
    """Loss of every beta in `BETAS`, `[..., 201]`: |sum of (activation - staircase)| or the sum of their squares."""
    wanted = percentiles.clamp(0, mu)
    given = staircase(percentiles, theta, steps, initial)
    if criterion == "signed":
        return (wanted.sum() - BETAS * given.sum(-1, keepdim=True)).abs()
    squares, products = given.square().sum(-1, keepdim=True), (wanted * given).sum(-1, keepdim=True)
    return wanted.square().sum() - 2 * BETAS * products + BETAS.square() * squares


def search(percentiles: Tensor, mu: float, steps: int, criterion: Criterion = "squared", initial: float = 0.0) -> tuple[float, float]:
    """(theta, beta) of least loss over theta in {mu} and the percentiles in (0, mu], beta in `BETAS` (section 3 of the paper).

    Ties go to the search order: (mu, 1) first, then ascending theta and beta; a later pair has to be better by 1e-12.

    Args:
        percentiles: of the pre-activation at 1..99 %, ascending, float64.
        mu: ceiling of the activation.
        steps: T.
        criterion: which loss.
        initial: v(0) as a fraction of theta.
    """
    percentiles = percentiles.double()
    best_theta, best_beta = mu, 1.0
    least = float(losses(percentiles, mu, torch.tensor(mu, dtype=torch.float64), steps, criterion, initial)[100])
    for theta in percentiles[(percentiles > 0) & (percentiles <= mu)]:
        tried = losses(percentiles, mu, theta, steps, criterion, initial)
        index = int(tried.argmin())
        if float(tried[index]) < least - 1e-12:
            best_theta, best_beta, least = float(theta), float(BETAS[index]), float(tried[index])
    return best_theta, best_beta
