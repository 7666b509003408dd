"""SlipReLU: train the source network with a weighted sum of the staircase and the clipped ReLU.

H. Jiang, S. Anumasa, G. De Masi, H. Xiong, B. Gu, "A Unified Optimization Framework of ANN-SNN Conversion: Towards Optimal
Mapping from Activation Values to Firing Rates", ICML 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from quickspike.activations import Granularity, LearnedCeiling, ceiling_at, clip
from quickspike.ceilings import learn_ceilings
from quickspike.data import ImageStream
from quickspike.graph import Site, Traced
from quickspike.method import Method, Paper, register
from quickspike.methods.qcfs import fitting, quantise
from quickspike.neuron import NeuronParameters
from quickspike.options import option
from quickspike.training import Train


@register
@dataclass(frozen=True, kw_only=True)
class SlipReLU(Method):
    """a = s mu clip(z/mu + d1/N, 0, 1) + (1 - s) mu clip(floor(N z/mu + d2)/N, 0, 1) with a trained ceiling mu (section 4).

    The staircase is what neurons do, the slope s is what gradients see of it: at few levels it keeps the training from
    stalling, and costs a conversion error in proportion to s. Neurons get theta = amplitude = mu and v(0) = d2 theta. s = 0 and
    d2 = 1/2 are QCFS, s = 1 and d1 = 0 the clipped ReLU (TCL, arXiv 2008.04509).

    Differs from the authors' code: the floor has the straight-through gradient inside the ceiling (theirs, a plain floor, has
    none); ceilings start from calibration images (`start=8` for theirs); s is not trained.
    """

    name: ClassVar[str] = "slip_relu"
    paper: ClassVar[Paper] = Paper(
        "H. Jiang et al.",
        "A Unified Optimization Framework of ANN-SNN Conversion: Towards Optimal Mapping from Activation Values to Firing Rates",
        2023,
        venue="ICML 2023",
        page="https://icml.cc/virtual/2023/poster/25136",
    )

    levels: int = option(16, "levels N of the staircase in training", low=1, high=65536)
    slope: float = option(0.5, "weight s of the clipped ReLU; the staircase has 1 - s", low=0, high=1)
    linear_shift: float = option(0.0, "shift d1 of the clipped ReLU", unit="levels", low=-1, high=1)
    initial: float = option(0.5, "shift d2 of the staircase, and initial potential", unit="theta", low=0, high=1)
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
        return SlippedReLU(site, self)

    def fit(self, ann: Traced, images: ImageStream, train: Train | None = None) -> None:
        drawn = fitting(self, self.initial, train)
        learn_ceilings(ann, images, train, drawn, start=self.start, decay=self.ceiling_decay)

    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        return NeuronParameters(ceiling_at(site, activation).ceiling, initial=self.initial)


class SlippedReLU(LearnedCeiling):
    """The activation of `SlipReLU`."""

    def __init__(self, site: Site, method: SlipReLU) -> None:
        super().__init__(site, method.granularity)
        self.method = method

    def activate(self, x: Tensor, ceiling: Tensor) -> Tensor:
        of = self.method
        return slip_relu(x, ceiling, of.levels, of.slope, of.linear_shift, of.initial)


def slip_relu(z: Tensor, mu: Tensor, levels: int, slope: float = 0.5, linear_shift: float = 0.0, shift: float = 0.5) -> Tensor:
    """The activation of `SlipReLU`, with slope s, shifts d1 (`linear_shift`) and d2 (`shift`); same shape as `z`."""
    linear = clip(z + (linear_shift / levels) * mu.to(z) if linear_shift else z, mu)
    return slope * linear + (1 - slope) * quantise(z, mu, levels, shift=shift)
