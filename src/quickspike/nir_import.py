"""NIR files as spiking networks: our own bit for bit, and what others wrote in the same nodes.

A file that `nir_export` wrote says in its metadata what NIR has no word for, and gives the network that it was made from,
folded. Other files are taken as a reader takes them that the caller names, for a number of steps that the caller names too.
"""

from __future__ import annotations

import json
import keyword
import logging
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from quickspike.checkpoint import DEEPEST, check_depth, check_described
from quickspike.conversion import SpikingNetwork
from quickspike.dry_run import check_runs
from quickspike.errors import CheckpointError, ConversionError, OptionError
from quickspike.graph import Site
from quickspike.neuron import MAX_STEPS, Neuron, NeuronParameters, Repeat
from quickspike.nir_export import FORMAT, digest, need_nir
from quickspike.nir_readers import KEY, READERS, Reader, dynamics, in_order, pair, reader_of, tensor
from quickspike.operators import Affine
from quickspike.readouts import LeakyReadout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Neurons:
    """What one node of neurons becomes."""

    site: Site
    parameters: NeuronParameters


def load_nir(path: str | Path, steps: int | None = None, reader: str = "nir") -> SpikingNetwork:
    """The spiking network in a NIR file, on the CPU, in evaluation mode.

    Args:
        path: HDF5, as `nir.write` makes it. A file of ours gives the spikes of the network that it was made from, unless its
            initial potentials were written as biases: those come in bit by bit then, as for any reader of it.
        steps: T; None for what the file says, which only ours do.
        reader: whose rules hold for a file from elsewhere (reset, comparison, time step), see `quickspike.nir_readers.READERS`.

    Raises:
        CheckpointError: the file is missing, truncated, altered, no NIR file, or of a newer format.
        ConversionError: it holds a node that has no counterpart here, a cycle, several inputs or outputs.
        OptionError: steps is missing or out of range, or nir is not installed.
        UnknownNameError: no such reader.
    """
    graph = _read(Path(path))
    metadata = _metadata(graph, path)
    reader = metadata.get("reader", reader)
    if metadata and not (isinstance(reader, str) and reader in READERS):
        raise CheckpointError(f"{path}: its metadata names the reader {reader!r}, which is not known here; upgrade quickspike"[:300])
    rules = reader_of(reader)
    steps = metadata.get("steps") if steps is None else steps
    if steps is None:
        raise OptionError(f"{path} does not say for how many steps it was made; name steps=")
    if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
        raise OptionError(f"{path}: steps must be a whole number in [1, {MAX_STEPS}], got {steps!r}"[:300])
    if not metadata and (rules.several or rules.lowest is not None):
        logger.warning("%s: neurons fire once in a step at most here, and have no lowest potential; %s has them otherwise", path, reader)
    try:
        return _Builder(graph, metadata, steps, rules).run()
    except (ConversionError, CheckpointError) as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{path}: its graph does not describe a network ({type(error).__name__}: {reason})") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        nir = need_nir()
        _check_declared(path)
        return nir.read(path)
    except OptionError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: truncated, altered, or no NIR file ({reason})") from error


PACKED = 1100
"""Times that gzip packs zeros, and some more."""


def _check_declared(path: Path) -> None:
    """Raise ValueError if arrays are larger than the file can hold, which are allocated before they are read, or lie elsewhere."""
    import h5py

    declared = 0

    def look(group: Any, depth: int) -> None:
        nonlocal declared
        if depth > DEEPEST:
            raise ValueError("groups are nested too deeply")
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{name} lies elsewhere")
            found = group[name]
            if isinstance(found, h5py.Group):
                look(found, depth + 1)
            elif found.is_virtual or found.external:
                raise ValueError(f"{name} lies elsewhere")
            else:
                declared += found.size * found.dtype.itemsize if found.size else 0

    with h5py.File(path, "r") as file:
        look(file, 0)
    if declared > PACKED * path.stat().st_size:
        raise ValueError(f"its arrays would have {declared} bytes")


def _metadata(graph: Any, path: str | Path) -> dict[str, Any]:
    """What we wrote into a file; nothing for a file from elsewhere.

    Raises:
        CheckpointError: the file was altered since, or is of a newer format.
    """
    text = graph.metadata.get(KEY)
    if text is None:
        return {}
    try:
        found = json.loads(text.decode() if isinstance(text, bytes) else str(text))
        check_depth(found)
        version = found["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error}); export the network again") from error
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: its metadata names no format version; the file was altered, export the network again")
    if version > FORMAT:
        raise CheckpointError(f"{path}: metadata of format {version}, this quickspike reads up to {FORMAT}; upgrade quickspike to load it")
    if found.get("sha256") != digest(graph, found):
        raise CheckpointError(f"{path}: the checksum does not match; the file was damaged or altered since it was written")
    return dict(found)


