"""One safetensors file holds a whole spiking network: weights as tensors, everything else as a JSON header.

The header carries the graph as data. Loading rebuilds it from the tables in `operators.py` and from the timed layers
of `neuron.py`, and from nothing else: no pickle, no code of the source network, no name that is not listed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import keyword
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from quickspike.conversion import SpikingNetwork
from quickspike.dry_run import check_runs
from quickspike.errors import CheckpointError
from quickspike.files import write_bytes
from quickspike.graph import Site
from quickspike.memory import out_of_memory
from quickspike.neuron import MAX_STEPS, AccumulatedMaxPool, Increment, Neuron, NeuronParameters, Repeat, RunningMean, Surrogate
from quickspike.operators import ANALOG_LAYERS, FUNCTION_NAMES, FUNCTIONS, LAYERS, MAX_POOLS, layer_arguments
from quickspike.readouts import AfterRehearsal, LeakyReadout
from quickspike.rehearsal import RehearsedNeuron

FORMAT = 1
"""Version of the file format; a reader refuses a newer one."""

_NAME = re.compile(r"(?!__)[A-Za-z_]\w*\Z", re.ASCII)
# fx writes what is no identifier between double quotes into the code, so quotes, backslashes and breaks stay out.
_PATH = re.compile(r"(?!__)\w[\w \-]*(?:\.(?!__)\w[\w \-]*)*\Z")
_LAYER_ARGUMENTS = LAYERS | MAX_POOLS | ANALOG_LAYERS
_LAYER_TYPES = {cls.__name__: cls for cls in _LAYER_ARGUMENTS}
_PLAIN_TIMED = {cls.__name__: cls for cls in (Repeat, RunningMean, Increment)}
DEEPEST = 64
"""Levels of a header; Python would run out of its own further down."""
_NEURON_TENSORS = ("threshold", "initial", "leak", "amplitude")

# Saving


def save(snn: SpikingNetwork, path: str | Path) -> None:
    """Write `snn` to `path`, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
        CheckpointError: the network holds a layer that the format does not know.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _state(snn).items()}
    try:
        header = json.dumps(_header(snn), allow_nan=False, sort_keys=True)
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the network holds something that JSON does not ({error}); look at its provenance and paddings") from error
    metadata = {"quickspike": header, "sha256": _digest(header, tensors)}
    write_bytes(path, _in_order(safetensors.torch.save(tensors, metadata)))


def _state(snn: SpikingNetwork) -> dict[str, Tensor]:
    """Every tensor the network computes with, buffers that are left out of state_dict() included."""
    constants = {str(node.target) for node in snn.network.graph.nodes if node.op == "get_attr"}
    state = {**snn.network.state_dict(), **{name: operator.attrgetter(name)(snn.network) for name in constants}}
    for name in state:
        if not _PATH.match(name):
            raise CheckpointError(f"the name {name!r} has no place in the file format; rename that layer")
    for site in snn.sites:
        for name, tensor in snn.neuron(site.name).named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{site.name}: {name} holds NaN or infinite values")
    return state


