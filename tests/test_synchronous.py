"""Layers that wait for whole windows (`synchronous`): averaged neurons in every method, checks P1, P3 and P4."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import oracles
import quickspike as qs
from quickspike.api import finish, fit
from quickspike.data import ImageStream
from quickspike.errors import ConversionError
from quickspike.method import all_methods, create, get
from quickspike.methods.qcfs import QCFS
from quickspike.neuron import Neuron, NeuronParameters
from quickspike.simulation import simulate

F64 = torch.float64
METHODS = sorted(all_methods())
Networks = Callable[..., nn.Module]
Images = Callable[..., Tensor]

every_method = pytest.mark.parametrize("method", METHODS)
DEPTH = {"chain": 3, "residual": 4, "concat": 2, "pooled": 3, "perceptron": 2}
"""Neurons on the longest way through the networks of `conftest.py`, counted by hand."""


@pytest.fixture(scope="module")
def converted(random_network: Networks, random_images: Images) -> Callable[..., qs.SpikingNetwork]:
    """converted(method, name, **options): made once, so copy it before changing it."""
    made: dict[Any, qs.SpikingNetwork] = {}

    def get_one(method: str, name: str, **options: Any) -> qs.SpikingNetwork:
        key = (method, name, *sorted(options.items()))
        if key not in made:
            network, images = random_network(name), random_images(name, 16, seed=1)
            if options.get("encode_input"):
                images = torch.sigmoid(images)
            made[key] = qs.convert(network, images, method, **{"steps": 6, "synchronous": True, **options})
        return made[key]

    return get_one


# The neuron


@pytest.mark.parametrize("theta", [7, 10, 16])
@pytest.mark.parametrize("half", [0, 1])
def test_p1_counts_equal_the_closed_form_of_the_mean(theta: int, half: int) -> None:
    for steps in (1, 2, 4, 8, 16):
        # Whole numbers with a whole mean, far apart in time.
        generator = np.random.default_rng(steps)
        mean, currents = generator.integers(-theta, 2 * theta, 300), generator.integers(-9 * theta, 9 * theta, (steps, 300))
        currents[-1] += steps * mean - currents.sum(0)
        parameters = NeuronParameters(torch.tensor(2.0 * theta, dtype=F64), initial=half / 2, averaged=True)
        out = Neuron(parameters, steps, False)(2 * torch.from_numpy(currents).double()).unflatten(0, (steps, -1))
        expected = oracles.closed_form_count(2 * mean, half * theta, 2 * theta, steps)
        assert (out.ne(0).sum(0).numpy() == expected).all()
        assert out.unique().tolist() in ([0.0], [0.0, 2.0 * theta])


def test_a_constant_current_needs_no_mean() -> None:
    z = torch.linspace(-1, 2, 40, dtype=F64)
    plain, averaged = (
        Neuron(NeuronParameters(torch.tensor(1.0, dtype=F64), initial=0.5, averaged=flag), 5, True)(z) for flag in (False, True)
    )
    assert torch.equal(plain, averaged)


# What the order of spikes does


class Shuffled(fx.Interpreter):
    """Runs a spiking network; the outputs of every neuron are put into an order of their own, drawn anew."""

    def __init__(self, snn: qs.SpikingNetwork, seed: int) -> None:
        super().__init__(snn.network)
        self.steps, self.generator = snn.steps, torch.Generator().manual_seed(seed)
        self.spikes: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(target, args, kwargs)
        if isinstance(self.fetch_attr(target), Neuron):
            trains = out.unflatten(0, (self.steps, -1))
            self.spikes[target] = trains.ne(0).sum(0)
            order = torch.rand(trains.shape, generator=self.generator).argsort(0)
            out = trains.gather(0, order).flatten(0, 1)
        return out


def run_shuffled(snn: qs.SpikingNetwork, images: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    interpreter = Shuffled(snn, seed)
    with torch.no_grad():
        logits = interpreter.run(images).unflatten(0, (snn.steps, -1)).mean(0)
    return logits, interpreter.spikes


@every_method
@pytest.mark.parametrize("name", ["chain", "residual", "pooled"])
def test_p3_the_order_of_spikes_changes_nothing(
    method: str, name: str, converted: Callable[..., qs.SpikingNetwork], random_images: Images
) -> None:
    images = random_images(name, 8, seed=2)
    snn = converted(method, name)
    with torch.no_grad():
        run = snn.run(images)
    for seed in (0, 1):
        logits, spikes = run_shuffled(snn, images, seed)
        for site, counts in run.spikes.items():
            assert torch.equal(spikes[site], counts), site
        assert torch.allclose(logits, run.logits[-1], rtol=0, atol=1e-9)
    assert sum(int(counts.sum()) for counts in run.spikes.values()) > 100


@every_method
def test_streaming_neurons_do_see_the_order(method: str, converted: Callable[..., qs.SpikingNetwork], random_images: Images) -> None:
    snn = converted(method, "chain", synchronous=False)
    images = random_images("chain", 8, seed=2)
    counts = snn.run(images).spikes
    _, shuffled = run_shuffled(snn, images)
    first, *later = (site.name for site in snn.sites)
    assert torch.equal(counts[first], shuffled[first])
    assert any(not torch.equal(counts[site], shuffled[site]) for site in later)
    assert not snn.synchronous
    assert snn.latency == snn.steps


@every_method
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_counts_follow_from_the_mean_of_the_layer_before(
    method: str, name: str, converted: Callable[..., qs.SpikingNetwork], random_images: Images
) -> None:
    """Every count from the closed form of the mean current, layer by layer, without a neuron."""
    snn, images = converted(method, name), random_images(name, 8, seed=3)
    steps = snn.steps
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        snn.neuron(site.name).register_forward_hook(lambda _, args, out, name=site.name: seen.update({name: (args[0], out)}))
        for site in snn.sites
    ]
    with torch.no_grad():
        snn(images)
    for handle in handles:
        handle.remove()
    for site in snn.sites:
        unit, (current, out) = snn.neuron(site.name), seen[site.name]
        assert float(unit.leak.min()) == 1
        assert unit.averaged
        mean = current.numpy() if unit.constant_input else current.unflatten(0, (steps, -1)).mean(0).numpy()
        theta, initial = unit.threshold.numpy(), unit.initial.numpy()
        level = steps * mean / theta + initial
        expected = np.clip(np.ceil(level) - 1 if unit.strict else np.floor(level), 0, steps)
        assert (out.unflatten(0, (steps, -1)).ne(0).sum(0).numpy() == expected).all()


# Latency


@every_method
@pytest.mark.parametrize("name", sorted(DEPTH))
def test_latency_is_depth_times_steps(method: str, name: str, converted: Callable[..., qs.SpikingNetwork]) -> None:
    snn = converted(method, name)
    # The first neurons have the image itself, and wait for nothing.
    waiting = DEPTH[name] - 1
    assert snn.latency == 6 * (1 + waiting)
    assert snn.with_steps(11).latency == 11 * (1 + waiting)
    assert snn.synchronous
    assert all(unit.averaged for unit in snn.neurons().values())


def test_neurons_that_encode_pixels_add_a_layer(converted: Callable[..., qs.SpikingNetwork]) -> None:
    snn = converted("rate_encoded", "chain", encode_input=True)
    assert [unit.averaged for unit in snn.neurons().values()] == [False, True, True, True]
    assert snn.latency == 6 * 4
    streaming = converted("rate_encoded", "chain", encode_input=True, synchronous=False)
    assert not streaming.synchronous
    again = streaming.as_synchronous()
    assert [unit.averaged for unit in again.neurons().values()] == [False, True, True, True]
    assert again.latency == 6 * 4


@every_method
def test_a_streaming_network_can_be_made_synchronous(
    method: str, converted: Callable[..., qs.SpikingNetwork], random_images: Images
) -> None:
    streaming = converted(method, "residual", synchronous=False)
    before = {name: value.clone() for name, value in streaming.state_dict().items()}
    made, images = streaming.as_synchronous(), random_images("residual", 8, seed=4)
    assert not streaming.synchronous
    assert not any(unit.averaged for unit in streaming.neurons().values())
    assert made.synchronous
    assert made.latency == 6 * DEPTH["residual"]
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])
    logits, spikes = run_shuffled(made, images)
    with torch.no_grad():
        run = made.run(images)
    assert all(torch.equal(spikes[site], counts) for site, counts in run.spikes.items())
    assert torch.allclose(logits, run.logits[-1], rtol=0, atol=1e-9)
    if method != "diet_snn":  # whose thresholds come from a simulation of the network as it is
        assert torch.equal(made(images), converted(method, "residual")(images))


# Measurements


@every_method
def test_every_number_of_steps_is_simulated_on_its_own(
    method: str, converted: Callable[..., qs.SpikingNetwork], random_images: Images
) -> None:
    snn = converted(method, "perceptron")
    images = 2 * random_images("perceptron", 60, seed=5)
    asked = (1, 3, 4, 6, 9)
    with torch.no_grad():
        own = {steps: snn.with_steps(steps)(images).argmax(1) for steps in asked}
        cut = snn.run(images).logits.argmax(2)
    labels = own[3]
    report = qs.evaluate(snn, [(images[:25], labels[:25]), (images[25:], labels[25:])], steps=asked, device="cpu")
    assert report.steps == asked
    # At T = 1 an averaged neuron does what a streaming one does.
    assert report.latency == {steps: 1 if steps == 1 else 2 * steps for steps in asked}
    assert report.accuracy == pytest.approx({steps: 100 * float((own[steps] == labels).double().mean()) for steps in asked})
    assert report.accuracy[3] == 100
    assert len(labels.unique()) > 1
    assert not torch.equal(own[3], cut[2]), "a run cut short has to differ for this test to see anything"
    assert report.rates == pytest.approx(snn.with_steps(9).run(images).rates)
    streaming = converted(method, "perceptron", synchronous=False)
    report = qs.evaluate(streaming, [(images, labels)], steps=asked, device="cpu")
    assert report.latency == {steps: steps for steps in asked}


def test_agreement_is_that_of_the_own_simulation(
    converted: Callable[..., qs.SpikingNetwork], random_network: Networks, random_images: Images
) -> None:
    network = random_network("perceptron")
    snn, images = converted("qcfs", "perceptron"), 2 * random_images("perceptron", 60, seed=6)
    with torch.no_grad():
        answers = network(images).argmax(1)
        own = {steps: snn.with_steps(steps)(images).argmax(1) for steps in (2, 6)}
    report = qs.evaluate(snn, [(images, answers)], network, (2, 6), device="cpu")
    assert report.reference_accuracy == 100
    same = {steps: pytest.approx(100 * float((own[steps] == answers).double().mean())) for steps in own}
    assert report.agreement == report.accuracy == same
    assert report.agreement[2] != report.agreement[6]


# What cannot be done, and files


@every_method
def test_step_by_step_is_refused(method: str, converted: Callable[..., qs.SpikingNetwork], random_images: Images) -> None:
    snn, images = copy.deepcopy(converted(method, "chain")), random_images("chain", 2)
    for refused in ("steps", "chunk"):
        snn.chunk = 2 if refused == "chunk" else 0
        with pytest.raises(ConversionError, match=r"wait for all 6 steps.*Way out:.*step_by_step"):
            if refused == "chunk":
                snn(images)
            else:
                simulate(snn, images, step_by_step=True)
    snn.chunk = 0
    # A window of one step is a step.
    single = snn.with_steps(1)
    assert torch.allclose(simulate(single, images, step_by_step=True).logits, single.run(images).logits, rtol=0, atol=1e-12)


@every_method
def test_files_keep_who_waits(method: str, converted: Callable[..., qs.SpikingNetwork], random_images: Images, tmp_path: Path) -> None:
    images = random_images("residual", 4)
    for synchronous in (True, False):
        snn = copy.deepcopy(converted(method, "residual", synchronous=synchronous))
        # One that does not wait among those that do, and the other way round.
        snn.neuron(snn.sites[2].name).averaged = not synchronous
        snn.save(tmp_path / "network.safetensors")
        loaded = qs.load(tmp_path / "network.safetensors")
        assert [unit.averaged for unit in loaded.neurons().values()] == [synchronous, synchronous, not synchronous, synchronous]
        assert (loaded.synchronous, loaded.latency) == (True, snn.latency)
        assert snn.latency == 6 * (3 if synchronous else 2)
        with torch.no_grad():
            assert torch.equal(loaded(images), snn(images))


@every_method
def test_the_method_decides(method: str) -> None:
    assert create(method).synchronous is (method == "rate_encoded")
    assert get(method)(synchronous=True).to_json()["options"]["synchronous"] is True


def test_trained_thresholds_are_for_streaming_neurons(converted: Callable[..., qs.SpikingNetwork]) -> None:
    snn = converted("rate_encoded", "chain", train_thresholds=True)
    assert not snn.synchronous
    assert snn.latency == 6


# P4


@pytest.mark.parametrize(("name", "levels"), [("chain", 2), ("chain", 4), ("chain", 8), *((name, 4) for name in sorted(DEPTH))])
def test_p4_a_network_with_as_many_steps_as_levels_is_the_source(
    name: str, levels: int, random_network: Networks, random_images: Images
) -> None:
    stream, method = ImageStream(random_images(name, 32, seed=7)), QCFS(steps=levels, levels=levels, synchronous=True)
    ann = fit(random_network(name), stream, method)
    snn = finish(ann, stream, method)
    images = random_images(name, 32, seed=8)
    with torch.no_grad():
        wanted, given = ann.module(images), snn(images)
        streaming = finish(ann, stream, QCFS(steps=levels, levels=levels))(images)
    scale = float(wanted.abs().max())
    assert float((given - wanted).abs().max()) <= 1e-4 * scale
    assert float((streaming - wanted).abs().max()) > 1e-2 * scale, "without waiting they have to differ, or this shows nothing"
