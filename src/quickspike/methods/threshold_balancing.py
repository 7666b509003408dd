"""Threshold balancing: every ceiling from calibration images alone, no training.

T. Bu, M. Li, Z. Yu, "Inference-Scale Complexity in ANN-SNN Conversion for High-Performance and Low-Power
Applications", CVPR 2025, arXiv 2409.03368 (local threshold balancing, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from quickspike.activations import CeilingProbe, Granularity, probe_at
from quickspike.graph import Site
from quickspike.method import Method, Paper, register
from quickspike.neuron import MAX_STEPS, NeuronParameters
from quickspike.options import option


@register
@dataclass(frozen=True, kw_only=True)
class ThresholdBalancing(Method):
    """Thresholds that balance clipping against resolution, one per channel, from one pass over calibration images.

    theta = amplitude = ceiling, v(0) = theta/2, no leak. The `balanced` ceiling follows the paper's update,
    theta <- theta + rate * mean(2 (z - theta) 1[z > theta]), whose fixed point is the largest activation; it is
    stopped early. `squared_error` looks for the ceiling whose staircase of T steps fits the activations best.

    Differs from the paper: the mean of the update is taken over all calibration images at once (a histogram), not
    batch by batch, and layers see the unclipped activations of the layer before; fires at m >= theta as the paper's
    text says (its code: m > theta); the readout covers all steps, without the paper's delay (`leaky_readout` is a soft one).
    """

    name: ClassVar[str] = "threshold_balancing"
    paper: ClassVar[Paper] = Paper(
        "T. Bu, M. Li, Z. Yu",
        "Inference-Scale Complexity in ANN-SNN Conversion for High-Performance and Low-Power Applications",
        2025,
        "2409.03368",
    )
    later: ClassVar[tuple[str, ...]] = (*Method.later, "fit_steps")
    per_site: ClassVar[tuple[str, ...]] = (
        *Method.per_site,
        *("ceiling", "granularity", "fit_steps", "percentile", "updates", "rate", "scale", "initial"),
    )

    ceiling: Literal["balanced", "squared_error", "percentile"] = option(
        "squared_error",
        "how a ceiling follows from the activations: the paper's update, least squared error of the T-step staircase, or a percentile",
    )
    granularity: Granularity = option("channel", "one threshold per channel or per layer")
    fit_steps: int = option(
        0, "steps that ceilings are fitted for (ceiling=squared_error), where more are run; 0 for T", unit="steps", low=0, high=MAX_STEPS
    )
    percentile: float = option(
        99.9, "share of activations below the ceiling (ceiling=percentile)", unit="%", low=0, high=100, low_open=True
    )
    updates: int = option(1000, "updates from theta = 0 (ceiling=balanced)", unit="updates", low=1, high=1_000_000)
    rate: float = option(1.0, "step size of an update (ceiling=balanced)", low=0, high=1, low_open=True)
    scale: float = option(
        1.0,
        "factor on every ceiling; below 1, neurons clip more and fire earlier, which pays in deep networks from T = 8 on",
        low=0,
        high=2,
        low_open=True,
    )
    initial: float = option(0.5, "initial potential", unit="theta", low=0, high=1)

    def activation(self, site: Site) -> CeilingProbe:
        return CeilingProbe(site, self.granularity)

    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        probe = probe_at(site, activation)
        histogram = probe.histogram
        if self.ceiling == "balanced":
            ceiling = histogram.balanced_ceiling(self.updates, self.rate)
        elif self.ceiling == "squared_error":
            ceiling = histogram.squared_error_ceiling(self.fit_steps or self.resolution, self.initial)
        else:
            ceiling = histogram.percentile(self.percentile)
        return NeuronParameters(probe.finish(ceiling * self.scale), initial=self.initial)
