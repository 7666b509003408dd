"""What torch.fx cannot follow is recorded by torch.export; where both can, they find the same sites, names and lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.sym_node import SymNode

import quickspike as qs
from quickspike import capture, exported
from quickspike.api import finish
from quickspike.conversion import SpikingNetwork, prepare
from quickspike.data import ImageStream
from quickspike.errors import DataError, TraceError, UnsupportedOperatorError
from quickspike.exported import record_exported
from quickspike.graph import Traced
from quickspike.method import create
from quickspike.operators import Affine


class Looks(nn.Module):
    """Its forward pass looks at sizes, which torch.fx cannot record."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.operation = operation
        self.head = nn.Linear(4, 5)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 4:
            x = F.interpolate(x, scale_factor=2.0)
        x = self.operation(self.act(self.norm(self.stem(x))))
        return self.head(x.flatten(1)[:, :4])


class Same(nn.Conv2d):
    """Padding computed from the size, as in networks ported from TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = max((-(-height // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
        columns = max((-(-width // self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu_())


class Blocks(nn.Module):
    """A shared activation, a residual, a concatenation, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=4)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.act(self.a(x))
        y = self.act(self.b(x))
        y = torch.cat([y, F.max_pool2d(x, 2)], 1)
        gate = y.mean((2, 3), keepdim=True).sigmoid()
        return (y * gate)[:, 2:12].mean((2, 3))


def _halved(x: Tensor) -> Tensor:
    x[:, 2:4].mul_(0.5)
    return x


