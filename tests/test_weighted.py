"""Spikes weighted by their step: T of them say what 2^T - 1 plain ones do, to the layers that wait for them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quickspike as qs
from conversions import NAMES, REFUSED, Converted, Images, Networks, conversions
from quickspike.anatomy import anatomy_of
from quickspike.api import finish, fit, tune
from quickspike.choosing import Auto
from quickspike.data import DataSet, ImageStream
from quickspike.energy import energy_of
from quickspike.engines import accelerate
from quickspike.errors import ConversionError, OptionError
from quickspike.evaluation import make_fabric
from quickspike.lockstep import Lockstep
from quickspike.method import all_methods, create
from quickspike.methods.qcfs import QCFS, quantise
from quickspike.neuron import MOST_WEIGHTED, Neuron, NeuronParameters, weighted_spikes
from quickspike.operations import count_operations
from quickspike.searching import Candidate, search
from quickspike.simulation import simulate
from quickspike.training import Trainer, Training

F64 = torch.float64
METHODS = sorted(all_methods())

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def converted(random_network: Networks, random_images: Images) -> Converted:
    return conversions(random_network, random_images, steps=3, weighted=True)


def unit(theta: float = 1.0, steps: int = 4, *, constant: bool = True, **options: Any) -> Neuron:
    return Neuron(NeuronParameters(torch.tensor(theta, dtype=F64), weighted=True, **options), steps, constant)


# The neuron


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    steps=st.integers(1, MOST_WEIGHTED),
    grid=st.integers(1, 40),
    half=st.integers(0, 2),
    strict=st.booleans(),
    drawn=st.lists(st.integers(-(2**13), 2**14), min_size=1, max_size=50),
)
def test_spikes_are_the_digits_of_the_level(steps: int, grid: int, half: int, strict: bool, drawn: list[int]) -> None:
    """In whole numbers: a level is `2 grid`, and the spikes are the binary digits of how many levels fit."""
    levels = 2**steps - 1
    currents = np.array(drawn)
    neuron = unit(2.0 * grid * levels, steps, initial=half / 2, strict=strict)
    out = neuron(torch.from_numpy(currents).double()).unflatten(0, (steps, -1))
    places, rest = np.divmod(currents + half * grid, 2 * grid)
    reached = np.clip(places - (rest == 0) if strict else places, 0, levels)
    digits = (reached >> np.arange(steps - 1, -1, -1)[:, None]) & 1
    assert (out.ne(0).numpy() == digits).all()
    expected = digits * (2.0 ** np.arange(steps - 1, -1, -1))[:, None] * steps * 2 * grid
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-14)
    np.testing.assert_allclose(neuron.mean_output(torch.from_numpy(currents).double()).numpy(), 2 * grid * reached, rtol=1e-14)


def test_one_step_has_no_weights() -> None:
    z = torch.linspace(-1, 2, 40, dtype=F64)
    plain = Neuron(NeuronParameters(torch.tensor(0.7, dtype=F64), initial=0.5, averaged=True), 1, True)
    assert torch.equal(unit(0.7, 1, initial=0.5)(z), plain(z))


def test_the_mean_of_the_window_is_what_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    currents = torch.randint(-20, 40, (4, 30), generator=generator).double() / 16
    waiting = unit(1.5, 4, constant=False, averaged=True, initial=0.5)
    assert torch.equal(waiting(currents.flatten()), unit(1.5, 4, initial=0.5)(currents.mean(0)))


@pytest.mark.parametrize(("steps", "levels"), [(1, 1), (2, 3), (4, 15)])
def test_gradients_are_those_of_the_staircase_in_training(steps: int, levels: int) -> None:
    z = torch.linspace(-0.7, 2.1, 57, dtype=F64)
    outside = torch.linspace(1, 2, 57, dtype=F64)
    found, wanted = [], []
    for made, spiking in ((found, True), (wanted, False)):
        current, theta = z.clone().requires_grad_(), torch.tensor(1.3, dtype=F64, requires_grad=True)
        if spiking:
            out = weighted_spikes(current, 0.5 * theta.detach(), theta, 1.0 * theta, steps).unflatten(0, (steps, -1)).mean(0)
        else:
            out = quantise(current, theta, levels)
        (out * outside).sum().backward()
        made += [out.detach(), current.grad, theta.grad]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert float(found[1].abs().sum()) > 0


def test_gradients_to_start_and_height() -> None:
    z = torch.tensor([0.4], dtype=F64)
    v, height = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (0.5, 2.0))
    out = weighted_spikes(z, v, torch.tensor(1.0, dtype=F64), height, 3).mean()
    out.backward()
    # 0.4 * 7 + 0.5 is 3.3: three of seven levels.
    assert float(out.detach()) == pytest.approx(2 * 3 / 7)
    assert [float(one.grad) for one in (height, v) if one.grad is not None] == pytest.approx([3 / 7, 2 / 7])


@pytest.mark.parametrize(
    "options",
    [{"signed": True}, {"to_zero": True}, {"leak": 0.9}, {"leak": torch.tensor([1.0, 0.5])}],
    ids=["signed", "zero", "leak", "leaks"],
)
def test_neurons_that_weigh_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match="reset by subtraction, no signs and no leak"):
        NeuronParameters(torch.tensor(1.0), weighted=True, **options)


def test_streaming_neurons_and_too_many_steps_are_refused() -> None:
    with pytest.raises(ConversionError, match="neurons that stream have none"):
        unit(constant=False)
    with pytest.raises(ConversionError, match=f"at most {MOST_WEIGHTED} steps, got {MOST_WEIGHTED + 1}"):
        unit(steps=MOST_WEIGHTED + 1)
    assert unit(steps=MOST_WEIGHTED).resolution == 2**MOST_WEIGHTED - 1


def test_half_precision_is_compared_in_that_of_the_threshold() -> None:
    z = torch.linspace(-0.5, 1.5, 201)
    neuron = Neuron(NeuronParameters(torch.tensor(1.0), weighted=True, initial=0.5), 4, True)
    rounded = z.to(torch.bfloat16)
    out = neuron(rounded)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.ne(0), neuron(rounded.float()).ne(0))


# The network


@every_method
@pytest.mark.parametrize("name", NAMES)
def test_t_weighted_steps_are_two_to_the_t_less_one_plain_ones(method: str, name: str, converted: Converted, random_images: Images) -> None:
    snn, images = converted(method, name), random_images(name, 8, seed=2)
    plain = snn.rate_coded()
    assert (plain.steps, plain.weighted, plain.synchronous, snn.weighted) == (7, False, True, True)
    with torch.no_grad():
        given, wanted = snn(images), plain(images)
    assert float((given - wanted).abs().max()) <= 1e-9 * float(wanted.abs().max())
    run, other = snn.run(images), plain.run(images)
    for site, spikes in run.spikes.items():
        assert torch.equal(spikes, sum((other.spikes[site] >> place) & 1 for place in range(3))), site
    assert sum(int(spikes.sum()) for spikes in run.spikes.values()) < sum(int(spikes.sum()) for spikes in other.spikes.values())
    # Depth x T, of which T is the smaller.
    assert snn.latency * 7 == plain.latency * 3


@every_method
def test_ceilings_are_fitted_for_the_levels(method: str, random_network: Networks, random_images: Images) -> None:
    network, images = random_network("chain"), random_images("chain", 16, seed=1)
    weighted, plain = (
        qs.convert(network, images, method, **options) for options in ({"steps": 3, "weighted": True}, {"steps": 7, "synchronous": True})
    )
    if method == "diet_snn":  # whose thresholds come from a simulation without weights, and depend on no T
        assert all(float(neuron.threshold) > 0 for neuron in weighted.neurons().values())
    for name, neuron in weighted.neurons().items():
        assert torch.equal(neuron.threshold, plain.neuron(name).threshold), name


@pytest.mark.parametrize("name", NAMES)
def test_a_network_with_as_many_levels_is_the_source(name: str, random_network: Networks, random_images: Images) -> None:
    stream, method = ImageStream(random_images(name, 32, seed=7)), QCFS(steps=2, levels=3, weighted=True)
    ann = fit(random_network(name), stream, method)
    snn, images = finish(ann, stream, method), random_images(name, 32, seed=8)
    with torch.no_grad():
        wanted, found = ann.module(images), snn(images)
        fewer = finish(ann, stream, QCFS(steps=2, levels=3, synchronous=True))(images)
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= 1e-4 * scale
    assert float((fewer - wanted).abs().max()) > 1e-2 * scale, "without weights they have to differ, or this shows nothing"


def test_more_steps_come_closer_by_powers_of_two(random_network: Networks, random_images: Images) -> None:
    network, images = random_network("residual"), random_images("residual", 16)
    errors = []
    with torch.no_grad():
        for steps in (2, 4, 6, 8):
            snn = qs.convert(network, images, "threshold_balancing", ceiling="percentile", percentile=100, steps=steps, weighted=True)
            errors.append(float((snn(images) - network(images)).square().mean().sqrt()))
    # Two steps are four times as many levels.
    assert all(3 < before / after < 7 for before, after in itertools.pairwise(errors)), errors


def test_a_network_can_be_made_weighted(converted: Converted, random_images: Images) -> None:
    images = random_images("chain", 8, seed=3)
    streaming = converted(weighted=False)
    made = streaming.as_weighted()
    assert (streaming.weighted, streaming.synchronous) == (False, False)
    assert (made.weighted, made.synchronous, made.resolution, made.latency) == (True, True, 7, 9)
    with torch.no_grad():
        torch.testing.assert_close(made(images), streaming.as_synchronous().with_steps(7)(images), rtol=1e-9, atol=1e-9)
    assert made.as_synchronous().weighted
    assert streaming.rate_coded().steps == streaming.steps


@pytest.mark.parametrize("engine", ["fused", "integer", "count"])
def test_accelerated_networks_stay_as_they_are(engine: Any, random_network: Networks, random_images: Images) -> None:
    images = random_images("chain", 8).float()
    plain = qs.convert(random_network("chain").float(), images, "potential_init", steps=3, synchronous=engine == "count")
    with pytest.raises(OptionError, match=f"made for the {engine} engine"):
        accelerate(plain, engine).as_weighted()


def test_first_neurons_that_encode_pixels_wait_for_nothing(random_network: Networks, random_images: Images) -> None:
    images = torch.sigmoid(random_images("chain", 16, seed=1))
    snn = qs.convert(random_network("chain"), images, "rate_encoded", steps=3, encode_input=True, weighted=True)
    assert [(neuron.averaged, neuron.weighted) for neuron in snn.neurons().values()] == [(False, True), *[(True, True)] * 3]
    with torch.no_grad():
        torch.testing.assert_close(snn(images), snn.rate_coded()(images), rtol=1e-9, atol=1e-9)


def test_files_keep_the_weights(converted: Converted, random_images: Images, tmp_path: Path) -> None:
    snn, images = converted(name="residual"), random_images("residual", 4)
    snn.save(tmp_path / "network.safetensors")
    # No version that does not know of them may take them for neurons without weights.
    assert b'"type": "WeightedNeuron"' in (tmp_path / "network.safetensors").read_bytes().replace(b"\\", b"")
    loaded = qs.load(tmp_path / "network.safetensors")
    assert loaded.weighted
    assert qs.methods.PotentialInit.from_json(loaded.method) == create("potential_init", steps=3, weighted=True)
    with torch.no_grad():
        assert torch.equal(loaded(images), snn(images))


@pytest.mark.parametrize(
    "refinement",
    [qs.refinements.BiasCorrection(), qs.refinements.PotentialCorrection(granularity="channel"), None],
    ids=["bias", "potential", "weights"],
)
def test_refinements_bring_it_closer(refinement: Any, random_network: Networks, random_images: Images) -> None:
    network, images = random_network("chain", seed=3), random_images("chain", 64, seed=4)
    refinement = refinement or qs.refinements.WeightCalibration(reach="network", iterations=40, learning_rate=1e-3)
    method = create("threshold_balancing", steps=2, weighted=True)
    plain, refined = (qs.convert(network, images, one) for one in (method, method | refinement))
    with torch.no_grad():
        wanted = network(images)
        before, after = (float((snn(images) - wanted).square().mean()) for snn in (plain, refined))
    assert after < 0.9 * before


def test_means_over_windows_are_those_of_the_steps(converted: Converted, random_network: Networks, random_images: Images) -> None:
    """What refinements look at instead of steps."""
    stream, method = ImageStream(random_images("residual", 16)), create("potential_init", steps=3, weighted=True)
    ann = fit(random_network("residual"), stream, method)
    snn, images = finish(ann, stream, method), random_images("residual", 8, seed=9)
    both = Lockstep(snn, ann, lambda values: values, lambda _, __, current, ___: current)
    assert both.windows
    _, found = both.run(images)
    with torch.no_grad():
        torch.testing.assert_close(found, snn(images), rtol=1e-9, atol=1e-9)


def test_tuning_learns_weights_and_thresholds(digits_source: nn.Module, digits_calibration: Tensor, digits: DataSet) -> None:
    snn = qs.convert(digits_source, digits_calibration, "potential_init", steps=2, weighted=True)
    settings = Training(epochs=1, learning_rate=1e-3, optimiser="adam", weight_decay=0.0)
    tuned = tune(snn, Trainer(fabric=make_fabric("cpu"), data=digits, settings=settings))
    assert tuned.weighted
    moved = [not torch.equal(tuned.neuron(name).threshold, neuron.threshold) for name, neuron in snn.neurons().items()]
    assert all(moved)
    assert all(float(neuron.leak) == 1 for neuron in tuned.neurons().values())


# Beside the network


@pytest.mark.parametrize("name", ["chain", "residual", "pooled"])
def test_the_count_engine_counts_levels(name: str, random_network: Networks, random_images: Images) -> None:
    network, images = random_network(name).float(), random_images(name, 8, seed=5).float()
    snn = qs.convert(network, images, "potential_init", steps=4, weighted=True)
    fast, plain = accelerate(snn, "count"), accelerate(snn.rate_coded(), "count")
    with torch.no_grad():
        assert torch.equal(fast(images), plain(images))
        assert float((fast(images) - snn(images)).abs().max()) < 0.1 * float(snn(images).abs().max())
    assert (fast.steps, fast.latency, fast.weighted) == (4, snn.latency, True)
    report = qs.evaluate(snn, [(images, torch.zeros(8, dtype=torch.long))], steps=(2, 4), device="cpu", engine="count")
    assert report.latency == {2: snn.latency // 2, 4: snn.latency}
    with pytest.raises(OptionError, match="9 steps, which are 511 levels"):
        accelerate(snn.with_steps(9), "count")
    assert accelerate(snn).provenance["engine"]["name"] == "fused"
    with torch.no_grad():
        assert torch.equal(accelerate(snn)(images), accelerate(snn, "reference")(images))


def test_operations_count_each_spike_once(converted: Converted, random_images: Images) -> None:
    snn, images = converted(name="residual"), random_images("residual", 8, seed=6)
    found, plain = count_operations(snn, [images]), count_operations(snn.rate_coded(), [images])
    spikes = sum(float(counts.sum()) for counts in snn.run(images).spikes.values()) / len(images)
    assert found.total("spikes") == pytest.approx(spikes)
    assert found.total("updates") * 7 == plain.total("updates") * 3
    assert 0 < found.total("accumulates") < plain.total("accumulates")
    assert found.total("multiplies") == plain.total("multiplies")
    told, silent = ([note for note in energy_of(one).caveats if "shifts" in note] for one in (found, plain))
    assert (len(told), silent) == (1, [])
    assert found.to_json()["weighted"]
    assert "weighted" not in plain.to_json()


def test_the_anatomy_finds_no_unevenness(converted: Converted, random_network: Networks, random_images: Images) -> None:
    images = random_images("residual", 16, seed=1)
    for site in anatomy_of(converted(name="residual"), [images]).sites:
        assert sum(site.shares.values()) == pytest.approx(1)
        assert site.sizes["unevenness"] < 1e-9
        assert site.sizes["neuron"] < 1e-9
        assert site.sizes["quantisation"] > 1e-3


def test_the_anatomy_knows_who_fires_above_a_threshold_only(dyadic_network: Networks, dyadic_images: Images) -> None:
    """Thresholds that currents often meet: taken as reached, they would be called a fault of the neurons."""
    images = dyadic_images("chain", 16)
    snn = qs.convert(dyadic_network("chain"), images, "ultra_low_latency", steps=3, weighted=True)
    for neuron in snn.neurons().values():
        assert neuron.strict
        for tensor, value in ((neuron.threshold, 7 / 8), (neuron.initial, 0.0), (neuron.amplitude, 1.0)):
            tensor.data.fill_(value)
    assert [site.sizes["neuron"] for site in anatomy_of(snn, [images]).sites] == [0.0] * len(snn.sites)
    loose = copy.deepcopy(snn)
    for neuron in loose.neurons().values():
        neuron.strict = False
    with torch.no_grad():
        assert not torch.equal(loose(images), snn(images)), "nothing meets a threshold, so that this shows nothing"


def test_a_search_tries_no_more_steps_than_there_are(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    data = [(digits_calibration[:50], digits_source(digits_calibration[:50]).argmax(1))]
    tried = search(digits_source, digits_calibration, data, [Candidate("rate_norm", {"weighted": True})], max_drop=0.0, device="cpu")
    assert max(trial.steps for trial in tried.trials) <= MOST_WEIGHTED
    found = search(digits_source, digits_calibration, data, [Candidate("potential_init", {"weighted": True})], max_drop=2.0, device="cpu")
    assert found.best is not None
    assert found.network is not None
    assert found.network.weighted
    assert found.best.steps <= 4


def test_auto_takes_weighted_spikes_where_they_are_allowed(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    snn = qs.convert(digits_source, digits_calibration[:60], "auto", steps=2, weighted=True)
    assert snn.weighted
    assert any("weighted" in attempt["what"] for attempt in snn.provenance["chosen"]["attempts"])


def test_auto_refuses_too_many_steps_before_it_tries_anything() -> None:
    with pytest.raises(OptionError, match=f"auto: weighted spikes have at most {MOST_WEIGHTED} steps"):
        Auto(steps=MOST_WEIGHTED + 1, weighted=True)
    assert Auto(steps=MOST_WEIGHTED + 1, signed=True).steps == MOST_WEIGHTED + 1


# What has no place for them


@pytest.mark.parametrize("options", [{"signed": True}, {"steps": MOST_WEIGHTED + 1}], ids=["signed", "steps"])
@every_method
def test_methods_refuse_what_does_not_go_together(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="weighted spikes"):
        create(method, weighted=True, **options)


def test_leaks_and_trained_thresholds_are_refused(random_network: Networks, random_images: Images) -> None:
    network, images = random_network("chain"), random_images("chain", 8)
    with pytest.raises(ConversionError, match="no leak"):
        qs.convert(network, images, "diet_snn", leak=0.9, weighted=True)
    with pytest.raises(ConversionError, match="neurons that stream have none"):
        qs.convert(network, images, "rate_encoded", train_thresholds=True, weighted=True)
    with pytest.raises(OptionError, match="maximum of the spikes of single steps"):
        create("ultra_low_latency", pool="spikes", weighted=True)


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_refused_by_name_with_a_way_out(what: str, converted: Converted) -> None:
    snn = copy.deepcopy(converted()).float()
    with pytest.raises(OptionError, match=r"weighted by their step.*rate_coded\(\)"):
        REFUSED[what](snn)
    if what in ("fold", "quantise", "integer"):
        REFUSED[what](snn.rate_coded())


def test_other_numbers_of_steps_end_where_weights_do(converted: Converted) -> None:
    with pytest.raises(OptionError, match=f"at most {MOST_WEIGHTED} steps, got {MOST_WEIGHTED + 1}"):
        converted().with_steps(MOST_WEIGHTED + 1)
    with pytest.raises(OptionError, match="at most"):
        converted(weighted=False, steps=MOST_WEIGHTED + 1).as_weighted()
    for other, reason in (
        (converted(weighted=False).as_signed(), "no signs"),
        (converted(weighted=False).with_reset("zero"), "subtraction"),
    ):
        with pytest.raises(OptionError, match=reason):
            other.as_weighted()


@pytest.mark.parametrize("refinement", ["offset_shift", "residual_mask"])
def test_first_runs_are_refused(refinement: str, random_network: Networks, random_images: Images) -> None:
    kinds = {"offset_shift": qs.refinements.OffsetShift, "residual_mask": qs.refinements.ResidualMask}
    method = create("potential_init", steps=3, weighted=True) | kinds[refinement]()
    with pytest.raises(OptionError, match="leave synchronous, weighted and signed out"):
        qs.convert(random_network("perceptron"), random_images("perceptron", 8), method)


def test_single_steps_are_refused(converted: Converted, random_images: Images) -> None:
    snn, images = copy.deepcopy(converted()), random_images("chain", 2)
    with pytest.raises(ConversionError, match="whose spikes are weighted"):
        simulate(snn, images, step_by_step=True)
    alone = qs.convert(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 3), "potential_init", steps=3, weighted=True
    )
    with pytest.raises(ConversionError, match="whose spikes are weighted"):
        simulate(alone, torch.randn(2, 3), step_by_step=True)
