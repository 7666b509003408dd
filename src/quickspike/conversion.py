"""From a traced network whose sites are fitted to a spiking network: neurons at the sites, time where it starts."""

from __future__ import annotations

import contextlib
import copy
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from quickspike.capture import axes_hint, check_sizes, free_name
from quickspike.errors import ConversionError, DataError, OptionError
from quickspike.graph import Site, Traced, fold, swap
from quickspike.memory import out_of_memory
from quickspike.method import Method
from quickspike.neuron import (
    MAX_STEPS,
    MOST_MEMBERS,
    MOST_WEIGHTED,
    AccumulatedMaxPool,
    Increment,
    Neuron,
    Repeat,
    RunningMean,
    Surrogate,
    Timed,
    levels_of,
    unfold,
)
from quickspike.operators import ANALOG_LAYERS, MAX_POOLS, NOT_AFFINE, shape
from quickspike.readouts import leak_of, readout
from quickspike.structure import Outputs, each

if TYPE_CHECKING:
    from quickspike.early_exit import Exit
    from quickspike.simulation import Run

Signal = Literal["static", "constant", "timed", "mean"]
"""static: no batch axis (weights, sizes); constant: the same at every step; timed: `[T*B, ...]`, spikes or currents of
each step; mean: `[T*B, ...]`, the mean of all steps so far, see `RunningMean`."""


