"""A spiking network as one ONNX file: unrolled over its T steps, or one step with the state as inputs and outputs.

torch.onnx translates the layers without time. Those with time pass through it as single nodes, and become what
`program_export.computed` says afterwards, so that the numbers are those of the reference. The graph is then written anew
from operators, constants and names alone: nothing of the machine that wrote it is in the file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from quickspike.conversion import SpikingNetwork
from quickspike.engines.integer import ByteConv, ByteLinear, Bytes, available
from quickspike.errors import CheckpointError, ConversionError, OptionError
from quickspike.files import write_bytes
from quickspike.neuron import Increment, Neuron, Repeat, RunningMean
from quickspike.program_export import (
    FORMAT,
    Arithmetic,
    Cell,
    Difference,
    Readout,
    RunningSum,
    cell_of,
    computed,
    exported,
    facts,
    plain_copy,
    read_out,
    timed_layers,
)
from quickspike.readouts import LeakyReadout
from quickspike.structure import places
from quickspike.version import __version__

Form = Literal["unrolled", "step"]

OPSET = 23
"""The newest that torch.onnx writes itself; onnxruntime reads it from version 1.23 on."""
IR_VERSION = 10
"""Of the file format: every program that knows the opset reads it, and nothing of a newer one is needed."""
LARGEST_FILE = 2**31 - 2**20
"""Bytes: protobuf ends at 2 GiB."""
LARGEST_PAIR = 2**15 - 1
"""onnxruntime's kernels for bytes add products in pairs, which saturate here on processors without VNNI (AVX2)."""
DONE = "steps_done"
"""The state that counts steps, where layers need to know."""

_DOMAIN = "quickspike"
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb"quickspike\.sha256\x12\x40([0-9a-f]{64})")
_STATES: dict[type[nn.Module], tuple[str, ...]] = {
    RunningMean: ("total",),
    RunningSum: ("total",),
    **dict.fromkeys((Increment, Difference), ("last",)),
    LeakyReadout: ("total", "last", "weight"),
}
_COUNTING = (RunningMean, Increment, LeakyReadout)
_FOR_ALL = ("weight",)
"""States that are one number for the whole batch."""


def to_onnx(snn: SpikingNetwork, path: str | Path, form: Form = "unrolled", *, integers: bool = False) -> None:
    """Write `snn` as an ONNX file. The same network gives the same bytes, with one version of torch and of onnxscript.

    Its input is `images` `[batch, ...]`: any number of images, of the size that the network was converted with. Its output
    is `logits` `[batch, K]`; where the network gives several tensors, one output each, named after their places.

    `unrolled` computes what `snn(images)` gives. `step` is one time step, for hardware and for streams: its other inputs are
    the states, `layer1.relu.v` for the membrane potentials at site `layer1.relu`, which begin as `initial_states` says; its
    other outputs are the states after the step, `layer1.relu.v.next`; and its `logits` are that step's, so that the answer is
    their mean over the steps. What does not change from step to step is computed again at every one.

    `metadata_props` say in JSON, under "quickspike": method, T, shape of one image, firing rule, readout, states.

    Args:
        snn: not modified; in float32.
        path: of the file.
        form: `unrolled` or `step`.
        integers: for a network that `quantise` made: weights are bytes in front of DequantizeLinear, and the spikes that they
            meet pass QuantizeLinear and DequantizeLinear, all with scale 1. The numbers are the same, as every sum is
            whole and below 2^24. onnxruntime 1.32 runs such linear layers on bytes, and convolutions in floating point, since their
            results have more than 8 bits. Layers whose sums could saturate there stay in floating point; the file names them.

    Raises:
        OptionError: no such form; the network was accelerated, is not in float32 or has no layer in whole numbers for
            integers=True; layers wait for whole windows, which have no form step by step; packages are missing.
        ConversionError: an operator has no form in ONNX, or the file would be larger than 2 GiB.
        OutputError: the file cannot be written.
    """
    if form not in get_args(Form):
        raise OptionError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    for name in ("onnx", "onnxscript"):
        _package(name)
    if form == "step":
        _check_streaming(snn)
    layers = _byte_layers(snn) if integers else {}
    module = plain_copy(snn)
    shapes, outputs = _input_shapes(module), _output_shapes(module)
    if form == "unrolled":
        read_out(module)
    steps = snn.steps if form == "unrolled" else 1
    cells = {name: cell_of(layer) for name, layer in timed_layers(module).items()}
    model = _translated(module, cells, steps, snn.input_shape)
    writer = _Writer(model, cells, steps, shapes if form == "step" else {})
    writer.write()
    kept = writer.quantise(layers) if integers else []
    description = facts(snn) | {"form": form, "states": writer.states}
    if form == "step":
        description["readout"] = "mean of the outputs of all steps, each by itself here"
    if integers:
        description["integers"] = {"weights": writer.weights, "in floating point": kept}
    data = _sealed(writer.model(outputs, snn.input_shape), description)
    write_bytes(path, data)


