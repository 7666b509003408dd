"""Run a spiking network and look inside: layer by layer with time folded into the batch, or step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from quickspike.conversion import SpikingNetwork
from quickspike.errors import ConversionError
from quickspike.memory import counter_type, in_bytes, parts
from quickspike.neuron import Neuron, Timed, single, unfold
from quickspike.readouts import readout
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
    """Number of spikes of every neuron, or group of neurons, in T steps, or until its sample stopped, by site, `[B, ...]`, in the
    smallest signed type that holds T, or T M (int8 up to 127): sums and means of them are right, products with large numbers
    need a wider one."""
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
        """Mean spikes per neuron and step, by site, in [0, 1]; of groups of M neurons per group, in [0, M]."""
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
            what `snn.memory` says. The weights, the images and the result itself are not counted; `snn(images)` keeps
            the answers only.

    Raises:
        DataError: the images do not fit the network.
        ConversionError: the network has no answer after single steps.
        OptionError: the exit was set for another number of steps, layers wait for whole windows while samples are to exit, or one
            step of one sample does not fit into the memory.
    """
    single = step_by_step or exit is not None
    if single and snn.summed:
        raise ConversionError("a network made for the count engine has no steps; simulate the network it was made from")
    if exit is not None:
        exit.check(snn)
    budget = memory if memory is not None else snn.memory
    # Within a budget, memory is counted for one step at a time.
    at_once = 1 if budget is not None else snn.steps
    run: Callable[[SpikingNetwork, Tensor], Run] = partial(_step_by_step, exit=exit, at_once=at_once) if single else _layer_by_layer
    with snn.taking(images):
        if budget is None:
            return run(snn, images)
        size = parts(snn, images, in_bytes(budget), step_by_step=single)
        if not single and size.steps < snn.steps:
            run = partial(_in_time, steps=size.steps)
        readouts, spikes, stopped = _Joined(len(images), 1), _Joined(len(images)), _Joined(len(images))
        for part in torch.split(images, size.samples):
            one = run(snn, part)
            readouts.add(one.readouts)
            spikes.add(one.spikes)
            stopped.add(one.stopped)
        return Run(readouts.whole, spikes.whole, stopped.whole)


def answer(snn: SpikingNetwork, images: Tensor, memory: str | int) -> Outputs:
    """The readout after the last step, `[B, K]`, without gradients; nothing else is kept of a part of the batch.

    Args:
        snn: the network.
        images: `[B, ...]`, the same at every step.
        memory: see `simulate`.

    Raises:
        DataError: the images do not fit the network.
        OptionError: one step of one sample does not fit into the memory.
    """
    with snn.taking(images):
        size = parts(snn, images, in_bytes(memory), counted=False)
        answers = _Joined(len(images))
        for part in torch.split(images, size.samples):
            answers.add(_answer(snn, part, size.steps))
        return answers.whole


class _Joined:
    """Results of the parts of a batch, copied into one as they come: a list of them to join takes the memory twice."""

    def __init__(self, samples: int, axis: int = 0) -> None:
        self.samples, self.axis, self.done = samples, axis, 0
        self.whole: Any = None

    def add(self, part: Any) -> None:
        """The samples that come next."""
        if self.whole is None:
            self.whole = each(self._room, part)
        count = 0

        def put(whole: Tensor, one: Tensor) -> Tensor:
            nonlocal count
            count = one.shape[self.axis]
            return whole.narrow(self.axis, self.done, count).copy_(one)

        each(put, self.whole, part)
        self.done += count

    def _room(self, part: Tensor) -> Tensor:
        return part.new_empty((*part.shape[: self.axis], self.samples, *part.shape[self.axis + 1 :]))


def _counts(neuron: Neuron, out: Tensor, steps: int) -> Tensor:
    """Spikes `[B, ...]` in the outputs `[steps*B, ...]`.

    Step by step: torch's sum of flags makes 8 bytes of every one of them first.
    """
    slots = unfold(out.detach(), steps)
    counts = torch.zeros_like(slots[0], dtype=counter_type(neuron.steps * neuron.members))
    for slot in slots:
        spikes = neuron.spikes(slot)
        # Flags are added as they are; a copy of them would cost as much again.
        counts += spikes if spikes.dtype == torch.bool else spikes.to(counts)
    return counts


class _LayerByLayer(fx.Interpreter):
    def __init__(self, snn: SpikingNetwork) -> None:
        super().__init__(snn.network)
        self.steps = snn.steps
        self.spikes: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(target, args, kwargs)
        layer = self.fetch_attr(target)
        if isinstance(layer, Neuron):
            self.spikes[target] = out.to(counter_type(layer.resolution)) if layer.counts else _counts(layer, out, self.steps)
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


def _in_time(snn: SpikingNetwork, images: Tensor, steps: int) -> Run:
    """Some steps at a time."""
    outputs, spikes, states = list[Outputs](), dict[str, Tensor](), dict[str, Any]()
    for start in range(0, snn.steps, steps):
        part = _Part(snn, states, min(steps, snn.steps - start), counted=True)
        states = part.states
        outputs.append(each(partial(unfold, steps=part.steps), part.run(images)))
        for site, fired in part.fired.items():
            spikes[site] = fired if start == 0 else spikes[site].add_(fired)
    return Run(each(lambda *parts: readout(torch.cat(parts)), *outputs), spikes)


