"""Networks as torch.export programs: our numbers, the same bytes, and damaged files refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.conversion import SpikingNetwork
from quickspike.errors import CheckpointError, OptionError
from quickspike.program_export import load_program, to_program


class Small(nn.Module):
    """A neuron in front of a pool that accumulates, a normalisation of running means, and a join with the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 3, 1), nn.Linear(3, 4)
        self.norm, self.pool = nn.GroupNorm(1, 3), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.cat([torch.relu(self.first(x)), x], 1))
        y = torch.relu(self.norm(y))
        return self.head(self.pool(y + y.mean((2, 3), keepdim=True)).mean((2, 3)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[SpikingNetwork, Tensor, Path]:
    torch.manual_seed(0)
    images, path = torch.randn(5, 2, 6, 6), tmp_path_factory.mktemp("program") / "net.pt2"
    snn = qs.convert(Small().eval(), images, "threshold_balancing", steps=3, analog=("GroupNorm",))
    with torch.no_grad():
        snn.neuron(snn.sites[0].name).leak.fill_(0.75)
        snn.neuron(snn.sites[1].name).amplitude.fill_(1.25)
    snn = snn.as_signed()
    to_program(snn, path)
    return snn, images, path


def test_programs_give_our_numbers_without_quickspike(written: tuple[SpikingNetwork, Tensor, Path]) -> None:
    snn, images, path = written
    kinds = {type(layer).__name__ for layer in snn.network.modules()}
    assert {"Neuron", "Repeat", "RunningMean", "Increment", "AccumulatedMaxPool"} <= kinds
    program = load_program(path)
    with torch.no_grad():
        for batch in (images, images[:1]):
            torch.testing.assert_close(program.module()(batch), snn(batch), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.export.load(path).module()(images), snn(images), rtol=1e-5, atol=1e-6)
    assert not any("quickspike" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("method", ["potential_init", "rate_encoded", "ultra_low_latency"])
def test_weighted_spikes_are_ours_too(method: str, tmp_path: Path) -> None:
    """Heights at the threshold, beside it, and neurons that fire above it only."""
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(40, 3)
    snn = qs.convert(net, images, method, steps=3, weighted=True)
    to_program(snn, tmp_path / "net.pt2")
    with torch.no_grad():
        torch.testing.assert_close(load_program(tmp_path / "net.pt2").module()(images), snn(images), rtol=1e-5, atol=1e-6)


def test_programs_are_the_same_bytes_and_name_no_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    snn = qs.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(4, 3), steps=2).as_synchronous()
    files = [tmp_path / name for name in ("a.pt2", "another.pt2")]
    for path in files:
        to_program(snn, path)
    first, second = (path.read_bytes() for path in files)
    assert first == second
    for folder in (str(Path(qs.__file__).parents[2]), "site-packages", str(tmp_path), "another"):
        assert folder.encode() not in first


def test_damaged_and_foreign_programs_are_refused(written: tuple[SpikingNetwork, Tensor, Path], tmp_path: Path) -> None:
    data, path = written[2].read_bytes(), tmp_path / "other.pt2"
    for end in (0, 1, len(data) // 2, len(data) - 90, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"other\.pt2"):
            load_program(path)
    for place in [*range(0, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"other\.pt2"):
            load_program(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_program(tmp_path / "missing.pt2")


def test_accelerated_networks_are_refused(written: tuple[SpikingNetwork, Tensor, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="export the one that it was made from"):
        to_program(qs.accelerate(written[0], "fused"), tmp_path / "a.pt2")
