"""SlipReLU: the checks of its specification, and what it shares with QCFS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quickspike.api import finish, fit
from quickspike.data import DataSet, ImageStream
from quickspike.evaluation import make_fabric
from quickspike.methods.qcfs import quantise
from quickspike.methods.slip_relu import SlipReLU, slip_relu
from quickspike.networks import digits_cnn
from quickspike.training import Trainer, Training

F64 = torch.float64


def values(number: int = 2000) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0.5, 1.5, number))


def gradients(function: Callable[[Tensor, Tensor], Tensor], mu: float = 1.7) -> tuple[Tensor, Tensor]:
    z, ceiling = values().requires_grad_(), torch.tensor(mu, dtype=F64, requires_grad=True)
    (function(z, ceiling) * torch.linspace(-1, 2, len(z), dtype=F64)).sum().backward()
    assert z.grad is not None
    assert ceiling.grad is not None
    return z.grad, ceiling.grad


@pytest.mark.parametrize("levels", [1, 4, 16])
@pytest.mark.parametrize(
    ("slope", "linear_shift", "shift"), [(0.0, 0.0, 0.5), (1.0, 0.0, 0.5), (0.5, 0.0, 0.5), (0.3, 0.4, 0.1), (0.6, -0.5, 0.9)]
)
def test_values_are_those_of_the_definition(levels: int, slope: float, linear_shift: float, shift: float) -> None:
    z, mu = values(), 1.7
    x = z.numpy() / mu
    expected = slope * mu * np.clip(x + linear_shift / levels, 0, 1) + (1 - slope) * mu * np.clip(
        np.floor(levels * x + shift) / levels, 0, 1
    )
    found = slip_relu(z, torch.tensor(mu, dtype=F64), levels, slope, linear_shift, shift)
    assert np.allclose(found.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 4])
def test_without_slope_it_is_qcfs_gradients_included(levels: int) -> None:
    ours = gradients(lambda z, mu: slip_relu(z, mu, levels, slope=0.0))
    theirs = gradients(lambda z, mu: quantise(z, mu, levels))
    assert torch.equal(ours[0], theirs[0])
    assert float(ours[1]) == pytest.approx(float(theirs[1]), rel=1e-12)


def test_with_all_slope_it_is_the_clipped_relu_gradients_included() -> None:
    ours = gradients(lambda z, mu: slip_relu(z, mu, 4, slope=1.0))
    theirs = gradients(lambda z, mu: torch.minimum(z.clamp_min(0), mu))
    assert torch.allclose(ours[0], theirs[0])
    assert float(ours[1]) == pytest.approx(float(theirs[1]), rel=1e-12)


def test_the_gradient_of_a_shifted_slope_is_that_of_autograd() -> None:
    def smooth(z: Tensor, mu: Tensor) -> Tensor:
        return 0.4 * mu * (z / mu + 0.3 / 4).clamp(0, 1)

    ours = gradients(lambda z, mu: slip_relu(z, mu, 4, 0.4, 0.3) - 0.6 * quantise(z, mu, 4))
    theirs = gradients(smooth)
    assert torch.allclose(ours[0], theirs[0], atol=1e-12)
    assert float(ours[1]) == pytest.approx(float(theirs[1]), rel=1e-9)


def test_neurons_start_at_the_shift_of_the_staircase(
    random_network: Callable[..., nn.Module], random_images: Callable[..., Tensor]
) -> None:
    images, method = random_images("chain", 30), SlipReLU(steps=3, levels=5, initial=0.25)
    ann = fit(random_network("chain"), ImageStream(images), method)
    snn = finish(ann, ImageStream(images), method)
    for site in ann.sites:
        unit = snn.neuron(site.name)
        assert float(unit.initial) == 0.25
        assert float(unit.threshold) == pytest.approx(float(ann.at(site).ceiling.detach()), rel=1e-6)


@pytest.mark.parametrize("shift", [0.5, 0.2])
def test_the_staircase_alone_is_what_waiting_neurons_give(shift: float, digits: DataSet, digits_test: tuple[Tensor, Tensor]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = digits_cnn(width=4)
    settings = Training(epochs=1, batch_size=64, learning_rate=0.01, validation=100)
    stream = ImageStream(digits_test[0][:60])
    method = SlipReLU(steps=4, levels=4, slope=0.0, initial=shift, synchronous=True)
    ann = fit(source, stream, method, Trainer(fabric=make_fabric("cpu"), data=digits, settings=settings))
    ann.module.double()
    snn = finish(ann, stream, method)
    images = digits_test[0][:60].double()
    with torch.no_grad():
        wanted = ann.module(images)
        assert float((snn(images) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
