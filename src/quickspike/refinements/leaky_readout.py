"""Leaky readout: late outputs count more than early ones, which layers far from the image give before spikes have come through.

T. Bu, M. Li, Z. Yu, "Inference-Scale Complexity in ANN-SNN Conversion for High-Performance and Low-Power Applications", CVPR 2025,
arXiv 2409.03368 (delayed evaluation, of which this is the soft form).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickspike import readouts
from quickspike.console import track
from quickspike.conversion import SpikingNetwork
from quickspike.data import ImageStream
from quickspike.errors import OptionError
from quickspike.graph import Traced
from quickspike.lockstep import MOST_VALUES, rebatched
from quickspike.methods.threshold_balancing import ThresholdBalancing
from quickspike.options import option
from quickspike.paper import Paper
from quickspike.readouts import fading, read_through
from quickspike.refinement import Refinement, refinement
from quickspike.structure import places

logger = logging.getLogger(__name__)

LEAKS = (1.0, *(step / 20 for step in range(19, 1, -1)))
"""What is tried: 1, where nothing leaks, 0.95, .., 0.1."""


@refinement
@dataclass(frozen=True, kw_only=True)
class LeakyReadout(Refinement):
    """Read out by a leaky integrator: after t steps the mean of the outputs so far, that of step s weighted by leak^(t-s).

    Spikes need steps to come through deep layers, and potentials to settle. What the last layer gives before that is an error,
    which a mean over all steps keeps: it falls no faster than 1/T. A leak forgets it. Neurons and spikes stay as they are, and
    so does the latency: there is an answer after every step. A leak that is not given is chosen on the calibration images, without
    labels: that with the least squared distance of the answer after T steps to the source network's, up to a common
    factor, which decides no class. It holds for one T.

    Differs from the paper, which leaves steps out up to a t0 computed from potentials and currents: here they fade, t0 needs no
    rule, and networks answer before it, too. Corrections may come before or after it; those behind see the answer as it is read.
    """

    name: ClassVar[str] = "leaky_readout"
    paper: ClassVar[Paper] = ThresholdBalancing.paper

    leak: float = option(
        0.0, "of the weight of an output, what is left at the next step; 1: all of it; 0: chosen on the images", low=0, high=1
    )
    images: int = option(1024, "calibration images to choose on", unit="images", low=1)
    batch: int = option(64, "of them at a time; fewer where T or the images are large", unit="images", low=1)

    def refine(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> None:
        if snn.readout_leak is not None:
            raise OptionError(f"leaky_readout: the readout leaks already, by {snn.readout_leak:g}; take it once")
        if name := snn.masked():
            raise OptionError(f"leaky_readout: the answer counts the steps after a residual_mask ({name}); take one of the two")
        if waiting := snn.waiting():
            way_out = "leave it out, or leave synchronous and weighted out"
            raise OptionError(f"leaky_readout: {waiting[0]} waits for whole windows, so that no step is early; {way_out}")
        if snn.steps == 1:
            logger.warning("leaky_readout: one step has none before it, and nothing changes")
            return
        leak = self.leak or self._chosen(snn, ann, images)
        # Reports say what was chosen, too.
        snn.provenance["readout_leak"] = leak
        if leak < 1:
            read_through(snn.network, self.name, lambda: readouts.LeakyReadout(snn.steps, leak))
        else:
            logger.info("leaky_readout: no leak brings the answers closer to the source network's; the readout stays as it is")

    @torch.no_grad()
    def _chosen(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> float:
        """Of `LEAKS`; of two that are alike the larger one, which is closer to no leak."""
        like = next(snn.network.parameters())
        size = min(self.batch, self.images, max(1, MOST_VALUES // (images.example.numel() * snn.steps)))
        found = dict[str, _Distances]()
        for batch in track(list(rebatched(images.some(self.images), size)), "choosing the leak of the readout"):
            wanted = places(ann.module(batch.to(like)))
            for place, outputs in places(snn.outputs(batch.to(like))).items():
                found.setdefault(place, _Distances(snn.steps)).add(outputs, wanted[place])
        weights = torch.stack([fading(leak, snn.steps) for leak in LEAKS])
        distances = torch.stack([one.of(weights) for one in found.values()]).sum(0)
        return LEAKS[int(distances.argmin())]


class _Distances:
    """Squared distances of weighted means over T steps to what is wanted, up to the best factor, in units of the square of the latter.

    That is 1 - cos^2 of the angle between the two, for which the products of every step with every other are enough.
    """

    def __init__(self, steps: int) -> None:
        self.among, self.with_wanted = torch.zeros(steps, steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
        self.wanted = 0.0

    def add(self, outputs: Tensor, wanted: Tensor) -> None:
        """`[T, B, ...]` beside `[B, ...]`."""
        # Sample by sample: maps of all of them in double precision could fill the memory.
        for sample, aim in zip(outputs.unbind(1), wanted, strict=True):
            steps, flat = sample.reshape(len(outputs), -1).double(), aim.flatten().double()
            self.among += (steps @ steps.T).cpu()
            self.with_wanted += (steps @ flat).cpu()
            self.wanted += float(flat.square().sum())

    def of(self, weights: Tensor) -> Tensor:
        """For the means with these weights, `[L, T]`: `[L]`."""
        squares = torch.einsum("ls,st,lt->l", weights, self.among, weights)
        least = torch.finfo(torch.float64).tiny
        # An answer that points away from what is wanted is no better than none.
        cosine = (weights @ self.with_wanted).clamp_min(0) / (squares.clamp_min(0) * self.wanted).sqrt().clamp_min(least)
        return 1 - cosine.square()
