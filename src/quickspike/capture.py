"""From a user's module to a plain torch.fx graph: copied, captured, free of in-place operations, sizes known.

Nothing here knows about spikes; `graph.py` decides what each node becomes.
"""

from __future__ import annotations

import copy
import inspect
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quickspike.errors import DataError, TraceError
from quickspike.exported import Ranges, record_exported
from quickspike.operators import SPELLINGS
from quickspike.structure import Outputs, apart, places

_OWN = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<where>\S+)\n\s*(?P<text>[^\n]*)')


@dataclass(frozen=True)
class Captured:
    """A private copy of the network in evaluation mode, its graph, and what its output must be."""

    module: fx.GraphModule
    source: nn.Module
    example: Tensor
    expected: Outputs
    name: str
    sizes: Sizes
    ranges: Ranges = ()
    """Sizes of the axes behind the channels that the graph holds for; empty for all."""


def capture(model: nn.Module, example: Tensor, *, copied: bool = False) -> Captured:
    """Copy `model` and record its forward pass as a graph without in-place operations.

    Args:
        model: the source network; it is not modified, its training mode included.
        example: one batch of inputs `[B, ...]` of the network's own kind.
        copied: `model` is a copy by `copy_of` already, which can be kept; large networks do not fit too often.

    Raises:
        DataError: the example is not a finite floating-point batch, or the network cannot run on it.
        TraceError: the forward pass depends on the data or cannot be recorded.
    """
    check_batch(example, "the example")
    model = _unwrapped(model)
    name = type(model).__name__
    private = model if copied else copy_of(model)
    parameter = next(private.parameters(), None)
    _refuse_names(private, name)
    _refuse_inputs(private, name)
    example = example.detach()[:1].to(device=None if parameter is None else parameter.device)
    # A network may change its input in place; the caller's images must survive that.
    expected = _run_source(private, example.clone(), name)
    module, ranges = _recorded(private, example, name)
    _open_records(module.graph)
    _open_attention(module)
    _positional(module.graph)
    _make_functional(module)
    _drop_asserts(module)
    _fold_constants(module)
    _name_batch_norms(module)
    ranges = _proven(module, private, example, ranges)
    sizes = measure(module, example)
    if ranges and all(low == high for low, high in ranges):
        ranges = _fixed(example)
    if _settle(module, sizes, ranges == _fixed(example)):
        ranges = _fixed(example)
    return Captured(module, private, example, expected, name, sizes, ranges)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile's or a data-parallel wrapper."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    inside = getattr(model, "_orig_mod", None)
    return _unwrapped(inside) if isinstance(inside, nn.Module) else model


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode, its parameters without gradients.

    Raises:
        TraceError: the module cannot be copied.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("a TorchScript module cannot be recorded. Way out: give the module that it was made from")
    try:
        private = copy.deepcopy(model)
    except Exception as error:
        raise TraceError(f"{type(model).__name__} cannot be copied: {error}. Way out: make it deep-copyable") from error
    for path, module in private.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            where = f"layer {path!r}" if path else "the network"
            raise TraceError(
                f"{where} carries a forward hook, which a converted network cannot keep. Way out: handle.remove(), prune.remove(...)"
            )
    return private.eval().requires_grad_(False)


def _refuse_names(private: nn.Module, name: str) -> None:
    for child in (*private._modules, *private._parameters, *private._buffers):
        if child == "meta" or (hasattr(fx.GraphModule, child) and not hasattr(nn.Module, child)):
            raise TraceError(f"{name} has an attribute {child!r}, a name that torch.fx needs itself. Way out: rename it")


def _refuse_inputs(private: nn.Module, name: str) -> None:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(private.forward).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.kind in kinds and parameter.default is parameter.empty]
    if len(needed) > 1:
        raise TraceError(
            f"{name} takes {len(needed)} inputs ({', '.join(needed)}). "
            "Way out: quickspike.OneInput(model, shapes), which takes them in one tensor"
        )


class _Tracer(fx.Tracer):
    """Sees through layers that are no submodules: made inside forward(), or kept in a plain list."""

    record_stack_traces = True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            self.path_of_module(m)
        except NameError:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


COLOURS = 4
"""Channels that a picture has at most."""


