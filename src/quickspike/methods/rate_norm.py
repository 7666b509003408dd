"""Rate norm layers: the source network passes on firing rates in [0, 1], and a loss on them buys speed.

J. Ding, Z. Yu, Y. Tian, T. Huang, "Optimal ANN-SNN Conversion for Fast and Accurate Inference in Deep Spiking Neural
Networks", IJCAI 2021, arXiv 2105.11654.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quickspike.activations import clip
from quickspike.data import ImageStream
from quickspike.errors import ConversionError
from quickspike.graph import Site, Traced
from quickspike.method import Method, Paper, register
from quickspike.neuron import NeuronParameters, unfold
from quickspike.options import option
from quickspike.structure import first
from quickspike.training import Answers, Loss, Train, parameter_groups

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork

SMALLEST = 1e-6
"""Added to every ceiling, as in the published code: theta > 0 always."""
ACCURACY = "accuracy"
"""Name of stage 1."""


@register
@dataclass(frozen=True, kw_only=True)
class RateNorm(Method):
    """Each ReLU becomes r = clip(z, 0, theta)/theta with theta = p * (running maximum of z), p = sigmoid(s).

    Stage 1 trains weights with p fixed. Stage 2 freezes everything but s, one for all layers, and minimises
    1 - cos(frozen network's logits, logits) + weight * mean of Omega, Omega = |r|_1/|r|_2^2, which bounds how far the
    rates of a spiking network are from r after t steps: K(t) = |r(t) - r|^2/|r|^2 < Omega/t (v(0) = 0; the paper
    has 2 Omega/t). Of the p after each epoch the one of least mean Omega is kept whose validation accuracy stays within the
    tolerance. Neurons get theta as it is.

    Differs from the paper: layers pass on theta * r unless `unit_spikes` is set, which is the same network up to a factor
    per layer and lets a network trained with ReLU keep its function; the running maximum starts from calibration images
    instead of 1; the reference of the cosine is a frozen copy (the published code compares the network with itself); s
    has no weight decay, which would pull p towards 1/2. Stage 2 looks at p after each epoch, the published code every 100
    iterations, and takes mean Omega on the first calibration batch, not on the batches that s learns from; without
    validation images mean Omega alone decides.
    """

    name: ClassVar[str] = "rate_norm"
    paper: ClassVar[Paper] = Paper(
        "J. Ding, Z. Yu, Y. Tian, T. Huang",
        "Optimal ANN-SNN Conversion for Fast and Accurate Inference in Deep Spiking Neural Networks",
        2021,
        "2105.11654",
    )

    scale: float = option(2.5, "s that stage 2 starts from; the threshold is sigmoid(s) times the running maximum", low=-10, high=20)
    weight: float = option(0.1, "weight of the rate inference loss in stage 2", low=0, high=1000)
    speed_epochs: int = option(2, "epochs of stage 2; 0 leaves it out", unit="epochs", low=0, high=100_000)
    speed_rate: float = option(0.1, "learning rate of s in stage 2", low=0, high=1000, low_open=True)
    tolerance: float = option(1.0, "validation accuracy that stage 2 may cost", unit="percentage points", low=0, high=100)
    unit_spikes: bool = option(False, "spikes of height 1, as in the paper, instead of the height of the threshold")
    initial: float = option(0.0, "initial potential", unit="theta", low=0, high=1)

    def activation(self, site: Site) -> nn.Module:
        return RateNormLayer(site, self.scale, self.unit_spikes)

    def fit(self, ann: Traced, images: ImageStream, train: Train | None = None) -> None:
        layers = [layer_at(site, ann.at(site)) for site in ann.sites]
        for layer in layers[1:]:
            layer.scale = layers[0].scale
        images.feed(ann.module, layers)
        for layer in layers:
            layer.watched = True
        if train is None:
            return
        scale = layers[0].scale
        # Training starts at p = 1; stage 2 begins at the wanted scale.
        self._set(scale, 10.0)
        train(ann.module, ACCURACY, groups=parameter_groups(ann.module, [scale])[:-1])
        self._set(scale, self.scale)
        if self.speed_epochs:
            self._speed_up(ann, layers, images.first, train)

    def _speed_up(self, ann: Traced, layers: list[RateNormLayer], images: Tensor, train: Train) -> None:
        """Stage 2."""
        scale = layers[0].scale
        loss = rate_inference_loss(layers, train.answers(ann.module), self.weight)
        start = train.accuracy(ann.module)
        best, least = scale.detach().clone(), mean_omega(ann, images)
        groups = [{"params": [scale], "weight_decay": 0.0}]
        for stage, changes in self.stages().items():
            if stage == ACCURACY:
                continue
            train(ann.module, stage, loss=loss, groups=groups, mode=nn.Module.eval, **changes)
            now, speed = train.accuracy(ann.module), mean_omega(ann, images)
            if speed < least and (start is None or now is None or now >= start - self.tolerance):
                best, least = scale.detach().clone(), speed
        self._set(scale, best)

    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        speed = {"epochs": 1, "optimiser": "sgd", "learning_rate": self.speed_rate, "schedule": "constant", "ema": 0.0}
        return {ACCURACY: {}, **{f"speed{epoch + 1}": speed for epoch in range(self.speed_epochs)}}

    @staticmethod
    def _set(scale: nn.Parameter, value: float | Tensor) -> None:
        with torch.no_grad():
            scale.copy_(torch.as_tensor(value))

    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        layer = layer_at(site, activation)
        if not layer.watched:
            raise ConversionError(f"site {site.name}: no images were seen before conversion")
        return NeuronParameters(layer.threshold, initial=self.initial, scaled=not self.unit_spikes)


class RateNormLayer(nn.Module):
    """r = clip(z, 0, theta)/theta, theta = running_max * sigmoid(scale) + 1e-6; see `RateNorm`.

    The running maximum moves in training mode, before it is used: by 10 % of the way to each batch's maximum, or
    straight to it while the layer watches calibration images (training mode without gradients).

    Args:
        site: the activation that it replaces.
        scale: s; `RateNorm.fit` makes it one parameter of all layers.
        unit: give r itself; else theta * r, which is z clipped.
    """

    running_max: Tensor

    def __init__(self, site: Site, scale: float, unit: bool) -> None:
        super().__init__()
        self.ceiling, self.unit = math.inf if site.ceiling is None else site.ceiling, unit
        self.watched = False
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.register_buffer("running_max", torch.tensor(0.0))
        self.omega: Tensor | None = None
        """Rate inference loss of the last batch, while the scale learns."""

    @property
    def threshold(self) -> Tensor:
        """theta, a scalar."""
        return self.running_max * torch.sigmoid(self.scale) + SMALLEST

    def rates(self, out: Tensor) -> Tensor:
        """R, in [0, 1], from what the layer gave."""
        return out if self.unit else out / self.threshold.to(out)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._follow(x.detach())
        if not self.watched:
            return x.clamp(0.0, self.ceiling)
        theta = self.threshold
        clipped = clip(x, theta)
        self.omega = omega(clipped / theta) if self.scale.requires_grad and torch.is_grad_enabled() else None
        return clipped / theta.to(x) if self.unit else clipped

    def _follow(self, x: Tensor) -> None:
        peak = x.amax().clamp(0.0, self.ceiling).to(self.running_max)
        if not torch.is_grad_enabled():
            torch.maximum(self.running_max, peak, out=self.running_max)
        else:
            self.running_max.lerp_(peak, 0.1)


def layer_at(site: Site, activation: nn.Module) -> RateNormLayer:
    """The rate norm layer that the method put at `site`.

    Raises:
        ConversionError: something else stands there.
    """
    if not isinstance(activation, RateNormLayer):
        raise ConversionError(f"site {site.name}: expected a RateNormLayer, found {type(activation).__name__}")
    return activation


def omega(rates: Tensor) -> Tensor:
    """Rate inference loss |r|_1/|r|_2^2 over the whole tensor; about 1/(typical rate), 1 for binary rates, 0 for silence."""
    return rates.float().sum() / (rates.float().square().sum() + 1e-5)


def omega_of_logits(logits: Tensor) -> Tensor:
    """Omega of the logits `[B, K]`, which count as a layer: rates relu(y)/max(y)."""
    positive = logits.relu()
    return omega(positive / positive.max().clamp_min(SMALLEST))


@torch.no_grad()
def mean_omega(ann: Traced, images: Tensor) -> float:
    """Omega of the fitted network in evaluation mode on `images`, `[B, ...]`: the mean over layers and logits."""
    ann.module.eval()
    measured = _Omegas(ann.module, {site.name: layer_at(site, ann.at(site)) for site in ann.sites})
    logits = first(measured.run(images.to(next(ann.module.parameters())))).float()
    return float(torch.stack([*measured.omegas, omega_of_logits(logits)]).mean())


class _Omegas(fx.Interpreter):
    """Omega of each layer on the way; its rates are not kept."""

    def __init__(self, module: fx.GraphModule, layers: Mapping[str, RateNormLayer]) -> None:
        super().__init__(module)
        self.layers = layers
        self.omegas: list[Tensor] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        out = super().call_module(target, args, dict(kwargs))
        if target in self.layers:
            self.omegas.append(omega(self.layers[target].rates(out)))
        return out


def rate_inference_loss(layers: list[RateNormLayer], reference: Answers, weight: float) -> Loss:
    """1 - cos(reference's logits, logits) + weight * mean Omega over the layers and the logits (relu(y)/max(y)).

    Args:
        layers: of the network that the loss is given.
        reference: answers in the precision of the training, or the cosine would not be 1 at the start.
        weight: of the mean of Omega.
    """

    def loss(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        logits = first(network(images)).float()
        wanted = reference(images)
        omegas = [layer.omega for layer in layers if layer.omega is not None]
        for layer in layers:
            # Kept longer, it would keep the whole graph of this batch in memory.
            layer.omega = None
        omegas.append(omega_of_logits(logits))
        return 1 - F.cosine_similarity(wanted, logits, dim=1).mean() + weight * torch.stack(omegas).mean()

    return loss


def fit_curve(counts: Tensor, rates: Tensor) -> Tensor:
    """K(t) = |r(t) - r|^2/|r|^2 for t = 1..T (the paper's fit curve).

    Args:
        counts: number of spikes up to and including each step, `[T, ...]`.
        rates: what the source network gives, in [0, 1], `[...]`.
    """
    steps = torch.arange(1, len(counts) + 1, device=counts.device).view(-1, *(1,) * rates.ndim)
    error = (counts / steps - rates).square().flatten(1).sum(1)
    return error / rates.square().sum().clamp_min(1e-12)


@torch.no_grad()
def measure_fit(snn: SpikingNetwork, ann: Traced, images: Tensor) -> dict[str, dict[str, Any]]:
    """Fit curve and its bound of every site: {"curve": K(1..T), "omega": Omega, "bound": Omega/t}.

    Args:
        snn: the converted network.
        ann: the fitted network that it came from.
        images: `[B, ...]`.
    """
    rates = _Recorded(ann.module, {site.name for site in ann.sites})
    rates.run(images)
    spikes = _Recorded(snn.network, {site.name for site in snn.sites})
    spikes.run(images)
    found: dict[str, dict[str, Any]] = {}
    for site in ann.sites:
        layer = layer_at(site, ann.at(site))
        rate = layer.rates(rates.values[site.name])
        neuron = snn.neuron(site.name)
        fired = unfold(neuron.spikes(spikes.values[site.name]) / neuron.members, snn.steps)
        bound = float(omega(rate))
        curve = fit_curve(fired.cumsum(0), rate).tolist()
        found[site.name] = {"curve": curve, "omega": bound, "bound": [bound / t for t in range(1, snn.steps + 1)]}
    return found


class _Recorded(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names = names
        self.values: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        out = super().call_module(target, args, dict(kwargs))
        if target in self.names:
            self.values[target] = out
        return out
