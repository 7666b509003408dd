"""Offset shift: a first run of every layer tells which neurons fire once too often or too rarely, and shifts their potentials.

Z. Hao, J. Ding, T. Bu, T. Huang, Z. Yu, "Bridging the Gap between ANNs and SNNs by Calibrating Offset Spikes", ICLR 2023,
arXiv 2302.10685 (COS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quickspike.conversion import SpikingNetwork
from quickspike.data import ImageStream
from quickspike.graph import Traced
from quickspike.neuron import MAX_STEPS
from quickspike.options import option
from quickspike.paper import Paper
from quickspike.refinement import Refinement, refinement
from quickspike.rehearsal import rehearse


@refinement
@dataclass(frozen=True, kw_only=True)
class OffsetShift(Refinement):
    """Every layer simulates the first rho steps of its currents ahead and shifts v(0) for each image, then runs all T.

    After the first run, with m(t) the potential before the reset: a neuron that fired although it ends below 0 starts lower by
    max(theta, min of m(t) over the steps at which it fired - 0.999 theta); one that ends at theta or above starts higher by
    max(theta, 1.001 theta - max of m(t) over the steps at which it did not). Layers do so in turn, each with the spikes of
    the one before as they are after its own shift. Latency: T + rho steps for every layer on the longest way through.

    Differs from the paper: the first rho steps are among the T, so that T below rho shifts by T steps (the paper's T = 1 takes
    rho steps of input); a neuron that fired at all of them keeps its potential, where the published code lets it fire for ever.
    """

    name: ClassVar[str] = "offset_shift"
    paper: ClassVar[Paper] = Paper(
        "Z. Hao, J. Ding, T. Bu, T. Huang, Z. Yu",
        "Bridging the Gap between ANNs and SNNs by Calibrating Offset Spikes",
        2023,
        "2302.10685",
    )

    rho: int = option(4, "steps of the first run", unit="steps", low=1, high=MAX_STEPS)

    def refine(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> None:
        rehearse(snn, "shift", self.rho, self.name)
