"""Bias correction: every channel's mean output brought to that of the source network, layer by layer, without labels.

Y. Li, S. Deng, X. Dong, R. Gong, S. Gu, "A Free Lunch From ANN: Towards Efficient, Accurate Spiking Neural Networks
Calibration", ICML 2021, arXiv 2106.06984 (light pipeline).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickspike.conversion import SpikingNetwork
from quickspike.currents import add_current
from quickspike.data import ImageStream
from quickspike.graph import Traced
from quickspike.lockstep import SNN_CALIBRATION, Correction, Firing, Lockstep, channel_means
from quickspike.options import option
from quickspike.paper import Paper
from quickspike.refinement import refinement
from quickspike.structure import places

logger = logging.getLogger(__name__)


@refinement
@dataclass(frozen=True, kw_only=True)
class BiasCorrection(Correction):
    """Add to every channel's current what its mean output lacks, and to the readout what its mean lacks.

    Clipping, rounding and the order of spikes make the mean output of a channel differ from the source network's. On each
    batch, in the order of the layers, current <- current + rate * (mean of the source network - mean of the spikes), means
    over samples, positions and steps, before the layers behind see the spikes. A channel keeps the mean of its corrections
    over the batches of the last pass.

    Differs from the paper, which corrects once on one batch: a neuron that is silent or saturated does not answer to a
    correction, so that one step leaves a part of the difference, and further batches close it. The readout, which the
    paper leaves alone, is corrected too; an output `[B]`, which has no channels, is not, with a warning.
    """

    name: ClassVar[str] = "bias_correction"
    paper: ClassVar[Paper] = SNN_CALIBRATION

    readout: bool = option(True, "correct the readout, too")

    def refine(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> None:
        sites = {site.name: site for site in snn.sites}
        device = next(snn.network.parameters()).device
        lacking = {name: torch.zeros(site.channels, dtype=torch.float64, device=device) for name, site in sites.items()}

        def visit(name: str, firing: Firing, current: Tensor, wanted: Tensor) -> Tensor:
            site = sites[name]
            found = channel_means(firing.mean(firing.outputs(current + site.per_channel(lacking[name]).to(current))))
            lacking[name] += self.rate * both.share * (wanted - found) / firing.gain
            sums[name] += lacking[name]
            return current + site.per_channel(lacking[name]).to(current)

        both, kept = Lockstep(snn, ann, channel_means, visit), set[str]()
        for _ in range(self.passes):
            sums = {name: torch.zeros_like(one) for name, one in lacking.items()}
            missing, axes, batches = dict[str, Tensor](), dict[str, int](), 0
            for wanted, given in both.over(images, self.images, self.batch):
                batches += 1
                for place, value in wanted.items():
                    axes[place] = value.ndim - 1
                    if value.ndim == 1 and self.readout and place not in kept:
                        logger.warning("bias_correction: the output%s has no channels, and keeps its mean", f" at {place}" if place else "")
                        kept.add(place)
                    elif value.ndim > 1:
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