def check_onnx(path: str | Path) -> dict[str, Any]:
    """What an ONNX file that `to_onnx` wrote says about its network, once its checksum is right. It is no signature.

    Raises:
        CheckpointError: the file is missing, truncated or altered, or `to_onnx` did not write it.
        OptionError: the package onnx is missing.
    """
    onnx = _package("onnx")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    seals = _DIGEST.findall(data)
    if len(seals) != 1:
        raise CheckpointError(f"{path} is no ONNX file that quickspike wrote, or its end is missing; export the network again")
    if hashlib.sha256(data.replace(seals[0], _NO_DIGEST.encode())).hexdigest().encode() != seals[0]:
        raise CheckpointError(f"{path} was altered or damaged: its checksum does not fit; export the network again")
    try:
        entries = {entry.key: entry.value for entry in onnx.load_model_from_string(data).metadata_props}
        description = cast(dict[str, Any], json.loads(entries["quickspike"]))
        version = description["format"]
    except Exception as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error}); export the network again") from error
    if type(version) is not int:
        raise CheckpointError(f"{path}: its metadata names no format version; export the network again")
    if version > FORMAT:
        raise CheckpointError(f"{path} was written by a newer quickspike ({description['quickspike']}); update this one")
    return description


def initial_states(path: str | Path, batch: int) -> dict[str, npt.NDArray[np.float32]]:
    """The states that go into the first step of a file in the form `step`, by input: `[batch, ...]` each.

        states = initial_states("net.onnx", len(images))
        for _ in range(steps):
            found = dict(zip(names, session.run(names, {"images": images, **states})))
            states = {name: found[f"{name}.next"] for name in states}

    Raises:
        CheckpointError: see `check_onnx`.
        OptionError: the file is not in that form.
    """
    description = check_onnx(path)
    if description["form"] != "step":
        raise OptionError(f"{path} is {description['form']} and has no states; export it with form='step'")
    return {name: _beginning(state, batch) for name, state in description["states"].items()}


def _beginning(state: Mapping[str, Any], batch: int) -> npt.NDArray[np.float32]:
    initial = np.array(state["initial"], np.float32).reshape(state["initial_shape"])
    return initial if state["shape"] is None else np.broadcast_to(initial, (batch, *state["shape"])).copy()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f"ONNX files need the package {name}; pip install 'quickspike[onnx]'") from error


def _check_streaming(snn: SpikingNetwork) -> None:
    waiting = snn.waiting()
    if waiting and snn.steps > 1:
        raise OptionError(
            f"{waiting[0]} waits for all {snn.steps} steps of the layer before, or its spikes are weighted, so there is no single step "
            "to export; take form='unrolled', or convert with synchronous=False and weighted=False"
        )


def _byte_layers(snn: SpikingNetwork) -> dict[str, int]:
    """Layers with whole-number weights that read whole numbers, as the integer engine has them, and the largest of these."""
    if "weight_bits" not in snn.provenance or not available():
        reason = "needs a build of torch with oneDNN" if "weight_bits" in snn.provenance else "is for networks in whole numbers"
        raise OptionError(f"integers=True {reason}; take quantise(snn).network, or integers=False")
    copied = snn.with_steps(snn.steps)
    module = copied.network
    with torch.no_grad():
        ShapeProp(module).propagate(torch.zeros(1, *snn.input_shape))
    names = {node: str(node.target) for node in module.graph.nodes}
    # Of any processor: the file is to be the same wherever it is written.
    rewritten = Bytes(module, {}, math.inf)
    rewritten.rewrite()
    found = {}
    for node in module.graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, (ByteConv, ByteLinear)):
            found[names[node]] = cast(int, rewritten.most[node.all_input_nodes[0]])
    return found


