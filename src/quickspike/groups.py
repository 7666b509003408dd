"""Members of groups as neurons of their own: a network of plain integrate-and-fire neurons, for whatever knows no groups."""

from __future__ import annotations

import copy
import dataclasses
import operator
from typing import TYPE_CHECKING

from torch import Tensor, fx

from quickspike.errors import OptionError
from quickspike.graph import Site
from quickspike.neuron import Neuron, NeuronParameters

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork


def spread(snn: SpikingNetwork) -> SpikingNetwork:
    """A copy of `snn` whose groups are as many sites, which read the same current and whose spikes add up; T = 1.

    From the second step on members would have to inhibit one another, which single neurons do not.

    Raises:
        OptionError: T is larger.
    """
    if snn.members > 1 and snn.steps > 1:
        raise OptionError(
            f"members of groups inhibit one another from the second step on, but T = {snn.steps}; take snn.with_steps(1), or "
            "convert with members=1"
        )
    other = copy.deepcopy(snn)
    module, sites = other.network, list[Site]()
    nodes = {str(node.target): node for node in module.graph.nodes if node.op == "call_module"}
    for site in other.sites:
        neuron = other.neuron(site.name)
        sites += [site] if neuron.members == 1 else _split(module, nodes[site.name], site, neuron)
    module.graph.lint()
    # A new GraphModule holds its layers in the order of the graph, as every converted network does.
    other.network = fx.GraphModule(module, module.graph, type(module).__name__)
    other.sites = tuple(sites)
    return other.train(snn.training)


def _split(module: fx.GraphModule, node: fx.Node, site: Site, group: Neuron) -> list[Site]:
    """Put the members in place of the group at `node`; their sites."""
    theta, _ = group.bounded()
    height: Tensor = group.height(theta) / group.members
    sites: list[Site] = []
    total = node
    for member in range(1, group.members + 1):
        name = _free(module, f"{site.name}_{member}_of_{group.members}")
        parameters = NeuronParameters(
            threshold=theta * member / group.members,
            # All start from the same potential.
            initial=group.initial / member,
            leak=group.leak,
            amplitude=height,
            scaled=False,
            strict=group.strict,
        )
        neuron = Neuron(parameters, group.steps, group.constant_input, group.surrogate).to(group.threshold)
        module.add_submodule(name, neuron.train(group.training))
        sites.append(dataclasses.replace(site, name=name))
        with module.graph.inserting_before(node):
            one = module.graph.call_module(name, node.args)
            total = one if total is node else module.graph.call_function(operator.add, (total, one))
    node.replace_all_uses_with(total)
    module.graph.erase_node(node)
    module.delete_submodule(site.name)
    return sites


def _free(module: fx.GraphModule, name: str) -> str:
    known = {path for path, _ in module.named_modules()}
    while name in known:
        name += "_"
    return name
