"""A converted network beside its source network, layer by layer: where they differ, and what each difference leads to.

Refinements correct a site as soon as it is reached, so that all layers behind it see the corrected spikes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quickspike.conversion import SpikingNetwork
from quickspike.data import ImageStream
from quickspike.errors import OptionError
from quickspike.graph import Traced
from quickspike.neuron import AccumulatedMaxPool, Increment, Neuron, Repeat, RunningMean, unfold
from quickspike.operators import MAX_POOLS
from quickspike.options import option
from quickspike.paper import Paper
from quickspike.refinement import Refinement
from quickspike.structure import Outputs, each, places

SNN_CALIBRATION = Paper(
    "Y. Li, S. Deng, X. Dong, R. Gong, S. Gu",
    "A Free Lunch From ANN: Towards Efficient, Accurate Spiking Neural Networks Calibration",
    2021,
    "2106.06984",
)
"""Where corrections layer by layer come from."""
Visit = Callable[[str, "Firing", Tensor, Tensor], Tensor]
"""(site, its neurons, their currents, what the source network gives there) to the currents that they shall get."""
MOST_VALUES = 2**23
"""Of the inputs of all steps that are simulated at once: 3 images of 224 x 224 pixels at T = 16, or more pixels of smaller ones."""
Reduce = Callable[[Tensor], Tensor]
"""What is kept of the source network's values `[B, ...]` at a site."""


@dataclass(frozen=True, kw_only=True)
class Correction(Refinement):
    """A refinement that goes through images in lockstep: how many, and how far it goes with each batch."""

    images: int = option(1024, "calibration images that correct", unit="images", low=1)
    batch: int = option(
        64, "of them in one batch; fewer where T or the images are large, and then the rate is lower, too", unit="images", low=1
    )
    passes: int = option(2, "times that they are gone through", low=1, high=1000)
    rate: float = option(1.0, "share of a difference that a batch corrects", low=0, high=2, low_open=True)


class Lockstep:
    """Both networks, for any number of batches.

    Args:
        snn: the converted network.
        ann: what it was made from.
        reduce: keeps of every site's values in the source network what `visit` needs; all of them would fill the memory.
        visit: is called at every site.

    Raises:
        OptionError: a part of the steps counts for no answer.
    """

    def __init__(self, snn: SpikingNetwork, ann: Traced, reduce: Reduce, visit: Visit) -> None:
        self.snn, self.ann, self.reduce, self.visit = snn, ann, reduce, visit
        self.share = 1.0
        """Images of a batch, in those that were asked for. The mean of a few tells little, so that it shall correct little."""
        self.windows = in_windows(snn)
        if snn.masked():
            raise OptionError("residual_mask lets no mean over all steps speak for the answer; write corrections in front of it")

    def run(self, images: Tensor) -> tuple[Outputs, Outputs]:
        """(what the source network gives, the spiking network's readout after T steps), both `[B, K]`."""
        with torch.no_grad():
            recorder = Recorder(self.ann, self.reduce)
            wanted = recorder.run(images)
            outputs = _Visitor(self, recorder.found).run(images)
        return wanted, outputs if self.windows else each(lambda out: unfold(out, self.snn.steps).mean(0), outputs)

    def over(self, images: ImageStream, count: int, size: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The same by place, see `structure.places`, for the first `count` images, up to `size` of them at a time.

        Fewer at a time where their values at all steps would be too many.
        """
        parameter = next(self.snn.network.parameters())
        values = images.example.numel() * (1 if self.windows else self.snn.steps)
        wished = min(size, count)
        some = min(wished, max(1, MOST_VALUES // values))
        for batch in rebatched(images.some(count), some):
            self.share = len(batch) / wished
            wanted, given = self.run(batch.to(parameter))
            yield places(wanted), places(given)


def in_windows(snn: SpikingNetwork) -> bool:
    """True if every layer waits for a mean over the steps: that mean is all that counts of T steps.

    Not where pools look at single spikes.
    """
    layers = (snn.network.get_submodule(str(node.target)) for node in snn.network.graph.nodes if node.op == "call_module")
    if any(type(layer) in MAX_POOLS for layer in layers):
        return False
    return all((neuron.averaged or neuron.constant_input) and not neuron.first_run for neuron in snn.neurons().values())


def rebatched(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same samples in batches of `size`, the last one smaller."""
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= size:
            whole = torch.cat(waiting)
            yield whole[:size]
            waiting = [whole[size:]] if len(whole) > size else []
    if waiting:
        yield torch.cat(waiting)


class Firing:
    """The neurons at one site, fed with other currents than the network's.

    Where all layers wait for whole windows, currents `[B, ...]` are means over the steps and so is what comes out;
    elsewhere they are `[T*B, ...]`, or `[B, ...]` where they are the same at every step.
    """

    def __init__(self, neuron: Neuron, windows: bool) -> None:
        self.neuron, self.windows = neuron, windows

    def outputs(self, current: Tensor) -> Tensor:
        """What goes to the next layer."""
        return self.neuron.mean_output(current) if self.windows else self.neuron(current)

    @property
    def gain(self) -> Tensor:
        """What a unit of current adds to the mean output of neurons that are neither silent nor saturated, `[C]` or `[]`."""
        theta, _ = self.neuron.bounded()
        gain = (self.neuron.height(theta) / theta).double()
        return gain.flatten(1).mean(1) if gain.ndim > 1 else gain

    def mean(self, outputs: Tensor) -> Tensor:
        """The mean of these outputs over the steps, `[B, ...]`."""
        return outputs if self.windows else unfold(outputs, self.neuron.steps).mean(0)


class Recorder(fx.Interpreter):
    """Runs the source network and keeps of the values at its sites what `reduce` makes of them."""

    def __init__(self, ann: Traced, reduce: Reduce) -> None:
        super().__init__(ann.module)
        self.sites, self.reduce = {site.name for site in ann.sites}, reduce
        self.found: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(target, args, kwargs)
        if target in self.sites:
            self.found[target] = self.reduce(out)
        return out


class SiteBySite(fx.Interpreter, abc.ABC):
    """Runs a spiking network; what comes out of its neurons is up to `outputs`.

    Args:
        snn: the network.
        windows: it is `in_windows`, and runs on means over the steps, `[B, ...]`.
    """

    def __init__(self, snn: SpikingNetwork, windows: bool) -> None:
        super().__init__(snn.network)
        self.windows = windows

    @abc.abstractmethod
    def outputs(self, site: str, firing: Firing, current: Tensor) -> Tensor:
        """What goes to the next layer."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer: nn.Module = self.fetch_attr(target)
        if isinstance(layer, Neuron):
            return self.outputs(target, Firing(layer, self.windows), args[0])
        if self.windows and isinstance(layer, (Repeat, RunningMean, Increment)):
            return args[0]
        if self.windows and isinstance(layer, AccumulatedMaxPool):
            return layer.pool(args[0])
        return super().call_module(target, args, kwargs)


class _Visitor(SiteBySite):
    def __init__(self, lockstep: Lockstep, wanted: Mapping[str, Tensor]) -> None:
        super().__init__(lockstep.snn, lockstep.windows)
        self.visit, self.wanted = lockstep.visit, wanted

    def outputs(self, site: str, firing: Firing, current: Tensor) -> Tensor:
        return firing.outputs(self.visit(site, firing, current, self.wanted[site]))


def channel_means(x: Tensor) -> Tensor:
    """Mean over everything but the channels: `[B, C, ...]` to `[C]`, in double precision."""
    return x.double().mean([0, *range(2, x.ndim)])
