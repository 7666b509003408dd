"""Neurons with a first run: the examples of the papers' specifications, and networks of such neurons."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.anatomy import anatomy_of
from quickspike.early_exit import Exit, leads_of
from quickspike.errors import ConversionError, OptionError
from quickspike.hub import model_card
from quickspike.neuron import Neuron, NeuronParameters, integrate, unfold
from quickspike.readouts import AfterRehearsal
from quickspike.refinement import Refinement
from quickspike.refinements import BiasCorrection, OffsetShift, ResidualMask
from quickspike.rehearsal import Kind, RehearsedNeuron
from quickspike.searching import Candidate, _likeness, _Trials
from quickspike.simulation import simulate

HALF = NeuronParameters(torch.ones(()), initial=0.5)


def neuron(kind: Kind, steps: int, rehearsal: int = 4, *, constant: bool = False) -> RehearsedNeuron:
    return RehearsedNeuron(HALF, steps, constant, kind=kind, rehearsal=rehearsal)


def currents(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1)


def uneven(steps: int, neurons: int = 4000) -> Tensor:
    """Currents whose mean lies in [-0.5, 1.2], and which come and go."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(1, neurons, generator=generator) * 1.7 - 0.5
    return mean + 1.2 * torch.randn(steps, neurons, generator=generator)


# Shifts


def test_a_spike_too_many_is_not_fired_again() -> None:
    x = currents(2, 2, -2, -2)
    assert torch.allclose(neuron("shift", 4).shifted(x), currents(-1.001))
    assert float(Neuron(HALF, 4, False)(x).sum()) == 2
    assert float(neuron("shift", 4)(x).sum()) == 1


def test_a_spike_too_few_is_fired() -> None:
    x = currents(-1, -1, 1.5, 2.5)
    assert torch.allclose(neuron("shift", 4).shifted(x), currents(1.501))
    assert float(Neuron(HALF, 4, False)(x).sum()) == 1
    assert float(neuron("shift", 4)(x).sum()) == 2


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("strict", [False, True])
def test_every_shifted_neuron_gains_or_loses_one_spike(steps: int, strict: bool) -> None:
    x = uneven(steps)
    plain, end = integrate(x, torch.tensor(0.5), torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0), steps, strict=strict)
    before = unfold(plain, steps).sum(0).flatten()
    shifting = RehearsedNeuron(NeuronParameters(torch.ones(()), initial=0.5, strict=strict), steps, False, kind="shift", rehearsal=steps)
    after = shifting(x).view(steps, -1).sum(0)
    many, few = (end < 0).flatten() & (before > 0), (end >= 1).flatten() & (before < steps)
    assert int(many.sum()) > 50
    assert int(few.sum()) > 50
    assert torch.equal(after, before - many.float() + few.float())
    # Counts of the mean current, which the order of arrival does not touch.
    wanted = (x.view(steps, -1).sum(0) + 0.5).floor().clamp(0, steps)
    assert float((after != wanted).float().mean()) < 0.5 * float((before != wanted).float().mean())


def test_a_neuron_that_always_fired_keeps_its_potential() -> None:
    x = currents(3, 3, 3, 3, -9, -9, -9, -9)
    assert torch.equal(neuron("shift", 8).shifted(x), currents(0.5))
    assert torch.equal(neuron("shift", 8)(x), Neuron(HALF, 8, False)(x))


def test_a_neuron_that_never_fired_is_not_lowered() -> None:
    x = currents(-2, -2, -2, -2, 9, 9, 9, 9)
    assert torch.equal(neuron("shift", 8).shifted(x), currents(0.5))
    assert float(neuron("shift", 8)(x).sum()) == 4


def test_currents_that_come_evenly_shift_nothing() -> None:
    x = torch.rand(1, 500, generator=torch.Generator().manual_seed(0)) * 0.95
    assert torch.equal(neuron("shift", 8, 8, constant=True)(x), Neuron(HALF, 8, True)(x))
    assert torch.equal(neuron("shift", 8, 8)(x.repeat(8, 1)), Neuron(HALF, 8, False)(x.repeat(8, 1)))


