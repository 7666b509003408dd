"""Samples that stop early give the answer that they had then, and the calibrated margin costs what it says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import quickspike as qs
from quickspike import early_exit
from quickspike.data import DataSet
from quickspike.early_exit import Exit, _margins, calibrate_exit, choose, leads_of, savings, stop_steps
from quickspike.errors import ConversionError, DataError, OptionError
from quickspike.simulation import simulate
from random_networks import NETWORKS, draw


def test_leads_are_those_of_the_largest() -> None:
    assert leads_of(torch.tensor([[1.0, 5.0, 3.5], [2.0, 2.0, -1.0]])).tolist() == [1.5, 0.0]


def test_the_first_step_that_reaches_its_margin_or_the_last() -> None:
    leads = torch.tensor([[0.1, 2.0, 0.3], [0.5, 0.1, 0.2], [0.2, 0.0, 0.1]])
    assert stop_steps(leads, (0.5, 0.5)).tolist() == [1, 0, 2]
    assert stop_steps(leads, (0.0, 0.0)).tolist() == [0, 0, 0]
    assert stop_steps(leads, (9.0, 9.0)).tolist() == [2, 2, 2]
    assert stop_steps(leads, (0.2, 0.1)).tolist() == [1, 0, 0]
    assert stop_steps(leads, (math.inf, -math.inf)).tolist() == [1, 1, 1]


def by_hand(right: Tensor, leads: Tensor, margins: Sequence[float]) -> tuple[int, float]:
    kept, taken = 0, 0
    for sample in range(right.shape[1]):
        step = next((t for t, margin in enumerate(margins) if leads[t, sample] >= margin), len(right) - 1)
        kept += int(right[step, sample])
        taken += step + 1
    return kept, taken / right.shape[1]


def drawn(growing: bool) -> tuple[Tensor, Tensor]:
    """(right, leads) of 400 samples and 5 steps: large leads are right more often, late ones more often than early ones."""
    generator = torch.Generator().manual_seed(0)
    leads = torch.rand(5, 400, generator=generator) * (torch.arange(1, 6) if growing else torch.arange(5, 0, -1))[:, None]
    sure = leads / leads.max(1, keepdim=True).values * torch.tensor([0.3, 0.5, 0.9, 1.0, 1.0])[:, None]
    return torch.rand(5, 400, generator=generator) < 0.3 + 0.7 * sure, leads


@pytest.mark.parametrize("growing", [True, False])
@pytest.mark.parametrize("loss", [0.0, 0.5, 3.0])
def test_the_chosen_margins_keep_the_loss_and_no_single_one_is_faster(loss: float, growing: bool) -> None:
    right, leads = drawn(growing)
    found = choose(right, leads, loss)
    full = int(right[-1].sum())
    kept, mean = by_hand(right, leads, found.margins)
    assert mean == pytest.approx(found.expected_steps)
    assert 100 * (full - kept) / 400 == pytest.approx(found.expected_loss)
    assert found.expected_loss <= loss
    for step in range(1, 5):
        kept, mean = by_hand(right, leads, [-math.inf if t == step else math.inf for t in range(1, 5)])
        assert full - kept > loss * 4 or mean >= found.expected_steps
    for margin in torch.linspace(0, 5, 60).tolist():
        kept, mean = by_hand(right, leads, [margin] * 4)
        # The candidates are a sample of all margins.
        assert full - kept > loss * 4 - 2 or mean >= found.expected_steps - 0.05


def test_margins_of_their_own_for_every_step_stop_earlier() -> None:
    """Early leads are the largest ones here, and mean the least: a single margin has to be above them all."""
    right, leads = drawn(growing=False)
    full = int(right[-1].sum())
    found = choose(right, leads, 3.0)
    single = [by_hand(right, leads, [margin] * 4) for margin in torch.linspace(0, 5, 100).tolist()]
    assert found.expected_steps < min(mean for kept, mean in single if full - kept <= 12) - 0.5
    assert found.margins[0] > found.margins[2]


def test_few_samples_that_lost_nothing_do_not_decide() -> None:
    """One right sample with the largest lead is no evidence for a margin at a level of 10 %."""
    right = torch.tensor([[True] + [False] * 19, [True] * 20])
    leads = torch.tensor([[9.0] + [1.0] * 19, [1.0] * 20])
    assert _margins(right, leads, 0.1) == (math.inf,)
    assert _margins(right, leads, 0.5) == (9.0,)
    assert _margins(right, torch.ones(2, 20), 0.5) == (math.inf,)
    assert _margins(right, torch.ones(2, 20), 0.96) == (1.0,)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(**NETWORKS)
def test_stopped_samples_keep_their_answer_and_the_others_do_not_notice(**drawn: object) -> None:
    snn, images = draw(**{**drawn, "steps": min(int(str(drawn["steps"])), 8)})
    images = images.contiguous(memory_format=torch.channels_last)
    snn.to(memory_format=torch.channels_last)
    with torch.no_grad():
        full = simulate(snn, images, step_by_step=True)
        leads = leads_of(full.logits)
        # At some steps nothing is looked at, so that several run at once.
        limits = [float(lead.median()) if step % 3 else math.inf for step, lead in enumerate(leads[:-1], 1)]
        run = snn.run(images, exit=Exit(tuple(limits), 0.0, 0.0))
    wanted = stop_steps(leads, limits) + 1
    assert run.stopped is not None
    assert run.stopped.tolist() == wanted.tolist()
    for sample, taken in enumerate(wanted.tolist()):
        torch.testing.assert_close(run.logits[:taken, sample], full.logits[:taken, sample], rtol=1e-4, atol=1e-5)
        assert torch.equal(run.logits[taken - 1 :, sample], run.logits[taken - 1, sample].expand(snn.steps - taken + 1, -1))
        if taken == snn.steps:
            for site, counts in full.spikes.items():
                assert torch.equal(counts[sample], run.spikes[site][sample])
        else:
            assert all(bool((run.spikes[site][sample] <= counts[sample]).all()) for site, counts in full.spikes.items())


def test_digits_stop_early(
    spiking_digits: Callable[[str], qs.SpikingNetwork], digits_calibration: Tensor, digits_test: tuple[Tensor, Tensor], digits: object
) -> None:
    snn = spiking_digits("threshold_balancing")
    images, labels = digits_test
    held_out = [(images[:200], labels[:200])]
    found = calibrate_exit(snn, held_out, loss=0.5)
    assert found.expected_steps < snn.steps / 2
    with torch.no_grad():
        run, full = snn.run(images[200:], exit=found), snn.run(images[200:])
    assert run.stopped is not None
    assert float(run.stopped.double().mean()) < snn.steps / 2

    def accuracy(run: qs.Run) -> float:
        return 100 * float((run.logits[-1].argmax(1) == labels[200:]).double().mean())

    assert accuracy(run) >= accuracy(full) - 2
    assert sum(run.rates.values()) > 0


def test_no_loss_is_possible_and_means_the_last_step_at_worst() -> None:
    right = torch.tensor([[False, False], [True, True]])
    leads = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    assert dataclasses.astuple(choose(right, leads, 0.0)) == ((math.inf,), 2.0, 0.0)


def test_what_cannot_stop_early_is_refused(spiking_digits: Callable[[str], qs.SpikingNetwork], digits_test: tuple[Tensor, Tensor]) -> None:
    snn = spiking_digits("threshold_balancing")
    images, labels = digits_test
    with pytest.raises(OptionError, match="wait for whole windows"):
        calibrate_exit(snn.as_synchronous(), [(images, labels)])
    with pytest.raises(OptionError, match="loss must be >= 0"):
        calibrate_exit(snn, [(images, labels)], loss=-1)
    with pytest.raises(DataError, match="no images"):
        calibrate_exit(snn, [])
    with pytest.raises(DataError, match="has no labels"):
        calibrate_exit(snn, [images])
    with pytest.raises(DataError, match="labels must be"):
        calibrate_exit(snn, [(images, labels.float())])
    with pytest.raises(OptionError, match="needs two classes or more"):
        leads_of(torch.ones(3, 1))
    with pytest.raises(OptionError, match="set for T = 2; the network runs 8"):
        snn.with_steps(8).run(images, exit=Exit((1.0,), 1.0, 0.0))
    with pytest.raises(OptionError, match="wait for whole windows"):
        snn.with_steps(2).as_synchronous().run(images, exit=Exit((1.0,), 1.0, 0.0))
    whole = qs.quantise(snn.as_synchronous()).network
    with pytest.raises(ConversionError, match="no steps"):
        simulate(qs.accelerate(whole, "count"), images, exit=Exit((1.0,) * (snn.steps - 1), 1.0, 0.0))


def test_savings_are_what_running_with_the_margin_gives(
    spiking_digits: Callable[[str], qs.SpikingNetwork], digits: DataSet, digits_test: tuple[Tensor, Tensor]
) -> None:
    snn = spiking_digits("threshold_balancing").with_steps(8)
    held_out, (images, labels) = digits.loader("train", limit=400, last=True), digits_test
    rows = savings(snn, held_out, [(images, labels)], (0.0, 1.0, 5.0))
    for row in rows:
        found = calibrate_exit(snn, held_out, row.loss)
        run = snn.run(images, exit=found)
        assert run.stopped is not None
        assert row.margins == tuple(margin if math.isfinite(margin) else None for margin in found.margins)
        assert row.steps == pytest.approx(float(run.stopped.double().mean()))
        assert row.accuracy == pytest.approx(100 * float((run.logits[-1].argmax(1) == labels).double().mean()))
    assert 8 >= rows[0].steps >= rows[1].steps > rows[2].steps


def test_a_network_of_one_step_saves_none(
    spiking_digits: Callable[[str], qs.SpikingNetwork], digits: DataSet, digits_test: tuple[Tensor, Tensor]
) -> None:
    (row,) = savings(spiking_digits("threshold_balancing").with_steps(1), digits.loader("train"), [digits_test], (0.5,))
    assert (row.margins, row.steps) == ((), 1.0)


def test_answers_that_are_no_numbers_run_to_the_end() -> None:
    leads = torch.tensor([[math.nan, 1.0, math.inf], [math.nan, 0.2, math.inf], [0.1, 0.1, 0.1]])
    assert stop_steps(leads, (math.inf, 0.5)).tolist() == [2, 2, 1]
    assert stop_steps(leads, (math.inf, math.inf)).tolist() == [2, 2, 2]
    logits = torch.tensor([[1.0, -math.inf], [math.nan, 0.0], [3.0, 0.0]])
    assert Exit((math.inf, 1.0), 0.0, 0.0).decided(logits, 1).tolist() == [False, False, False]
    assert Exit((math.inf, 1.0), 0.0, 0.0).decided(logits, 2).tolist() == [True, False, True]


def test_a_step_at_which_all_stop_is_told_from_one_at_which_none_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_exit, "answers", lambda snn, data: data)
    right = torch.tensor([[False], [True], [True]]).expand(3, 40)
    leads = torch.tensor([[9.0], [1.0], [0.0]]).expand(3, 40)
    network: Any = None
    known: Any = (right, leads)
    (row,) = savings(network, known, known, (0.0,))
    assert (row.steps, row.margins[0]) == (2.0, None)
    assert row.margins[1] is not None and row.margins[1] <= 1.0
