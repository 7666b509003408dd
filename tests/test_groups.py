"""Groups of neurons: M of them say in one step what a single one says in M, with nobody waiting."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

import quickspike as qs
from conversions import NAMES, REFUSED, Converted, Images, Networks, conversions
from quickspike import checkpoint
from quickspike.anatomy import anatomy_of
from quickspike.api import finish, fit, tune
from quickspike.claims import CLAIMS
from quickspike.data import DataSet, ImageStream
from quickspike.energy import energy_of
from quickspike.engines import accelerate
from quickspike.errors import CheckpointError, ConversionError, OptionError
from quickspike.evaluation import make_fabric
from quickspike.method import all_methods, create
from quickspike.methods.qcfs import QCFS, quantise
from quickspike.neuron import MOST_MEMBERS, Neuron, NeuronParameters, Surrogate, integrate
from quickspike.nir_export import to_nir
from quickspike.operations import count_operations
from quickspike.page import Entry, write_page
from quickspike.program_export import to_program
from quickspike.refinement import refinements_of
from quickspike.report import compare_table, report_tables
from quickspike.simulation import simulate
from quickspike.training import Trainer, Training

F64 = torch.float64
METHODS = sorted(all_methods())

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def converted(random_network: Networks, random_images: Images) -> Converted:
    return conversions(random_network, random_images, steps=1, members=5)


# The neuron


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    steps=st.integers(1, 5),
    members=st.integers(2, 9),
    half=st.integers(0, 2),
    strict=st.booleans(),
    drawn=st.lists(st.lists(st.integers(-40, 60), min_size=5, max_size=5), min_size=1, max_size=20),
)
def test_members_share_a_potential(steps: int, members: int, half: int, strict: bool, drawn: list[list[int]]) -> None:
    """In whole numbers, member by member, as arXiv 2402.19061 has it: each has a potential, and every spike inhibits all."""
    unit = 4
    layer = Neuron(
        NeuronParameters(torch.tensor(float(unit * members), dtype=F64), initial=half / 2, amplitude=2.0, strict=strict, members=members),
        steps,
        False,
    )
    currents = torch.tensor(drawn, dtype=F64)[:, :steps].T
    out = layer(currents.reshape(-1, 1)).view(steps, len(drawn))
    for column in range(len(drawn)):
        potentials = [half * unit // 2] * members
        for t in range(steps):
            potentials = [v + int(currents[t, column]) for v in potentials]
            thresholds = [unit * (member + 1) for member in range(members)]
            fired = sum(v > theta if strict else v >= theta for v, theta in zip(potentials, thresholds, strict=True))
            potentials = [v - unit * fired for v in potentials]
            assert float(out[t, column]) == 2 * unit * fired


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("members", [3, 7, 49, 256])
def test_what_counts_is_the_comparison(members: int, strict: bool) -> None:
    """Potentials on, just below and just above every threshold, in single precision, where quotients round across."""
    generator = torch.Generator().manual_seed(members)
    for theta in (torch.rand(40, generator=generator) * 3 + 0.01).unbind():
        thresholds = theta / members * torch.arange(1, members + 1)
        sides = [thresholds, torch.nextafter(thresholds, torch.zeros(())), torch.nextafter(thresholds, torch.full((), torch.inf))]
        z = torch.cat([*sides, torch.tensor([-1.0, 0.0, torch.nan, torch.inf, -torch.inf, 1e30])])
        layer = Neuron(NeuronParameters(theta, scaled=False, amplitude=float(members), strict=strict, members=members), 1, True)
        wanted = ((z[:, None] > thresholds) if strict else (z[:, None] >= thresholds)).sum(1)
        assert torch.equal(layer(z), wanted.float())


@pytest.mark.parametrize("members", [2, 6])
def test_triangles_add_up_to_the_plateau(members: int) -> None:
    u = torch.linspace(-1, members + 2, 101, dtype=F64)
    whole = torch.stack([Surrogate(scale=1.5).derivative(u - member) for member in range(1, members + 1)]).sum(0)
    m = u.clone().requires_grad_()
    v, theta, leak, amplitude = (torch.tensor(value, dtype=F64) for value in (0.0, members, 1.0, members))
    out, _ = integrate(m, v, theta, leak, amplitude, 1, members=members, surrogate=Surrogate(scale=1.5))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), m)[0], whole, rtol=0, atol=1e-12)


def test_states_go_on_where_they_were() -> None:
    currents = torch.randn(6 * 4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    layer = Neuron(NeuronParameters(torch.tensor(1.5, dtype=F64), initial=0.5, leak=0.9, members=3), 6, False)
    first, state = layer.scan(currents[:8], None, 2)
    second, _ = layer.scan(currents[8:], state, 4)
    assert torch.equal(torch.cat([first, second]), layer(currents))


@pytest.mark.parametrize("members", [2, 5])
def test_gradients_in_one_step_are_those_of_the_staircase_in_training(members: int) -> None:
    """Triangles as wide as a level add up to 1, so that the gradient passes from the first jump to the last."""
    z = torch.linspace(-1, 2, 997, dtype=F64)
    layer = Neuron(NeuronParameters(torch.tensor(1.25, dtype=F64), initial=0.5, members=members), 1, True)
    currents = [z.clone().requires_grad_() for _ in range(2)]
    out = layer(currents[0])
    stairs = quantise(currents[1], torch.tensor(1.25, dtype=F64), members)
    assert torch.equal(out, stairs)
    (found,) = torch.autograd.grad(out.sum(), currents[0])
    # v(0) is half a level: the first jump is at half a level, the last half a level below theta.
    unit = 1.25 / members
    between = (z > unit / 2) & (z < 1.25 - unit / 2)
    assert bool((found[between] - 1).abs().max() < 1e-12)
    assert bool((found[(z < -unit / 2) | (z > 1.25 + unit / 2)] == 0).all())


def test_gradients_to_everything_are_those_of_a_smooth_staircase() -> None:
    """Where no jump is: amplitude and, through the sum of the surrogates, theta and v(0), in one step."""
    surrogate, members = Surrogate("sigmoid"), 3
    theta, initial, amplitude = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (1.2, 0.5, 1.5))
    z = torch.tensor([0.3, 0.7, 1.9], dtype=F64)
    out, _ = integrate(z, initial * theta / members, theta, torch.ones((), dtype=F64), amplitude, 1, members=members, surrogate=surrogate)
    found = torch.autograd.grad(out.sum(), (theta, initial, amplitude))
    unit = theta.detach() / members
    u = (z + 0.5 * unit) / unit
    slope = torch.stack([surrogate.derivative(u - member) for member in range(1, members + 1)]).sum(0) * 1.5 / members
    assert float(found[0]) == pytest.approx(float((slope * -z / unit / 1.2).sum()))
    assert float(found[1]) == pytest.approx(float(slope.sum()))
    assert float(found[2]) == pytest.approx(float(out.detach().sum() / 1.5))


@pytest.mark.parametrize("options", [{"signed": True}, {"to_zero": True}, {"weighted": True, "averaged": True}])
def test_groups_of_other_neurons_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match="groups of neurons need"):
        NeuronParameters(torch.ones(()), members=2, **options)


@pytest.mark.parametrize("members", [0, MOST_MEMBERS + 1, 2.0, True, "2"])
def test_groups_of_no_neuron_and_of_too_many_are_refused(members: Any) -> None:
    with pytest.raises(ConversionError, match=f"1 to {MOST_MEMBERS} neurons, got {members!r}"):
        NeuronParameters(torch.ones(()), members=members)


def test_half_precision_counts_and_compares_in_that_of_the_threshold() -> None:
    layer = Neuron(NeuronParameters(torch.tensor(1.0), initial=0.5, members=7), 1, True)
    z = torch.linspace(-0.2, 1.2, 401).bfloat16()
    assert torch.equal(layer(z), layer(z.float()).bfloat16())
    assert torch.equal(layer.spikes(layer(z)).float(), (layer(z.float()) * 7).round())


def test_a_silent_channel_has_no_spikes() -> None:
    layer = Neuron(NeuronParameters(torch.ones(2, 1), amplitude=torch.tensor([[0.0], [1.0]]), members=2), 1, True)
    assert layer.spikes(layer(torch.full((1, 2, 3), 2.0))).tolist() == [[[0.0] * 3, [2.0] * 3]]


# The network


@every_method
@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_m_is_m_steps_of_one(method: str, name: str, converted: Converted, random_images: Images) -> None:
    snn, images = converted(method, name), random_images(name, 8, seed=2)
    plain = snn.rate_coded()
    assert (plain.steps, plain.members, plain.synchronous) == (5, 1, True)
    assert (snn.steps, snn.members, snn.latency, snn.resolution) == (1, 5, 1, 5)
    with torch.no_grad():
        given, wanted = snn(images), plain(images)
    assert float((given - wanted).abs().max()) <= 1e-9 * float(wanted.abs().max())
    run, other = snn.run(images), plain.run(images)
    for site, spikes in run.spikes.items():
        assert torch.equal(spikes, other.spikes[site]), site


@every_method
def test_ceilings_are_fitted_for_the_levels(method: str, random_network: Networks, random_images: Images) -> None:
    network, images = random_network("chain"), random_images("chain", 16, seed=1)
    # Thresholds of diet_snn come from a simulation of single neurons that stream, and depend on no T.
    like: dict[str, Any] = {"steps": 2} if method == "diet_snn" else {"steps": 6, "synchronous": True}
    groups, plain = (qs.convert(network, images, method, **options) for options in ({"steps": 2, "members": 3}, like))
    for name, neuron in groups.neurons().items():
        assert torch.equal(neuron.threshold, plain.neuron(name).threshold), name


@pytest.mark.parametrize("name", NAMES)
def test_a_network_with_as_many_levels_is_the_source(name: str, random_network: Networks, random_images: Images) -> None:
    stream, method = ImageStream(random_images(name, 32, seed=7)), QCFS(steps=1, levels=3, members=3)
    ann = fit(random_network(name), stream, method)
    snn, images = finish(ann, stream, method), random_images(name, 32, seed=8)
    with torch.no_grad():
        wanted, found = ann.module(images), snn(images)
        fewer = finish(ann, stream, QCFS(steps=1, levels=3))(images)
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= 1e-4 * scale
    assert float((fewer - wanted).abs().max()) > 1e-2 * scale, "without groups they have to differ, or this shows nothing"


def test_larger_groups_come_closer(random_network: Networks, random_images: Images) -> None:
    network, images = random_network("residual"), random_images("residual", 16)
    errors = []
    with torch.no_grad():
        for members in (4, 16, 64):
            snn = qs.convert(network, images, "threshold_balancing", ceiling="percentile", percentile=100, steps=1, members=members)
            errors.append(float((snn(images) - network(images)).square().mean().sqrt()))
    assert all(3 < before / after < 6 for before, after in itertools.pairwise(errors)), errors


def test_groups_that_stream_err_less_than_neurons(random_network: Networks, random_images: Images) -> None:
    network, images = random_network("residual"), random_images("residual", 16)
    errors = []
    with torch.no_grad():
        for members in (1, 4):
            snn = qs.convert(network, images, "potential_init", steps=4, members=members)
            assert snn.latency == 4
            errors.append(float((snn(images) - network(images)).square().mean().sqrt()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("steps", [1, 3])
def test_step_by_step_is_the_same(steps: int, converted: Converted, random_images: Images) -> None:
    snn, images = converted(steps=steps), random_images("chain", 4, seed=3)
    layers, single = snn.run(images), simulate(snn, images, step_by_step=True)
    torch.testing.assert_close(layers.logits, single.logits, rtol=1e-9, atol=1e-9)
    for site, spikes in layers.spikes.items():
        assert torch.equal(spikes, single.spikes[site])
        assert 1 < int(spikes.max()) <= 5 * steps


def test_a_network_can_be_made_of_groups(converted: Converted, random_images: Images) -> None:
    images = random_images("residual", 8, seed=3)
    streaming = converted(name="residual", steps=3, members=1)
    made = streaming.as_groups(3).with_steps(1)
    assert (streaming.members, made.members, made.synchronous, made.resolution) == (1, 3, False, 3)
    weighted = streaming.as_weighted().with_steps(2)
    with torch.no_grad():
        for other in (streaming.as_synchronous(), weighted, streaming.as_synchronous().as_groups(3).with_steps(1)):
            torch.testing.assert_close(made(images), other(images), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(weighted.as_groups(3).with_steps(1)(images), made(images), rtol=1e-9, atol=1e-9)
        # Nobody waits any more, at larger T either.
        torch.testing.assert_close(streaming.as_synchronous().as_groups(3)(images), streaming.as_groups(3)(images), rtol=1e-9, atol=1e-9)
        assert float((streaming.as_groups(3)(images) - streaming.as_groups(3).as_synchronous()(images)).abs().max()) > 1e-3
        torch.testing.assert_close(made.as_groups(1)(images), streaming.with_steps(1)(images), rtol=1e-9, atol=1e-9)


def test_groups_of_what_has_no_place_are_refused(converted: Converted, random_network: Networks, random_images: Images) -> None:
    single = converted(members=1, steps=2)
    for other in (single.as_signed(), single.with_reset("zero")):
        with pytest.raises(OptionError, match="reset by subtraction and no signs"):
            other.as_groups(2)
    wrong: list[Any] = [0, MOST_MEMBERS + 1, True, 2.0]
    for members in wrong:
        with pytest.raises(OptionError, match="members must be a whole number"):
            single.as_groups(members)
    with pytest.raises(OptionError, match="made for the fused engine"):
        accelerate(copy.deepcopy(single).float(), "fused").as_groups(2)
    with pytest.raises(OptionError, match="made for the count engine"):
        accelerate(copy.deepcopy(converted()).float(), "count").as_single_neurons()
    shifted = qs.convert(
        random_network("perceptron"), random_images("perceptron", 8), create("potential_init", steps=3) | qs.refinements.OffsetShift()
    )
    with pytest.raises(OptionError, match="first steps twice"):
        shifted.as_groups(2)


@every_method
@pytest.mark.parametrize("name", NAMES)
def test_in_one_step_members_are_single_neurons(method: str, name: str, converted: Converted, random_images: Images) -> None:
    snn, images = converted(method, name), random_images(name, 8, seed=2)
    single = snn.as_single_neurons()
    assert (single.members, single.steps, len(single.sites)) == (1, 1, 5 * len(snn.sites))
    with torch.no_grad():
        torch.testing.assert_close(single(images), snn(images), rtol=1e-9, atol=1e-9)
    run, other = snn.run(images), single.run(images)
    for number, site in enumerate(snn.sites):
        members = [other.spikes[one.name] for one in single.sites[5 * number : 5 * number + 5]]
        assert torch.equal(torch.stack(members).sum(0), run.spikes[site.name].long())
        # A higher threshold is reached less often.
        assert all(bool((low >= high).all()) for low, high in itertools.pairwise(members))


@pytest.mark.parametrize(("method", "options"), [("ultra_low_latency", {}), ("diet_snn", {"leak": 0.9}), ("potential_init", {})])
def test_single_neurons_are_of_the_kind_of_their_group(method: str, options: dict[str, Any], converted: Converted) -> None:
    snn = converted(method, **options)
    groups, single = list(snn.neurons().values()), list(snn.as_single_neurons().neurons().values())
    for number, neuron in enumerate(single):
        group = groups[number // 5]
        assert neuron.strict == group.strict == (method != "potential_init")
        assert torch.equal(neuron.leak, group.leak)
        torch.testing.assert_close(neuron.start(neuron.threshold), group.start(group.threshold), rtol=1e-12, atol=0)


def test_counts_go_as_far_as_members_and_steps(converted: Converted, random_images: Images) -> None:
    snn, images = converted(members=100, steps=2), random_images("chain", 8, seed=2)
    run = snn.run(images)
    assert max(int(spikes.max()) for spikes in run.spikes.values()) == 200
    spikes = sum(float(spikes.double().sum()) for spikes in run.spikes.values()) / len(images)
    assert count_operations(snn, [images]).total("spikes") == pytest.approx(spikes)


@pytest.mark.parametrize("name", ["chain", "residual", "concat"])
def test_single_neurons_go_everywhere(name: str, random_network: Networks, random_images: Images, tmp_path: Path) -> None:
    network, images = random_network(name).float(), random_images(name, 8, seed=2).float()
    snn = qs.convert(network, images, "potential_init", steps=1, members=3)
    single = snn.as_single_neurons()
    single.save(tmp_path / "network.safetensors")
    with torch.no_grad():
        wanted = single(images)
        assert torch.equal(qs.load(tmp_path / "network.safetensors")(images), wanted)
        torch.testing.assert_close(single.fold()(images), wanted, rtol=1e-4, atol=1e-4)
        fast = accelerate(single, "integer")
        torch.testing.assert_close(fast(images), qs.quantise(single).network(images), rtol=1e-5, atol=1e-5)
    found, groups = (count_operations(one, [images]) for one in (single, snn))
    for field in ("spikes", "updates", "multiplies"):
        assert found.total(field) == groups.total(field)
    assert found.total("accumulates") == pytest.approx(groups.total("accumulates"))


def test_nir_holds_members_as_neurons(random_network: Networks, random_images: Images, tmp_path: Path) -> None:
    pytest.importorskip("nir")
    from quickspike.nir_export import export_nir
    from quickspike.nir_import import load_nir

    network, images = random_network("residual").float(), random_images("residual", 8, seed=2).float()
    snn = qs.convert(network, images, "potential_init", steps=1, members=3)
    exported = export_nir(snn, tmp_path / "network.nir")
    assert sum(type(node).__name__ == "IF" for node in exported.graph.nodes.values()) == 3 * len(snn.sites)
    with torch.no_grad():
        torch.testing.assert_close(load_nir(tmp_path / "network.nir")(images), snn(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConversionError, match="adds nothing up"):
        to_nir(snn, "spikingjelly")


def test_members_that_inhibit_one_another_are_no_single_neurons(converted: Converted) -> None:
    with pytest.raises(OptionError, match="inhibit one another from the second step on"):
        converted(steps=3).as_single_neurons()
    plain = converted(members=1, steps=3)
    assert plain.as_single_neurons().sites == plain.sites


def test_first_neurons_that_encode_pixels_are_groups_too(random_network: Networks, random_images: Images) -> None:
    images = torch.sigmoid(random_images("chain", 16, seed=1))
    snn = qs.convert(random_network("chain"), images, "rate_encoded", steps=1, encode_input=True, members=4)
    assert [neuron.members for neuron in snn.neurons().values()] == [4] * 4
    with torch.no_grad():
        torch.testing.assert_close(snn(images), snn.rate_coded()(images), rtol=1e-9, atol=1e-9)


def test_files_keep_the_groups(converted: Converted, random_images: Images, tmp_path: Path) -> None:
    snn, images, path = converted(name="residual"), random_images("residual", 4), tmp_path / "network.safetensors"
    snn.save(path)
    # No version that does not know of them may take them for single neurons.
    assert b'"type": "GroupedNeuron"' in path.read_bytes().replace(b"\\", b"")
    loaded = qs.load(path)
    assert loaded.members == 5
    assert qs.methods.PotentialInit.from_json(loaded.method) == create("potential_init", steps=1, members=5)
    with torch.no_grad():
        assert torch.equal(loaded(images), snn(images))


@pytest.mark.parametrize("members", [0, -1, MOST_MEMBERS + 1, 2.5, "5", None])
def test_a_file_with_no_number_of_members_is_refused(members: Any, converted: Converted, tmp_path: Path) -> None:
    """Though checksum and all else hold."""
    path = tmp_path / "network.safetensors"
    converted().save(path)
    tensors = safetensors.torch.load(path.read_bytes())
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["quickspike"])
    for layer in header["layers"].values():
        if layer["type"] == "GroupedNeuron":
            layer["arguments"]["members"] = members
    text = json.dumps(header, sort_keys=True)
    safetensors.torch.save_file(tensors, path, {"quickspike": text, "sha256": checkpoint._digest(text, tensors)})
    with pytest.raises(CheckpointError, match="a group has 1 to 256 neurons"):
        qs.load(path)


def test_tuning_learns_weights_and_thresholds(digits_source: nn.Module, digits_calibration: Tensor, digits: DataSet) -> None:
    snn = qs.convert(digits_source, digits_calibration, "potential_init", steps=1, members=2)
    settings = Training(epochs=1, learning_rate=1e-3, optimiser="adam", weight_decay=0.0)
    tuned = tune(snn, Trainer(fabric=make_fabric("cpu"), data=digits, settings=settings))
    assert tuned.members == 2
    moved = [not torch.equal(tuned.neuron(name).threshold, neuron.threshold) for name, neuron in snn.neurons().items()]
    assert all(moved)


@pytest.mark.parametrize(
    "refinement",
    ["bias_correction", "potential_correction:granularity=channel", "weight_calibration:reach=network,iterations=40,learning_rate=0.001"],
)
def test_refinements_bring_it_closer(refinement: str, random_network: Networks, random_images: Images) -> None:
    network, images = random_network("chain", seed=3), random_images("chain", 64, seed=4)
    method = create("threshold_balancing", steps=1, members=3)
    refined_method = dataclasses.replace(method, refinements=refinements_of([refinement]))
    plain, refined = (qs.convert(network, images, one) for one in (method, refined_method))
    with torch.no_grad():
        wanted = network(images)
        before, after = (float((snn(images) - wanted).square().mean()) for snn in (plain, refined))
    assert after < 0.9 * before


# Beside the network


@pytest.mark.parametrize("name", ["chain", "residual", "pooled"])
def test_the_count_engine_counts_levels(name: str, random_network: Networks, random_images: Images) -> None:
    network, images = random_network(name).float(), random_images(name, 8, seed=5).float()
    snn = qs.convert(network, images, "potential_init", steps=1, members=15)
    fast, plain = accelerate(snn, "count"), accelerate(snn.rate_coded(), "count")
    with torch.no_grad():
        assert torch.equal(fast(images), plain(images))
        assert float((fast(images) - snn(images)).abs().max()) < 0.1 * float(snn(images).abs().max())
    assert (fast.steps, fast.latency, fast.members) == (1, 1, 15)
    for site, spikes in fast.run(images).spikes.items():
        assert torch.equal(spikes, plain.run(images).spikes[site])
    with pytest.raises(OptionError, match="groups of 256 over 1 steps, which are 256 levels"):
        accelerate(qs.convert(network, images, "potential_init", steps=1, members=256), "count")
    assert accelerate(snn).provenance["engine"]["name"] == "fused"
    with torch.no_grad():
        assert torch.equal(accelerate(snn)(images), accelerate(snn, "reference")(images))


@pytest.mark.parametrize("steps", [1, 3])
def test_operations_count_every_member(steps: int, converted: Converted, random_images: Images) -> None:
    snn, images = converted(name="residual", steps=steps), random_images("residual", 8, seed=6)
    found, run = count_operations(snn, [images]), snn.run(images)
    spikes = sum(float(counts.sum()) for counts in run.spikes.values()) / len(images)
    neurons = sum(counts[0].numel() for counts in run.spikes.values())
    assert found.total("spikes") == pytest.approx(spikes)
    assert found.total("updates") == 5 * steps * neurons
    before_last = simulate(snn.with_steps(steps - 1), images).spikes if steps > 1 else {}
    inhibitions = sum(row.accumulates for row in found.rows if row.kind == "inhibition")
    assert inhibitions == pytest.approx(4 * sum(float(counts.sum()) for counts in before_last.values()) / len(images))
    if steps == 1:
        plain = count_operations(snn.rate_coded(), [images])
        assert found.total("accumulates") == pytest.approx(plain.total("accumulates"))
        assert found.total("updates") == plain.total("updates")
        assert "members" not in plain.to_json()
        # The papers' formulas count the connections of the source network, whoever brings the spikes.
        for claim in CLAIMS.values():
            if claim.filled_in is not None:
                assert claim.filled_in(found) == pytest.approx(claim.filled_in(plain))
        assert not [note for note in energy_of(plain).caveats if "groups" in note]
    assert found.to_json()["members"] == 5
    assert len([note for note in energy_of(found).caveats if "groups of 5" in note]) == 1


def test_reports_tell_of_groups(converted: Converted, random_images: Images, tmp_path: Path) -> None:
    snn, images = converted(), random_images("chain", 8, seed=6)
    data = [(images, torch.zeros(8, dtype=torch.long))]
    report, plain = (qs.evaluate(one, data, steps=(1,), device="cpu") for one in (snn, converted(members=1)))
    assert (report.members, report.to_json()["members"]) == (5, 5)
    assert "members" not in plain.to_json()
    write_page(tmp_path / "page.html", "A page", [Entry("grouped", report, snn)])
    assert "with groups of 5 neurons in place of single ones" in (tmp_path / "page.html").read_text()
    told = {}
    for name, one in (("groups", report), ("plain", plain)):
        console = Console(record=True, width=120)
        console.print(report_tables(one), compare_table({name: {1: one}}))
        told[name] = " ".join(console.export_text().split())
    assert all(
        text in told["groups"] for text in ("groups of 5 neurons in place of single ones", "spikes per group", "groups: groups of 5")
    )
    assert "groups" not in told["plain"]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_anatomy_adds_up(steps: int, converted: Converted, random_images: Images) -> None:
    images = random_images("residual", 16, seed=1)
    sites = anatomy_of(converted(name="residual", steps=steps), [images]).sites
    # In one step there is no order in which anything could come.
    assert (max(site.sizes["unevenness"] for site in sites) < 1e-9) == (steps == 1)
    for site in sites:
        assert sum(site.shares.values()) == pytest.approx(1)
        assert site.sizes["neuron"] < 1e-9
        assert site.sizes["quantisation"] > 1e-3
        assert sum(site.rates) == pytest.approx(1)
        assert 0 < site.saturated < 0.5


def test_a_program_computes_the_same(converted: Converted, random_images: Images, tmp_path: Path) -> None:
    for steps in (1, 2):
        snn, images = copy.deepcopy(converted(name="residual", steps=steps)).float(), random_images("residual", 4).float()
        to_program(snn, tmp_path / "network.pt2")
        program = torch.export.load(tmp_path / "network.pt2").module()
        with torch.no_grad():
            torch.testing.assert_close(program(images), snn(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["unrolled", "step"])
@pytest.mark.parametrize("steps", [1, 3])
def test_onnx_computes_the_same(steps: int, form: Any, converted: Converted, random_images: Images, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from quickspike.onnx_export import initial_states, to_onnx

    snn, images = copy.deepcopy(converted(name="residual", steps=steps)).float(), random_images("residual", 4).float()
    path = tmp_path / "network.onnx"
    to_onnx(snn, path, form=form)
    session = runtime.InferenceSession(str(path))
    if form == "unrolled":
        (given,) = session.run(None, {"images": images.numpy()})
    else:
        names = [one.name for one in session.get_outputs()]
        states, logits = initial_states(path, len(images)), []
        for _ in range(steps):
            found = dict(zip(names, session.run(names, {"images": images.numpy(), **states}), strict=True))
            states = {name: found[f"{name}.next"] for name in states}
            logits.append(found["logits"])
        given = np.mean(logits, 0)
    with torch.no_grad():
        np.testing.assert_allclose(given, snn(images).numpy(), rtol=1e-4, atol=1e-4)


def test_a_training_from_before_there_were_groups_goes_on_without_them(
    digits_source: nn.Module, digits_calibration: Tensor, digits: DataSet, tmp_path: Path
) -> None:
    trainer = Trainer(fabric=make_fabric("cpu"), data=digits, settings=Training(epochs=1), folder=tmp_path)
    fit(digits_source, ImageStream(digits_calibration), QCFS(steps=1), trainer)
    (file,) = tmp_path.glob("*.ckpt")
    state = torch.load(file, weights_only=True)
    del state["settings"]["qcfs.members"]
    torch.save(state, file)
    again = dataclasses.replace(trainer, resume=True)
    with pytest.raises(CheckpointError, match=r"qcfs\.members=None \(now 2\)"):
        fit(digits_source, ImageStream(digits_calibration), QCFS(steps=1, members=2), again)
    with pytest.raises(CheckpointError, match=r"qcfs\.weighted=False \(now True\)"):
        fit(digits_source, ImageStream(digits_calibration), QCFS(steps=1, weighted=True), again)
    fit(digits_source, ImageStream(digits_calibration), QCFS(steps=1), again)


def test_auto_takes_groups_where_they_are_allowed(digits_source: nn.Module, digits_calibration: Tensor) -> None:
    snn = qs.convert(digits_source, digits_calibration[:60], "auto", steps=1, members=8)
    assert (snn.members, snn.steps) == (8, 1)
    assert any("members=8" in attempt["what"] for attempt in snn.provenance["chosen"]["attempts"])
    plain = qs.convert(digits_source, digits_calibration[:60], "auto", steps=1)
    assert plain.members == 1
    assert any("grouped neurons" in reason for reason in plain.provenance["chosen"]["reasons"])


# What does not go together


@every_method
@pytest.mark.parametrize("options", [{"signed": True}, {"weighted": True}], ids=["signed", "weighted"])
def test_methods_refuse_what_does_not_go_together(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"groups of neurons \(members\)|weighted spikes"):
        create(method, members=2, **options)


def test_maxima_of_single_spikes_are_refused() -> None:
    with pytest.raises(OptionError, match="maximum of the spikes of single steps"):
        create("ultra_low_latency", pool="spikes", members=2)


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_refused_by_name_with_a_way_out(what: str, converted: Converted) -> None:
    snn = copy.deepcopy(converted(steps=2)).float()
    with pytest.raises(OptionError, match=r"groups of neurons.*as_single_neurons\(\).*rate_coded\(\)"):
        REFUSED[what](snn)
    if what in ("fold", "quantise", "integer"):
        for other in (copy.deepcopy(converted()).float().rate_coded(), snn.with_steps(1).as_single_neurons()):
            REFUSED[what](other)


def test_weighing_the_spikes_of_groups_is_refused(converted: Converted) -> None:
    with pytest.raises(OptionError, match="no groups"):
        converted().as_weighted()


def test_groups_that_stream_or_leak_have_no_plain_form(converted: Converted, random_images: Images) -> None:
    with pytest.raises(OptionError, match="run for T = 3 without waiting"):
        converted(steps=3).rate_coded()
    with pytest.raises(OptionError, match="leak"):
        converted("diet_snn", leak=0.9).rate_coded()
    waiting, images = converted(steps=3, synchronous=True), random_images("chain", 4, seed=5)
    plain = waiting.rate_coded()
    assert plain.steps == 15
    with torch.no_grad():
        torch.testing.assert_close(waiting(images), plain(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("refinement", [qs.refinements.OffsetShift(), qs.refinements.ResidualMask()], ids=["shift", "mask"])
def test_first_runs_are_refused(refinement: Any, random_network: Networks, random_images: Images) -> None:
    method = create("potential_init", steps=3, members=2) | refinement
    with pytest.raises(OptionError, match="no place for groups"):
        qs.convert(random_network("perceptron"), random_images("perceptron", 8), method)