def check_batch(images: Any, what: str) -> None:
    """Raise DataError unless `images` is a non-empty, finite floating-point tensor `[B, ...]`."""
    if not isinstance(images, Tensor):
        raise DataError(f"{what} must be a tensor [B, ...], got {type(images).__name__}")
    if images.ndim < 2 or images.numel() == 0:
        raise DataError(f"{what} must hold at least one sample, shape [B, ...]; got shape {list(images.shape)}")
    if not images.is_floating_point():
        raise DataError(f"{what} must be floating point, got {images.dtype}; scale and normalise it as in training")
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).sum())
        raise DataError(f"{what} holds {bad} value(s) that are NaN or infinite; clean the data first")


def axes_hint(images: Tensor, wanted: Sequence[int]) -> str:
    """A word where images `[B, H, W, C]` are given to a network for `[B, C, H, W]`; "" elsewhere.

    Args:
        images: that do not fit.
        wanted: the shape of one sample; of what is only known to be wrong, ().
    """
    shape = tuple(images.shape[1:])
    turned = len(shape) == 3 and shape[2] < min(shape[:2]) and shape[2] <= COLOURS
    if turned and (not wanted or (len(wanted) == 3 and shape[2] == wanted[0])):
        return "; are these [B, H, W, C]? Then give images.permute(0, 3, 1, 2)"
    return ""


def _run_source(private: nn.Module, example: Tensor, name: str) -> Outputs:
    try:
        with torch.no_grad():
            expected = private(example)
    except Exception as error:
        shape = list(example.shape)
        raise DataError(f"{name} cannot run on an input of shape {shape}: {_first_line(error)}{axes_hint(example, ())}") from error
    found = places(expected)
    way_out = "wrap it so that it returns tensors [B, ...], alone or in tuples, lists and dicts"
    for place, one in found.items():
        if not isinstance(one, Tensor) or not one.is_floating_point():
            what = f"a tensor of {one.dtype}" if isinstance(one, Tensor) else f"a {type(one).__name__}"
            raise TraceError(f"{name} returns {what}{f' at {place}' if place else ''}. Way out: {way_out}")
    if not found:
        raise TraceError(f"{name} returns nothing. Way out: {way_out}")
    return expected


def _recorded(private: nn.Module, example: Tensor, name: str) -> tuple[fx.GraphModule, Ranges]:
    """By torch.fx, which keeps the network's own layers; by torch.export where that cannot follow."""
    try:
        return fx.GraphModule(private, _record(private, name), name), ()
    except TraceError as error:
        if " inputs. Way out" in str(error):
            raise
        try:
            exported = record_exported(private, example, name)
            return exported.module, exported.ranges
        except Exception as second:
            reason, _, way_out = str(error).partition(". Way out: ")
            also = f"{reason}; nor by torch.export: {_first_line(second)}"
            raise TraceError(f"{also}. Way out: {way_out}") from second


def calls_in(model: nn.Module) -> list[fx.Node]:
    """All calls of layers, functions and methods in the forward pass of a copy of `model`, by torch.fx.

    Raises:
        TraceError: it cannot be recorded.
    """
    model = _unwrapped(model)
    return [node for node in _record(copy_of(model), type(model).__name__).nodes if node.op.startswith("call_")]


def _record(private: nn.Module, name: str) -> fx.Graph:
    tracer = _Tracer()
    try:
        graph = tracer.trace(private, concrete_args=_defaults(private) or None)
    except Exception as error:
        where, reason = _raising_line(error), _first_line(error)
        way_out = "no if, loop or int() on tensors or their sizes, no assignment into slices, and every layer an attribute of its module"
        if isinstance(error, TypeError) and "must be tuple of ints" in reason:
            way_out = (
                "call the method of the tensor (x.reshape) instead of the torch function, or give fixed sizes; newer torch can record this"
            )
        raise TraceError(f"the forward pass of {name} cannot be recorded{where}: {reason}. Way out: {way_out}") from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    _drop_default_checks(graph, inputs[1:])
    for extra in inputs[1:]:
        if extra.users:
            raise TraceError(
                f"{name} takes {len(inputs)} inputs. Way out: quickspike.OneInput(model, shapes), which takes them in one tensor"
            )
        graph.erase_node(extra)
    return graph


