"""What `quantise` and `fold` share: a spiking network's graph whose signals are counted in other units."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from quickspike.conversion import SpikingNetwork
from quickspike.neuron import Neuron


class Regrading(abc.ABC):
    """First every node is read in order (`read`), then what was decided is written (`later`).

    Args:
        snn: changed in place.
    """

    def __init__(self, snn: SpikingNetwork) -> None:
        self.module = snn.network
        self.like = next(snn.parameters())
        with torch.no_grad():
            ShapeProp(self.module).propagate(torch.zeros(1, *snn.input_shape).to(self.like))
        self.later: list[Callable[[], None]] = []

    @abc.abstractmethod
    def read(self, node: fx.Node) -> None:
        """Decide what becomes of `node`, after all that it reads."""

    @torch.no_grad()
    def run(self) -> None:
        """Rewrite the graph."""
        nodes = list(self.module.graph.nodes)
        self._separate(nodes)
        for node in nodes:
            self.read(node)
        for write in self.later:
            write()
        self.module.delete_all_unused_submodules()
        self.module.graph.lint()
        self.module.recompile()

    def _separate(self, nodes: Sequence[fx.Node]) -> None:
        """Give every call of a layer its own copy: the units of their inputs differ."""
        # A weight that the graph also reads by name stays as it is there.
        seen = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
        for node in nodes:
            target = str(node.target)
            if node.op == "call_module" and target in seen and not isinstance(self._layer(node), Neuron):
                node.target = self._add(f"{target}_{node.name}".replace(".", "_"), copy.deepcopy(self._layer(node)))
            seen.add(target)

    def _layer(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of one sample and step."""
        return tuple(node.meta["tensor_meta"].shape[1:])

    def _add(self, base: str, layer: nn.Module) -> str:
        number, name = 1, base
        while hasattr(self.module, name):
            number += 1
            name = f"{base}_{number}"
        self.module.add_submodule(name, layer.to(self.like))
        return name


__all__ = ["Regrading"]
