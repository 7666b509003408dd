"""The networks of the papers, as rows of one table: `build("vgg16", classes=100, pool="max")`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from quickspike.errors import OptionError, UnknownNameError
from quickspike.options import option, options_of, validate

Pool = Literal["max", "average"]
Initial = Literal["default", "small_head", "fan_out", "fan_in"]
Part = Literal["stem", "conv", "linear"]
Style = Literal["post", "pre", "wide", "current"]

Children = dict[str, nn.Module | None]


class Window(NamedTuple):
    """What a convolution sees."""

    kernel: int
    stride: int
    padding: int

    def applied_to(self, side: int) -> int:
        """Side of the map that comes out."""
        return (side + 2 * self.padding - self.kernel) // self.stride + 1


SAME = Window(3, 1, 1)
WINDOWS = {"": SAME, "v": Window(3, 1, 0), "d": Window(4, 2, 1)}
"""By the suffix of a convolution in `Chain.layers`."""


@dataclass(frozen=True)
class Options:
    """What every network can be asked for; the defaults of a row are those of its paper."""

    name: str = ""
    """Of the row, for messages."""
    width: int = option(64, "channels of the first convolution; all hidden sizes scale with it", low=1, high=2**13)
    classes: int = option(10, "number of classes", low=1, high=2**20)
    channels: int = option(3, "channels of an image", low=1, high=2**16)
    pool: Pool = option("average", "kind of the 2 x 2 poolings; a global pooling is an average in any case")
    batch_norm: bool = option(True, "batch norm with every convolution")
    bias: Literal[None, True, False] = option(None, "bias in every convolution and linear layer; None: in those of the paper")
    dropout: float = option(0.0, "probability of dropout after the activations of convolutions", low=0, high=1)
    head_dropout: float = option(0.0, "probability of dropout after hidden linear layers, or before the only one", low=0, high=1)


@dataclass(frozen=True)
class Chain:
    """A network like VGG: one layer after the other, then linear layers.

    `layers` is read from left to right: `64` a 3 x 3 convolution with 64 channels, batch norm and ReLU (`64v` without
    padding, `64d` 4 x 4 with stride 2), `P` a 2 x 2 pooling, `R` adds two such convolutions of the same width to their
    input, `G` a global average.
    """

    layers: str
    hidden: tuple[int, ...] = ()
    """Sizes of the hidden linear layers."""
    spiking_pools: bool = False
    """A ReLU after every pooling too: no change here, but in the spiking network a pooling then has neurons of its own."""
    dropout: Literal["every", "average_replaces", "channels"] = "every"
    """After every convolution, before the pooling if there is one; `average_replaces`: unless that is an average pooling;
    `channels`: of whole channels."""
    numbered: bool = False
    """Names the layers 0, 1, ..., in files of weights too, instead of conv1, norm1, relu1, ..."""

    @property
    def pools(self) -> bool:
        """True if there is a 2 x 2 pooling."""
        return "P" in self.layers.split()


@dataclass(frozen=True)
class Residual:
    """A network like ResNet: a stem, stages of basic blocks (stride 1, then 2), one linear layer.

    `post`: one convolution as the stem, ReLU after the addition, global average. `pre`: the same with batch norm and
    ReLU before the convolutions and shortcuts taken after the first of them. `wide`: blocks as `post`, but three
    convolutions and a pooling as the stem, and no global average. `current`: ReLU before the convolutions, batch norm
    after them, shortcuts without any ReLU from the image to the last stage, 4 x 4 and 2 x 2 convolutions where the map is
    halved; in the spiking network the shortcuts carry currents, which reach every layer at the first step (as in MS-ResNet,
    Hu et al. 2021, arXiv 2112.08954). Dropout follows the first activation of a block's convolutions (`current`: the second),
    and every activation of the stem but the last.
    """

    style: Style
    widths: tuple[int, ...]
    blocks: tuple[int, ...]

    @property
    def pools(self) -> bool:
        """True if there is a 2 x 2 pooling."""
        return self.style == "wide"


@dataclass(frozen=True)
class Network:
    """One row of the table."""

    source: str
    """Where it is defined, with the arXiv id."""
    plan: Chain | Residual
    options: Options
    image: int = 32
    """Height and width of an image in pixels."""
    bias: tuple[Part, ...] = ("stem", "conv", "linear")
    """Which layers have one."""
    initial: Initial = "default"
    """Weights at the start: torch's; `small_head` N(0, 2/(k k Cout)) for convolutions and N(0, 0.01^2) for linear layers;
    `fan_out`, `fan_in` Kaiming's normal for both. Except for torch's, biases start at 0."""


_ULL = "Datta & Beerel 2021, arXiv 2112.12133"
_DIET = "Rathi & Roy 2020, arXiv 2008.03658"
_RNL = "Ding et al. 2021, arXiv 2105.11654"
_QCFS = "Bu et al. 2022 (QCFS), arXiv 2303.04347"
_RATE = "Yan, Zhou & Wong 2022, arXiv 2211.08410"

_VGG16 = "64 64 P 128 128 P 256 256 256 P 512 512 512 P 512 512 512"
_VGG19 = "64 64 P 128 128 P 256 256 256 256 P 512 512 512 512 P 512 512 512 512"
_WIDTHS = (64, 128, 256, 512)


def _plain(source: str, plan: Chain | Residual, image: int = 32, **options: Any) -> Network:
    """Without norm and bias, with dropout: the two papers that fine-tune the spiking network."""
    options = {"batch_norm": False, "dropout": 0.2, "head_dropout": 0.5 if isinstance(plan, Chain) else 0.0} | options
    return Network(source, plan, Options(**options), image, bias=(), initial="small_head")


def _wide_head(layers: str) -> Chain:
    return Chain(layers, hidden=(4096, 4096), dropout="average_replaces")


NETWORKS: dict[str, Network] = {
    "digits_cnn": Network(
        "quickspike, for the embedded 8 x 8 digits",
        Chain("32 32 P 64 P", hidden=(64,), numbered=True),
        Options(width=32, channels=1),
        image=8,
        bias=("linear",),
    ),
    "fast_cnn": Network("quickspike, for training on a CPU", Chain("32 64d R 128d R 256d R G"), Options(width=32), bias=("linear",)),
    "fast_resnet": Network(
        "quickspike, for training on a CPU and few time steps",
        Residual("current", (32, 64, 128, 256), (0, 1, 2, 1)),
        Options(width=32),
        bias=("linear",),
    ),
    "vgg6": _plain(_DIET, _wide_head("64 P 128 128 P")),
    "vgg9": _plain(_DIET, _wide_head("64 P 128 256 P 256 512 P 512 P 512")),
    "vgg11": _plain(_ULL, _wide_head("64 P 128 256 P 512 512 P 512 P 512 512"), pool="max"),
    "vgg16_wide_head": _plain(f"{_ULL}; {_DIET} with pool=average", _wide_head(_VGG16), pool="max"),
    "vgg16_imagenet": _plain(_DIET, _wide_head(f"{_VGG16} P"), image=224, classes=1000),
    "vgg16": Network(f"{_RNL}; {_QCFS}", Chain(f"{_VGG16} P", hidden=(4096, 4096)), Options(), initial="fan_out"),
    "vgg19": Network(
        f"{_RATE} (its predecessor CQ)",
        Chain(f"{_VGG19} P", spiking_pools=True, dropout="channels"),
        Options(dropout=0.1),
        initial="fan_in",
    ),
    "vgg_star": Network(
        _RATE,
        Chain("128 128 P 256 256 P 512 512 P 1024v P", spiking_pools=True, dropout="channels"),
        Options(width=128, dropout=0.1),
        initial="fan_in",
    ),
    "mnist_cnn": Network(
        _RATE,
        Chain("32v 32v 32d 64v 64v 64d 128v", dropout="channels"),
        Options(width=32, channels=1),
        image=28,
        initial="fan_in",
    ),
    "mnist_rate_norm": Network(_RNL, Chain("32v P 32v P 32v P"), Options(width=32, channels=1), image=28, initial="fan_out"),
    "mnist_alexnet": Network(
        _RNL,
        Chain("32 P 64 P 128 256 256 P", hidden=(1024, 512)),
        Options(width=32, channels=1),
        image=28,
        initial="fan_out",
    ),
    "resnet18": Network(_QCFS, Residual("post", _WIDTHS, (2, 2, 2, 2)), Options(), bias=("linear",)),
    "resnet20": Network(_QCFS, Residual("post", (16, 32, 64), (3, 3, 3)), Options(width=16), bias=("linear",)),
    "resnet34": Network(_QCFS, Residual("post", _WIDTHS, (3, 4, 6, 3)), Options(), bias=("linear",)),
    "resnet12_wide": _plain(_DIET, Residual("wide", _WIDTHS, (1, 1, 1, 1))),
    "resnet20_wide": _plain(f"{_ULL}; {_DIET} with pool=average", Residual("wide", _WIDTHS, (2, 2, 2, 2)), pool="max"),
    # Its code has 5 or 6 blocks in the third stage; 5 make 34 layers with weights.
    "resnet34_wide": _plain(_DIET, Residual("wide", _WIDTHS, (3, 4, 5, 3))),
    "preact_resnet18": Network(_RNL, Residual("pre", _WIDTHS, (2, 2, 2, 2)), Options(), bias=("conv", "linear"), initial="fan_out"),
    "preact_resnet34": Network(_RNL, Residual("pre", _WIDTHS, (3, 4, 6, 3)), Options(), bias=("conv", "linear"), initial="fan_out"),
}


def build(name: str, **options: Any) -> nn.Module:
    """The network of a row of `NETWORKS`, in training mode: `[B, channels, image, image]` to `[B, classes]`.

    Args:
        name: of the row.
        **options: fields of `Options` that differ from the row's.

    Raises:
        UnknownNameError: no such network or option.
        OptionError: an option has a value that is not allowed.
    """
    if name not in NETWORKS:
        raise UnknownNameError("network", name, NETWORKS)
    known = options_of(Options)
    for key in options:
        if key not in known:
            raise UnknownNameError(f"option of {name}", key, known)
    row = NETWORKS[name]
    chosen = dataclasses.replace(row.options, name=name, **options)
    validate(chosen)
    if chosen.pool != row.options.pool and not row.plan.pools:
        raise OptionError(f"{name} has no 2 x 2 pooling whose kind could be {chosen.pool!r}")
    make = _Layers(row, chosen)
    network = _chain(row.plan, make) if isinstance(row.plan, Chain) else _residual_network(row.plan, make)
    _initialise(network, row.initial)
    return network


BUILDERS: dict[str, Callable[..., nn.Module]] = {name: partial(build, name) for name in NETWORKS}


def digits_cnn(**options: Any) -> nn.Module:
    """Three convolutions with batch norm for the embedded 8 x 8 digits: `[B, 1, 8, 8]` to `[B, 10]`."""
    return build("digits_cnn", **options)


class Add(nn.Module):
    """x = before(x); after(shortcut(x) + body(x)), each of which does nothing if it is left out."""

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # An empty nn.Sequential is false, so `or` would not do.
        self.before = nn.Identity() if before is None else before
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.after = nn.Identity() if after is None else after

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        result: Tensor = self.after(self.shortcut(x) + self.body(x))
        return result


def _sequence(**children: nn.Module | None) -> nn.Sequential:
    """The children that there are; what is left out changes no other's name, so weights fit with and without dropout."""
    sequence = nn.Sequential()
    for name, child in children.items():
        if child is not None:
            sequence.add_module(name, child)
    return sequence


