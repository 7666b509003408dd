"""Rate-encoded conversion: train the source network with exactly the values that its spike counts will have.

Z. Yan, J. Zhou, W.-F. Wong, "Low Latency Conversion of Artificial Neural Network Models to Rate-encoded Spiking Neural
Networks", arXiv 2211.08410; channel-wise threshold training as in CQ+, IEEE TPAMI 2023, by the same authors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from quickspike.activations import CeilingProbe, mark
from quickspike.data import ImageStream
from quickspike.errors import ConversionError, DataError
from quickspike.graph import Site, Traced
from quickspike.method import Method, Paper, register
from quickspike.neuron import NeuronParameters
from quickspike.options import option
from quickspike.training import Train

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork

ORDERS = {"none": (0,), "cifar10": (-1, 1, 0, -1, 1, 0), "cifar100": (0, 1, -1, 0, 1, -1)}
"""Input channel expansion: what each copy of the image adds to the levels per unit (published code)."""


@register
@dataclass(frozen=True, kw_only=True)
class RateEncoded(Method):
    """Value-range quantised training (VR), averaged-current spikes (ASG), expanded inputs (ICE), trained thresholds (CTT).

    With L levels per unit and a window of T steps, an activation in [0, C], C = T/L, is n/L with n = clip(floor(L u), 0, T):
    n is the spike count. A neuron with theta = amplitude = C that integrates the mean current of its window (ASG) fires
    exactly n times, so that the spiking network is the quantised network's twin; it waits for the whole window of the
    layer before, T steps per layer (`SpikingNetwork.latency`). Streaming neurons do not wait, but their counts depend on
    the order of spikes; CTT moves their thresholds, channel by channel, until mean counts agree with the twin's:
    theta <- theta - rate C (mean of the twin's spikes - mean of its own). Pixels are spikes as well (`encode_input`), so
    that no layer multiplies; ICE gives the first layer six copies of them with L - 1, L and L + 1 levels.

    Differs from the paper: a guard of 1e-3 counts is added in training and simulation alike, instead of lowering theta by
    epsilon (give `epsilon` and guard=0 for that); the unit of a layer is calibrated on images unless `unit=one`, so that
    a network trained with ReLU keeps its function; amplitudes carry the factor C that the published code moves into
    weights. A pooling has neurons of its own if the network has a ReLU behind it, as `vgg_star` has.
    """

    name: ClassVar[str] = "rate_encoded"
    paper: ClassVar[Paper] = Paper(
        "Z. Yan, J. Zhou, W.-F. Wong",
        "Low Latency Conversion of Artificial Neural Network Models to Rate-encoded Spiking Neural Networks",
        2022,
        "2211.08410",
    )

    steps: int = option(4, "time steps of the window T", unit="steps", low=1, high=65536)
    levels: float = option(0.0, "levels L per unit; 0 for T, which makes the range C = T/L one unit", low=0, high=1e6)
    synchronous: bool = option(True, "neurons integrate the mean current of their window (ASG); False: they stream")
    encode_input: bool = option(False, "send pixels in [0, 1] as spikes too; without it the first layer gets the image as a current")
    expansion: Literal["none", "cifar10", "cifar100"] = option(
        "none", "input channel expansion in the published order (sends pixels as spikes too)"
    )
    unit: Literal["calibrated", "one"] = option("calibrated", "the unit of a layer: a percentile of its activations, or 1 as in the paper")
    percentile: float = option(99.7, "share of activations below the unit (unit=calibrated)", unit="%", low=0, high=100, low_open=True)
    initial: float = option(0.0, "initial potential; 0.5 makes the floor a rounding", unit="theta", low=0, high=0.5)
    guard: float = option(1e-3, "added to every count before the floor, against rounding errors", unit="spikes", low=0, high=0.4)
    epsilon: float = option(0.0, "what the published code takes off every threshold, in units of the layer", low=0, high=0.1)
    clamp_epochs: int = option(
        0, "epochs with the range but without the levels, before those with both", unit="epochs", low=0, high=100_000
    )
    train_thresholds: bool = option(False, "let neurons stream, with thresholds trained per channel (CTT), instead of averaging")
    threshold_rate: float = option(0.01, "step size of the threshold training (train_thresholds)", low=0, high=10, low_open=True)
    threshold_passes: int = option(1, "passes over the calibration images (train_thresholds)", unit="passes", low=1, high=10_000)

    @property
    def levels_per_unit(self) -> float:
        """L."""
        return self.levels or float(self.resolution)

    @property
    def range(self) -> float:
        """C = T/L, in units of the layer."""
        return self.resolution / self.levels_per_unit

    def source(self, model: nn.Module) -> nn.Module:
        encodes = self.encode_input or self.expansion != "none"
        return EncodedInput(model, len(ORDERS[self.expansion])) if encodes else model

    def waits(self, site: Site) -> bool:
        return super().waits(site) and not self.train_thresholds

    def activation(self, site: Site) -> nn.Module:
        return LevelReLU(site, self)

    def fit(self, ann: Traced, images: ImageStream, train: Train | None = None) -> None:
        layers = [layer_at(site, ann.at(site)) for site in ann.sites]
        images.feed(ann.module, layers)
        for layer in layers:
            layer.start(self)
        if train is None:
            return
        for stage, changes in self.stages().items():
            for layer in layers:
                layer.quantised = stage != "clamp" or layer.encodes_input
            train(ann.module, stage, **changes)

    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        return {**({"clamp": {"epochs": self.clamp_epochs}} if self.clamp_epochs else {}), "ann": {}}

    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        layer = layer_at(site, activation)
        if not layer.started:
            raise ConversionError(f"site {site.name}: no images were seen before conversion")
        height = layer.unit * self.range
        lowered = height - layer.unit * self.epsilon
        # Of a copy of the input with M levels: M u/unit reaches n where T u/theta does.
        theta = lowered * self.levels_per_unit / layer.levels
        return NeuronParameters(
            theta.clone(),
            initial=self.initial + self.guard,
            amplitude=height,
            scaled=False,
        )

    def adjust(self, snn: SpikingNetwork, images: ImageStream) -> None:
        if self.train_thresholds:
            train_thresholds(snn, images, self.threshold_rate, self.threshold_passes)


class EncodedInput(nn.Module):
    """`model` behind neurons that turn the pixels into spikes; with `copies` > 1 it gets that many copies of the channels."""

    def __init__(self, model: nn.Module, copies: int) -> None:
        super().__init__()
        self.copies, self.encoder, self.model = copies, nn.ReLU(), model

    def forward(self, x: Tensor) -> Tensor:
        expanded = torch.cat([x] * self.copies, 1) if self.copies > 1 else x
        return cast(Tensor, self.model(self.encoder(expanded)))


class LevelReLU(nn.Module):
    """unit * clip(floor(L u/unit + guard), 0, T)/L: the activation of VR training ("ClampQ"); see `RateEncoded`.

    While it is in training mode without gradients it watches, and until `start` it does not clip.
    """

    unit: Tensor
    levels: Tensor

    def __init__(self, site: Site, method: RateEncoded) -> None:
        super().__init__()
        self.encodes_input, self.ceiling = site.encodes_input, site.ceiling
        self.probe = CeilingProbe(site, "layer")
        self.steps, self.shift, self.per_unit = method.resolution, method.initial + method.guard, method.levels_per_unit
        self.quantised, self.started = True, False
        self.register_buffer("unit", torch.tensor(1.0))
        self.register_buffer("levels", self._levels(site, method))

    def _levels(self, site: Site, method: RateEncoded) -> Tensor:
        """L, or for an expanded input the levels M of every channel."""
        if not site.encodes_input or method.expansion == "none":
            return torch.tensor(method.levels_per_unit)
        offsets = ORDERS[method.expansion]
        channels = site.channels // len(offsets)
        return site.per_channel(torch.tensor([method.levels_per_unit + offset for offset in offsets for _ in range(channels)]))

    def start(self, method: RateEncoded) -> None:
        """End watching and take the unit from what was seen."""
        if method.unit == "calibrated" and not self.encodes_input:
            self.unit.copy_(self.probe.finish(self.probe.histogram.percentile(method.percentile)))
        if self.ceiling is not None:
            # A bounded source activation (ReLU6) bounds the range too.
            self.unit.clamp_(max=self.ceiling / method.range)
        self.started = True

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not torch.is_grad_enabled():
            self._watch(x)
        if not self.started:
            return x.clamp_min(0)
        if not self.quantised:
            return torch.minimum(x.clamp_min(0), (self.unit * (self.steps / self.per_unit)).to(x))
        return quantise(x, self.unit, self.levels, self.per_unit, self.steps, self.shift)

    def _watch(self, x: Tensor) -> None:
        self.probe(x)
        if self.encodes_input and bool(((x < 0) | (x > 1)).any()):
            found = f"{float(x.min()):.3g}..{float(x.max()):.3g}"
            raise DataError(
                f"pixels that become spikes must lie in [0, 1], found {found}; "
                "load the images with --mean 0 --std 1, or set encode_input=False"
            )


def layer_at(site: Site, activation: nn.Module) -> LevelReLU:
    """The activation that the method put at `site`.

    Raises:
        ConversionError: something else stands there.
    """
    if not isinstance(activation, LevelReLU):
        raise ConversionError(f"site {site.name}: expected a LevelReLU, found {type(activation).__name__}")
    return activation


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Tensor, levels: Tensor, per_unit: float, steps: int, shift: float) -> Tensor:
        scaled = x / unit
        ctx.save_for_backward(scaled)
        ctx.range = steps / per_unit
        wide = scaled.to(torch.promote_types(scaled.dtype, unit.dtype))
        counts = (wide * levels).add_(shift).floor_().clamp_(0, steps)
        return counts.mul_(unit / per_unit).to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scaled,) = ctx.saved_tensors
        inside = mark(torch.ge, scaled, 0).mul_(mark(torch.le, scaled, ctx.range))
        return inside.mul_(gradients[0].clamp(-1, 1)), None, None, None, None, None


def quantise(x: Tensor, unit: Tensor, levels: Tensor, per_unit: float, steps: int, shift: float = 0.0) -> Tensor:
    """Unit * clip(floor(levels x/unit + shift), 0, steps)/per_unit; straight-through: hardtanh(gradient) inside [0, C]."""
    return cast(Tensor, _Quantise.apply(x, unit, levels, per_unit, steps, shift))


@torch.no_grad()
def train_thresholds(snn: SpikingNetwork, images: ImageStream, rate: float, passes: int) -> None:
    """Channel-wise threshold training (CTT), in place: mean counts of streaming neurons follow those of their twin.

    theta_c <- theta_c - rate * C * (mean of the twin's spikes - mean of the streaming ones), means over batch, space and
    time, after every batch. Thresholds stay above a thousandth of C.

    Args:
        snn: its neurons stream.
        images: unlabelled, in batches.
        rate: step size.
        passes: over the images.
    """
    from quickspike.simulation import simulate

    twin = copy.deepcopy(snn)
    for neuron in twin.neurons().values():
        neuron.averaged = True
    for site in snn.sites:
        neuron = snn.neuron(site.name)
        neuron.threshold = nn.Parameter(
            site.per_channel(neuron.threshold.expand(site.channels, *neuron.threshold.shape[1:]).flatten().clone()), False
        )
    parameter = next(snn.parameters())
    for _ in range(passes):
        for batch in images:
            batch = batch.to(parameter)
            wanted, given = simulate(twin, batch).spikes, simulate(snn, batch).spikes
            for site in snn.sites:
                neuron = snn.neuron(site.name)
                gap = channel_rates(wanted[site.name], snn.steps) - channel_rates(given[site.name], snn.steps)
                threshold = neuron.threshold - rate * neuron.amplitude * site.per_channel(gap)
                neuron.threshold.copy_(threshold.maximum(neuron.amplitude * 1e-3))


def channel_rates(counts: Tensor, steps: int) -> Tensor:
    """Mean spikes per neuron and step of every channel, `[C]`, from counts `[B, C, ...]`."""
    return counts.float().transpose(0, 1).flatten(1).mean(1) / steps
