"""Potential correction: the initial membrane potential makes up for what a neuron's mean output lacks, without labels.

Y. Li, S. Deng, X. Dong, R. Gong, S. Gu, "A Free Lunch From ANN: Towards Efficient, Accurate Spiking Neural Networks
Calibration", ICML 2021, arXiv 2106.06984 (advanced pipeline, potentials).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from quickspike.conversion import SpikingNetwork
from quickspike.data import ImageStream
from quickspike.graph import Traced
from quickspike.lockstep import SNN_CALIBRATION, Correction, Firing, Lockstep, channel_means
from quickspike.options import option
from quickspike.paper import Paper
from quickspike.refinement import refinement


@refinement
@dataclass(frozen=True, kw_only=True)
class PotentialCorrection(Correction):
    """Start every neuron higher by T times what its mean output lacks, layer by layer.

    On each batch v(0) <- v(0) + rate * T * (mean of the source network - mean of the spikes), means over samples and steps,
    before the layers behind see the spikes. A neuron keeps the mean of its corrections over the batches of the last pass.
    What is corrected holds for one T; weighted spikes have 2^T - 1 in its place.

    Differs from the paper, which corrects once on one batch and from v(0) = 0 on: here v(0) is the method's, and further
    batches close what a silent or saturated neuron does not answer to.
    """

    name: ClassVar[str] = "potential_correction"
    paper: ClassVar[Paper] = SNN_CALIBRATION

    granularity: Literal["neuron", "channel"] = option(
        "neuron", "a potential for every neuron (the paper's; images of one size, and no compiled loops) or one for a channel"
    )

    def refine(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> None:
        sites = {site.name: site for site in snn.sites}

        def mean(values: Tensor) -> Tensor:
            return values.double().mean(0) if self.granularity == "neuron" else channel_means(values)

        def visit(name: str, firing: Firing, current: Tensor, wanted: Tensor) -> Tensor:
            neuron, site = firing.neuron, sites[name]
            lacking = (wanted - mean(firing.mean(firing.outputs(current)))) / self._shaped(firing.gain, wanted)
            lacking = lacking if self.granularity == "neuron" else site.per_channel(lacking)
            theta, _ = neuron.bounded()
            initial = neuron.initial + (self.rate * both.share * neuron.resolution * lacking / theta).to(neuron.initial)
            neuron.initial = nn.Parameter(initial, requires_grad=False)
            sums[name] = initial.double() + sums.get(name, 0)
            return current

        both = Lockstep(snn, ann, mean, visit)
        for _ in range(self.passes):
            sums: dict[str, Tensor] = {}
            batches = sum(1 for _ in both.over(images, self.images, self.batch))
        for name, neuron in snn.neurons().items():
            neuron.initial = nn.Parameter((sums[name] / batches).to(neuron.initial), requires_grad=False)

    def _shaped(self, gain: Tensor, like: Tensor) -> Tensor:
        """`[C]` for `[C, ...]`."""
        return gain.reshape(-1, *(1,) * (like.ndim - 1)) if gain.ndim else gain
