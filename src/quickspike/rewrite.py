"""Rewritings of a canonical graph.

Batch norm folded and max-pooling moved in front of the activation are exact; sums of ReLUs take the place of other
activations.
"""

from __future__ import annotations

from operator import add, mul, neg
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from quickspike.capture import Sizes
from quickspike.classify import BATCH_NORMS, LINES, activate
from quickspike.operators import DROPOUT_LAYERS, MAX_POOLS, Affine
from quickspike.piecewise import Piecewise

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _layer(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def fold_batch_norm(module: fx.GraphModule, sizes: Sizes) -> None:
    """Merge each batch norm into the layer before it; where there is none, it becomes an affine map.

    Time is folded into the batch later, so a batch norm that still took batch statistics would mix time steps.
    """
    calls: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in list(module.graph.nodes):
        norm = _layer(module, node)
        if not isinstance(norm, BATCH_NORMS):
            continue
        before = node.args[0]
        fused = _fused(module, before, norm, sizes) if calls.get(str(before.target)) == 1 == calls[str(node.target)] else None
        if fused is None or len(before.users) > 1:
            module.set_submodule(str(node.target), _affine(norm))
            continue
        module.set_submodule(str(before.target), fused)
        node.replace_all_uses_with(before)
        module.graph.erase_node(node)
    module.recompile()


def _fused(module: fx.GraphModule, before: fx.Node, norm: Any, sizes: Sizes) -> nn.Module | None:
    layer: Any = _layer(module, before)
    if type(layer) in _CONVOLUTIONS or (type(layer) in _TRANSPOSED and layer.groups == 1):
        return cast(nn.Module, fuse_conv_bn_eval(layer, norm, transpose=type(layer) in _TRANSPOSED))
    if type(layer) is nn.Linear and len(sizes.shapes[before.name]) == 2:
        return cast(nn.Module, fuse_linear_bn_eval(layer, _with_scale(norm)))
    return None


def _with_scale(norm: Any) -> Any:
    """A batch norm without gamma and beta as one that has them: fuse_linear_bn_eval knows no other."""
    if norm.affine:
        return norm
    full = type(norm)(norm.num_features, norm.eps).to(norm.running_mean).eval().requires_grad_(False)
    full.running_mean, full.running_var = norm.running_mean, norm.running_var
    return full


def _affine(norm: Any) -> Affine:
    """The map gamma (x - mean) / sqrt(var + eps) + beta as one multiplication and one addition."""
    mean, var = norm.running_mean, norm.running_var
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias
    affine = Affine(mean.numel()).to(mean)
    with torch.no_grad():
        affine.weight.copy_(gamma * torch.rsqrt(var + norm.eps))
        affine.bias.copy_(beta - mean * affine.weight)
    return affine.requires_grad_(False)


def remove_dropout(module: fx.GraphModule) -> None:
    """Take the dropout layers out, which do nothing once training is over."""
    for node in list(module.graph.nodes):
        if isinstance(_layer(module, node), DROPOUT_LAYERS):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.recompile()


def move_max_pools(module: fx.GraphModule) -> None:
    """maxpool(relu(z)) becomes relu(maxpool(z)), through concatenation too.

    Exact because max commutes with every non-decreasing function. An activation that others read as well keeps its
    place and gets a twin behind the pool. A pool whose input is no activation stays where it is.
    """
    for node in list(module.graph.nodes):
        if type(_layer(module, node)) in MAX_POOLS:
            moved = _pulled(module, node, node.args[0])
            if moved is not None:
                node.replace_all_uses_with(moved)
                module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _pulled(module: fx.GraphModule, pool: fx.Node, signal: Any) -> fx.Node | None:
    """pool(signal) with the pool in front of the activations that `signal` consists of; None if there are none."""
    graph = module.graph
    if signal.target is activate:
        with graph.inserting_before(pool):
            pooled = graph.call_module(str(pool.target), (signal.args[0],))
            moved = graph.call_function(activate, (pooled,))
        moved.meta.update(signal.meta)
        return moved
    if signal.target is torch.cat and _axis(signal) in (1, -_dimensions(module, pool) - 1):
        parts = [_pulled(module, pool, part) for part in signal.args[0]]
        if all(part is None for part in parts):
            return None
        with graph.inserting_before(pool):
            pairs = zip(parts, signal.args[0], strict=True)
            pooled_parts = [part if part is not None else graph.call_module(str(pool.target), (old,)) for part, old in pairs]
            return graph.call_function(torch.cat, (pooled_parts, 1))
    return None


def _dimensions(module: fx.GraphModule, pool: fx.Node) -> int:
    """2 for MaxPool2d, whose channels are axis -3."""
    return int(type(_layer(module, pool)).__name__[-2])


def _axis(cat: fx.Node) -> object:
    return cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", cat.kwargs.get("axis", 0))


def put_lines(module: fx.GraphModule) -> bool:
    """Replace every activation that is a sum of pieces by that sum, a placeholder call for each; True if there was one."""
    found = [node for node in module.graph.nodes if LINES in node.meta]
    for node in found:
        lines: Piecewise = node.meta[LINES]
        with module.graph.inserting_before(node):
            total = _sum_of(module.graph, node, lines)
        node.replace_all_uses_with(total)
        module.graph.erase_node(node)
    module.recompile()
    return bool(found)


def _sum_of(graph: fx.Graph, node: fx.Node, lines: Piecewise) -> fx.Node:
    kept = {key: value for key, value in node.meta.items() if key in ("stack_trace", "nn_module_stack", "module_name")}
    signs: dict[int, Any] = {1: node.args[0]}
    total: Any = None
    for piece in lines.pieces:
        if piece.sign not in signs:
            signs[-1] = graph.call_function(neg, (node.args[0],))
        x, shift = signs[piece.sign], -piece.sign * piece.start
        if shift:
            x = graph.call_function(add, (x, shift))
        part = graph.call_function(activate, (x,))
        part.meta.update(kept, function=lines.name, ceiling=piece.ceiling)
        if piece.weight != 1:
            part = graph.call_function(mul, (part, piece.weight))
        total = part if total is None else graph.call_function(add, (total, part))
    return graph.call_function(add, (total, lines.constant)) if lines.constant else cast(fx.Node, total)
