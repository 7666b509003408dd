"""Run a spiking network and look inside: layer by layer with time folded into the batch, or step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from quickspike.conversion import SpikingNetwork, readout
from quickspike.errors import ConversionError
from quickspike.memory import in_bytes, parts
from quickspike.neuron import Neuron, Timed, unfold
from quickspike.structure import Outputs, each, first

if TYPE_CHECKING:
    from quickspike.early_exit import Exit


@dataclass(frozen=True)
class Run:
    """What one simulation gave."""

    readouts: Outputs
    """Readout after each step, `[T, B, K]`: the mean of the outputs up to and including that step. A network for the count
    engine has it after the last step only, and NaN before. Several in tuples, lists and dicts where the source network
    gives several."""
    spikes: Mapping[str, Tensor]
    """Number of spikes of every neuron in T steps, or until its sample stopped, by site, `[B, ...]`."""
    stopped: Tensor | None = None
    """Steps that each sample took, `[B]`, where samples may stop early; its logits stay as they were then."""

    @property
    def logits(self) -> Tensor:
        """The readout, `[T, B, K]`; of several the first."""
        return first(self.readouts)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.logits)

    @property
    def rates(self) -> dict[str, float]:
        """Mean spikes per neuron and step, by site, in [0, 1]."""
        taken = self.steps if self.stopped is None else float(self.stopped.double().mean())
        return {site: float(counts.double().mean()) / taken for site, counts in self.spikes.items()}


def simulate(
    snn: SpikingNetwork, images: Tensor, *, step_by_step: bool = False, exit: Exit | None = None, memory: str | int | None = None
) -> Run:
    """Present `images` for T steps.

    Args:
        snn: the network.
        images: `[B, ...]`, the same at every step (direct coding).
        step_by_step: run the whole graph once per step with explicit states, the way hardware would. Slow, and gives
            the same numbers as the default, which runs each layer once with time folded into the batch.
        exit: lets a sample stop as soon as its answer is decided (runs step by step); see `quickspike.early_exit`.
        memory: bytes, or a text such as "2GiB", within which the simulation stays by taking the batch in parts; by default
            what `snn.memory` says.

    Raises:
        DataError: the images do not fit the network.
        ConversionError: the network has no answer after single steps.
        OptionError: one step of one sample does not fit into the memory.
    """
    snn.check_input(images)
    if (step_by_step or exit is not None) and snn.summed:
        raise ConversionError("a network made for the count engine has no steps; simulate the network it was made from")
    if step_by_step or exit is not None:
        return _step_by_step(snn, images, exit)
    budget = memory if memory is not None else snn.memory
    return _layer_by_layer(snn, images) if budget is None else _in_parts(snn, images, in_bytes(budget))


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
        return Run(each(partial(_at_the_end, snn.steps), interpreter.run(images)), interpreter.spikes)
    return Run(each(lambda out: readout(unfold(out, snn.steps)), interpreter.run(images)), interpreter.spikes)


def _at_the_end(steps: int, last: Tensor) -> Tensor:
    """There is no answer before the last window is over."""
    readouts = last.new_full((steps, *last.shape), math.nan)
    readouts[-1] = last
    return readouts


def _in_parts(snn: SpikingNetwork, images: Tensor, memory: int) -> Run:
    """The same numbers, with no more at a time than fits."""
    size = parts(snn, images, memory)
    run = _layer_by_layer if size.steps == snn.steps else partial(_in_time, steps=size.steps)
    runs = [run(snn, part) for part in torch.split(images, size.samples)]
    spikes = {site: torch.cat([one.spikes[site] for one in runs]) for site in runs[0].spikes}
    return Run(each(lambda *parts: torch.cat(parts, 1), *(one.readouts for one in runs)), spikes)


def _in_time(snn: SpikingNetwork, images: Tensor, steps: int) -> Run:
    """Some steps at a time."""
    outputs, spikes, states = list[Outputs](), dict[str, Tensor](), dict[str, Any]()
    for start in range(0, snn.steps, steps):
        count = min(steps, snn.steps - start)
        part = _Part(snn, states, count)
        outputs.append(each(partial(unfold, steps=count), part.run(images)))
        states = part.states
        spikes = {site: spikes.get(site, 0) + fired for site, fired in part.fired.items()}
    return Run(each(lambda *parts: readout(torch.cat(parts)), *outputs), spikes)


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


def _step_by_step(snn: SpikingNetwork, images: Tensor, exit: Exit | None = None) -> Run:
    running, states, constants = torch.arange(len(images), device=images.device), dict[str, Any](), _constants(snn, images)
    stopped = torch.full_like(running, snn.steps)
    readouts, spikes, outputs = list[Outputs](), dict[str, Tensor](), list[Outputs]()
    for step in range(1, snn.steps + 1):
        part = _Part(snn, states, 1)
        outputs.append(part.run(images, initial_env=dict(constants)))
        states = part.states
        mean = each(lambda *steps: readout(torch.stack(steps))[-1], *outputs)
        if len(running) == len(stopped):
            readouts.append(mean)
        else:
            readouts.append(each(partial(_put, running), readouts[-1], mean))
        for site, fired in part.fired.items():
            spikes[site] = fired if site not in spikes else spikes[site].index_add(0, running, fired)
        if exit is None or step == snn.steps:
            continue
        decided = exit.decided(first(mean))
        if not bool(decided.any()):
            continue
        stopped[running[decided]] = step
        going = (~decided).nonzero().flatten()
        if not len(going):
            readouts += [readouts[-1]] * (snn.steps - step)
            break
        running, images, outputs = running[going], images[going], [each(itemgetter(going), one) for one in outputs]
        # Sizes are among the constants, so these are computed anew.
        states, constants = _some(states, going), _constants(snn, images)
    return Run(each(lambda *steps: torch.stack(steps), *readouts), spikes, None if exit is None else stopped)


def _put(samples: Tensor, into: Tensor, values: Tensor) -> Tensor:
    return into.index_copy(0, samples, values)


def _constants(snn: SpikingNetwork, images: Tensor) -> dict[fx.Node, Any]:
    """Values that are the same at every step, by node."""
    timed = set[fx.Node]()
    for node in snn.network.graph.nodes:
        layer = snn.network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, Timed) or any(parent in timed for parent in node.all_input_nodes):
            timed.add(node)
    found = dict[fx.Node, Any]()
    recorder = fx.Interpreter(snn.network, garbage_collect_values=False)
    recorder.args_iter = iter([images])
    for node in snn.network.graph.nodes:
        if node not in timed:
            recorder.env[node] = found[node] = recorder.run_node(node)
    return found


def _some(value: Any, samples: Tensor) -> Any:
    """States for some of the samples."""
    if isinstance(value, Tensor):
        return value[samples]
    if isinstance(value, dict):
        return {key: _some(one, samples) for key, one in value.items()}
    return type(value)(_some(one, samples) for one in value) if isinstance(value, (tuple, list)) else value


def outputs_in_chunks(snn: SpikingNetwork, images: Tensor, chunk: int) -> Outputs:
    """What the last layer gives at each step, `[T, B, K]`, with the activations of `chunk` steps in memory at a time.

    The activations of earlier chunks are computed again in the backward pass (activation checkpointing over time);
    only the membrane potentials between chunks are kept. Numbers and gradients are those of `snn.outputs`.
    """

    def run(images: Tensor, states: Mapping[str, Any], steps: int) -> tuple[Outputs, dict[str, Any]]:
        part = _Part(snn, states, steps)
        return each(partial(unfold, steps=steps), part.run(images)), part.states

    outputs, states = [], dict[str, Any]()
    for start in range(0, snn.steps, chunk):
        steps = min(chunk, snn.steps - start)
        out, states = checkpoint(run, images, states, steps, use_reentrant=False)
        outputs.append(out)
    return each(lambda *parts: torch.cat(parts), *outputs)