class SpikingNetwork(nn.Module):
    """A converted network: an ordinary module that maps images `[B, ...]` to logits `[B, K]`, or to what the source gives.

    That may be any tensor `[B, ...]`, or several in tuples, lists and dicts; each is then the mean over the steps.

    Its state (membrane potentials) lives inside one call, so that calls do not depend on each other.

    Attributes:
        network: the graph; `print(snn.code)` shows its forward pass, which reads like the source network's.
        steps: T.
        sites: where the neurons stand, in order.
        method: name and options of the conversion method, as plain data.
        provenance: how the network was made, as plain data.
        chunk: steps whose activations are in memory at a time while training; 0 for all (see `outputs_in_chunks`).
        memory: what a simulation without gradients may take, in bytes or as "2GiB"; None for as much as it needs.
        summed: the graph computes sums over all steps at once (engine "count"); there is nothing after single steps then.
        input_shape: of one sample; the first entry (channels or features) is checked at every call.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        sites: tuple[Site, ...],
        steps: int,
        input_shape: tuple[int, ...],
        method: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.network, self.sites, self.steps, self.input_shape = network, sites, steps, input_shape
        self.method, self.provenance = dict(method), dict(provenance)
        self.chunk, self.summed = 0, False
        self.memory: str | int | None = None
        # Weights take gradients, as in any module; thresholds and their like only when asked to.
        for module in network.modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(not isinstance(module, Neuron))

    def forward(self, images: Tensor) -> Outputs:
        """Logits `[B, K]`: the readout averaged over the steps."""
        if self.memory is not None and not torch.is_grad_enabled():
            from quickspike.simulation import answer

            return answer(self, images, self.memory)
        if self.summed:
            with self.taking(images):
                return self.network(images)
        return each(lambda outputs: readout(outputs)[-1], self.outputs(images))

    def outputs(self, images: Tensor) -> Outputs:
        """What the last layer gives at each step on its own, `[T, B, K]`.

        Raises:
            ConversionError: the network computes sums over all steps.
        """
        if self.summed:
            raise ConversionError("a network made for the count engine has no outputs at single steps; take the network it was made from")
        with self.taking(images):
            if self.chunk and self.chunk < self.steps:
                from quickspike.simulation import outputs_in_chunks

                return outputs_in_chunks(self, images, self.chunk)
            return each(lambda outputs: unfold(outputs, self.steps), self.network(images))

    def run(self, images: Tensor, exit: Exit | None = None) -> Run:
        """Logits after every step and the spikes of every site; with `exit`, samples stop early. See `quickspike.simulation`."""
        from quickspike.simulation import simulate

        return simulate(self, images, exit=exit)

    def neuron(self, site: str) -> Neuron:
        """The neurons at the site of that name."""
        module = self.network.get_submodule(site)
        if not isinstance(module, Neuron):
            raise ConversionError(f"{site!r} is no site; sites: {', '.join(s.name for s in self.sites)}")
        return module

    def with_steps(self, steps: int) -> SpikingNetwork:
        """A copy that runs for another number of steps.

        Thresholds stay as they were fitted, and `method` keeps the options that they were fitted with.

        Raises:
            OptionError: steps is no whole number in range.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
            raise OptionError(f"steps must be a whole number in [1, {MAX_STEPS}], got {steps!r}")
        other = copy.deepcopy(self)
        other.set_steps(steps)
        return other

    @property
    def latency(self) -> int:
        """Steps until the last output is there: T, and the delays of the neurons on the longest way through."""
        waits: dict[fx.Node, int] = {}
        for node in self.network.graph.nodes:
            layer = self.network.get_submodule(str(node.target)) if node.op == "call_module" else None
            own = layer.delay if isinstance(layer, Neuron) else 0
            waits[node] = max((waits[parent] for parent in node.all_input_nodes), default=0) + own
        return self.steps + max(waits.values())

    @property
    def synchronous(self) -> bool:
        """True if layers wait for steps of the layer before, so that T cannot be cut short."""
        return any(neuron.waits for neuron in self.neurons().values())

    def masked(self) -> str | None:
        """Neurons that are heard after a first run only, so that no mean over all T steps speaks for the answer; None without any."""
        return next((name for name, neuron in self.neurons().items() if neuron.first_run and neuron.first_run[0] == "mask"), None)

    @property
    def readout_leak(self) -> float | None:
        """What is left of the weight of an output at the next step, see `quickspike.readouts`; None where all steps count alike."""
        return leak_of(self.network)

    def waiting(self) -> list[str]:
        """Neurons that wait for the whole window of the layer before; those that read the same current at every step do not."""
        return [name for name, neuron in self.neurons().items() if neuron.weighted or (neuron.averaged and not neuron.constant_input)]

    def refuse_leak(self, what: str) -> None:
        """Raise OptionError if the readout leaks, which `what` has no place for."""
        if self.readout_leak is not None:
            raise OptionError(f"{what} has no place for a readout that leaks; convert without leaky_readout")

    def refuse_first_runs(self, what: str) -> None:
        """Raise OptionError if neurons go through the first steps twice, which `what` has no place for."""
        for name, neuron in self.neurons().items():
            if neuron.first_run:
                way_out = "convert without offset_shift and residual_mask"
                raise OptionError(f"{what} has no place for neurons that go through the first steps twice ({name}); {way_out}")

    @property
    def weighted(self) -> bool:
        """True if spikes are weighted by their step, see `quickspike.neuron`."""
        return any(neuron.weighted for neuron in self.neurons().values())

    @property
    def resolution(self) -> int:
        """Levels above 0 that a neuron tells apart in T steps."""
        return levels_of(self.steps, self.weighted, self.members)

    @property
    def members(self) -> int:
        """Neurons in a group, see `quickspike.neuron`; 1 without groups."""
        return max((neuron.members for neuron in self.neurons().values()), default=1)

    def refuse_levels(self, what: str) -> None:
        """Raise OptionError if spikes are weighted or neurons stand in groups, which `what` has no place for."""
        for name, neuron in self.neurons().items():
            if neuron.weighted:
                raise OptionError(f"{what} has no place for spikes that are weighted by their step ({name}); take snn.rate_coded()")
            if neuron.members > 1:
                way_out = "snn.as_single_neurons() at T = 1, snn.rate_coded(), or convert with members=1"
                raise OptionError(f"{what} has no place for groups of neurons ({name}); take {way_out}")

    def _refuse_accelerated(self, way_out: str) -> None:
        if "engine" in self.provenance:
            raise OptionError(f"this network was made for the {self.provenance['engine']['name']} engine; {way_out}")

    def as_synchronous(self) -> SpikingNetwork:
        """A copy whose layers wait for the whole window of the one before; neurons that turn pixels into spikes do not.

        Raises:
            OptionError: neurons have a first run, or the readout leaks.
        """
        self.refuse_first_runs("a synchronous network")
        # Whole windows have no early steps, and the order of the spikes in them means nothing.
        self.refuse_leak("a synchronous network")
        other = copy.deepcopy(self)
        for site in other.sites:
            other.neuron(site.name).averaged = not site.encodes_input
        return other

    def as_weighted(self) -> SpikingNetwork:
        """A copy whose spikes are weighted by their step: synchronous, with 2^T - 1 levels instead of T, see `quickspike.neuron`.

        Thresholds stay as they are; `convert(..., weighted=True)` fits them for that many levels.

        Raises:
            OptionError: neurons have a first run, take spikes back, leak or are set to 0, the readout leaks, T is too large, or the
                network was accelerated.
        """
        self._refuse_accelerated("weigh the spikes of the one that it was made from")
        other = self.as_synchronous()
        _check_weighted(other.steps)
        for name, neuron in other.neurons().items():
            if neuron.signed or neuron.to_zero or neuron.members > 1 or bool((neuron.bounded()[1] != 1).any()):
                raise OptionError(f"weighted spikes need a reset by subtraction, no signs, no groups and no leak, unlike those of {name}")
            neuron.weighted = True
        return other

    def as_groups(self, members: int) -> SpikingNetwork:
        """A copy with groups of so many neurons in place of each one, where nobody waits; see `quickspike.neuron`.

        Thresholds stay as they are; `convert(..., members=M)` fits them for that many levels. What a synchronous network answers
        in M steps, and one with weighted spikes in T, this one answers in a single step with M, or 2^T - 1, in a group.

        Raises:
            OptionError: neurons have a first run, take spikes back or are set to 0, there are too many of them in a group, or the network
                was accelerated.
        """
        self._refuse_accelerated("take the one that it was made from")
        if type(members) is not int or not 1 <= members <= MOST_MEMBERS:
            raise OptionError(f"members must be a whole number in [1, {MOST_MEMBERS}], got {members!r}")
        self.refuse_first_runs("a network of groups")
        other = copy.deepcopy(self)
        for name, neuron in other.neurons().items():
            if members > 1 and (neuron.signed or neuron.to_zero):
                raise OptionError(f"groups of neurons need a reset by subtraction and no signs, unlike those of {name}")
            neuron.weighted, neuron.averaged, neuron.members = False, False, members
        return other

    def as_single_neurons(self) -> SpikingNetwork:
        """A copy whose groups are as many neurons, at sites of their own, with the same answers up to rounding; T = 1.

        For whatever knows no groups: it can be folded, quantised, exported as NIR and run by the integer engine.

        Raises:
            OptionError: T is larger, where members of a group inhibit one another, or the network was accelerated.
        """
        from quickspike.groups import spread

        self._refuse_accelerated("take the one that it was made from")
        return spread(self)

    def rate_coded(self) -> SpikingNetwork:
        """A copy without weighted spikes and groups of neurons, with the same answers up to rounding.

        It is synchronous, and runs for 2^T - 1 steps where spikes were weighted, for T M with groups of M neurons.

        Raises:
            OptionError: groups of neurons leak, or that do not wait go through several steps: their spikes depend on the order of
                what arrives; or the readout leaks.
        """
        grouped = self.members > 1
        for name, neuron in self.neurons().items() if grouped else ():
            streams = self.steps > 1 and not (neuron.averaged or neuron.constant_input)
            if streams or bool((neuron.bounded()[1] != 1).any()):
                why = "leak" if not streams else f"run for T = {self.steps} without waiting (T = 1 or synchronous=True would do)"
                raise OptionError(f"no single neurons give the answers of groups that {why} ({name}); convert with members=1")
        other = self.as_synchronous() if grouped else copy.deepcopy(self)
        for neuron in other.neurons().values():
            neuron.weighted, neuron.members = False, 1
        if self.weighted or grouped:
            other.set_steps(self.resolution)
        return other

    def as_signed(self) -> SpikingNetwork:
        """A copy whose neurons take spikes back when later currents show that they were too many.

        Raises:
            OptionError: spikes set potentials to 0 or are weighted, or neurons have a first run or stand in groups.
        """
        self.refuse_first_runs("a network that takes spikes back")
        self.refuse_levels("a network that takes spikes back")
        other = copy.deepcopy(self)
        for neuron in other.neurons().values():
            if neuron.to_zero:
                raise OptionError("spikes that are taken back need a reset by subtraction, but spikes set potentials to 0 here")
            neuron.signed = True
        return other

    def with_reset(self, reset: Literal["subtract", "zero"]) -> SpikingNetwork:
        """A copy whose spikes take theta from the potential, or set it to `zero`, as most readers of NIR have it.

        What is above theta is lost then. That costs accuracy, which fine-tuning wins back in part (`quickspike tune --reset zero`).

        Raises:
            OptionError: no such reset, or neurons take spikes back, have a first run, stand in groups or weigh their spikes, which
                needs a reset by subtraction.
        """
        if reset not in ("subtract", "zero"):
            raise OptionError(f"reset must be subtract or zero, got {reset!r}")
        if reset == "zero":
            self.refuse_first_runs("a reset to 0")
            self.refuse_levels("a reset to 0")
        other = copy.deepcopy(self)
        for name, neuron in other.neurons().items():
            if neuron.signed and reset == "zero":
                raise OptionError(f"{name} takes spikes back, which needs a reset by subtraction; convert with signed=False")
            neuron.to_zero = reset == "zero"
        return other

    def fold(self, bits: int | None = None) -> SpikingNetwork:
        """A copy that computes the same with every threshold and every height 1: all scales are in its weights.

        Average pools become sum pools. Leaks, initial potentials (as fractions of theta), firing rules and T stay. What no
        weight takes in stays as a scale per channel (`Affine`): on a shortcut without weights whose spikes have another height
        than the threshold that they reach, and between weights and neurons with a pooling or a concatenation between them.

        Args:
            bits: weights are whole numbers of so many bits, with their sign, times a scale per output channel, wherever layers
                read spikes (see `quickspike.quantise`); None: as they are.

        Raises:
            OptionError: bits is out of range, or the network was accelerated.
            ConversionError: thresholds or heights are not the same within a channel.
        """
        from quickspike.folding import fold

        return fold(self, bits)

    def set_steps(self, steps: int) -> None:
        """Let this network run for another number of steps; see `with_steps` for a copy that does.

        Raises:
            ConversionError: the network was made for one number of steps.
            OptionError: more steps than weighted spikes have.
        """
        if self.weighted:
            _check_weighted(steps)
        if self.summed and steps != self.steps:
            raise ConversionError(f"this network was made for the count engine at T = {self.steps}; accelerate one with {steps} steps")
        self.steps = steps
        for module in self.modules():
            if isinstance(module, Timed):
                module.steps = steps

    def neurons(self) -> dict[str, Neuron]:
        """The neurons of every site by its name, in order."""
        return {site.name: self.neuron(site.name) for site in self.sites}

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file; see `quickspike.checkpoint`."""
        from quickspike.checkpoint import save

        save(self, path)

    @property
    def code(self) -> str:
        """The forward pass as Python source."""
        # torch.fx frees every value after its last use; for a reader that is noise.
        return re.sub(r";  (\w+ = )+None", "", str(self.network.code)).strip() + "\n"

    def check_input(self, images: Tensor) -> None:
        """Raise DataError if the images cannot be this network's input."""
        expected = ("B", *self.input_shape)
        if images.ndim != len(expected) or images.shape[1] != self.input_shape[0] or images.shape[0] == 0:
            fits = ", ".join(map(str, expected))
            hint = axes_hint(images, self.input_shape)
            raise DataError(f"this network takes images of shape [{fits}], got {list(images.shape)}{hint}")
        if not images.is_floating_point():
            raise DataError(f"images must be floating point, got {images.dtype}; scale and normalise them as in training")
        check_sizes(images, self.provenance.get("sizes", ()))

    @contextlib.contextmanager
    def taking(self, images: Tensor) -> Iterator[None]:
        """`check_input`, and a DataError instead of torch's own where images of another size than that converted with do not pass."""
        self.check_input(images)
        try:
            yield
        except RuntimeError as error:
            other = out_of_memory(error) or isinstance(error, (NotImplementedError, RecursionError))
            if other or images.is_cuda or tuple(images.shape[1:]) == self.input_shape or images.dtype != next(self.parameters()).dtype:
                raise
            fits, reason = ", ".join(map(str, ("B", *self.input_shape))), str(error).strip().splitlines()[0]
            raise DataError(
                f"this network was converted with images of shape [{fits}] and cannot take {list(images.shape)}: {reason}"
            ) from error

    def extra_repr(self) -> str:
        return f"method={self.method.get('name')}, steps={self.steps}, sites={len(self.sites)}"


