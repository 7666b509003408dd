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
