"""Threshold balancing: checks B1 to B4 of its specification, and the streaming histogram under it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracles
import quickspike as qs
from quickspike.activations import CeilingProbe, StreamingHistogram
from quickspike.api import fit
from quickspike.data import DataSet, ImageStream
from quickspike.errors import DataError
from quickspike.evaluation import make_fabric
from quickspike.graph import Site
from quickspike.methods.threshold_balancing import ThresholdBalancing
from quickspike.neuron import Neuron
from quickspike.training import Trainer, Training

F64 = torch.float64
SHAPES = pytest.mark.parametrize("shape", ["uniform", "normal", "exponential", "heavy", "sparse", "quantised"])


def sample(shape: str, number: int = 20_000, seed: int = 0) -> np.ndarray:
    """Pre-activations of one channel."""
    generator = np.random.default_rng(seed)
    if shape == "uniform":
        return generator.uniform(-0.5, 1, number)
    if shape == "normal":
        return generator.normal(0, 3, number)
    if shape == "exponential":
        return generator.exponential(0.1, number)
    if shape == "heavy":
        return generator.standard_t(3, number)
    if shape == "sparse":
        return np.where(generator.random(number) < 0.9, -1.0, generator.gamma(2, 1, number))
    return generator.integers(-4, 17, number) / 4


def histogram(values: np.ndarray, *, splits: int = 1, bins: int = 2048) -> StreamingHistogram:
    made = StreamingHistogram(1, bins)
    for part in np.array_split(values, splits):
        made.update(torch.from_numpy(part)[None])
    return made


# The histogram


@SHAPES
@pytest.mark.parametrize("percent", [1e-9, 10, 50, 90, 99, 99.9, 100])
def test_percentiles_are_within_one_bin(shape: str, percent: float) -> None:
    for number in (1, 2, 1000, 20_000):
        values = sample(shape, number)
        got = float(histogram(values).percentile(percent))
        exact = max(oracles.percentile(values, percent), 0.0)
        assert -1e-12 <= got - exact <= 2 / 2048 * max(values.max(), 0) + 1e-12
        assert got <= max(values.max(), 0)


@SHAPES
def test_the_hundredth_percentile_is_the_exact_maximum(shape: str) -> None:
    values = sample(shape)
    assert float(histogram(values, splits=7).percentile(100)) == values.max()


@SHAPES
@pytest.mark.parametrize("order", ["as it comes", "rising", "falling"])
def test_any_cut_into_batches_gives_the_same_histogram(shape: str, order: str) -> None:
    values = sample(shape, 3000)
    if order != "as it comes":
        values = np.sort(values)[:: 1 if order == "rising" else -1].copy()
    whole = histogram(values)
    for splits in (2, 5, 100, 3000):
        cut = histogram(values, splits=splits)
        for field in ("counts", "total", "limit", "maximum"):
            assert torch.equal(getattr(whole, field), getattr(cut, field)), (field, splits)


def test_channels_do_not_mix() -> None:
    rows = np.stack([sample("normal", 500), sample("exponential", 500) * 1e-6, -np.ones(500), sample("heavy", 500) * 1e6])
    together = StreamingHistogram(4)
    for part in np.array_split(rows, 9, axis=1):
        together.update(torch.from_numpy(part))
    for channel, row in enumerate(rows):
        alone = histogram(row)
        for field in ("counts", "total", "limit", "maximum"):
            assert torch.equal(getattr(together, field)[channel], getattr(alone, field)[0])
        for percent in (50, 99, 100):
            assert torch.equal(together.percentile(percent)[channel], alone.percentile(percent)[0])
        assert torch.equal(together.squared_error_ceiling(4, 0.5)[channel], alone.squared_error_ceiling(4, 0.5)[0])


def test_memory_does_not_grow() -> None:
    made = StreamingHistogram(3, 64)

    def size() -> int:
        return sum(value.numel() * value.element_size() for value in vars(made).values() if isinstance(value, Tensor))

    before = size()
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-20, 20):
        made.update(torch.rand(3, 100, generator=generator) * 2.0**exponent)
    assert size() == before
    assert made.bins == 64
    assert made.total.tolist() == [4000] * 3
    assert made.counts.sum(1).tolist() == [4000] * 3


@pytest.mark.parametrize("power", [-30, -3, 0, 5, 40])
def test_values_on_a_power_of_two_find_their_bin(power: int) -> None:
    edge = 2.0**power
    values = np.array([edge, np.nextafter(edge, 0), edge / 2, edge * 0.75])
    for splits in (1, 4):
        made = histogram(values, splits=splits)
        assert float(made.maximum) == edge < float(made.limit) <= 2 * edge
        assert int(made.counts.sum()) == 4
        assert float(made.percentile(25)) == pytest.approx(edge / 2, abs=2 / 2048 * edge)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    values = torch.from_numpy(sample("normal", 500)).to(dtype)[None]
    made = StreamingHistogram(1)
    made.update(values)
    exact = StreamingHistogram(1)
    exact.update(values.double())
    assert torch.equal(made.counts, exact.counts)


def test_zeros_and_negative_values_count_but_fill_no_bin() -> None:
    made = histogram(np.array([-3.0, -0.0, 0.0, 0.0, 1.0]))
    assert made.total.tolist() == [5]
    assert int(made.counts.sum()) == 1
    assert float(made.percentile(80)) == 0
    assert float(made.percentile(81)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", [0, 1])
def test_nan_and_infinity_are_refused(position: int, bad: float) -> None:
    made = histogram(np.array([1.0, 2.0]))
    values = torch.ones(1, 5)
    values[0, 3 * position] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        made.update(values)
    assert made.total.tolist() == [2]


def test_nan_inside_a_network_is_refused(random_network: Callable[..., nn.Module], random_images: Callable[..., Tensor]) -> None:
    network = random_network("chain")
    with torch.no_grad():
        network.conv2.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises((DataError, qs.QuickspikeError), match=r"NaN|nan"):
        qs.convert(network, random_images("chain", 4))


# Ceilings


@SHAPES
@pytest.mark.parametrize("steps", [1, 4, 16, 64])
@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_squared_error_ceiling_is_near_the_best(shape: str, steps: int, initial: float) -> None:
    # With few values the best ceiling fits their noise: it undercuts any smooth choice by some percent where v0 = 0.
    values = sample(shape)
    theta = float(histogram(values).squared_error_ceiling(steps, initial))
    least = oracles.least_squared_error(values, steps, initial, candidates=400)
    floor = (values.max() / 2048) ** 2
    assert oracles.squared_error(values, theta, steps, initial) <= 1.01 * least + floor


def test_squared_error_ceiling_rises_with_steps() -> None:
    made = histogram(sample("exponential"))
    ceilings = [float(made.squared_error_ceiling(steps, 0.5)) for steps in (1, 2, 4, 8, 16, 32, 64)]
    assert ceilings == sorted(ceilings)
    assert ceilings[-1] <= float(made.maximum)


@SHAPES
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_b3_balanced_ceiling_follows_the_papers_update(shape: str, rate: float) -> None:
    values = sample(shape, 5000)
    made = histogram(values)
    course = oracles.balanced_ceilings(np.maximum(values, 0), 200, rate)
    got = [float(made.balanced_ceiling(updates, rate)) for updates in (1, 2, 5, 20, 200)]
    assert got == sorted(got)
    for updates, theta in zip((1, 2, 5, 20, 200), got, strict=True):
        assert theta == pytest.approx(min(course[updates - 1], values.max()), abs=4 / 2048 * values.max())


@SHAPES
def test_b3_the_update_is_the_gradient_of_the_clipping_error(shape: str) -> None:
    values = sample(shape, 5000)
    made, rate = histogram(values), 0.25
    before = float(made.balanced_ceiling(3, rate))
    theta = torch.tensor(before, dtype=F64, requires_grad=True)
    torch.from_numpy(values).sub(theta).clamp_min(0).square().mean().backward()
    after = float(made.balanced_ceiling(4, rate))
    assert after - before == pytest.approx(-rate * float(theta.grad), abs=4 / 2048 * values.max())


def test_an_overshooting_update_stops_at_the_largest_activation() -> None:
    made = histogram(np.full(50, 1.7))
    assert float(made.balanced_ceiling(1, 1.0)) == pytest.approx(1.7, abs=2e-3)
    assert float(made.balanced_ceiling(1, 0.5)) == pytest.approx(1.7, abs=2e-3)
    assert float(made.balanced_ceiling(1, 0.25)) == pytest.approx(0.85, abs=2e-3)


def test_more_updates_come_closer_to_the_maximum() -> None:
    made = histogram(sample("uniform"))
    assert float(made.balanced_ceiling(1000, 1.0)) == pytest.approx(float(made.maximum), rel=5e-3)


# The method


class WithPool(nn.Sequential):
    """Max-pooling directly behind an activation."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
        self.append(nn.Linear(16, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        self.double().eval()


def test_b1_pooling_stands_in_front_of_the_neuron(random_images: Callable[..., Tensor]) -> None:
    z = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pool = nn.MaxPool2d(2)
    assert torch.equal(pool(z).relu(), pool(z.relu()))
    source, images = WithPool(), random_images("chain", 10)
    snn = qs.convert(source, images, "threshold_balancing", steps=8)
    assert snn.sites[0].shape == (4, 4, 4)
    order = [type(snn.network.get_submodule(str(node.target))) for node in snn.network.graph.nodes if node.op == "call_module"]
    assert order.index(nn.MaxPool2d) < order.index(Neuron)


@pytest.mark.parametrize("ceiling", ["balanced", "squared_error", "percentile"])
def test_b2_silent_channels_never_fire(ceiling: str, random_images: Callable[..., Tensor]) -> None:
    source, images = WithPool(), random_images("chain", 20)
    with torch.no_grad():
        source[0].weight[1].zero_()
        source[0].bias[1] = -0.5
        source[3].weight[2].zero_()
        source[3].bias[2] = 0.0
    snn = qs.convert(source, images, "threshold_balancing", steps=8, ceiling=ceiling)
    with torch.no_grad():
        run = snn.run(images)
    assert torch.isfinite(run.logits).all()
    for site, channel in (("1", 1), ("4", 2)):
        assert snn.neuron(site).threshold.min() > 0
        assert not run.spikes[site][:, channel].any()
        assert run.spikes[site].any()


def test_a_network_that_is_silent_everywhere_still_converts(random_images: Callable[..., Tensor]) -> None:
    source, images = WithPool(), random_images("chain", 4)
    with torch.no_grad():
        source[0].weight.zero_()
        source[0].bias.fill_(-1.0)
    for ceiling in ("balanced", "squared_error", "percentile"):
        snn = qs.convert(source, images, "threshold_balancing", steps=4, ceiling=ceiling)
        with torch.no_grad():
            run = snn.run(images)
        assert torch.isfinite(run.logits).all()
        assert run.rates["1"] == 0


@pytest.mark.parametrize("ceiling", ["balanced", "squared_error", "percentile"])
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_thresholds_are_those_of_the_activations(granularity: str, ceiling: str, random_images: Callable[..., Tensor]) -> None:
    source, images = WithPool(), random_images("chain", 20)
    options = {"ceiling": ceiling, "granularity": granularity, "percentile": 95.0, "updates": 7, "rate": 0.5, "initial": 0.25}
    snn = qs.convert(source, images.split(7), ThresholdBalancing(steps=4, **options))
    with torch.no_grad():
        # The neuron stands behind the pool, so the pooled activations are the ones that count.
        values = nn.Sequential(*list(source)[:3])(images).transpose(0, 1).flatten(1)
    expected = []
    for row in values if granularity == "channel" else values.reshape(1, -1):
        made = histogram(row.numpy())
        choices = {
            "balanced": lambda made=made: made.balanced_ceiling(7, 0.5),
            "squared_error": lambda made=made: made.squared_error_ceiling(4, 0.25),
            "percentile": lambda made=made: made.percentile(95.0),
        }
        expected.append(float(choices[ceiling]()))
    unit = snn.neuron("1")
    assert unit.threshold.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert unit.threshold.shape == ((4, 1, 1) if granularity == "channel" else ())
    assert (float(unit.initial), float(unit.leak), float(unit.amplitude), unit.scaled, unit.strict) == (0.25, 1, 1, True, False)


def test_b4_the_readout_is_the_mean_over_all_steps(random_images: Callable[..., Tensor]) -> None:
    images = random_images("chain", 6)
    snn = qs.convert(WithPool(), images, "threshold_balancing", steps=7)
    with torch.no_grad():
        outputs, logits = snn.outputs(images), snn.run(images).logits
    assert outputs.shape == logits.shape == (7, 6, 3)
    for t in range(1, 8):
        assert torch.allclose(logits[t - 1], sum(outputs[:t]) / t, rtol=0, atol=1e-12)


def test_scale_multiplies_every_threshold(digits_source, digits):
    images = digits.loader("train", limit=100)
    whole, scaled = (qs.convert(digits_source, images, "threshold_balancing", steps=4, scale=scale) for scale in (1.0, 0.5))
    for site in whole.sites:
        torch.testing.assert_close(scaled.neuron(site.name).threshold, 0.5 * whole.neuron(site.name).threshold)


# With a training


def test_a_probe_watches_a_calibration_and_no_training() -> None:
    probe = CeilingProbe(Site("relu", "relu", None, (3,)), "channel").train()
    x = torch.arange(6.0).view(2, 3)
    probe(x)
    assert int(probe.histogram.total.sum()) == 0
    with torch.no_grad():
        probe(x)
        assert probe.histogram.total.tolist() == [2, 2, 2]
        assert probe.histogram.maximum.tolist() == [3, 4, 5]
        probe.eval()(x)
    assert probe.histogram.total.tolist() == [2, 2, 2]
    probe.forget()
    assert probe.histogram.total.tolist() == [0, 0, 0]
    assert probe.histogram.bins == 2048


def test_after_a_training_the_trained_network_alone_is_calibrated(digits_source: nn.Module, digits: DataSet) -> None:
    """What early weights gave would stand in the histograms for good."""
    images = ImageStream(digits.loader("train", limit=200))
    settings = Training(epochs=1, batch_size=128, learning_rate=0.05, weight_decay=0.01)
    trainer = Trainer(fabric=make_fabric("cpu"), data=digits, settings=settings)
    ann = fit(digits_source, images, ThresholdBalancing(steps=4), trainer)
    peaks: dict[int, Tensor] = {}
    for site in ann.sites:
        probe = ann.at(site)
        probe.register_forward_hook(
            lambda probe, _, out: peaks.update(
                {id(probe): out.transpose(0, 1).flatten(1).amax(1).maximum(peaks.get(id(probe), out.new_zeros(1)))}
            )
        )
    totals = {site.name: ann.at(site).histogram.total.clone() for site in ann.sites}
    with torch.no_grad():
        for batch in images:
            ann.module(batch)
    for site in ann.sites:
        histogram = ann.at(site).histogram
        assert torch.equal(histogram.total, totals[site.name])
        places = 1
        for size in site.shape[1:]:
            places *= size
        assert set(histogram.total.tolist()) == {200 * places}
        # Batch norm is folded by now, which rounds.
        torch.testing.assert_close(histogram.maximum.float(), peaks[id(ann.at(site))], rtol=1e-4, atol=1e-5)


def test_ceilings_may_be_fitted_for_fewer_steps_than_are_run() -> None:
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), torch.randn(300, 5)
    few, many, both = (qs.convert(net, images, ThresholdBalancing(steps=T, fit_steps=F)) for T, F in ((4, 0), (64, 0), (64, 4)))
    for site in few.sites:
        assert torch.equal(both.neuron(site.name).threshold, few.neuron(site.name).threshold)
        assert not torch.equal(both.neuron(site.name).threshold, many.neuron(site.name).threshold)
    assert both.steps == 64


def test_more_values_than_fit_into_half_a_word_are_counted() -> None:
    made = StreamingHistogram(1, 8)
    values = torch.full((1, 3), 0.75)
    made.update(values)
    made.counts[0, 6] = 2**31 - 5
    made.total[0] = 2**31 - 5
    made.update(torch.full((1, 10), 0.75))
    assert int(made.counts[0].max()) == int(made.total[0]) == 2**31 + 5


def test_pieces_of_another_activation_take_little_memory() -> None:
    """A network of SiLU has a thousand sites; with whole words and all bins they took 8 GB."""
    probes = {
        kind: fit(nn.Sequential(nn.Linear(4, 8), kind(), nn.Linear(8, 2)).eval(), ImageStream(torch.rand(8, 4)), ThresholdBalancing())
        for kind in (nn.ReLU, nn.SiLU)
    }
    bytes_of = {}
    for kind, found in probes.items():
        bytes_of[kind] = [probe.histogram.counts.nbytes for probe in found.module.modules() if isinstance(probe, CeilingProbe)]
    assert bytes_of[nn.ReLU] == [8 * 2048 * 4]
    assert len(bytes_of[nn.SiLU]) > 4
    assert max(bytes_of[nn.SiLU]) == bytes_of[nn.ReLU][0] / 8