def test_fewer_steps_than_a_first_run_are_all_run_ahead() -> None:
    x = uneven(2)
    assert torch.equal(neuron("shift", 2, 4)(x), neuron("shift", 2, 2)(x))


def test_a_shifting_neuron_cannot_run_some_steps() -> None:
    with pytest.raises(ConversionError, match="wait for all 4 steps"):
        neuron("shift", 4).scan(currents(1, 1), None, 2)


# Masks


def test_a_neuron_that_fired_by_mistake_is_silenced() -> None:
    x = currents(2, 2, -2, -2, 2, 2, 2, 2)
    assert neuron("mask", 8)(x).flatten().tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_exactly_those_with_nothing_left_are_silenced_and_begin_anew() -> None:
    x = uneven(12)
    first, left = integrate(x[:4], torch.tensor(0.5), torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0), 4)
    again, _ = integrate(x[4:], torch.tensor(0.5), torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0), 8)
    heard = left > 1e-3
    assert 0.1 < float(heard.float().mean()) < 0.9
    assert torch.equal(neuron("mask", 12)(x), torch.cat([first, again * heard]))


@pytest.mark.parametrize("parts", [(12,), (1,) * 12, (3, 3, 6), (4, 8), (5, 7)])
def test_masked_neurons_run_in_any_parts(parts: tuple[int, ...]) -> None:
    x, state, found = uneven(12), None, []
    layer = neuron("mask", 12)
    for part, steps in zip(torch.split(x, parts), parts, strict=True):
        out, state = layer.scan(part, state, steps)
        found.append(out)
    assert torch.equal(torch.cat(found), layer(x))


@pytest.mark.parametrize("parts", [(6,), (1,) * 6, (2, 4), (3, 3)])
def test_the_answer_is_the_mean_after_the_first_run(parts: tuple[int, ...]) -> None:
    x, state, found = torch.randn(6, 5), None, []
    layer = AfterRehearsal(6, 2)
    for part, steps in zip(torch.split(x, parts), parts, strict=True):
        out, state = layer.scan(part, state, steps)
        found.append(out)
    so_far = torch.cat(found).cumsum(0) / torch.arange(1, 7)[:, None]
    for step in range(6):
        wanted = x[: step + 1].mean(0) if step < 2 else x[2 : step + 1].mean(0)
        torch.testing.assert_close(so_far[step], wanted)


def test_a_first_run_leaves_nothing_behind() -> None:
    """Not even what is no number."""
    x = torch.tensor([[float("inf")], [1.0], [3.0]])
    found = AfterRehearsal(3, 1)(x)
    assert torch.isinf(found[0]) and not torch.isfinite(found[1])
    states = AfterRehearsal(3, 1).scan(x, None, 3)[1]
    assert float(states[2]) == 4


# Networks


@pytest.fixture(scope="module")
def images(digits_test: tuple[Tensor, Tensor]) -> Tensor:
    return digits_test[0][:60]


def refined(refinement: Refinement | None, digits_calibration: Tensor, steps: int = 8) -> qs.SpikingNetwork:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).eval()
    method = qs.methods.ThresholdBalancing(steps=steps)
    return qs.convert(net, digits_calibration, method | refinement if refinement else method)


@pytest.mark.parametrize("refinement", [OffsetShift(rho=3), ResidualMask(tau=3)])
def test_a_network_is_kept_in_a_file(
    refinement: OffsetShift | ResidualMask, digits_calibration: Tensor, images: Tensor, tmp_path: Path
) -> None:
    snn = refined(refinement, digits_calibration)
    snn.save(tmp_path / "net.safetensors")
    found = qs.load(tmp_path / "net.safetensors")
    plain = refined(None, digits_calibration)
    with torch.no_grad():
        assert torch.equal(found(images), snn(images))
        assert not torch.equal(snn(images), plain(images))
    assert found.latency == snn.latency
    assert all(isinstance(layer, RehearsedNeuron) for layer in found.neurons().values())


