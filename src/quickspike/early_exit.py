"""Stop a sample as soon as its answer is decided: fewer steps on average, at a loss of accuracy that is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    """A sample stops at the first step whose margin its lead, largest minus second-largest mean logit, reaches."""

    margins: tuple[float, ...]
    """One for every step before the last; infinity where no sample stops."""
    expected_steps: float
    """Mean steps on the images that it was calibrated on."""
    expected_loss: float
    """Accuracy that it cost there, in percentage points."""

    def until(self, step: int) -> int:
        """The first step after `step` at which samples may stop; the last one if there is none."""
        return next((t for t in range(step + 1, len(self.margins) + 1) if self.margins[t - 1] < math.inf), len(self.margins) + 1)

    def decided(self, logits: Tensor, step: int) -> Tensor:
        """Which samples may stop after `step` < T, `[B]`, by their readout `[B, K]`.

        Raises:
            OptionError: the readout is something else.
        """
        if logits.ndim != 2:
            raise OptionError(f"an early exit needs logits [B, K], got {list(logits.shape)}")
        margin = self.margins[step - 1]
        return (leads_of(logits) >= margin) & (margin < math.inf)

    def check(self, snn: SpikingNetwork) -> None:
        """Raise OptionError unless the margins were set for the steps of `snn`, which has an answer after each."""
        check_exit(snn)
        if len(self.margins) != snn.steps - 1:
            raise OptionError(f"the margins of this exit were set for T = {len(self.margins) + 1}; the network runs {snn.steps} steps")


def leads_of(logits: Tensor) -> Tensor:
    """Largest minus second-largest logit, `[..., K]` to `[...]`.

    Raises:
        OptionError: there is one class only.
    """
    if logits.shape[-1] < 2:
        raise OptionError(f"an early exit needs two classes or more, got logits of shape {list(logits.shape)}")
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def calibrate_exit(snn: SpikingNetwork, data: Batches, loss: float = 0.1) -> Exit:
    """The margins of least mean steps that cost at most `loss` points of accuracy on `data`.

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
    margins: tuple[float | None, ...]
    """At which a sample stops, for every step before the last; None where none does."""
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
        margins = choose(*known, loss).margins
        stops = stop_steps(leads, margins)
        accuracy = 100 * float(right.gather(0, stops[None]).double().mean())
        # A lead is never below 0.
        finite = tuple(max(margin, 0.0) if margin < math.inf else None for margin in margins)
        rows.append(Saving(loss, finite, float((stops + 1).double().mean()), accuracy))
    return tuple(rows)


def check_loss(loss: float) -> None:
    """Raise OptionError unless `loss` is a number of percentage points."""
    if not loss >= 0:
        raise OptionError(f"loss must be >= 0 percentage points, got {loss!r}")


def check_exit(snn: SpikingNetwork) -> None:
    """Raise OptionError if `snn` has no answer before its last step."""
    if snn.synchronous:
        what = "whole windows" if any(neuron.averaged for neuron in snn.neurons().values()) else "the first steps of those before"
        raise OptionError(f"an early exit needs an answer after every step, but layers of this network wait for {what}")


def answers(snn: SpikingNetwork, data: Batches) -> tuple[Tensor, Tensor]:
    """(whether the answer after each step is right, its lead), both `[T, N]`; see `calibrate_exit`."""
    check_exit(snn)
    right, leads = [], []
    with torch.inference_mode():
        for number, (images, labels) in enumerate(labelled_batches(data), 1):
            check_labels(images, labels, number)
            logits = simulate(snn, images.to(next(snn.parameters()))).logits
            right.append((logits.argmax(2) == cast(Tensor, labels).to(logits.device)).cpu())
            leads.append(leads_of(logits).cpu())
    if not right:
        raise DataError("there are no images to calibrate the exit on")
    return torch.cat(right, 1), torch.cat(leads, 1)


LEVELS = 64
"""Shares of wrongly stopped samples that are tried."""


def choose(right: Tensor, leads: Tensor, loss: float) -> Exit:
    """See `calibrate_exit`.

    Three families are tried, and the fastest member that keeps the loss is taken. The lead that decides is another one early
    than late, so margins of their own for every step come first: at each, as small as the samples still running allow if
    of those that stop there at most a given share is to lose the answer that it would have had at the end. One margin for
    all steps, and one step at which all stop, are the others.

    Args:
        right: whether the answer after each step is right, `[T, N]`.
        leads: leads after each step, `[T, N]`.
        loss: in percentage points.
    """
    steps, samples = right.shape
    full = int(right[-1].sum())
    allowed = full - loss / 100 * samples
    best = Exit((math.inf,) * (steps - 1), float(steps), 0.0)
    for margins in _candidates(right, leads):
        stops = stop_steps(leads, margins)
        kept = int(right.gather(0, stops[None])[0].sum())
        mean = float((stops + 1).double().mean())
        if kept >= allowed and mean < best.expected_steps:
            best = Exit(margins, mean, 100 * (full - kept) / samples)
    return best


def _candidates(right: Tensor, leads: Tensor) -> Iterator[tuple[float, ...]]:
    steps, samples = right.shape
    if steps == 1:
        return
    for level in torch.logspace(-math.log10(2 * samples), 0, LEVELS, dtype=torch.float64).tolist():
        yield _margins(right, leads, level)
    for step in range(1, steps):
        yield tuple(-math.inf if t == step else math.inf for t in range(1, steps))
    values = leads[:-1].flatten().double().sort().values
    for place in torch.linspace(0, len(values) - 1, min(256, len(values))).long().tolist():
        yield (float(values[place]),) * (steps - 1)


def _margins(right: Tensor, leads: Tensor, level: float) -> tuple[float, ...]:
    """At every step the smallest margin at which at most a share `level` of the samples that stop there loses by it."""
    running, found = torch.arange(right.shape[1]), list[float]()
    for step in range(len(right) - 1):
        lead, order = leads[step, running].double().sort(descending=True)
        lost = (right[-1, running].int() - right[step, running].int())[order].cumsum(0)
        # As if one more were lost: of few samples that stop, none lost says little.
        share = (lost + 1) / torch.arange(2, len(order) + 2)
        # A margin cannot tell samples of the same lead apart.
        whole = torch.ones_like(share, dtype=torch.bool)
        whole[:-1] = lead[:-1] > lead[1:]
        last = ((share <= level) & whole).nonzero().flatten()
        found.append(float(lead[last[-1]]) if len(last) else math.inf)
        running = running[leads[step, running].double() < found[-1]]
    return tuple(found)


def stop_steps(leads: Tensor, margins: Sequence[float]) -> Tensor:
    """Index of the step at which each sample stops, `[N]`: the first whose lead `[T, N]` reaches its margin, else the last."""
    limits = torch.tensor([*margins, -math.inf], dtype=torch.float64)[:, None]
    reached = (leads >= limits) & (limits < math.inf)
    # Logits that are no numbers have no lead at all.
    reached[-1] = True
    return reached.int().argmax(0)