class _Layers:
    """Makes layers as one row and its options ask for them."""

    def __init__(self, row: Network, options: Options) -> None:
        self.row, self.options = row, options
        self.biased: tuple[Part, ...] = {None: row.bias, True: ("stem", "conv", "linear"), False: ()}[options.bias]

    def size(self, published: int) -> int:
        """`published` at the chosen width."""
        return published * self.options.width // self.row.options.width

    def conv(self, inputs: int, outputs: int, window: Window = SAME, part: Part = "conv") -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, window.kernel, window.stride, window.padding, bias=part in self.biased)

    def norm(self, channels: int) -> nn.BatchNorm2d | None:
        return nn.BatchNorm2d(channels) if self.options.batch_norm else None

    def dropout(self, kind: type[nn.Module] = nn.Dropout) -> nn.Module | None:
        return kind(self.options.dropout) if self.options.dropout else None

    def head_dropout(self) -> nn.Module | None:
        return nn.Dropout(self.options.head_dropout) if self.options.head_dropout else None

    def pool(self) -> nn.Module:
        return nn.MaxPool2d(2) if self.options.pool == "max" else nn.AvgPool2d(2)

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias="linear" in self.biased)

    def block(
        self, number: int, inputs: int, outputs: int, window: Window = SAME, part: Part = "conv", dropout: nn.Module | None = None
    ) -> Children:
        """Convolution, batch norm, ReLU, dropout."""
        return {
            f"conv{number}": self.conv(inputs, outputs, window, part),
            f"norm{number}": self.norm(outputs),
            f"relu{number}": nn.ReLU(),
            f"dropout{number}": dropout,
        }

    def pair(self, inputs: int, outputs: int, window: Window = SAME, last: bool = False) -> Children:
        """A block, convolution, batch norm, and a second ReLU if `last`."""
        first = self.block(1, inputs, outputs, window, dropout=self.dropout())
        second = self.block(2, outputs, outputs)
        return {**first, **(second if last else second | {"relu2": None})}

    def head(self, features: int, hidden: tuple[int, ...] = ()) -> Children:
        """From `[B, C, H, W]` with `features` = C H W to `[B, classes]`."""
        layers: Children = {"flatten": nn.Flatten()}
        for number, size in enumerate(map(self.size, hidden), 1):
            layers[f"linear{number}"] = self.linear(features, size)
            layers[f"linear{number}_relu"] = nn.ReLU()
            layers[f"linear{number}_dropout"] = self.head_dropout()
            features = size
        dropout = None if hidden else self.head_dropout()
        return {**layers, "head_dropout": dropout, "classifier": self.linear(features, self.options.classes)}


