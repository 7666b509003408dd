"""Stop a sample as soon as its answer is decided: fewer steps on average, at a loss of accuracy that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from quickspike.data import Batches, labelled_batches
from quickspike.errors import DataError, OptionError
from quickspike.evaluation import check_labels
from quickspike.simulation import simulate

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork


@dataclass(frozen=True)
class Exit:
    """A sample stops at the first step at which its margin, the lead of the largest mean logit, reaches `margin`."""

    margin: float
    expected_steps: float
    """Mean steps on the images that it was calibrated on."""
    expected_loss: float
    """Accuracy that it cost there, in percentage points."""

    def decided(self, logits: Tensor) -> Tensor:
        """Which samples may stop, `[B]`, by their readout `[B, K]`."""
        return margins(logits) >= self.margin


def margins(logits: Tensor) -> Tensor:
    """Largest minus second-largest logit, `[..., K]` to `[...]`.

    Raises:
        OptionError: there is one class only.
    """
    if logits.shape[-1] < 2:
        raise OptionError(f"an early exit needs two classes or more, got logits of shape {list(logits.shape)}")
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def calibrate_exit(snn: SpikingNetwork, data: Batches, loss: float = 0.1) -> Exit:
    """The smallest margin that costs at most `loss` points of accuracy.

    Args:
        snn: streaming, so that it has an answer after every step.
        data: held-out labelled images, not those that accuracy is reported on.
        loss: in percentage points.

    Raises:
        OptionError: loss is negative, or the network has no answer before its last step.
        DataError: no labels, labels that are no class numbers, or no images.
    """
    if not loss >= 0:
        raise OptionError(f"loss must be >= 0 percentage points, got {loss!r}")
    if snn.synchronous:
        raise OptionError("an early exit needs an answer after every step, but layers of this network wait for whole windows")
    right, leads = [], []
    with torch.inference_mode():
        for number, (images, labels) in enumerate(labelled_batches(data), 1):
            check_labels(images, labels, number)
            logits = simulate(snn, images.to(next(snn.parameters()))).logits
            right.append((logits.argmax(2) == cast(Tensor, labels).to(logits.device)).cpu())
            leads.append(margins(logits).cpu())
    if not right:
        raise DataError("there are no images to calibrate the exit on")
    return choose(torch.cat(right, 1), torch.cat(leads, 1), loss)


def choose(right: Tensor, leads: Tensor, loss: float) -> Exit:
    """See `calibrate_exit`.

    Args:
        right: whether the answer after each step is right, `[T, N]`.
        leads: margins after each step, `[T, N]`.
        loss: in percentage points.
    """
    steps, samples = right.shape
    full = int(right[-1].sum())
    allowed = full - loss / 100 * samples
    best = Exit(float("inf"), float(steps), 0.0)
    for margin in sorted(set(candidates(leads)), reverse=True):
        stops = stop_steps(leads, margin)
        kept = int(right.gather(0, stops[None])[0].sum())
        mean = float((stops + 1).double().mean())
        if kept >= allowed and mean < best.expected_steps:
            best = Exit(margin, mean, 100 * (full - kept) / samples)
    return best


def candidates(leads: Tensor) -> Sequence[float]:
    """Margins to try: at most 512 of those that occur before the last step."""
    values = leads[:-1].flatten().double().sort().values
    if not len(values):
        return []
    places = torch.linspace(0, len(values) - 1, min(512, len(values))).long()
    return [float(value) for value in values[places]]


def stop_steps(leads: Tensor, margin: float) -> Tensor:
    """Index of the step at which each sample stops, `[N]`: the first whose margin reaches it, else the last."""
    reached = leads >= margin
    reached[-1] = True
    return reached.int().argmax(0)