# Layers without time


class _Symbol(nn.Module):
    """A layer with time as one node."""

    def __init__(self, name: str, layer: nn.Module, steps: int) -> None:
        super().__init__()
        self.name, self.multiple, self.divisor = name, 1, 1
        if isinstance(layer, Repeat) or (isinstance(layer, Neuron) and layer.constant_input):
            self.multiple = steps
        if isinstance(layer, Readout):
            self.divisor = steps

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0] * self.multiple // self.divisor, *x.shape[1:])
        return torch.onnx.ops.symbolic(f"{_DOMAIN}::Timed", (x,), {"name": self.name}, dtype=x.dtype, shape=shape, version=1)


def _translated(module: fx.GraphModule, cells: Mapping[str, Cell], steps: int, shape: Sequence[int]) -> Any:
    """The model as torch.onnx has it, with one node for every layer with time."""
    program = exported(module, lambda name, _: _Symbol(name, cells[name].layer, steps), shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=True, verbose=False)
    except Exception as error:  # torch.onnx raises errors of many types
        reason = next(
            (line for line in str(error).splitlines() if "No decompositions" in line or "node %" in line), str(error).splitlines()[0]
        )
        raise ConversionError(f"torch.onnx has no form of this network: {reason}; to_program writes it without ONNX") from error
    return cast(Any, made).model_proto