# Networks like VGG


def _chain(plan: Chain, make: _Layers) -> nn.Sequential:
    layers: Children = {}
    numbers: Counter[str] = Counter()
    channels, side = make.options.channels, make.row.image
    entries = plan.layers.split()
    for entry, following in zip(entries, [*entries[1:], ""], strict=True):
        numbers[entry if entry.isalpha() else ""] += 1
        if entry == "P":
            layers |= _pooling(plan, make, numbers["P"])
            side //= 2
        elif entry == "R":
            layers[f"residual{numbers['R']}"] = Add(_sequence(**make.pair(channels, channels, last=True)))
        elif entry == "G":
            layers["global_pool"], side = nn.AdaptiveAvgPool2d(1), 1
        else:
            outputs, window = make.size(int(entry.rstrip("vd"))), WINDOWS[entry.lstrip("0123456789")]
            layers |= make.block(numbers[""], channels, outputs, window, dropout=_dropout(plan, make, following))
            channels, side = outputs, window.applied_to(side)
    network = _sequence(**layers, **make.head(channels * side**2, plan.hidden))
    return nn.Sequential(*network.children()) if plan.numbered else network


def _pooling(plan: Chain, make: _Layers, number: int) -> Children:
    return {f"pool{number}": make.pool(), f"pool{number}_relu": nn.ReLU() if plan.spiking_pools else None}