# Looking at sizes, which only torch.export can record.
LOOKING: dict[str, Callable[[Tensor], Tensor]] = {
    "same padding": Same(8, 6, 3, 2),
    "depthwise same padding": Same(8, 8, (3, 5), (2, 1), groups=8),
    "expand": lambda x: x - x.mean((2, 3), keepdim=True).expand(x.shape[0], 8, *x.shape[2:]),
    "padded to a multiple": lambda x: F.pad(x, (0, -x.shape[-1] % 3, 0, -x.shape[-2] % 3)),
    "upsampled to a size": lambda x: F.interpolate(x, size=[2 * size for size in x.shape[2:]], mode="bilinear"),
}
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a shared layer": Twice(),
    "blocks": Blocks(),
    "transposed": nn.ConvTranspose2d(8, 3, 3, 2, 1, 1),
    "grouped, dilated": nn.Conv2d(8, 4, 3, padding=2, dilation=2, groups=2),
    "linear layers": nn.Sequential(nn.Flatten(), nn.Linear(512, 6), nn.BatchNorm1d(6), nn.LeakyReLU(0.1)),
    "average pooling": nn.AvgPool2d(3, 2, 1),
    "adaptive max-pooling": lambda x: F.adaptive_max_pool2d(x, (3, 2)),
    "relu6": lambda x: F.relu6(x * 4 - 1),
    "nn.ReLU6": nn.ReLU6(inplace=True),
    "hardtanh(0, 6)": lambda x: F.hardtanh(x, 0, 6),
    "logsigmoid": nn.LogSigmoid(),
    "adaptive pooling": nn.AdaptiveAvgPool2d(1),
    "max-pooling": nn.MaxPool2d(3, 2, 1),
    "dropout": nn.Dropout(),
    "silu": nn.SiLU(inplace=True),
    "selu": nn.SELU(),
    "hardtanh": nn.Hardtanh(-1, 2),
    "gelu": nn.GELU(approximate="tanh"),
    "prelu": nn.PReLU(8),
    "clamp": lambda x: x.clamp(0.1, 0.9),
    "chunks": lambda x: torch.stack(x.chunk(2, 1), 2).sum(2),
    "slices": lambda x: x[:, 1:7:2, ::2, -3:] - x[:, 0:1, ::2, 2:5] / 3 + 1,
    "views": lambda x: x.view(x.shape[0], 2, 4, -1).permute(0, 2, 1, 3).reshape(x.size(0), 8, -1).transpose(1, 2).unsqueeze(1).squeeze(1),
    "upsampling": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, (5, 7), mode="bicubic", align_corners=True),
    "nearest-exact": lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"),
    "antialiased": lambda x: F.interpolate(x, (5, 5), mode="bilinear", antialias=True),
    "area": lambda x: F.interpolate(x, scale_factor=0.5, mode="area"),
    "1-d": lambda x: F.interpolate(x.flatten(2), size=7, mode="linear") + F.interpolate(x.flatten(2), size=7),
    "3-d": lambda x: F.interpolate(x.unsqueeze(2), scale_factor=2, mode="trilinear") + nn.Upsample(scale_factor=2)(x.unsqueeze(2)),
    "nn.UpsamplingBilinear2d": nn.UpsamplingBilinear2d(scale_factor=2),
    "nn.UpsamplingNearest2d": nn.UpsamplingNearest2d((5, 6)),
    "pixel shuffle": nn.PixelShuffle(2),
    "F.pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "nn.PixelUnshuffle": nn.PixelUnshuffle(2),
    "F.pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 4),
    "nn.ChannelShuffle": nn.ChannelShuffle(2),
    "F.channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "constant padding": nn.ConstantPad2d(1, 0.5),
    "nn.ReflectionPad1d": nn.Sequential(nn.Flatten(2), nn.ReflectionPad1d(2)),
    "nn.ReflectionPad2d": nn.ReflectionPad2d((1, 2, 3, 0)),
    "nn.ReflectionPad3d": nn.Sequential(nn.Unflatten(1, (2, 4)), nn.ReflectionPad3d(1)),
    "nn.ReplicationPad1d": nn.Sequential(nn.Flatten(2), nn.ReplicationPad1d(2)),
    "nn.ReplicationPad3d": nn.Sequential(nn.Unflatten(1, (2, 4)), nn.ReplicationPad3d(1)),
    "nn.CircularPad2d": nn.CircularPad2d(1),
    "F.pad by reflection": lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect"),
    "F.pad by replication": lambda x: F.pad(x.flatten(2), (1, 1), mode="replicate"),
    "expand_as": lambda x: x - x.mean(1, keepdim=True).expand_as(x),
    "movedim": lambda x: x.movedim(1, 3),
    "torch.movedim": lambda x: torch.moveaxis(x, (1, 2), (2, 3)),
    "swapaxes": lambda x: x.swapaxes(1, 3) + torch.swapdims(x, 1, 2),
    "unflatten": lambda x: x.unflatten(1, (2, 4)),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "flip": lambda x: x.flip(1, -1) + torch.flip(x, [2]),
    "roll": lambda x: x.roll(2, 1) - torch.roll(x, shifts=(1, 3), dims=(2, 3)),
    "cumsum": lambda x: x.cumsum(1),
    "other views": lambda x: x.movedim(1, 3).unflatten(1, (2, 4)).swapaxes(2, 4).reshape_as(x),
    "in place": lambda x: x.add_(1).mul_(0.5).relu_(),
    "narrow": lambda x: x.narrow(1, 2, 3) * 2.0,
}
SMOOTH = ("logsigmoid", "silu", "selu", "gelu", "blocks")
"""Activations that straight lines approximate."""


class All(nn.Module):
    """Every operation on the outputs of the same neurons, so that one recording serves all."""

    def __init__(self, operations: dict[str, Callable[[Tensor], Tensor]], looks: bool = False) -> None:
        super().__init__()
        self.stem = Looks(nn.Identity()).stem
        self.norm, self.act, self.looks = Looks(nn.Identity()).norm, nn.ReLU(), looks
        self.operations = operations
        self.layers = nn.ModuleList(operation for operation in operations.values() if isinstance(operation, nn.Module))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.looks and x.shape[-1] < 4:
            x = F.interpolate(x, scale_factor=2.0)
        x = self.act(self.norm(self.stem(x)))
        # Some change what they are given.
        return {name: operation(x * 1.0) for name, operation in self.operations.items()}


