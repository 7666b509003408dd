"""Bias correction: every channel's mean output brought to that of the source network, layer by layer, without labels.

Y. Li, S. Deng, X. Dong, R. Gong, S. Gu, "A Free Lunch From ANN: Towards Efficient, Accurate Spiking Neural Networks
Calibration", ICML 2021, arXiv 2106.06984 (light pipeline).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickspike.conversion import SpikingNetwork
from quickspike.currents import add_current
from quickspike.data import ImageStream
from quickspike.graph import Traced
from quickspike.lockstep import Firing, Lockstep, channel_means
from quickspike.options import option
from quickspike.paper import Paper
from quickspike.refinement import Refinement, refinement
from quickspike.structure import places


@refinement
@dataclass(frozen=True, kw_only=True)
class BiasCorrection(Refinement):
    """Add to every channel's current what its mean output lacks, and to the readout what its mean lacks.

    Clipping, rounding and the order of spikes make the mean output of a channel differ from the source network's. On each
    batch, in the order of the layers, current <- current + rate * (mean of the source network - mean of the spikes), means
    over samples, positions and steps, before the layers behind see the spikes. A channel keeps the mean of its corrections
    over the batches of the last pass.

    Differs from the paper, which corrects once on one batch: a neuron that is silent or saturated does not answer to a
    correction, so that one step leaves a part of the difference, and further batches close it. The readout, which the
    paper leaves alone, is corrected too.
    """

    name: ClassVar[str] = "bias_correction"
    paper: ClassVar[Paper] = Paper(
        "Y. Li, S. Deng, X. Dong, R. Gong, S. Gu",
        "A Free Lunch From ANN: Towards Efficient, Accurate Spiking Neural Networks Calibration",
        2021,
        "2106.06984",
    )

    images: int = option(1024, "calibration images that correct", unit="images", low=1)
    batch: int = option(64, "of them in one batch", unit="images", low=1)
    passes: int = option(2, "times that they are gone through", low=1, high=1000)
    rate: float = option(1.0, "share of a difference that a batch corrects", low=0, high=2, low_open=True)
    readout: bool = option(True, "correct the readout, too")

    def refine(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> None:
        sites = {site.name: site for site in snn.sites}
        device = next(snn.network.parameters()).device
        lacking = {name: torch.zeros(site.channels, dtype=torch.float64, device=device) for name, site in sites.items()}

        def visit(name: str, firing: Firing, current: Tensor, wanted: Tensor) -> Tensor:
            site = sites[name]
            found = channel_means(firing.mean(firing.outputs(current + site.per_channel(lacking[name]).to(current))))
            lacking[name] += self.rate * (wanted - found) / firing.gain
            sums[name] += lacking[name]
            return current + site.per_channel(lacking[name]).to(current)

        both = Lockstep(snn, ann, channel_means, visit)
        for _ in range(self.passes):
            sums = {name: torch.zeros_like(one) for name, one in lacking.items()}
            missing, axes, batches = dict[str, Tensor](), dict[str, int](), 0
            for wanted, given in both.over(images, self.batch, self.images):
                batches += 1
                for place, value in wanted.items():
                    axes[place] = value.ndim - 1
                    if value.ndim > 1:
                        missing[place] = channel_means(value) - channel_means(given[place]) + missing.get(place, 0)
        network = snn.network
        for name, site in sites.items():
            neurons = next(node for node in network.graph.nodes if node.op == "call_module" and node.target == name)
            add_current(network, neurons.all_input_nodes[0], neurons, sums[name] / batches, len(site.shape))
        if self.readout:
            output = next(node for node in network.graph.nodes if node.op == "output")
            # What is returned in two places is one node.
            nodes = {node: place for place, node in places(output.args[0]).items() if place in missing}
            for node, place in nodes.items():
                add_current(network, node, output, missing[place] / batches, axes[place])
        network.graph.lint()
        network.recompile()
