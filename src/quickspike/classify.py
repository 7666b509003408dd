"""Decide for every node of a captured graph what becomes of it, and bring those that stay into one spelling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quickspike.capture import Sizes, scope_of, source_of
from quickspike.coverage import Coverage, Finding, Status
from quickspike.operators import (
    DROPOUT_LAYERS,
    DROPOUTS,
    FUNCTIONS,
    LAYERS,
    MAX_POOL_FUNCTIONS,
    MAX_POOLS,
    NO_OPERATION_LAYERS,
    NO_OPERATIONS,
    SPELLINGS,
    Function,
    ReLU,
)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
CLAMPS = (
    torch.clamp,
    torch.clamp_,
    torch.clip,
    torch.clip_,
    "clamp",
    "clamp_",
    "clip",
    "clip_",
    "clamp_min",
    "clamp_min_",
    torch.clamp_min,
)
HARDTANHS = (F.hardtanh, F.hardtanh_)


def activate(x: Tensor) -> Tensor:
    """Stand-in for an activation call until its site has a name: right in shape only.

    The node's meta says which activation it was; `trace` puts a named module in its place.
    """
    return x


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What becomes of one node."""

    status: Status
    reason: str = ""
    way_out: str = ""
    edit: Callable[[], object] | None = None


DEFAULT_WAY_OUT = "replace it by a supported operator (docs/operators.md) and fine-tune, or convert only the part that has none"
WAYS_OUT: tuple[tuple[tuple[str, ...], str], ...] = (
    (("with_indices",), "leave the indices out; where unpooling needs them, use average pooling"),
    (("softmax", "sigmoid", "logsoftmax"), "at the output: return the logits, the readout averages them; elsewhere: use a ReLU network"),
    (
        ("gelu", "silu", "swish", "mish", "elu", "prelu", "leaky", "tanh", "softplus"),
        "replace it by nn.ReLU and fine-tune before converting",
    ),
    (("layernorm", "layer_norm", "groupnorm", "group_norm", "instancenorm"), "train with batch norm, which folds into the weights"),
    (
        ("attention", "matmul", "bmm", "einsum", "scaled_dot"),
        "products of two signals have no spiking form here; use a convolutional network",
    ),
)


def classify(module: fx.GraphModule, sizes: Sizes, network: str, keep_dropout: bool = False) -> Coverage:
    """Find out what becomes of every node; rewrite the accepted ones into their canonical form, in place.

    Args:
        module: the captured graph.
        sizes: of every node's value.
        network: name for the report.
        keep_dropout: leave dropout layers in the graph, for training; they go when the graph is folded.
    """
    classifier = _Classifier(module, sizes, keep_dropout)
    findings = []
    edits = []
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or sizes.kinds[node.name] in ("number", "batch_size") or _is_size(node, sizes):
            continue
        verdict = classifier.verdict(node)
        edits.append(verdict.edit)
        name, operator = _name(node), _operator(node, module)
        findings.append(Finding(name, operator, verdict.status, verdict.reason, verdict.way_out, source_of(node)))
    coverage = Coverage(network, tuple(findings))
    if not coverage.unsupported:
        for edit in filter(None, edits):
            edit()
        classifier.canonical_sizes()
        module.graph.eliminate_dead_code()
        module.recompile()
    return coverage


def _is_size(node: fx.Node, sizes: Sizes) -> bool:
    if node.op == "call_method":
        return node.target == "size"
    return node.target is getattr and bool(node.args[1] == "shape")


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return ".".join(part for part in (scope_of(node), _function_name(node)) if part)


def _function_name(node: fx.Node) -> str:
    if node.target in MAX_POOL_FUNCTIONS:
        return getattr(MAX_POOL_FUNCTIONS[node.target], "__name__", "").replace("MaxPool", "max_pool").replace("Adaptivem", "adaptive_m")
    known = SPELLINGS.get(node.target)
    return known.name if known else str(getattr(node.target, "__name__", node.target))


def _operator(node: fx.Node, module: fx.GraphModule) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return _function_name(node)


