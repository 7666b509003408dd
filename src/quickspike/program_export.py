"""A spiking network as plain torch operators, and as a torch.export program (`.pt2`) that needs nothing of quickspike to run.

What the layers that know time compute is written here once, over an `Arithmetic`: torch's own for programs, and nodes of
a graph for ONNX (`quickspike.onnx_export`). Every operation and its rounding is that of the reference in `neuron.py`.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.passes.shape_prop import ShapeProp

from quickspike.capture import free_name
from quickspike.conversion import SpikingNetwork
from quickspike.errors import CheckpointError, ConversionError, OptionError
from quickspike.files import write_bytes
from quickspike.neuron import AccumulatedMaxPool, Increment, Neuron, Repeat, RunningMean, Timed, levels_of, unfold
from quickspike.operators import FUNCTION_NAMES
from quickspike.readouts import LeakyReadout
from quickspike.version import __version__

FORMAT = 1
"""Version of what exported files say about themselves; a reader refuses a newer one."""
_SEAL = re.compile(rb"quickspike sha256=([0-9a-f]{64})\Z")
_POOLS = {"avg_pool2d": nn.AvgPool2d, "avg_pool3d": nn.AvgPool3d}

Value = TypeVar("Value")


class Arithmetic(abc.ABC, Generic[Value]):
    """What layers that know time are made of. Values of T steps lie along the batch axis, time first."""

    @abc.abstractmethod
    def add(self, a: Value, b: Value) -> Value: ...

    @abc.abstractmethod
    def sub(self, a: Value, b: Value) -> Value: ...

    @abc.abstractmethod
    def mul(self, a: Value, b: Value) -> Value: ...

    @abc.abstractmethod
    def div(self, a: Value, b: Value) -> Value: ...

    @abc.abstractmethod
    def number(self, number: float) -> Value: ...

    @abc.abstractmethod
    def reached(self, a: Value, b: Value, strict: bool) -> Value:
        """1 where a >= b, or a > b if strict, else 0."""

    @abc.abstractmethod
    def split(self, x: Value, steps: int) -> Sequence[Value]:
        """`[T*B, ...]` as T values `[B, ...]`."""

    @abc.abstractmethod
    def join(self, parts: Sequence[Value]) -> Value:
        """The inverse of `split`."""


class RunningSum(nn.Module):
    """The sum of all inputs so far: the first half of an accumulated max-pooling, in front of the pool."""


class Difference(nn.Module):
    """What each step adds to the step before: the second half, behind the pool."""


class Readout(nn.Module):
    """The mean over the steps, `[T*B, K]` to `[B, K]`."""


State = Mapping[str, Value]
"""What a layer keeps from step to step, by name; empty before the first step of a network that is unrolled."""


@dataclass(frozen=True)
class Cell:
    """A layer with time, and the tensors that it computes with as they act: thresholds bounded, heights absolute."""

    layer: nn.Module
    tensors: Mapping[str, Tensor]
    """Those that matter: no leak where nothing leaks, no height where it is 1 or the threshold."""
    at_threshold: bool = False
    """Spikes are as high as the threshold."""


@torch.no_grad()
def cell_of(layer: nn.Module) -> Cell:
    """What to compute for a layer with time."""
    if not isinstance(layer, Neuron):
        return Cell(layer, {})
    theta, leak = layer.bounded()
    height = layer.amplitude * theta if layer.scaled else layer.amplitude
    initial = layer.start(theta)
    if layer.members > 1:
        # Of the first member; the others have multiples of it.
        theta, height = theta / layer.members, height / layer.members
    tensors = {"threshold": theta.clone(), "initial": initial}
    at_threshold = height.shape == theta.shape and torch.equal(height, theta)
    if not bool((leak == 1).all()):
        tensors["leak"] = leak.clone()
    if not at_threshold and not bool((height == 1).all()):
        tensors["height"] = height.clone()
    return Cell(layer, tensors, at_threshold)


def computed(
    ops: Arithmetic[Value], cell: Cell, tensors: Mapping[str, Value], x: Value, state: State[Value], steps: int
) -> tuple[Value, dict[str, Value]]:
    """(outputs, new state) of a layer with time for the next steps.

    Args:
        ops: what computes.
        cell: the layer.
        tensors: the cell's own as values of `ops`.
        x: `[steps*B, ...]`; `[B, ...]` where it is the same at every step.
        state: empty at the beginning; `done` is the number of steps so far, of layers that count.
        steps: how many.

    Raises:
        ConversionError: the layer is of a type that has no place in a converted network.
    """
    layer = cell.layer
    if isinstance(layer, Neuron):
        return _neuron(ops, cell, layer, tensors, x, state, steps)
    if isinstance(layer, Repeat):
        return ops.join([x] * steps), {}
    parts = ops.split(x, steps)
    if isinstance(layer, RunningMean):
        sums = _sums(ops, parts, state.get("total"))
        return ops.join([_over(ops, total, state, number) for number, total in enumerate(sums, 1)]), {"total": sums[-1]}
    if isinstance(layer, Increment):
        sums = [_times(ops, part, state, number) for number, part in enumerate(parts, 1)]
        return _differences(ops, sums, state)
    if isinstance(layer, RunningSum):
        sums = _sums(ops, parts, state.get("total"))
        return ops.join(sums), {"total": sums[-1]}
    if isinstance(layer, Difference):
        return _differences(ops, parts, state)
    if isinstance(layer, LeakyReadout):
        return _leaky(ops, layer, parts, state)
    if isinstance(layer, Readout):
        return ops.div(_sums(ops, parts, None)[-1], ops.number(steps)), {}
    raise ConversionError(f"a layer of type {type(layer).__name__} cannot be exported; export the network as `convert` gives it")


def _neuron(
    ops: Arithmetic[Value], cell: Cell, layer: Neuron, tensors: Mapping[str, Value], x: Value, state: State[Value], steps: int
) -> tuple[Value, dict[str, Value]]:
    theta = tensors["threshold"]
    parts = [x] * steps if layer.constant_input else list(ops.split(x, steps))
    if layer.averaged and not layer.constant_input and steps > 1:
        parts = [ops.div(_sums(ops, parts, None)[-1], ops.number(steps))] * steps
    if layer.weighted:
        return _weighted(ops, cell, layer, tensors, parts[0], steps), {}
    v, left = state.get("v", tensors["initial"]), state.get("left")
    fired, resets = list[Value](), list[Value]()
    for part in parts:
        m = ops.add(part, ops.mul(tensors["leak"], v) if "leak" in tensors else v)
        spikes = ops.reached(m, theta, layer.strict)
        for member in range(2, layer.members + 1):
            spikes = ops.add(spikes, ops.reached(m, ops.mul(theta, ops.number(member)), layer.strict))
        if layer.signed:
            # Before the first step there is nothing to take back.
            spikes = spikes if left is None else ops.sub(spikes, _taken_back(ops, m, left))
            left = spikes if left is None else ops.add(left, spikes)
        fired.append(spikes)
        resets.append(ops.mul(spikes, theta))
        v = ops.mul(m, ops.sub(ops.number(1), spikes)) if layer.to_zero else ops.sub(m, resets[-1])
    out = ops.join(resets if cell.at_threshold else fired)
    return ops.mul(out, tensors["height"]) if "height" in tensors else out, {"v": v} | ({} if left is None else {"left": left})


def _weighted(ops: Arithmetic[Value], cell: Cell, layer: Neuron, tensors: Mapping[str, Value], z: Value, steps: int) -> Value:
    """Spikes weighted by their step, for the mean current z."""
    levels, theta = ops.number(levels_of(steps)), tensors["threshold"]
    unit, m = ops.div(theta, levels), ops.add(z, ops.div(tensors["initial"], levels))
    height = theta if cell.at_threshold else tensors.get("height")
    out = list[Value]()
    for place in reversed(range(steps)):
        threshold = ops.mul(unit, ops.number(2.0**place))
        spikes = ops.reached(m, threshold, layer.strict)
        m = ops.sub(m, ops.mul(spikes, threshold))
        weight = ops.number(steps * (2.0**place / levels_of(steps)))
        out.append(ops.mul(spikes, weight if height is None else ops.mul(height, weight)))
    return ops.join(out)


def _taken_back(ops: Arithmetic[Value], m: Value, left: Value) -> Value:
    zero = ops.number(0)
    return ops.mul(ops.reached(zero, m, True), ops.reached(left, zero, True))


def _sums(ops: Arithmetic[Value], parts: Sequence[Value], total: Value | None) -> list[Value]:
    sums = list[Value]()
    for part in parts:
        total = part if total is None else ops.add(total, part)
        sums.append(total)
    return sums


def _differences(ops: Arithmetic[Value], sums: Sequence[Value], state: State[Value]) -> tuple[Value, dict[str, Value]]:
    before = [state.get("last"), *sums[:-1]]
    return ops.join([now if last is None else ops.sub(now, last) for last, now in zip(before, sums, strict=True)]), {"last": sums[-1]}


def _leaky(ops: Arithmetic[Value], layer: LeakyReadout, parts: Sequence[Value], state: State[Value]) -> tuple[Value, dict[str, Value]]:
    """What the mean so far, in which old steps fade, adds at every step, times their number."""
    leak, total, weight, sums = ops.number(layer.leak), state.get("total"), 0.0, list[Value]()
    running = state.get("weight")
    for number, part in enumerate(parts, 1):
        total = part if total is None else ops.add(ops.mul(total, leak), part)
        if running is None:
            weight = layer.leak * weight + 1
            sums.append(ops.mul(total, ops.number(number / weight)))
        else:
            running = ops.add(ops.mul(running, leak), ops.number(1))
            sums.append(ops.mul(total, ops.div(_count(ops, state, number), running)))
    out, after = _differences(ops, sums, state)
    return out, after | {"total": cast(Value, total)} | ({} if running is None else {"weight": running})


def _over(ops: Arithmetic[Value], total: Value, state: State[Value], number: int) -> Value:
    return ops.div(total, _count(ops, state, number)) if number > 1 or "done" in state else total


def _times(ops: Arithmetic[Value], part: Value, state: State[Value], number: int) -> Value:
    return ops.mul(part, _count(ops, state, number)) if number > 1 or "done" in state else part


def _count(ops: Arithmetic[Value], state: State[Value], number: int) -> Value:
    return ops.add(state["done"], ops.number(number)) if "done" in state else ops.number(number)


class _Torch(Arithmetic[Tensor]):
    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        return a / b

    def number(self, number: float) -> Any:
        return float(number)

    def reached(self, a: Tensor, b: Tensor, strict: bool) -> Tensor:
        # Either may be a plain number.
        return (a > b if strict else a >= b).to(torch.float32)

    def split(self, x: Tensor, steps: int) -> Sequence[Tensor]:
        return [x] if steps == 1 else unfold(x, steps).unbind(0)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Plain(nn.Module):
    """A layer with time, over all T steps, as plain operators."""

    def __init__(self, layer: nn.Module, steps: int) -> None:
        super().__init__()
        cell = cell_of(layer)
        # In a list, since the layer's parameters would become this module's.
        self.cell, self.steps = [cell], steps
        for name, tensor in cell.tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return computed(_Torch(), self.cell[0], dict(self.named_buffers()), x, {}, self.steps)[0]


class WindowSum(nn.Module):
    """An average pooling with a divisor of its own, as a convolution: exporters leave the divisor out."""

    def __init__(self, channels: int, window: Sequence[int], stride: Sequence[int], padding: Sequence[int], divisor: int) -> None:
        super().__init__()
        self.window, self.divisor = (list(stride), list(padding), [1] * len(window), channels), divisor
        self.register_buffer("ones", torch.ones(channels, 1, *window))

    def forward(self, x: Tensor) -> Tensor:
        convolution: Any = torch.conv2d if x.ndim == 4 else torch.conv3d
        total = cast(Tensor, convolution(x, self.ones, None, *self.window))
        return total if self.divisor == 1 else total / self.divisor


def timed_layers(module: fx.GraphModule) -> dict[str, nn.Module]:
    """The layers with time by name, in the order of their calls; each is called once."""
    layers = ((str(node.target), module.get_submodule(str(node.target))) for node in module.graph.nodes if node.op == "call_module")
    return {name: layer for name, layer in layers if isinstance(layer, (Timed, RunningSum, Difference, Readout))}


def plain_copy(snn: SpikingNetwork) -> fx.GraphModule:
    """A copy of the graph of `snn`, on the CPU, ready to be exported once its layers with time are replaced.

    Raises:
        OptionError: the network was accelerated, is not in single precision, or has neurons with a first run.
        ConversionError: it holds an operator that exporters do not have.
    """
    if "engine" in snn.provenance or snn.summed:
        name = snn.provenance.get("engine", {}).get("name", "count")
        raise OptionError(f"this network was made for the {name} engine; export the one that it was made from")
    snn.refuse_first_runs("a file for other programs")
    other = [tensor.dtype for tensor in snn.state_dict().values() if tensor.is_floating_point() and tensor.dtype != torch.float32]
    if other:
        raise OptionError(f"networks are exported in float32, but this one holds {other[0]}; call snn.float() first")
    module = copy.deepcopy(snn.network).eval().cpu().requires_grad_(False).to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        ShapeProp(module).propagate(torch.zeros(1, *snn.input_shape))
    for node in list(module.graph.nodes):
        layer: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, AccumulatedMaxPool):
            _split_pool(module, node, layer)
        elif node.op == "call_function" and FUNCTION_NAMES.get(node.target) in _POOLS:
            pool: Any = _POOLS[FUNCTION_NAMES[node.target]]
            _sum_instead(module, node, pool(*node.args[1:], **node.kwargs))
        elif type(layer) in _POOLS.values():
            _sum_instead(module, node, layer)
    module.graph.lint()
    return fx.GraphModule(module, module.graph)


def _split_pool(module: fx.GraphModule, node: fx.Node, layer: AccumulatedMaxPool) -> None:
    name = str(node.target)
    base = name.replace(".", "_")
    before, after = (free_name(module, f"{base}_{part}") for part in ("sums", "differences"))
    module.add_submodule(before, RunningSum())
    module.add_submodule(after, Difference())
    module.set_submodule(name, layer.pool)
    parent = node.all_input_nodes[0]
    with module.graph.inserting_before(node):
        start = module.graph.call_module(before, (parent,))
    with module.graph.inserting_after(node):
        end = module.graph.call_module(after, (node,))
    start.meta, end.meta = dict(parent.meta), dict(node.meta)
    node.replace_input_with(parent, start)
    node.replace_all_uses_with(end, delete_user_cb=lambda user: user is not end)


def _sum_instead(module: fx.GraphModule, node: fx.Node, pool: Any) -> None:
    """Put a `WindowSum` in the place of a pooling with a divisor of its own."""
    if pool.divisor_override is None:
        return
    if pool.ceil_mode:
        raise ConversionError(f"{node.name}: average pooling with ceil_mode and divisor_override cannot be exported; leave out one of them")
    shape = node.all_input_nodes[0].meta["tensor_meta"].shape
    window, stride, padding = (
        [size] * (len(shape) - 2) if isinstance(size, int) else list(size) for size in (pool.kernel_size, pool.stride, pool.padding)
    )
    name = free_name(module, f"{node.name}_sum")
    module.add_submodule(name, WindowSum(shape[1], window, stride, padding, pool.divisor_override))
    node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}


def read_out(module: fx.GraphModule) -> None:
    """Let the graph give the mean over the steps, in place."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    made = dict[fx.Node, fx.Node]()

    def averaged(node: fx.Node) -> fx.Node:
        if node not in made:
            name = free_name(module, "readout")
            module.add_submodule(name, Readout())
            with module.graph.inserting_before(output):
                made[node] = module.graph.call_module(name, (node,))
        return made[node]

    output.args = cast(Any, map_arg(output.args, averaged))


