"""One file per published method; each registers itself, so that a new one needs no edit anywhere else."""

from __future__ import annotations

from quickspike.method import Method, all_methods


def __getattr__(name: str) -> type[Method]:
    """`quickspike.methods.PotentialInit` and its like, looked up in the registry."""
    for cls in all_methods().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(cls.__name__ for cls in all_methods().values())
