"""Distillation of features: what a teacher's layers give, which a student's layers learn to give as well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quickspike.errors import DataError
from quickspike.neuron import Neuron, unfold


@contextlib.contextmanager
def watched(network: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules of these names give while `network` is called inside, `[B, ...]`; of neurons the mean over their steps."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, _: Any, out: Tensor) -> None:
            seen[name] = unfold(out, module.steps).mean(0) if isinstance(module, Neuron) else out

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(look(name)) for name in sites]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def distance(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Mean over the teacher's layers of the squared error over all samples, in shares of what the teacher's layer gives, squared.

    So every layer counts alike, however many neurons it has and however large its activations are (the hints of Romero et
    al., arXiv 1412.6550, equation 3, at every layer; the division is ours).

    Args:
        student: `[B, ...]` by layer.
        teacher: likewise; no gradient flows into them.

    Raises:
        DataError: a layer of the student gives another shape.
    """
    errors = []
    for name, wanted in teacher.items():
        given = student[name]
        if given.shape != wanted.shape:
            raise DataError(
                f"{name}: the teacher gives {list(wanted.shape)}, the network {list(given.shape)}; features are learned from a teacher "
                "of the same architecture"
            )
        # In the type that they have: the whole in single precision would take longer than the layers.
        error = torch.linalg.vector_norm(given - wanted.to(given.dtype), dtype=torch.promote_types(given.dtype, torch.float32))
        size = torch.linalg.vector_norm(wanted, dtype=error.dtype)
        # A layer that is silent on these samples has no share to tell. On a GPU a look at the number would make everything wait.
        heard = size > 0
        errors.append((error / size.where(heard, torch.ones_like(size))).square() * heard)
    return torch.stack(errors).mean()
