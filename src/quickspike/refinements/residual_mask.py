"""Residual mask: neurons that a first run leaves without potential are silenced, for they fire by mistake.

Z. Hao, T. Bu, J. Ding, T. Huang, Z. Yu, "Reducing ANN-SNN Conversion Error through Residual Membrane Potential", AAAI 2023,
arXiv 2302.02091 (SRP).
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
class ResidualMask(Refinement):
    """After tau steps all potentials begin anew, and only neurons with v(tau) > 0.001 theta are heard from there on.

    A neuron whose activation is 0 but which fired, because excitation came first, ends with a negative potential. The answer
    counts steps after tau only. Neurons that fire rightly and end at 0 are silenced too, which is a known side effect.

    Differs from the paper, whose T does not count the tau steps: T is the whole of them here, as latency is. After up to tau
    steps the answer is that of the network without masks.
    """

    name: ClassVar[str] = "residual_mask"
    paper: ClassVar[Paper] = Paper(
        "Z. Hao, T. Bu, J. Ding, T. Huang, Z. Yu",
        "Reducing ANN-SNN Conversion Error through Residual Membrane Potential",
        2023,
        "2302.02091",
    )

    tau: int = option(4, "steps of the first run, which T includes", unit="steps", low=1, high=MAX_STEPS)

    def refine(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> None:
        rehearse(snn, "mask", self.tau, self.name)