def images(count: int = 2, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def no_fx(*_: Any) -> Any:
    raise TraceError("not by torch.fx. Way out: none")


def spiking(traced: Traced, steps: int, like: Tensor) -> SpikingNetwork:
    """What `convert` makes of a network that is recorded already."""
    method, stream = create("threshold_balancing", steps=steps), ImageStream(like)
    ann = prepare(traced, method)
    method.fit(ann, stream, None)
    return finish(ann, stream, method)


Recorded = tuple[All, Traced]


@pytest.fixture(scope="module")
def both() -> tuple[All, Traced, Traced]:
    """The same network, recorded by torch.fx and by torch.export."""
    torch.manual_seed(1)
    net = All(OPERATIONS).eval()
    with pytest.MonkeyPatch.context() as patch:
        by_fx = qs.trace(net, images(1), pieces=64)
        patch.setattr(capture, "_record", no_fx)
        return net, by_fx, qs.trace(net, images(1), pieces=64)


@pytest.fixture(scope="module")
def looking() -> Recorded:
    torch.manual_seed(1)
    net = All(LOOKING, looks=True).eval()
    with pytest.raises(TraceError):
        capture._record(net, "All")
    return net, qs.trace(net, images(1))


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, atol=tolerance * float(wanted.abs().max()))


@pytest.fixture(scope="module")
def answers(both: tuple[All, Traced, Traced], looking: Recorded) -> Iterator[dict[str, Sequence[Tensor]]]:
    net, by_fx, by_export = both
    with torch.no_grad():
        found = {name: (wanted,) for name, wanted in net(images(5)).items()}
        for traced in (by_fx, by_export):
            found = {name: (*found[name], one) for name, one in traced.module(images(5)).items()}
        other, traced = looking
        found |= {name: (wanted, traced.module(images(5))[name]) for name, wanted in other(images(5)).items()}
    return found


@pytest.mark.parametrize("name", [*OPERATIONS, *LOOKING])
def test_it_computes_what_the_network_computes(name: str, answers: dict[str, Sequence[Tensor]]) -> None:
    wanted, *found = answers[name]
    assert len(found) == (1 if name in LOOKING else 2)
    assert all(close(one, wanted, 1e-2 if name in SMOOTH else 1e-5) for one in found)


def test_both_recorders_find_the_same_sites(both: tuple[All, Traced, Traced]) -> None:
    _, by_fx, by_export = both
    assert by_fx.sites == by_export.sites
    assert len(by_fx.sites) > 200
    assert all("test_exported.py" in site.source for site in by_export.sites)
    for traced in (by_fx, by_export):
        # Batch norm is folded into the layers in front; learned slopes are an affine map.
        kept = [layer for layer in traced.module.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, Affine))]
        assert len(kept) == 1


def test_everything_spikes_and_is_read_again(both: tuple[All, Traced, Traced], tmp_path: Path) -> None:
    snn = spiking(both[2], 2, images(4))
    snn.save(tmp_path / "network.safetensors")
    again = qs.load(tmp_path / "network.safetensors")
    with torch.no_grad():
        whole, stepped = qs.simulate(snn, images()), qs.simulate(snn, images(), step_by_step=True)
        found = snn(images())
        assert list(found) == list(OPERATIONS)
        for name, one in again(images()).items():
            assert torch.equal(one, found[name]), name
            assert close(stepped.readouts[name][-1], whole.readouts[name][-1], 1e-4), name


def test_names_are_those_of_the_layers(both: tuple[All, Traced, Traced]) -> None:
    names = [site.name for site in both[2].sites]
    index = list(both[0].layers).index(OPERATIONS["blocks"])
    assert names[0] == "act"
    assert {f"layers.{index}.act", f"layers.{index}.act_2"} <= set(names)
    assert {"stem", f"layers.{index}.a", f"layers.{index}.b"} <= {name for name, _ in both[2].module.named_modules()}
    functions = {site.name: site.function for site in both[2].sites}
    assert functions[f"layers.{index}.act"] == functions["relu6"] == functions["relu6_2"] == "relu6"


