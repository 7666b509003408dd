"""A readout that forgets: late steps, which spikes through all layers have reached, count more than the first ones.

The answer after t steps is the mean of the outputs so far, that of step s weighted by leak^(t-s): the potential of a leaky
integrator without threshold, in units of what a constant input of 1 brings it to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from quickspike.capture import free_name
from quickspike.errors import ConversionError
from quickspike.neuron import Timed, single, unfold
from quickspike.structure import places


class LeakyReadout(Timed):
    """The network's outputs `[T*B, ...]` such that the plain mean of those so far is the mean in which old ones fade.

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

    def scan(self, x: Tensor, state: Any, steps: int) -> tuple[Tensor, Any]:
        done, weight, total, before = state or (0, 0.0, 0.0, 0.0)
        outputs = []
        for step, value in enumerate(single(unfold(x, steps)), done + 1):
            weight, total = self.leak * weight + 1, self.leak * total + value
            now = total * (step / weight)
            outputs.append(now - before)
            before = now
        return torch.cat(outputs).to(x), (done + steps, weight, total, before)

    def extra_repr(self) -> str:
        return f"leak={self.leak:g}, steps={self.steps}"


def answers(outputs: Tensor, leak: float | None) -> Tensor:
    """The answer after every step from the outputs of single ones, both `[T, B, ...]`; None where all steps count alike."""
    if leak is not None:
        outputs = unfold(LeakyReadout(len(outputs), leak)(outputs.flatten(0, 1)), len(outputs))
    counts = torch.arange(1, len(outputs) + 1, device=outputs.device, dtype=outputs.dtype)
    return outputs.cumsum(0) / counts.view(-1, *(1,) * (outputs.ndim - 1))


def fading(leak: float, steps: int) -> Tensor:
    """The weights of T outputs in the answer after the last, `[T]`, in double precision; their sum is 1."""
    weights = torch.tensor([leak ** (steps - 1 - step) for step in range(steps)], dtype=torch.float64)
    return weights / weights.sum()


def leak_of(network: fx.GraphModule) -> float | None:
    """The leak of a network's readout; None where all steps count alike."""
    return next((layer.leak for layer in network.modules() if isinstance(layer, LeakyReadout)), None)


def let_fade(network: fx.GraphModule, steps: int, leak: float) -> None:
    """Let the readout of a network forget, in place."""
    (output,) = [node for node in network.graph.nodes if node.op == "output"]
    # What is returned in two places is one node.
    for node in dict.fromkeys(places(output.args[0]).values()):
        name = free_name(network, "leaky_readout")
        network.add_submodule(name, LeakyReadout(steps, leak))
        with network.graph.inserting_before(output):
            made = network.graph.call_module(name, (node,))
        output.replace_input_with(node, made)
    network.graph.lint()
    network.recompile()
