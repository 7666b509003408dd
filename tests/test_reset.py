"""Neurons whose potential a spike sets to 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quickspike as qs
from nir_networks import spiking
from quickspike.api import tune
from quickspike.conversion import SpikingNetwork
from quickspike.data import load_data
from quickspike.errors import ConversionError, OptionError
from quickspike.evaluation import make_fabric
from quickspike.neuron import NeuronParameters, Surrogate, integrate
from quickspike.simulation import simulate
from quickspike.training import Trainer, Training

F64 = torch.float64


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fired: Tensor, u: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(u)
        ctx.surrogate = surrogate
        return fired.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, gradients[0] * ctx.surrogate.derivative(ctx.saved_tensors[0]), None


def written_out(current: Tensor, v: Tensor, theta: Tensor, leak: Tensor, amplitude: Tensor, strict: bool, surrogate: Surrogate) -> Tensor:
    """Step by step, with autograd's own gradients; none flows through the reset's indicator."""
    outputs = []
    for x in current:
        m = x + leak * v
        fired = m > theta if strict else m >= theta
        outputs.append(_Step.apply(fired, m / theta - 1, surrogate) * amplitude)
        v = m * (~fired).to(m)
    return torch.stack(outputs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shape", ["triangular", "boxcar", "arctan"])
def test_outputs_and_gradients_are_those_of_the_steps_written_out(shape: str, strict: bool) -> None:
    torch.manual_seed(0)
    surrogate = Surrogate(shape, 1.2, 0.7)
    current = torch.randn(7, 3, 4, 5, dtype=F64) * 0.7 + 0.3
    parameters = [torch.rand(4, 1, dtype=F64) + low for low in (0.0, 0.5, 0.0, 0.5)]
    weights = torch.randn(7, 3, 4, 5, dtype=F64)
    found = []
    for compiled in (True, False):
        x, *own = (tensor.clone().requires_grad_(True) for tensor in (current, *parameters))
        if compiled:
            out = integrate(x.flatten(0, 1), *own, 7, strict=strict, to_zero=True, surrogate=surrogate)[0].view(7, 3, 4, 5)
        else:
            out = written_out(x, *own, strict, surrogate)
        (out * weights).sum().backward()
        found.append([out.detach(), *(tensor.grad for tensor in (x, *own))])
    assert 0.1 < float(found[0][0].ne(0).double().mean()) < 0.9
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_what_is_above_the_threshold_is_lost() -> None:
    current = torch.tensor([[1.7], [0.4], [0.5], [0.2]])
    ones = torch.ones(())
    out, v = integrate(current, ones * 0, ones, ones, ones, 4, to_zero=True)
    assert out.flatten().tolist() == [1, 0, 0, 1]
    assert v.tolist() == [[0.0]]
    assert integrate(current, ones * 0, ones, ones, ones, 4)[0].flatten().tolist() == [1, 1, 0, 0]


@pytest.fixture
def hard() -> tuple[SpikingNetwork, Tensor]:
    snn, images = spiking("shortcuts")
    return snn.with_reset("zero"), images


def test_a_network_runs_alike_in_every_way(hard: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = hard
    with torch.no_grad():
        whole = simulate(snn, images)
        for other in (simulate(snn, images, step_by_step=True), simulate(qs.accelerate(snn, "fused"), images)):
            assert all(torch.equal(counts, other.spikes[site]) for site, counts in whole.spikes.items())
            assert torch.allclose(whole.logits, other.logits, atol=1e-6)
        subtracting = simulate(spiking("shortcuts")[0], images)
    assert any(not torch.equal(counts, subtracting.spikes[site]) for site, counts in whole.spikes.items())


def test_in_whole_numbers_too(hard: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = hard
    whole = qs.quantise(snn).network
    with torch.no_grad():
        reference, fast = simulate(qs.accelerate(whole, "reference"), images), simulate(qs.accelerate(whole, "integer"), images)
    assert all(torch.equal(counts, fast.spikes[site]) for site, counts in reference.spikes.items())


def test_it_is_saved_and_loaded(hard: tuple[SpikingNetwork, Tensor], tmp_path: Path) -> None:
    snn, images = hard
    snn.save(tmp_path / "a.safetensors")
    again = qs.load(tmp_path / "a.safetensors")
    assert all(neuron.to_zero for neuron in again.neurons().values())
    assert torch.equal(again(images), snn(images))
    other = spiking("shortcuts")[0]
    other.save(tmp_path / "b.safetensors")
    assert b"to_zero" not in (tmp_path / "b.safetensors").read_bytes()
    assert not any(neuron.to_zero for neuron in qs.load(tmp_path / "b.safetensors").neurons().values())


def test_folding_keeps_it(hard: tuple[SpikingNetwork, Tensor]) -> None:
    folded = hard[0].fold()
    assert all(neuron.to_zero for neuron in folded.neurons().values())
    assert torch.allclose(folded(hard[1]), hard[0](hard[1]), atol=1e-5)


def test_spikes_are_not_taken_back_too(hard: tuple[SpikingNetwork, Tensor]) -> None:
    with pytest.raises(OptionError, match="need a reset by subtraction"):
        hard[0].as_signed()
    with pytest.raises(OptionError, match="takes spikes back, which needs a reset by subtraction"):
        spiking("chain", signed=True)[0].with_reset("zero")
    with pytest.raises(ConversionError, match="need a reset by subtraction"):
        NeuronParameters(torch.ones(()), signed=True, to_zero=True)


def test_tuning_wins_back_what_the_reset_costs(spiking_digits: Any, digits_test: tuple[Tensor, Tensor]) -> None:
    images, labels = digits_test

    def accuracy(network: SpikingNetwork) -> float:
        with torch.no_grad():
            return 100 * float((network(images).argmax(1) == labels).double().mean())

    snn = spiking_digits("threshold_balancing").with_steps(4)
    hard = snn.with_reset("zero")
    trainer = Trainer(fabric=make_fabric("cpu"), data=load_data("digits"), settings=Training(epochs=3, learning_rate=0.001))
    tuned = tune(hard, trainer)
    assert accuracy(hard) < accuracy(snn) - 1
    assert accuracy(tuned) > accuracy(hard) + 1
    assert all(neuron.to_zero for neuron in tuned.neurons().values())
