"""Batches that are watched or changed on their way. Imports nothing, so that the command line starts fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Wrapped:
    """Items of a source, each of them watched or changed by a subclass, as often as the source has them."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source)
