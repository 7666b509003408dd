"""Decide for every node of a captured graph what becomes of it, and bring those that stay into one spelling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from operator import add, attrgetter, neg
from typing import Any

import torch
from torch import Tensor, fx, nn

from quickspike import piecewise
from quickspike.capture import AnyBatchNorm, Sizes, scope_of, scopes_of, source_of
from quickspike.coverage import SHOWN, Coverage, Finding, Status
from quickspike.errors import OptionError
from quickspike.operators import (
    ANALOG_LAYERS,
    DROPOUT_LAYERS,
    DROPOUTS,
    FUNCTIONS,
    LAYERS,
    MAX_POOL_FUNCTIONS,
    MAX_POOLS,
    NO_OPERATION_LAYERS,
    NO_OPERATIONS,
    SPELLINGS,
    STOCHASTIC_DEPTH,
    Affine,
    Function,
    ReLU,
)
from quickspike.piecewise import PIECES, Piecewise

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, AnyBatchNorm)
LINES = "lines"
"""Key of a node's meta: the sum of pieces that its activation becomes."""


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
    error: float = 0.0


DEFAULT_WAY_OUT = "replace it by a supported operator (docs/operators.md) and fine-tune, or convert only the part that has none"
WAYS_OUT: tuple[tuple[tuple[str, ...], str], ...] = (
    (("with_indices",), "leave the indices out; where unpooling needs them, use average pooling"),
    (("softmax",), "at the output: return the logits, the readout averages them; elsewhere: keep it analog"),
    (
        ("layernorm", "layer_norm", "groupnorm", "group_norm", "instancenorm", "instance_norm", "rmsnorm", "rms_norm"),
        "train with batch norm, which folds into the weights",
    ),
    (("multiheadattention",), "batch_first=True, no masks, and only its first result read; then analog=('MultiheadAttention',) keeps it"),
    (("attention", "matmul", "bmm", "einsum", "scaled_dot"), "use a convolutional network"),
)


def classify(
    module: fx.GraphModule,
    sizes: Sizes,
    network: str,
    keep_dropout: bool = False,
    analog: Sequence[str] = (),
    pieces: int = PIECES,
) -> Coverage:
    """Find out what becomes of every node; rewrite the accepted ones into their canonical form, in place.

    Args:
        module: the captured graph.
        sizes: of every node's value.
        network: name for the report.
        keep_dropout: leave dropout layers in the graph, for training; they go when the graph is folded.
        analog: patterns of names (`head.*`) or operators (`SiLU`) of what is computed on real values at every step; those of a
            layer that holds others stand for all that it computes.
        pieces: straight lines that a smooth activation is approximated by.

    Raises:
        OptionError: a pattern fits nothing that could be kept on real values, or pieces < 2.
    """
    if type(pieces) is not int or not 2 <= pieces <= 64:
        raise OptionError(f"pieces must be a whole number in [2, 64], got {pieces!r}")
    classifier = _Classifier(module, sizes, keep_dropout, analog, pieces)
    findings = []
    edits = []
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or sizes.kinds[node.name] in ("number", "batch_size") or _is_size(node, sizes):
            continue
        verdict = classifier.verdict(node)
        edits.append(verdict.edit)
        name, operator = _name(node), _operator(node, module)
        findings.append(Finding(name, operator, verdict.status, verdict.reason, verdict.way_out, source_of(node), verdict.error))
    for pattern in analog:
        if pattern not in classifier.used:
            raise OptionError(f"analog={pattern!r} fits {classifier.only_affine(pattern, network)}; {_LISTED}")
    coverage = Coverage(network, tuple(findings))
    if not coverage.unsupported:
        for edit in filter(None, edits):
            edit()
        classifier.canonical_sizes()
        module.graph.eliminate_dead_code()
        module.recompile()
    return coverage


_NOR_ANALOG = ", and is not among what can be kept on real values"
_LISTED = "`quickspike inspect --json` lists names and operators, and layers that hold others can be named too"


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
    if not way_out and (flat in FUNCTIONS or flat in _ANALOG_NAMES):
        way_out = next((f"{text}; or " for words, text in WAYS_OUT if any(word in flat for word in words)), "")
        return Verdict("unsupported", reason, f"{way_out}keep it on real values: analog=({operator!r},), --analog {operator}")
    fitting = (text for words, text in WAYS_OUT if any(word in flat for word in words))
    return Verdict("unsupported", reason, way_out or next(fitting, DEFAULT_WAY_OUT))


