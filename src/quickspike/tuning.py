"""Fine-tuning of a spiking network: back-propagation through time with surrogate gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from quickspike.errors import OptionError
from quickspike.options import option, validate

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork
    from quickspike.training import History, Train


TUNING: Mapping[str, Any] = {"optimiser": "adam", "learning_rate": 1e-4, "weight_decay": 0.0, "schedule": "cosine"}
"""Settings of fine-tuning where the user gives none (arXiv 2008.03658, section IV: Adam at 1e-4)."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What of a spiking network is learned, and how its gradients are taken."""

    name: ClassVar[str] = "tuning"

    weights: bool = option(True, "learn the weights of the layers")
    thresholds: bool = option(True, "learn the thresholds; amplitudes and initial potentials that are fractions of them follow")
    leaks: bool = option(True, "learn the leaks; they stay within [0, 1] (neurons with weighted spikes have none)")
    threshold_rate: float = option(1.0, "learning rate of thresholds and leaks, as a multiple of that of the weights", low=0, high=1000)
    dropout: float = option(0.0, "share of the neurons silenced in training, the same ones at every step of a batch", low=0, high=0.99)
    chunk: int = option(
        0,
        "steps whose activations are kept at a time; the others are computed again in the backward pass (0: all are kept)",
        unit="steps",
        low=0,
        high=65536,
    )

    def __post_init__(self) -> None:
        validate(self)


def end_to_end(snn: SpikingNetwork, train: Train, tuning: Tuning, stage: str = "tune") -> History:
    """One stage of training of weights, thresholds and leaks together (arXiv 2008.03658 and 2112.12133, fine-tuning)."""
    if not (tuning.weights or tuning.thresholds or tuning.leaks):
        raise OptionError("tuning: nothing to learn is left: weights, thresholds and leaks are all off")
    neurons = snn.neurons().values()
    own = {id(parameter) for neuron in neurons for parameter in neuron.parameters()}
    weights = [parameter for parameter in snn.parameters() if id(parameter) not in own] if tuning.weights else []
    learned = [neuron.threshold for neuron in neurons if tuning.thresholds]
    # Weighted spikes have no leak.
    learned += [neuron.leak for neuron in neurons if tuning.leaks and not neuron.weighted]
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.ndim > 1]},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
        {"params": learned, "weight_decay": 0.0, "rate": tuning.threshold_rate},
    ]

    def keep_in_bounds() -> None:
        for neuron in neurons:
            theta, leak = neuron.bounded()
            neuron.threshold.copy_(theta)
            neuron.leak.copy_(leak)

    try:
        for neuron in neurons:
            neuron.dropout = tuning.dropout
        snn.chunk = tuning.chunk
        return train(snn, stage, groups=groups, after_step=keep_in_bounds)
    finally:
        snn.chunk = 0
        for neuron in neurons:
            neuron.dropout = 0.0
