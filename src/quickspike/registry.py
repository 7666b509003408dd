"""Classes by name: those in a folder of this package, where a new file is all it takes, and those that others install."""

from __future__ import annotations

import importlib
import pkgutil
from importlib import metadata
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from quickspike.errors import ConversionError, UnknownNameError
from quickspike.options import check_names


class Named(Protocol):
    """What is registered."""

    name: ClassVar[str]


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Dataclasses with a `name` and declared options.

    Args:
        kind: what they are, in messages.
        package: where their files lie; another distribution adds one through the entry point group of the same name.
        beside: fields that `create` takes besides the options.
    """

    def __init__(self, kind: str, package: str, beside: tuple[str, ...] = ()) -> None:
        self.kind, self.package, self.beside = kind, package, beside
        self._classes: dict[str, type[T]] = {}

    def register(self, cls: type[T]) -> None:
        """Make a class known by its name.

        Raises:
            ConversionError: another class has that name.
        """
        other = self._classes.get(cls.name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConversionError(f"the {self.kind} name {cls.name!r} is taken by {other.__module__}.{other.__qualname__}")
        self._classes[cls.name] = cls

    def all(self) -> dict[str, type[T]]:
        """Every class by name, sorted."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        for entry in metadata.entry_points(group=self.package):
            self.register(entry.load())
        return dict(sorted(self._classes.items()))

    def get(self, name: str) -> type[T]:
        """The class called `name`.

        Raises:
            UnknownNameError: there is none; the message offers the nearest name.
        """
        classes = self.all()
        if name not in classes:
            raise UnknownNameError(self.kind, name, classes)
        return classes[name]

    def create(self, name: str, **options: Any) -> T:
        """An object from its name and options.

        Raises:
            UnknownNameError: no such name.
            OptionError: no such option, or its value is out of range.
        """
        cls = self.get(name)
        check_names(cls, (key for key in options if key not in self.beside))
        return cls(**options)
