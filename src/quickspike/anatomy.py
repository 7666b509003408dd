"""Where the accuracy is lost: the conversion error of every site, split into its sources.

At each site the mean output of T steps is compared with the activation of the network without spikes (same weights, the
activation in place of the neurons). With z the mean current that arrives, the way from one to the other has six steps,
whose sum is the error, element by element:

    inherited      act(z at the place that wins the max-pooling without spikes) - act(z without spikes)
    max-pooling    act(z) - act(z at that place): the pool takes the largest of values that err in both directions
    clipping       min(act(z), ceiling) - act(z): nothing above the ceiling can be expressed
    quantisation   staircase(z) - min(act(z), ceiling): what the neuron gives for the constant current z, T + 1 levels (2^T weighted,
                   T M + 1 in groups of M)
    unevenness     integrate-and-fire of the currents as they came - staircase(z): they came in another order than evenly
    neuron         output - that: what a neuron does that is not integrating, firing and subtracting theta; else 0

Clipping, quantisation and unevenness are those of Bu et al. 2022 (arXiv 2303.04347). The share of a part is its
projection on the error, E[e part] / E[e^2], so shares add up to 1 and one that cancels others is negative.

A residual join adds up and has no error of its own: it passes on those of its branches, part of what its neurons inherit.
`branches` says how much of the error of the sum comes through each of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from quickspike.conversion import SpikingNetwork
from quickspike.data import Batches, labelled_batches
from quickspike.errors import ConversionError, DataError, OptionError
from quickspike.neuron import AccumulatedMaxPool, Increment, Neuron, Repeat, RunningMean, Timed, integrate, unfold, weighted_spikes
from quickspike.operators import FUNCTION_NAMES
from quickspike.readouts import LeakyReadout
from quickspike.structure import first

PARTS = ("inherited", "max-pooling", "clipping", "quantisation", "unevenness", "neuron")
OWN = PARTS[1:]
"""What a site adds itself."""
CHUNK = 1_000_000
"""Values of an image times steps times images that are compared at a time."""
NOTABLE = 0.05
"""Own error, relative to the activations, from which there is advice."""
FAULTY = 1e-3
"""Error, relative to the activations, from which neurons are not taken for rounding."""
REMEDIES = {
    "inherited": "nothing to mend here; look at the sites before it",
    "max-pooling": "use average pooling in the source network, or more steps",
    "clipping": "raise the percentile or train the ceiling",
    "quantisation": "take more steps, or train with quantised activations (method=qcfs)",
    "neuron": "its neurons do not reset by subtraction, or not to theta: they are not those of quickspike",
    "unevenness": "fine-tune (quickspike tune), let layers wait for whole windows (synchronous=True), or take more steps",
}


@dataclass(frozen=True)
class SiteAnatomy:
    """The error of one site. Errors are root mean squares over images and neurons, as shares of that of the activations."""

    site: str
    error: float
    own: float
    """Of what the site adds: everything but what it inherits."""
    shares: dict[str, float]
    """Part of the error, by source; they add up to 1."""
    sizes: dict[str, float]
    """Root mean square of every part."""
    biases: dict[str, float]
    """Mean of every part: negative where too little comes out."""
    branches: dict[str, float]
    """Behind a residual join: how the error of its current divides among what it adds up, by the layer or site that each branch
    comes from; they add up to 1, and one that cancels others is negative."""
    silent: float
    """Share of the neurons (of all images) that did not fire."""
    saturated: float
    """Share that fired at every step, and took nothing back."""
    initial: float
    """Mean initial potential, in theta."""
    outside: float | None
    """Share that fired too often (potential left below 0) or not often enough (left above theta), though it could have
    done otherwise: the traces of unevenness. None where potentials leak."""
    rates: tuple[float, ...]
    """Shares of neurons by rate: T + 1 equal bins of [0, 1], at most ten. A spike of -1 cancels one of +1."""
    advice: str = ""


@dataclass(frozen=True)
class Anatomy:
    """All sites, in the order of the network."""

    sites: tuple[SiteAnatomy, ...]
    images: int
    steps: int

    @property
    def worst(self) -> SiteAnatomy:
        """The site to look at first: one whose neurons are faulty, else the one that adds the largest error.

        Unevenness counts only where it is by far the largest: it is as often the doing of a site before, whose few large
        spikes come late.
        """
        faulty = [one for one in self.sites if one.sizes["neuron"] > FAULTY]
        if faulty:
            return faulty[0]
        most = max(self.sites, key=lambda one: one.own)
        blunt = max(self.sites, key=_apart_from_order)
        return blunt if _apart_from_order(blunt) >= most.own / 2 else most

    @property
    def bad(self) -> tuple[SiteAnatomy, ...]:
        """Sites with advice, the one that adds the largest error first."""
        return tuple(sorted((one for one in self.sites if one.advice), key=lambda one: -one.own))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _apart_from_order(site: SiteAnatomy) -> float:
    """What thresholds and poolings alone add."""
    return math.sqrt(sum(site.sizes[name] ** 2 for name in ("max-pooling", "clipping", "quantisation")))


@dataclass
class _Sums:
    """Sums over the images so far."""

    count: int = 0
    activation: float = 0.0
    error: float = 0.0
    own: float = 0.0
    along: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    means: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    current: float = 0.0
    branches: dict[str, float] = field(default_factory=dict)
    silent: int = 0
    saturated: int = 0
    outside: int | None = 0
    rates: Tensor = field(default_factory=lambda: torch.zeros(10, dtype=torch.int64))


def check_anatomy(snn: SpikingNetwork) -> None:
    """Raise OptionError if no mean over all steps of `snn` speaks for its answer."""
    if name := snn.masked():
        why = "errors of layers are those of means over all T steps, some of which do not count behind a residual_mask"
        raise OptionError(f"{why} ({name})")


def anatomy_of(snn: SpikingNetwork, data: Batches) -> Anatomy:
    """Split the conversion error of every site on images.

    Args:
        snn: not modified; its own T. After fine-tuning the network without spikes is one that nobody trained: the
            figures then say how the two differ, not what was lost.
        data: images, with labels or without.

    Raises:
        OptionError: see `check_anatomy`.
        ConversionError: an accelerated network.
        DataError: there are no images, or they are unusable.
    """
    check_anatomy(snn)
    if "engine" in snn.provenance:
        raise ConversionError(f"a network made for the {snn.provenance['engine']['name']} engine; look into the one it was made from")
    sums = {site.name: _Sums() for site in snn.sites}
    images = 0
    with torch.inference_mode():
        for batch, _ in labelled_batches(data):
            for part in torch.split(batch, max(1, CHUNK // (batch[0].numel() * snn.steps))):
                part = part.to(next(snn.parameters()))
                spiking, plain = _Spiking(snn), _Plain(snn)
                with snn.taking(part):
                    spiking.run(part)
                    plain.run(part)
                for node in snn.network.graph.nodes:
                    if node.op == "call_module" and str(node.target) in sums:
                        _add(sums[str(node.target)], snn, node, spiking, plain)
                images += len(part)
    if images == 0:
        raise DataError("there are no images to compare on")
    return Anatomy(tuple(_finished(site.name, sums[site.name], snn.neuron(site.name), snn.steps) for site in snn.sites), images, snn.steps)


class _Kept(fx.Interpreter):
    """Keeps what arrives at neurons and leaves them, and what joins and poolings in front of them read."""

    def __init__(self, snn: SpikingNetwork) -> None:
        super().__init__(snn.network)
        self.snn = snn
        self.kept: dict[fx.Node, Tensor] = {}
        self.wanted = {wanted for site in snn.sites for wanted in _around(snn.network, site.name)}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = self.mean(n, value)
        return value

    def mean(self, n: fx.Node, value: Tensor) -> Tensor:
        """Over the steps."""
        return value


class _Spiking(_Kept):
    """The network as it is."""

    def __init__(self, snn: SpikingNetwork) -> None:
        super().__init__(snn)
        self.timed = _timed(snn.network)
        self.counts: dict[fx.Node, Tensor] = {}
        """Spikes of every neuron in all steps, those of -1 subtracted."""
        self.fired: dict[fx.Node, Tensor] = {}
        """Which neurons fired at all."""
        self.replayed: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, Neuron):
            self.replayed[str(target)] = unfold(replay(layer, args[0], self.snn.steps), self.snn.steps).mean(0)
        return super().call_module(target, args, kwargs)

    def mean(self, n: fx.Node, value: Tensor) -> Tensor:
        layer = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, Neuron):
            spikes = unfold(layer.spikes(value) * value.sign() * _height(layer).sign(), self.snn.steps)
            self.counts[n], self.fired[n] = spikes.sum(0).long(), spikes.ne(0).any(0)
        return unfold(value, self.snn.steps).mean(0) if n in self.timed else value


class _Plain(_Kept):
    """The same weights without time: activations in place of neurons."""

    def __init__(self, snn: SpikingNetwork) -> None:
        super().__init__(snn)
        self.ceilings = {site.name: site.ceiling for site in snn.sites}
        self.winners: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, Neuron):
            return activation(layer, args[0], self.ceilings[str(target)])
        if isinstance(layer, (Repeat, RunningMean, Increment, LeakyReadout)):
            return args[0]
        if isinstance(layer, AccumulatedMaxPool):
            pool: Any = copy.copy(layer.pool)
            pool.return_indices = True
            value, self.winners[self.node] = pool(args[0])
            return value
        return super().call_module(target, args, kwargs)


def replay(neuron: Neuron, current: Tensor, steps: int) -> Tensor:
    """What integrate-and-fire neurons that subtract theta give for these currents, `[T*B, ...]`; shifted ones, from where they start."""
    if neuron.first_run:
        given: Tensor = neuron(current)
        return given
    theta, leak = neuron.bounded()
    constant = neuron.constant_input or neuron.averaged
    if neuron.averaged and not neuron.constant_input:
        current = unfold(current, steps).mean(0)
    if neuron.weighted:
        return weighted_spikes(current, neuron.initial * theta, theta, _height(neuron), steps, strict=neuron.strict)
    return integrate(
        *(current, neuron.start(theta), theta, leak, _height(neuron), steps),
        constant=constant,
        strict=neuron.strict,
        signed=neuron.signed,
        members=neuron.members,
    )[0]


def _height(neuron: Neuron) -> Tensor:
    """Of a spike."""
    return neuron.amplitude * neuron.bounded()[0] if neuron.scaled else neuron.amplitude


def activation(neuron: Neuron, z: Tensor, ceiling: float | None) -> Tensor:
    """What the neuron stands for: the activation of the source, in the units of its spikes."""
    theta, _ = neuron.bounded()
    slope = 1.0 if neuron.scaled else neuron.amplitude / theta
    return (z.relu() if ceiling is None else z.clamp(0.0, ceiling)) * slope


def _timed(network: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose values differ from step to step, `[T*B, ...]`."""
    timed = set[fx.Node]()
    for node in network.graph.nodes:
        layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, Timed) or any(parent in timed for parent in node.all_input_nodes):
            timed.add(node)
    return timed