def test_latency_counts_the_first_runs(digits_calibration: Tensor) -> None:
    """Of three layers the first has even currents; the others are three steps behind. A mask is part of the T steps."""
    assert refined(None, digits_calibration).latency == 8
    assert refined(OffsetShift(rho=3), digits_calibration).latency == 8 + 2 * 3
    assert refined(OffsetShift(rho=3), digits_calibration).with_steps(2).latency == 2 + 2 * 2
    assert refined(ResidualMask(tau=3), digits_calibration).latency == 8


def test_masks_change_no_answer_of_the_first_run(digits_calibration: Tensor, images: Tensor) -> None:
    plain, masked = refined(None, digits_calibration), refined(ResidualMask(tau=3), digits_calibration)
    with torch.no_grad():
        for run in (masked.run(images), simulate(masked, images, step_by_step=True)):
            torch.testing.assert_close(run.logits[:3], plain.run(images).logits[:3])
            assert not torch.allclose(run.logits[3:], plain.run(images).logits[3:], atol=1e-3)
        torch.testing.assert_close(simulate(masked, images, step_by_step=True).logits, masked.run(images).logits)
        limit = float(leads_of(masked.run(images).logits).median())
        early = masked.run(images, exit=Exit((limit,) * 7, 1.0, 0.0))
    assert early.stopped is not None
    assert len(set(early.stopped.tolist())) > 2


@pytest.mark.parametrize("refinement", [OffsetShift(rho=4), ResidualMask(tau=4)])
def test_the_fused_engine_fires_the_same_spikes(refinement: OffsetShift | ResidualMask, digits_calibration: Tensor, images: Tensor) -> None:
    snn = refined(refinement, digits_calibration)
    with torch.no_grad():
        wanted, found = snn.run(images), qs.accelerate(snn, "fused").run(images)
    for site, counts in wanted.spikes.items():
        assert torch.equal(found.spikes[site], counts), site


def test_shifts_bring_a_deep_network_closer(digits_calibration: Tensor, digits_test: tuple[Tensor, Tensor]) -> None:
    """Distance from what the same network gives without an error from the order of spikes."""
    plain, shifted = refined(None, digits_calibration), refined(OffsetShift(rho=8), digits_calibration)
    with torch.no_grad():
        ideal = plain.as_synchronous()(digits_test[0])
        errors = [float((net(digits_test[0]) - ideal).square().mean()) for net in (plain, shifted)]
    assert errors[1] < 0.5 * errors[0]


def test_what_cannot_have_a_first_run_is_refused(digits_calibration: Tensor) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)).eval()

    def convert(method: qs.method.Method) -> qs.SpikingNetwork:
        return qs.convert(net, digits_calibration, method)

    for options, reason in (({"synchronous": True}, "waits for whole windows"), ({"signed": True}, "takes spikes back")):
        with pytest.raises(OptionError, match=f"offset_shift .* {reason}"):
            convert(qs.methods.ThresholdBalancing(steps=4, **options) | OffsetShift())
    plain = qs.methods.ThresholdBalancing(steps=4)
    with pytest.raises(OptionError, match="have a first run already"):
        convert(plain | OffsetShift() | ResidualMask())
    with pytest.raises(OptionError, match="write corrections in front of it"):
        convert(plain | ResidualMask() | BiasCorrection())
    with pytest.raises(ConversionError, match="mask or shift"):
        neuron(cast(Kind, "other"), 4)
    with pytest.raises(ConversionError, match="without signs"):
        RehearsedNeuron(NeuronParameters(torch.ones(()), signed=True), 4, False, kind="mask", rehearsal=2)
    assert convert(plain | BiasCorrection() | ResidualMask()).steps == 4
    assert convert(plain | OffsetShift() | BiasCorrection()).steps == 4


