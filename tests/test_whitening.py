"""Whitened patches: what the filters do to images, that they stay, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quickspike as qs
from quickspike.api import fit, train, tune
from quickspike.augmentation import Augmentation
from quickspike.data import DataSet, ImageStream
from quickspike.errors import DataError, OptionError
from quickspike.evaluation import make_fabric
from quickspike.method import create
from quickspike.training import Trainer, Training
from quickspike.whitening import whiten


@pytest.fixture
def images() -> Tensor:
    """Neighbouring pixels and colours are alike, as in pictures."""
    noise = torch.randn(200, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 3, stride=1) + noise.mean(1, keepdim=True)[..., 1:-1, 1:-1]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 24, 2), nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 80, 3, padding=1)], ids=str)
def test_what_comes_out_is_uncorrelated_and_of_variance_one(layer: nn.Conv2d, images: Tensor) -> None:
    network = nn.Sequential(nn.Identity(), layer, nn.ReLU())
    assert whiten(network, images) is layer
    pairs = min(layer.out_channels // 2, layer.weight[0].numel())
    out = F.conv2d(images, layer.weight.detach()).transpose(0, 1).flatten(1)[: 2 * pairs]
    assert torch.equal(layer.weight[1 : 2 * pairs : 2], -layer.weight[0 : 2 * pairs : 2])
    covariance = out[::2] @ out[::2].T / out.shape[1]
    # Weak directions stay a little below 1: they are noise.
    assert 0.9 < float(covariance.diagonal().min()) <= float(covariance.diagonal().max()) < 1.001
    assert float(covariance.fill_diagonal_(0).abs().max()) < 1e-3
    before = F.conv2d(images, torch.randn(layer.weight.shape)).transpose(0, 1).flatten(1)
    assert float((before @ before.T / before.shape[1]).fill_diagonal_(0).abs().max()) > 0.5


def test_the_strongest_directions_come_first(images: Tensor) -> None:
    few, many = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 12, 3)
    torch.testing.assert_close(whiten(few, images).weight, whiten(many, images).weight[:4])
    sizes = many.weight[::2].flatten(1).norm(dim=1)
    assert torch.equal(sizes, sizes.sort().values)


def test_channels_that_are_left_over_keep_their_weights(images: Tensor) -> None:
    layer = nn.Conv2d(3, 7, 1)
    before = layer.weight.detach().clone()
    whiten(layer, images)
    assert torch.equal(layer.weight[6], before[6])
    assert not torch.equal(layer.weight[5], before[5])


@pytest.mark.parametrize(
    ("network", "found"),
    [(nn.Linear(3, 3), "there is none"), (nn.Conv2d(1, 4, 3), "it is Conv2d(1, 4"), (nn.Conv2d(3, 1, 3), "it is Conv2d(3, 1")],
    ids=str,
)
def test_a_network_without_such_a_layer_is_refused(network: nn.Module, found: str, images: Tensor) -> None:
    with pytest.raises(OptionError, match="first convolution that reads images") as raised:
        whiten(network, images)
    assert found in str(raised.value)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_images_that_hold_nothing_are_refused(value: float, images: Tensor) -> None:
    layer = nn.Conv2d(3, 4, 3)
    before = layer.weight.detach().clone()
    with pytest.raises(DataError, match="nothing in the training images"):
        whiten(layer, images * 0 + value)
    assert torch.equal(layer.weight, before)


@pytest.fixture
def trainer(digits: DataSet) -> Callable[..., Trainer]:
    def make(**settings: Any) -> Trainer:
        return Trainer(fabric=make_fabric("cpu"), data=digits, settings=Training(**settings), augmentation=Augmentation())

    return make


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)
    )


def test_a_training_leaves_the_filters_alone_and_trains_the_rest(trainer: Callable[..., Trainer], digits: DataSet) -> None:
    source = small()
    state = {name: value.clone() for name, value in source.state_dict().items()}
    trained, history = train(source, trainer(epochs=1, whiten=True, ema=0.9))
    expected = small()
    whiten(expected, torch.cat([images for images, _ in digits.loader("train")]))
    after, before = trained.state_dict(), expected.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(state["0.weight"], before["0.weight"])
    assert all(not torch.equal(after[name], before[name]) for name in ("1.weight", "1.bias", "3.weight", "6.weight"))
    assert all(torch.equal(value, state[name]) for name, value in source.state_dict().items())
    _, plain = train(source, trainer(epochs=1))
    assert history.rows[0]["loss"] < plain.rows[0]["loss"]


def test_a_trained_network_is_not_whitened(trainer: Callable[..., Trainer], digits: DataSet) -> None:
    images = ImageStream(digits.loader("train", limit=50))
    with pytest.raises(OptionError, match="from scratch"):
        fit(small(), images, create("qcfs", steps=2), trainer(whiten=True))
    snn = qs.convert(small(), digits.loader("train", limit=50), steps=2)
    with pytest.raises(OptionError, match="from scratch"):
        tune(snn, trainer(whiten=True))
