"""One pass for all steps: neurons that wait for the whole window of the layer before need only the sum of its spikes.

Every signal becomes its sum over the T steps: layers add T times their bias, neurons integrate a T-th of what they get
and pass on how often they fired. The work does not depend on T. With whole-number weights the sums are exact, so counts
are those of the step-by-step simulation. Weighted spikes are as many as the levels that they stand for.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quickspike.conversion import SpikingNetwork
from quickspike.errors import OptionError
from quickspike.neuron import AccumulatedMaxPool, Increment, Neuron, Repeat, RunningMean

MOST = 255
"""Largest number of steps, or levels of weighted spikes: counts are bytes."""


class Scaled(nn.Module):
    """Every value times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


def sum_over_steps(snn: SpikingNetwork) -> None:
    """Let `snn`, in place, compute sums over the steps instead of steps.

    Raises:
        OptionError: a layer does not wait for the whole window of the one before, or it has more than 255 levels,
            or the readout leaks.
    """
    snn.refuse_leak("the count engine")
    steps = snn.resolution
    if steps > MOST:
        kind = "spikes weighted" if snn.weighted else f"groups of {snn.members}"
        what = str(steps) if steps == snn.steps else f"{kind} over {snn.steps} steps, which are {steps} levels"
        raise OptionError(f"the count engine takes at most {MOST} steps, got {what}")
    streaming = [name for name, neuron in snn.neurons().items() if not (neuron.averaged or neuron.constant_input)]
    if streaming:
        raise OptionError(
            f"the count engine is for networks whose layers wait for whole windows, but {streaming[0]} streams; "
            "convert with synchronous=True, or take as_synchronous()"
        )
    scaled = [name for name, neuron in snn.neurons().items() if neuron.scaled or not bool((neuron.amplitude == 1).all())]
    if scaled:
        raise OptionError(f"the count engine needs spikes of height 1, but those of {scaled[0]} have another; quantise the network first")
    module, timed, seen = snn.network, set[fx.Node](), set[str]()
    for node in list(module.graph.nodes):
        layer: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, Neuron):
            layer.counts = True
        elif isinstance(layer, Repeat):
            module.set_submodule(str(node.target), Scaled(steps))
        elif not any(parent in timed for parent in node.all_input_nodes):
            continue
        elif node.op == "output":
            _divide(module, node, steps)
        elif isinstance(layer, (RunningMean, Increment)):
            raise OptionError(f"the count engine adds up whole spikes, but {node.name} is in front of real values")
        elif isinstance(layer, AccumulatedMaxPool):
            module.set_submodule(str(node.target), layer.pool)
        elif getattr(layer, "bias", None) is not None and str(node.target) not in seen:
            with torch.no_grad():
                layer.bias.mul_(steps)
        elif _adds_a_constant(node, layer):
            raise OptionError(f"the count engine cannot add a constant at every step ({node.format_node()})")
        timed.add(node)
        seen.add(str(node.target))
    snn.summed = True
    module.graph.lint()
    module.recompile()


def _adds_a_constant(node: fx.Node, layer: Any) -> bool:
    if layer is not None:
        return bool(getattr(layer, "value", 0))
    if node.target in (operator.mul, operator.truediv, operator.getitem):
        return False
    static = any(parent.op == "get_attr" for parent in node.all_input_nodes)
    number = node.target in (operator.add, operator.sub) and any(isinstance(value, (int, float)) for value in node.args)
    padding = node.target is F.pad and bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("value", 0))
    return static or number or padding


def _divide(module: fx.GraphModule, output: fx.Node, steps: int) -> None:
    module.add_submodule("mean_over_steps", Scaled(1 / steps))
    for result in output.all_input_nodes:
        with module.graph.inserting_before(output):
            output.replace_input_with(result, module.graph.call_module("mean_over_steps", (result,)))
