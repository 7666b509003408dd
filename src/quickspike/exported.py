"""The second way to record a network: torch.export, for forward passes that torch.fx cannot follow.

torch.export runs the forward pass on sizes that are known as symbols, so Python may look at them. What it gives are
operators of ATen; here they become the layers and torch functions that `classify.py` knows: a layer of torch that
computes what one call of it recorded is called again, everything else is read operator by operator.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from quickspike.operators import ANALOG_LAYERS, DROPOUT_LAYERS, LAYERS, MAX_POOLS

Ranges = tuple[tuple[int, int | None], ...]
"""Smallest and largest size of every axis behind the channels; None for no bound."""

_LIFTED = (*LAYERS, *ANALOG_LAYERS, *MAX_POOLS, *DROPOUT_LAYERS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.MultiheadAttention)
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"

_CONVOLUTIONS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_TRANSPOSED = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d.input": nn.ConvTranspose2d,
    "conv_transpose3d.input": nn.ConvTranspose3d,
}
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size", "_assert_async")

# Same arguments in the same places, so far as a network gives them.
_SAME: dict[str, Any] = {
    **{
        name: getattr(torch, name)
        for name in ("relu", "sigmoid", "tanh", "neg", "exp", "log", "sqrt", "rsqrt", "abs", "square", "erf", "round")
    },
    **{name: getattr(torch, name) for name in ("matmul", "bmm", "maximum", "minimum", "prelu", "flatten", "pixel_shuffle")},
    **{name: getattr(torch, name) for name in ("pixel_unshuffle", "channel_shuffle", "movedim", "swapaxes", "flip", "roll", "cumsum")},
    **{name: getattr(torch, name) for name in ("where", "gt", "ge", "lt", "le", "einsum", "rms_norm")},
    **{name: getattr(F, name) for name in ("silu", "hardswish", "hardsigmoid", "mish", "gelu", "softplus", "celu", "selu", "leaky_relu")},
    **{name: getattr(F, name) for name in ("hardtanh", "softshrink", "threshold", "adaptive_avg_pool1d", "adaptive_avg_pool2d")},
    **{name: getattr(F, name) for name in ("adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "pad")},
    **{name: getattr(F, name) for name in ("max_pool1d", "max_pool2d", "max_pool3d", "scaled_dot_product_attention", "glu")},
    "add.Tensor": torch.add,
    "sub.Tensor": torch.sub,
    "mul.Tensor": torch.mul,
    "div.Tensor": torch.div,
    "add.Scalar": torch.add,
    "sub.Scalar": torch.sub,
    "mul.Scalar": torch.mul,
    "div.Scalar": torch.div,
    "pow.Tensor_Scalar": torch.pow,
    "relu6": F.relu6,
    "log_sigmoid": F.logsigmoid,
    "adaptive_max_pool1d": F.adaptive_max_pool1d,
    "adaptive_max_pool2d": F.adaptive_max_pool2d,
    "adaptive_max_pool3d": F.adaptive_max_pool3d,
    "max_pool2d_with_indices": F.max_pool2d,
    "max_pool3d_with_indices": F.max_pool3d,
    "clamp": torch.clamp,
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "cat": torch.cat,
    "stack": torch.stack,
    "chunk": torch.chunk,
    "split.Tensor": torch.split,
    "split_with_sizes": torch.split,
    "unbind.int": torch.unbind,
    "narrow": torch.narrow,
    "reshape": torch.reshape,
    "view": torch.reshape,
    "_unsafe_view": torch.reshape,
    "flatten.using_ints": torch.flatten,
    "permute": torch.permute,
    "transpose.int": torch.transpose,
    "squeeze.dim": torch.squeeze,
    "squeeze.dims": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
    "mean.dim": torch.mean,
    "sum.dim_IntList": torch.sum,
    "amax": torch.amax,
    "amin": torch.amin,
    "softmax.int": torch.softmax,
    "log_softmax.int": torch.log_softmax,
    "linear": F.linear,
}
_NOTHING = ("contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")


_FIRST_OF_SEVERAL = ("_native_batch_norm", "adaptive_max_pool", "max_pool2d_with", "max_pool3d_with")
"""Operators that give something else besides, where the function that takes their place gives one value."""


MOST_TERMS = 1000
"""Parts of the formula of a size, from those of the input. Strided layers, however many, lead to 150 or so."""


@dataclass(frozen=True)
class Exported:
    """What torch.export recorded, and for which heights and widths it holds."""

    module: fx.GraphModule
    ranges: Ranges


def record_exported(private: nn.Module, example: Tensor, name: str) -> Exported:
    """Record with torch.export, heights and widths as symbols where the network allows it.

    Args:
        private: the network, in evaluation mode.
        example: one sample `[1, ...]`.
        name: of the graph's class.

    Raises:
        Exception: whatever torch.export says about a network that it cannot record.
    """
    batch = example.repeat(2, *(1,) * (example.ndim - 1))
    free = dict.fromkeys(range(2, example.ndim), torch.export.Dim.AUTO)
    if free:
        # Sizes as symbols may lead to operators that are not known here, or to formulas without an end.
        with contextlib.suppress(Exception), _short_formulas():
            return _read(private, batch, free, name)
    return _read(private, batch, {}, name)


def _read(private: nn.Module, batch: Tensor, axes: dict[int, Any], name: str) -> Exported:
    program = _exported(private, batch, axes)
    ranges = _ranges(program, batch)
    if not all(_plain_call(node, private) for node in program.graph.nodes):
        # An empty table: little is decomposed, but in-place operations are gone. It takes several times as long as the export.
        program = program.run_decompositions({})
    return Exported(_Reader(program, private).read(name), ranges)


def _exported(private: nn.Module, batch: Tensor, axes: dict[int, Any]) -> Any:
    with torch.no_grad(), _all_frames(), _quiet():
        return torch.export.export(private, (batch,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC, **axes},), strict=False)


@contextlib.contextmanager
def _all_frames() -> Iterator[None]:
    """Let torch.export keep the lines of helper functions, as torch.fx does; by itself it keeps those of forward() only."""
    from torch.fx.experimental.proxy_tensor import _ModuleStackTracer

    owner: Any = _ModuleStackTracer
    name = "_filter_traceback_frames"
    own = owner.__dict__.get(name)
    # An older torch has no such method, and keeps them all.
    if hasattr(owner, name):
        setattr(owner, name, _users_frames)
    try:
        yield
    finally:
        if own is not None:
            setattr(owner, name, own)
        elif name in owner.__dict__:
            delattr(owner, name)


@contextlib.contextmanager
def _short_formulas() -> Iterator[None]:
    """Give up once a size has become a formula of more than `MOST_TERMS` parts.

    Paddings that depend on sizes (those of TensorFlow) put every size into a maximum of the one before, and with a few
    layers sympy takes minutes for each.
    """
    from sympy import Basic, preorder_traversal
    from torch.fx.experimental.sym_node import SymNode

    owner: Any = SymNode
    own = owner.__init__

    def made(node: Any, expr: Any, *args: Any, **kwargs: Any) -> None:
        own(node, expr, *args, **kwargs)
        if isinstance(expr, Basic) and next(itertools.islice(preorder_traversal(expr), MOST_TERMS, None), None) is not None:
            raise RuntimeError(f"a size is a formula of more than {MOST_TERMS} parts")

    owner.__init__ = made
    try:
        yield
    finally:
        owner.__init__ = own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torch cannot find out about sizes shows in the ranges; that it tried fills screens."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _users_frames(tracer: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
    first = next((place for place, frame in enumerate(frames) if frame.name == "forward"), len(frames))
    return traceback.StackSummary.from_list([frame for frame in frames[first:] if not frame.filename.startswith(_TORCH)])


def _ranges(program: Any, example: Tensor) -> Ranges:
    """Of every axis behind the channels; one that torch.export took as a number, or tied to another, has its size alone."""
    (name,) = program.graph_signature.user_inputs
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)
    symbols = [getattr(getattr(size, "node", None), "expr", None) for size in shape]
    ranges: list[tuple[int, int | None]] = []
    for size, symbol in zip(example.shape[2:], symbols[2:], strict=True):
        bounds = program.range_constraints.get(symbol)
        if bounds is None or symbols.count(symbol) > 1:
            ranges.append((size, size))
        else:
            upper = bounds.upper
            ranges.append((int(bounds.lower), int(upper) if upper.is_finite and upper < 2**31 else None))
    return tuple(ranges)


def _schema(node: fx.Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _plain_call(node: fx.Node, private: nn.Module) -> bool:
    """Whether it is an operator that can be read as it is; one that changes a tensor, only if that tensor has no views."""
    if node.op != "call_function":
        return True
    schema = _schema(node)
    if schema is None:
        return True
    name = _functional(_name_of(node.target)) if schema.is_mutable else _name_of(node.target)
    if schema.is_mutable and not _alone(node):
        return False
    names = {name, name.partition(".")[0]}
    return not names.isdisjoint((*_SAME, *_SPECIAL, *_NOTHING, *_DROPOUTS, *_CHECKS)) or _leaf(node, private) is not None


def _functional(name: str) -> str:
    """add.Tensor for add_.Tensor."""
    base, dot, overload = name.partition(".")
    return base.removesuffix("_") + dot + overload


def _alone(node: fx.Node) -> bool:
    """True if what `node` changes is neither a view of something nor has views itself."""
    changed: Any = node.args[0]
    while True:
        if changed.op != "call_function" or any(_is_view(user) for user in changed.users):
            return False
        schema = _schema(changed)
        if schema is None or _is_view(changed):
            return False
        if not schema.is_mutable:
            return True
        changed = changed.args[0]


def _is_view(node: fx.Node) -> bool:
    schema = _schema(node)
    if schema is None:
        return node.target is operator.getitem
    name = _name_of(node.target).partition(".")[0]
    aliases = any(result.alias_info is not None for result in schema.returns)
    return (aliases and not schema.is_mutable) or name in (*_NOTHING, *_DROPOUTS)


def _call_of(node: fx.Node) -> tuple[str, str]:
    """(key, path) of the innermost module call that a node belongs to; the key of a second call differs."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    key, (path, _) = next(reversed(stack.items()))
    return key, path.partition("@")[0]


