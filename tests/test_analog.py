"""Operators that are not affine, on real values: exact in the mean, counted as what they cost, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quickspike as qs
from quickspike import capture
from quickspike.errors import OptionError, TraceError, UnsupportedOperatorError
from quickspike.neuron import Increment, RunningMean, unfold
from quickspike.operations import count_operations
from quickspike.simulation import simulate


class Behind(nn.Module):
    """Spikes, then an operator, then a linear readout."""

    def __init__(self, operator: Callable[..., Tensor], features: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.other = nn.Linear(4, 6)
        self.head = nn.Linear(features, 3)
        self.operator = operator
        for parameter in (*self.first.parameters(), *self.other.parameters(), *self.head.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).relu(), self.other(x).relu()
        return self.head(self.operator(a, b))


def drawn(count: int = 5) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(3))


class Norm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.norm(a + b)


class Maps(nn.Module):
    """An operator on maps of two channels."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.operator((a - b).unflatten(1, (2, 3))).flatten(1)


class Attention(nn.Module):
    """Two tokens of three features."""

    def __init__(self, keys: int = 1, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.keys = nn.MultiheadAttention(3, 3, batch_first=True, **options), keys

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = (a + b).unflatten(1, (2, 3))
        y = x if self.keys == 1 else b.unflatten(1, (2, 3))
        answer, _ = self.attention(x, y, y, need_weights=False)
        return (x + answer).flatten(1)


class Gate(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b.mean(1, keepdim=True)


def attend(a: Tensor, b: Tensor) -> Tensor:
    q, k = a.unsqueeze(-1), b.unsqueeze(-1)
    return (torch.softmax(q @ k.transpose(1, 2), -1) @ k).flatten(1)


OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "product": (lambda a, b: a * b, ()),
    "square": (lambda a, b: a * a + b, ()),
    "gate": (Gate(), ()),
    "product with a constant besides": (lambda a, b: a * b * 2.0 - b, ()),
    "division": (lambda a, b: a / (b + 1.0), ("div",)),
    "silu": (lambda a, b: F.silu(a - b), ("silu",)),
    "layer norm": (Norm(nn.LayerNorm(6)), ("LayerNorm",)),
    "layer norm by name": (Norm(nn.LayerNorm(6)), ("operator.*",)),
    "group norm": (Norm(nn.GroupNorm(2, 6)), ("operator.norm",)),
    "softmax": (lambda a, b: torch.softmax(a + b, 1), ("softmax",)),
    "maximum": (lambda a, b: torch.maximum(a, b), ("max*",)),
    "attention": (attend, ("softmax", "matmul")),
    "gelu module": (Norm(nn.GELU()), ("GELU",)),
    "a layer that holds others": (Norm(nn.Sequential(nn.LayerNorm(6), nn.Sequential(nn.Softmax(1)))), ("operator.norm",)),
    "the class of such a layer": (Norm(nn.Sequential(nn.LayerNorm(6), nn.GELU())), ("Norm",)),
    "a pattern of classes": (Norm(nn.Sequential(nn.LayerNorm(6), nn.GELU())), ("N?rm",)),
    "rms norm": (Norm(nn.RMSNorm(6)), ("RMSNorm",)),
    "F.rms_norm": (lambda a, b: F.rms_norm(a - b, (6,)), ("rms_norm",)),
    "instance norm": (Maps(nn.InstanceNorm1d(2, affine=True)), ("InstanceNorm1d",)),
    "instance norm with statistics": (Maps(nn.InstanceNorm1d(2, track_running_stats=True).eval()), ("InstanceNorm1d",)),
    "F.instance_norm": (Maps(F.instance_norm), ("instance_norm",)),
    "nn.GLU": (lambda a, b: Norm(nn.GLU(1))(a, b).repeat(1, 2), ("glu",)),
    "F.glu": (lambda a, b: torch.cat([F.glu(a - b), b], 1)[:, :6], ("glu",)),
    "where": (lambda a, b: torch.where(a > b, a, 0.1 * b), ("where", "gt")),
    "masked by a method": (lambda a, b: (a + b).where(a.lt(0.5), b), ("where", "lt")),
    "einsum": (lambda a, b: torch.einsum("bi,bj->bij", a, b).sum(2), ("einsum",)),
    "std": (lambda a, b: a - b.std(1, keepdim=True), ("std",)),
    "torch.var": (lambda a, b: a - torch.var(b, dim=1, keepdim=True, correction=0), ("var",)),
    "cumsum needs no request": (lambda a, b: (a - b).cumsum(1), ()),
    "attention layer": (Attention(), ("MultiheadAttention",)),
    "attention layer by name": (Attention(keys=2), ("operator.attention",)),
}


def expected(net: Behind, snn: qs.SpikingNetwork, images: Tensor) -> Tensor:
    """The operator on the mean outputs of the neurons in front of it."""
    spikes = simulate(snn, images).spikes
    means = [
        spikes[name].float() / snn.steps * neuron.bounded()[0] * (1 if neuron.scaled else 1 / neuron.bounded()[0]) * neuron.amplitude
        for name, neuron in snn.neurons().items()
    ]
    with torch.no_grad():
        return net.head(net.operator(means[0], means[1]))


def converted(name: str, steps: int) -> tuple[Behind, qs.SpikingNetwork]:
    operator, analog = OPERATORS[name]
    net = Behind(operator)
    return net, qs.convert(net, drawn(32), steps=steps, analog=analog)


class _Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.act(a - b)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_mean_is_that_of_the_operator_on_the_means(name: str, steps: int) -> None:
    net, snn = converted(name, steps)
    assert len(snn.sites) == 2
    wanted = expected(net, snn, drawn())
    with torch.no_grad():
        assert torch.allclose(snn(drawn()), wanted, atol=1e-4)
        assert float(wanted.std()) > 0.01


def test_a_relu_within_a_scope_stays_a_relu() -> None:
    net = Behind(_Difference())
    snn = qs.convert(net, drawn(32), steps=5, analog=("operator.*",))
    assert [site.name for site in snn.sites] == ["relu", "relu_2"]
    with torch.no_grad():
        assert torch.allclose(snn(drawn()), expected(net, snn, drawn()), atol=1e-5)
    everything = qs.convert(net, drawn(32), steps=5)
    assert [site.name for site in everything.sites] == ["relu", "relu_2", "operator.act"]


@pytest.mark.parametrize("name", ["gate", "attention", "layer norm", "division"])
def test_all_ways_to_run_give_the_same(name: str, tmp_path: Path) -> None:
    _, snn = converted(name, 6)
    images = drawn()
    whole = simulate(snn, images)
    for other in (simulate(snn, images, step_by_step=True), simulate(snn, images, memory=20_000)):
        assert torch.allclose(whole.logits, other.logits, atol=1e-5)
    snn.save(tmp_path / "network.safetensors")
    again = qs.load(tmp_path / "network.safetensors")
    with torch.no_grad():
        assert torch.equal(snn(images), again(images))
    fast = qs.accelerate(snn, "fused")
    with torch.no_grad():
        assert torch.equal(snn(images), fast(images))


def test_half_precision_keeps_its_sums_in_single() -> None:
    _, snn = converted("gate", 300)
    fast = qs.accelerate(snn, "fused", precision="bf16")
    with torch.no_grad():
        wanted, got = snn(drawn()), fast(drawn())
    assert float((wanted - got).abs().max()) < 0.05 * float(wanted.abs().max())


def test_gradients_pass() -> None:
    _, snn = converted("gate", 4)
    snn(drawn()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in snn.parameters() if parameter.requires_grad)
    assert snn.network.get_submodule("first").weight.grad.abs().sum() > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_means_and_increments_undo_each_other(steps: int, part: int, seed: int) -> None:
    x = torch.randn(steps * 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, increment = RunningMean(steps), Increment(steps)
    assert torch.allclose(increment(mean(x)), x, atol=1e-9)
    assert torch.allclose(unfold(mean(x), steps)[-1], unfold(x, steps).mean(0))
    # In parts of some steps each.
    outs, states = [], (None, None)
    for chunk in torch.split(unfold(x, steps), part):
        y, first = mean.scan(chunk.flatten(0, 1), states[0], len(chunk))
        z, second = increment.scan(y, states[1], len(chunk))
        states = first, second
        outs.append(z)
    assert torch.allclose(torch.cat(outs), x, atol=1e-9)


def test_operations_on_real_values_are_counted_as_such() -> None:
    _, snn = converted("gate", 4)
    counts = {(row.name, row.kind): row for row in count_operations(snn, drawn(1)).rows}
    (product,) = [row for row in counts.values() if row.kind == "analog" and row.name.startswith("mul")]
    assert (product.dense, product.multiplies, product.accumulates) == (6, 6 * 4, 0)
    # The head reads real values.
    head = counts["head", "layer"]
    assert (head.multiplies, head.accumulates) == (18 * 4, 0)
    _, attention = converted("attention", 2)
    rows = [row for row in count_operations(attention, drawn(1)).rows if row.name.startswith("matmul")]
    assert sorted(row.multiplies for row in rows) == [36 * 2, 36 * 2]
    assert sorted(row.dense for row in rows) == [36, 36]


def test_without_asking_they_are_refused_with_the_way_out() -> None:
    for name, kind in (("layer norm", "LayerNorm"), ("softmax", "softmax"), ("division", "div")):
        net = Behind(OPERATORS[name][0])
        with pytest.raises(UnsupportedOperatorError, match=rf"{kind}.*Way out: .*analog"):
            qs.trace(net, drawn(1))


def test_in_front_of_the_first_neuron_they_run_once() -> None:
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    snn = qs.convert(net, drawn(32), steps=3)
    assert not any(isinstance(layer, (RunningMean, Increment)) for layer in snn.modules())
    (norm,) = [row for row in count_operations(snn, drawn(1)).rows if row.kind == "analog"]
    assert (norm.dense, norm.multiplies) == (4, 4)


def test_a_pattern_that_fits_nothing() -> None:
    with pytest.raises(OptionError, match=r"'haed\.\*' fits no call of Behind"):
        qs.trace(Behind(Gate()), drawn(1), analog=("haed.*",))


def test_the_count_engine_says_no() -> None:
    net = Behind(Gate())
    snn: Any = qs.quantise(qs.convert(net, drawn(32), steps=4, synchronous=True)).network
    with pytest.raises(OptionError, match="count engine"):
        qs.accelerate(snn, "count")


def test_samples_that_mix_are_refused_though_no_size_shows_it() -> None:
    net = Behind(lambda a, b: torch.softmax(a + b, 0))
    with pytest.raises(TraceError, match=r"for a sample among others.*no softmax, norm or sort along axis 0"):
        qs.trace(net, drawn(1), analog=("softmax",))


def by_export(net: nn.Module, patch: pytest.MonkeyPatch, **options: Any) -> Any:
    def no_fx(*_: Any) -> Any:
        raise TraceError("not by torch.fx. Way out: none")

    with patch.context() as context:
        context.setattr(capture, "_record", no_fx)
        return qs.trace(net, drawn(1), **options)


class Several(nn.Module):
    """Operators side by side."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(4, 6), nn.Linear(4, 6)
        self.operators = [OPERATORS[name][0] for name in names]
        self.layers = nn.ModuleList(one for one in self.operators if isinstance(one, nn.Module))

    def forward(self, x: Tensor) -> list[Tensor]:
        a, b = self.first(x).relu(), self.other(x).relu()
        return [operator(a, b) for operator in self.operators]


def test_both_recorders_keep_the_same_analog(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # What is affine, or asks for other attention than of a signal to itself.
    left_out = ("by name", "layer that holds", "group norm", "a pattern")
    names = [name for name in OPERATORS if not any(text in name for text in left_out)]
    net = Several(names).eval()
    analog = tuple({pattern for name in names for pattern in OPERATORS[name][1]})
    by_fx, exported = qs.trace(net, drawn(1), analog=analog), by_export(net, monkeypatch, analog=analog)
    assert by_fx.sites == exported.sites
    assert [site.name for site in exported.sites] == ["relu", "relu_2"]
    with torch.no_grad():
        for wanted, *found in zip(net(drawn()), by_fx.module(drawn()), exported.module(drawn()), strict=True):
            assert all(torch.allclose(wanted, one, atol=1e-5) for one in found)


@pytest.mark.parametrize(
    ("operator", "analog", "text"),
    [
        (Gate(), ("first",), "fits nothing of Behind that spikes could not carry: only Linear, which are affine or pool, or dropped"),
        (Gate(), ("mean",), "only mean, which"),
        (Norm(nn.Sequential(nn.Dropout(), nn.Identity(), nn.Linear(6, 6))), ("Norm",), "only add, Dropout, Identity, Linear, which"),
        (Gate(), ("operator.nrom",), "'operator.nrom' fits no call of Behind"),
    ],
)
def test_a_pattern_that_asks_for_nothing_says_so(operator: nn.Module, analog: tuple[str, ...], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        qs.trace(Behind(operator), drawn(1), analog=analog)


@pytest.mark.parametrize(
    ("operator", "analog", "text"),
    [
        (
            lambda a, b: (a + b).sort(1)[0],
            ("sort",),
            r"sort\(\) has no exact spiking form, and is not among what can be kept on real values.*Way out",
        ),
        (Norm(nn.Softsign()), ("operator",), "Softsign has no exact spiking form, and is not among what can be kept.*Way out"),
        (Attention(add_zero_attn=True), ("MultiheadAttention",), r"MultiheadAttention.*Way out: batch_first=True, no masks"),
        (lambda a, b: a - b.amax(0), ("amax",), "amax.*moves the batch axis away from axis 0, or mixes samples"),
        (lambda a, b: torch.einsum("bi,ci->bc", a, b)[:, :1] + a, ("einsum",), "einsum.*mixes samples"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(operator: Callable[..., Tensor], analog: tuple[str, ...], text: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=text):
        qs.trace(Behind(operator), drawn(2), analog=analog)