_ASKS_NOTHING = (*NO_OPERATIONS, *DROPOUTS, *MAX_POOL_FUNCTIONS)
_ANALOG_NAMES = {cls.__name__.lower() for cls in ANALOG_LAYERS}


class _Classifier:
    """Verdicts for the nodes of one graph, in order; remembers which values have already passed a neuron."""

    def __init__(self, module: fx.GraphModule, sizes: Sizes, keep_dropout: bool, analog: Sequence[str], pieces: int) -> None:
        self.module, self.graph, self.sizes, self.keep_dropout = module, module.graph, sizes, keep_dropout
        self.analog, self.pieces = analog, pieces
        self.spiking: set[fx.Node] = set()
        self.used: set[str] = set()
        """Patterns that fitted something."""

    def _kept_analog(self, node: fx.Node) -> bool:
        """True if the user wants this call on real values."""
        fitting = self._fitting(node)
        self.used.update(fitting)
        return bool(fitting)

    def _fitting(self, node: fx.Node) -> list[str]:
        """Patterns that fit this call, or a layer that it is computed in."""
        texts = {_name(node), _operator(node, self.module), *(text for scope in scopes_of(node) for text in scope)}
        return [pattern for pattern in self.analog if any(fnmatchcase(text, pattern) for text in texts)]

    def only_affine(self, pattern: str, network: str) -> str:
        """What a pattern fits that asks for nothing."""
        calls = (node for node in self.graph.nodes if node.op.startswith("call_") and pattern in self._fitting(node))
        names = list(dict.fromkeys(_operator(node, self.module) for node in calls))
        if not names:
            return f"no call of {network}"
        return f"nothing of {network} that spikes could not carry: only {', '.join(names[:SHOWN])}, which are affine or pool, or dropped"

    def verdict(self, node: fx.Node) -> Verdict:
        problem = self._batch_problem(node)
        if problem:
            # Its refusal says more than that the pattern fits nothing.
            self._kept_analog(node)
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
        layer: Any = self.module.get_submodule(str(node.target))
        kind, name = type(layer), type(layer).__name__
        kept = kind not in (*LAYERS, *MAX_POOLS, *BATCH_NORMS, *NO_OPERATION_LAYERS) and self._kept_analog(node)
        if kind in ANALOG_LAYERS and (kept or (kind not in piecewise.LAYERS and not self._after_neurons(node))):
            return self._real(node, partial(_not_in_place, layer))
        if kind in piecewise.LAYERS:
            try:
                lines = piecewise.LAYERS[kind](layer, self.pieces)
            except ValueError as error:
                return refuse(name, f"{layer}: {error}", "use usual numbers")
            return self._activation(node, lines, str(node.target), getattr(layer, "weight", None))
        if kind is ReLU:
            return self._activation(node, piecewise.clamped(0.0, layer.ceiling), str(node.target))
        if kind in LAYERS:
            return Verdict("analog")
        if kind in MAX_POOLS:
            return self._max_pool(node, layer)
        if kind in BATCH_NORMS:
            return _batch_norm(layer)
        if isinstance(layer, NO_OPERATION_LAYERS):
            return Verdict("removed") if self.keep_dropout and isinstance(layer, DROPOUT_LAYERS) else self._removed(node)
        if kind not in ANALOG_LAYERS and isinstance(layer, (*LAYERS, *ANALOG_LAYERS, *BATCH_NORMS)):
            return refuse(name, f"{name} is a subclass of a supported layer and may compute something else", "use the base class")
        return refuse(name, f"{name} has no exact spiking form{_NOR_ANALOG if kept else ''}")

    def _max_pool(self, node: fx.Node, layer: nn.Module) -> Verdict:
        if getattr(layer, "return_indices", False):
            return refuse("MaxPool", "max-pooling that returns indices has no spiking form", "use average pooling")
        return Verdict("analog", "max-pooling of accumulated currents, in front of the neuron where that is exact")

    # Functions and methods

    def _call(self, node: fx.Node) -> Verdict:
        target, name = node.target, _function_name(node)
        known = SPELLINGS.get(target)
        kept = not (known and known.affine) and target not in _ASKS_NOTHING and self._kept_analog(node)
        if known and not known.affine and (kept or (name not in piecewise.FUNCTIONS and not self._after_neurons(node))):
            return self._real(node, lambda: self._replace(node, partial(self._plain_call, node, known)))
        if known and name in piecewise.FUNCTIONS:
            return self._activation_call(node, name)
        if target in NO_OPERATIONS:
            return self._removed(node)
        if target in DROPOUTS:
            return self._dropout(node, 2)
        if getattr(target, "__module__", "") == STOCHASTIC_DEPTH:
            return self._dropout(node, 3)
        if target in MAX_POOL_FUNCTIONS:
            return self._max_pool_call(node)
        if known and known.affine:
            return self._function(node, known)
        return refuse(name, f"{name}() has no exact spiking form{_NOR_ANALOG if kept else ''}")

    def _after_neurons(self, node: fx.Node) -> bool:
        return any(parent in self.spiking for parent in node.all_input_nodes)

    def _real(self, node: fx.Node, edit: Callable[[], object]) -> Verdict:
        """A call that is computed on real values."""
        if self._after_neurons(node):
            return Verdict("synapse", "not affine: computed on running means, on real values at every step", edit=edit)
        return Verdict("analog", edit=edit)

    def _plain_call(self, node: fx.Node, function: Function) -> fx.Node:
        args, kwargs = _without_in_place(node, function.name)
        return self.graph.call_function(function.run, args, kwargs)

    def _activation_call(self, node: fx.Node, name: str) -> Verdict:
        args, kwargs = _without_in_place(node, name)
        names, make = piecewise.FUNCTIONS[name]
        values: dict[str, Any] = dict(zip(names, args[1:], strict=False)) | kwargs
        if name == "prelu":
            weight = values.get("weight")
            if not isinstance(weight, fx.Node) or weight.op != "get_attr":
                return refuse(name, "its slopes are no parameter", "use nn.PReLU")
            return self._activation(node, piecewise.leaky(0.0), "", weight)
        if any(isinstance(value, fx.Node) for value in values.values()):
            return refuse(name, "its bounds are computed in forward()", "use fixed numbers")
        try:
            return self._activation(node, make(self.pieces, **values))
        except (TypeError, ValueError) as error:
            return refuse(name, f"{name} with {values}: {error}")

    def _activation(self, node: fx.Node, lines: Piecewise | None, module_name: str = "", slopes: Any = None) -> Verdict:
        """A neuron, or several on straight lines."""
        name = _operator(node, self.module)
        if lines is None:
            return refuse(name, "jumps, which no sum of ReLUs does", "let its value meet its threshold")
        if not lines.pieces or not all(map(math.isfinite, (lines.constant, *(part for piece in lines.pieces for part in piece.numbers)))):
            return refuse(name, "has bounds that make no activation", "clamp at min=0")
        if lines.constant == 0 and slopes is None and len(lines.pieces) == 1 and lines.pieces[0].is_relu:
            ceiling = lines.pieces[0].ceiling
            function = "relu" if ceiling is None else "relu6" if ceiling == 6 else "clamp"
            return self._site(node, function, ceiling, module_name)
        if problem := self._site_problem(node, name):
            return problem

        def edit() -> None:
            if slopes is None:
                node.meta[LINES] = lines
            else:
                self._replace(node, partial(self._with_slopes, node, slopes, module_name))
                if module_name and not any(other.op == "call_module" and other.target == module_name for other in self.graph.nodes):
                    # The neurons have taken over its slopes, and take its name.
                    self.module.set_submodule(module_name, nn.Module())
                return
            node.meta["module_name"] = module_name or node.meta.get("module_name", "")

        count = len(lines.pieces) + (slopes is not None)
        reason = f"a sum of {count} clamped ReLUs, " + (f"off by at most {lines.error:.2g}" if lines.error else "exact")
        return Verdict("neuron", reason, edit=edit, error=lines.error)

    def _with_slopes(self, node: fx.Node, slopes: Any, module_name: str) -> fx.Node:
        """PReLU: relu(x) - slope * relu(-x), with learned slopes."""
        call = self.graph.call_function
        below = call(activate, (call(neg, (node.args[0],)),))
        above = call(activate, (node.args[0],))
        place: dict[str, Any] = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        for site in (below, above):
            site.meta.update(place, function="prelu", ceiling=None, module_name=module_name or node.meta.get("module_name", ""))
        weight = slopes if isinstance(slopes, Tensor) else attrgetter(str(slopes.target))(self.module)
        channels = self.sizes.shapes[node.name][1]
        affine = Affine(channels).to(weight)
        with torch.no_grad():
            affine.weight.copy_(-weight.expand(channels))
        name = f"{node.name}_slopes"
        self.module.add_submodule(name, affine.requires_grad_(False))
        return call(add, (above, self.graph.call_module(name, (below,))))

    def _dropout(self, node: fx.Node, place: int) -> Verdict:
        training = node.args[place] if len(node.args) > place else node.kwargs.get("training", True)
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

        if function.name == "mul" and len([arg for arg in node.args if self._is_signal(arg)]) > 1 and self._after_neurons(node):
            self._kept_analog(node)
            reason = "product of two signals: of running means, so that the mean is exact; multiplies at every step"
            return Verdict("synapse", reason, edit=lambda: self._replace(node, partial(self._plain_call, node, function)))

        signal: Any = node.args[0] if node.args else None
        axes = len(self.sizes.shapes.get(signal.name, ())) if self._is_signal(signal) else 0

        # The arguments are read when the edit runs: earlier edits will have replaced some of them.
        def make() -> fx.Node:
            if function.name == "expand":
                return self.graph.call_function(function.run, (node.args[0], -1, *self._tail(node)))
            if function.name == "reshape":
                return self._reshape(node, axes)
            # The arithmetic of the operator module takes no keywords; alpha=1 and rounding_mode=None may be left out.
            kwargs = {} if getattr(function.run, "__module__", "") == "_operator" else dict(node.kwargs)
            return self.graph.call_function(function.run, _plain_args(node, function.name), kwargs)

        return Verdict("analog", edit=lambda: self._replace(node, make))

    def _reshape(self, node: fx.Node, axes: int) -> fx.Node:
        """`view(x.size(0), -1)` and its like, with the batch size that x has here: time will be folded into it.

        Args:
            node: the call.
            axes: of x if it is a signal, else 0.
        """
        call, tail = self.graph.call_function, self._tail(node)
        if axes > 1 and len(tail) == 1 and (tail == [-1] or (isinstance(tail[0], int) and self._counts_features(node))):
            return call(torch.flatten, (node.args[0], 1))
        batch = call(FUNCTIONS["getitem"].run, (call(FUNCTIONS["shape"].run, (node.args[0],)), 0)) if axes else -1
        return call(FUNCTIONS["reshape"].run, (node.args[0], (batch, *tail)))

    def _counts_features(self, node: fx.Node) -> bool:
        """True if whatever reads this value refuses another number of features."""

        def refuses(user: fx.Node) -> bool:
            layer = self.module.get_submodule(str(user.target)) if user.op == "call_module" else None
            if isinstance(layer, NO_OPERATION_LAYERS) or user.target in (*NO_OPERATIONS, *DROPOUTS):
                return self._counts_features(user)
            return type(layer) in (nn.Linear, nn.BatchNorm1d)

        return bool(node.users) and all(map(refuses, node.users))

    def _tail(self, node: fx.Node) -> list[Any]:
        """The sizes that a reshape or an expansion asks for, but for the batch; as numbers, -1, or nodes."""
        asked: Any = node.args[1:] if len(node.args) > 1 else (node.kwargs.get("shape", node.kwargs.get("size")),)
        if len(asked) == 1 and isinstance(asked[0], (tuple, list)):
            asked = asked[0]
        result = self.sizes.shapes[node.name]
        if len(asked) == 1 and isinstance(asked[0], fx.Node) and len(result) > 1:
            # view(x.shape), view(x.shape[:2] + (-1,))
            return [self.graph.call_function(FUNCTIONS["getitem"].run, (asked[0], axis)) for axis in range(1, len(result))]
        return list(asked[1:])

    def _argument_problem(self, node: fx.Node, name: str) -> tuple[str, str] | None:
        """Why this call is not affine in the signal, with the way out; None if it is."""
        parents = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
        signals = [arg for arg in parents if self.sizes.kinds[arg.name] == "batched"]
        if name == "floordiv" or node.kwargs.get("rounding_mode") is not None:
            return "rounds, which is not affine", DEFAULT_WAY_OUT
        if name not in ("reshape", "expand") and any(self.sizes.kinds[arg.name] == "batch_size" for arg in node.all_input_nodes):
            return "uses the batch size as a value", "use a constant; time is folded into the batch"
        if name == "expand" and not (signals and len(self.sizes.shapes[signals[0].name]) == len(self.sizes.shapes[node.name])):
            return "gives something without a batch axis one", "add it by broadcasting"
        if name == "squeeze" and (len(node.args) + len(node.kwargs) < 2):
            return "drops the batch axis of a single sample", "name the axes, for example squeeze(-1)"
        if name == "div" and isinstance(node.args[1], fx.Node) and node.args[1] in signals:
            return None if self._kept_analog(node) else ("divides by a signal", "divide by a constant, or keep it analog")
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

    def _is_signal(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and self.sizes.kinds[value.name] == "batched"

    # Edits

    def _site_problem(self, node: fx.Node, function: str) -> Verdict | None:
        if self.sizes.kinds[node.name] == "static":
            return refuse(function, "acts on a parameter, not on a signal", "compute it once, and keep the result as the parameter")
        if len(self.sizes.shapes.get(node.name, (0, 0))) < 2:
            return refuse(function, "acts on one number per sample without an axis of channels", "keep the axis: [B, 1]")
        return None

    def _site(self, node: fx.Node, function: str, ceiling: float | None, module_name: str = "") -> Verdict:
        if problem := self._site_problem(node, function):
            return problem

        def make() -> fx.Node:
            call = self.graph.call_function(activate, (node.args[0],))
            call.meta.update(function=function, ceiling=ceiling, module_name=module_name or node.meta.get("module_name", ""))
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
            if not _is_size(node, self.sizes):
                continue
            self._replace(node, partial(self._sizes_call, node, shape))

    def _sizes_call(self, node: fx.Node, shape: Callable[..., Any]) -> fx.Node:
        call = self.graph.call_function(shape, (node.args[0],))
        axis = node.args[1] if node.target == "size" and len(node.args) > 1 else node.kwargs.get("dim")
        return call if axis is None else self.graph.call_function(FUNCTIONS["getitem"].run, (call, axis))


def _not_in_place(layer: Any) -> None:
    if hasattr(layer, "inplace"):
        layer.inplace = False


IN_PLACE = {
    "relu": 1,
    "relu6": 1,
    "silu": 1,
    "hardswish": 1,
    "mish": 1,
    "selu": 1,
    "hardsigmoid": 1,
    "elu": 2,
    "celu": 2,
    "leaky_relu": 2,
} | {
    "hardtanh": 3,
    "threshold": 3,
}
"""Place of the argument `inplace` of torch's functions."""


def _without_in_place(node: fx.Node, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = node.args[: IN_PLACE.get(name, len(node.args))]
    if name == "where" and node.op == "call_method":
        # x.where(condition, y) is where(condition, x, y).
        args = (args[1], args[0], *args[2:])
    return tuple(args), {key: value for key, value in node.kwargs.items() if key not in ("inplace", "_stacklevel")}


def _batch_norm(layer: nn.Module) -> Verdict:
    if getattr(layer, "running_mean", None) is None:
        reason = "batch norm without running statistics depends on the other samples of the batch"
        return refuse("BatchNorm", reason, "train with track_running_stats=True")
    return Verdict("folded", "into the convolution before it, or kept as one affine map")


def _plain_args(node: fx.Node, name: str) -> tuple[Any, ...]:
    """Arguments of a method call in the order of the torch function of the same name."""
    args = node.args
    if name in ("permute", "flip") and node.op == "call_method" and len(args) > 2:
        return (args[0], tuple(args[1:]))
    if name in ("mean", "sum") and node.op == "call_method" and len(args) > 2 and not isinstance(args[2], bool):
        return (args[0], tuple(args[1:]))
    return tuple(args)
