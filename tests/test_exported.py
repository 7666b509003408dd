"""What torch.fx cannot follow is recorded by torch.export, with the same sites, names and lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quickspike as qs
from quickspike import capture
from quickspike.errors import DataError, TraceError, UnsupportedOperatorError
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


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "same padding": Same(8, 6, 3, 2),
    "depthwise same padding": Same(8, 8, (3, 5), (2, 1), groups=8),
    "a shared layer": Twice(),
    "blocks": Blocks(),
    "transposed": nn.ConvTranspose2d(8, 3, 3, 2, 1, 1),
    "grouped, dilated": nn.Conv2d(8, 4, 3, padding=2, dilation=2, groups=2),
    "linear layers": nn.Sequential(nn.Flatten(), nn.Linear(512, 6), nn.BatchNorm1d(6), nn.LeakyReLU(0.1)),
    "average pooling": nn.AvgPool2d(3, 2, 1),
    "adaptive max-pooling": lambda x: F.adaptive_max_pool2d(x, (3, 2)),
    "relu6": lambda x: F.relu6(x * 4 - 1),
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
    "pixel shuffle": nn.PixelShuffle(2),
    "constant padding": nn.ConstantPad2d(1, 0.5),
    "expand": lambda x: x - x.mean((2, 3), keepdim=True).expand(x.shape[0], 8, *x.shape[2:]),
    "expand_as": lambda x: x - x.mean(1, keepdim=True).expand_as(x),
    "other views": lambda x: x.movedim(1, 3).unflatten(1, (2, 4)).swapaxes(2, 4).reshape_as(x),
    "in place": lambda x: x.add_(1).mul_(0.5).relu_(),
    "narrow": lambda x: x.narrow(1, 2, 3) * 2.0,
}


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(name: str) -> Looks:
    torch.manual_seed(1)
    return Looks(OPERATIONS[name]).eval()


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_computes_what_the_network_computes(name: str) -> None:
    net = network(name)
    with pytest.raises(TraceError):
        capture._record(net, "Looks")
    traced = qs.trace(net, images(1), pieces=64)
    with torch.no_grad():
        expected = net(images(5))
        close = 1e-2 if any(finding.error for finding in traced.coverage.findings) else 1e-5
        assert torch.allclose(traced.module(images(5)), expected, atol=close * float(expected.abs().max()))
    # Batch norm is folded into the convolution, as if torch.fx had recorded it; learned slopes are an affine map.
    kept = [layer for layer in traced.module.modules() if isinstance(layer, (nn.BatchNorm2d, Affine))]
    assert len(kept) == (name == "prelu")
    assert traced.sites[0].name == "act"
    assert "test_exported.py" in traced.sites[0].source
    snn = qs.convert(net, images(4), steps=3)
    with torch.no_grad():
        assert snn(images()).shape == (2, 5)


def test_names_are_those_of_the_layers() -> None:
    traced = qs.trace(network("blocks"), images(1))
    assert [site.name for site in traced.sites[:3]] == ["act", "operation.act", "operation.act_2"]
    assert {"stem", "operation.a", "operation.b", "head"} <= {name for name, _ in traced.module.named_modules()}
    assert [site.function for site in traced.sites[:3]] == ["relu", "relu6", "relu6"]


def test_a_shared_layer_stays_one() -> None:
    traced = qs.trace(network("a shared layer"), images(1))
    calls = [str(node.target) for node in traced.module.graph.nodes if node.op == "call_module"]
    assert calls.count("operation.conv") == 2


def test_a_saved_network_is_read_again(tmp_path: Any) -> None:
    snn = qs.convert(network("same padding"), images(4), steps=2)
    snn.save(tmp_path / "network.safetensors")
    with torch.no_grad():
        assert torch.equal(qs.load(tmp_path / "network.safetensors")(images()), snn(images()))


def test_a_network_may_be_trained_after_it_was_recorded_so() -> None:
    traced = qs.trace(network("blocks"), images(1), trainable=True)
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
