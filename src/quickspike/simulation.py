"""Run a spiking network and look inside: layer by layer with time folded into the batch, or step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from quickspike.conversion import SpikingNetwork, readout
from quickspike.errors import ConversionError
from quickspike.neuron import Neuron, Timed, unfold


@dataclass(frozen=True)
class Run:
    """What one simulation gave."""

    logits: Tensor
    """Readout after each step, `[T, B, K]`: the mean of the outputs up to and including that step. A network for the count
    engine has it after the last step only, and NaN before."""
    spikes: Mapping[str, Tensor]
    """Number of spikes of every neuron in T steps, by site, `[B, ...]`."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.logits)

    @property
    def rates(self) -> dict[str, float]:
        """Mean spikes per neuron and step, by site, in [0, 1]."""
        return {site: float(counts.double().mean()) / self.steps for site, counts in self.spikes.items()}


def simulate(snn: SpikingNetwork, images: Tensor, *, step_by_step: bool = False) -> Run:
    """Present `images` for T steps.

    Args:
        snn: the network.
        images: `[B, ...]`, the same at every step (direct coding).
        step_by_step: run the whole graph once per step with explicit states, the way hardware would. Slow, and gives
            the same numbers as the default, which runs each layer once with time folded into the batch.

    Raises:
        DataError: the images do not fit the network.
    """
    snn.check_input(images)
    if step_by_step and snn.summed:
        raise ConversionError("a network made for the count engine has no steps; simulate the network it was made from")
    return _step_by_step(snn, images) if step_by_step else _layer_by_layer(snn, images)


class _LayerByLayer(fx.Interpreter):
    def __init__(self, snn: SpikingNetwork) -> None:
        super().__init__(snn.network)
        self.steps = snn.steps
        self.spikes: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(target, args, kwargs)
        layer = self.fetch_attr(target)
        if isinstance(layer, Neuron):
            self.spikes[target] = out.long() if layer.counts else unfold(out.detach(), self.steps).ne(0).sum(0)
        return out


def _layer_by_layer(snn: SpikingNetwork, images: Tensor) -> Run:
    interpreter = _LayerByLayer(snn)
    if snn.summed:
        last = interpreter.run(images)
        # There is no answer before the last window is over.
        logits = last.new_full((snn.steps, *last.shape), math.nan)
        logits[-1] = last
        return Run(logits, interpreter.spikes)
    outputs = unfold(interpreter.run(images), snn.steps)
    return Run(readout(outputs), interpreter.spikes)


class _Part(fx.Interpreter):
    """The graph for some of the steps; the states of its timed layers go in and come out."""

    def __init__(self, snn: SpikingNetwork, states: Mapping[str, Any], steps: int) -> None:
        super().__init__(snn.network)
        self.states, self.steps = dict(states), steps
        self.fired: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if not isinstance(layer, Timed):
            return super().call_module(target, args, kwargs)
        # Every timed layer is called by exactly one node, so that its name can key its state.
        out, self.states[target] = layer.scan(args[0], self.states.get(target), self.steps)
        if isinstance(layer, Neuron):
            self.fired[target] = unfold(out.detach(), self.steps).ne(0).sum(0)
        return out


def _step_by_step(snn: SpikingNetwork, images: Tensor) -> Run:
    outputs, spikes, states = [], dict[str, Tensor](), dict[str, Any]()
    for _ in range(snn.steps):
        part = _Part(snn, states, 1)
        outputs.append(part.run(images))
        states = part.states
        spikes = {site: spikes.get(site, 0) + fired for site, fired in part.fired.items()}
    return Run(readout(torch.stack(outputs)), spikes)


def outputs_in_chunks(snn: SpikingNetwork, images: Tensor, chunk: int) -> Tensor:
    """What the last layer gives at each step, `[T, B, K]`, with the activations of `chunk` steps in memory at a time.

    The activations of earlier chunks are computed again in the backward pass (activation checkpointing over time);
    only the membrane potentials between chunks are kept. Numbers and gradients are those of `snn.outputs`.
    """

    def run(images: Tensor, states: Mapping[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
        part = _Part(snn, states, steps)
        return unfold(part.run(images), steps), part.states

    outputs, states = [], dict[str, Any]()
    for start in range(0, snn.steps, chunk):
        steps = min(chunk, snn.steps - start)
        out, states = checkpoint(run, images, states, steps, use_reentrant=False)
        outputs.append(out)
    return torch.cat(outputs)
