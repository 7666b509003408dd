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