class _Nodes(Arithmetic[str]):
    """Nodes and constants of a graph as they come; values are their names."""

    def __init__(self) -> None:
        self.onnx = _package("onnx")
        self.nodes: list[Any] = []
        self.initialisers: dict[str, npt.NDArray[Any]] = {}
        self.scope = ""
        self.used = Counter[str]()

    def free(self, name: str) -> str:
        """`name`, or with a number if it is taken."""
        self.used[name] += 1
        return name if self.used[name] == 1 else f"{name}_{self.used[name]}"

    def add_node(self, operator: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> list[str]:
        name = self.free(f"{self.scope}/{operator}")
        made = [name] if outputs == 1 else [f"{name}.{number}" for number in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(operator, list(inputs), made, name, **attributes))
        return made

    def one(self, operator: str, *inputs: str, **attributes: Any) -> str:
        return self.add_node(operator, inputs, **attributes)[0]

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self.initialisers[name] = value
        return name

    def add(self, a: str, b: str) -> str:
        return self.one("Add", a, b)

    def sub(self, a: str, b: str) -> str:
        return self.one("Sub", a, b)

    def mul(self, a: str, b: str) -> str:
        return self.one("Mul", a, b)

    def div(self, a: str, b: str) -> str:
        return self.one("Div", a, b)

    def number(self, number: float) -> str:
        return self.constant(f"number/{number:g}", np.array(number, np.float32))

    def reached(self, a: str, b: str, strict: bool) -> str:
        return self.one("Cast", self.one("Greater" if strict else "GreaterOrEqual", a, b), to=self.onnx.TensorProto.FLOAT)

    def split(self, x: str, steps: int) -> Sequence[str]:
        return [x] if steps == 1 else self.add_node("Split", [x], steps, axis=0, num_outputs=steps)

    def join(self, parts: Sequence[str]) -> str:
        return parts[0] if len(parts) == 1 else self.one("Concat", *parts, axis=0)


class _Writer:
    """The graph of torch.onnx once more, with plain names, layers with time written out, and nothing else of it.

    Args:
        model: with one node for every layer with time.
        cells: these layers.
        steps: that the graph computes.
        shapes: of one sample at their inputs, if states go in and out.
    """

    def __init__(self, model: Any, cells: Mapping[str, Cell], steps: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.source, self.cells, self.steps, self.shapes = model.graph, cells, steps, shapes
        self.ops, self.onnx = _Nodes(), _package("onnx")
        self.names: dict[str, str] = {"": "", self.source.input[0].name: "images"}
        self.states: dict[str, dict[str, Any]] = {}
        self.outputs: dict[str, str] = {}
        """New state -> the value."""
        self.weights: list[str] = []

    def write(self) -> None:
        """Every node, in order."""
        for tensor in self.source.initializer:
            self.names[tensor.name] = self.ops.constant(tensor.name, self.onnx.numpy_helper.to_array(tensor))
        if self.shapes and any(isinstance(cell.layer, _COUNTING) for cell in self.cells.values()):
            self.states[DONE] = {"shape": None, "initial": [0.0], "initial_shape": []}
            self.ops.scope = DONE
            self.outputs[DONE] = self.ops.add(DONE, self.ops.number(1))
        for node in self.source.node:
            if node.domain == _DOMAIN:
                self._timed(node)
            else:
                self._plain(node)

    def _plain(self, node: Any) -> None:
        self.ops.scope = _scope(node)
        made = self.ops.add_node(node.op_type, [self.names[name] for name in node.input], len(node.output))
        written = self.ops.nodes[-1]
        written.domain = node.domain
        for attribute in node.attribute:
            written.attribute.append(_cleared(attribute))
        for old, new in zip(node.output, made, strict=True):
            self.names[old] = new

    def _timed(self, node: Any) -> None:
        name = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "name")
        self.ops.scope, cell = name, self.cells[name]
        tensors = {kind: self.ops.constant(f"{name}.{kind}", tensor.numpy()) for kind, tensor in cell.tensors.items()}
        state = self._state(name, cell) if self.shapes else {}
        out, after = computed(self.ops, cell, tensors, self.names[node.input[0]], state, self.steps)
        self.names[node.output[0]] = out
        if self.shapes:
            self.outputs |= {f"{name}.{kind}": value for kind, value in after.items()}

    def _state(self, name: str, cell: Cell) -> dict[str, str]:
        """The states that the layer reads, by kind, which become inputs."""
        kinds: tuple[str, ...] = _STATES.get(type(cell.layer), ())
        if isinstance(cell.layer, Neuron):
            kinds = ("v", "left") if cell.layer.signed else ("v",)
        for kind in kinds:
            initial = cell.tensors["initial"] if kind == "v" else torch.zeros(())
            self.states[f"{name}.{kind}"] = {
                "shape": None if kind in _FOR_ALL else list(self.shapes[name]),
                "initial": initial.flatten().tolist(),
                "initial_shape": list(initial.shape),
            }
        counted = {"done": DONE} if isinstance(cell.layer, _COUNTING) else {}
        return {kind: f"{name}.{kind}" for kind in kinds} | counted

    def quantise(self, layers: Mapping[str, int]) -> list[str]:
        """Let `layers` read bytes and hold weights of 8 bits; those that do not, each with the reason."""
        found = {node.input[1]: node for node in self.ops.nodes if node.op_type in ("Conv", "Gemm", "MatMul")}
        before, after = list(self.ops.nodes), list[Any]()
        chosen, kept, read = dict[int, str](), list[str](), dict[str, str]()
        for layer, most in layers.items():
            node, weight = found.get(f"{layer}.weight"), self.ops.initialisers.get(f"{layer}.weight")
            if node is None or weight is None:
                kept.append(f"{layer}: has no node of its own")
            elif 2 * most * float(np.abs(weight).max()) > LARGEST_PAIR:
                kept.append(f"{layer}: reads numbers up to {most}, so that sums of bytes could saturate")
            else:
                chosen[id(node)] = layer
        for node in before:
            self.ops.nodes = []
            if id(node) in chosen:
                self._in_bytes(node, chosen[id(node)], read)
            after += [*self.ops.nodes, node]
        self.ops.nodes = after
        return kept

    def _in_bytes(self, node: Any, layer: str, read: dict[str, str]) -> None:
        ops = self.ops
        one, none = ops.number(1), ops.constant("number/0_uint8", np.array(0, np.uint8))
        ops.scope = layer
        if node.input[0] not in read:
            spikes = ops.one("QuantizeLinear", node.input[0], one, none)
            read[node.input[0]] = ops.one("DequantizeLinear", spikes, one, none)
        weight = node.input[1]
        ops.constant(weight, ops.initialisers[weight].astype(np.int8))
        node.input[0] = read[node.input[0]]
        node.input[1] = ops.one("DequantizeLinear", weight, one, ops.constant("number/0_int8", np.array(0, np.int8)))
        self.weights.append(layer)

    def model(self, outputs: Mapping[str, tuple[int, ...]], shape: Sequence[int]) -> Any:
        """The whole file.

        Args:
            outputs: shapes of the network's outputs for one sample, by their names.
            shape: of one image.
        """
        if len(self.source.output) != len(outputs):
            raise ConversionError(f"the network gives {len(outputs)} tensors, and torch.onnx wrote {len(self.source.output)}")
        values = [self.names[output.name] for output in self.source.output]
        wanted = [*zip(outputs, values, strict=True), *((f"{name}.next", value) for name, value in self.outputs.items())]
        self._name(wanted)
        info = self._info
        graph = self.onnx.helper.make_graph(
            self.ops.nodes,
            "quickspike",
            [info("images", shape), *(info(name, state["shape"]) for name, state in self.states.items())],
            [
                *(info(name, one) for name, one in outputs.items()),
                *(info(f"{name}.next", self.states[name]["shape"]) for name in self.outputs),
            ],
            self._initialisers(),
        )
        opset = [self.onnx.helper.make_opsetid("", OPSET)]
        return self.onnx.helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="quickspike", producer_version=__version__
        )

    def _info(self, name: str, shape: Sequence[int] | None) -> Any:
        """Of a value with a batch axis; one number where `shape` is None."""
        dimensions = [] if shape is None else ["batch", *shape]
        return self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, dimensions)

    def _name(self, wanted: Sequence[tuple[str, str]]) -> None:
        """Give values the names of outputs; one that has such a name already is copied."""
        made = {value for node in self.ops.nodes for value in node.output}
        renamed = dict[str, str]()
        for name, value in wanted:
            if value in made and value not in renamed:
                renamed[value] = name
            else:
                self.ops.nodes.append(self.onnx.helper.make_node("Identity", [value], [name], f"{name}/Identity"))
        for node in self.ops.nodes:
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]

    def _initialisers(self) -> list[Any]:
        read = {name for node in self.ops.nodes for name in node.input}
        used = {name: value for name, value in self.ops.initialisers.items() if name in read}
        size = sum(value.nbytes for value in used.values())
        if size > LARGEST_FILE:
            raise ConversionError(f"an ONNX file holds at most 2 GiB, and the weights of this network are {size} bytes")
        return [self.onnx.numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in used.items()]


