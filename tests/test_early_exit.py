"""Samples that stop early give the answer that they had then, and the calibrated margin costs what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import quickspike as qs
from quickspike.data import DataSet
from quickspike.early_exit import Exit, calibrate_exit, choose, margins, savings, stop_steps
from quickspike.errors import ConversionError, DataError, OptionError
from quickspike.simulation import simulate
from random_networks import NETWORKS, draw


def test_margins_are_the_lead_of_the_largest() -> None:
    assert margins(torch.tensor([[1.0, 5.0, 3.5], [2.0, 2.0, -1.0]])).tolist() == [1.5, 0.0]


def test_the_first_step_that_reaches_the_margin_or_the_last() -> None:
    leads = torch.tensor([[0.1, 2.0, 0.3], [0.5, 0.1, 0.2], [0.2, 0.0, 0.1]])
    assert stop_steps(leads, 0.5).tolist() == [1, 0, 2]
    assert stop_steps(leads, 0.0).tolist() == [0, 0, 0]
    assert stop_steps(leads, 9.0).tolist() == [2, 2, 2]


def by_hand(right: Tensor, leads: Tensor, margin: float) -> tuple[int, float]:
    kept, taken = 0, 0
    for sample in range(right.shape[1]):
        step = next((t for t in range(len(right) - 1) if leads[t, sample] >= margin), len(right) - 1)
        kept += int(right[step, sample])
        taken += step + 1
    return kept, taken / right.shape[1]


@pytest.mark.parametrize("loss", [0.0, 0.5, 3.0])
def test_the_chosen_margin_keeps_the_loss_and_no_other_is_faster(loss: float) -> None:
    generator = torch.Generator().manual_seed(0)
    leads = torch.rand(5, 200, generator=generator) * torch.arange(1, 6)[:, None]
    right = torch.rand(5, 200, generator=generator) < 0.5 + 0.4 * leads / leads.max()
    found = choose(right, leads, loss)
    full = int(right[-1].sum())
    kept, mean = by_hand(right, leads, found.margin)
    assert mean == pytest.approx(found.expected_steps)
    assert 100 * (full - kept) / 200 == pytest.approx(found.expected_loss)
    assert found.expected_loss <= loss
    for margin in torch.linspace(0, 5, 60).tolist():
        kept, mean = by_hand(right, leads, margin)
        # The candidates are a sample of all margins.
        assert full - kept > loss * 2 or mean >= found.expected_steps - 0.05


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(**NETWORKS)
def test_stopped_samples_keep_their_answer_and_the_others_do_not_notice(**drawn: object) -> None:
    snn, images = draw(**{**drawn, "steps": min(int(str(drawn["steps"])), 8)})
    images = images.contiguous(memory_format=torch.channels_last)
    snn.to(memory_format=torch.channels_last)
    with torch.no_grad():
        full = simulate(snn, images, step_by_step=True)
        limit = float(margins(full.logits).median())
        run = snn.run(images, exit=Exit(limit, 0.0, 0.0))
    wanted = stop_steps(margins(full.logits), limit) + 1
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
    assert dataclasses.astuple(choose(right, leads, 0.0)) == (float("inf"), 2.0, 0.0)


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
        margins(torch.ones(3, 1))
    whole = qs.quantise(snn.as_synchronous()).network
    with pytest.raises(ConversionError, match="no steps"):
        simulate(qs.accelerate(whole, "count"), images, exit=Exit(1.0, 1.0, 0.0))


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
        assert row.margin == found.margin
        assert row.steps == pytest.approx(float(run.stopped.double().mean()))
        assert row.accuracy == pytest.approx(100 * float((run.logits[-1].argmax(1) == labels).double().mean()))
    assert 8 >= rows[0].steps >= rows[1].steps > rows[2].steps


def test_a_network_of_one_step_saves_none(
    spiking_digits: Callable[[str], qs.SpikingNetwork], digits: DataSet, digits_test: tuple[Tensor, Tensor]
) -> None:
    (row,) = savings(spiking_digits("threshold_balancing").with_steps(1), digits.loader("train"), [digits_test], (0.5,))
    assert (row.margin, row.steps) == (None, 1.0)