def _dropout(plan: Chain, make: _Layers, following: str) -> nn.Module | None:
    if plan.dropout == "average_replaces" and following == "P" and make.options.pool == "average":
        return None
    return make.dropout(nn.Dropout2d if plan.dropout == "channels" else nn.Dropout)


# Networks like ResNet


def _residual_network(plan: Residual, make: _Layers) -> nn.Sequential:
    layers: Children = {"stem": _stem(plan, make)}
    channels = make.size(plan.widths[0])
    for number, (width, blocks) in enumerate(zip(plan.widths, plan.blocks, strict=True), 1):
        stage = nn.Sequential()
        for index in range(blocks):
            stride = 2 if number > 1 and index == 0 else 1
            stage.append(_block(plan.style, make, channels, make.size(width), stride))
            channels = make.size(width)
        layers[f"stage{number}"] = stage if blocks else None
    if plan.style == "pre":
        layers |= {"norm": make.norm(channels), "relu": nn.ReLU()}
    if plan.style == "current":
        layers["relu"] = nn.ReLU()
    if plan.style == "wide":
        side = make.row.image // 2 ** len(plan.widths)
        return _sequence(**layers, **make.head(channels * side**2))
    return _sequence(**layers, global_pool=nn.AdaptiveAvgPool2d(1), **make.head(channels))


def _stem(plan: Residual, make: _Layers) -> nn.Sequential:
    width, channels = make.size(plan.widths[0]), make.options.channels
    if plan.style == "pre":
        return _sequence(conv1=make.conv(channels, width, part="stem"))
    layers = make.block(1, channels, width, part="stem")
    if plan.style == "current":
        return _sequence(**layers | {"relu1": None})
    if plan.style == "post":
        return _sequence(**layers)
    layers["dropout1"] = make.dropout()
    layers |= make.block(2, width, width, part="stem", dropout=make.dropout())
    return _sequence(**layers, **make.block(3, width, width, part="stem"), pool=make.pool())


def _block(style: Style, make: _Layers, inputs: int, outputs: int, stride: int) -> Add:
    """A basic block: two convolutions and a shortcut, which is a convolution where the shape changes."""
    if style == "current":
        halved = stride == 2
        body = _sequence(relu=nn.ReLU(), **make.pair(inputs, outputs, WINDOWS["d"] if halved else SAME))
        return Add(body, _sequence(conv=make.conv(inputs, outputs, Window(2, 2, 0)), norm=make.norm(outputs)) if halved else None)
    projection = make.conv(inputs, outputs, Window(1, stride, 0)) if stride != 1 or inputs != outputs else None
    if style == "pre":
        first = make.block(1, inputs, outputs, Window(3, stride, 1), dropout=make.dropout())
        before = _sequence(norm=make.norm(inputs), relu=nn.ReLU())
        return Add(_sequence(**first, conv2=make.conv(outputs, outputs)), projection, before)
    shortcut = None if projection is None else _sequence(conv=projection, norm=make.norm(outputs))
    return Add(_sequence(**make.pair(inputs, outputs, Window(3, stride, 1))), shortcut, after=nn.ReLU())


def _initialise(network: nn.Module, initial: Initial) -> None:
    if initial == "default":
        return
    mode: Literal["fan_in", "fan_out"] = "fan_in" if initial == "fan_in" else "fan_out"
    for layer in network.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        if initial == "small_head" and isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
        else:
            # For a convolution with fan_out this is N(0, 2/(k k Cout)).
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