class _Builder:
    """The graph as one of layers, in the order of computation."""

    def __init__(self, graph: Any, metadata: Mapping[str, Any], steps: int, rules: Reader) -> None:
        self.graph, self.metadata, self.steps, self.rules = graph, metadata, steps, rules
        self.sites = {site["node"]: site for site in metadata.get("sites", ())}
        self.root, self.out = nn.Module(), fx.Graph()
        self.timed = set[fx.Node]()
        self.repeated: dict[fx.Node, fx.Node] = {}
        self.made: list[Site] = []

    def run(self) -> SpikingNetwork:
        order = in_order(self.graph)
        kinds = {name: type(self.graph.nodes[name]).__name__ for name in order}
        if sorted(kinds.values()).count("Input") != 1 or sorted(kinds.values()).count("Output") != 1:
            raise ConversionError("a network with one Input and one Output is wanted")
        values: dict[str, fx.Node] = {}
        for name in order:
            parents = [values[a] for a, b in self.graph.edges if b == name]
            x = self._added(parents)
            if kinds[name] == "Input":
                values[name] = self.out.placeholder("x")
            elif x is None:
                raise ConversionError(f"{name}: nothing leads to this node")
            elif kinds[name] == "Output":
                if x not in self.timed:
                    raise ConversionError("the output does not depend on any neuron")
                values[name] = self.out.output(self._read_out(x))
            else:
                values[name] = self._layer(name, kinds[name], x)
        (start,) = (name for name in order if kinds[name] == "Input")
        shape = tuple(int(size) for size in np.atleast_1d(self.graph.nodes[start].input_type["input"]))
        module = fx.GraphModule(self.root, self.out)
        self.out.lint()
        provenance = dict(self.metadata.get("provenance", {})) | {"nir": {"reader": self.rules.name}}
        method = self.metadata.get("method", {"name": "nir"})
        check_described(method, provenance)
        network = SpikingNetwork(module, tuple(self.made), self.steps, shape, method, provenance).eval()
        check_runs(network)
        return network

    def _added(self, parents: list[fx.Node]) -> fx.Node | None:
        if not parents:
            return None
        if len(parents) > 1 and any(parent in self.timed for parent in parents):
            parents = [parent if parent in self.timed else self._repeat(parent) for parent in parents]
        total = parents[0]
        for parent in parents[1:]:
            total = self._note(self.out.call_function(operator.add, (total, parent)), total)
        return total

    def _repeat(self, signal: fx.Node) -> fx.Node:
        if signal not in self.repeated:
            name = self._free("repeat")
            self.root.add_module(name, Repeat(self.steps))
            self.repeated[signal] = self.out.call_module(name, (signal,))
            self.timed.add(self.repeated[signal])
        return self.repeated[signal]

    def _read_out(self, signal: fx.Node) -> fx.Node:
        if "readout_leak" not in self.metadata:
            return signal
        name = self._free("leaky_readout")
        self.root.add_module(name, LeakyReadout(self.steps, self.metadata["readout_leak"]))
        return self.out.call_module(name, (signal,))

    def _free(self, name: str) -> str:
        """A name that no layer and no attribute of a module has, nor a site of ours."""
        taken = {site["name"].split(".")[0] for site in self.sites.values()}
        while hasattr(self.root, name) or name in taken:
            name += "_"
        return name

    def _note(self, node: fx.Node, like: fx.Node) -> fx.Node:
        if like in self.timed:
            self.timed.add(node)
        return node

    def _layer(self, name: str, kind: str, x: fx.Node) -> fx.Node:
        node = self.graph.nodes[name]
        if kind in ("IF", "LIF"):
            return self._neurons(name, node, x)
        if kind not in _LAYERS:
            raise ConversionError(f"{name}: a node {kind} has no counterpart here; known are IF, LIF, {', '.join(sorted(_LAYERS))}")
        key = self._free(_identifier(name))
        self.root.add_module(key, _LAYERS[kind](node))
        return self._note(self.out.call_module(key, (x,)), x)

    def _neurons(self, name: str, node: Any, x: fx.Node) -> fx.Node:
        known = self.sites.get(name)
        made = self._as_written(known, node) if known else self._as_found(name, node)
        neuron = Neuron(made.parameters, self.steps, x not in self.timed)
        _place(self.root, made.site.name, neuron)
        self.made.append(made.site)
        out = self.out.call_module(made.site.name, (x,))
        self.timed.add(out)
        return out

    def _as_written(self, known: Mapping[str, Any], node: Any) -> _Neurons:
        fields = ("name", "function", "ceiling", "source", "encodes_input")
        site = Site(shape=tuple(np.shape(node.v_threshold)), **{key: known[key] for key in fields})
        # As biases, they are in the weights.
        begin = 0.0 if self.metadata["initial"] == "bias" else known["initial"]
        initial, leak = (_for_all(values, known["shape"], site, rest) for values, rest in ((begin, 0.0), (known["leak"], 1.0)))
        flags = {key: bool(known[key]) for key in ("strict", "averaged", "signed", "to_zero")}
        return _Neurons(site, NeuronParameters(torch.ones(()), initial, leak, torch.ones(()), scaled=False, **flags))

    def _as_found(self, name: str, node: Any) -> _Neurons:
        shape = tuple(int(size) for size in np.shape(node.v_threshold))
        if not shape:
            raise ConversionError(f"{name}: a neuron without a shape")
        if bool(np.any(np.asarray(node.v_reset))) or bool(np.any(np.asarray(getattr(node, "v_leak", 0.0)))):
            raise ConversionError(f"{name}: neurons that rest or are reset elsewhere than at 0")
        leak, gain = dynamics(node, self.rules)
        if type(node).__name__ == "IF":
            gain = tensor(node.r) if self.rules.name == "nir" else torch.ones_like(leak)
        if bool((gain <= 0).any()):
            raise ConversionError(f"{name}: currents must have positive weights")
        site = Site(self._free(_identifier(name)), "relu", None, shape)
        # A current of weight g against theta is one of weight 1 against theta/g.
        theta = _least(tensor(node.v_threshold) / gain, shape)
        flags = {"strict": self.rules.compares == ">", "to_zero": self.rules.reset == "zero"}
        return _Neurons(site, NeuronParameters(theta, 0.0, _least(leak, shape).clamp(0, 1), torch.ones(()), scaled=False, **flags))