def _defaults(private: nn.Module) -> dict[str, Any]:
    """Every argument of forward() after the first that has a default keeps it."""
    parameters = list(inspect.signature(private.forward).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _drop_default_checks(graph: fx.Graph, extras: list[fx.Node]) -> None:
    """torch.fx asserts that an argument still has the default it was recorded with."""
    for node in reversed(graph.nodes):
        if node.target is torch._assert or getattr(node.target, "__name__", "") == "_assert_is_none":
            graph.erase_node(node)
    for extra in extras:
        for check in [user for user in extra.users if user.target is operator.eq and not user.users]:
            graph.erase_node(check)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _raising_line(error: BaseException) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(_OWN) and not file.startswith("<"):
            place = f" ({_short(file)}:{trace.tb_lineno} in {trace.tb_frame.f_code.co_name})"
        trace = trace.tb_next
    return place


def _short(file: str) -> str:
    return file.rpartition("site-packages/")[2]


def source_of(node: fx.Node) -> str:
    """The line of the user's code that made this node, as `file.py:12 in forward: text`; "" if unknown."""
    frames = [match for match in _FRAME.finditer(node.stack_trace or "") if not match["file"].startswith(_OWN)]
    if not frames:
        return ""
    frame = frames[-1]
    return f"{_short(frame['file'])}:{frame['line']} in {frame['where']}: {frame['text'].strip()}"


def scope_of(node: fx.Node) -> str:
    """The qualified name of the module whose forward made this node ("" for the network itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path)


def scopes_of(node: fx.Node) -> list[tuple[str, str]]:
    """(qualified name, class name) of every module whose forward this node was made in, the network itself left out."""
    stack = node.meta.get("nn_module_stack") or {}
    # torch.fx keeps classes, torch.export their names.
    return [(str(path), getattr(kind, "__name__", str(kind).rpartition(".")[2])) for path, kind in stack.values() if path]


# In-place operations: `y.relu_()` changes y for everything that reads it later, so those readers are redirected.


_AUGMENTED = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow, operator.imod)


def _open_records(graph: fx.Graph) -> None:
    """What forward() returns as a named tuple or a record of another kind becomes a plain tuple or dict."""
    output = next(node for node in graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        if node.op != "call_function" or not isinstance(node.target, type) or set(node.users) != {output}:
            continue
        fields = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        plain = tuple(fields.values()) if issubclass(node.target, tuple) else {name: one for name, one in fields.items() if one is not None}
        output.args = fx.node.map_arg(output.args, partial(_instead, node, plain))
        graph.erase_node(node)


def _instead(record: fx.Node, plain: Any, one: fx.Node) -> Any:
    return plain if one is record else one


def _open_attention(module: fx.GraphModule) -> None:
    """nn.MultiheadAttention as the functions that it consists of; its own way through them moves the batch axis."""
    layers = {path: layer for path, layer in module.named_modules() if type(layer) is nn.MultiheadAttention}
    for node in list(module.graph.nodes):
        layer: Any = layers.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or not _opens(node, layer):
            continue
        if module.get_submodule(str(node.target)) is layer:
            module.set_submodule(str(node.target), nn.Module())
        values = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
        path, width = str(node.target), layer.embed_dim
        with module.graph.inserting_before(node):
            heads = []
            for place, name in enumerate(("query", "key", "value")):
                part = slice(place * width, (place + 1) * width)
                own = layer.in_proj_weight is None
                weight = getattr(layer, f"{name[0]}_proj_weight") if own else layer.in_proj_weight[part]
                linear = _linear_of(weight, None if layer.in_proj_bias is None else layer.in_proj_bias[part])
                heads.append(_heads(module, f"{path}.{name}", linear, values[name], layer.num_heads))
            mixed = module.graph.call_function(F.scaled_dot_product_attention, tuple(heads))
            joined = module.graph.call_function(torch.flatten, (module.graph.call_method("transpose", (mixed, 1, 2)), 2))
            module.add_submodule(f"{path}.output", _linear_of(layer.out_proj.weight, layer.out_proj.bias))
            result = module.graph.call_module(f"{path}.output", (joined,))
        _inherit(module.graph, result, node)
        for user in list(node.users):
            user.replace_all_uses_with(result)
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.recompile()


def _opens(node: fx.Node, layer: Any) -> bool:
    """Whether a call of attention treats samples apart, and nothing but its answer is read."""
    more = {*node.kwargs, *(("key_padding_mask",) if len(node.args) > 3 else ())} - {"query", "key", "value", "need_weights"}
    plain = layer.batch_first and layer.bias_k is None and not layer.add_zero_attn and layer.in_proj_bias is not None
    answers = all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)
    return bool(
        plain and answers and all(node.kwargs[name] in (None, False) for name in more if name in node.kwargs) and len(node.args) < 4
    )


def _linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), False)
    return layer.eval()


def _heads(module: fx.GraphModule, name: str, linear: nn.Linear, x: fx.Node, count: int) -> fx.Node:
    """`[B, L, E]` to `[B, heads, L, E / heads]`."""
    module.add_submodule(name, linear)
    graph = module.graph
    one = graph.call_module(name, (x,))
    split = graph.call_method("unflatten", (one, 2, (count, linear.out_features // count)))
    return graph.call_method("transpose", (split, 1, 2))


def _inherit(graph: fx.Graph, last: fx.Node, source: fx.Node) -> None:
    """Give new nodes the place in the user's code of the node that they stand for."""
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node in source.all_input_nodes or node.meta:
            continue
        node.meta.update(source.meta)
        waiting.extend(node.all_input_nodes)


def _positional(graph: fx.Graph) -> None:
    """`f(input=x, other=y)` as `f(x, y)`."""
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        kwargs = dict(node.kwargs)
        first = next((name for name in ("input", "tensors") if name in kwargs), None)
        if not node.args and first:
            node.args = (kwargs.pop(first),)
        if len(node.args) == 1 and "other" in kwargs:
            node.args = (*node.args, kwargs.pop("other"))
        node.kwargs = kwargs


def _is_in_place(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.kwargs.get("inplace") is True or node.target in _AUGMENTED:
        return True
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name).endswith("_") and not str(name).startswith("_")


def _make_functional(module: fx.GraphModule) -> None:
    seen: set[fx.Node] = set()
    for node in module.graph.nodes:
        # Annotations of the source run nothing, and a file does not keep them.
        node.type = None
        seen.add(node)
        if node.op not in ("call_module", "call_function", "call_method") or not _is_in_place(node, module):
            continue
        changed = node.args[0]
        if isinstance(changed, fx.Node):
            changed.replace_all_uses_with(node, delete_user_cb=lambda user: user not in seen)


def _drop_asserts(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is torch._assert:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


# What depends on parameters alone, and batch norm spelt as a function


def _fold_constants(module: fx.GraphModule) -> None:
    """Compute once what does not depend on the input: standardised weights, tensors made in forward()."""
    dependent = set[fx.Node]()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output", "call_module") or any(parent in dependent for parent in node.all_input_nodes):
            dependent.add(node)
    runner = fx.Interpreter(module, garbage_collect_values=False)
    for node in [node for node in module.graph.nodes if node not in dependent]:
        with torch.no_grad():
            value = runner.env[node] = runner.run_node(node)
        if node.op == "get_attr" or not isinstance(value, Tensor) or not any(user in dependent for user in node.users):
            continue
        learned = any(isinstance(value, nn.Parameter) for value in _ancestors(node, runner.env))
        name = free_name(module, f"{node.name}_constant")
        if learned and value.is_floating_point():
            module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
        else:
            module.register_buffer(name, value.clone())
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    module.recompile()


def _ancestors(node: fx.Node, values: Mapping[fx.Node, Any]) -> list[Any]:
    """Values that a node's value is made of."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return [values[parent] for parent in seen]


def free_name(module: nn.Module, base: str) -> str:
    """`base`, or `base_2`, ..., so that no attribute of `module` is hidden."""
    number, name = 1, base
    while hasattr(module, name):
        number += 1
        name = f"{base}_{number}"
    return name


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _name_batch_norms(module: fx.GraphModule) -> None:
    """F.batch_norm() with running statistics of its own as the layer, which folds."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (F.batch_norm, torch.batch_norm):
            continue
        # torch.batch_norm has the weights in front of the statistics.
        order = _BATCH_NORM if node.target is F.batch_norm else (_BATCH_NORM[0], *_BATCH_NORM[3:5], *_BATCH_NORM[1:3], *_BATCH_NORM[5:])
        values: dict[str, Any] = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
        values |= dict(zip(order, node.args, strict=False)) | node.kwargs
        tensors = {name: _attribute(module, values[name]) for name in ("running_mean", "running_var", "weight", "bias")}
        if values["training"] or not isinstance(tensors["running_mean"], Tensor) or _MISSING in tensors.values():
            continue
        with module.graph.inserting_before(node):
            layer = _batch_norm_of(tensors, float(values["eps"]), values.get("momentum", 0.1))
            name = free_name(module, f"{node.name}_layer")
            module.add_submodule(name, layer)
            call = module.graph.call_module(name, (values["input"],))
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


_MISSING = object()


def _attribute(module: nn.Module, value: Any) -> Any:
    """The tensor that a node reads from the network; None for None."""
    if value is None:
        return None
    return operator.attrgetter(str(value.target))(module) if isinstance(value, fx.Node) and value.op == "get_attr" else _MISSING


def _batch_norm_of(tensors: Mapping[str, Any], eps: float, momentum: float) -> nn.Module:
    mean, variance, weight, bias = (tensors[name] for name in ("running_mean", "running_var", "weight", "bias"))
    # Any number of axes: the layer's own check is of no use here.
    layer = AnyBatchNorm(mean.numel(), eps, momentum, affine=weight is not None).to(mean).eval().requires_grad_(False)
    layer.running_mean, layer.running_var = mean, variance
    if weight is not None:
        layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
        bias = torch.zeros_like(mean) if bias is None else bias
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, False)
    return layer


class AnyBatchNorm(nn.BatchNorm2d):
    """Batch norm of `[B, C, ...]` with any number of further axes."""

    def _check_input_dim(self, input: Tensor) -> None: ...


# Other heights and widths than the example's


def _fixed(example: Tensor) -> Ranges:
    return tuple((size, size) for size in example.shape[2:])


_OTHERS = (((1, 2, 3), 1), ((2, 1, 1), 1), ((-1, -3, -2), 1), ((-3, -2, -1), 1), ((0, 0, 0), 2), ((32, 64, 32), 1))
"""What is added to the axes of the example, after their multiplication: odd and even sizes, smaller, larger, multiples."""


def _proven(module: fx.GraphModule, private: nn.Module, example: Tensor, ranges: Ranges) -> Ranges:
    """`ranges`, if the graph computes what the network computes at other sizes too; else those of the example alone.

    A network that torch.export recorded may have looked at sizes. What follows from that are bounds, or conditions (even
    sizes, multiples of 32) that sizes in the neighbourhood and far away bring to light.
    """
    if all(low == high for low, high in ranges):
        return ranges
    generator, agreed = torch.Generator().manual_seed(0), 0
    for shifts, factor in _OTHERS:
        sizes = [
            low if low == high else size * factor + shift
            for size, shift, (low, high) in zip(example.shape[2:], shifts, ranges, strict=False)
        ]
        within = (low <= size and (high is None or size <= high) for size, (low, high) in zip(sizes, ranges, strict=False))
        if len(sizes) < len(ranges) or not all(within):
            continue
        images = torch.randn((1, *example.shape[1:2], *sizes), generator=generator).to(example)
        with torch.no_grad():
            try:
                wanted = private(images.clone())
            except Exception:  # noqa: S112 - a size that the network itself refuses
                continue
            try:
                found = module(images)
            except Exception:
                return _fixed(example)
        if not apart(wanted, found) <= 1e-3:
            return _fixed(example)
        agreed += 1
    return ranges if agreed else _fixed(example)


_RANK = ("dim", "ndimension", "ndim")


def _settle(module: fx.GraphModule, sizes: Sizes, known: bool) -> bool:
    """Replace numbers by what they are for the example: all if the sizes are known, else those that no file could hold.

    Returns:
        True if one of the latter follows from heights and widths.
    """
    bound = False
    for node in module.graph.nodes:
        if node.name not in sizes.numbers or node.op == "get_attr" or not (known or not _has_place(node)):
            continue
        bound |= any(True for _ in node.users) and str(node.args[1] if node.target is getattr else node.target) not in _RANK
        node.replace_all_uses_with(sizes.numbers[node.name])
    module.graph.eliminate_dead_code()
    module.recompile()
    return bound


def _has_place(node: fx.Node) -> bool:
    """Whether a number is made of sizes by operators that a spiking network may hold."""
    if node.op == "call_method":
        return node.target == "size"
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.target in SPELLINGS and all(_has_place(parent) for parent in node.all_input_nodes if parent.op != "placeholder")


def check_sizes(images: Tensor, ranges: Sequence[Sequence[int | None]]) -> None:
    """Raise DataError if images `[B, C, ...]` have sizes that a graph was not recorded for.

    Args:
        images: any.
        ranges: smallest and largest size of every axis behind the channels, None for no bound; empty for all.
    """
    for size, (low, high) in zip(images.shape[2:], ranges, strict=False):
        if not (low or 0) <= size <= (size if high is None else high):
            wanted = " x ".join(_between(*bounds) for bounds in ranges)
            raise DataError(
                f"this network's forward pass looks at sizes, and was recorded for {wanted}; got {list(images.shape)}. "
                "Way out: convert it with images of that size"
            )


def _between(low: int | None, high: int | None) -> str:
    return str(low) if low == high else f"{low} to {high}" if high is not None else f"{low} or more"


# Which values follow the batch: the graph is run on batches of two and of three samples.

Kind = Literal["batched", "static", "number", "batch_size", "mixed", "other", "unknown"]


@dataclass(frozen=True)
class Sizes:
    """What is known of every node's value, by node name."""

    kinds: Mapping[str, Kind]
    shapes: Mapping[str, tuple[int, ...]]
    """Per tensor, with a batch of 2 on axis 0 where the kind is "batched"."""
    numbers: Mapping[str, int | float]
    """Per number that does not follow the batch."""
    failure: tuple[str, str] | None = None
    """(node name, reason) of the first node that cannot run on other batch sizes."""


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the size of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}
        """By node name: the shape of a tensor as a tuple, a number, or a list of these for a sequence."""
        self.result: Outputs = torch.empty(0)
        self.failed: tuple[str, str] | None = None
        """(node name, reason) of a node that could not run."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            self.failed = self.failed or (n.name, _first_line(error))
            raise
        self.values[n.name] = _describe(value)
        return value


def run_recorded(module: fx.GraphModule, images: Tensor) -> Recorder:
    """Run the graph on `images` without gradients; a node that fails ends the run and is named in `failed`."""
    recorder = Recorder(module)
    try:
        with torch.no_grad():
            recorder.result = recorder.run(images)
    except Exception:
        if recorder.failed is None:
            raise
    return recorder


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return [_describe(item) for item in value]
    if isinstance(value, dict):
        return [_describe(item) for item in value.values()]
    return value if isinstance(value, (int, float)) else None


def measure(module: fx.GraphModule, example: Tensor) -> Sizes:
    """Run the graph on two batch sizes and tell which values follow the batch axis."""
    two, three = (run_recorded(module, example[:1].repeat(batch, *(1,) * (example.ndim - 1))) for batch in (2, 3))
    kinds: dict[str, Kind] = {}
    for node in module.graph.nodes:
        known = node.name in two.values and node.name in three.values
        kinds[node.name] = _kind(two.values[node.name], three.values[node.name]) if known else "unknown"
    shapes = {name: value for name, value in two.values.items() if isinstance(value, tuple)}
    numbers = {name: value for name, value in two.values.items() if kinds[name] == "number" and isinstance(value, (int, float))}
    return Sizes(kinds, shapes, numbers, two.failed or three.failed)


def _kind(two: Any, three: Any) -> Kind:
    if isinstance(two, tuple) and isinstance(three, tuple):
        if two == three:
            return "static"
        follows = two[1:] == three[1:] and (two[:1], three[:1]) == ((2,), (3,))
        return "batched" if follows else "mixed"
    if isinstance(two, list) and isinstance(three, list) and len(two) == len(three):
        kinds = {_kind(a, b) for a, b in zip(two, three, strict=True)}
        if "mixed" in kinds:
            return "mixed"
        return next(iter(kinds)) if len(kinds) == 1 else "other"
    if isinstance(two, (int, float)):
        return "number" if two == three else "batch_size"
    return "other"
