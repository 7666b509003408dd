"""Convolutional networks drawn at random, in every spelling that users have: modules, functions, methods, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

IMAGE = (3, 9, 10)

ACTIVATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "nn.ReLU": nn.ReLU,
    "nn.ReLU in place": lambda: nn.ReLU(inplace=True),
    "F.relu": lambda: F.relu,
    "torch.relu": lambda: torch.relu,
    "x.relu()": lambda: lambda x: x.relu(),
    "x.relu_()": lambda: lambda x: x.relu_(),
    "clamp": lambda: lambda x: x.clamp(min=0),
    "nn.ReLU6": nn.ReLU6,
    "F.relu6": lambda: F.relu6,
    "F.hardtanh": lambda: lambda x: F.hardtanh(x, -0.5, 1.5),
    "nn.LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "F.leaky_relu": lambda: lambda x: F.leaky_relu(x, 0.2),
    "nn.PReLU": nn.PReLU,
    "nn.Hardsigmoid": nn.Hardsigmoid,
}
SMOOTH: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "nn.SiLU": nn.SiLU,
    "F.gelu": lambda: F.gelu,
    "sigmoid": lambda: torch.sigmoid,
    "nn.Hardswish": lambda: nn.Hardswish(inplace=True),
}
POOLS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "nn.MaxPool2d": lambda: nn.MaxPool2d(2, 1),
    "F.max_pool2d": lambda: lambda x: F.max_pool2d(x, 3, 1, 1),
    "nn.AvgPool2d": lambda: nn.AvgPool2d(2, 1),
    "F.avg_pool2d": lambda: lambda x: F.avg_pool2d(x, 3, 1, 1),
    "nn.AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d((4, 5)),
    "F.adaptive_max_pool2d": lambda: lambda x: F.adaptive_max_pool2d(x, (5, 4)),
}
SHAPES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "pad": lambda: lambda x: F.pad(x, (1, 0, 0, 1)),
    "nn.ZeroPad2d": lambda: nn.ZeroPad2d(1),
    "shuffle": lambda: lambda x: x.view(x.size(0), 2, x.size(1) // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    "halves swapped": lambda: lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "upsampling": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
    "dropout": nn.Dropout,
    "F.dropout": lambda: _Dropout(),
    "stacked": lambda: lambda x: torch.stack(x.unbind(1), 1),
    "like": lambda: lambda x: x + x.mean((2, 3), keepdim=True).expand_as(x),
    "expanded": lambda: lambda x: x - x.mean((2, 3), keepdim=True).expand(x.size(0), -1, x.size(2), x.size(3)),
    "reshaped": lambda: lambda x: x.flatten(2).reshape_as(x),
    "identity": nn.Identity,
    "scale": lambda: lambda x: x * 0.5 + 0.1,
    "in place": lambda: lambda x: x.add_(0.1).mul_(0.9),
    "cut": lambda: lambda x: x[:, :, 1:, :-1],
    "flipped": lambda: lambda x: x.flip(1, -1),
    "rolled": lambda: lambda x: torch.roll(x, (1, 2), (1, 3)),
    "repeated": lambda: lambda x: x.repeat(1, 2, 1, 1)[:, 1:5],
    "moved": lambda: lambda x: x.movedim(1, -1).swapaxes(1, 3).movedim(1, 3).transpose(1, 3),
    "F.channel_shuffle": lambda: lambda x: F.channel_shuffle(x, 2),
    "up and down": lambda: lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "cumsum": lambda: lambda x: 0.5 * x.cumsum(1),
    "nn.ReflectionPad2d": lambda: nn.ReflectionPad2d((1, 0, 0, 1)),
    "bilinear": lambda: nn.UpsamplingBilinear2d((6, 7)),
    "-1 behind": lambda: lambda x: x.view(x.size(0), x.size(1), -1).view(x.shape),
}
REFUSED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "layer norm": lambda: lambda x: F.layer_norm(x.relu(), x.shape[1:]),
    "nn.GroupNorm": lambda: _After(nn.GroupNorm(2, 4)),
    "softmax": lambda: lambda x: x.relu().softmax(1),
    "einsum": lambda: lambda x: torch.einsum("bchw,bdhw->bchw", x.relu(), x),
    "std": lambda: lambda x: x.relu() / (1 + x.std((2, 3), keepdim=True)),
    "instance norm": lambda: _After(nn.InstanceNorm2d(4)),
    "glu": lambda: lambda x: F.glu(torch.cat([x, x.relu()], 1), 1),
    "mean over the batch": lambda: lambda x: x.relu() - x.mean(0, keepdim=True),
    "batch statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "sort": lambda: lambda x: x.relu().sort(1)[0],
    "where": lambda: lambda x: torch.where(x > 0, x, 0.1 * x),
}


class _Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=self.training)


class _After(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.relu())


@dataclass(frozen=True)
class Drawn:
    """What a network consists of."""

    blocks: tuple[tuple[str, ...], ...]
    """Each (join, spelling of the convolution, batch norm, activation, what comes behind)."""
    head: str
    seed: int


JOINS = ("plain", "residual", "residual of spikes", "concatenated", "shared", "gate", "square")
CONVOLUTIONS = ("nn.Conv2d", "F.conv2d", "depthwise", "nn.ConvTranspose2d", "grouped")
NORMS = ("none", "behind", "in front", "function")
HEADS = ("mean", "nn.AdaptiveAvgPool2d", "flatten", "view")


def all_networks() -> st.SearchStrategy[Drawn]:
    """A third each: exact ones, with smooth activations, and with what does not convert."""
    return st.one_of(drawn_networks(), drawn_networks(smooth=True), drawn_networks(smooth=True, refused=True))


def drawn_networks(smooth: bool = False, refused: bool = False) -> st.SearchStrategy[Drawn]:
    """Networks of one to four blocks; with smooth activations, or with operators that do not convert, among others."""
    behind = ["nothing", *POOLS, *SHAPES, *(REFUSED if refused else ())]
    block = st.tuples(
        st.sampled_from(JOINS),
        st.sampled_from(CONVOLUTIONS),
        st.sampled_from(NORMS),
        st.sampled_from([*ACTIVATIONS, *(SMOOTH if smooth else ())]),
        st.sampled_from(behind),
    )
    return st.builds(Drawn, st.lists(block, min_size=1, max_size=4).map(tuple), st.sampled_from(HEADS), st.integers(0, 2**16))


class Block(nn.Module):
    """4 channels in, 4 channels out."""

    def __init__(self, join: str, convolution: str, norm: str, activation: str, behind: str) -> None:
        super().__init__()
        self.join, self.norm_place, self.functional = join, norm, convolution == "F.conv2d"
        width = 8 if join == "concatenated" else 4
        if convolution == "nn.ConvTranspose2d":
            self.conv: Any = nn.ConvTranspose2d(width, 4, 3, padding=1)
        else:
            groups = {"depthwise": 4, "grouped": 2}.get(convolution, 1)
            self.conv = nn.Conv2d(width, 4, 3, padding=1, groups=groups, bias=norm == "none")
        self.norm = nn.BatchNorm2d(width if norm == "in front" else 4)
        self.act = (ACTIVATIONS | SMOOTH)[activation]()
        self.gate = nn.Linear(4, 4)
        self.behind = ({"nothing": nn.Identity} | POOLS | SHAPES | REFUSED)[behind]()

    def convolve(self, x: Tensor) -> Tensor:
        if self.norm_place == "in front":
            x = self.norm(x)
        x = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1) if self.functional else self.conv(x)
        if self.norm_place == "behind":
            x = self.norm(x)
        if self.norm_place == "function":
            x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias, training=False)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.join == "concatenated":
            x = self.act(self.convolve(torch.cat([x, -x], 1)))
        elif self.join == "residual":
            x = self.act(self.convolve(x) + x)
        elif self.join == "residual of spikes":
            x = x + self.act(self.convolve(x))
        elif self.join == "shared":
            x = self.act(self.convolve(self.act(self.convolve(x))))
        elif self.join == "gate":
            x = self.act(self.convolve(x))
            x = x * F.hardsigmoid(self.gate(x.mean((2, 3)))).view(-1, 4, 1, 1)
        elif self.join == "square":
            x = self.act(self.convolve(x))
            x = x * x
        else:
            x = self.act(self.convolve(x))
        return self.behind(x)


class RandomGraph(nn.Module):
    """A stem, blocks, a head."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(drawn.seed)
            self.stem = nn.Conv2d(IMAGE[0], 4, 3, padding=1)
            self.blocks = nn.ModuleList(Block(*block) for block in drawn.blocks)
            self.head = drawn.head
            self.pool = nn.AdaptiveAvgPool2d(2)
            self.fc = nn.Linear(4 if drawn.head == "mean" else 16, 5)
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                    layer.running_mean.uniform_(-0.3, 0.3)
                    layer.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        if self.head == "mean":
            return self.fc(x.mean((2, 3)))
        x = self.pool(x) if self.head == "nn.AdaptiveAvgPool2d" else F.adaptive_avg_pool2d(x, 2)
        return self.fc(x.view(x.size(0), -1) if self.head == "view" else torch.flatten(x, 1))
