"""The second way to record a network: torch.export, for forward passes that torch.fx cannot follow.

torch.export runs the forward pass on sizes that are known, but for the batch, so Python may look at them. What it
gives are operators of ATen; here they become the layers and torch functions that `classify.py` knows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

Build = Callable[..., Any]
"""(arguments of the ATen operator) to the node that takes its place."""

_CONVOLUTIONS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_TRANSPOSED = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d.input": nn.ConvTranspose2d,
    "conv_transpose3d.input": nn.ConvTranspose3d,
}
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size", "_assert_async")

# Same arguments in the same places, so far as a network gives them.
_SAME: dict[str, Any] = {
    **{name: getattr(torch, name) for name in ("relu", "sigmoid", "tanh", "neg", "exp", "log", "sqrt", "rsqrt", "abs", "square", "erf")},
    **{name: getattr(torch, name) for name in ("matmul", "bmm", "maximum", "minimum", "prelu", "flatten", "pixel_shuffle")},
    **{name: getattr(F, name) for name in ("silu", "hardswish", "hardsigmoid", "mish", "gelu", "softplus", "celu", "selu", "leaky_relu")},
    **{name: getattr(F, name) for name in ("hardtanh", "softshrink", "threshold", "adaptive_avg_pool1d", "adaptive_avg_pool2d")},
    **{name: getattr(F, name) for name in ("adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "pad")},
    **{name: getattr(F, name) for name in ("max_pool1d", "max_pool2d", "max_pool3d", "scaled_dot_product_attention")},
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
    "hardtanh_": F.hardtanh,
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


def record_exported(private: nn.Module, example: Tensor, name: str) -> fx.GraphModule:
    """Record with torch.export.

    Args:
        private: the network, in evaluation mode.
        example: one sample `[1, ...]`.
        name: of the graph's class.

    Raises:
        Exception: whatever torch.export says about a network that it cannot record.
    """
    batch = example.repeat(2, *(1,) * (example.ndim - 1))
    with torch.no_grad():
        program = torch.export.export(private, (batch,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    if not all(_plain_call(node) for node in program.graph.nodes):
        # An empty table: little is decomposed, but in-place operations are gone. It takes several times as long as the export.
        program = program.run_decompositions({})
    return _Reader(program, private).read(name)


def _plain_call(node: fx.Node) -> bool:
    """Whether it is an operator that this module knows and that changes none of its arguments."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    target, name = node.target, _name_of(node.target)
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    names = {name, name.partition(".")[0]}
    return not names.isdisjoint((*_SAME, *_SPECIAL, *_NOTHING, *_DROPOUTS, *_CHECKS))


class _Reader:
    def __init__(self, program: Any, private: nn.Module) -> None:
        self.program, self.private = program, private
        self.graph, self.root = fx.Graph(), nn.Module()
        self.nodes: dict[fx.Node, Any] = {}
        signature = program.graph_signature
        self.held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}

    def read(self, name: str) -> fx.GraphModule:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.nodes[node] = None if node.name in self.held else self.graph.placeholder(node.name)
            elif node.op == "output":
                results = [self.nodes[one] for one in node.args[0]]
                self.graph.output(tree_unflatten(results, self.program.call_spec.out_spec))
            elif node.op == "call_function":
                made = self._call(node)
                if isinstance(made, fx.Node) and made not in self.nodes.values():
                    self._describe(node, made)
                self.nodes[node] = made
        module = fx.GraphModule(self.root, self.graph, name)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        return module

    def _describe(self, node: fx.Node, made: fx.Node) -> None:
        made.meta["stack_trace"] = node.meta.get("stack_trace")
        stack = node.meta.get("nn_module_stack") or {}
        # "features.0@1" is the second call of features.0.
        made.meta["nn_module_stack"] = {key: (path.partition("@")[0], kind) for key, (path, kind) in stack.items()}
        path, kind = next(reversed(made.meta["nn_module_stack"].values()), ("", ""))
        if made.op == "call_function" and str(kind).startswith("torch.nn.modules."):
            made.meta["module_name"] = path

    def _call(self, node: Any) -> Any:
        name = _name_of(node.target)
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
        args, kwargs = fx.node.map_arg(node.args, self._value), dict(fx.node.map_arg(node.kwargs, self._value))
        return self.graph.call_function(_SAME.get(name, _SAME.get(name.partition(".")[0], node.target)), args, kwargs)

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

    def _place(self, path: str, layer: nn.Module) -> None:
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

    def _slice(self, node: fx.Node, x: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
        if axis == 0 and not start and (end is None or end == LAST or isinstance(end, fx.Node)) and step == 1:
            return self._value(x)
        end = None if end == LAST else end
        return self.graph.call_function(operator.getitem, (self._value(x), (*(slice(None),) * axis, slice(start, end, step))))

    def _select(self, node: fx.Node, x: Any, axis: int, index: int) -> Any:
        return self.graph.call_function(operator.getitem, (self._value(x), (*(slice(None),) * axis, index)))

    def _norm(self, node: fx.Node, x: Any, groups: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True) -> Any:
        function = F.layer_norm if _name_of(node.target) == "layer_norm" else F.group_norm
        tensors = [None if value is None else self._value(value) for value in (weight, bias)]
        return self.graph.call_function(function, (self._value(x), groups, *tensors, eps))

    def _expand(self, node: fx.Node, x: Any, sizes: Any, implicit: bool = False) -> Any:
        return self.graph.call_method("expand", (self._value(x), *fx.node.map_arg(tuple(sizes), self._value)))

    def _pad(self, node: fx.Node, x: Any, pad: Any, value: float = 0.0) -> Any:
        return self.graph.call_function(F.pad, (self._value(x), tuple(pad), "constant", value))

    def _elu(self, node: fx.Node, x: Any, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Any:
        if scale == inner == 1:
            return self.graph.call_function(F.elu, (self._value(x), alpha))
        return self.graph.call_function(F.selu, (self._value(x),)) if inner == 1 else None

    def _upsample_nearest2d(self, node: fx.Node, x: Any, size: Any = None, factors: Any = None) -> Any:
        keywords = {"size": _plain(size)} if size is not None else {"scale_factor": _plain(factors)}
        return self.graph.call_function(F.interpolate, (self._value(x),), keywords | {"mode": "nearest"})

    def _upsample_bilinear2d(self, node: fx.Node, x: Any, size: Any = None, corners: bool = False, factors: Any = None) -> Any:
        keywords = {"size": _plain(size)} if size is not None else {"scale_factor": _plain(factors)}
        return self.graph.call_function(F.interpolate, (self._value(x),), keywords | {"mode": "bilinear", "align_corners": corners})


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
    "upsample_nearest2d": _Reader._upsample_nearest2d,
    "upsample_bilinear2d": _Reader._upsample_bilinear2d,
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
