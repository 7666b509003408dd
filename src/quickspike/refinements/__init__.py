"""One file for each published way to improve a converted network without training; each registers itself."""

from __future__ import annotations

from quickspike.refinement import REFINEMENTS, Refinement


def __getattr__(name: str) -> type[Refinement]:
    """`quickspike.refinements.BiasCorrection` and its like, looked up in the registry."""
    for cls in REFINEMENTS.all().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(cls.__name__ for cls in REFINEMENTS.all().values())
