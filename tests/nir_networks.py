"""Small networks for tests of NIR files: a chain, and shortcuts of every kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quickspike as qs
from quickspike.conversion import SpikingNetwork

IMAGES = (6, 3, 16, 16)


class Chain(nn.Module):
    """Convolutions, averages, a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.pool, self.fc1, self.fc2 = nn.AvgPool2d(2), nn.Linear(128, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Shortcuts(nn.Module):
    """Past one convolution, past two with a convolution on the way, cut and widened, and spikes added to spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.conv1, self.conv2, self.down = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(6, 8, 1, 2)
        self.conv3, self.conv4 = nn.Conv2d(8, 10, 3, 2, 1), nn.Conv2d(10, 10, 3, padding=1)
        self.conv5, self.conv6 = nn.Conv2d(10, 10, 3, padding=1), nn.Conv2d(10, 10, 3, padding=1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.one(x) + x)
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + self.down(x))
        x = F.relu(self.conv4(F.relu(self.conv3(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))
        x = x + F.relu(self.conv6(F.relu(self.conv5(x))))
        return self.fc(x.mean((2, 3)))


class Kernels(nn.Module):
    """Groups, dilation, oblong kernels, a norm of its own, concatenation, twice the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, (1, 3), padding=(0, 1)), nn.BatchNorm2d(6)
        self.grouped, self.dilated = nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.Conv2d(6, 4, 3, padding=2, dilation=2)
        self.last, self.fc = nn.Conv2d(10, 4, (3, 1), stride=2, padding=(1, 0)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.relu(self.stem(x))))
        x = torch.cat([F.relu(self.grouped(x)), F.relu(self.dilated(x))], 1)
        x = F.relu(self.last(x + x))
        return self.fc(F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1).flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"chain": Chain, "shortcuts": Shortcuts, "kernels": Kernels}


def spiking(name: str, method: str = "threshold_balancing", steps: int = 6, **options: object) -> tuple[SpikingNetwork, Tensor]:
    """The network of that name, converted, and images for it."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES)
    return qs.convert(NETWORKS[name]().eval(), images, method, steps=steps, **options), images