def _scope(node: Any) -> str:
    """The layer that a node belongs to, or the name of the operator."""
    recorded = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "['']")
    scopes = [scope for scope in ast.literal_eval(recorded) if scope]
    return scopes[-2] if len(scopes) > 1 else scopes[0] if scopes else "constant"


def _cleared(message: Any) -> Any:
    """A message of protobuf without texts that say where it comes from."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for one in value if isinstance(value, Sequence) or hasattr(value, "add") else [value]:
                _cleared(one)
    return message


def _input_shapes(module: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """Of one sample, at the layers with time."""
    timed = timed_layers(module)
    return {
        str(node.target): tuple(node.all_input_nodes[0].meta["tensor_meta"].shape[1:])
        for node in module.graph.nodes
        if node.op == "call_module" and str(node.target) in timed
    }


def _output_shapes(module: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """Of one sample, by the names that the outputs get."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    shapes = dict[str, tuple[int, ...]]()
    for place, node in places(output.args[0]).items():
        name = "_".join(re.findall(r"\w+", place)) or "logits"
        while name in shapes:
            name += "_"
        shapes[name] = tuple(node.meta["tensor_meta"].shape[1:])
    return shapes


def _sealed(model: Any, description: Mapping[str, Any]) -> bytes:
    """The file's bytes, with the checksum of all of them, for which zeros stand in the place of the checksum itself."""
    onnx = _package("onnx")
    onnx.helper.set_model_props(
        model, {"quickspike": json.dumps(description, sort_keys=True, allow_nan=False), "quickspike.sha256": _NO_DIGEST}
    )
    onnx.checker.check_model(model)
    data = cast(bytes, model.SerializeToString(deterministic=True))
    place = _DIGEST.search(data)
    if place is None:
        raise ConversionError("this version of protobuf writes metadata in a way that has no place for a checksum; report it")
    return data[: place.start(1)] + hashlib.sha256(data).hexdigest().encode() + data[place.end(1) :]
