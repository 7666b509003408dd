"""How a spiking network runs fast: `accelerate` gives a copy whose layers are made for one kind of arithmetic."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from quickspike.conversion import SpikingNetwork
from quickspike.engines.integer import Bytes
from quickspike.errors import OptionError
from quickspike.quantisation import quantise

Engine = Literal["reference", "fused", "integer"]


@dataclass(frozen=True)
class Accelerated:
    """A network made for one engine."""

    network: SpikingNetwork
    """Simulated, evaluated and called like any other; it can neither be trained nor saved."""
    engine: str
    notes: tuple[str, ...]
    """What of it runs otherwise, and why."""


def accelerate(snn: SpikingNetwork, engine: Engine = "fused", bits: int = 8) -> Accelerated:
    """A copy of `snn` for inference.

    Args:
        snn: not modified.
        engine: `reference`: the scan over time in torch. `fused`: as compiled loops. `integer`: weights of `bits` bits
            (as `quantise` makes them), spikes as bytes, sums in 32-bit integers.
        bits: of a weight (engine=integer).

    Raises:
        OptionError: no such engine, or bits out of range.
    """
    if engine not in ("reference", "fused", "integer"):
        raise OptionError(f"engine must be reference, fused or integer, got {engine!r}")
    notes: tuple[str, ...] = ()
    if engine == "integer":
        quantised = quantise(snn, bits)
        network, notes = quantised.network, quantised.kept
        parameter = next(network.parameters())
        Bytes(network.network, torch.zeros(1, *network.input_shape).to(parameter)).rewrite()
    else:
        network = copy.deepcopy(snn)
        for neuron in network.neurons().values():
            neuron.compiled = engine == "fused"
    network.requires_grad_(False).eval()
    if any(isinstance(layer, nn.Conv2d) for layer in network.modules()):
        network.to(memory_format=torch.channels_last)
    return Accelerated(network, engine, notes)