def test_a_shared_layer_stays_one(both: tuple[All, Traced, Traced]) -> None:
    index = list(both[0].layers).index(OPERATIONS["a shared layer"])
    calls = [str(node.target) for node in both[2].module.graph.nodes if node.op == "call_module"]
    assert calls.count(f"layers.{index}.conv") == 2


def network(operation: Callable[[Tensor], Tensor]) -> Looks:
    torch.manual_seed(1)
    return Looks(operation).eval()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 17), (17, 9), (16, 16), (4, 31), (7, 5)])
def test_sizes_that_the_network_looks_at_are_looked_at_again(looking: Recorded, height: int, width: int) -> None:
    net, traced = looking
    with torch.no_grad():
        wanted, found = net(images(3, height, width)), traced.module(images(3, height, width))
    assert all(close(found[name], one, 1e-5) for name, one in wanted.items())


def test_what_it_looked_for_bounds_the_sizes(looking: Recorded, tmp_path: Path) -> None:
    net, traced = looking
    assert traced.choices["sizes"] == [[2, None], [4, None]]
    snn = spiking(traced, 400, images(4, 17, 9))
    snn.save(tmp_path / "network.safetensors")
    for one in (snn, qs.load(tmp_path / "network.safetensors")):
        with pytest.raises(DataError, match=r"looks at sizes, and was recorded for 2 or more x 4 or more; got \[2, 3, 8, 3\].*Way out"):
            one(images(2, 8, 3))
    with torch.no_grad():
        found = snn(images(4, 17, 9))
        assert all(close(found[name], wanted, 0.05) for name, wanted in net(images(4, 17, 9)).items())


FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "a condition on heights": lambda x: x.sum((2, 3)) if x.shape[2] % 2 else x.mean((2, 3)),
    "a condition on widths": lambda x: x.sum((2, 3)) if x.shape[3] % 2 else x.mean((2, 3)),
    "a number without a place in files": lambda x: x.mean((2, 3)) * float(x.shape[2] ** 0.5),
}


@pytest.mark.parametrize("name", FIXED)
def test_one_size_is_all_that_is_known(name: str, tmp_path: Path) -> None:
    net = network(FIXED[name])
    traced = qs.trace(net, images(1))
    assert traced.choices["sizes"] == [[8, 8], [8, 8]]
    snn = spiking(traced, 3, images(4))
    assert snn.provenance["sizes"] == [[8, 8], [8, 8]]
    snn.save(tmp_path / "network.safetensors")
    for one in (snn, qs.load(tmp_path / "network.safetensors")):
        with torch.no_grad():
            assert one(images()).shape == (2, 5)
        for run in (one, one.run):
            with pytest.raises(DataError, match=r"recorded for 8 x 8; got \[2, 3, 9, 8\]"):
                run(images(2, 9))


