"""Engines against the reference: the same spikes of every neuron, for networks drawn at random."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quickspike as qs
from quickspike import loops
from quickspike.api import tune
from quickspike.conversion import SpikingNetwork
from quickspike.engines import Engine, Precision, accelerate
from quickspike.engines.integer import ByteConv, ByteLinear, ByteMax, ByteSum
from quickspike.errors import CheckpointError, ConversionError, OptionError
from quickspike.evaluation import make_fabric
from quickspike.models import load_model
from quickspike.processor import largest_pair
from quickspike.quantisation import quantise
from quickspike.simulation import simulate
from random_networks import LAYERS, NETWORKS, draw, draw_layers

LARGEST = int(min(255, largest_pair() // (2 * 127)))
"""Largest byte that this processor adds exactly with weights of 8 bits."""


def same_spikes(a: SpikingNetwork, b: SpikingNetwork, images: Tensor) -> None:
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        one, other = simulate(a, images), simulate(b, images)
    assert list(one.spikes) == list(other.spikes)
    for site, counts in one.spikes.items():
        assert torch.equal(counts, other.spikes[site]), site
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(**NETWORKS)
def test_every_engine_gives_the_spikes_of_the_reference(**drawn: object) -> None:
    snn, images = draw(**drawn)
    snn.to(memory_format=torch.channels_last)
    state = copy.deepcopy(snn.state_dict())
    same_spikes(accelerate(snn, "reference"), accelerate(snn, "fused"), images)
    whole = quantise(snn).network.to(memory_format=torch.channels_last)
    same_spikes(accelerate(whole, "reference"), accelerate(snn, "integer"), images)
    assert all(torch.equal(value, state[name]) for name, value in snn.state_dict().items())


def trains(snn: SpikingNetwork, images: Tensor) -> dict[str, Tensor]:
    """Whether each neuron fires at each step, `[T*B, ...]`, by site."""
    found: dict[str, Tensor] = {}
    hooks = [
        neuron.register_forward_hook(lambda _, __, out, site=site: found.update({site: out.ne(0)}))
        for site, neuron in snn.neurons().items()
    ]
    with torch.no_grad():
        snn(images)
    for hook in hooks:
        hook.remove()
    return found


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(**LAYERS)
def test_every_step_is_that_of_the_reference(**drawn: object) -> None:
    """Layers of all kinds; sums over the steps would not see a spike that comes early."""
    snn, images = draw_layers(**drawn)
    whole = quantise(snn).network
    for reference, fast in ((snn, accelerate(snn, "fused")), (whole, accelerate(snn, "integer"))):
        expected, found = trains(accelerate(reference, "reference"), images), trains(fast, images)
        assert expected.keys() == found.keys()
        for site, train in expected.items():
            assert train.shape[0] == snn.steps * len(images)
            assert torch.equal(train, found[site]), site


# What is in floating point after the quantisation is added up over the steps in another order.
EXACT = {
    "blocks": st.lists(
        st.tuples(
            st.sampled_from(["plain", "residual", "spikes added", "concatenated", "twice"]),
            st.sampled_from(["none", "average", "max", "padded"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
    "steps": st.sampled_from([1, 2, 3, 5, 8, 64]),
}


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(**{**NETWORKS, **EXACT})
def test_counts_are_those_of_the_simulation(**drawn: object) -> None:
    snn, images = draw(**drawn)
    whole = quantise(snn.as_synchronous()).network.to(memory_format=torch.channels_last)
    fast = accelerate(whole, "count")
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, found = simulate(accelerate(whole, "reference"), images), simulate(fast, images)
    for site, counts in expected.spikes.items():
        assert torch.equal(counts, found.spikes[site]), site
    torch.testing.assert_close(found.logits[-1], expected.logits[-1], rtol=1e-4, atol=1e-5)
    assert bool(found.logits[:-1].isnan().all())
    assert torch.equal(fast(images), found.logits[-1])


@pytest.fixture(scope="module")
def small() -> tuple[SpikingNetwork, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 32, 32)
    return qs.convert(load_model("resnet20,width=4"), images, "threshold_balancing", steps=4), images


def test_the_integer_engine_has_no_floating_point_layer_but_the_first(small: tuple[SpikingNetwork, Tensor]) -> None:
    fast = accelerate(small[0], "integer")
    assert fast.provenance["engine"] == {
        "name": "integer",
        "precision": "fp32",
        "why": "asked for",
        "in floating point": ["stem.conv1: reads no spikes"],
    }
    layers = [type(layer) for layer in fast.network.modules()]
    assert layers.count(ByteConv) == 18 + 2
    assert layers.count(ByteLinear) == 1
    assert layers.count(nn.Conv2d) == 1
    assert layers.count(nn.Linear) == 0


class Several(nn.Module):
    """Layers on spikes of every kind that the integer engine meets: most of them run on bytes, the others are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding="same")
        self.pool, self.pooled = nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 4, 1)
        self.odd, self.behind = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(4, 4, 1)
        self.up, self.line = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv1d(4, 4, 3, padding=1)
        self.own = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.same(F.relu(self.stem(x))))
        x = F.relu(self.pooled(self.pool(x)))
        x = F.relu(self.behind(self.odd(x)))
        x = F.relu(self.up(x))
        x = F.relu(self.line(F.adaptive_avg_pool2d(x, (4, 1)).flatten(2)))
        return F.linear(x.mean(2), self.own)


