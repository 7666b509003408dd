"""Networks with shortcuts as plain chains, for readers of NIR that add nothing up or run branches in the wrong order.

Spikes that a shortcut takes past some layers take another way: each of these layers gets more channels, which hand the
spikes on. An integrate-and-fire neuron that gets a spike with a weight just above its threshold fires at once and rests at
what it was before, whatever its reset, so that nothing is lost or late. The layer at which the shortcut ended then reads
them beside its own input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from quickspike.errors import ConversionError
from quickspike.nir_readers import Reader, pair

Array = Any
NEURONS = ("IF", "LIF")
ABOVE = 1 + 2**-10
"""Weight of a spike that is handed on: meeting the threshold is not enough for some. So little above it that nothing comes of
what a reset by subtraction leaves, in up to `MOST_STEPS`."""
MOST_STEPS = 1000
PASSING = ("SumPool2d", "AvgPool2d", "Flatten")
"""Nodes that a sum passes through channel by channel."""


@dataclass
class _Graph:
    """Nodes by name, and edges; changed in place."""

    nodes: dict[str, Any]
    edges: list[tuple[str, str]]

    def kind(self, name: str) -> str:
        return type(self.nodes[name]).__name__

    def parents(self, name: str) -> list[str]:
        return [a for a, b in self.edges if b == name]

    def children(self, name: str) -> list[str]:
        return [b for a, b in self.edges if a == name]

    def remove(self, name: str) -> None:
        del self.nodes[name]
        self.edges[:] = [(a, b) for a, b in self.edges if name not in (a, b)]


@dataclass
class _Shortcut:
    """Spikes of `start` that come to `end` past the nodes `path`."""

    start: str
    path: list[str]
    end: str
    between: str | None
    """The convolution of 1 x 1 on the way, if there is one."""
    tail: str | None = None
    """Likewise, between `path` and a sum of spikes."""


def chained(nodes: dict[str, Any], edges: list[tuple[str, str]], reader: Reader, steps: int) -> None:
    """Rewrite a graph, in place, so that no node reads the sum of several.

    Args:
        nodes: by name, in the order of computation.
        edges: of the graph.
        reader: whose rules neurons follow that hand spikes on.
        steps: T.

    Raises:
        ConversionError: a sum is not that of a chain of convolutions and neurons and of spikes past it, or T > 1000.
    """
    graph = _Graph(nodes, edges)
    # The first join in the order of computation is that of the innermost shortcut, as none is joined before it.
    while joins := [name for name in graph.nodes if len(graph.parents(name)) > 1]:
        if steps > MOST_STEPS:
            raise ConversionError(f"{reader.name}: networks with shortcuts are written for at most {MOST_STEPS} steps, got {steps}")
        shortcut = _shortcut(graph, joins[0])
        if shortcut is None:
            parents = ", ".join(graph.parents(joins[0]))
            raise ConversionError(
                f"{reader.name} {reader.version} adds nothing up, and what comes to {joins[0]} ({parents}) is no chain of convolutions and "
                "neurons on maps that stay as large, with a shortcut of spikes past it, which could be written without a sum; "
                "take reader=nir, which has sums"
            )
        _reroute(graph, shortcut, reader)


def _shortcut(graph: _Graph, end: str) -> _Shortcut | None:
    parents = graph.parents(end)
    if len(parents) != 2:
        return None
    for short, last in (parents, parents[::-1]):
        between = short if _is_point(graph, short) and graph.children(short) == [end] else None
        start = graph.parents(short)[0] if between else short
        if graph.kind(start) not in NEURONS:
            continue
        if graph.kind(end) not in NEURONS and between and graph.nodes[between].bias.any():
            continue  # it would have to go through poolings and edges of maps
        tail = last if graph.kind(end) not in NEURONS and _is_scale(graph, last) and graph.children(last) == [end] else None
        last = graph.parents(last)[0] if tail else last
        path = _path(graph, start, last)
        if path is not None and _fits(graph, path, between) and _can_join(graph, end, last):
            return _Shortcut(start, path, end, between, tail)
    return None


def _is_point(graph: _Graph, name: str) -> bool:
    node = graph.nodes[name]
    return (
        graph.kind(name) == "Conv2d" and node.weight.shape[2:] == (1, 1) and not any(pair(node.padding)) and len(graph.parents(name)) == 1
    )


def _is_scale(graph: _Graph, name: str) -> bool:
    return _is_point(graph, name) and not graph.nodes[name].bias.any() and pair(graph.nodes[name].stride) == (1, 1)


def _path(graph: _Graph, start: str, last: str) -> list[str] | None:
    """Convolutions and neurons from `start` to `last`, each with one that it reads and one that reads it."""
    path, name = list[str](), last
    while name != start:
        parents = graph.parents(name)
        if len(parents) != 1 or len(graph.children(name)) != 1 or graph.kind(name) not in (*NEURONS, "Conv2d"):
            return None
        path.insert(0, name)
        (name,) = parents
    return path or None


def _fits(graph: _Graph, path: list[str], between: str | None) -> bool:
    """True if each convolution can hand on the place in its middle, and the shortcut is as coarse as all of them."""
    stride = np.array([1, 1])
    for name in path:
        node = graph.nodes[name]
        if graph.kind(name) == "Conv2d":
            if _middle(node) is None or not _keeps_edges(node):
                return False
            stride *= pair(node.stride)
    return bool((stride == (pair(graph.nodes[between].stride) if between else (1, 1))).all())


def _middle(node: Any) -> tuple[int, int] | None:
    """Where in its kernel a convolution has the place itself; None if it is not in there."""
    padding, dilation = pair(node.padding), pair(node.dilation)
    found = tuple(p // d for p, d in zip(padding, dilation, strict=True))
    inside = all(p % d == 0 and f < size for p, d, f, size in zip(padding, dilation, found, node.weight.shape[2:], strict=True))
    return (found[0], found[1]) if inside else None


def _keeps_edges(node: Any) -> bool:
    """True if every place that the stride leaves has a place in the map that a convolution gives."""
    axes = zip(*(pair(value) for value in (node.input_shape, node.padding, node.dilation, node.stride)), node.weight.shape[2:], strict=True)
    return all((n + 2 * p - d * (k - 1) - 1) // s + 1 >= -(-n // s) for n, p, d, s, k in axes)


def _can_join(graph: _Graph, end: str, last: str) -> bool:
    """True if the end of a shortcut can be read together with what comes from `last`."""
    if graph.kind(end) in NEURONS:
        return graph.kind(last) == "Conv2d"
    while graph.kind(end) in PASSING:
        if len(graph.children(end)) != 1:
            return False
        (end,) = graph.children(end)
    return graph.kind(last) in NEURONS and graph.kind(end) in ("Conv2d", "Affine") and len(graph.parents(end)) < 3


def _reroute(graph: _Graph, shortcut: _Shortcut, reader: Reader) -> None:
    channels = graph.nodes[shortcut.start].v_threshold.shape[0]
    joining = graph.kind(shortcut.end) in NEURONS
    matrix, bias = _on_the_way(graph, shortcut, channels)
    convolutions = [name for name in shortcut.path if graph.kind(name) == "Conv2d"]
    for name in shortcut.path:
        node = graph.nodes[name]
        if graph.kind(name) in NEURONS:
            graph.nodes[name] = _more_neurons(node, channels, reader)
        elif joining and name == convolutions[-1]:
            # Alone on the way it reads the spikes themselves.
            more = _at_middle(node, matrix)
            weight = node.weight + more if len(convolutions) == 1 else np.concatenate([node.weight, more], 1)
            graph.nodes[name] = replace(node, weight=weight, bias=node.bias + bias)
        else:
            passed = _at_middle(node, np.eye(channels, dtype=np.float32) * ABOVE)
            graph.nodes[name] = _widened(node, passed, first=name == convolutions[0])
    if shortcut.between is not None:
        graph.remove(shortcut.between)
    else:
        graph.edges.remove((shortcut.start, shortcut.end))
    if not joining:
        _read_beside(graph, shortcut, matrix)


def _more_neurons(node: Any, channels: int, reader: Reader) -> Any:
    """Neurons with `channels` more, like those of the first channel: what hands spikes on never holds a potential."""
    arrays = {name: getattr(node, name) for name in ("r", "tau", "v_leak", "v_threshold", "v_reset") if hasattr(node, name)}
    more = {name: np.broadcast_to(values[:1], (channels, *values.shape[1:])) for name, values in arrays.items()}
    if reader.name == "norse" and "tau" in arrays:
        # It lets currents in as dt/tau: all of them only where nothing of a potential is kept.
        more |= {name: np.full_like(more[name], value) for name, value in (("tau", reader.dt), ("r", 1.0))}
    return type(node)(**{name: np.concatenate([values, more[name]]) for name, values in arrays.items()})


def _on_the_way(graph: _Graph, shortcut: _Shortcut, channels: int) -> tuple[Array, Array]:
    """(weights `[C_out, C]`, bias) of the shortcut itself."""
    if shortcut.between is None:
        return np.eye(channels, dtype=np.float32), np.float32(0)
    node = graph.nodes[shortcut.between]
    return node.weight[:, :, 0, 0], node.bias


def _at_middle(node: Any, matrix: Array) -> Array:
    """`matrix` `[C_out, C_in]` as a kernel like the node's, zero but in the place itself."""
    row, column = cast(tuple[int, int], _middle(node))  # `_fits` has seen to it
    kernel = np.zeros((*matrix.shape, *node.weight.shape[2:]), np.float32)
    kernel[:, :, row, column] = matrix
    return kernel


