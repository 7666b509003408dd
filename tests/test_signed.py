"""Neurons that take spikes back: their count follows the sum of their currents, whatever the order of arrival."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quickspike as qs
from quickspike.data import DataSet
from quickspike.early_exit import Exit
from quickspike.errors import OptionError
from quickspike.evaluation import make_fabric
from quickspike.neuron import Neuron, NeuronParameters, Surrogate, integrate, unfold
from quickspike.simulation import simulate
from quickspike.training import Trainer, Training

Pair = tuple[qs.SpikingNetwork, qs.SpikingNetwork]


def by_hand(currents: list[float], v: float, theta: float, leak: float) -> list[int]:
    count, spikes = 0, []
    for current in currents:
        v = leak * v + current
        spike = 1 if v >= theta else -1 if v < 0 and count > 0 else 0
        v, count = v - theta * spike, count + spike
        spikes.append(spike)
    return spikes


@given(
    st.lists(st.integers(-24, 24), min_size=1, max_size=20),
    st.integers(0, 8),
    st.integers(1, 16),
    st.sampled_from([1.0, 0.5]),
)
def test_every_step_is_that_of_the_definition(eighths: list[int], start: int, theta: int, leak: float) -> None:
    currents = [value / 8 for value in eighths]
    wanted = by_hand(currents, start / 8, theta / 8, leak)
    x, level = torch.tensor(currents, dtype=torch.float64)[:, None], torch.tensor(theta / 8, dtype=torch.float64)
    leaks, one = torch.tensor(leak, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    out, _ = integrate(x, torch.tensor([start / 8], dtype=torch.float64), level, leaks, one, len(currents), signed=True)
    assert out.flatten().tolist() == wanted


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=40), st.integers(0, 7))
def test_the_count_is_that_of_the_sum_whatever_the_order(eighths: list[int], start: int) -> None:
    """Currents of at most theta: one spike a step is enough to follow."""
    x = torch.tensor(eighths, dtype=torch.float64)[:, None] / 8
    one = torch.ones((), dtype=torch.float64)
    out, v = integrate(x, torch.tensor([start / 8], dtype=torch.float64), one, one, one, len(eighths), signed=True)
    sums = start / 8 + np.cumsum(eighths) / 8
    assert out.cumsum(0).flatten().tolist() == np.maximum(0, np.floor(sums)).tolist()
    assert float(v) == sums[-1] - float(out.sum())


def test_without_negative_potentials_it_is_the_plain_neuron() -> None:
    x = torch.rand(7 * 3, 5, generator=torch.Generator().manual_seed(0))
    theta, one = torch.tensor(0.6), torch.ones(())
    plain, signed = (integrate(x, torch.zeros(3, 5), theta, one, one, 7, signed=signed)[0] for signed in (False, True))
    assert torch.equal(plain, signed)


@pytest.fixture(scope="module")
def pair(digits_source: nn.Module, digits_calibration: Tensor) -> Pair:
    """The digits network for T = 6, plain and signed."""
    made = [qs.convert(digits_source, digits_calibration, steps=6, signed=signed) for signed in (False, True)]
    return made[0], made[1]


def test_it_is_closer_to_the_source_network_in_deep_ones() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for depth in range(8):
        layers += [nn.Conv2d(16 if depth else 3, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    images = torch.randn(16, 3, 8, 8)
    options = {"ceiling": "percentile", "percentile": 100.0}
    plain, signed = (qs.convert(net, images, steps=8, signed=signed, **options) for signed in (False, True))
    before, after = (qs.evaluate(snn, [images], net, steps=[8]).deviation[8] for snn in (plain, signed))
    assert after < 0.7 * before
    assert any(float(out.min()) < 0 for out in _outputs(signed, images))


def _outputs(snn: qs.SpikingNetwork, images: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [neuron.register_forward_hook(lambda layer, args, out: found.append(out.detach())) for neuron in snn.neurons().values()]
    snn(images)
    for hook in hooks:
        hook.remove()
    return found


def test_every_way_to_simulate_gives_the_same(pair: Pair, digits_test: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    snn, images = pair[1], digits_test[0][:20]
    with torch.no_grad():
        whole = snn.run(images)
        for run in (simulate(snn, images, step_by_step=True), simulate(snn, images, memory="300kB")):
            assert torch.allclose(run.logits, whole.logits, atol=1e-5)
            assert all(torch.equal(run.spikes[site], counts) for site, counts in whole.spikes.items())
        early = snn.run(images, exit=Exit((2.0,) * (snn.steps - 1), 3.0, 0.1))
        assert early.stopped is not None
        for sample, stopped in enumerate(early.stopped.tolist()):
            assert torch.allclose(early.logits[-1, sample], whole.logits[stopped - 1, sample], atol=1e-5)
        snn.save(tmp_path / "network.safetensors")
        again = qs.load(tmp_path / "network.safetensors")
        assert all(neuron.signed for neuron in again.neurons().values())
        assert torch.equal(again(images), snn(images))
        assert torch.equal(qs.accelerate(snn, "fused")(images), snn(images))


def test_counts_of_layers_that_wait_are_those_of_plain_ones(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    plain, signed = (qs.convert(digits_source, digits_calibration, steps=4, synchronous=True, signed=signed) for signed in (False, True))
    with torch.no_grad():
        assert torch.allclose(plain(digits_calibration), signed(digits_calibration), atol=1e-6)


def test_the_anatomy_adds_up(pair: Pair, digits_test: tuple[Tensor, Tensor]) -> None:
    anatomies = [qs.anatomy_of(snn, [digits_test]) for snn in pair]
    for one in anatomies[1].sites:
        assert one.sizes["neuron"] < 1e-6
        assert sum(one.shares.values()) == pytest.approx(1, abs=1e-6)
    plain, signed = (sum(one.sizes["unevenness"] for one in found.sites) for found in anatomies)
    assert signed < plain


def test_only_some_sites(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    names = [site.name for site in qs.trace(digits_source, digits_calibration[:1]).sites]
    snn = qs.convert(digits_source, digits_calibration, steps=4, sites={names[-1]: {"signed": True}})
    assert [neuron.signed for neuron in snn.neurons().values()] == [False] * (len(names) - 1) + [True]


def test_it_can_be_tuned(pair: Pair, digits: DataSet) -> None:
    short = pair[1].with_steps(2)
    for neuron in short.neurons().values():
        neuron.threshold.data *= 2
    before = qs.evaluate(short, digits.loader("test"), steps=[2]).accuracy[2]
    settings = Training(epochs=2, batch_size=64, learning_rate=1e-3, optimiser="adam")
    tuned = qs.api.tune(short, Trainer(fabric=make_fabric("cpu"), data=digits, settings=settings))
    after = qs.evaluate(tuned, digits.loader("test"), steps=[2]).accuracy[2]
    assert after > before + 3, (before, after)
    assert all(neuron.signed for neuron in tuned.neurons().values())


def test_gradients_of_taking_back() -> None:
    """A spike that was taken back would have stayed with more current: dL/dcurrent > 0 through the surrogate of that step."""
    x = torch.tensor([[1.0], [-0.6]], requires_grad=True)
    one = torch.ones(())
    out, _ = integrate(x, torch.tensor([0.4]), one, one, one, 2, signed=True, surrogate=Surrogate("boxcar", 0.5))
    assert out.flatten().tolist() == [1.0, -1.0]
    out[1].sum().backward()
    # m(2) = -0.2: within 0.5 theta of 0, far from theta.
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1.0, 1.0]


def test_what_cannot_have_a_sign_says_so(pair: Pair) -> None:
    for refused in (lambda: qs.quantise(pair[1]), lambda: qs.accelerate(pair[1], "integer")):
        with pytest.raises(OptionError, match="takes spikes back"):
            refused()
    with pytest.raises(OptionError, match=r"maximum of the spikes of single steps"):
        qs.methods.UltraLowLatency(steps=4, pool="spikes", signed=True)


def test_half_precision_keeps_the_signs(pair: Pair, digits_test: tuple[Tensor, Tensor]) -> None:
    snn = qs.accelerate(pair[1], "fused", precision="bf16")
    with torch.no_grad():
        assert float((snn(digits_test[0]) - pair[1](digits_test[0])).abs().max() / pair[1](digits_test[0]).abs().max()) < 0.5
        assert any(float(out.min()) < 0 for out in _outputs(snn, digits_test[0]))


def test_a_neuron_says_that_it_is_signed() -> None:
    neuron = Neuron(NeuronParameters(torch.ones(()), signed=True), 4, False)
    assert "signed" in neuron.extra_repr()
    assert unfold(neuron(torch.tensor([[2.0], [-3.0], [0.0], [0.0]])), 4).flatten().tolist() == [1.0, -1.0, 0.0, 0.0]


def test_pictures_keep_their_layout() -> None:
    current = torch.randn(3 * 2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    theta, one = torch.tensor(0.7), torch.ones(())
    plain, _ = integrate(current, torch.zeros(2, 4, 5, 5), theta, one, one, 3, signed=True)
    last = current.contiguous(memory_format=torch.channels_last)
    out, _ = integrate(last, torch.zeros(2, 4, 5, 5), theta, one, one, 3, signed=True)
    assert torch.equal(out, plain)
    assert out.is_contiguous(memory_format=torch.channels_last)
    learned, _ = integrate(last.requires_grad_(), torch.zeros(2, 4, 5, 5), theta, one, one, 3, signed=True)
    assert torch.equal(learned, plain)


def test_a_spike_that_is_taken_back_costs_what_a_spike_costs(pair: Pair, digits_test: tuple[Tensor, Tensor]) -> None:
    images = digits_test[0][:40]
    operations = qs.count_operations(pair[1], [images])
    assert operations.total("spikes") == pytest.approx(sum(float(out.abs().gt(0).sum()) for out in _outputs(pair[1], images)) / 40)


def test_counts_do_not_end_in_half_precision() -> None:
    one = torch.ones((), dtype=torch.bfloat16)
    x = torch.ones(600, 1, dtype=torch.bfloat16)
    x[300:] = -1
    out, _ = integrate(x, torch.zeros(1, dtype=torch.bfloat16), one, one, one, 600, signed=True)
    assert (out[:300] == 1).all()
    assert (out[300:] == -1).all()


# Compiled loops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("channels_last", "constant", "strict"), [(False, False, False), (True, False, True), (True, True, False)])
def test_compiled_loops_give_the_spikes_of_the_reference(
    dtype: torch.dtype, per_channel: bool, channels_last: bool, constant: bool, strict: bool
) -> None:
    draw = torch.Generator().manual_seed(3)
    shape = (7, 1, 1) if per_channel else ()
    theta, leak = (torch.rand(shape, generator=draw) + 0.5 for _ in range(2))
    parameters = NeuronParameters(theta, 0.5, leak.clamp(max=1), amplitude=theta + 0.25, strict=strict, signed=True)
    neurons = [Neuron(parameters, 6, constant).eval() for _ in range(2)]
    neurons[1].compiled = False
    # Whole eighths of theta land on the firing level, and on 0, where only the rule decides.
    x = torch.randn((1 if constant else 6) * 3, 7, 5, 9, generator=draw).mul(8).round().div(8) * theta
    x = x.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with torch.no_grad():
        compiled, reference = (neuron(x) for neuron in neurons)
        assert torch.equal(compiled, reference)
        assert compiled.dtype == dtype and compiled.stride() == reference.stride()
        assert {float(value) for value in reference.sign().unique()} == {-1.0, 0.0, 1.0} or constant
        # In parts, and with what can still be taken back handed on.
        states: list[Any] = [None, None]
        for part in (slice(0, 2), slice(2, 6)):
            steps = part.stop - part.start
            some = x if constant else unfold(x, 6)[part].flatten(0, 1)
            outs = []
            for index, neuron in enumerate(neurons):
                out, states[index] = neuron.scan(some, states[index], steps)
                outs.append(out)
            assert torch.equal(*outs)
            assert torch.equal(outs[0], unfold(reference, 6)[part].flatten(0, 1))
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(*states, strict=True) if mine is not None)


def test_compiled_loops_take_what_is_no_number_as_the_reference_does() -> None:
    draw = torch.Generator().manual_seed(4)
    neurons = [Neuron(NeuronParameters(torch.tensor(1.0), 0.5, signed=True), 5, False).eval() for _ in range(2)]
    neurons[1].compiled = False
    x = torch.randn(5 * 2, 300, generator=draw)
    x[torch.rand(x.shape, generator=draw) < 0.05] = float("nan")
    x[torch.rand(x.shape, generator=draw) < 0.05] = float("inf")
    x[torch.rand(x.shape, generator=draw) < 0.05] = -float("inf")
    with torch.no_grad():
        assert torch.equal(neurons[0](x), neurons[1](x))