def refuse(operator: str, reason: str, way_out: str = "") -> Verdict:
    """An unsupported verdict with the way out that fits the operator's name."""
    flat = operator.lower()
    fitting = (text for words, text in WAYS_OUT if any(word in flat for word in words))
    return Verdict("unsupported", reason, way_out or next(fitting, DEFAULT_WAY_OUT))


class _Classifier:
    """Verdicts for the nodes of one graph, in order; remembers which values have already passed a neuron."""

    def __init__(self, module: fx.GraphModule, sizes: Sizes, keep_dropout: bool) -> None:
        self.module, self.graph, self.sizes, self.keep_dropout = module, module.graph, sizes, keep_dropout
        self.spiking: set[fx.Node] = set()

    def verdict(self, node: fx.Node) -> Verdict:
        problem = self._batch_problem(node)
        if problem:
            return problem
        judge = {"call_module": self._layer, "call_function": self._call, "call_method": self._call}[node.op]
        verdict = judge(node)
        if verdict.status == "neuron" or any(parent in self.spiking for parent in node.all_input_nodes):
            self.spiking.add(node)
            if verdict.status == "analog":
                return dataclasses.replace(verdict, status="synapse")
        return verdict

    def _batch_problem(self, node: fx.Node) -> Verdict | None:
        operator = _operator(node, self.module)
        if self.sizes.failure and self.sizes.failure[0] == node.name:
            return refuse(operator, f"fails on another batch size: {self.sizes.failure[1]}", "let it accept any batch size")
        lost = self.sizes.kinds[node.name] == "static" and any(
            self.sizes.kinds[p.name] in ("batched", "other") for p in node.all_input_nodes
        )
        if self.sizes.kinds[node.name] == "mixed" or lost:
            reason = "moves the batch axis away from axis 0, or mixes samples"
            return refuse(operator, reason, "keep the batch on axis 0 and treat samples apart")
        return None

    # Modules

    def _layer(self, node: fx.Node) -> Verdict:
        layer = self.module.get_submodule(str(node.target))
        kind, name = type(layer), type(layer).__name__
        if kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, ReLU):
            return self._site(node, *_bounds_of(layer), str(node.target))
        if kind in LAYERS:
            return Verdict("analog")
        if kind in MAX_POOLS:
            return self._max_pool(node, layer)
        if kind in BATCH_NORMS:
            return _batch_norm(layer)
        if isinstance(layer, NO_OPERATION_LAYERS):
            return Verdict("removed") if self.keep_dropout and isinstance(layer, DROPOUT_LAYERS) else self._removed(node)
        if isinstance(layer, tuple(LAYERS) + BATCH_NORMS):
            return refuse(name, f"{name} is a subclass of a supported layer and may compute something else", "use the base class")
        return refuse(name, f"{name} has no exact spiking form")

    def _max_pool(self, node: fx.Node, layer: nn.Module) -> Verdict:
        if getattr(layer, "return_indices", False):
            return refuse("MaxPool", "max-pooling that returns indices has no spiking form", "use average pooling")
        return Verdict("analog", "max-pooling of accumulated currents, in front of the neuron where that is exact")

    # Functions and methods

    def _call(self, node: fx.Node) -> Verdict:
        target, name = node.target, _function_name(node)
        if target in RELU_FUNCTIONS:
            return self._site(node, "relu", None)
        if target is F.relu6:
            return self._site(node, "relu6", 6.0)
        if target in CLAMPS or target in HARDTANHS:
            return self._clamp(node, name)
        if target in NO_OPERATIONS:
            return self._removed(node)
        if target in DROPOUTS:
            return self._dropout(node)
        if target in MAX_POOL_FUNCTIONS:
            return self._max_pool_call(node)
        if target in SPELLINGS:
            return self._function(node, SPELLINGS[target])
        return refuse(name, f"{name}() has no exact spiking form")

    def _clamp(self, node: fx.Node, name: str) -> Verdict:
        defaults: dict[str, Any] = {"min_val": -1.0, "max_val": 1.0} if node.target in HARDTANHS else {"min": None, "max": None}
        keys = tuple(defaults)
        bounds: dict[str, Any] = (
            defaults | dict(zip(keys, node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k in keys}
        )
        low, high = bounds[keys[0]], bounds[keys[1]]
        numbers = isinstance(low, (int, float)) and (high is None or isinstance(high, (int, float)))
        if not numbers or low != 0 or (high is not None and not 0 < high < math.inf):
            return refuse(name, f"clamps to [{low}, {high}]; only a lower bound of 0 is a neuron", "clamp at min=0")
        return self._site(node, "relu" if high is None else "clamp", None if high is None else float(high))

    def _dropout(self, node: fx.Node) -> Verdict:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        if training:
            reason = "is called with training=True and stays random in inference"
            return refuse("dropout", reason, "pass training=self.training, or use nn.Dropout")
        return self._removed(node)

    def _max_pool_call(self, node: fx.Node) -> Verdict:
        cls = MAX_POOL_FUNCTIONS[node.target]
        keys = MAX_POOLS[cls]
        arguments = {**dict(zip(keys, node.args[1:], strict=False)), **node.kwargs}
        if arguments.pop("return_indices", False):
            return refuse("max_pool", "max-pooling that returns indices has no spiking form", "use average pooling")
        if any(isinstance(value, fx.Node) for value in arguments.values()):
            return refuse("max_pool", "the window is computed in forward()", "use fixed sizes or adaptive pooling")
        if arguments.get("stride") == []:
            arguments["stride"] = None

        def edit() -> None:
            name = f"{_name(node).replace('.', '_')}_{node.name}"
            self.module.add_submodule(name, cls(**arguments))
            self._replace(node, lambda: self.graph.call_module(name, (node.args[0],)))

        reason = "max-pooling of accumulated currents, in front of the neuron where that is exact"
        return Verdict("analog", reason, edit=edit)

    def _function(self, node: fx.Node, function: Function) -> Verdict:
        problem = self._argument_problem(node, function.name)
        if problem:
            return refuse(function.name, *problem)

        # The arguments are read when the edit runs: earlier edits will have replaced some of them.
        def make() -> fx.Node:
            if function.name == "reshape":
                return self.graph.call_function(function.run, _reshape_args(node, self.sizes))
            # The arithmetic of the operator module takes no keywords; alpha=1 and rounding_mode=None may be left out.
            kwargs = {} if function.run.__module__ == "_operator" else dict(node.kwargs)
            return self.graph.call_function(function.run, _plain_args(node, function.name), kwargs)

        return Verdict("analog", edit=lambda: self._replace(node, make))

    def _argument_problem(self, node: fx.Node, name: str) -> tuple[str, str] | None:
        """Why this call is not affine in the signal, with the way out; None if it is."""
        parents = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
        signals = [arg for arg in parents if self.sizes.kinds[arg.name] == "batched"]
        if name == "floordiv" or node.kwargs.get("rounding_mode") is not None:
            return "rounds, which is not affine", DEFAULT_WAY_OUT
        if name != "reshape" and any(self.sizes.kinds[arg.name] == "batch_size" for arg in node.all_input_nodes):
            return "uses the batch size as a value", "use a constant; time is folded into the batch"
        if name == "squeeze" and (len(node.args) + len(node.kwargs) < 2):
            return "drops the batch axis of a single sample", "name the axes, for example squeeze(-1)"
        if name == "mul" and len(signals) > 1:
            return "multiplies two signals", "gates have no exact spiking form; remove the gate and fine-tune"
        if name == "div" and isinstance(node.args[1], fx.Node) and node.args[1] in signals:
            return "divides by a signal", "divide by a constant"
        if (name == "linear" or name.startswith("conv")) and any(arg in signals for arg in parents[1:]):
            return "its weights depend on the input", "use fixed weights"
        if name in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
            return f"{name} with alpha", "multiply before adding"
        if name == "getitem" and isinstance(node.args[1], fx.Node):
            return "indexes with a tensor", "use slices of fixed bounds"
        if node.kwargs.get("dtype") is not None or node.kwargs.get("out") is not None:
            return "changes the dtype or writes to `out`", "drop that argument"
        if name in ("mean", "sum") and len(node.args) + len(node.kwargs) < 2:
            return "reduces over the batch", "name the axes, for example mean((2, 3))"
        return None

    # Edits

    def _site(self, node: fx.Node, function: str, ceiling: float | None, module_name: str = "") -> Verdict:
        if function == "":
            return refuse("Hardtanh", "only a lower bound of 0 is a neuron", "use nn.Hardtanh(0, c) or nn.ReLU6")
        if self.sizes.kinds[node.name] == "static":
            return refuse(function, "acts on a parameter, not on a signal", "compute it once, and keep the result as the parameter")
        if len(self.sizes.shapes.get(node.name, (0, 0))) < 2:
            return refuse(function, "acts on one number per sample without an axis of channels", "keep the axis: [B, 1]")

        def make() -> fx.Node:
            call = self.graph.call_function(activate, (node.args[0],))
            call.meta.update(function=function, ceiling=ceiling, module_name=module_name)
            return call

        return Verdict("neuron", edit=lambda: self._replace(node, make))

    def _removed(self, node: fx.Node) -> Verdict:
        def edit() -> None:
            source: Any = node.args[0]
            node.replace_all_uses_with(source)
            self.graph.erase_node(node)

        return Verdict("removed", edit=edit)

    def _replace(self, node: fx.Node, make: Callable[[], fx.Node]) -> None:
        with self.graph.inserting_before(node):
            new = make()
        for key in ("stack_trace", "nn_module_stack"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def canonical_sizes(self) -> None:
        """`x.size(i)` and `x.shape` become shape(x); sizes that nobody reads any more disappear."""
        self.graph.eliminate_dead_code()
        shape = FUNCTIONS["shape"].run
        for node in self.graph.nodes:
            # numel() and its like are no operators of a spiking network; what follows from them is a constant.
            others = (n.op == "call_method" and n.target != "size" for n in (node, *node.all_input_nodes))
            if node.name in self.sizes.numbers and any(others):
                node.replace_all_uses_with(self.sizes.numbers[node.name])
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            if not _is_size(node, self.sizes):
                continue
            self._replace(node, partial(self._sizes_call, node, shape))

    def _sizes_call(self, node: fx.Node, shape: Callable[..., Any]) -> fx.Node:
        call = self.graph.call_function(shape, (node.args[0],))
        axis = node.args[1] if node.target == "size" and len(node.args) > 1 else node.kwargs.get("dim")
        return call if axis is None else self.graph.call_function(FUNCTIONS["getitem"].run, (call, axis))


def _bounds_of(layer: nn.Module) -> tuple[str, float | None]:
    """(function, ceiling) of an activation module; ("", None) if its bounds make no neuron."""
    if isinstance(layer, ReLU):
        return ("relu", None) if layer.ceiling is None else ("clamp", layer.ceiling)
    if isinstance(layer, nn.ReLU6):
        return "relu6", 6.0
    if isinstance(layer, nn.Hardtanh):
        return ("clamp", float(layer.max_val)) if layer.min_val == 0 and layer.max_val > 0 else ("", None)
    return "relu", None


def _batch_norm(layer: nn.Module) -> Verdict:
    if getattr(layer, "running_mean", None) is None:
        reason = "batch norm without running statistics depends on the other samples of the batch"
        return refuse("BatchNorm", reason, "train with track_running_stats=True")
    return Verdict("folded", "into the convolution before it, or kept as one affine map")


def _plain_args(node: fx.Node, name: str) -> tuple[Any, ...]:
    """Arguments of a method call in the order of the torch function of the same name."""
    args = node.args
    if name == "permute" and node.op == "call_method" and len(args) > 2:
        return (args[0], tuple(args[1:]))
    if name in ("mean", "sum") and node.op == "call_method" and len(args) > 2 and not isinstance(args[2], bool):
        return (args[0], tuple(args[1:]))
    return tuple(args)


def _reshape_args(node: fx.Node, sizes: Sizes) -> tuple[Any, ...]:
    """`view(x.size(0), -1)` as `reshape(x, (-1, F))`: the batch axis is inferred, since time will be folded into it."""
    dims: Any = node.args[1:] if len(node.args) > 1 else (node.kwargs["shape"],)
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    result = sizes.shapes[node.name]
    if len(dims) == 1 and isinstance(dims[0], fx.Node) and len(result) > 1:
        dims = result  # view(x.shape), view(x.shape[:2] + (-1,))
    tail = list(dims[1:])
    return (node.args[0], (-1, *(result[i + 1] if size == -1 else size for i, size in enumerate(tail))))
