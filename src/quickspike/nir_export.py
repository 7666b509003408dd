"""A spiking network as a NIR file: the graph of the folded network in the nodes that other programs read.

NIR (Pedersen et al., Nature Communications 15:8122, 2024) has no word for reset by subtraction, a potential to begin with,
the number of steps, the comparison or the input coding. All of that goes into the file's metadata, where `load_nir` finds it
again, and into a list of what is lossy for the reader that the file is for. Nodes that NIR has only in part are written with
others: poolings as sums, shortcuts that cut or scale as convolutions of 1 x 1, grouped and oblong kernels with zeros.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from quickspike.conversion import SpikingNetwork
from quickspike.errors import ConversionError, OptionError
from quickspike.files import write_bytes
from quickspike.folding import fold, padding_of
from quickspike.neuron import Neuron, Repeat
from quickspike.nir_chains import chained
from quickspike.nir_readers import KEY, Reader, reader_of
from quickspike.operators import FUNCTION_NAMES, Affine
from quickspike.readouts import LeakyReadout
from quickspike.version import __version__

if TYPE_CHECKING:
    import nir

FORMAT = 2
"""Version of the metadata; files without a readout that leaks are of version 1, which knows none."""
WAYS_OUT = "ways out: average pooling instead of max-pooling (qs.replace_max_pool before the training), padding in convolutions, ReLUs"
Initial = Literal["left out", "bias"]


@dataclass(frozen=True)
class Loss:
    """Something of a network that a NIR file does not say to its reader."""

    what: str
    sites: tuple[str, ...]
    """Where; empty for the whole network."""
    way_out: str

    def __str__(self) -> str:
        shown = f" ({len(self.sites)} sites: {', '.join(self.sites[:3])}{', ...' if len(self.sites) > 3 else ''})" if self.sites else ""
        return f"{self.what}{shown}; {self.way_out}"


@dataclass(frozen=True)
class Exported:
    """A NIR graph, and what it does not say."""

    graph: nir.NIRGraph
    reader: Reader
    losses: tuple[Loss, ...]
    nodes: dict[str, str]
    """The node of every site."""


def need_nir() -> Any:
    """The package nir.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import nir
    except ImportError:
        raise OptionError("NIR files need the package nir; pip install 'quickspike[nir]'") from None
    return nir


