"""What can be done to a converted network without training, after its method: corrections with unlabelled images.

    qs.convert(model, images, qs.methods.PotentialInit(steps=8) | qs.refinements.BiasCorrection())

Several are applied in the order in which they are written.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from quickspike.options import named, validate
from quickspike.paper import Paper
from quickspike.registry import Registry

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork
    from quickspike.data import ImageStream
    from quickspike.graph import Traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement(abc.ABC):
    """One published way to bring a converted network closer to its source network, whatever method converted it.

    Subclass it in a file of its own under `quickspike/refinements/` and decorate the class with `@refinement`.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper]

    def __post_init__(self) -> None:
        validate(self)

    @abc.abstractmethod
    def refine(self, snn: SpikingNetwork, ann: Traced, images: ImageStream) -> None:
        """Change the converted network in place.

        Args:
            snn: on the device of `ann`.
            ann: the fitted network that it was made from, with the method's activations: what the converted one is to give. Not
                modified.
            images: without labels.
        """

    def to_json(self) -> dict[str, Any]:
        """Name and options as plain data."""
        return {"name": self.name, "options": dataclasses.asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Refinement:
        """Inverse of `to_json`.

        Raises:
            UnknownNameError: no refinement of that name is registered.
            OptionError: an option does not exist or is out of range.
        """
        return REFINEMENTS.create(data["name"], **data["options"])

    def __str__(self) -> str:
        """Name and the options that are not at their defaults."""
        changed = {field.name: value for field in dataclasses.fields(self) if (value := getattr(self, field.name)) != field.default}
        options = ",".join(f"{key}={value}" for key, value in changed.items())
        return f"{self.name}:{options}" if options else self.name


def refinements_of(texts: Iterable[str]) -> tuple[Refinement, ...]:
    """Refinements from NAME or NAME:OPTION=VALUE,OPTION=VALUE each.

    Raises:
        UnknownNameError: no such refinement.
        OptionError: it is written otherwise, there is no such option, or its value is of another kind or out of range.
    """
    return tuple(kind(**options) for kind, options in (named(text, REFINEMENTS.get) for text in texts))


REFINEMENTS: Registry[Refinement] = Registry("refinement", "quickspike.refinements")
R = TypeVar("R", bound=type[Refinement])


def refinement(cls: R) -> R:
    """Class decorator: make a refinement known by its `name` everywhere (Python, command line, docs, contract tests)."""
    REFINEMENTS.register(cls)
    return cls
