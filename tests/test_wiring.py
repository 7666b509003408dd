"""The connections of a spiking network, against networks whose connections are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.wiring import INPUT, OUTPUT, Edge, edges_of


class Residual(nn.Module):
    """A block with a shortcut, then two branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.more = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.left, self.right, self.readout = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Linear(4 * 16, 3)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relus[0](self.stem(x))
        x = self.relus[1](x + self.more(self.body(x)))
        x = self.relus[2](torch.cat([self.left(x), self.right(x)], 1))
        return self.readout(self.pool(x).flatten(1))


def test_a_chain() -> None:
    snn = qs.convert(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(8, 1, 4, 4), steps=2)
    (site,) = snn.sites
    assert edges_of(snn) == (Edge(INPUT, site.name, ("1",)), Edge(site.name, OUTPUT, ("3",)))


def test_shortcuts_branches_and_pools() -> None:
    torch.manual_seed(0)
    snn = qs.convert(Residual(), torch.rand(8, 1, 8, 8), steps=2)
    assert set(edges_of(snn)) == {
        Edge(INPUT, "relus.0", ("stem",)),
        # The shortcut and the branch start and end at the same sites.
        Edge("relus.0", "relus.1", ("body", "more")),
        Edge("relus.1", "relus.2", ("left",)),
        Edge("relus.2", OUTPUT, ("readout",)),
    }


def test_sites_may_be_called_like_the_ends() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.input, self.output = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.output(self.second(self.input(self.first(x)))))

    snn = qs.convert(Named(), torch.rand(8, 4), steps=2)
    assert edges_of(snn) == (Edge(INPUT, "input", ("first",)), Edge("input", "output", ("second",)), Edge("output", OUTPUT, ("third",)))


def test_a_way_around_a_site() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.third(x + torch.relu(self.second(x)))

    snn = qs.convert(Around(), torch.rand(8, 4), steps=2)
    one, other = (site.name for site in snn.sites)
    assert set(edges_of(snn)) == {
        Edge(INPUT, one, ("first",)),
        Edge(one, other, ("second",)),
        Edge(one, OUTPUT, ("third",)),
        Edge(other, OUTPUT, ("third",)),
    }
