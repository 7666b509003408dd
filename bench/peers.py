"""The same network in other simulators, for `engines.py` and `tuning_step.py`; whoever is not installed is left out.

SpikingJelly and sinabs convert the source network themselves. snnTorch has no converter: its neurons take the places of
the ReLUs, thresholds 1. All get direct input at every step, fire by threshold and are reset by subtraction, as ours
do; only time is compared here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Peer:
    """A network in another simulator."""

    network: nn.Module
    run: Callable[[Tensor], Tensor]
    """Images `[B, C, H, W]` to the sum of the logits over the steps, `[B, K]`; starts from rest."""


def peers(source: nn.Module, steps: int, images: Tensor) -> tuple[dict[str, Peer], dict[str, str]]:
    """(`source` in each peer, for `steps`; why the others are missing).

    Args:
        source: ReLUs as modules, in evaluation mode; not modified.
        steps: number of steps.
        images: a few, for calibration.
    """
    found, missing = dict[str, Peer](), dict[str, str]()
    for name, make in MAKERS.items():
        try:
            found[name] = make(with_modules(source), steps, images)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    return found, missing


def with_modules(source: nn.Module) -> fx.GraphModule:
    """A copy whose flattening is a module of its own for every call, as the peers need it."""
    network = fx.symbolic_trace(copy.deepcopy(source))
    for index, node in enumerate(list(network.graph.nodes)):
        if node.op == "call_function" and node.target is torch.flatten:
            name = f"flatten_{index}"
            network.add_submodule(name, nn.Flatten(*node.args[1:], **node.kwargs))
            with network.graph.inserting_before(node):
                node.replace_all_uses_with(network.graph.call_module(name, (node.args[0],)))
            network.graph.erase_node(node)
    network.recompile()
    return network.eval()


def spikingjelly_stepwise(source: fx.GraphModule, steps: int, images: Tensor) -> Peer:
    """SpikingJelly's converted network, one step after the other."""
    from spikingjelly.activation_based import functional

    converted = _spikingjelly(source, images)

    def run(x: Tensor) -> Tensor:
        functional.reset_net(converted)
        total: Tensor = sum(converted(x) for _ in range(steps))
        return total

    return Peer(converted, run)


def spikingjelly_layerwise(source: fx.GraphModule, steps: int, images: Tensor) -> Peer:
    """The same in its multi-step mode: each layer computes all steps at once."""
    from spikingjelly.activation_based import base, functional, layer

    converted = _spikingjelly(source, images)
    for name, module in list(converted.named_modules()):
        if name and not list(module.children()) and not isinstance(module, base.StepModule):
            converted.set_submodule(name, layer.SeqToANNContainer(module))
    functional.set_step_mode(converted, "m")

    def run(x: Tensor) -> Tensor:
        functional.reset_net(converted)
        result: Tensor = converted(x.expand(steps, *x.shape)).sum(0)
        return result

    return Peer(converted, run)


def _spikingjelly(source: fx.GraphModule, images: Tensor) -> Any:
    from spikingjelly.activation_based import ann2snn
    from spikingjelly.activation_based.ann2snn.recipes.rate_coding import RateCodingRecipe

    loader = [(images, torch.zeros(len(images), dtype=torch.long))]
    converted = ann2snn.FXConverter(RateCodingRecipe(dataloader=loader, mode="max")).convert(source)
    return converted.to(memory_format=torch.channels_last).eval()


def sinabs(source: fx.GraphModule, steps: int, images: Tensor) -> Peer:
    """The ReLUs replaced by sinabs' own function; time folded into the batch."""
    from sinabs.activation import SingleSpike
    from sinabs.from_torch import from_model

    network = from_model(source, num_timesteps=steps, spike_fn=SingleSpike).spiking_model
    network.to(memory_format=torch.channels_last).eval()

    def run(x: Tensor) -> Tensor:
        for module in network.modules():
            if hasattr(module, "reset_states"):
                module.reset_states()
        result: Tensor = network(x.repeat_interleave(steps, 0)).unflatten(0, (len(x), steps)).sum(1)
        return result

    return Peer(network, run)


def snntorch(source: fx.GraphModule, steps: int, images: Tensor) -> Peer:
    """A neuron of snnTorch in place of every ReLU, one step after the other."""
    import snntorch as snn

    neurons = []
    for name, module in list(source.named_modules()):
        if isinstance(module, nn.ReLU):
            neurons.append(snn.Leaky(beta=1.0, init_hidden=True, reset_mechanism="subtract"))
            source.set_submodule(name, neurons[-1])
    source.to(memory_format=torch.channels_last).eval()

    def run(x: Tensor) -> Tensor:
        for neuron in neurons:
            neuron.reset_mem()
        total: Tensor = sum(source(x) for _ in range(steps))
        return total

    return Peer(source, run)


MAKERS: dict[str, Callable[[fx.GraphModule, int, Tensor], Peer]] = {
    "SpikingJelly": spikingjelly_stepwise,
    "SpikingJelly multi-step": spikingjelly_layerwise,
    "sinabs": sinabs,
    "snnTorch": snntorch,
}