def exported(module: fx.GraphModule, replace: Callable[[str, nn.Module], nn.Module], shape: Sequence[int]) -> torch.export.ExportedProgram:
    """The graph as torch.export records it for batches of any size.

    Args:
        module: changed in place.
        replace: what to put in the place of each layer with time.
        shape: of one sample.

    Raises:
        ConversionError: torch.export cannot record it.
    """
    for name, layer in timed_layers(module).items():
        module.set_submodule(name, replace(name, layer))
    module = fx.GraphModule(module, module.graph)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = {0: torch.export.Dim("batch", min=1)}
            return torch.export.export(module, (torch.zeros(2, *shape),), dynamic_shapes=(batch,))
    except Exception as error:  # torch.export raises errors of many types
        reason = str(error).strip().split("\n", 1)[0]
        raise ConversionError(f"torch.export cannot record this network for batches of any size: {reason}") from error


def facts(snn: SpikingNetwork) -> dict[str, Any]:
    """What every exported file says about its network."""
    groups = {name: {"members": neuron.members} for name, neuron in snn.neurons().items() if neuron.members > 1}
    grouped = (
        ". members: a group of M neurons, threshold, height and v(0) those of the first; s(t) = number of i in 1..M with "
        "m(t) >= i threshold"
    )
    return {
        "format": FORMAT,
        "quickspike": __version__,
        "method": snn.method,
        "steps": snn.steps,
        "input_shape": list(snn.input_shape),
        "readout": "mean of the outputs of all steps",
        "rule": "m(t) = leak v(t-1) + current(t); s(t) = 1 if m(t) >= threshold else 0; v(t) = m(t) - threshold s(t); "
        "output(t) = height s(t). strict: m(t) > threshold. signed: s(t) = -1 if m(t) < 0 and the sum of all s before is > 0. "
        "to_zero: v(t) = 0 where s(t) = 1, else m(t). weighted: with w(t) = 2^(T-t)/(2^T - 1) and the mean current z, m(1) = z + "
        "v(0)/(2^T - 1); s(t) = 1 if m(t) >= w(t) threshold else 0; m(t+1) = m(t) - w(t) threshold s(t); output(t) = T w(t) height s(t)"
        + (grouped if groups else ""),
        "neurons": {
            name: {kind: bool(getattr(neuron, kind)) for kind in ("strict", "signed", "averaged", "to_zero", "weighted")}
            | groups.get(name, {})
            for name, neuron in snn.neurons().items()
        },
    }


