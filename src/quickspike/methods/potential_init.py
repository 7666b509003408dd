"""Optimised potential initialisation: every membrane starts at half its threshold.

T. Bu, J. Ding, Z. Yu, T. Huang, "Optimized Potential Initialization for Low-Latency Spiking Neural Networks",
AAAI 2022, arXiv 2202.01440.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quickspike.activations import Granularity, LearnedCeiling, ceiling_at
from quickspike.ceilings import learn_ceilings
from quickspike.data import ImageStream
from quickspike.graph import Site, Traced
from quickspike.method import Method, Paper, register
from quickspike.neuron import NeuronParameters
from quickspike.options import option
from quickspike.training import Train


@register
@dataclass(frozen=True, kw_only=True)
class PotentialInit(Method):
    """Start every membrane at theta/2, so that the rate staircase rounds instead of flooring.

    For inputs spread evenly over the cells of the staircase, with v(0) = v0 and no unevenness in time:
    E[error] = (theta/2 - v0)/T and E[error^2] = ((theta - v0)^3 + v0^3)/(3 theta T^2); both are least at
    v0 = theta/2, where the mean is 0 and the mean square a quarter of that of v0 = 0.

    The source network's activation is clip(z, 0, mu); theta = amplitude = mu. The ceilings are calibrated on images,
    and trained with the weights where there is a training.
    """

    name: ClassVar[str] = "potential_init"
    paper: ClassVar[Paper] = Paper(
        "T. Bu, J. Ding, Z. Yu, T. Huang",
        "Optimized Potential Initialization for Low-Latency Spiking Neural Networks",
        2022,
        "2202.01440",
    )

    initial: Literal["half", "zero", "constant", "uniform", "gaussian"] = option(
        "half", "initial potential: theta/2 (the optimum), 0, a fraction of theta, or drawn per neuron (ablations)"
    )
    fraction: float = option(0.5, "initial potential (initial=constant)", unit="theta", low=0, high=1)
    seed: int = option(0, "seed of the drawn initial potentials (initial=uniform, gaussian)", low=0, high=2**31 - 1)
    ceiling: Literal["percentile", "squared_error"] = option(
        "squared_error", "how a ceiling follows from the activations: least squared error of the T-step staircase, or a percentile"
    )
    granularity: Granularity = option("layer", "one threshold per layer (the paper's) or per channel")
    percentile: float = option(
        99.9, "share of activations below the ceiling (ceiling=percentile)", unit="%", low=0, high=100, low_open=True
    )
    start: float = option(0.0, "ceiling that training starts from, 4 in the paper; 0 takes it from calibration images", low=0, high=1e6)
    ceiling_decay: float = option(5e-4, "weight decay of the ceilings while they are trained", low=0, high=1)

    def activation(self, site: Site) -> LearnedCeiling:
        return LearnedCeiling(site, self.granularity)

    def fit(self, ann: Traced, images: ImageStream, train: Train | None = None) -> None:
        learn_ceilings(ann, images, train, self._calibrated, start=self.start, decay=self.ceiling_decay)

    def _calibrated(self, site: Site, ceiling: LearnedCeiling) -> Tensor:
        histogram = ceiling.probe.histogram
        if self.ceiling == "percentile":
            return histogram.percentile(self.percentile)
        return histogram.squared_error_ceiling(self.resolution, float(self.initial_potential(site).mean()))

    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        return NeuronParameters(ceiling_at(site, activation).ceiling, initial=self.initial_potential(site))

    def initial_potential(self, site: Site) -> Tensor:
        """v(0) of every neuron at `site` as a fraction of theta: a scalar, or `[C, ...]` where it is drawn."""
        constants = {"half": 0.5, "zero": 0.0, "constant": self.fraction}
        if self.initial in constants:
            return torch.tensor(constants[self.initial])
        # The site's name enters the seed, so that layers of one shape do not share their draw.
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(site.name.encode()))
        if self.initial == "uniform":
            return torch.rand(site.shape, generator=generator)
        return (0.5 + torch.randn(site.shape, generator=generator) / 6).clamp(0, 1)