def test_a_network_may_be_trained_after_it_was_recorded_so() -> None:
    traced = qs.trace(network(Blocks()), images(1), trainable=True)
    norms = [layer for layer in traced.module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 1
    assert {"stem.weight", "operation.a.weight"} <= {name for name, _ in traced.module.named_parameters()}


def test_what_neither_can_record_says_so() -> None:
    net = Looks(lambda x: x * 2 if bool((x > 0).all()) else x)
    with pytest.raises(TraceError, match=r"cannot be recorded \(.*test_exported.py:\d+ in forward\).*nor by torch.export: .*Way out"):
        qs.trace(net, images(1))
    with pytest.raises(DataError):
        qs.trace(net, torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (lambda x: torch.add(x, x, alpha=2), "add with alpha"),
        (lambda x: F.dropout(x, 0.5), "training=True"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "layer_norm"),
        (lambda x: F.group_norm(x, 2), "group_norm"),
        (lambda x: x.sort(1)[0], "sort"),
        (_halved, "slice_scatter"),
        (lambda x: torch.div(x, 0.3, rounding_mode="floor"), "div"),
    ],
)
def test_refusals_name_the_operator_and_the_line(operation: Callable[[Tensor], Tensor], text: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=rf"(?s){text}.*test_exported.py:\d+ in|test_exported.py:\d+ in .*{text}"):
        qs.trace(Looks(operation).eval(), images(1))


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("layer_norm", lambda x: F.layer_norm(x, x.shape[1:])),
        ("group_norm", lambda x: F.group_norm(x, 2)),
        ("softmax", lambda x: x.softmax(1)),
    ],
)
def test_what_is_kept_analog_is_recorded_too(name: str, operation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = Looks(operation).eval()
    traced = qs.trace(net, images(1), analog=(name,))
    with torch.no_grad():
        assert torch.allclose(traced.module(images()), net(images()), atol=1e-5)


class Functions(nn.Module):
    """Batch norm as a function, and weights that are standardised in forward()."""

    def __init__(self, torch_spelling: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.torch_spelling = torch_spelling
        for name, values in (("mean", torch.randn(6)), ("variance", torch.rand(6) + 0.5)):
            self.register_buffer(name, values)
        self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight
        kernel = (kernel - kernel.mean((1, 2, 3), keepdim=True)) / kernel.std((1, 2, 3), keepdim=True) * self.gain.relu().view(-1, 1, 1, 1)
        x = F.conv2d(x, kernel, self.conv.bias)
        if self.torch_spelling:
            x = torch.batch_norm(x, self.weight, self.bias, self.mean, self.variance, False, 0.1, 1e-5, True)
        else:
            x = F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, False, 0.1, 1e-5)
        return self.head(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize("torch_spelling", [False, True])
def test_functions_of_parameters_and_batch_norm_as_a_function(torch_spelling: bool) -> None:
    torch.manual_seed(0)
    net = Functions(torch_spelling).eval()
    coverage = qs.inspect(net, images(1))
    assert [finding.status for finding in coverage.findings if "BatchNorm" in finding.operator] == ["folded"]
    traced = qs.trace(net, images(1))
    with torch.no_grad():
        assert torch.allclose(traced.module(images()), net(images()), atol=1e-5)
    trained = qs.trace(net, images(1), trainable=True)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in trained.module.modules())
    # What is learned of the weights is what they come to.
    assert any(parameter.shape == net.conv.weight.shape for parameter in trained.module.parameters())


class BatchStatistics(Functions):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.batch_norm(self.conv(x), None, None, training=True)).mean((2, 3)))


def test_batch_norm_as_a_function_that_takes_batch_statistics_is_refused() -> None:
    assert not qs.inspect(BatchStatistics(False), images(2)).convertible


class Same(nn.Module):
    """Padded as TensorFlow does, by the size of the image."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, stride=2 if i % 3 == 0 else 1) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            pads: list[int] = []
            for size, stride in zip(x.shape[:1:-1], layer.stride[::-1], strict=True):
                missing = max((-(-size // stride) - 1) * stride + 3 - size, 0)
                pads += [missing // 2, missing - missing // 2]
            x = layer(F.pad(x, pads)).relu()
        return x.mean((2, 3))


def test_formulas_of_sizes_that_grow_without_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dozen such layers sympy took minutes; the size of the example is all that is known then."""
    example = torch.rand(1, 3, 40, 40)
    init = SymNode.__init__
    few = record_exported(Same(2).eval(), example, "Same").ranges
    assert all(upper is None for _, upper in few)
    monkeypatch.setattr(exported, "MOST_TERMS", 10)
    assert record_exported(Same(2).eval(), example, "Same").ranges == ((40, 40), (40, 40))
    assert SymNode.__init__ is init
    monkeypatch.undo()
    deep = Same(14).eval()
    snn = qs.convert(deep, torch.rand(8, 3, 40, 40), steps=64, ceiling="percentile", percentile=100.0)
    with torch.no_grad():
        assert torch.allclose(snn(example), deep(example), atol=0.2 * float(deep(example).abs().max()))
