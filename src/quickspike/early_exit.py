"""Stop a sample as soon as its answer is decided: fewer steps on average, at a loss of accuracy that is chosen."""

from __future__ import annotations

import math
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
        """Which samples may stop, `[B]`, by their readout `[B, K]`.

        Raises:
            OptionError: the readout is something else.
        """
        if logits.ndim != 2:
            raise OptionError(f"an early exit needs logits [B, K], got {list(logits.shape)}")
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
    check_loss(loss)
    return choose(*answers(snn, data), loss)


@dataclass(frozen=True)
class Saving:
    """What an early exit gave on test images."""

    loss: float
    """Percentage points that it was allowed to cost on the held-out images."""
    margin: float | None
    """At which a sample stops; None where no margin saves a step at that loss."""
    steps: float
    """Mean number of steps."""
    accuracy: float
    """In percent."""


def savings(snn: SpikingNetwork, held_out: Batches, test: Batches, losses: Sequence[float]) -> tuple[Saving, ...]:
    """Accuracy against mean number of steps: margins are chosen on `held_out` and measured on `test`.

    Args:
        snn: see `calibrate_exit`.
        held_out: labelled images.
        test: other labelled images.
        losses: percentage points, one row each.

    Raises:
        OptionError: see `calibrate_exit`.
        DataError: see `calibrate_exit`.
    """
    for loss in losses:
        check_loss(loss)
    known, (right, leads) = answers(snn, held_out), answers(snn, test)
    rows = []
    for loss in losses:
        margin = choose(*known, loss).margin
        stops = stop_steps(leads, margin)
        accuracy = 100 * float(right.gather(0, stops[None]).double().mean())
        rows.append(Saving(loss, margin if math.isfinite(margin) else None, float((stops + 1).double().mean()), accuracy))
    return tuple(rows)


def check_loss(loss: float) -> None:
    """Raise OptionError unless `loss` is a number of percentage points."""
    if not loss >= 0:
        raise OptionError(f"loss must be >= 0 percentage points, got {loss!r}")


def check_exit(snn: SpikingNetwork) -> None:
    """Raise OptionError if `snn` has no answer before its last step."""
    if snn.synchronous:
        raise OptionError("an early exit needs an answer after every step, but layers of this network wait for whole windows")


def answers(snn: SpikingNetwork, data: Batches) -> tuple[Tensor, Tensor]:
    """(whether the answer after each step is right, its margin), both `[T, N]`; see `calibrate_exit`."""
    check_exit(snn)
    right, leads = [], []
    with torch.inference_mode():
        for number, (images, labels) in enumerate(labelled_batches(data), 1):
            check_labels(images, labels, number)
            logits = simulate(snn, images.to(next(snn.parameters()))).logits
            right.append((logits.argmax(2) == cast(Tensor, labels).to(logits.device)).cpu())
            leads.append(margins(logits).cpu())
    if not right:
        raise DataError("there are no images to calibrate the exit on")
    return torch.cat(right, 1), torch.cat(leads, 1)


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