def _around(network: fx.GraphModule, site: str) -> list[fx.Node]:
    """The neuron's node, its current, and what a join or a pooling there reads."""
    (neuron,) = (node for node in network.graph.nodes if node.op == "call_module" and node.target == site)
    (current,) = neuron.all_input_nodes
    return [neuron, current, *(current.all_input_nodes if _is_join(current) or _is_pool(network, current) else ())]


def _is_join(node: fx.Node) -> bool:
    return FUNCTION_NAMES.get(node.target) == "add" and len(node.all_input_nodes) > 1


def _is_pool(network: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), AccumulatedMaxPool)


def _called(network: fx.GraphModule, node: fx.Node) -> str:
    """The layer or site that a value comes from, by its name in the source network where it has one there."""
    while len(node.all_input_nodes) == 1:
        layer = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if layer is not None and not isinstance(layer, (Repeat, RunningMean, Increment)):
            break
        (node,) = node.all_input_nodes
    return str(node.target) if node.op == "call_module" else node.name


def _add(sums: _Sums, snn: SpikingNetwork, node: fx.Node, spiking: _Spiking, plain: _Plain) -> None:
    """Take one batch into account."""
    neuron: Any = snn.neuron(str(node.target))
    ceiling = plain.ceilings[str(node.target)]
    (current,) = node.all_input_nodes
    z, wanted, out = spiking.kept[current], plain.kept[node], spiking.kept[node]
    at_winner = z
    if _is_pool(snn.network, current):
        (before,) = current.all_input_nodes
        # At the place that is largest without spikes.
        at_winner = spiking.kept[before].flatten(2).gather(2, plain.winners[current].flatten(2)).view_as(z)
    theta, leak = neuron.bounded()
    height = _height(neuron)
    here, there = activation(neuron, z, ceiling), activation(neuron, at_winner, ceiling)
    clipped = torch.minimum(here, height.expand_as(here))
    begin, strict, members = neuron.start(theta), neuron.strict, neuron.members
    evenly = (
        weighted_spikes(z, begin, theta, height, snn.steps, strict=strict)
        if neuron.weighted
        else integrate(z, begin, theta, leak, height, snn.steps, constant=True, strict=strict, members=members)[0]
    )
    stairs, fired = unfold(evenly, snn.steps).mean(0), spiking.replayed[str(node.target)]
    steps = (there - wanted, here - there, clipped - here, stairs - clipped, fired - stairs, out - fired)
    parts = dict(zip(PARTS, steps, strict=True))
    error = (out - wanted).double()
    sums.count += error.numel()
    sums.activation += float(wanted.double().square().sum())
    sums.error += float(error.square().sum())
    sums.own += float((out - there).double().square().sum())
    for name, part in parts.items():
        part = part.double()
        sums.along[name] += float((error * part).sum())
        sums.squares[name] += float(part.square().sum())
        sums.means[name] += float(part.sum())
    if _is_join(current):
        off = (z - plain.kept[current]).double()
        sums.current += float(off.square().sum())
        for branch in current.all_input_nodes:
            share = float((off * (spiking.kept[branch] - plain.kept[branch]).double()).sum())
            name = _called(snn.network, branch)
            sums.branches[name] = sums.branches.get(name, 0.0) + share
    counts = spiking.counts[node]
    sums.silent += int((~spiking.fired[node]).sum())
    most = snn.steps * members
    sums.saturated += int((counts == most).sum())
    bins = min(10, most + 1)
    sums.rates += torch.bincount((counts * bins // (most + 1)).flatten(), minlength=10).cpu()
    if bool((leak != 1).any()) or neuron.weighted:
        sums.outside = None
    elif sums.outside is not None:
        # Without a leak, what came in either went out or is still there.
        unit = theta / members
        left = begin + snn.steps * z - unit * counts
        slack = 1e-4 * unit
        too_often, too_seldom = (left < -slack) & (counts > 0), (left > unit + slack) & (counts < most)
        sums.outside += int((too_often | too_seldom).sum())


def _finished(site: str, sums: _Sums, neuron: Neuron, steps: int) -> SiteAnatomy:
    unit = math.sqrt(sums.activation / sums.count) or 1.0

    def size(square: float) -> float:
        return math.sqrt(square / sums.count) / unit

    shares = {name: value / sums.error if sums.error else 0.0 for name, value in sums.along.items()}
    found = SiteAnatomy(
        site=site,
        error=size(sums.error),
        own=size(sums.own),
        shares=shares,
        sizes={name: size(value) for name, value in sums.squares.items()},
        biases={name: value / sums.count / unit for name, value in sums.means.items()},
        branches={name: value / sums.current if sums.current else 0.0 for name, value in sums.branches.items()},
        silent=sums.silent / sums.count,
        saturated=sums.saturated / sums.count,
        initial=float(neuron.initial.mean()),
        outside=None if sums.outside is None else sums.outside / sums.count,
        rates=tuple((sums.rates.double() / sums.count)[: steps * neuron.members + 1].tolist()),
    )
    return SiteAnatomy(**{**vars(found), "advice": advice(found)})


def advice(site: SiteAnatomy) -> str:
    """One sentence on what to do about a site; empty where it is good enough."""
    if site.error < NOTABLE:
        return ""
    source = main_source(site.sizes) if site.own >= NOTABLE else max(site.shares, key=lambda name: site.shares[name])
    share, inherited, remedy = 100 * site.shares[source], 100 * site.shares["inherited"], REMEDIES[source]
    if source == "quantisation" and site.initial < 0.4:
        remedy = f"start at v(0) = theta/2 (initial=0.5), {remedy}"
    rest = f" ({inherited:.0f} % comes from the sites before it)" if inherited > share and source != "inherited" else ""
    return f"{site.site}: error {100 * site.error:.0f} % of the activations, {share:.0f} % of it {source}{rest}; {remedy}"


def main_source(sizes: Mapping[str, float]) -> str:
    """The largest of the parts that a site adds itself; a faulty neuron before all others."""
    return "neuron" if sizes["neuron"] > FAULTY else max(OWN, key=lambda name: sizes[name])


def without_spikes(snn: SpikingNetwork, images: Tensor) -> Tensor:
    """The outputs of the same weights with activations in place of neurons, `[B, K]`: what T = infinity is held against."""
    with torch.inference_mode():
        return first(_Plain(snn).run(images))
