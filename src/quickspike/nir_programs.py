"""A NIR graph in the programs themselves that read it, where they are installed: what `nir_readers.play` is held against."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quickspike.errors import OptionError
from quickspike.nir_readers import reader_of


@torch.no_grad()
def run_in(reader: str, graph: Any, images: Tensor, steps: int) -> Tensor:
    """What the program `reader` gives at every step, `[T, B, K]`.

    Args:
        reader: sinabs, spikingjelly, snntorch or norse.
        graph: `nir.NIRGraph`, as `to_nir` writes it for that reader; not modified.
        images: `[B, ...]`, the same at every step.
        steps: T.

    Raises:
        OptionError: it is not installed, or nothing that could be run (`nir`).
        UnknownNameError: no such reader.
    """
    rules = reader_of(reader)
    if reader not in _PROGRAMS:
        raise OptionError(f"{reader} is a specification and no program; run one of {', '.join(sorted(_PROGRAMS))}")
    try:
        # They print, and some warn that they will change.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            outputs = _PROGRAMS[reader](copy.deepcopy(graph), images, steps)
    except ImportError as error:
        raise OptionError(f"{reader} {rules.version} is not installed ({error}); pip install 'quickspike[readers]'") from error
    return outputs.flatten(2)


def _sinabs(graph: Any, images: Tensor, steps: int) -> Tensor:
    from sinabs.nir import from_nir

    network = from_nir(graph, batch_size=len(images))
    # Time is folded into the batch there, the steps of a sample side by side.
    found = network(images.repeat_interleave(steps, 0))
    outputs: Tensor = found[0] if isinstance(found, tuple) else found
    return outputs.unflatten(0, (len(images), steps)).transpose(0, 1)


def _stepwise(network: Callable[..., Any], images: Tensor, steps: int) -> Tensor:
    outputs, state = list[Tensor](), None
    for _ in range(steps):
        # Left out at first: as None it is not the same to all of them.
        out, state = network(images) if state is None else network(images, state)
        outputs.append(out)
    return torch.stack(outputs)


def _spikingjelly(graph: Any, images: Tensor, steps: int) -> Tensor:
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    return _stepwise(import_from_nir(graph, dt=1.0), images, steps)


def _snntorch(graph: Any, images: Tensor, steps: int) -> Tensor:
    from snntorch.import_nir import import_from_nir

    return _stepwise(import_from_nir(graph), images, steps)


def _norse(graph: Any, images: Tensor, steps: int) -> Tensor:
    from norse.torch.utils.import_nir import from_nir

    return _stepwise(from_nir(graph), images, steps)


_PROGRAMS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "sinabs": _sinabs,
    "spikingjelly": _spikingjelly,
    "snntorch": _snntorch,
    "norse": _norse,
}


__all__ = ["run_in"]
