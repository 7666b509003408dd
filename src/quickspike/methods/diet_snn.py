"""DIET-SNN: the image itself as input current, and one leak and one threshold per layer learned with the weights.

N. Rathi, K. Roy, "DIET-SNN: Direct Input Encoding with Leakage and Threshold Optimization in Deep Spiking Neural
Networks", arXiv 2008.03658 (version 3), IEEE TNNLS.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from quickspike.data import ImageStream
from quickspike.graph import Site
from quickspike.method import Method, Paper, register
from quickspike.neuron import Neuron, NeuronParameters, Surrogate, unfold
from quickspike.operators import ReLU
from quickspike.options import option
from quickspike.training import Train
from quickspike.tuning import Tuning, end_to_end

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork

logger = logging.getLogger(__name__)

Height = Literal["threshold", "found", "unit"]


@register
@dataclass(frozen=True, kw_only=True)
class DietSNN(Method):
    """Leaky integrate-and-fire neurons whose thresholds come from simulated currents, then end-to-end training.

    u(t) = leak v(t-1) + W x(t), z = u/theta - 1, o = 1[z > 0], v = u - theta o (the order of the code since 2021; the
    only one that works at T = 5). Surrogate derivative do/dz = 0.3 max(0, 1 - |z|), the reset taken as given. The
    thresholds are found layer by layer in a running simulation in which earlier layers already spike: the largest over
    time of the percentile of the input current, times `scaling`.

    Differs from the paper: biases and folded batch norms are allowed, so that spikes have the height of their threshold;
    without biases unit spikes are the same up to a factor per layer, with them only heights keep the function of the
    source. `height=unit` with `scaling` 0.2 is the paper's choice for T = 5. Residual blocks get thresholds from data too,
    where the published code sets one number (give `default_threshold` for that).
    """

    name: ClassVar[str] = "diet_snn"
    paper: ClassVar[Paper] = Paper(
        "N. Rathi, K. Roy",
        "DIET-SNN: Direct Input Encoding with Leakage and Threshold Optimization in Deep Spiking Neural Networks",
        2020,
        "2008.03658",
    )
    later: ClassVar[tuple[str, ...]] = (*Method.later, "default_threshold")

    steps: int = option(5, "time steps the spiking network runs for", unit="steps", low=1, high=65536)
    percentile: float = option(
        99.7, "share of a layer's input currents that lie below its threshold", unit="%", low=0, high=100, low_open=True
    )
    scaling: float = option(
        0.7, "factor on every threshold; the paper has 0.7 for T = 25, 0.3 to 0.6 for 12 to 20, 0.2 for 5", low=0, high=2, low_open=True
    )
    default_threshold: float = option(
        0.0,
        "threshold of the layers in residual blocks; the published code has 0.4 for T = 5, 0.55 to 0.95 for more (0: from currents)",
        low=0,
        high=100,
    )
    calibration_steps: int = option(100, "steps of the simulation that finds the thresholds", unit="steps", low=1, high=10_000)
    calibration_batch: int = option(64, "images of the simulation that finds the thresholds", unit="images", low=1, high=1_000_000)
    height: Height = option(
        "threshold",
        "height of a spike: that of the threshold as it is learned, of the threshold found, or 1 as in the paper",
    )
    initial: float = option(0.0, "initial potential", unit="theta", low=0, high=1)
    leak: float = option(1.0, "leak that training starts from", low=0, high=1)
    longer: int = option(
        0, "first train at this many steps, then at the final number (0: only the final one)", unit="steps", low=0, high=65536
    )
    shortening: float = option(0.9, "factor on the thresholds when the number of steps is lowered", low=0, high=2, low_open=True)

    def activation(self, site: Site) -> nn.Module:
        return ReLU(site.ceiling)

    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        # The threshold is a placeholder until `adjust` has seen currents.
        scaled = self.height == "threshold"
        return NeuronParameters(torch.tensor(1.0), initial=self.initial, leak=self.leak, scaled=scaled, strict=True)

    def surrogate(self) -> Surrogate:
        return Surrogate("triangular", width=1.0, scale=0.3)

    def adjust(self, snn: SpikingNetwork, images: ImageStream) -> None:
        batch = images.head(self.calibration_batch)
        find_thresholds(snn, batch, self.calibration_steps, self.percentile, self.height == "found")
        with torch.no_grad():
            for neuron in snn.neurons().values():
                neuron.threshold.mul_(self.scaling)
            for name in sites_in_blocks(snn) if self.default_threshold else ():
                neuron = snn.neuron(name)
                neuron.threshold.fill_(self.default_threshold)
                if self.height == "found":
                    neuron.amplitude.fill_(self.default_threshold)

    def tuning_stages(self) -> Mapping[str, Mapping[str, Any]]:
        return {**({f"tune{self.longer}": {}} if self.longer > self.steps else {}), "tune": {}}

    def tune(self, snn: SpikingNetwork, train: Train, tuning: Tuning) -> None:
        if self.longer > self.steps:
            snn.set_steps(self.longer)
            end_to_end(snn, train, tuning, f"tune{self.longer}")
            snn.set_steps(self.steps)
            with torch.no_grad():
                for neuron in snn.neurons().values():
                    neuron.threshold.mul_(self.shortening)
        end_to_end(snn, train, tuning)


def sites_in_blocks(snn: SpikingNetwork) -> list[str]:
    """Names of the sites behind the first fork whose branches are added up again: of a residual network, all but the stem's."""
    graph = snn.network.graph
    (image,) = (node for node in graph.nodes if node.op == "placeholder")
    order = {node: number for number, node in enumerate(graph.nodes)}
    before: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        parents = [parent for parent in node.all_input_nodes if image in before[parent]]
        before[node] = {node}.union(*(before[parent] for parent in node.all_input_nodes))
        if node.target is operator.add and len(parents) == 2:
            fork = max(before[parents[0]] & before[parents[1]], key=order.__getitem__)
            names = {site.name for site in snn.sites}
            return [str(site.target) for site in graph.nodes if site.target in names and order[site] > order[fork]]
    return []


