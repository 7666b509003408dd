"""Weight calibration: weights and biases fitted to the source network's activations, layer by layer, without labels.

Y. Li, S. Deng, X. Dong, R. Gong, S. Gu, "A Free Lunch From ANN: Towards Efficient, Accurate Spiking Neural Networks
Calibration", ICML 2021, arXiv 2106.06984 (advanced pipeline, weights).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quickspike.console import track
from quickspike.conversion import SpikingNetwork
from quickspike.currents import CONVOLUTIONS
from quickspike.data import ImageStream
from quickspike.errors import OptionError
from quickspike.graph import Traced
from quickspike.lockstep import MOST_VALUES, SNN_CALIBRATION, Firing, Recorder, SiteBySite, in_windows
from quickspike.neuron import unfold
from quickspike.operators import Affine
from quickspike.options import option
from quickspike.paper import Paper
from quickspike.refinement import Refinement, refinement
from quickspike.structure import Outputs, tensors

logger = logging.getLogger(__name__)

LAYERS = (*CONVOLUTIONS, nn.Linear, Affine)
FIRST, COMPARED = 30, 10
"""Steps after which it shows whether the loss rises, and how many of them show it: the ones before may overshoot."""
RISEN = 1.0
"""The factor by which it may."""
SMALLEST_RATE = 1e-4
"""Least learning rate, in units of the one that is asked for."""
SMALLEST = 1e-12
SILENT = 1e-3
"""Mean square of activations that is divided by, at least, in squares of the height of a spike."""


@refinement
@dataclass(frozen=True, kw_only=True)
class WeightCalibration(Refinement):
    """Bring the mean output of every layer of neurons, and the readout, to the source network's by small steps of Adam.

    The loss of a site is the mean square of (mean of the spikes over T - the source network's activation), in units of the mean
    square of the activations. With `reach=layer` it moves only the weights and biases of the layers between those neurons
    and the ones before, which are taken as they fire. Spikes are simulated step by step, with the surrogate gradient of the
    method, so that what the order of spikes does is minimised, too. What is calibrated holds for one T.

    Differs from the paper, which fits layer after layer, 5,000 steps each, to a staircase of the mean input: all layers move at
    once here, each with the loss of its own, and neurons are simulated. `reach=network` lets every loss move all layers
    in front: distillation of the activations on the calibration images, which the paper does not have. Layers that wait for
    whole windows run on means over the steps in any case, with the gradient of a slope for that of the staircase.
    """

    name: ClassVar[str] = "weight_calibration"
    paper: ClassVar[Paper] = SNN_CALIBRATION

    images: int = option(1024, "calibration images to fit to", unit="images", low=1)
    batch: int = option(64, "of them in a step; fewer where T or the images are large", unit="images", low=1)
    iterations: int = option(200, "steps of Adam", low=1, high=1_000_000)
    learning_rate: float = option(
        1e-3, "of the first step; falls to 0 along a cosine; a tenth of it, and so on, if the loss rises", low=0, high=1, low_open=True
    )
    warmup: float = option(
        0.0, "share of the steps in which the learning rate rises from 0, for networks without batch norm", low=0, high=1
    )
    reach: Literal["layer", "network"] = option(
        "layer", "what the loss of a layer of neurons moves: the weights next to it, or all in front of it"
    )
    by: Literal["steps", "means"] = option(
        "steps", "simulate all steps, or only means over them, as if layers waited: T costs nothing, but the order of spikes is left out"
    )

    def refine(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> None:
        network = snn.network
        if snn.masked():
            raise OptionError("residual_mask lets no mean over all steps speak for the answer; write weight_calibration in front of it")
        if torch.is_inference_mode_enabled():
            raise OptionError("weight_calibration needs gradients; convert outside torch.inference_mode()")
        layers = [layer for layer in network.modules() if type(layer) in LAYERS]
        parameters = list(dict.fromkeys(parameter for layer in layers for parameter in layer.parameters(recurse=False)))
        if not parameters:
            raise OptionError("weight_calibration: no layer has weights to calibrate")
        if any(parameter.dtype == torch.float16 for parameter in parameters):
            raise OptionError("weight_calibration takes steps that half precision rounds to nothing; convert model.float()")
        learned = [parameter.requires_grad for parameter in parameters]
        before = [parameter.detach().clone() for parameter in parameters]
        rate = self.learning_rate
        windows = self._by_means(snn)
        if self.by == "means" and not windows:
            raise OptionError("weight_calibration:by=means needs neurons without leak, and pools that look at more than single spikes")
        with torch.no_grad():
            batches = itertools.islice(self._batches(snn, images, windows), max(0, min(FIRST, self.iterations) - COMPARED), FIRST)
            unchanged = [float(self._loss(snn, ann, batch, windows)) for batch in batches]
        try:
            for parameter in parameters:
                parameter.requires_grad_()
            while not self._descends(snn, ann, images, parameters, rate, unchanged, windows):
                with torch.no_grad():
                    for parameter, value in zip(parameters, before, strict=True):
                        parameter.copy_(value)
                rate /= 10
                if rate < SMALLEST_RATE * self.learning_rate:
                    raise OptionError(f"weight_calibration: the loss rises with learning_rate={self.learning_rate:g} and with all below it")
                logger.warning("weight_calibration: the loss rises; it starts again with learning_rate=%g", rate)
        finally:
            for parameter, was in zip(parameters, learned, strict=True):
                parameter.requires_grad_(was).grad = None

    def _descends(
        self,
        snn: SpikingNetwork,
        ann: Traced,
        images: ImageStream,
        parameters: list[nn.Parameter],
        rate: float,
        unchanged: list[float],
        windows: bool,
    ) -> bool:
        """Take all steps at this learning rate; False, and after the first few, if the loss rises above that of `unchanged` weights.

        Without batch norm one step on weights of like sign moves currents by as much as they are, and the first ones of Adam
        are as long as its later ones, whatever the gradients: `warmup` makes them short.
        """
        optimiser = torch.optim.Adam(parameters, rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self._share)
        losses: list[float] = []
        with torch.enable_grad():
            steps = track(range(self.iterations), "calibrating weights")
            for _, batch in zip(steps, self._batches(snn, images, windows), strict=True):
                optimiser.zero_grad()
                loss = self._loss(snn, ann, batch, windows)
                torch.autograd.backward(loss)
                optimiser.step()
                schedule.step()
                losses.append(float(loss.detach()))
                if len(losses) == min(FIRST, self.iterations) and not sum(losses[-COMPARED:]) <= RISEN * sum(unchanged):
                    return False
        return bool(torch.stack([parameter.isfinite().all() for parameter in parameters]).all())

    def _share(self, step: int) -> float:
        """Of the learning rate, at a step."""
        rising = math.ceil(self.warmup * self.iterations)
        return min(1.0, (step + 1) / max(1, rising)) * (1 + math.cos(math.pi * step / self.iterations)) / 2

    def _batches(self, snn: SpikingNetwork, images: ImageStream, windows: bool) -> Iterator[Tensor]:
        everything = torch.cat([batch.cpu() for batch in images.some(self.images)])
        steps = 1 if windows else snn.steps
        size = min(self.batch, max(1, MOST_VALUES // (everything[0].numel() * steps)))
        generator = torch.Generator().manual_seed(0)
        parameter = next(snn.network.parameters())
        order = torch.empty(0, dtype=torch.long)
        for _ in range(self.iterations):
            if len(order) < min(size, len(everything)):
                order = torch.cat([order, torch.randperm(len(everything), generator=generator)])
            yield everything[order[:size]].to(parameter)
            order = order[size:]

    def _by_means(self, snn: SpikingNetwork) -> bool:
        """Whether means over the steps are enough to run on."""
        plain = all(bool((neuron.bounded()[1] == 1).all()) for neuron in snn.neurons().values())
        return plain and (in_windows(snn) or (self.by == "means" and in_windows(snn.as_synchronous())))

    def _loss(self, snn: SpikingNetwork, ann: Traced, batch: Tensor, windows: bool) -> Tensor:
        with torch.no_grad():
            recorder = Recorder(ann, lambda values: values)
            wanted = recorder.run(batch)
        fitting = _Fitting(snn, recorder.found, self.reach == "layer", windows)
        given: Outputs = fitting.run(batch)
        pairs = zip(tensors(given), tensors(wanted), strict=True)
        readouts = [_distance(out if windows else unfold(out, snn.steps).mean(0), want) for out, want in pairs]
        return torch.stack([*fitting.distances.values(), *readouts]).sum()


def _distance(found: Tensor, wanted: Tensor, least: Tensor | float = SMALLEST) -> Tensor:
    return (found - wanted).square().mean() / wanted.square().mean().clamp_min(least)


class _Fitting(SiteBySite):
    """Notes how far the sites are from what is wanted there."""

    def __init__(self, snn: SpikingNetwork, wanted: dict[str, Tensor], apart: bool, windows: bool = False) -> None:
        super().__init__(snn, windows)
        self.wanted, self.apart = wanted, apart
        self.distances: dict[str, Tensor] = {}

    def outputs(self, site: str, firing: Firing, current: Tensor) -> Tensor:
        out, neuron = firing.outputs(current), firing.neuron
        # A layer that is silent on this batch has no unit of its own.
        least = SILENT * neuron.height(neuron.bounded()[0]).detach().square().mean()
        self.distances[site] = _distance(firing.mean(out), self.wanted[site], least)
        return out.detach() if self.apart else out