# Programs


def to_program(snn: SpikingNetwork, path: str | Path) -> None:
    """Write `snn`, unrolled over its T steps, as a torch.export program: images `[B, ...]` to what `snn(images)` gives.

    The file is a `.pt2` archive that `torch.export.load` reads where quickspike is not installed; it is the same byte for
    byte at every export with one version of torch. The size of a batch is free, that of the images is that of the example.

    Args:
        snn: not modified; in float32.
        path: of the file.

    Raises:
        OptionError: the network was accelerated, or is not in float32.
        ConversionError: torch.export cannot record it.
        OutputError: the file cannot be written.
    """
    module = plain_copy(snn)
    read_out(module)
    program = exported(module, lambda _, layer: _Plain(layer, snn.steps), snn.input_shape)
    _forget_source(program)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, stream, extra_files={"quickspike.json": json.dumps(facts(snn), sort_keys=True)})
    write_bytes(path, _sealed(stream.getvalue()))


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """Read what `to_program` wrote; `load_program(path).module()` maps images to logits.

    The checksum finds damage; it is no signature.

    Raises:
        CheckpointError: the file is missing, truncated or altered, or `to_program` did not write it.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    seal = _SEAL.search(data)
    if seal is None:
        raise CheckpointError(f"{path} is no program that quickspike wrote, or its end is missing; export the network again")
    archive = data[: seal.start() - 2] + b"\0\0"
    if hashlib.sha256(archive).hexdigest().encode() != seal[1]:
        raise CheckpointError(f"{path} was altered or damaged: its checksum does not fit; export the network again")
    try:
        return torch.export.load(io.BytesIO(archive))
    except Exception as error:  # whatever a file of another version of torch leads to
        raise CheckpointError(f"{path} cannot be read by torch {torch.__version__}: {error}; export the network again") from error


def _forget_source(program: torch.export.ExportedProgram) -> None:
    """Take out where in whose files each operator was called."""
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
                node.meta.pop(key, None)


def _sealed(archive: bytes) -> bytes:
    """The zip archive with the checksum of all its bytes as its comment, which every reader of zip files passes over."""
    if archive[-2:] != b"\0\0":
        raise ConversionError("this version of torch writes programs with a comment of its own, so there is no place for a checksum")
    seal = b"quickspike sha256=" + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(seal).to_bytes(2, "little") + seal