def find_thresholds(snn: SpikingNetwork, images: Tensor, steps: int, percentile: float, as_height: bool = False) -> None:
    """Set every threshold of `snn`, in place, in one simulation of `steps` steps.

    Each layer is simulated over all steps before the next one, so that the currents of a layer come from spikes of
    layers whose thresholds are known. Weighted spikes have no weights in it, and groups are single neurons.

    Args:
        snn: its thresholds are overwritten.
        images: `[B, ...]`.
        steps: of the simulation.
        percentile: in percent, over the whole tensor of one step; the largest over the steps counts.
        as_height: spikes get the height of the threshold found, for good.
    """
    parameter = next(snn.parameters())
    own = snn.steps
    kinds = [(neuron, neuron.weighted, neuron.members) for neuron in snn.neurons().values()]
    for neuron, _, _ in kinds:
        neuron.weighted, neuron.members = False, 1
    snn.set_steps(steps)
    with torch.no_grad():
        _ThresholdFinder(snn, steps, percentile, as_height).run(images.to(parameter))
    snn.set_steps(own)
    for neuron, weighted, members in kinds:
        neuron.weighted, neuron.members = weighted, members


class _ThresholdFinder(fx.Interpreter):
    def __init__(self, snn: SpikingNetwork, steps: int, percentile: float, as_height: bool) -> None:
        super().__init__(snn.network)
        self.steps, self.percentile, self.as_height = steps, percentile, as_height

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, Neuron):
            currents = args[0].unsqueeze(0) if layer.constant_input else unfold(args[0], self.steps)
            theta = max(rank_percentile(current, self.percentile) for current in currents)
            if theta <= 0:
                logger.warning("site %s: no positive current in the calibration images; its threshold is set to 1", target)
                theta = 1.0
            layer.threshold.fill_(theta)
            if self.as_height:
                layer.amplitude.fill_(theta)
        return super().call_module(target, args, kwargs)


def rank_percentile(values: Tensor, percent: float) -> float:
    """The k-th smallest of all values, k = 1 + round(0.01 percent (N - 1)), as the published code takes it."""
    rank = 1 + round(0.01 * percent * (values.numel() - 1))
    return float(values.flatten().kthvalue(rank).values)
