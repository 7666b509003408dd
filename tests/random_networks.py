"""Spiking networks drawn at random, for tests that compare two ways of running one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import quickspike as qs
from quickspike.conversion import SpikingNetwork
from quickspike.neuron import Neuron

JOINS = ("plain", "residual", "spikes added", "concatenated", "pre-activation", "twice")
POOLS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "average": lambda: nn.AvgPool2d(2),
    "overlapping average": lambda: nn.AvgPool2d(3, 1, 1),
    "max": lambda: nn.MaxPool2d(3, 1, 1),
    "padded": lambda: nn.ZeroPad2d((1, 0, 0, 1)),
    "function": lambda: Halved(),
}
HEADS = ("global", "flat", "hidden")
IMAGE = (3, 12, 11)


class Block(nn.Module):
    """A convolution, or two around a join."""

    def __init__(self, channels: int, join: str, groups: int, bias: bool) -> None:
        super().__init__()
        self.join = join
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=bias)
        self.conv2 = nn.Conv2d(2 * channels if join == "concatenated" else channels, channels, 1, bias=bias)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.join == "plain":
            return F.relu(self.conv1(x))
        if self.join == "residual":
            return F.relu(x + self.conv2(F.relu(self.conv1(x))))
        if self.join == "spikes added":
            return x + F.relu(self.conv1(x))
        if self.join == "concatenated":
            return F.relu(self.conv2(torch.cat([x, F.relu(self.conv1(x))], 1)))
        if self.join == "twice":
            return F.relu(self.conv1(F.relu(self.conv1(x))))
        return F.relu(self.conv1(F.relu(self.norm(x))))


class Halved(nn.Module):
    """A pooling without a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class RandomNetwork(nn.Module):
    """A stem, blocks with a pooling each, a head."""

    def __init__(self, channels: int, blocks: list[tuple[str, str, bool]], head: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList()
        for join, _, grouped in blocks:
            self.blocks.append(Block(channels, join, 2 if grouped and channels % 2 == 0 else 1, grouped))
        self.pools, self.head = nn.ModuleList(POOLS[pool]() for _, pool, _ in blocks), head
        with torch.no_grad():
            size = self.features(torch.zeros(1, *IMAGE)).shape[1]
        self.hidden = nn.Linear(size, 7) if head == "hidden" else None
        self.fc = nn.Linear(7 if head == "hidden" else size, 4)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block, pool in zip(self.blocks, self.pools, strict=True):
            x = pool(block(x))
        return F.adaptive_avg_pool2d(x, 1).flatten(1) if self.head == "global" else x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.fc(x if self.hidden is None else F.relu(self.hidden(x)))


def spiking(model: Any, images: Tensor, steps: int, leaky: bool, strict: bool, granular: bool) -> SpikingNetwork:
    """`model` with a first layer of small multiples of 1/8, converted, with drawn heights of spikes and leaks."""
    with torch.no_grad():
        for parameter in model.stem.parameters():
            parameter.copy_(torch.randint(-3, 5, parameter.shape) / 8)
    snn = qs.convert(model, images, "potential_init", steps=steps, granularity="channel" if granular else "layer")
    with torch.no_grad():
        for neuron in snn.neurons().values():
            neuron.strict = strict
            neuron.amplitude.mul_(torch.rand(neuron.amplitude.shape) + 0.5)
            if leaky:
                leak(neuron)
    return snn


def leak(neuron: Neuron) -> None:
    """Leaks of the channels' own where thresholds are, else one."""
    neuron.leak = nn.Parameter(0.5 + torch.rand(neuron.threshold.shape) / 2, False)


BLOCKS = st.lists(st.tuples(st.sampled_from(JOINS), st.sampled_from(list(POOLS)), st.booleans()), min_size=1, max_size=3)
STEPS = st.one_of(st.integers(1, 8), st.integers(1, 64))
NETWORKS = {
    "channels": st.integers(1, 6),
    "blocks": BLOCKS,
    "head": st.sampled_from(HEADS),
    "steps": STEPS,
    "seed": st.integers(0, 5),
    "leaky": st.booleans(),
    "strict": st.booleans(),
    "granular": st.booleans(),
}
"""Arguments of `draw`."""


def draw(
    channels: int, blocks: list[tuple[str, str, bool]], head: str, steps: int, seed: int, leaky: bool, strict: bool, granular: bool
) -> tuple[SpikingNetwork, Tensor]:
    """A spiking network, and images for it."""
    torch.manual_seed(seed)
    # Small multiples of 1/8, so that what the first layer gives is exact however it is summed.
    images = torch.randint(-8, 9, (3, *IMAGE)) / 8
    model = RandomNetwork(channels, blocks, head).eval()
    return spiking(model, images, steps, leaky, strict, granular), images


CONVOLUTIONS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
PADDINGS = ("none", "same", "one", "reflect", "transposed")


class Layers(nn.Module):
    """A stem and convolutions of any kind, on one to three axes."""

    def __init__(self, axes: int, layers: list[tuple[str, int, int, int, bool, bool]]) -> None:
        super().__init__()
        plain, transposed = CONVOLUTIONS[axes]
        self.stem, self.layers = plain(3, 4, 1), nn.ModuleList()
        for padding, kernel, stride, dilation, grouped, bias in layers:
            window: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": 2 if grouped else 1, "bias": bias}
            if padding == "transposed":
                self.layers.append(transposed(4, 4, kernel, **window))
            elif padding == "same":
                self.layers.append(plain(4, 4, kernel | 1, padding="same", **{**window, "stride": 1}))
            elif padding == "none":
                self.layers.append(plain(4, 4, kernel, **window))
            else:
                mode = "reflect" if padding == "reflect" else "zeros"
                self.layers.append(plain(4, 4, kernel, padding=1, padding_mode=mode, **window))
        self.axes = axes
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for layer in self.layers:
            x = F.relu(layer(x))
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[self.axes - 1]
        return self.head(pool(x, 1).flatten(1))


LAYERS = {
    "axes": st.integers(1, 3),
    "layers": st.lists(
        st.tuples(st.sampled_from(PADDINGS), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.booleans(), st.booleans()),
        min_size=1,
        max_size=2,
    ),
    "size": st.integers(13, 17),
    "steps": STEPS,
    "seed": st.integers(0, 5),
    "leaky": st.booleans(),
    "strict": st.booleans(),
    "granular": st.booleans(),
}
"""Arguments of `draw_layers`."""


def draw_layers(
    axes: int,
    layers: list[tuple[str, int, int, int, bool, bool]],
    size: int,
    steps: int,
    seed: int,
    leaky: bool,
    strict: bool,
    granular: bool,
) -> tuple[SpikingNetwork, Tensor]:
    """A spiking network of strided, dilated, grouped and transposed convolutions, and images of odd sizes for it."""
    torch.manual_seed(seed)
    shape = (size, size - 2, size - 4)[-axes:] if axes < 3 else (7, 6, 5)
    images = torch.randint(-8, 9, (2, 3, *shape)) / 8
    model = Layers(axes, [one if axes < 3 else (one[0], one[1], 1, 1, *one[4:]) for one in layers]).eval()
    return spiking(model, images, steps, leaky, strict, granular), images
