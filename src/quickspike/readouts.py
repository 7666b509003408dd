"""How an answer comes from the outputs of the steps: as their mean so far, or as one in which some steps count more than others.

A readout that leaks forgets: late steps, which spikes through all layers have reached, count more than the first ones. The answer after
t steps is the mean of the outputs so far, that of step s weighted by leak^(t-s): the potential of a leaky integrator without
threshold, in units of what a constant input of 1 brings it to.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from quickspike.capture import free_name
from quickspike.errors import ConversionError
from quickspike.neuron import Timed, single, unfold
from quickspike.structure import places


def readout(outputs: Tensor) -> Tensor:
    """Logits after each step: mean of the outputs so far. `[T, B, K]` to `[T, B, K]`."""
    # In half precision sums would leave its range, and counts above 256 have no place in bfloat16.
    sums = single(outputs).cumsum(0)
    counts = torch.arange(1, len(outputs) + 1, device=outputs.device, dtype=sums.dtype)
    return (sums / counts.view(-1, *(1,) * (outputs.ndim - 1))).to(outputs.dtype)


class WeightedMean(Timed):
    """The network's outputs `[T*B, ...]` such that the plain mean of those so far is a mean with weights."""

    @abc.abstractmethod
    def kept(self, step: int) -> float:
        """Share of the weights of all steps before that is left at `step`, 1 the first."""

    def scan(self, x: Tensor, state: Any, steps: int) -> tuple[Tensor, Any]:
        done, weight, total, before = state or (0, 0.0, 0.0, 0.0)
        outputs = []
        for step, value in enumerate(single(unfold(x, steps)), done + 1):
            kept = self.kept(step)
            # Not a product with 0, which infinite values would survive.
            weight, total = (kept * weight + 1, kept * total + value) if kept else (1.0, value)
            now = total * (step / weight)
            outputs.append(now - before)
            before = now
        return torch.cat(outputs).to(x), (done + steps, weight, total, before)


class AfterRehearsal(WeightedMean):
    """The mean of the outputs after a first run, which count for nothing; until it is over, of all so far.

    Args:
        steps: T.
        rehearsal: steps of the first run.

    Raises:
        ConversionError: rehearsal is no whole number of 1 or more.
    """

    def __init__(self, steps: int, rehearsal: int) -> None:
        super().__init__()
        if type(rehearsal) is not int or rehearsal < 1:
            raise ConversionError(f"a first run has 1 step or more, got {rehearsal!r}")
        self.steps, self.rehearsal = steps, rehearsal

    def kept(self, step: int) -> float:
        return 0.0 if step == self.rehearsal + 1 else 1.0

    def extra_repr(self) -> str:
        return f"after {self.rehearsal} of {self.steps} steps"


class LeakyReadout(WeightedMean):
    """The mean in which old outputs fade.

    Args:
        steps: T.
        leak: what is left of the weight of an output at the next step, 0 < leak < 1.

    Raises:
        ConversionError: leak is something else.
    """

    def __init__(self, steps: int, leak: float) -> None:
        super().__init__()
        if type(leak) is not float or not 0 < leak < 1:
            raise ConversionError(f"the leak of a readout lies between 0 and 1, got {leak!r}"[:300])
        self.steps, self.leak = steps, leak

    def kept(self, step: int) -> float:
        return self.leak

    def extra_repr(self) -> str:
        return f"leak={self.leak:g}, steps={self.steps}"


def answers(outputs: Tensor, leak: float | None) -> Tensor:
    """The answer after every step from the outputs of single ones, both `[T, B, ...]`; None where all steps count alike."""
    if leak is not None:
        outputs = unfold(LeakyReadout(len(outputs), leak)(outputs.flatten(0, 1)), len(outputs))
    return readout(outputs)


def fading(leak: float, steps: int) -> Tensor:
    """The weights of T outputs in the answer after the last, `[T]`, in double precision; their sum is 1."""
    weights = torch.tensor([leak ** (steps - 1 - step) for step in range(steps)], dtype=torch.float64)
    return weights / weights.sum()


def leak_of(network: fx.GraphModule) -> float | None:
    """The leak of a network's readout; None where all steps count alike."""
    return next((layer.leak for layer in network.modules() if isinstance(layer, LeakyReadout)), None)


def read_through(network: fx.GraphModule, name: str, make: Callable[[], WeightedMean]) -> None:
    """Put a readout behind every output of a network, in place."""
    (output,) = [node for node in network.graph.nodes if node.op == "output"]
    # What is returned in two places is one node.
    for node in dict.fromkeys(places(output.args[0]).values()):
        own = free_name(network, name)
        network.add_submodule(own, make())
        with network.graph.inserting_before(output):
            made = network.graph.call_module(own, (node,))
        output.replace_input_with(node, made)
    network.graph.lint()
    network.recompile()