def test_the_card_tells_of_the_first_run(digits_calibration: Tensor) -> None:
    for refinement, says in ((OffsetShift(rho=3), "every layer runs them ahead"), (ResidualMask(tau=3), "they decide which neurons")):
        assert f"through the first 3 steps twice: {says}" in str(model_card(refined(refinement, digits_calibration), None))


def test_programs_that_know_no_first_run_refuse_it(digits_calibration: Tensor, tmp_path: Path) -> None:
    for refinement in (OffsetShift(), ResidualMask()):
        snn = refined(refinement, digits_calibration)
        for use in (
            lambda snn=snn: snn.fold(),
            lambda snn=snn: qs.quantise(snn),
            lambda snn=snn: qs.accelerate(snn, "integer"),
            lambda snn=snn: qs.export_nir(snn, tmp_path / "net.nir"),
            lambda snn=snn: qs.to_onnx(snn, tmp_path / "net.onnx"),
            snn.as_synchronous,
            snn.as_signed,
            lambda snn=snn: snn.with_reset("zero"),
        ):
            with pytest.raises(OptionError, match="convert without offset_shift and residual_mask"):
                use()
        assert not list(tmp_path.iterdir())


def test_where_errors_come_from_is_told_of_shifted_neurons_and_not_of_masked_ones(digits_calibration: Tensor, images: Tensor) -> None:
    shifted, masked = refined(OffsetShift(rho=3), digits_calibration), refined(ResidualMask(tau=3), digits_calibration)
    for one in anatomy_of(shifted, images).sites:
        assert one.shares["neuron"] < 1e-3
    with pytest.raises(OptionError, match="do not count behind a residual_mask"):
        anatomy_of(masked, images[:13])
    with pytest.raises(OptionError, match="do not count behind a residual_mask"):
        qs.evaluate(masked, [(images, torch.zeros(60, dtype=torch.long))], anatomy=5)


@pytest.mark.parametrize("refinement", [OffsetShift(rho=3), ResidualMask(tau=3)])
def test_torch_compile_gives_the_same(refinement: OffsetShift | ResidualMask, digits_calibration: Tensor, images: Tensor) -> None:
    snn = refined(refinement, digits_calibration)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(snn, backend="eager")(images), snn(images))


def test_steps_that_are_run_ahead_are_counted(digits_calibration: Tensor, images: Tensor) -> None:
    counted = [qs.count_operations(refined(one, digits_calibration), images) for one in (None, OffsetShift(rho=4))]
    updates = [{row.name: row.updates for row in operations.rows if row.kind == "neurons"} for operations in counted]
    first = next(iter(updates[0]))
    for name, plain in updates[0].items():
        assert updates[1][name] == plain * (1 if name == first else 1.5)


def test_a_search_knows_their_latency(digits_calibration: Tensor) -> None:
    """Behind two layers that are four steps late 20 steps of latency leave T = 12, and 5 leave T = 1."""
    torch.manual_seed(0)
    hidden = [part for _ in range(2) for part in (nn.Linear(16, 16), nn.ReLU())]
    source = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), *hidden, nn.Linear(16, 10)).eval()
    trials = _Trials(source, digits_calibration, [], 0.0, None, "cpu", None, None, None, None, lambda trial: True)
    shifted = Candidate("threshold_balancing", {"refinements": (OffsetShift(rho=4),)})
    assert [trials.steps_within(shifted, latency, 64) for latency in (20, 19, 12, 5, 1, 1000)] == [12, 11, 4, 1, 1, 64]
    for options, within in (({}, 20), ({"synchronous": True}, 6)):
        assert trials.steps_within(Candidate("threshold_balancing", options), 20, 64) == within


def test_a_search_tells_first_runs_apart(digits_calibration: Tensor) -> None:
    likenesses = {_likeness(refined(one, digits_calibration)) for one in (None, ResidualMask(tau=1), ResidualMask(tau=5), OffsetShift())}
    assert len(likenesses) == 4
