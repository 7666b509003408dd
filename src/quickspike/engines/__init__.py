"""How a spiking network runs fast: `accelerate` gives a copy whose layers are made for one kind of arithmetic."""

from __future__ import annotations

import copy
import logging
from typing import Literal, get_args

import torch
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

from quickspike.conversion import SpikingNetwork
from quickspike.engines.count import MOST, sum_over_steps
from quickspike.engines.half import to_bfloat16
from quickspike.engines.integer import Bytes, available
from quickspike.errors import OptionError
from quickspike.memory import in_bytes, keep_freed_memory
from quickspike.processor import warn_of_slow
from quickspike.quantisation import quantise

logger = logging.getLogger(__name__)

Engine = Literal["auto", "reference", "fused", "integer", "count"]
Precision = Literal["fp32", "bf16"]


def accelerate(
    snn: SpikingNetwork, engine: Engine = "auto", precision: Precision = "fp32", bits: int = 8, memory: str | int | None = None
) -> SpikingNetwork:
    """A copy of `snn` for inference: called, simulated and evaluated like any other, but neither trained nor saved.

    `provenance["engine"]` says which engine it is, why, and which layers with weights stay in floating point although it
    is one for whole numbers, each with the reason. On the CPU the process keeps the memory that it
    frees from now on (see `quickspike.memory.keep_freed_memory`): fresh pages for every layer can take half of the time.

    Args:
        snn: not modified.
        engine: `reference`: the scan over time in torch. `fused`: as compiled loops. `integer`: weights of `bits` bits
            (see `quantise`), spikes as bytes, sums in 32-bit integers; exact for the network in whole numbers. `count`:
            the same in one pass for all steps, where layers wait for whole windows; weighted spikes are counted by what they
            weigh. `auto`: the fastest that gives the spikes of `snn` itself: `count` or `integer` for a network in whole
            numbers, else `fused`.
        precision: of the layers that read spikes; bf16 rounds their weights and currents (engine=fused).
        bits: of a weight (engine=integer, count).
        memory: what a simulation may take, in bytes or as "2GiB": it takes the batch in parts; None for what
            `snn.memory` says.

    Raises:
        OptionError: `snn` is accelerated already, no such engine or precision, the engine cannot run this network, or memory is no amount.
    """
    if engine not in get_args(Engine):
        raise OptionError(f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}")
    if precision not in get_args(Precision) or (precision == "bf16" and engine not in ("auto", "fused")):
        raise OptionError(f"precision must be fp32, or bf16 with the fused engine, got {precision!r} with {engine}")
    if "engine" in snn.provenance:
        raise OptionError(f"this network was made for the {snn.provenance['engine']['name']} engine; accelerate the one it was made from")
    name, why = _chosen(snn, precision) if engine == "auto" else (engine, "asked for")
    device = next(snn.parameters()).device.type
    if name in ("integer", "count") and device != "cpu":
        raise OptionError(f"the {name} engine runs on the CPU, the network is on {device}; move it with .cpu(), or take fused")
    if name in ("integer", "count") and not available():
        raise OptionError(f"the {name} engine needs a build of torch with oneDNN (x86-64); take fused")
    if name == "integer":
        snn.refuse_levels("the integer engine")
    if device == "cpu":
        keep_freed_memory()
    network, kept = copy.deepcopy(snn), list[str]()
    if name in ("integer", "count"):
        reasons = dict[str, str]()
        if "weight_bits" not in snn.provenance:
            # Of weighted spikes and of groups, levels: one step each.
            quantised = quantise(snn.rate_coded(), bits)
            network, reasons = quantised.network, dict(entry.split(": ", 1) for entry in quantised.kept)
            if network.steps != snn.steps:
                for site, neuron in network.neurons().items():
                    neuron.weighted, neuron.members = snn.neuron(site).weighted, snn.neuron(site).members
                network.set_steps(snn.steps)
        with torch.no_grad():
            ShapeProp(network.network).propagate(torch.zeros(1, *network.input_shape).to(next(network.parameters())))
        if name == "count":
            sum_over_steps(network)
        kept = Bytes(network.network, reasons).rewrite()
    elif precision == "bf16":
        warn_of_slow(precision, device)
        to_bfloat16(network)
    for neuron in network.neurons().values():
        neuron.compiled = name != "reference"
    network.requires_grad_(False).eval()
    if any(isinstance(layer, nn.Conv2d) for layer in network.modules()):
        network.to(memory_format=torch.channels_last)
    network.memory = snn.memory if memory is None else in_bytes(memory)
    network.provenance["engine"] = {"name": name, "precision": precision, "why": why, "in floating point": kept}
    logger.info("engine %s: %s", name, why)
    return network


def _chosen(snn: SpikingNetwork, precision: Precision) -> tuple[Engine, str]:
    """The fastest exact engine, and why."""
    device = next(snn.parameters()).device.type
    if device != "cpu":
        return "fused", f"the other engines run on the CPU, the network is on {device}"
    if not available():
        return "fused", "this build of torch has no oneDNN"
    if "weight_bits" not in snn.provenance or precision == "bf16":
        return "fused", "exact for weights in floating point"
    windows = all(neuron.averaged or neuron.constant_input for neuron in snn.neurons().values())
    if windows and snn.steps <= MOST:
        return "count", "the network is in whole numbers and its layers wait for whole windows"
    return "integer", "the network is in whole numbers"


__all__ = ["Engine", "Precision", "accelerate"]
