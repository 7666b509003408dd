"""What becomes of a network in a reader of NIR: by its rules, and in the program itself where it is installed."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quickspike.errors import DataError, OptionError
from quickspike.nir_readers import play, reader_of
from quickspike.readouts import answers
from quickspike.simulation import simulate

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork
    from quickspike.nir_export import Exported


@dataclass(frozen=True)
class Agreement:
    """How a reader's answers compare with those of the network that was written, after all steps."""

    reader: str
    program: bool
    """Run in the program itself; else by its rules, see `nir_readers.play`."""
    images: int
    own_accuracy: float
    """Of the network, in percent."""
    accuracy: float
    """Of the reader, in percent."""
    agreement: float
    """Same most likely class, in percent of the images."""
    spikes: float | None
    """Spikes of all neurons of the network, as multiples of its own; None where a program does not show them."""
    same_counts: float | None
    """Neurons that spike as often as in the network, in percent of neurons and images."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def compare(snn: SpikingNetwork, exported: Exported, data: Iterable[tuple[Tensor, Tensor]], program: bool = False) -> Agreement:
    """Present the same images to a network and to what a reader makes of its NIR graph.

    Args:
        snn: the network that was written.
        exported: its graph.
        data: batches of images `[B, ...]` and labels `[B]`.
        program: run the program itself.

    Raises:
        OptionError: the program is not installed.
        DataError: there are no images.
    """
    images = right = rights = agreed = spikes = own = same = neurons = 0
    for batch, labels in data:
        found = simulate(snn, batch)
        ours = found.logits[-1].argmax(1)
        if program:
            outputs = run_in(exported.reader.name, exported.graph, batch, snn.steps)
            theirs = answers(outputs, snn.readout_leak)[-1].argmax(1)
        else:
            played = play(exported.graph, batch, snn.steps, exported.reader.name)
            theirs = played.logits[-1].flatten(1).argmax(1)
            for site, counts in found.spikes.items():
                # Behind a neuron's own channels may stand some that hand spikes on.
                other = played.spikes[exported.nodes[site]][:, : counts.shape[1]].reshape(counts.shape)
                spikes, own = spikes + int(other.sum()), own + int(counts.sum(dtype=torch.int64))
                same, neurons = same + int((other == counts).sum()), neurons + counts.numel()
        images, agreed = images + len(batch), agreed + int((ours == theirs).sum())
        right, rights = right + int((ours == labels).sum()), rights + int((theirs == labels).sum())
    if not images:
        raise DataError("no images to compare on")
    return Agreement(
        exported.reader.name,
        program,
        images,
        own_accuracy=100 * right / images,
        accuracy=100 * rights / images,
        agreement=100 * agreed / images,
        spikes=None if program or not own else spikes / own,
        same_counts=None if program else 100 * same / neurons,
    )


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
    return outputs.reshape(len(images), steps, *outputs.shape[1:]).transpose(0, 1)


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


__all__ = ["Agreement", "compare", "run_in"]
