"""Which neurons drive which, through which layers: the spiking network as a small graph, for drawing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from quickspike.conversion import SpikingNetwork
from quickspike.neuron import Neuron

INPUT, OUTPUT = "network input", "network output"
"""No site is called so: names of modules hold no spaces."""


@dataclass(frozen=True)
class Edge:
    """A way of spikes, or of the image's values."""

    start: str
    """A site, or `INPUT`."""
    end: str
    """A site, or `OUTPUT`."""
    layers: tuple[str, ...]
    """Layers with weights on the way, in order."""


def edges_of(snn: SpikingNetwork) -> tuple[Edge, ...]:
    """Every connection between sites, in the order of the network.

    Two ways from one site to another are one edge, with the layers of the longer.
    """
    sites = {id(neuron): name for name, neuron in snn.neurons().items()}
    reaching: dict[fx.Node, dict[str, tuple[str, ...]]] = {}
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for node in snn.network.graph.nodes:
        came: dict[str, tuple[str, ...]] = {}
        for source in node.all_input_nodes:
            for start, layers in reaching[source].items():
                came[start] = max(came.get(start, ()), layers, key=len)
        if node.op == "placeholder":
            reaching[node] = {INPUT: ()}
            continue
        module = snn.network.get_submodule(str(node.target)) if node.op == "call_module" else None
        end = sites[id(module)] if isinstance(module, Neuron) else OUTPUT if node.op == "output" else None
        if end is not None:
            for start, layers in came.items():
                found[start, end] = max(found.get((start, end), ()), layers, key=len)
            came = {end: ()}
        elif isinstance(getattr(module, "weight", None), torch.Tensor):
            came = {start: (*layers, str(node.target)) for start, layers in came.items()}
        reaching[node] = came
    return tuple(Edge(start, end, layers) for (start, end), layers in found.items())