def _leaf(node: fx.Node, private: nn.Module) -> nn.Module | None:
    """The layer of torch whose call a node belongs to, if it can be called again."""
    path = _call_of(node)[1]
    try:
        layer = private.get_submodule(path) if path else None
    except AttributeError:
        return None
    return layer if type(layer) in _LIFTED else None


class _Reader:
    def __init__(self, program: Any, private: nn.Module) -> None:
        self.program, self.private = program, private
        self.graph, self.root = fx.Graph(), nn.Module()
        self.nodes: dict[fx.Node, Any] = {}
        signature = program.graph_signature
        self.held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        self.lifted, self.inside = self._calls_of_layers()

    def read(self, name: str) -> fx.GraphModule:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.nodes[node] = None if node.name in self.held else self.graph.placeholder(node.name)
            elif node.op == "output":
                results = [self.nodes[one] for one in node.args[0]]
                self.graph.output(tree_unflatten(results, self.program.call_spec.out_spec))
            elif node.op == "call_function" and node not in self.inside:
                made = self._call(node)
                if isinstance(made, fx.Node) and made not in self.nodes.values():
                    self._describe(node, made)
                self.nodes[node] = made
                if (schema := _schema(node)) is not None and schema.is_mutable:
                    self._changed(node, made)
        module = fx.GraphModule(self.root, self.graph, name)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        return module

    def _changed(self, node: fx.Node, made: Any) -> None:
        """Whoever reads a tensor after it was changed in place reads the result."""
        while (schema := _schema(node)) is not None and schema.is_mutable:
            node = node.all_input_nodes[0]
            self.nodes[node] = made

    def _calls_of_layers(self) -> tuple[dict[fx.Node, fx.Node], set[fx.Node]]:
        """Calls of layers of torch from one tensor to one: last node to input; and all nodes that they take the place of."""
        calls: dict[str, list[fx.Node]] = {}
        for node in self.program.graph.nodes:
            if node.op == "call_function" and _leaf(node, self.private) is not None:
                calls.setdefault(_call_of(node)[0], []).append(node)
        lifted, inside = dict[fx.Node, fx.Node](), set[fx.Node]()
        for nodes in calls.values():
            given = {one for node in nodes for one in node.all_input_nodes if one not in nodes and one.name not in self.held}
            given = {one for one in given if isinstance(one.meta.get("val"), Tensor)}
            last = [node for node in nodes if any(user not in nodes for user in node.users)]
            if len(given) == len(last) == 1:
                lifted[last[0]] = given.pop()
                inside.update(node for node in nodes if node is not last[0])
        return lifted, inside

    def _describe(self, node: fx.Node, made: fx.Node) -> None:
        made.meta["stack_trace"] = node.meta.get("stack_trace")
        stack = node.meta.get("nn_module_stack") or {}
        # "features.0@1" is the second call of features.0.
        made.meta["nn_module_stack"] = {key: (path.partition("@")[0], kind) for key, (path, kind) in stack.items()}
        path, kind = next(reversed(made.meta["nn_module_stack"].values()), ("", ""))
        if made.op == "call_function" and str(kind).startswith("torch.nn.modules."):
            made.meta["module_name"] = path

    def _call(self, node: Any) -> Any:
        if node in self.lifted:
            return self._again(node)
        schema = _schema(node)
        if schema is None and node.target is not operator.getitem:
            # Arithmetic of sizes.
            return self.graph.call_function(node.target, *self._arguments(node))
        name = _name_of(node.target)
        if schema is not None and schema.is_mutable:
            name = _functional(name)
        if name.partition(".")[0] in _CHECKS:
            return None
        if name.partition(".")[0] in _NOTHING or (name in _DROPOUTS and not node.args[2]):
            return self._value(node.args[0])
        if name in _DROPOUTS:
            # Active in inference: left for classify.py to refuse.
            return self.graph.call_function(F.dropout, (self._value(node.args[0]), node.args[1], True))
        if node.target is operator.getitem and node.args[1] == 0 and _name_of(node.args[0].target).startswith(_FIRST_OF_SEVERAL):
            return self.nodes[node.args[0]]
        special = _SPECIAL.get(name.partition(".")[0])
        if special is not None and (made := special(self, node, *node.args, **node.kwargs)) is not None:
            return made
        return self.graph.call_function(_SAME.get(name, _SAME.get(name.partition(".")[0], node.target)), *self._arguments(node))

    def _arguments(self, node: fx.Node) -> tuple[Any, dict[str, Any]]:
        return fx.node.map_arg(node.args, self._value), dict(fx.node.map_arg(node.kwargs, self._value))

    def _again(self, node: fx.Node) -> fx.Node:
        """The call of a layer of torch."""
        path, layer = _call_of(node)[1], _leaf(node, self.private)
        if not _has(self.root, path):
            self._place(path, layer)
        elif self.root.get_submodule(path) is not layer:
            path = f"{path}_{node.name}"
            self._place(path, layer)
        x = self._value(self.lifted[node])
        if isinstance(layer, nn.MultiheadAttention):
            call = self.graph.call_module(path, (x, x, x))
            self._describe(node, call)
            return self.graph.call_function(operator.getitem, (call, 0))
        return self.graph.call_module(path, (x,))

    # Reading values

    def _value(self, node: fx.Node) -> Any:
        if node.name in self.held:
            return self._attribute(node)
        return self.nodes[node]

    def _tensor(self, value: Any) -> Any:
        """The parameter or buffer behind a node; None for None or for something computed."""
        if not isinstance(value, fx.Node) or value.name not in self.held:
            return None
        name = self.held[value.name]
        if name in self.program.constants:
            return self.program.constants[name]
        return operator.attrgetter(name)(self.private)

    def _attribute(self, node: fx.Node) -> fx.Node:
        tensor, name = self._tensor(node), str(self.held[node.name]).replace(".", "_")
        if not hasattr(self.root, name):
            if isinstance(tensor, nn.Parameter):
                self.root.register_parameter(name, tensor)
            else:
                self.root.register_buffer(name, tensor)
        return self.graph.get_attr(name)

    # Layers

    def _layer(self, node: fx.Node, x: Any, weight: Any, layer: Any) -> fx.Node:
        """Call a new layer under the name of the module that holds its weight; a second call of it shares the layer."""
        owner = str(self.held[weight.name]).rpartition(".")[0]
        path = owner or "own"
        if _has(self.root, path):
            known: Any = self.root.get_submodule(path)
            same = type(known) is type(layer) and known.extra_repr() == layer.extra_repr() and known.weight is layer.weight
            if not same:
                path = f"{path}_{node.name}"
                self._place(path, layer)
        else:
            self._place(path, layer)
        return self.graph.call_module(path, (self._value(x),))

    def _place(self, path: str, layer: Any) -> None:
        parent, _, leaf = path.rpartition(".")
        owner = self.root
        for part in filter(None, parent.split(".")):
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(leaf, layer.eval().requires_grad_(False))

    def _convolution(
        self, node: fx.Node, kind: type[Any], x: Any, weight: Any, bias: Any, settings: dict[str, Any], transposed: bool
    ) -> Any:
        kernel, offsets = self._tensor(weight), self._tensor(bias)
        if kernel is None or (bias is not None and offsets is None):
            return None
        groups = settings.get("groups", 1)
        outputs, inputs = (kernel.shape[1] * groups, len(kernel)) if transposed else (len(kernel), kernel.shape[1] * groups)
        layer = kind(inputs, outputs, tuple(kernel.shape[2:]), bias=offsets is not None, device="meta", **settings)
        layer.weight = kernel if isinstance(kernel, nn.Parameter) else nn.Parameter(kernel, False)
        if offsets is not None:
            layer.bias = offsets if isinstance(offsets, nn.Parameter) else nn.Parameter(offsets, False)
        return self._layer(node, x, weight, layer)

    def _forward(
        self, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        settings = {name: _plain(value) for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))}
        kind = _CONVOLUTIONS[_name_of(node.target).partition(".")[0]]
        return self._convolution(node, kind, x, weight, bias, settings | {"groups": groups}, False)

    def _backward(
        self,
        node: fx.Node,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        pairs = (("stride", stride), ("padding", padding), ("output_padding", output_padding), ("dilation", dilation))
        settings = {name: _plain(value) for name, value in pairs}
        return self._convolution(node, _TRANSPOSED[_name_of(node.target)], x, weight, bias, settings | {"groups": groups}, True)

    def _linear(self, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Any:
        matrix, offsets = self._tensor(weight), self._tensor(bias)
        if matrix is None or (bias is not None and offsets is None):
            return None
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=offsets is not None, device="meta")
        layer.weight = matrix if isinstance(matrix, nn.Parameter) else nn.Parameter(matrix, False)
        if offsets is not None:
            layer.bias = offsets if isinstance(offsets, nn.Parameter) else nn.Parameter(offsets, False)
        return self._layer(node, x, weight, layer)

    def _batch_norm(
        self, node: fx.Node, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float, *_: Any
    ) -> Any:
        tensors = (None if value is None else self._value(value) for value in (mean, variance, weight, bias))
        return self.graph.call_function(F.batch_norm, (self._value(x), *tensors, training, momentum, eps))

    def _frozen_batch_norm(self, node: fx.Node, *arguments: Any) -> Any:
        """What batch_norm becomes once in-place operations are gone."""
        return self._batch_norm(node, *arguments[:5], False, *arguments[5:])

    # Functions whose arguments differ

    def _sym_size(self, node: fx.Node, x: Any, axis: int) -> Any:
        return self.graph.call_method("size", (self._value(x), axis))

    def _slice(self, node: Any, x: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
        if axis == 0 and not start and (end is None or end == LAST or isinstance(end, fx.Node)) and step == 1:
            return self._value(x)
        end = None if end == LAST else end
        part = fx.node.map_arg(slice(start, end, step), self._value)
        return self.graph.call_function(operator.getitem, (self._value(x), (*self._before(node, axis), part)))

    def _select(self, node: fx.Node, x: Any, axis: int, index: Any) -> Any:
        place = fx.node.map_arg(index, self._value)
        return self.graph.call_function(operator.getitem, (self._value(x), (*self._before(node, axis), place)))

    def _before(self, node: Any, axis: int) -> tuple[slice, ...]:
        """Whole axes in front of `axis`, which may be counted from behind."""
        return (slice(None),) * int(axis % node.args[0].meta["val"].ndim)

    def _norm(self, node: fx.Node, x: Any, groups: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True) -> Any:
        function = F.layer_norm if _name_of(node.target) == "layer_norm" else F.group_norm
        tensors = [None if value is None else self._value(value) for value in (weight, bias)]
        return self.graph.call_function(function, (self._value(x), groups, *tensors, eps))

    def _expand(self, node: fx.Node, x: Any, sizes: Any, implicit: bool = False) -> Any:
        return self.graph.call_method("expand", (self._value(x), *fx.node.map_arg(tuple(sizes), self._value)))

    def _pad(self, node: fx.Node, x: Any, pad: Any, value: float = 0.0) -> Any:
        return self.graph.call_function(F.pad, (self._value(x), fx.node.map_arg(tuple(pad), self._value), "constant", value))

    def _elu(self, node: fx.Node, x: Any, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Any:
        if scale == inner == 1:
            return self.graph.call_function(F.elu, (self._value(x), alpha))
        return self.graph.call_function(F.selu, (self._value(x),)) if inner == 1 else None

    def _resize(self, node: fx.Node, x: Any, size: Any, corners: Any = None, factors: Any = None) -> Any:
        """upsample_bilinear2d.vec and its kin."""
        name, _, overload = _name_of(node.target).partition(".")
        mode = name.removeprefix("_").removeprefix("upsample_").removesuffix("_aa")[:-2].replace("_", "-")
        if overload != "vec":
            return None
        if mode.startswith("nearest"):
            corners, factors = None, corners
        given = {"size": size} if size is not None else {"scale_factor": factors}
        keywords: dict[str, Any] = {key: fx.node.map_arg(tuple(value), self._value) for key, value in given.items()} | {"mode": mode}
        if corners is not None:
            keywords["align_corners"] = corners
        if name.endswith("_aa"):
            keywords["antialias"] = True
        return self.graph.call_function(F.interpolate, (self._value(x),), keywords)

    def _instance_norm(
        self, node: fx.Node, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, own: bool, momentum: float, eps: float, *_: Any
    ) -> Any:
        tensors = [None if value is None else self._value(value) for value in (mean, variance, weight, bias)]
        return self.graph.call_function(F.instance_norm, (self._value(x), *tensors, own, momentum, eps))

    def _repeat(self, node: fx.Node, x: Any, counts: Any) -> Any:
        return self.graph.call_method("repeat", (self._value(x), *fx.node.map_arg(tuple(counts), self._value)))

    def _deviation(self, node: fx.Node, x: Any, axes: Any = None, unbiased: Any = None, keepdim: bool = False, **options: Any) -> Any:
        """Std and var, in the form that names its arguments."""
        function = torch.std if _name_of(node.target).startswith("std") else torch.var
        if _name_of(node.target).endswith(".dim"):
            options["correction"] = 0 if unbiased is False else 1
        elif not _name_of(node.target).endswith(".correction"):
            return None
        options = {"correction": options.get("correction", 1), "keepdim": options.get("keepdim", keepdim)}
        return self.graph.call_function(function, (self._value(x), _plain(axes)), options)

    def _einsum(self, node: fx.Node, equation: str, operands: Any, path: Any = None) -> Any:
        return self.graph.call_function(torch.einsum, (equation, *map(self._value, operands)))

    def _border(self, node: fx.Node, x: Any, pad: Any) -> Any:
        mode = "reflect" if _name_of(node.target).startswith("reflection") else "replicate"
        return self.graph.call_function(F.pad, (self._value(x), fx.node.map_arg(tuple(pad), self._value), mode))


_SPECIAL: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_CONVOLUTIONS, _Reader._forward),
    **{name.partition(".")[0]: _Reader._backward for name in _TRANSPOSED},
    "linear": _Reader._linear,
    "batch_norm": _Reader._batch_norm,
    "_native_batch_norm_legit_no_training": _Reader._frozen_batch_norm,
    "sym_size": _Reader._sym_size,
    "slice": _Reader._slice,
    "select": _Reader._select,
    "constant_pad_nd": _Reader._pad,
    "elu": _Reader._elu,
    "expand": _Reader._expand,
    "layer_norm": _Reader._norm,
    "group_norm": _Reader._norm,
    "instance_norm": _Reader._instance_norm,
    "repeat": _Reader._repeat,
    "std": _Reader._deviation,
    "var": _Reader._deviation,
    "einsum": _Reader._einsum,
    **{f"{kind}_pad{axes}d": _Reader._border for kind in ("reflection", "replication") for axes in (1, 2, 3)},
    **{f"{kind}{axes}d": _Reader._resize for kind in ("upsample_nearest", "_upsample_nearest_exact") for axes in (1, 2, 3)},
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"), _Reader._resize),
    **dict.fromkeys(("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), _Reader._resize),
}

LAST = 2**63 - 1
"""An open end, as ATen writes it."""


def _name_of(target: Any) -> str:
    """Name and overload of an ATen operator, conv2d or add.Tensor; the default overload goes without saying."""
    text = str(target)
    if not text.startswith("aten."):
        return getattr(target, "__name__", text)
    return text.removeprefix("aten.").removesuffix(".default")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True