def _widened(node: Any, passed: Array, first: bool) -> Any:
    """A convolution that also hands on channels: the ones that it reads if it is the first, else the last ones."""
    if first:
        weight = np.concatenate([node.weight, passed], 0)
    else:
        (out, into), more = node.weight.shape[:2], passed.shape[0]
        weight = np.zeros((out + more, into + more, *node.weight.shape[2:]), np.float32)
        weight[:out, :into], weight[out:, into:] = node.weight, passed
    return replace(node, weight=weight, bias=np.concatenate([node.bias, np.zeros(len(passed), np.float32)]))


def _read_beside(graph: _Graph, shortcut: _Shortcut, matrix: Array) -> None:
    """Let the layer behind a sum of spikes read both parts side by side."""
    own, end, repeats = None, shortcut.end, 1
    if shortcut.tail is not None:
        own = graph.nodes[shortcut.tail].weight[:, :, 0, 0]
        graph.edges.append((graph.parents(shortcut.tail)[0], end))
        graph.remove(shortcut.tail)
    while graph.kind(end) in PASSING:
        node = graph.nodes[end]
        if graph.kind(end) == "Flatten":
            before = np.array(node.input_type["input"])
            repeats = int(np.prod(before[1:]))
            before[0] = (before[0] if own is None else own.shape[1]) + matrix.shape[1]
            graph.nodes[end] = type(node)(before, int(node.start_dim), int(node.end_dim))
        (end,) = graph.children(end)
    node = graph.nodes[end]
    parts = [node.weight if own is None else _behind(node, own, repeats), _behind(node, matrix, repeats)]
    weight = np.concatenate(parts, 1).astype(np.float32)
    graph.nodes[end] = type(node)(weight, node.bias) if graph.kind(end) == "Affine" else replace(node, weight=weight)


def _behind(node: Any, matrix: Array, repeats: int) -> Array:
    """The weight of a layer that reads what `matrix` `[C_out, C_in]` makes of its input, each channel `repeats` times."""
    if node.weight.ndim == 2:
        return node.weight @ np.kron(matrix, np.eye(repeats, dtype=np.float32))
    return np.einsum("oikl,ic->ockl", node.weight, matrix)


__all__ = ["chained"]
