"""Average pooling in the place of max-pooling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quickspike as qs
from quickspike.errors import ConversionError


def test_windows_stay_and_the_source_too() -> None:
    torch.manual_seed(0)
    shared = nn.MaxPool2d(2)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True), shared, shared, nn.AdaptiveMaxPool2d((1, 2))
    ).eval()
    before = copy.deepcopy(net)
    x = torch.randn(2, 3, 34, 33)
    averaged = qs.replace_max_pool(net)
    assert [type(layer) for layer in averaged[2:]] == [nn.AvgPool2d, nn.AvgPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d]
    assert not any(layer.training for layer in averaged.modules())
    with torch.no_grad():
        wanted = nn.functional.avg_pool2d(net[1](net[0](x)), 3, 2, 1, True, False)
        assert torch.equal(averaged[:3](x), wanted)
        assert averaged(x).shape == net(x).shape
    assert str(net) == str(before)
    assert qs.inspect(nn.Sequential(*averaged, nn.Flatten(), nn.Linear(8, 2)), x).convertible


def test_a_constant_stays_itself_up_to_the_border() -> None:
    x = torch.full((1, 1, 5, 5), 3.0)
    assert torch.equal(qs.replace_max_pool(nn.MaxPool2d(3, 2, 1))(x), torch.full((1, 1, 3, 3), 3.0))


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "Sequential has no max-pooling layer"),
        (nn.Sequential(nn.MaxPool2d(2, dilation=2)), "0: max-pooling with dilation 2"),
        (nn.Sequential(nn.MaxPool1d(2, return_indices=True)), "0: max-pooling that returns indices"),
    ],
)
def test_what_has_no_average_is_refused(net: nn.Module, text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        qs.replace_max_pool(net)


class Mixed(nn.Module):
    """Max-pooling as a layer, and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.conv(x).relu())
        return nn.functional.max_pool2d(x, 2) + torch.max_pool2d(x, 2)


class Looks(Mixed):
    """Its forward pass cannot be looked through without an input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.shape[-1] > 4 else x


class OwnPool(nn.MaxPool2d):
    """May compute something else."""


def test_function_calls_are_named_with_their_lines_and_the_way_out() -> None:
    net = Mixed()
    line = r"max_pool2d at \S*test_pooling.py:\d+ in forward: return"
    with pytest.raises(ConversionError, match=rf"cannot be replaced from outside: {line}.*; {line}.*Way out: call a layer"):
        qs.replace_max_pool(net)
    assert type(net.pool) is nn.MaxPool2d


def test_a_class_of_its_own_is_named() -> None:
    with pytest.raises(ConversionError, match=r"1: OwnPool has no average in its place.*Way out"):
        qs.replace_max_pool(nn.Sequential(nn.MaxPool2d(2), OwnPool(2)))


def test_what_cannot_be_looked_through_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert type(qs.replace_max_pool(Looks()).pool) is nn.AvgPool2d
    assert "max-pooling that Looks calls as a function, if any, stays: the forward pass of Looks cannot be recorded" in caplog.text
    assert "Way out" in caplog.text