def _for_all(values: Any, known: Sequence[int], site: Site, rest: float) -> Tensor:
    """A number, one per channel or one per neuron, for a site that may have more channels, which hand spikes on."""
    found = torch.tensor(values, dtype=torch.float32)
    own, more = known[0], site.channels - known[0]
    if type(own) is not int or not 0 < own <= site.channels:
        raise CheckpointError(f"{site.name}: {known} neurons do not fit into {list(site.shape)}"[:300])
    if found.ndim and len(found) != own:
        found = found.reshape(own, *site.shape[1:])
    if not more:
        return site.per_channel(found) if found.ndim < 2 else found
    found = found.expand(own) if not found.ndim else found
    wide = torch.cat([found, torch.full((more, *found.shape[1:]), rest)])
    return site.per_channel(wide) if wide.ndim < 2 else wide


def _identifier(name: str) -> str:
    """A name that can stand in Python code, which the graph becomes."""
    plain = re.sub(r"\W", "_", name)
    return plain if plain.isidentifier() and not keyword.iskeyword(plain) else f"node_{plain}"


def _least(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One number, or one per channel, where that is all there is."""
    spread = values.expand(shape).reshape(shape[0], -1)
    if bool((spread == spread[0, 0]).all()):
        return spread[0, 0].clone()
    if bool((spread == spread[:, :1]).all()):
        return spread[:, 0].reshape(-1, *(1,) * (len(shape) - 1)).clone()
    return values.expand(shape).clone()


def _place(root: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    for part in filter(None, owner.split(".")):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, layer)


def _convolution(node: Any) -> nn.Module:
    weight, bias = tensor(node.weight), tensor(node.bias)
    kind: Any = nn.Conv1d if weight.ndim == 3 else nn.Conv2d
    padding = node.padding if isinstance(node.padding, str) else pair(node.padding)
    groups = int(node.groups)
    layer = kind(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), pair(node.stride), padding, pair(node.dilation), groups
    )
    return _filled(layer, weight, bias)


def _affine(node: Any) -> nn.Module:
    weight = tensor(node.weight)
    bias = tensor(node.bias) if hasattr(node, "bias") else None
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), weight, bias)


def _scale(node: Any) -> nn.Module:
    values = tensor(node.scale)
    least = _least(values, tuple(values.shape))
    if least.numel() not in (1, values.shape[0]):
        raise ConversionError("a Scale that differs within a channel")
    layer = Affine(values.shape[0])
    with torch.no_grad():
        layer.weight.copy_(least.reshape(-1).expand(values.shape[0]))
    return layer.requires_grad_(False)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return cast(nn.Module, layer.eval())


def _pool(divisor: int | None) -> Callable[[Any], nn.Module]:
    kind: Any = nn.AvgPool2d
    return lambda node: cast(nn.Module, kind(pair(node.kernel_size), pair(node.stride), pair(node.padding), divisor_override=divisor))


def _flatten(node: Any) -> nn.Module:
    start, end = int(node.start_dim), int(node.end_dim)
    return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)


_LAYERS: dict[str, Callable[[Any], nn.Module]] = {
    "Conv1d": _convolution,
    "Conv2d": _convolution,
    "Affine": _affine,
    "Linear": _affine,
    "Scale": _scale,
    "SumPool2d": _pool(1),
    "AvgPool2d": _pool(None),
    "Flatten": _flatten,
}


__all__ = ["load_nir"]
