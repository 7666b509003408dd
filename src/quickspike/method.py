"""What a conversion method is, and the registry of all of them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from quickspike.activations import CeilingProbe
from quickspike.errors import OptionError, QuickspikeError
from quickspike.neuron import MAX_STEPS, MOST_MEMBERS, MOST_WEIGHTED, Surrogate, levels_of
from quickspike.options import option, validate
from quickspike.paper import Paper as Paper
from quickspike.refinement import Refinement
from quickspike.registry import Registry
from quickspike.tuning import Tuning, end_to_end

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork
    from quickspike.data import ImageStream
    from quickspike.graph import Site, Traced
    from quickspike.neuron import NeuronParameters
    from quickspike.training import Train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """One published way from a trained network to a spiking one.

    A method fills in the hooks below; it never sees devices, files, loops or another method.
    Subclass it in a file of its own under `quickspike/methods/` and decorate the class with `@register`.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]
    per_site: ClassVar[tuple[str, ...]] = ("synchronous", "signed")
    """Options that may differ from site to site; a method adds those that only `activation` and `neuron` look at."""
    later: ClassVar[tuple[str, ...]] = ("refinements", "weighted", "members")
    """Options that came after results were made without them: at their defaults nothing tells of them (digests of recipes)."""

    steps: int = option(8, "time steps the spiking network runs for", unit="steps", low=1, high=MAX_STEPS)
    synchronous: bool = option(
        False,
        "every layer waits for the whole window of the one before and integrates its mean: no error from spike order, depth x T steps",
    )

    signed: bool = option(
        False,
        "neurons take spikes back (spikes of -1) that were too many: little error from spike order; for hardware with signed spikes",
    )
    weighted: bool = option(
        False,
        f"each spike counts twice as much as one at the next step: 2^T levels in T steps (at most {MOST_WEIGHTED}); layers wait as with "
        "synchronous; for hardware that shifts",
    )
    members: int = option(
        1,
        "neurons in the group that stands in place of one (arXiv 2402.19061): as many levels in one step for so many times the neurons",
        low=1,
        high=MOST_MEMBERS,
    )
    sites: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    """Options at some sites only, by a pattern of their names: {"layer1.*": {"initial": 0.0}}; the last that fits wins."""
    refinements: tuple[Refinement, ...] = ()
    """What follows the conversion, in order; `method | refinement` adds one."""

    def __post_init__(self) -> None:
        validate(self)
        if not isinstance(self.refinements, tuple):
            raise OptionError(f"{self.name}: refinements must be a tuple of refinements, got {self.refinements!r}")
        for one in self.refinements:
            if not isinstance(one, Refinement):
                raise OptionError(f"{self.name}: refinements must be such as quickspike.refinements holds, got {one!r}")
        if self.signed and self.pools_spikes:
            raise OptionError(
                f"{self.name} takes the maximum of the spikes of single steps, which spikes of -1 would spoil; leave signed out"
            )
        if self.weighted and (self.signed or self.pools_spikes):
            why = "spikes of -1" if self.signed else "the maximum of the spikes of single steps"
            raise OptionError(f"{self.name}: weighted spikes have no place for {why}; leave one of them out")
        if self.weighted and self.steps > MOST_WEIGHTED:
            raise OptionError(f"{self.name}: weighted spikes have at most {MOST_WEIGHTED} steps, got steps={self.steps}")
        if self.members > 1 and (self.signed or self.weighted or self.pools_spikes):
            why = "spikes of -1" if self.signed else "weighted spikes" if self.weighted else "the maximum of the spikes of single steps"
            raise OptionError(f"{self.name}: groups of neurons (members) have no place for {why}; leave one of them out")
        if not isinstance(self.sites, Mapping) or not all(isinstance(options, Mapping) for options in self.sites.values()):
            raise OptionError(
                f"{self.name}: sites must be options by pattern, such as {{'layer1.*': {{'initial': 0.0}}}}, got {self.sites!r}"
            )
        for pattern, options in self.sites.items():
            for key in options:
                if key not in self.per_site:
                    raise OptionError(
                        f"{self.name}: {key} cannot differ from site to site ({pattern!r}); these can: {', '.join(self.per_site)}"
                    )
            self._with(options)

    def __or__(self, other: Refinement) -> Method:
        """This method followed by a refinement."""
        if not isinstance(other, Refinement):
            return NotImplemented
        return dataclasses.replace(self, refinements=(*self.refinements, other))

    def at(self, site: Site) -> Method:
        """The method as it is at one site."""
        return self._with(
            {key: value for pattern, options in self.sites.items() if fnmatchcase(site.name, pattern) for key, value in options.items()}
        )

    def _with(self, options: Mapping[str, Any]) -> Method:
        return dataclasses.replace(self, sites={}, refinements=(), **options)

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raise OptionError if a pattern of `sites` fits none of these."""
        for pattern in self.sites:
            if not any(fnmatchcase(site.name, pattern) for site in sites):
                raise OptionError(f"{self.name}: sites={pattern!r} fits no site; sites: {', '.join(site.name for site in sites)}")

    @property
    def pools_spikes(self) -> bool:
        """True: max-pooling looks at the spikes of every step; False: it moves in front of the neuron and accumulates."""
        return False

    def waits(self, site: Site) -> bool:
        """True if the neurons at `site` wait for the whole window of the layer before."""
        return (self.synchronous or self.weighted) and not site.encodes_input

    @property
    def resolution(self) -> int:
        """Levels above 0 that T steps tell apart: what ceilings and thresholds are fitted for."""
        return levels_of(self.steps, self.weighted, self.members)

    def source(self, model: nn.Module) -> nn.Module:
        """The network that is traced: `model` itself, or `model` behind something that the method needs in front of it."""
        return model

    @abc.abstractmethod
    def activation(self, site: Site) -> nn.Module:
        """What stands at `site` while the source network is calibrated or trained."""

    def fit(self, ann: Traced, images: ImageStream, train: Train | None = None) -> None:
        """Fit the prepared network `ann` in place: calibrate it with unlabelled images, and train it if `train` is given.

        By default one pass over the images, in which the activations are in training mode without gradients and can
        watch, then one stage of training of all parameters, after which every `CeilingProbe` watches the trained network.
        """
        activations = [ann.at(site) for site in ann.sites]
        images.feed(ann.module, activations)
        if train is None:
            return
        train(ann.module, "ann")
        probes = [activation for activation in activations if isinstance(activation, CeilingProbe)]
        for probe in probes:
            probe.forget()
        if probes:
            images.feed(ann.module, probes)

    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """Names of the stages that `fit` trains, in order, and the settings that each changes; for `run --dry-run`."""
        return {"ann": {}}

    @abc.abstractmethod
    def neuron(self, site: Site, activation: nn.Module) -> NeuronParameters:
        """Threshold, initial potential, leak and amplitude of the neurons at `site`, from the fitted activation."""

    def surrogate(self) -> Surrogate:
        """The derivative that stands in for that of the step function when the spiking network is trained."""
        return Surrogate()

    def adjust(self, snn: SpikingNetwork, images: ImageStream) -> None:  # noqa: B027 - a hook that may stay empty
        """Adjust the converted network in place with unlabelled images. By default nothing."""

    def tune(self, snn: SpikingNetwork, train: Train, tuning: Tuning) -> None:
        """Train the spiking network `snn` in place. By default end to end with surrogate gradients."""
        end_to_end(snn, train, tuning)

    def tuning_stages(self) -> Mapping[str, Mapping[str, Any]]:
        """The stages that `tune` trains, see `stages`."""
        return {"tune": {}}

    def refine(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> None:
        """Let every refinement change the converted network, in place."""
        for one in self.refinements:
            one.refine(snn, ann, images)

    def to_json(self) -> dict[str, Any]:
        """Name, options and refinements as plain data; `from_json` gives the same method back."""
        options = dataclasses.asdict(dataclasses.replace(self, refinements=()))
        del options["refinements"]
        if not self.sites:
            del options["sites"]
        refined = {"refinements": [one.to_json() for one in self.refinements]} if self.refinements else {}
        return {"name": self.name, "options": options, **refined}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Method:
        """Inverse of `to_json`.

        Raises:
            UnknownNameError: no method, or no refinement, of that name is registered.
            OptionError: an option does not exist or is out of range.
        """
        refined = tuple(Refinement.from_json(one) for one in data.get("refinements", ()))
        return create(data["name"], **data["options"], refinements=refined)


def label(method: Mapping[str, Any]) -> str:
    """What a method as plain data is called where several are shown: its name and the refinements behind it."""
    refined = []
    for one in method.get("refinements", ()):
        try:
            refined.append(str(Refinement.from_json(one)))
        except (QuickspikeError, KeyError, TypeError):
            # Of another version, or of a package that is not here.
            refined.append(str(one.get("name")) if isinstance(one, Mapping) else str(one))
    return " | ".join([str(method.get("name")), *refined])


METHODS: Registry[Method] = Registry("method", "quickspike.methods", beside=("sites", "refinements"))
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known by its `name` everywhere (Python, command line, docs, contract tests)."""
    METHODS.register(cls)
    return cls


def all_methods() -> dict[str, type[Method]]:
    """Every registered method by name: those of this package and those that others install.

    Another distribution adds one through the entry point group `quickspike.methods`.
    """
    return METHODS.all()


def get(name: str) -> type[Method]:
    """The method class called `name`.

    Raises:
        UnknownNameError: there is none; the message offers the nearest name.
    """
    return METHODS.get(name)


def create(name: str, **options: Any) -> Method:
    """A method from its name and options.

    Raises:
        UnknownNameError: no such method.
        OptionError: no such option, or its value is out of range.
    """
    return METHODS.create(name, **options)
