"""What a network returns: one tensor, or tensors in tuples, lists and dicts, nested as they may be; the order counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quickspike.errors import DataError

Outputs = Any
"""A tensor, or tensors in tuples, lists and dicts."""


def tensors(outputs: Outputs) -> list[Tensor]:
    """All tensors, in order."""
    return [leaf for _, leaf in _leaves(outputs, "") if isinstance(leaf, Tensor)]


def first(outputs: Outputs) -> Tensor:
    """The tensor that counts as the answer where there can be but one: classes, loss, early exit.

    Raises:
        DataError: there is none.
    """
    found = tensors(outputs)
    if not found:
        raise DataError(f"the network gives no tensor but a {type(outputs).__name__}")
    return found[0]


def each(function: Callable[..., Tensor], outputs: Outputs, *more: Outputs) -> Outputs:
    """`function` of every tensor, or of every group of tensors in the same place; None stays None.

    Named tuples become plain ones, and any mapping a dict.
    """
    if outputs is None:
        return None
    if isinstance(outputs, Mapping):
        return {key: each(function, one, *(other[key] for other in more)) for key, one in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        parts = (each(function, *group) for group in zip(outputs, *more, strict=True))
        return list(parts) if isinstance(outputs, list) else tuple(parts)
    return function(outputs, *more)


def places(outputs: Outputs) -> dict[str, Any]:
    """Everything that is returned but None, by where it stands: `['out']`, `[0][1]`; a tensor alone stands at ""."""
    return {place: leaf for place, leaf in _leaves(outputs, "") if leaf is not None}


def apart(expected: Outputs, got: Outputs) -> float:
    """The largest distance in units of the largest value of that tensor; infinite where shapes differ."""
    pairs = list(zip(tensors(expected), tensors(got), strict=False))
    if len(tensors(expected)) != len(tensors(got)) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    errors = torch.stack([(b - a).abs().max() / a.abs().max().clamp_min(1e-12) for a, b in pairs])
    # A NaN must not get lost.
    return float(errors.max())


def _leaves(outputs: Outputs, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(outputs, Mapping):
        for key, one in outputs.items():
            yield from _leaves(one, f"{place}[{key!r}]")
    elif isinstance(outputs, (tuple, list)):
        for number, one in enumerate(outputs):
            yield from _leaves(one, f"{place}[{number}]")
    else:
        yield place, outputs
