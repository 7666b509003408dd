"""A constant current per channel, added in front of some neurons: in the bias of the layer that drives them where that is all it does."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from quickspike.capture import free_name
from quickspike.neuron import AccumulatedMaxPool, Repeat
from quickspike.operators import MAX_POOLS, Affine
from quickspike.readouts import LeakyReadout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PASSING = (AccumulatedMaxPool, LeakyReadout, Repeat, *MAX_POOLS)
"""Layers that give more by a constant where they get more by it."""


def add_current(module: fx.GraphModule, node: fx.Node, user: fx.Node, current: Tensor, axes: int) -> None:
    """Let `user` read from `node` a signal that is larger by `current`.

    Args:
        module: changed in place; the caller recompiles it.
        node: gives `[B, C, ...]`.
        user: one of its users; the others go on reading what they did.
        current: `[C]`.
        axes: of the signal without the batch.
    """
    layer = _driver(module, node, user, len(current), axes)
    if layer is None:
        like = next(module.parameters())
        affine = Affine(len(current)).to(like.device, like.dtype)
        affine.bias.data.copy_(current)
        name = free_name(module, "current")
        module.add_submodule(name, affine)
        with module.graph.inserting_after(node):
            added = module.graph.call_module(name, (node,))
        user.replace_input_with(node, added)
    else:
        before = 0.0 if layer.bias is None else layer.bias.detach().double()
        # A parameter of its own: another layer may share this one's.
        layer.bias = nn.Parameter((before + current.double()).to(layer.weight.dtype))


def _driver(module: fx.GraphModule, node: fx.Node, user: fx.Node, channels: int, axes: int) -> Any:
    """The layer whose bias reaches `user` and nothing else; None if there is none."""
    if set(node.users) != {user}:
        return None
    if node.op == "call_function" and node.target is operator.add:
        terms = [term for term in node.args if isinstance(term, fx.Node)]
        if len(set(terms)) < len(terms):
            return None  # it would count twice
        found = [_driver(module, term, node, channels, axes) for term in terms] if not node.kwargs else []
        return next((layer for layer in found if layer is not None), None)
    if node.op != "call_module" or sum(other.op == "call_module" and other.target == node.target for other in module.graph.nodes) > 1:
        return None
    layer: Any = module.get_submodule(str(node.target))
    if type(layer) in PASSING:
        return _driver(module, node.all_input_nodes[0], node, channels, axes)
    if type(layer) in CONVOLUTIONS:
        return layer if layer.out_channels == channels and axes == len(layer.kernel_size) + 1 else None
    if type(layer) is nn.Linear:
        return layer if layer.out_features == channels and axes == 1 else None
    return layer if type(layer) is Affine and layer.channels == channels else None