def _answer(snn: SpikingNetwork, images: Tensor, steps: int) -> Outputs:
    """The readout after the last step, some steps at a time."""
    if snn.summed:
        return snn.network(images)
    if steps == snn.steps:
        return each(lambda out: _mean(_added(unfold(out, steps)), out, steps), snn.network(images))
    totals, outputs, states = None, None, dict[str, Any]()
    for start in range(0, snn.steps, steps):
        part = _Part(snn, states, min(steps, snn.steps - start))
        states = part.states
        outputs = each(partial(unfold, steps=part.steps), part.run(images))
        totals = each(_added, outputs, *([] if totals is None else [totals]))
    return each(lambda total, out: _mean(total, out, snn.steps), totals, outputs)


def _added(outputs: Tensor, total: Tensor | None = None) -> Tensor:
    """The sum `[B, K]` of outputs `[T, B, K]`, on top of `total`, in double precision: the numbers of `readout`."""
    for out in outputs:
        total = out.double() if total is None else total + out
    return cast(Tensor, total)


def _mean(total: Tensor, like: Tensor, steps: int) -> Tensor:
    return (total.to(single(like).dtype) / steps).to(like.dtype)


class _Part(fx.Interpreter):
    """The graph for some of the steps; the states of its timed layers go in and come out."""

    def __init__(self, snn: SpikingNetwork, states: Mapping[str, Any], steps: int, *, counted: bool = False) -> None:
        super().__init__(snn.network)
        self.states, self.steps, self.whole, self.counted = dict(states), steps, snn.steps, counted
        self.fired: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if not isinstance(layer, Timed):
            return super().call_module(target, args, kwargs)
        # Every timed layer is called by exactly one node, so that its name can key its state.
        out, self.states[target] = layer.scan(args[0], self.states.get(target), self.steps)
        if self.counted and isinstance(layer, Neuron):
            self.fired[target] = _counts(layer, out, self.steps)
        return out


def _step_by_step(snn: SpikingNetwork, images: Tensor, exit: Exit | None = None, at_once: int = 1) -> Run:
    """One step at a time; with an exit up to `at_once` of them, as long as no sample may stop."""
    running, states, constants = torch.arange(len(images), device=images.device), dict[str, Any](), _constants(snn, images)
    stopped = torch.full_like(running, snn.steps)
    readouts, spikes, totals, step = list[Outputs](), dict[str, Tensor](), None, 0
    while step < snn.steps:
        count = 1 if exit is None else min(exit.until(step) - step, at_once)
        part = _Part(snn, states, count, counted=True)
        # Its own from now on: potentials of the last step are let go layer by layer.
        states = part.states
        outputs = each(partial(unfold, steps=count), part.run(images, initial_env=dict(constants)))
        for site, fired in part.fired.items():
            spikes[site] = fired if step == 0 else spikes[site].index_add_(0, running, fired)
        for i in range(count):
            step += 1
            out = each(itemgetter(i), outputs)
            totals = each(lambda one, *total: _added(one[None], *total), out, *([] if totals is None else [totals]))
            mean = each(partial(_mean, steps=step), totals, out)
            whole = len(running) == len(stopped)
            readouts.append(mean if whole else each(partial(_put, running), readouts[-1], mean))
        if exit is None or step == snn.steps:
            continue
        decided = exit.decided(first(mean), step)
        if not bool(decided.any()):
            continue
        stopped[running[decided]] = step
        going = (~decided).nonzero().flatten()
        if not len(going):
            readouts += [readouts[-1]] * (snn.steps - step)
            break
        running, images, totals = running[going], images[going], each(itemgetter(going), totals)
        states = _some(states, going)
        # Sizes are among the constants, so these are computed anew.
        constants.clear()
        constants = _constants(snn, images)
    return Run(each(lambda *steps: torch.stack(steps), *readouts), spikes, None if exit is None else stopped)


def _put(samples: Tensor, into: Tensor, values: Tensor) -> Tensor:
    return into.index_copy(0, samples, values)


def _constants(snn: SpikingNetwork, images: Tensor) -> dict[fx.Node, Any]:
    """Values that are the same at every step, by node; None where no timed layer reads them."""
    timed = set[fx.Node]()
    for node in snn.network.graph.nodes:
        layer = snn.network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, Timed) or any(parent in timed for parent in node.all_input_nodes):
            timed.add(node)
    found = dict[fx.Node, Any]()
    recorder = fx.Interpreter(snn.network)
    recorder.args_iter = iter([images])
    for node in snn.network.graph.nodes:
        if node in timed:
            continue
        recorder.env[node] = recorder.run_node(node)
        found[node] = recorder.env[node] if any(user in timed for user in node.users) else None
        for done in recorder.user_to_last_uses.get(node, ()):
            del recorder.env[done]
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
