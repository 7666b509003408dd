"""Networks of several inputs, and inputs of other heights and widths than those of the calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quickspike as qs
from quickspike.errors import DataError, OptionError, TraceError
from quickspike.structure import tensors

Sizes = dict[str, Callable[[Tensor], Tensor]]


class Two(nn.Module):
    """A picture and a row of values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.values, self.head = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, picture: Tensor, row: Tensor, scale: float = 0.5) -> Tensor:
        return self.head(F.relu(self.conv(picture)).mean((2, 3)) * scale + F.relu(self.values(row)))


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randn(count, 5, generator=generator)


def test_several_inputs_side_by_side(tmp_path: Path) -> None:
    net = Two().eval()
    joined = qs.OneInput(net, [(3, 8, 8), (5,)])
    packed = joined.pack(*batch())
    assert packed.shape == (6, 3 * 64 + 5)
    snn = qs.convert(joined, packed, steps=256, ceiling="percentile", percentile=100.0)
    assert [site.name for site in snn.sites] == ["model.relu", "model.relu_2"]
    with torch.no_grad():
        wanted = net(*batch())
        assert torch.equal(joined(packed), wanted)
        assert float((snn(packed) - wanted).abs().max() / wanted.abs().max()) < 0.02
        snn.save(tmp_path / "network.safetensors")
        assert torch.equal(qs.load(tmp_path / "network.safetensors")(packed), snn(packed))


def test_the_message_names_the_inputs_and_the_way_out() -> None:
    with pytest.raises(TraceError, match=r"Two takes 2 inputs \(picture, row\). Way out: quickspike.OneInput"):
        qs.trace(Two().eval(), batch()[0])


def test_what_does_not_fit_is_refused() -> None:
    joined = qs.OneInput(Two(), [(3, 8, 8), (5,)])
    picture, row = batch()
    for wrong in ((picture,), (row, picture), (picture, row[:3])):
        with pytest.raises(DataError, match=r"expected inputs \[B, 3, 8, 8\], \[B, 5\], got \["):
            joined.pack(*wrong)
    for shapes in ([], [(3, 0)], [(2.0,)], [(True,)]):
        with pytest.raises(OptionError, match="sizes >= 1"):
            qs.OneInput(Two(), shapes)


class Pyramid(nn.Module):
    """Asks for sizes: upsampling to that of another map, reshapes, expansion."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.mixed, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = F.relu(self.fine(x))
        coarse = F.relu(self.coarse(fine))
        x = F.relu(self.mixed(fine + F.interpolate(coarse, size=fine.shape[2:], mode="nearest")))
        count, channels, height, width = x.shape
        answer = self.head(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).flatten(1))
        x = x - x.mean((2, 3), keepdim=True).expand_as(x)
        return answer, x.reshape(count, 2, 2, height, width).transpose(1, 2).reshape(count, channels, height, width)


def test_other_heights_and_widths_than_those_it_was_calibrated_on() -> None:
    net, large = Pyramid().eval(), torch.randn(4, 3, 24, 20, generator=torch.Generator().manual_seed(2))
    # A part, so that little is larger than what the thresholds were fitted to.
    small = large[:, :, :16, :16]
    snn = qs.convert(net, large, steps=512, ceiling="percentile", percentile=100.0)
    across = qs.convert(net, small, steps=512)
    with torch.no_grad():
        for images, bound in ((large, 0.01), (small, 0.03)):
            for got, wanted in zip(tensors(snn(images)), tensors(net(images)), strict=True):
                assert float((got - wanted).abs().max() / wanted.abs().max()) < bound
        assert [one.shape for one in tensors(across(large))] == [one.shape for one in tensors(net(large))]


def _expanded(x: Tensor) -> Tensor:
    _, _, height, width = x.shape
    return x - x.mean((2, 3), keepdim=True).expand(x.size(0), -1, height, width)


class Sized(nn.Module):
    """Neurons, and an operation that asks for sizes."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.operation = nn.Conv2d(3, 4, 3, padding=1), operation
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(256, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(F.relu(self.conv(x)))


class Counted(Sized):
    """A linear layer behind."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


FOLLOWING: Sizes = {
    "view(n, c, -1)": lambda x: x.view(x.size(0), 4, -1).mean(-1),
    "view(n, -1)": lambda x: x.view(x.size(0), -1),
    "view(-1, c, h * w)": lambda x: x.view(-1, 4, x.size(2) * x.size(3)).mean(-1),
    "view(x.shape)": lambda x: x.flatten(2).view(x.shape),
    "view(x.shape[:2] + (-1,))": lambda x: x.reshape(x.shape[:2] + (-1,)).sum(2),  # noqa: RUF005 - fx cannot unpack
    "unpacked": lambda x: x.reshape(x.shape[0], 2, 2, x.shape[2], x.shape[3]).transpose(1, 2).flatten(1, 2),
    "expand(n, -1, h, w)": _expanded,
    "times its rank": lambda x: x.mean((2, 3)) * x.ndim + x.dim(),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_sizes_that_are_asked_for_follow_the_input(name: str, tmp_path: Path) -> None:
    net = Sized(FOLLOWING[name]).eval()
    snn = qs.convert(net, torch.randn(6, 3, 8, 8), steps=2)
    assert "sizes" not in snn.provenance
    snn.save(tmp_path / "network.safetensors")
    traced, large = qs.trace(net, torch.randn(2, 3, 8, 8)), torch.randn(4, 3, 16, 12)
    with torch.no_grad():
        wanted = net(large)
        assert torch.allclose(traced.module(large), wanted, atol=1e-5)
        assert qs.load(tmp_path / "network.safetensors")(large).shape == snn(large).shape == wanted.shape


def test_fixed_sizes_do_not_mix_samples() -> None:
    """view(-1, 256) would make 16 samples of 4 images of twice the height and width."""
    snn = qs.convert(Sized(lambda x: x.view(-1, 256)).eval(), torch.randn(6, 3, 8, 8), steps=2)
    with torch.no_grad(), pytest.raises(DataError, match="invalid for input of size"):
        snn(torch.randn(4, 3, 16, 16))


def test_a_number_made_of_sizes_that_has_no_place_in_files_fixes_them(tmp_path: Path) -> None:
    net = Sized(lambda x: x.sum((2, 3)) / x.shape[2:].numel()).eval()
    images = torch.randn(6, 3, 8, 8)
    snn = qs.convert(net, images, steps=256, ceiling="percentile", percentile=100.0)
    snn.save(tmp_path / "network.safetensors")
    for one in (snn, qs.load(tmp_path / "network.safetensors")):
        with torch.no_grad():
            assert torch.allclose(one(images), net(images), atol=0.02)
        with pytest.raises(DataError, match=r"recorded for 8 x 8; got \[4, 3, 16, 16\]\. Way out"):
            one(torch.randn(4, 3, 16, 16))


def test_features_that_a_linear_layer_counts_are_flattened() -> None:
    """Which every engine knows; the layer refuses other numbers of them."""
    snn = qs.convert(Counted(lambda x: x.view(-1, 256)).eval(), torch.randn(6, 3, 8, 8), steps=2)
    assert "flatten" in snn.code
    assert "shape" not in snn.code
    with torch.no_grad(), pytest.raises(DataError, match="cannot take"):
        snn(torch.randn(4, 3, 16, 16))