def _in_order(data: bytes) -> bytes:
    """Undo that safetensors writes its metadata in random order: the same network shall give the same bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _header(snn: SpikingNetwork) -> dict[str, Any]:
    graph = snn.network.graph
    called = sorted({str(node.target) for node in graph.nodes if node.op == "call_module"})
    return {
        "format": FORMAT,
        "steps": snn.steps,
        "input_shape": list(snn.input_shape),
        "method": snn.method,
        "provenance": snn.provenance,
        "sites": [dataclasses.asdict(site) for site in snn.sites],
        "parameters": sorted(name for name, _ in snn.network.named_parameters()),
        "layers": {name: _layer_to_json(snn.network.get_submodule(name)) for name in called},
        "graph": [_node_to_json(node) for node in graph.nodes],
    }


def _layer_to_json(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, Neuron):
        arguments: dict[str, Any] = {"constant_input": layer.constant_input, "scaled": layer.scaled, "strict": layer.strict}
        arguments["averaged"] = layer.averaged
        arguments |= {flag: True for flag in ("signed", "to_zero") if getattr(layer, flag)}
        arguments |= {"surrogate": dataclasses.asdict(layer.surrogate)}
        # Types of their own, so that versions that do not know of them do not take them for plain ones.
        if layer.weighted:
            return {"type": "WeightedNeuron", "arguments": arguments}
        if layer.members > 1:
            return {"type": "GroupedNeuron", "arguments": arguments | {"members": layer.members}}
        if isinstance(layer, RehearsedNeuron):
            return {"type": "RehearsedNeuron", "arguments": arguments | {"kind": layer.kind, "rehearsal": layer.rehearsal}}
        return {"type": "Neuron", "arguments": arguments}
    if isinstance(layer, AfterRehearsal):
        return {"type": "AfterRehearsal", "arguments": {"rehearsal": layer.rehearsal}}
    if isinstance(layer, LeakyReadout):
        return {"type": "LeakyReadout", "arguments": {"leak": layer.leak}}
    if type(layer).__name__ in _PLAIN_TIMED:
        return {"type": type(layer).__name__, "arguments": {}}
    if isinstance(layer, AccumulatedMaxPool):
        return {"type": "AccumulatedMaxPool", "arguments": {"pool": _layer_to_json(layer.pool)}}
    try:
        return {"type": type(layer).__name__, "arguments": _encode(_sorted(layer_arguments(layer)))}
    except KeyError:
        kind = type(layer).__name__
        raise CheckpointError(
            f"a layer of type {kind} has no place in the file format; if the network was accelerated, save the one that it was made from"
        ) from None


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    target = FUNCTION_NAMES.get(node.target) if node.op == "call_function" else str(node.target)
    if target is None:
        raise CheckpointError(f"the operator {node.target} has no place in the file format")
    return {"name": node.name, "op": node.op, "target": target, "args": _encode(node.args), "kwargs": _encode(_sorted(node.kwargs))}


def _sorted(named: Mapping[str, Any]) -> dict[str, Any]:
    """Names whose order says nothing."""
    return dict(sorted(named.items()))


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping) and list(value) == sorted(map(str, value)):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        # JSON sorts its keys; the order in which a network gives its outputs counts.
        return {"items": [[key, _encode(item)] for key, item in value.items()]}
    raise CheckpointError(f"an argument of type {type(value).__name__} has no place in the file format")


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header and every tensor with its name, type and shape: finds any change since saving."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Loading


def load(path: str | Path) -> SpikingNetwork:
    """The spiking network in the file at `path`, bit for bit as saved, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, truncated, altered, foreign, or of a newer format.
    """
    header, tensors = _read(Path(path))
    try:
        return _build(header, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{path}: the header is nested too deeply") from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{path}: the header does not describe a network ({type(error).__name__}: {reason})") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the file in it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: what safetensors gives is the file itself, mapped; whoever wrote to it later would change the network.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        if out_of_memory(error):
            raise
        hint = "truncated, or not a safetensors file; pickles are never read"
        raise CheckpointError(f"{path}: {hint} ({(str(error).splitlines() or [type(error).__name__])[0]})") from error
    if "quickspike" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not one that quickspike saved (weights of a source network?)")
    try:
        header = json.loads(metadata["quickspike"], parse_constant=_no_number)
        check_depth(header)
    except RecursionError:
        raise CheckpointError(f"{path}: the header is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); the file was altered") from error
    version = header.get("format") if isinstance(header, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: the header names no format version; the file was altered")
    if version > FORMAT:
        raise CheckpointError(f"{path}: file format {version}, this quickspike reads up to {FORMAT}; upgrade quickspike to load it")
    if metadata.get("sha256") != _digest(metadata["quickspike"], tensors):
        raise CheckpointError(f"{path}: the checksum does not match; the file was damaged or altered since it was saved")
    return header, tensors


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def check_depth(data: Any, left: int = DEEPEST) -> None:
    """Raise RecursionError before Python does, which would do so wherever the header is read later."""
    if not left:
        raise RecursionError
    for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        check_depth(value, left - 1)


def _build(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SpikingNetwork:
    steps = header["steps"]
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise CheckpointError(f"steps must be a whole number in [1, {MAX_STEPS}], got {steps!r}")
    root, left = nn.Module(), dict(tensors)
    for name, layer in header["layers"].items():
        own = {key.removeprefix(f"{name}."): left.pop(key) for key in list(left) if key.startswith(f"{name}.")}
        _place(root, name, _layer_from_json(layer, own, steps, name))
    for name, tensor in left.items():
        _place(root, name, nn.Parameter(tensor) if name in header["parameters"] else tensor)
    graph = _graph_from_json(header["graph"], set(header["layers"]), set(left))
    network = fx.GraphModule(root, graph)
    graph.lint()
    sites = tuple(_site(data) for data in header["sites"])
    _check_neurons(network, sites)
    input_shape = tuple(header["input_shape"])
    if not input_shape or any(type(size) is not int or size < 1 for size in input_shape):
        raise CheckpointError(f"the input shape must be sizes >= 1, got {list(input_shape)}")
    check_described(header["method"], header["provenance"])
    snn = SpikingNetwork(network, sites, steps, input_shape, header["method"], header["provenance"]).eval()
    check_runs(snn)
    return snn


def check_described(method: Any, provenance: Any) -> None:
    """Method and provenance in the form in which everything reads them; what they say may be unknown here."""
    refinements = method.get("refinements", []) if isinstance(method, dict) else None
    if not isinstance(refinements, list) or not all(map(_has_options, (method, *refinements))):
        raise CheckpointError(f"the method must have a name, options and refinements of the same form, got {method!r}"[:300])
    if not isinstance(provenance, dict):
        raise CheckpointError(f"the provenance must be entries with names, got {provenance!r}"[:300])
    sizes = provenance.get("sizes", [])
    if not isinstance(sizes, list) or not all(isinstance(one, list) and len(one) == 2 and all(map(_is_bound, one)) for one in sizes):
        raise CheckpointError(f"sizes must be pairs of bounds, got {sizes!r}"[:300])


def _has_options(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("options", {}), dict)


def _is_bound(value: Any) -> bool:
    return value is None or type(value) is int


def _check_neurons(network: nn.Module, sites: tuple[Site, ...]) -> None:
    neurons = {name: layer for name, layer in network.named_modules() if isinstance(layer, Neuron)}
    if sorted(neurons) != sorted(site.name for site in sites):
        raise CheckpointError(f"the sites {[site.name for site in sites]} are not the neurons {sorted(neurons)}")
    for site in sites:
        for name, tensor in neurons[site.name].named_parameters():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{site.name}: {name} must hold finite floating point values")
            if tensor.ndim > len(site.shape) or any(a not in (1, b) for a, b in zip(tensor.shape[::-1], site.shape[::-1], strict=False)):
                raise CheckpointError(f"{site.name}: {name} of shape {list(tensor.shape)} does not fit neurons {list(site.shape)}")


def _site(data: Mapping[str, Any]) -> Site:
    site = Site(**{**data, "shape": tuple(data["shape"])})
    texts = all(isinstance(text, str) for text in (site.name, site.function, site.source))
    ceiling = site.ceiling is None or type(site.ceiling) in (int, float)
    sizes = bool(site.shape) and all(type(size) is int and size > 0 for size in site.shape)
    if not (texts and ceiling and sizes and isinstance(site.encodes_input, bool)):
        raise CheckpointError(f"malformed site {site}"[:300])
    return site


def _place(root: nn.Module, path: str, thing: nn.Module | Tensor) -> None:
    """Put a layer or a constant tensor at a dotted path below `root`."""
    if not _PATH.match(path):
        raise CheckpointError(f"{path!r} is no name for a layer")
    owner, _, leaf = path.rpartition(".")
    for part in filter(None, owner.split(".")):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(thing, nn.Module):
        root.add_module(leaf, thing)
    elif isinstance(thing, nn.Parameter):
        root.register_parameter(leaf, thing)
    else:
        root.register_buffer(leaf, thing)


def _layer_from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor], steps: int, name: str) -> nn.Module:
    kind, arguments = data["type"], data["arguments"]
    if kind in ("Neuron", "WeightedNeuron", "GroupedNeuron", "RehearsedNeuron"):
        surrogate = Surrogate(**arguments["surrogate"])
        # Flags that came later are left out where they are false, and so they are in files from before.
        later = dict.fromkeys(("averaged", "signed", "to_zero"), False)
        flags = {flag: _flag({**later, **arguments}, flag) for flag in ("scaled", "strict", *later)}
        flags["weighted"] = kind == "WeightedNeuron"
        members = arguments["members"] if kind == "GroupedNeuron" else 1
        made = (NeuronParameters(torch.ones(()), **flags, members=members), steps, _flag(arguments, "constant_input"), surrogate)
        first_run = {key: arguments[key] for key in ("kind", "rehearsal")} if kind == "RehearsedNeuron" else {}
        neuron = RehearsedNeuron(*made, **first_run) if first_run else Neuron(*made)
        # Past the checks of NeuronParameters: training may have left a threshold below 0, where it acts as the smallest.
        for key, tensor in _exactly(tensors, _NEURON_TENSORS, name).items():
            neuron.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
        return neuron
    if kind == "AfterRehearsal":
        return AfterRehearsal(steps, arguments["rehearsal"])
    if kind == "LeakyReadout":
        return LeakyReadout(steps, arguments["leak"])
    if kind in _PLAIN_TIMED:
        return _PLAIN_TIMED[kind](steps)
    if kind == "AccumulatedMaxPool":
        if arguments["pool"]["type"] not in {cls.__name__ for cls in MAX_POOLS}:
            raise CheckpointError(f"{name}: {arguments['pool']['type']!r} is no max-pooling")
        return AccumulatedMaxPool(_plain_layer(arguments["pool"], {}, name), steps)
    return _plain_layer(data, tensors, name)


def _flag(arguments: Mapping[str, Any], name: str) -> bool:
    if not isinstance(arguments[name], bool):
        raise CheckpointError(f"{name} must be true or false, got {arguments[name]!r}")
    return bool(arguments[name])


def _exactly(tensors: Mapping[str, Tensor], names: tuple[str, ...], where: str) -> dict[str, Tensor]:
    if set(tensors) != set(names):
        raise CheckpointError(f"{where}: expected the tensors {', '.join(names)}, found {', '.join(sorted(tensors)) or 'none'}")
    return dict(tensors)


def _plain_layer(data: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> nn.Module:
    cls = _LAYER_TYPES.get(data["type"])
    if cls is None:
        raise CheckpointError(f"{name}: unknown layer type {data['type']!r}")
    arguments = _decode(data["arguments"], {})
    # Constructors also take a device, which would allocate what the header merely claims.
    if not set(arguments) <= {*_LAYER_ARGUMENTS[cls], "bias"}:
        raise CheckpointError(f"{name}: {cls.__name__} takes no {', '.join(sorted(set(arguments) - set(_LAYER_ARGUMENTS[cls])))}")
    # On the meta device a declared size costs no memory; the tensors of the file then have to fit it exactly.
    with torch.device("meta"):
        layer: nn.Module = cls(**arguments)
    try:
        layer.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{name}: the tensors do not fit a {cls.__name__} ({str(error).splitlines()[-1].strip()})") from error
    return layer


def _graph_from_json(nodes: list[Mapping[str, Any]], layers: set[str], constants: set[str]) -> fx.Graph:
    graph, known = fx.Graph(), dict[str, fx.Node]()
    for data in nodes:
        name, op, target = data["name"], data["op"], data["target"]
        if not _NAME.match(name) or name in known:
            raise CheckpointError(f"{name!r} is no name for a node, or names two")
        args, kwargs = _decode(data["args"], known), _decode(data["kwargs"], known)
        if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(_NAME.match(key) for key in kwargs):
            raise CheckpointError(f"node {name}: malformed arguments")
        known[name] = graph.create_node(op, _target(op, target, layers, constants), args, kwargs, name)
    operations = [node.op for node in graph.nodes]
    if operations.count("placeholder") != 1 or operations.count("output") != 1 or operations[-1] != "output":
        raise CheckpointError("the graph must have one input and end with its output")
    return graph


def _target(op: str, target: str, layers: set[str], constants: set[str]) -> str | Callable[..., Any]:
    if op == "call_function" and target in FUNCTIONS:
        return FUNCTIONS[target].run
    if (op == "call_module" and target in layers) or (op == "get_attr" and target in constants):
        return target
    if op == "output" or (op == "placeholder" and _NAME.match(target) and not keyword.iskeyword(target) and target != "self"):
        return target
    raise CheckpointError(f"operator {target!r} ({op}) is not one that a spiking network may hold")


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    (tag, content), *more = value.items()
    if more:
        raise CheckpointError(f"malformed argument {value!r}")
    if tag == "node":
        return nodes[content]
    if tag == "ellipsis":
        return Ellipsis
    if tag == "slice":
        return slice(*(_decode(part, nodes) for part in content))
    if tag == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if tag == "dict":
        return {key: _decode(item, nodes) for key, item in content.items()}
    if tag == "items":
        return {key: _decode(item, nodes) for key, item in content}
    raise CheckpointError(f"malformed argument tag {tag!r}")
