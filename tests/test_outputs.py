"""Networks that give other things than one row of logits: maps, values, several tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.early_exit import Exit, leads_of
from quickspike.errors import DataError, OptionError, TraceError
from quickspike.simulation import simulate
from quickspike.structure import first, places, tensors

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    features: Tensor
    answer: Tensor


class Several(nn.Module):
    """A backbone with a map of classes, an answer for the image and something that no neuron touches."""

    def __init__(self, give: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.between = nn.Conv2d(8, 8, 1)
        self.dense, self.act2, self.head = nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Linear(8, 5)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        features = self.act(self.stem(x))
        return self.give(self.dense(features), self.head(self.act2(self.between(features)).mean((2, 3))), x.mean(1))


GIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "one map": lambda dense, answer, mean: dense,
    "a tuple": lambda dense, answer, mean: (answer, dense),
    "a dict in a list": lambda dense, answer, mean: [{"out": dense, "more": (answer, mean)}],
    "an ordered dict": lambda dense, answer, mean: OrderedDict(out=dense, aux=answer),
    "a named tuple": lambda dense, answer, mean: Pair(dense, answer),
    "numbers for names": lambda dense, answer, mean: {2: dense, 1: answer},
    "one twice": lambda dense, answer, mean: (answer, answer),
    "something that torch.fx cannot follow": lambda dense, answer, mean: {"out": dense if mean.shape[1] > 4 else answer, "aux": answer},
}


def shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in tensors(outputs)]


def off(got: Any, wanted: Any) -> float:
    pairs = zip(tensors(got), tensors(wanted), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def converted(net: nn.Module, steps: int = 4, **options: Any) -> qs.SpikingNetwork:
    return qs.convert(net, IMAGES, steps=steps, ceiling="percentile", percentile=100.0, **options)


@pytest.mark.parametrize("name", GIVES)
def test_every_output_tends_to_the_source_networks(name: str, tmp_path: Path) -> None:
    net = Several(GIVES[name]).eval()
    with torch.no_grad():
        wanted = net(IMAGES)
        snn = converted(net)
        errors = [off(snn.with_steps(steps)(IMAGES), wanted) for steps in (4, 32, 256)]
        assert shapes(snn(IMAGES)) == shapes(wanted)
        assert list(places(wanted)) == list(places(snn(IMAGES)))
        assert errors[0] > 4 * errors[1] > 16 * errors[2]
        snn.save(tmp_path / "network.safetensors")
        again = qs.load(tmp_path / "network.safetensors")(IMAGES)
        assert list(places(again)) == list(places(snn(IMAGES)))
        assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(snn(IMAGES)), strict=True))


@pytest.mark.parametrize("name", ["a dict in a list", "one twice"])
def test_every_way_to_simulate_gives_the_same(name: str) -> None:
    snn = converted(Several(GIVES[name]).eval(), 6)
    with torch.no_grad():
        wanted = tensors(snn(IMAGES))
        assert first(snn(IMAGES)) is not wanted[0]
        for run in (snn.run(IMAGES), simulate(snn, IMAGES, step_by_step=True), simulate(snn, IMAGES, memory="100kB")):
            assert torch.equal(run.logits, first(run.readouts))
            assert [len(one) for one in tensors(run.readouts)] == [6] * len(wanted)
            assert all(torch.allclose(a[-1], b, atol=1e-6) for a, b in zip(tensors(run.readouts), wanted, strict=True))
        snn.memory = "100kB"
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tensors(snn(IMAGES)), wanted, strict=True))
        snn.memory, snn.chunk = None, 2
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tensors(snn(IMAGES)), wanted, strict=True))


def test_an_early_exit_asks_the_first_and_stops_all() -> None:
    snn = converted(Several(GIVES["a tuple"]).eval(), 8)
    with torch.no_grad():
        leads = leads_of(snn(IMAGES)[0])
        full, early = snn.run(IMAGES), snn.run(IMAGES, exit=Exit((float(leads.median()),) * 7, 4.0, 0.0))
    assert early.stopped is not None
    assert len(set(early.stopped.tolist())) > 1
    for whole, cut in zip(tensors(full.readouts), tensors(early.readouts), strict=True):
        for sample, stopped in enumerate(early.stopped.tolist()):
            assert torch.allclose(cut[-1, sample], whole[stopped - 1, sample], atol=1e-6)


def test_an_early_exit_needs_classes() -> None:
    with pytest.raises(OptionError, match=r"an early exit needs logits \[B, K\], got \[12, 4, 8, 8\]"):
        converted(Several(GIVES["one map"]).eval(), 2).run(IMAGES, exit=Exit((0.1,), 2.0, 0.0))


@pytest.mark.parametrize(("engine", "synchronous"), [("fused", False), ("integer", False), ("count", True)])
def test_every_engine_gives_all_of_them(engine: Any, synchronous: bool) -> None:
    snn = converted(Several(GIVES["a tuple"]).eval(), 8, synchronous=synchronous)
    with torch.no_grad():
        assert off(qs.accelerate(snn, engine)(IMAGES), snn(IMAGES)) < (1e-5 if engine == "fused" else 0.1)


def test_half_precision_gives_all_of_them() -> None:
    snn = converted(Several(GIVES["a tuple"]).eval(), 8)
    with torch.no_grad():
        assert off(qs.accelerate(snn, "fused", precision="bf16")(IMAGES), snn(IMAGES)) < 0.2


def test_classes_of_pixels_are_counted_one_by_one() -> None:
    net = Several(GIVES["one map"]).eval()
    snn = converted(net, 8)
    with torch.no_grad():
        answers, labels = snn.run(IMAGES).logits.argmax(2), net(IMAGES).argmax(1)
        labels[0] = 0
    report = qs.evaluate(snn, [(IMAGES, labels)], net, steps=[2, 8])
    assert report.samples == 12
    for step in (2, 8):
        assert report.accuracy[step] == pytest.approx(100 * float((answers[step - 1] == labels).double().mean()))
        assert report.agreement[step] == pytest.approx(100 * float((answers[step - 1] == net(IMAGES).argmax(1)).double().mean()))
    assert report.reference_accuracy == pytest.approx(100 * float((net(IMAGES).argmax(1) == labels).double().mean()))
    with pytest.raises(DataError, match=r"batch 1: labels must be 12 whole numbers, or \[B, H, W\].*\[12, 8\] for logits \[12, 4, 8, 8\]"):
        qs.evaluate(snn, [(IMAGES, labels[:, 0])])


@pytest.mark.parametrize("synchronous", [False, True])
def test_values_are_held_against_the_source_network_without_labels(synchronous: bool) -> None:
    net = Several(GIVES["a tuple"]).eval()
    snn = converted(net, 8, synchronous=synchronous)
    report = qs.evaluate(snn, [IMAGES[:7], IMAGES[7:]], net, steps=[2, 8])
    assert (report.samples, report.accuracy, report.agreement, report.reference_accuracy) == (12, {}, {}, None)
    with torch.no_grad():
        for step in (2, 8):
            pairs = zip(tensors(snn.with_steps(step)(IMAGES)), tensors(net(IMAGES)), strict=True)
            expected = max(float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in pairs)
            assert report.deviation[step] == pytest.approx(100 * expected, rel=1e-4)
    assert report.to_json()["deviation"] == {str(step): value for step, value in report.deviation.items()}
    with pytest.raises(DataError, match="no labels"):
        qs.evaluate(snn, [IMAGES])
    with pytest.raises(DataError, match=r"the reference gives \[12, 4, 8, 8\], the spiking network"):
        qs.evaluate(snn, [IMAGES], Several(GIVES["one map"]).eval())


def test_a_network_without_a_tensor_is_named() -> None:
    with pytest.raises(DataError, match="the network gives no tensor but a dict"):
        first({"a": None, "b": ["text"]})


@pytest.mark.parametrize(
    ("give", "text"),
    [
        (lambda dense, answer, mean: (dense, 3), r"returns a int at \[1\]"),
        (lambda dense, answer, mean: {"a": answer.argmax(1)}, r"a tensor of torch.int64 at \['a'\]"),
        (lambda dense, answer, mean: (None,), "returns nothing"),
        (lambda dense, answer, mean: (answer, torch.ones(2, 3)), r"what Several returns at \[1\] does not follow the batch"),
    ],
)
def test_what_is_no_output_is_refused_by_its_place(give: Callable[..., Any], text: str) -> None:
    with pytest.raises(TraceError, match=text):
        qs.trace(Several(give).eval(), IMAGES)