def _check_weighted(steps: int) -> None:
    if steps > MOST_WEIGHTED:
        raise OptionError(f"spikes that are weighted by their step have at most {MOST_WEIGHTED} steps, got {steps}")


def prepare(traced: Traced, method: Method) -> Traced:
    """A copy of `traced` with the method's activation at every site, on the network's device.

    Ceilings are in single precision at least: half precision would round them by up to 0.4 %.

    Raises:
        OptionError: options for sites that the network does not have.
    """
    like = next((tensor for tensor in traced.module.parameters() if tensor.is_floating_point()), torch.empty(0))
    dtype = torch.promote_types(like.dtype, torch.float32)
    method.check_sites(traced.sites)
    return swap(traced, lambda site, _: method.at(site).activation(site).to(like.device, dtype))


def to_spiking(ann: Traced, method: Method, provenance: Mapping[str, Any], surrogate: Surrogate | None = None) -> SpikingNetwork:
    """Put neurons at the sites of a prepared and fitted network.

    Args:
        ann: its sites hold the method's activations; batch norm is folded if it is not yet. It is not modified.
        method: gives the neurons their parameters, and T.
        provenance: kept with the network.
        surrogate: derivative for autograd; by default the method's own.

    Raises:
        ConversionError: no path from input to output passes a neuron.
        OptionError: options for sites that the network does not have.
    """
    method.check_sites(ann.sites)
    ann = ann if ann.folded else fold(ann)
    module = ann.copy_module()
    like = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.empty(0))
    time = _Time(module, method)
    names = {site.name: site for site in ann.sites}
    for node in list(module.graph.nodes):
        site = names.get(str(node.target)) if node.op == "call_module" else None
        if site is None:
            time.enter(node)
            continue
        constant = time.feed(node)
        here = method.at(site)
        parameters = replace(
            here.neuron(site, ann.at(site)),
            averaged=here.waits(site),
            signed=here.signed,
            weighted=here.weighted,
            members=here.members,
        )
        module.set_submodule(site.name, Neuron(parameters, method.steps, constant, surrogate or method.surrogate()).to(like))
    output = next(node for node in module.graph.nodes if node.op == "output")
    if time.signals[output] != "timed":
        raise ConversionError(f"{ann.name}: the output does not depend on any neuron")
    module.graph.lint()
    # A new GraphModule holds its layers in the order of the graph, as every copy and every loaded network does.
    module = fx.GraphModule(module, module.graph, type(module).__name__)
    return SpikingNetwork(module, ann.sites, method.steps, ann.example_shape, method.to_json(), provenance)