def to_nir(snn: SpikingNetwork, reader: str = "nir", initial: Initial = "left out") -> Exported:
    """The NIR graph of `snn`, folded (see `SpikingNetwork.fold`), written for a reader.

    Args:
        snn: not modified.
        reader: `nir` (the specification), `sinabs`, `spikingjelly`, `snntorch` or `norse`; they differ in poolings, time
            steps and resets, see `quickspike.nir_readers.READERS`.
        initial: a potential v(0) to begin with is `left out`, or comes in as a `bias` v(0)/T of every step: by step T the
            same has come in.

    Raises:
        ConversionError: NIR has no nodes for a part of the network; every such part is named.
        UnknownNameError: no such reader.
        OptionError: nir is not installed, the network was accelerated, or initial is something else.
    """
    need_nir()
    if initial not in get_args(Initial):
        raise OptionError(f"initial must be one of {', '.join(map(repr, get_args(Initial)))}, got {initial!r}")
    rules = reader_of(reader)
    # In one step members of groups are single neurons that read the same current.
    snn = snn.as_single_neurons() if snn.members > 1 and snn.steps == 1 else snn
    snn.refuse_levels("NIR")
    network = fold(snn)
    with torch.no_grad():
        ShapeProp(network.network).propagate(torch.zeros(1, *network.input_shape).to(next(network.parameters())))
    writer = _Writer(network, rules, initial)
    graph, nodes = writer.run()
    metadata = _metadata(snn, network, rules, initial, nodes)
    try:
        metadata["sha256"] = digest(graph, metadata)
        graph.metadata = {KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise ConversionError(f"the network holds something that JSON does not ({error}); look at its provenance") from error
    return Exported(graph, rules, losses_of(network, rules, initial), nodes)


def export_nir(snn: SpikingNetwork, path: str | Path, reader: str = "nir", initial: Initial = "left out", strict: bool = False) -> Exported:
    """Write `snn` to a NIR file, the same bytes every time; `Exported.losses` says what a reader will not know.

    Args:
        snn: not modified.
        path: HDF5, `.nir` by custom.
        reader: see `to_nir`.
        initial: see `to_nir`.
        strict: refuse to write a file whose reader would answer otherwise than `snn`.

    Raises:
        ConversionError: NIR has no nodes for a part of the network, or `strict` and something is lost.
        OutputError: the file cannot be written.
        UnknownNameError: no such reader.
        OptionError: nir is not installed, the network was accelerated, or initial is something else.
    """
    exported = to_nir(snn, reader, initial)
    if strict and exported.losses:
        listed = "\n".join(f"- {loss}" for loss in exported.losses)
        raise ConversionError(f"not written, because {reader} would not answer as this network does:\n{listed}")
    written = io.BytesIO()
    need_nir().write(written, exported.graph)
    write_bytes(path, written.getvalue())
    return exported


def losses_of(network: SpikingNetwork, reader: Reader, initial: Initial) -> tuple[Loss, ...]:
    """What the folded `network` has and `reader` will not know."""
    found, neurons = list[Loss](), network.neurons()

    def where(holds: Callable[[Neuron], bool]) -> tuple[str, ...]:
        return tuple(name for name, neuron in neurons.items() if holds(neuron))

    def note(what: str, sites: tuple[str, ...], way_out: str) -> None:
        if sites:
            found.append(Loss(what, sites, way_out))

    if reader.reset == "zero":
        way_out = "tune under that reset (`quickspike tune --reset zero`), or take reader=sinabs, which subtracts"
        note("reset by subtraction: a spike sets the potential to 0 there", where(lambda neuron: not neuron.to_zero), way_out)
    else:
        note("reset to 0: a spike takes theta from the potential there", where(lambda neuron: neuron.to_zero), "take another reader")
    if reader.several:
        note("one spike in a step: a neuron may fire several times there", tuple(neurons), "measure the difference")
    if reader.lowest is not None:
        note(f"potentials without a lower bound: they end at -{reader.lowest:g} theta there", tuple(neurons), "measure the difference")
    begin = where(lambda neuron: bool((neuron.initial != 0).any()))
    if initial == "bias":
        note("potentials to begin with come in bit by bit, as biases", begin, "by step T all has come in that does not leak")
    else:
        note("potentials to begin with: they are 0 there", begin, "initial=bias lets them in over T steps")
    if reader.compares == ">":
        note("firing at m >= theta: a potential that meets theta does not fire there", where(lambda neuron: not neuron.strict), "rare")
    else:
        note("firing at m > theta: a potential that meets theta fires there", where(lambda neuron: neuron.strict), "rare")
    note("spikes that are taken back", where(lambda neuron: neuron.signed), "convert with signed=False")
    windows = where(lambda neuron: neuron.averaged and not neuron.constant_input) if network.steps > 1 else ()
    note("layers that wait for whole windows", windows, "convert with synchronous=False")
    leaky = where(lambda neuron: bool((neuron.leak != 1).any()))
    if reader.name == "norse":
        note("currents of leaky neurons count whole: they come in as 1 - leak of them there", leaky, "take another reader")
    return tuple(found)


def _metadata(snn: SpikingNetwork, network: SpikingNetwork, reader: Reader, initial: Initial, nodes: dict[str, str]) -> dict[str, Any]:
    return {
        "format": 1 if snn.readout_leak is None else FORMAT,
        "version": __version__,
        "reader": reader.name,
        "dt": reader.dt,
        "initial": initial,
        "steps": snn.steps,
        "input_shape": list(snn.input_shape),
        "input": "the same image at every step",
        **_readout(snn),
        "method": snn.method,
        "provenance": snn.provenance,
        "sites": [
            {
                "node": nodes[site.name],
                "name": site.name,
                "function": site.function,
                "ceiling": site.ceiling,
                "shape": list(site.shape),
                # Without the folder, which is that of a machine.
                "source": re.sub(r"^\S*[/\\]", "", site.source),
                "encodes_input": site.encodes_input,
                "initial": _plain(network.neuron(site.name).initial),
                "leak": _plain(network.neuron(site.name).leak),
                **{
                    flag: getattr(network.neuron(site.name), flag) for flag in ("strict", "averaged", "signed", "to_zero", "constant_input")
                },
            }
            for site in network.sites
        ],
    }


def _readout(snn: SpikingNetwork) -> dict[str, Any]:
    if snn.readout_leak is None:
        return {"readout": "mean of the outputs over the steps"}
    return {"readout": "mean of the outputs over the steps, that of step s of T weighted by leak^(T-s)", "readout_leak": snn.readout_leak}


def _plain(values: Tensor) -> Any:
    """A number, or one for each channel or neuron."""
    flat = values.detach().reshape(-1).tolist()
    return flat[0] if len(flat) == 1 else flat


def digest(graph: Any, metadata: dict[str, Any]) -> str:
    """SHA-256 over metadata, edges and every array of every node."""
    text = json.dumps({key: value for key, value in metadata.items() if key != "sha256"}, sort_keys=True)
    found = hashlib.sha256(text.encode())
    found.update(json.dumps(sorted(map(list, graph.edges))).encode())
    for name in sorted(graph.nodes):
        node = graph.nodes[name]
        found.update(f"\0{name}\0{type(node).__name__}".encode())
        for key, value in sorted(vars(node).items()):
            if key in ("metadata", "input_type", "output_type"):
                continue
            array = np.asarray(value)
            # Whole numbers come back from a file in another width, and tuples as arrays.
            array = array.astype(np.int64) if array.dtype.kind in "iu" else array
            found.update(f"\0{key}\0{array.dtype.kind}\0{list(array.shape)}\0".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


# The graph


@dataclass
class _Point:
    """A convolution of 1 x 1 without bias, which another one may take in."""

    matrix: Tensor
    stride: tuple[int, ...]


class _Writer:
    """Every node of the folded network in NIR's nodes. A signal is a list of nodes whose outputs add up."""

    def __init__(self, snn: SpikingNetwork, reader: Reader, initial: Initial) -> None:
        self.nir = need_nir()
        self.snn, self.reader, self.initial = snn, reader, initial
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.points: dict[str, _Point] = {}
        self.signals: dict[fx.Node, list[str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sites: dict[str, str] = {}
        self.refused: list[str] = []

    @torch.no_grad()
    def run(self) -> tuple[Any, dict[str, str]]:
        for node in self.snn.network.graph.nodes:
            self.signals[node] = []
            if not all(self.signals[parent] for parent in node.all_input_nodes):
                continue  # what comes before is refused already
            try:
                self.signals[node] = self._write(node)
            except _Unspeakable as error:
                self.refused.append(f"{node.target if node.op == 'call_module' else node.name}: {error}")
        if self.refused:
            listed = "\n".join(f"- {reason}" for reason in self.refused)
            raise ConversionError(f"NIR has no nodes for this network:\n{listed}\n{WAYS_OUT}")
        self._join_points()
        if self.initial == "bias":
            for site, name in self.sites.items():
                self._let_in(name, self.snn.neuron(site).initial.detach() / self.snn.steps)
        if not self.reader.adds:
            chained(self.nodes, self.edges, self.reader, self.snn.steps)
        for name, node in self.nodes.items():
            if any(np.issubdtype(np.asarray(value).dtype, np.floating) and not np.isfinite(value).all() for value in vars(node).values()):
                raise ConversionError(f"{name}: weights hold NaN or infinite values; look for where the training went wrong")
        names = self._numbered()
        graph = self.nir.NIRGraph(
            nodes={names[name]: node for name, node in self.nodes.items()}, edges=[(names[a], names[b]) for a, b in sorted(self.edges)]
        )
        return graph, {site: names[name] for site, name in self.sites.items()}

    def _numbered(self) -> dict[str, str]:
        """Names that sort in the order of computation, since HDF5 and some readers keep no other."""
        width = len(str(len(self.nodes)))
        return {name: f"n{number:0{width}d}_{name}" for number, name in enumerate(self.nodes)}

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["tensor_meta"].shape[1:])

    def _put(self, base: str, node: Any, sources: Sequence[str], shape: tuple[int, ...]) -> list[str]:
        """Add a node that reads the sum of `sources`."""
        name = re.sub(r"\W", "_", base)
        while name in self.nodes:
            name += "_"
        self.nodes[name], self.shapes[name] = node, shape
        self.edges += [(source, name) for source in sources]
        return [name]

    def _write(self, node: fx.Node) -> list[str]:
        if node.op == "placeholder":
            return self._put("input", self.nir.Input(np.array(self.snn.input_shape)), [], tuple(self.snn.input_shape))
        parents = node.all_input_nodes
        if node.op == "output":
            if len(parents) != 1 or node.args[0] is not parents[0]:
                raise _Unspeakable("several outputs")
            shape = self.shapes[self.signals[parents[0]][0]]
            return self._put("output", self.nir.Output(np.array(shape)), self.signals[parents[0]], shape)
        if node.op == "call_module":
            return self._layer(node, self.snn.network.get_submodule(str(node.target)), self.signals[parents[0]])
        if node.op == "call_function":
            return self._function(node)
        raise _Unspeakable("weights of its own, in no layer")

    def _layer(self, node: fx.Node, layer: Any, x: list[str]) -> list[str]:
        name, shape, before = str(node.target), self._shape(node), self._shape(node.all_input_nodes[0])
        if isinstance(layer, Neuron):
            # A map that was not flattened has two axes more.
            shape = self._unflattened(x, shape)
            self.sites[name] = self._put(name, self._neuron(layer, shape), x, shape)[0]
            return [self.sites[name]]
        if isinstance(layer, (Repeat, LeakyReadout)):
            # A readout that leaks is told in the metadata: whoever averages the outputs weighs them.
            return x
        if isinstance(layer, Affine):
            return self._affine(name, layer, x, self._unflattened(x, shape))
        if type(layer) in (nn.Conv1d, nn.Conv2d):
            return self._put(name, self._convolution(layer, before), x, shape)
        if type(layer) is nn.Linear and len(shape) == 1:
            return self._linear(name, layer, node, x)
        if type(layer) is nn.AvgPool2d:
            return self._pool(name, layer, x, before, shape)
        if type(layer) is nn.AdaptiveAvgPool2d and not any(a % b for a, b in zip(before[1:], shape[1:], strict=True)):
            size = tuple(a // b for a, b in zip(before[1:], shape[1:], strict=True))
            return self._pool(name, _average(size), x, before, shape)
        if type(layer) is nn.Flatten and shape == (math.prod(before),):
            return self._flatten(name, x, before, shape)
        raise _Unspeakable(type(layer).__name__)

    def _unflattened(self, x: list[str], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a signal of that shape: with two axes of 1 more behind a layer in the place of a flattening."""
        found = self.shapes[x[0]]
        if found not in (shape, (*shape, 1, 1)):
            raise _Unspeakable(
                f"reads a flattened map, which {self.reader.name} {self.reader.version} does not flatten; take another reader"
            )
        return found

    def _function(self, node: fx.Node) -> list[str]:
        name, parents = FUNCTION_NAMES.get(node.target, str(node.target)), node.all_input_nodes
        shape, before = self._shape(node), self._shape(parents[0])
        x = self.signals[parents[0]]
        if name == "add" and len(node.args) == 2 and all(isinstance(arg, fx.Node) and self._shape(arg) == shape for arg in node.args):
            return self._sum(node)
        if name == "cat" and (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) == 1:
            return self._joined(node, cast(list[fx.Node], node.args[0]))
        if name in ("flatten", "reshape") and shape == (math.prod(before),):
            return self._flatten(node.name, x, before, shape)
        if name == "adaptive_avg_pool2d" and not any(a % b for a, b in zip(before[1:], shape[1:], strict=True)):
            size = tuple(a // b for a, b in zip(before[1:], shape[1:], strict=True))
            return self._pool(node.name, _average(size), x, before, shape)
        if name == "avg_pool2d" and len(parents) == 1:
            return self._pool(node.name, _average(*node.args[1:], **node.kwargs), x, before, shape)
        if name == "pad" and len(before) == 3:
            return self._padded(node, x, before, shape)
        if name == "getitem" and len(before) == 3:
            return self._thinned(node, x, before, shape)
        raise _Unspeakable(f"the function {name}")

    # Nodes

    def _neuron(self, neuron: Neuron, shape: tuple[int, ...]) -> Any:
        leak = neuron.bounded()[1].detach().double()
        # Per channel it may have fewer axes than a map that was not flattened.
        leak = (leak.reshape(-1, *(1,) * (len(shape) - 1)) if leak.numel() > 1 else leak).expand(shape)
        ones = np.ones(shape, np.float32)
        if self.reader.neuron == "IF" and bool((leak == 1).all()):
            return self.nir.IF(r=ones, v_threshold=ones, v_reset=np.zeros(shape, np.float32))
        if self.reader.name == "sinabs" and len(shape) > 1:
            raise _Unspeakable(f"leaky neurons on a map, on which {self.reader.name} {self.reader.version} fails")
        tau = -1 / leak.log() if self.reader.name == "sinabs" else self.reader.dt / (1 - leak)
        # Without leak tau is infinite; 1e3 seconds lose 1e-7 of a potential in a step of 0.1 ms.
        tau = tau.clamp(max=1e7 * self.reader.dt)
        constant = tau.numpy().astype(np.float32)
        return self.nir.LIF(
            tau=constant,
            r=(constant / np.float32(self.reader.dt)).astype(np.float32),
            v_leak=np.zeros(shape, np.float32),
            v_threshold=ones,
            v_reset=np.zeros(shape, np.float32),
        )

    def _convolution(self, layer: Any, before: tuple[int, ...]) -> Any:
        if layer.padding_mode != "zeros":
            raise _Unspeakable(f"padding with {layer.padding_mode}")
        ends = list(layer._reversed_padding_repeated_twice)
        padding = ends[::2][::-1]
        if ends[::2] != ends[1::2]:
            raise _Unspeakable("padding that is not the same on both sides")
        weight = _dense(layer.weight.detach(), layer.groups)
        if weight.ndim == 4:
            weight, padding = _square(weight, padding, layer.dilation)
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        if weight.ndim == 3:
            return self.nir.Conv1d(before[1], _array(weight), layer.stride[0], padding[0], layer.dilation[0], 1, _array(bias))
        return self._conv2d(weight, bias, before, tuple(layer.stride), tuple(padding), tuple(layer.dilation))

    def _conv2d(
        self,
        weight: Tensor,
        bias: Tensor,
        before: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: Any = (1, 1),
    ) -> Any:
        return self.nir.Conv2d(tuple(before[1:]), _array(weight), stride, padding, dilation, 1, _array(bias))

    def _point(
        self, base: str, matrix: Tensor, x: list[str], before: tuple[int, ...], shape: tuple[int, ...], stride: Any = (1, 1)
    ) -> list[str]:
        """A convolution of 1 x 1 with the weights `matrix` `[C_out, C_in]`."""
        (name,) = self._put(base, self._conv2d(matrix[..., None, None], torch.zeros(len(matrix)), before, tuple(stride), (0, 0)), x, shape)
        self.points[name] = _Point(matrix, tuple(stride))
        return [name]

    def _affine(self, name: str, layer: Affine, x: list[str], shape: tuple[int, ...]) -> list[str]:
        matrix, bias = torch.diag(layer.weight.detach()), layer.bias.detach()
        if len(shape) == 1:
            return self._put(name, self.nir.Affine(_array(matrix), _array(bias)), x, shape)
        if len(shape) != 3:
            raise _Unspeakable("a scale per channel on one or three axes")
        if not bool(bias.any()):
            return self._point(name, matrix, x, shape, shape)
        return self._put(name, self._conv2d(matrix[..., None, None], bias, shape, (1, 1), (0, 0)), x, shape)

    def _linear(self, name: str, layer: nn.Linear, node: fx.Node, x: list[str]) -> list[str]:
        weight = layer.weight.detach()
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        before = self.shapes[x[0]]
        if len(before) == 1:
            return self._put(name, self.nir.Affine(_array(weight), _array(bias)), x, self._shape(node))
        # The map was not flattened, for a reader that cannot: one convolution over all of it does the same.
        if len(before) != 3 or before[1] != before[2]:
            size = " x ".join(map(str, before[1:]))
            raise _Unspeakable(f"{self.reader.name} reads no Flatten, and the map of {size} is not square; take another reader")
        return self._put(name, self._conv2d(weight.reshape(-1, *before), bias, before, (1, 1), (0, 0)), x, (len(weight), 1, 1))

    def _pool(self, name: str, pool: nn.AvgPool2d, x: list[str], before: tuple[int, ...], shape: tuple[int, ...]) -> list[str]:
        size, stride, padding = (_both(value) for value in (pool.kernel_size, pool.stride, pool.padding))
        if pool.ceil_mode or pool.divisor_override not in (None, 1) or (any(padding) and not pool.count_include_pad):
            raise _Unspeakable("an average pooling that counts otherwise at the edges")
        sums, number = pool.divisor_override == 1, math.prod(size)
        kind = self.nir.SumPool2d if self.reader.pools == "sum" else self.nir.AvgPool2d
        made = self._put(name, kind(*(np.array(value) for value in (size, stride, padding))), x, shape)
        factor = {("sum", False): 1 / number, ("average", True): float(number)}.get((self.reader.pools, sums), 1.0)
        return made if factor == 1 else self._point(f"{name}_scaled", torch.eye(shape[0]) * factor, made, shape, shape)

    def _flatten(self, name: str, x: list[str], before: tuple[int, ...], shape: tuple[int, ...]) -> list[str]:
        if len(before) == 1 or not self.reader.flattens:
            return x
        return self._put(name, self.nir.Flatten(np.array(before), 0, -1), x, shape)

    def _sum(self, node: fx.Node) -> list[str]:
        left, right = (self.signals[cast(fx.Node, arg)] for arg in node.args)
        twice = [name for name in left if name in right]
        shape = self._unflattened(left, self._shape(node))
        if not twice:
            return left + right
        # An edge is there once or not at all.
        if len(shape) == 3:
            return left + self._point(f"{node.name}_again", torch.eye(shape[0]), right, shape, shape)
        again = self.nir.Affine(np.eye(shape[0], dtype=np.float32), np.zeros(shape[0], np.float32))
        return left + self._put(f"{node.name}_again", again, right, shape)

    def _joined(self, node: fx.Node, parts: list[fx.Node]) -> list[str]:
        """A concatenation: each part moved to its channels, and all added."""
        shape, names, start = self._shape(node), list[str](), 0
        if len(shape) != 3:
            raise _Unspeakable("a concatenation of anything but maps")
        for part in parts:
            own = self._shape(part)
            matrix = torch.zeros(shape[0], own[0])
            matrix[start : start + own[0]] = torch.eye(own[0])
            names += self._point(f"{node.name}_{start}", matrix, self.signals[part], own, shape)
            start += own[0]
        return names

    def _padded(self, node: fx.Node, x: list[str], before: tuple[int, ...], shape: tuple[int, ...]) -> list[str]:
        pads, mode, value = padding_of(node)
        pads = (*pads, *(0,) * (6 - len(pads)))
        if mode != "constant" or value or len(pads) > 6:
            raise _Unspeakable(f"padding with {mode if mode != 'constant' else value}")
        if pads[0] != pads[1] or pads[2] != pads[3] or min(pads) < 0:
            raise _Unspeakable("padding that is not the same on both sides")
        matrix = torch.zeros(shape[0], before[0])
        matrix[pads[4] : pads[4] + before[0]] = torch.eye(before[0])
        if pads[0] or pads[2]:
            convolution = self._conv2d(matrix[..., None, None], torch.zeros(shape[0]), before, (1, 1), (pads[2], pads[0]))
            return self._put(node.name, convolution, x, shape)
        return self._point(node.name, matrix, x, before, shape)

    def _thinned(self, node: fx.Node, x: list[str], before: tuple[int, ...], shape: tuple[int, ...]) -> list[str]:
        """Every n-th row and column."""
        index: Any = node.args[1]
        whole = isinstance(index, tuple) and len(index) == 4 and all(isinstance(part, slice) for part in index)
        if not whole or any(part.start not in (None, 0) or part.stop is not None for part in index) or index[:2] != (slice(None),) * 2:
            raise _Unspeakable("a part of a map")
        return self._point(node.name, torch.eye(before[0]), x, before, shape, tuple(part.step or 1 for part in index[2:]))

    # Afterwards

    def _join_points(self) -> None:
        """Let convolutions of 1 x 1 that follow one another be one."""
        for name in list(self.points):
            sources = [a for a, b in self.edges if b == name]
            if len(sources) != 1 or sources[0] not in self.points or sum(a == sources[0] for a, _ in self.edges) != 1:
                continue
            first, second = self.points.pop(sources[0]), self.points[name]
            joined = _Point(second.matrix @ first.matrix, tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)))
            before = self.nodes[sources[0]].input_shape
            bias = torch.zeros(len(joined.matrix))
            self.nodes[name] = self._conv2d(joined.matrix[..., None, None], bias, (0, *before), joined.stride, (0, 0))
            self.points[name] = joined
            del self.nodes[sources[0]]
            self.edges = [(a, name if b == sources[0] else b) for a, b in self.edges if a != sources[0]]

    def _let_in(self, name: str, current: Tensor) -> None:
        """Add `current`, scalar or per channel, to what the neurons at node `name` get."""
        if not bool(current.any()):
            return
        channels = self.shapes[name][0]
        if current.numel() not in (1, channels):
            raise ConversionError(f"{name}: potentials of single neurons to begin with are no bias; take initial='left out'")
        each = _array(current.reshape(-1).expand(channels))
        for source in (a for a, b in self.edges if b == name):
            node = self.nodes[source]
            if hasattr(node, "bias") and sum(a == source for a, _ in self.edges) == 1:
                self.nodes[source] = replace_bias(node, node.bias + each)
                return
        self._insert_bias(name, each)

    def _insert_bias(self, name: str, each: Any) -> None:
        shape = self.shapes[name]
        if len(shape) not in (1, 3):
            raise ConversionError(f"{name}: a potential to begin with cannot come in as a bias here; take initial='left out'")
        eye = torch.eye(shape[0])
        bias = torch.from_numpy(each)
        node = self.nir.Affine(_array(eye), each) if len(shape) == 1 else self._conv2d(eye[..., None, None], bias, shape, (1, 1), (0, 0))
        between = f"{name}_bias"
        # In front of the neurons, where it sorts.
        self.nodes = {
            key: value for old in self.nodes for key, value in (([(between, node)] if old == name else []) + [(old, self.nodes[old])])
        }
        self.shapes[between] = shape
        self.edges = [(a, between if b == name else b) for a, b in self.edges] + [(between, name)]


class _Unspeakable(Exception):
    """NIR has no node for it."""


def replace_bias(node: Any, bias: Any) -> Any:
    """A copy of a node with another bias."""
    if hasattr(node, "stride"):
        return replace(node, bias=bias)
    return type(node)(weight=node.weight, bias=bias)


def _dense(weight: Tensor, groups: int) -> Tensor:
    """A grouped weight `[C_out, C_in/groups, ...]` with zeros between the groups, `[C_out, C_in, ...]`."""
    if groups == 1:
        return weight
    out, part = weight.shape[0] // groups, weight.shape[1]
    dense = weight.new_zeros(weight.shape[0], part * groups, *weight.shape[2:])
    for group in range(groups):
        rows = slice(group * out, (group + 1) * out)
        dense[rows, group * part : (group + 1) * part] = weight[rows]
    return dense


def _square(weight: Tensor, padding: list[int], dilation: Sequence[int]) -> tuple[Tensor, list[int]]:
    """A kernel as high as it is wide, with zeros around it and more padding: NIR takes the height for both."""
    rows, columns = weight.shape[2:]
    if rows == columns:
        return weight, padding
    if (rows - columns) % 2:
        raise _Unspeakable(f"a kernel of {rows} x {columns}, which zeros cannot make square and centred")
    more = [(max(rows, columns) - size) // 2 for size in (rows, columns)]
    square = nn.functional.pad(weight, (more[1], more[1], more[0], more[0]))
    return square, [pad + extra * step for pad, extra, step in zip(padding, more, dilation, strict=True)]


def _array(values: Tensor) -> Any:
    return values.detach().float().contiguous().numpy().copy()


def _average(*arguments: Any, **options: Any) -> nn.AvgPool2d:
    return nn.AvgPool2d(*arguments, **options)


def _both(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


__all__ = ["FORMAT", "Exported", "Initial", "Loss", "digest", "export_nir", "losses_of", "need_nir", "to_nir"]