def test_what_stays_in_floating_point_is_listed_with_the_reason() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    snn = qs.convert(Several(), images, "threshold_balancing", steps=4)
    listed = [
        "stem: reads no spikes",
        "behind: reads real numbers",
        "up: ConvTranspose2d has no form in whole numbers here",
        "linear_1 (linear): has weights of its own, in no layer",
    ]
    whole = quantise(snn).network
    for fast in (accelerate(snn, "integer"), accelerate(whole, "integer")):
        assert fast.provenance["engine"]["in floating point"] == listed
        kinds = {name.partition("_")[0] for name, layer in fast.network.named_modules() if isinstance(layer, ByteConv)}
        assert kinds == {"same", "pooled", "line"}
        same_spikes(accelerate(whole, "reference"), fast, images)


def test_weights_that_are_no_whole_numbers_are_named(small: tuple[SpikingNetwork, Tensor]) -> None:
    whole = quantise(small[0]).network
    name, last = next((name, layer) for name, layer in whole.network.named_modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        last.weight += 0.5
    made = accelerate(whole, "integer").provenance["engine"]
    assert made["in floating point"] == ["stem.conv1: reads no spikes", f"{name}: its weights are no whole numbers of 8 bits"]


def test_neurons_that_read_bytes_get_numbers() -> None:
    """Spikes that a pooling adds up, each worth 1, and neurons on them without a layer in between."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AvgPool2d(2, divisor_override=1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    images = torch.rand(5, 1, 4, 4)
    snn = qs.convert(model, images, "threshold_balancing", steps=4)
    with torch.no_grad():
        for neuron in snn.neurons().values():
            neuron.scaled = False
            neuron.amplitude.fill_(1.0)
    snn.provenance["weight_bits"] = 8
    same_spikes(accelerate(snn, "reference"), accelerate(snn, "integer"), images)


def test_an_accelerated_network_is_simulated_and_evaluated_like_any_other(small: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = small
    labels = torch.arange(6) % 10
    whole = quantise(snn).network
    fast = accelerate(snn, "integer")
    expected = qs.evaluate(whole, [(images, labels)], steps=(1, 2, 8))
    found = qs.evaluate(fast, [(images, labels)], steps=(1, 2, 8))
    assert found.accuracy == expected.accuracy
    assert found.rates == expected.rates
    assert torch.equal(simulate(fast, images).logits, simulate(fast, images, step_by_step=True).logits)
    assert torch.equal(fast.with_steps(3)(images), whole.with_steps(3)(images))


def test_a_network_for_counts_is_evaluated_at_its_own_number_of_steps(small: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = small
    labels = torch.arange(6) % 10
    whole = quantise(snn.as_synchronous()).network
    fast = accelerate(whole, "count")
    expected = qs.evaluate(whole, [(images, labels)], steps=(4,))
    found = qs.evaluate(fast, [(images, labels)], steps=(4,))
    assert (found.accuracy, found.rates, found.latency) == (expected.accuracy, expected.rates, expected.latency)
    with pytest.raises(ConversionError, match="made for the count engine at T = 4; accelerate one with 3 steps"):
        fast.with_steps(3)
    with pytest.raises(ConversionError, match="no outputs at single steps"):
        fast.outputs(images)
    with pytest.raises(ConversionError, match="no steps"):
        simulate(fast, images, step_by_step=True)


def test_counts_need_windows(small: tuple[SpikingNetwork, Tensor]) -> None:
    with pytest.raises(OptionError, match=r"but .*relu.* streams; convert with synchronous=True"):
        accelerate(small[0], "count")
    with pytest.raises(OptionError, match="at most 255 steps, got 256"):
        accelerate(small[0].as_synchronous().with_steps(256), "count")


def test_auto_takes_the_fastest_that_is_exact(small: tuple[SpikingNetwork, Tensor]) -> None:
    snn, _ = small
    whole = quantise(snn).network
    engines = [accelerate(network).provenance["engine"] for network in (snn, whole, whole.as_synchronous())]
    assert [engine["name"] for engine in engines] == ["fused", "integer", "count"]
    assert [engine["why"] for engine in engines] == [
        "exact for weights in floating point",
        "the network is in whole numbers",
        "the network is in whole numbers and its layers wait for whole windows",
    ]
    assert accelerate(whole, precision="bf16").provenance["engine"]["name"] == "fused"


def test_a_network_in_whole_numbers_is_not_rounded_again(small: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = small
    whole = quantise(snn, 4).network
    same_spikes(accelerate(whole, "reference"), accelerate(whole, "integer"), images)


def test_bf16_rounds_layers_that_read_spikes_only(small: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = small
    fast = accelerate(snn, "fused", precision="bf16")
    kinds = {name: module.weight.dtype for name, module in fast.network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {"stem.conv1"}
    assert len(kinds) == 22
    assert fast(images).dtype == torch.float32
    first = next(iter(snn.neurons()))
    run, expected = simulate(fast, images), simulate(snn, images)
    assert torch.equal(run.spikes[first], expected.spikes[first])
    wanted = expected.logits.detach()
    assert float((run.logits - wanted).abs().mean() / wanted.abs().mean()) < 0.25


@pytest.mark.parametrize("there", [True, False])
def test_bf16_on_a_processor_without_it_is_said_to_be_slow(
    there: bool, small: tuple[SpikingNetwork, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("quickspike.processor.has_bfloat16", lambda: there)
    accelerate(small[0], "fused", precision="bf16")
    make_fabric("cpu", "bf16-mixed")
    accelerate(small[0], "fused")
    make_fabric("cpu", "32-true")
    said = [record.getMessage().split(":")[0] for record in caplog.records if record.levelname == "WARNING"]
    assert said == ([] if there else ["bf16", "bf16-mixed"])


def test_it_is_not_saved(small: tuple[SpikingNetwork, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save the one that it was made from"):
        accelerate(small[0], "integer").save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_unknown_engines_are_refused(small: tuple[SpikingNetwork, Tensor]) -> None:
    with pytest.raises(OptionError, match="engine must be one of auto, reference, fused, integer, count, got 'quick'"):
        accelerate(small[0], "quick")
    with pytest.raises(OptionError, match="precision must be fp32, or bf16 with the fused engine, got 'bf16' with integer"):
        accelerate(small[0], "integer", precision="bf16")


@pytest.mark.parametrize(
    "pool",
    [
        *(nn.AvgPool2d(size, divisor_override=1) for size in [(1, 1), (2, 2), (3, 2), (4, 4)]),
        nn.AvgPool2d(3, 1, 1, divisor_override=1),
        nn.AvgPool2d((3, 2), (2, 3), (1, 0), divisor_override=1),
        nn.AvgPool3d((2, 1, 3), (1, 2, 2), (1, 0, 1), divisor_override=1),
    ],
    ids=str,
)
def test_byte_sums_are_sums(pool: nn.AvgPool2d | nn.AvgPool3d) -> None:
    axes = 2 if isinstance(pool, nn.AvgPool2d) else 3
    x = torch.randint(0, 3, (2, 5, 9, 8, 7)[: axes + 2], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = x.clone()
    size, stride, padding = ([value] * axes if isinstance(value, int) else value for value in (pool.kernel_size, pool.stride, pool.padding))
    for layout in (torch.contiguous_format, torch.channels_last if axes == 2 else torch.channels_last_3d):
        found = ByteSum(size, stride, padding)(x.contiguous(memory_format=layout))
        assert found.dtype == torch.uint8
        assert torch.equal(found.double(), pool(x.double()))
    assert torch.equal(x, before)


def test_byte_sums_of_whole_maps() -> None:
    x = torch.ones(2, 5, 15, 17, dtype=torch.uint8)
    assert torch.equal(ByteSum((15, 17), (15, 17), (0, 0))(x), torch.full((2, 5, 1, 1), 255, dtype=torch.uint8))


def test_byte_max_takes_maps_of_more_than_255_places() -> None:
    x = torch.randint(0, 200, (2, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(ByteMax(nn.MaxPool2d(2))(x).float(), nn.functional.max_pool2d(x.float(), 2))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Conv2d(6, 9, (3, 2), stride=(2, 1), dilation=2, groups=3, bias=False),
        nn.Conv2d(6, 6, 5, padding=2, groups=6),
        nn.Conv2d(6, 4, 1),
        nn.Conv2d(6, 4, (4, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(6, 4, 3, padding="valid"),
        nn.Conv2d(6, 4, (5, 3), padding=(2, 1), padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", stride=2),
        nn.Conv2d(6, 4, 4, padding="same", padding_mode="replicate"),
        nn.Conv1d(6, 8, 3, padding=1, stride=2),
        nn.Conv1d(6, 6, 4, padding="same", dilation=2, groups=3),
        nn.Conv3d(6, 4, (3, 1, 2), padding=(1, 0, 1), stride=(1, 2, 1), groups=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("largest", [1, LARGEST])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_byte_convolutions_are_exact(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, largest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-127, 128, parameter.shape, generator=generator))
    axes = layer.weight.ndim - 2
    x = torch.randint(0, largest + 1, (3, 6, 10, 11, 9)[: axes + 2], generator=generator, dtype=torch.uint8)
    expected = copy.deepcopy(layer).double()(x.double())
    for layout in [torch.contiguous_format, *([torch.channels_last] if axes == 2 else [])]:
        found = ByteConv(layer)(x.contiguous(memory_format=layout))
        assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_byte_linear_layers_are_exact(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(300, 7, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-127, 128, parameter.shape, generator=generator))
    x = torch.randint(0, LARGEST + 1, (5, 300), generator=generator, dtype=torch.uint8)
    assert torch.equal(ByteLinear(layer)(x).double(), copy.deepcopy(layer).double()(x.double()))


class Many(nn.Module):
    """A layer that reads sums of 16 steps of spikes, or of 200."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 40), nn.Linear(40, 30), nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.parametrize("steps", [16, 200])
def test_sums_that_could_saturate_stay_in_floating_point(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickspike.engines.integer.largest_pair", lambda: 2**15 - 1)
    torch.manual_seed(0)
    images = torch.randn(50, 6)
    whole = quantise(qs.convert(Many(), images, steps=steps, synchronous=True)).network
    fast = accelerate(whole, "count")
    reason = "sums of its bytes could saturate on this processor, which has no VNNI"
    assert [one for one in fast.provenance["engine"]["in floating point"] if reason in one] == (
        [] if steps == 16 else [f"b: {reason}", f"c: {reason}"]
    )
    with torch.no_grad():
        one, other = simulate(accelerate(whole, "reference"), images), simulate(fast, images)
    assert all(torch.equal(counts, other.spikes[site]) for site, counts in one.spikes.items())


@pytest.mark.parametrize("engine", ["reference", "fused", "integer", "auto"])
def test_an_evaluation_names_its_engine(engine: Any, small: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = small
    data = [(images, torch.arange(6) % 10)]
    report = qs.evaluate(snn, data, steps=(1, 4), engine=engine, bits=5)
    made = report.settings["engine"]
    assert made["name"] == ("fused" if engine == "auto" else engine)
    wanted = qs.evaluate(quantise(snn, 5).network if engine == "integer" else snn, data, steps=(1, 4))
    assert (report.accuracy, report.rates) == (wanted.accuracy, wanted.rates)
    assert wanted.settings["engine"] is None


def test_an_evaluation_counts_every_window_on_its_own(small: tuple[SpikingNetwork, Tensor]) -> None:
    snn, images = small
    data = [(images, torch.arange(6) % 10)]
    waiting = snn.as_synchronous()
    report = qs.evaluate(waiting, data, steps=(1, 2, 4), engine="count")
    wanted = qs.evaluate(quantise(waiting).network, data, steps=(1, 2, 4))
    assert report.accuracy == wanted.accuracy
    assert report.latency == wanted.latency


def test_without_onednn_the_integer_engines_are_refused(small: tuple[SpikingNetwork, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickspike.engines.available", lambda: False)
    with pytest.raises(OptionError, match="the integer engine needs a build of torch with oneDNN"):
        accelerate(small[0], "integer")
    whole = quantise(small[0]).network
    assert accelerate(whole).provenance["engine"]["name"] == "fused"


@pytest.mark.parametrize("engine", ["fused", "integer"])
def test_an_accelerated_network_is_neither_accelerated_again_nor_tuned(engine: Any, small: tuple[SpikingNetwork, Tensor]) -> None:
    fast = accelerate(small[0], engine)
    with pytest.raises(OptionError, match=f"made for the {engine} engine; accelerate the one it was made from"):
        accelerate(fast)
    with pytest.raises(ConversionError, match=f"made for the {engine} engine cannot learn; tune the one it was made from"):
        tune(fast, None)  # refused before the trainer is looked at


@pytest.mark.parametrize("name", ["fused", "fused bf16", "integer", "count"])
def test_calls_hold_nothing_and_prepare_nothing_again(
    name: str, small: tuple[SpikingNetwork, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a call as many tensors live as before, nothing is compiled and no weights are laid out anew.

    Within a call memory is taken and freed: layers give new tensors, as everywhere in torch.
    """
    snn, images = small
    engine, precision = cast("tuple[Engine, Precision]", (*name.split(), "fp32")[:2])
    network = accelerate(quantise(snn).network.as_synchronous() if name == "count" else snn, engine, precision)

    def held() -> tuple[int, ...]:
        gc.collect()
        return len(loops.forward.signatures), len(loops.count.signatures), sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    with torch.inference_mode():
        network(images)
        first = network(images)
        for operator in ("qconv_prepack", "qlinear_prepack"):
            monkeypatch.setattr(torch.ops.onednn, operator, None)
        before = held()
        for _ in range(3):
            assert torch.equal(network(images), first)
        assert held() == before