class _Time:
    """Follows the signals through a graph, and puts in what leads from one kind to another."""

    def __init__(self, module: fx.GraphModule, method: Method) -> None:
        self.module, self.method = module, method
        self.signals: dict[fx.Node, Signal] = {}
        self.made: dict[tuple[fx.Node, type[Timed]], fx.Node] = {}

    def feed(self, neurons: fx.Node) -> bool:
        """Let neurons read what they can; True if that is the same at every step."""
        (parent,) = neurons.all_input_nodes
        if self.signals[parent] == "mean":
            self._through(Increment, neurons, parent)
        self.signals[neurons] = "timed"
        return self.signals[parent] == "constant"

    def enter(self, node: fx.Node) -> None:
        """Let a node that is no neuron read signals of one kind."""
        kinds = {self.signals[parent] for parent in node.all_input_nodes}
        layer = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op == "placeholder":
            self.signals[node] = "constant"
        elif node.op == "get_attr" or node.target is shape:
            self.signals[node] = "static"
        elif not kinds & {"timed", "mean"}:
            self.signals[node] = "constant" if "constant" in kinds else "static"
        elif node.op == "output":
            self._mix(node, "timed")
        elif type(layer) in MAX_POOLS and kinds == {"timed"}:
            if not self.method.pools_spikes:
                self._accumulate(node)
            self.signals[node] = "timed"
        elif self._is_affine(node, layer) and "timed" in kinds:
            self._mix(node, "timed")
        else:
            self._mix(node, "mean")

    def _is_affine(self, node: fx.Node, layer: nn.Module | None) -> bool:
        if layer is not None:
            return type(layer) not in (*ANALOG_LAYERS, *MAX_POOLS)
        if node.target in (operator.mul, operator.truediv):
            factors = [arg for arg in node.args if isinstance(arg, fx.Node) and self.signals[arg] != "static"]
            return len(factors) < 2 if node.target is operator.mul else node.args[1] not in factors
        return node.target not in NOT_AFFINE

    def _mix(self, node: fx.Node, kind: Signal) -> None:
        """Let `node` read and give signals of one kind."""
        for parent in node.all_input_nodes:
            if self.signals[parent] == "constant":
                self._through(Repeat, node, parent)
            elif self.signals[parent] not in ("static", kind):
                self._through(RunningMean if kind == "mean" else Increment, node, parent)
        self.signals[node] = kind

    def _through(self, layer: type[Timed], node: fx.Node, parent: fx.Node) -> None:
        """Put a layer between `parent` and `node`; what others put there already serves again."""
        key = parent, layer
        if key not in self.made:
            name = free_name(self.module, layer.__name__.lower())
            self.module.add_submodule(name, layer(self.method.steps))
            with self.module.graph.inserting_after(parent):
                self.made[key] = self.module.graph.call_module(name, (parent,))
            self.signals[self.made[key]] = "mean" if layer is RunningMean else "timed"
        node.replace_input_with(parent, self.made[key])

    def _accumulate(self, node: fx.Node) -> None:
        """Give max-pooling its state."""
        name = free_name(self.module, str(node.target).replace(".", "_") + "_accumulated")
        self.module.add_submodule(name, AccumulatedMaxPool(self.module.get_submodule(str(node.target)), self.method.steps))
        node.target = name
