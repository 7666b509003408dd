"""What every registered method must do. A new method is tested by being registered."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.api import finish, fit, tune
from quickspike.data import DataSet, ImageStream, load_data
from quickspike.errors import ConversionError, DataError, OptionError, UnknownNameError
from quickspike.evaluation import make_fabric
from quickspike.method import Method, Paper, all_methods, create, get
from quickspike.networks import digits_cnn
from quickspike.options import Option, options_of
from quickspike.preprocessing import Preprocessing
from quickspike.refinement import REFINEMENTS
from quickspike.simulation import simulate
from quickspike.training import Silent, Trainer, Training

Converted = Callable[[str], qs.SpikingNetwork]
METHODS = sorted(all_methods())
OWNERS = {**all_methods(), **REFINEMENTS.all()}
OPTIONS = [(owner, name) for owner in sorted(OWNERS) for name in options_of(OWNERS[owner])]

every_method = pytest.mark.parametrize("method", METHODS)
every_option = pytest.mark.parametrize(("owner", "name"), OPTIONS)


def bad_values(declared: Option, kind: Any) -> list[Any]:
    if typing.get_origin(kind) is typing.Literal:
        return ["no such choice", "", None, 1, True]
    if kind is bool:
        return [0, 1, "true", None]
    values: list[Any] = ["3", None, True, [1], math.nan, math.inf, -math.inf]
    span = 1 if kind is int else 1e-6
    if kind is int:
        values.append(1.5)
    if declared.low is not None:
        values.append(kind(declared.low) if declared.low_open else kind(declared.low) - span)
    if declared.high is not None:
        values.append(kind(declared.high) + span)
    return values


def good_values(declared: Option, kind: Any) -> list[Any]:
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    if kind is bool:
        return [True, False]
    ends = [declared.low if not declared.low_open else None, declared.high]
    return [kind(end) for end in ends if end is not None]


# Options


def test_there_are_methods() -> None:
    assert {"potential_init", "threshold_balancing"} <= set(METHODS)


@every_option
def test_a_value_out_of_range_is_refused_and_the_option_named(owner: str, name: str) -> None:
    declared, kind, _ = options_of(OWNERS[owner])[name]
    assert bad_values(declared, kind)
    for bad in bad_values(declared, kind):
        with pytest.raises(OptionError, match=rf"{owner}: {name} must be"):
            OWNERS[owner](**{name: bad})


@every_option
def test_both_ends_of_a_range_and_every_choice_are_allowed(owner: str, name: str) -> None:
    cls = OWNERS[owner]
    declared, kind, default = options_of(cls)[name]
    for good in [default, *good_values(declared, kind)]:
        made = cls(**{name: good})
        assert getattr(made, name) == good
        assert cls.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False))) == made


@every_option
def test_options_are_documented(owner: str, name: str) -> None:
    declared, kind, default = options_of(OWNERS[owner])[name]
    assert len(declared.help.split()) >= 2
    assert declared.describe().startswith(declared.help)
    assert default is not dataclasses.MISSING
    if kind in (int, float):
        assert declared.range_text(), "a number without a range"


@every_method
def test_every_field_is_an_option(method: str) -> None:
    # `sites` holds options itself.
    assert set(options_of(get(method))) == {field.name for field in dataclasses.fields(get(method))} - {"sites", "refinements"}


@every_method
def test_methods_are_frozen_hashable_and_documented(method: str) -> None:
    cls = get(method)
    made = create(method)
    assert isinstance(made, Method)
    assert made == create(method)
    assert hash(made) == hash(create(method))
    assert cls.name == method
    assert isinstance(cls.paper, Paper)
    assert cls.paper.year > 2000
    assert cls.__doc__
    assert not cls.__doc__.startswith(cls.__name__ + "("), "the docstring is the one that dataclass makes up"
    assert getattr(qs.methods, cls.__name__) is cls
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.steps = 3


@every_method
def test_an_unknown_option_gets_the_nearest_name(method: str) -> None:
    with pytest.raises(OptionError, match=r"unknown option.*'stesp'.*did you mean 'steps'"):
        create(method, stesp=3)


def test_an_unknown_method_gets_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'potential_init'"):
        create("potential-intt")


@every_method
@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_fewer_than_one_step_is_refused(method: str, steps: Any, digits_source: nn.Module, digits_calibration: Tensor) -> None:
    with pytest.raises(OptionError, match="steps"):
        qs.convert(digits_source, digits_calibration, method, steps=steps)


# Conversion


@every_method
@pytest.mark.parametrize("training", [False, True])
def test_the_source_is_untouched(method: str, training: bool, digits_source: nn.Module, digits_calibration: Tensor) -> None:
    source = copy.deepcopy(digits_source).train(training)
    source[1].eval()
    source[0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    modes = [module.training for module in source.modules()]
    learn = [parameter.requires_grad for parameter in source.parameters()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in source.modules()]
    images = digits_calibration[:64].clone()
    generator = torch.get_rng_state()
    qs.convert(source, images, method, steps=2)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(images, digits_calibration[:64])
    assert state.keys() == source.state_dict().keys()
    for name, value in source.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [module.training for module in source.modules()] == modes
    assert [parameter.requires_grad for parameter in source.parameters()] == learn
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in source.modules()] == hooks
    assert all(parameter.grad is None for parameter in source.parameters())


@every_method
def test_the_spiking_network_does_not_share_memory_with_the_source(
    method: str, digits_source: nn.Module, digits_calibration: Tensor
) -> None:
    source = copy.deepcopy(digits_source)
    snn = qs.convert(source, digits_calibration[:64], method, steps=2)
    shared = {value.data_ptr() for value in source.state_dict().values()} & {value.data_ptr() for value in snn.state_dict().values()}
    assert not shared
    assert not any(module.training for module in snn.modules())


@every_method
def test_conversion_is_deterministic(
    method: str, digits_source: nn.Module, digits_calibration: Tensor, spiking_digits: Converted, digits_test: tuple[Tensor, Tensor]
) -> None:
    first, second = spiking_digits(method), qs.convert(digits_source, digits_calibration, method, steps=16)
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert (first.method, first.code, first.sites) == (second.method, second.code, second.sites)
    with torch.no_grad():
        assert torch.equal(first(digits_test[0][:20]), second(digits_test[0][:20]))


@every_method
def test_the_network_knows_how_it_was_made(method: str, spiking_digits: Converted, digits_calibration: Tensor) -> None:
    snn = spiking_digits(method)
    assert Method.from_json(json.loads(json.dumps(snn.method))) == create(method, steps=16)
    assert snn.provenance["calibration_images"] == len(digits_calibration)
    assert snn.provenance["source"] == "Sequential"
    json.dumps(snn.provenance, allow_nan=False)


@every_method
def test_a_method_object_and_its_name_give_the_same(
    method: str, digits_source: nn.Module, digits_calibration: Tensor, spiking_digits: Converted
) -> None:
    made = qs.convert(digits_source, digits_calibration, get(method)(steps=16))
    for name, value in spiking_digits(method).state_dict().items():
        assert torch.equal(value, made.state_dict()[name]), name
    with pytest.raises(OptionError, match="steps"):
        qs.convert(digits_source, digits_calibration, get(method)(), steps=3)


@every_method
def test_accuracy_stays_within_two_points(
    method: str, spiking_digits: Converted, digits_source: nn.Module, digits_test: tuple[Tensor, Tensor]
) -> None:
    images, labels = digits_test
    with torch.no_grad():
        run = spiking_digits(method).run(images)
        reference = digits_source(images).argmax(1)
    own = float((run.logits[-1].argmax(1) == labels).double().mean())
    source = float((reference == labels).double().mean())
    assert source > 0.95
    assert own >= source - 0.02
    assert all(0.01 < rate < 0.9 for rate in run.rates.values()), run.rates


@every_method
def test_the_report_agrees_with_a_plain_loop(
    method: str, spiking_digits: Converted, digits: DataSet, digits_source: nn.Module, digits_test: tuple[Tensor, Tensor]
) -> None:
    images, labels = digits_test[0][:100], digits_test[1][:100]
    report = qs.evaluate(spiking_digits(method), digits.loader("test", 40, limit=100), digits_source, (1, 4, 16), device="cpu")
    snn = spiking_digits(method)
    with torch.no_grad():
        run = snn.run(images)
        answer = digits_source(images).argmax(1)
        logits = {steps: snn.with_steps(steps).run(images).logits[-1] if snn.synchronous else run.logits[steps - 1] for steps in (1, 4, 16)}
    for steps in (1, 4, 16):
        chosen = logits[steps].argmax(1)
        assert report.latency[steps] == (snn.with_steps(steps).latency if snn.synchronous else steps)
        assert report.accuracy[steps] == pytest.approx(100 * float((chosen == labels).double().mean()), abs=1.01)
        assert report.agreement[steps] == pytest.approx(100 * float((chosen == answer).double().mean()), abs=1.01)
    assert report.reference_accuracy == pytest.approx(100 * float((answer == labels).double().mean()), abs=1.01)
    assert report.rates == pytest.approx(run.rates, abs=1e-3)
    assert report.samples == 100


@every_method
def test_both_simulations_agree(method: str, spiking_digits: Converted, digits_test: tuple[Tensor, Tensor]) -> None:
    snn, images = copy.deepcopy(spiking_digits(method)).double(), digits_test[0][:16].double()
    if snn.synchronous:
        with pytest.raises(ConversionError, match="step_by_step"):
            simulate(snn, images, step_by_step=True)
        return
    with torch.no_grad():
        run, stepped = simulate(snn, images), simulate(snn, images, step_by_step=True)
    assert torch.allclose(run.logits, stepped.logits, rtol=0, atol=1e-10)
    for site, counts in run.spikes.items():
        assert torch.equal(counts, stepped.spikes[site])


@every_method
def test_the_second_batch_equals_a_fresh_models(
    method: str, spiking_digits: Converted, digits_source: nn.Module, digits_calibration: Tensor, digits_test: tuple[Tensor, Tensor]
) -> None:
    first, second = digits_test[0][:20], digits_test[0][20:40]
    used = copy.deepcopy(spiking_digits(method))
    fresh = qs.convert(digits_source, digits_calibration, method, steps=16)
    with torch.no_grad():
        used.run(first)
        again, expected = used.run(second), fresh.run(second)
    assert torch.equal(again.logits, expected.logits)
    for site, counts in expected.spikes.items():
        assert torch.equal(again.spikes[site], counts)


@every_method
def test_checkpoints_are_bit_exact(method: str, spiking_digits: Converted, digits_test: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    snn = copy.deepcopy(spiking_digits(method))
    path = tmp_path / "network.safetensors"
    snn.save(path)
    loaded = qs.load(path)
    assert snn.state_dict().keys() == loaded.state_dict().keys()
    for name, value in snn.state_dict().items():
        assert value.dtype == loaded.state_dict()[name].dtype
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert (loaded.method, loaded.provenance, loaded.sites) == (snn.method, snn.provenance, snn.sites)
    assert (loaded.steps, loaded.input_shape) == (snn.steps, snn.input_shape)
    with torch.no_grad():
        before, after = snn.run(digits_test[0][:50]), loaded.run(digits_test[0][:50])
    assert torch.equal(before.logits, after.logits)
    for site, counts in before.spikes.items():
        assert torch.equal(counts, after.spikes[site])


@every_method
def test_a_fine_tuned_network_can_be_saved(
    method: str, spiking_digits: Converted, digits_test: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """A threshold that training pushed below 0 still acts as a positive one; its file must load."""
    snn = copy.deepcopy(spiking_digits(method))
    with torch.no_grad():
        snn.neuron(snn.sites[0].name).threshold.reshape(-1)[0].fill_(-0.25)
    snn.save(tmp_path / "network.safetensors")
    loaded = qs.load(tmp_path / "network.safetensors")
    with torch.no_grad():
        assert torch.equal(snn(digits_test[0][:10]), loaded(digits_test[0][:10]))


# Calibration data


@every_method
def test_all_forms_of_calibration_data_give_the_same(
    method: str, digits_source: nn.Module, digits_calibration: Tensor, spiking_digits: Converted
) -> None:
    batches = list(digits_calibration.split(70))
    labels = [torch.zeros(len(batch), dtype=torch.int64) for batch in batches]

    def generator() -> Iterator[Tensor]:
        yield from batches

    forms = {
        "generator": generator(),
        "list": batches,
        "pairs": list(zip(batches, labels, strict=True)),
        "dict": [{"image": batch, "label": label} for batch, label in zip(batches, labels, strict=True)],
        "pixel_values": iter([{"pixel_values": batch} for batch in batches]),
        "loader": torch.utils.data.DataLoader(digits_calibration, batch_size=300),
    }
    expected = spiking_digits(method).state_dict()
    for form, data in forms.items():
        snn = qs.convert(digits_source, data, method, steps=16)
        assert snn.provenance["calibration_images"] == len(digits_calibration), form
        for name, value in snn.state_dict().items():
            assert torch.allclose(value, expected[name], rtol=1e-4), (form, name)


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch", [0, 1])
def test_bad_values_in_calibration_images_are_refused(
    method: str, batch: int, bad: float, digits_source: nn.Module, digits_calibration: Tensor
) -> None:
    batches = [images.clone() for images in digits_calibration[:40].split(20)]
    batches[batch][3, 0, 2, 2] = bad
    with pytest.raises(DataError, match=f"calibration batch {batch + 1}.*NaN"):
        qs.convert(digits_source, batches, method, steps=2)


@every_method
def test_unusable_calibration_data_is_refused(method: str, digits_source: nn.Module, digits_calibration: Tensor) -> None:
    images = digits_calibration[:10]
    cases: list[tuple[Any, str]] = [
        ([], "empty"),
        (iter([]), "empty"),
        (images[:0], "at least one sample"),
        ([images, images[:0]], "at least one sample"),
        ([images, images[:, :, :4]], "must be alike"),
        ([(images * 255).byte()], "floating point"),
        ([{"picture": images}], "picture"),
        (["image.png"], "str"),
        (3, "int"),
        (images[:, :, :4, :4], "cannot run"),
    ]
    for data, message in cases:
        with pytest.raises(DataError, match=message):
            qs.convert(digits_source, data, method, steps=2)


@every_method
def test_a_used_up_generator_is_refused(method: str, digits_source: nn.Module, digits_calibration: Tensor) -> None:
    data = iter([digits_calibration[:10]])
    qs.convert(digits_source, data, method, steps=2)
    with pytest.raises(DataError, match=r"empty|used up"):
        qs.convert(digits_source, data, method, steps=2)


@every_method
def test_one_image_and_a_black_image_are_enough(method: str, digits_source: nn.Module, digits_calibration: Tensor) -> None:
    for images in (digits_calibration[:1], torch.zeros_like(digits_calibration[:1])):
        snn = qs.convert(digits_source, images, method, steps=2)
        with torch.no_grad():
            assert torch.isfinite(snn(digits_calibration[:4])).all()
        for site in snn.sites:
            assert snn.neuron(site.name).threshold.min() > 0


# Training


TRAINED: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS),
    ("rate_norm", {"unit_spikes": True, "speed_epochs": 1}),
    ("rate_encoded", {"encode_input": True, "clamp_epochs": 1}),
    ("rate_encoded", {"synchronous": False}),
    ("rate_encoded", {"train_thresholds": True}),
    ("diet_snn", {"longer": 3, "height": "unit"}),
    ("qcfs", {"granularity": "channel"}),
]


class Stages(Silent):
    """Notes the stages that begin, and the epochs that are done."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.epochs = dict[str, int]()

    def begin(self, stage: str, samples: int) -> None:
        self.begun.append(stage)

    def row(self, stage: str, row: dict[str, float]) -> None:
        assert math.isfinite(row["loss"])
        self.epochs[stage] = int(row["epoch"])


@pytest.mark.parametrize(("method", "options"), TRAINED, ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain")
def test_a_method_trains_converts_and_tunes(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """An epoch of 128 images: everything that a method says of its stages happens, and what comes out works."""
    data = load_data("digits", preprocessing=Preprocessing((0.0,), (1.0,)))
    few = copy.copy(data.train)
    few.pixels, few.labels = few.pixels[:128], few.labels[:128]
    made, stages = create(method, steps=2, **options), Stages()
    settings = Training(epochs=1, batch_size=64, learning_rate=0.01, validation=0, clip=1.0)
    trainer = Trainer(fabric=make_fabric("cpu"), data=dataclasses.replace(data, train=few), settings=settings, watcher=stages)
    source = digits_cnn(width=4).eval()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    images = ImageStream(data.loader("train", limit=64))
    ann = fit(source, images, made, trainer)
    assert stages.begun == list(made.stages())
    expected = {name: changes.get("epochs", 1) for name, changes in made.stages().items()}
    snn = finish(ann, images, made)
    tuned = tune(snn, trainer)
    assert stages.begun == [*made.stages(), *made.tuning_stages()]
    expected |= {name: changes.get("epochs", 1) for name, changes in made.tuning_stages().items()}
    assert stages.epochs == expected
    # The source is as it was, and each stage learned something.
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    untrained = finish(fit(source, images, made), images, made).state_dict()
    weights = [name for name, value in snn.state_dict().items() if value.ndim > 1 and name.endswith("weight")]
    assert len(weights) > 3
    for name in weights:
        assert not torch.equal(snn.state_dict()[name], untrained[name]), name
        assert not torch.equal(snn.state_dict()[name], tuned.state_dict()[name]), name
    assert all(bool(torch.isfinite(value).all()) for value in tuned.state_dict().values())
    assert all(float(neuron.threshold.detach().min()) > 0 for neuron in tuned.neurons().values())
    tuned.save(tmp_path / "network.safetensors")
    loaded = qs.load(tmp_path / "network.safetensors")
    test_images = next(iter(data.loader("test", limit=20)))[0]
    with torch.no_grad():
        assert torch.equal(loaded(test_images), tuned(test_images))
        assert loaded.run(test_images).logits.shape == (2, 20, 10)
    assert loaded.synchronous == snn.synchronous == (method == "rate_encoded" and not {"synchronous", "train_thresholds"} & set(options))


# C5: batch norm


@every_method
def test_c5_currents_of_folded_batch_norm_are_those_of_the_layer_at_every_step(method: str) -> None:
    """The spikes of one layer through convolution and batch norm in evaluation mode, step by step, in single precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 10)).eval()
        for norm in (network[1], network[4]):
            for values, low, high in (
                (norm.weight, 0.5, 2),
                (norm.bias, -0.3, 0.5),
                (norm.running_mean, -0.5, 0.5),
                (norm.running_var, 0.2, 3),
            ):
                nn.init.uniform_(values, low, high)
        images = torch.rand(6, 1, 8, 8)
    snn = qs.convert(network, images, method, steps=4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in snn.modules())
    seen = dict[str, tuple[Tensor, Tensor]]()
    for name, neuron in snn.neurons().items():
        neuron.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: (inputs[0], out)}))
    with torch.no_grad():
        snn(images)
        (first_current, first_out), (second_current, _) = (seen[site.name] for site in snn.sites)
        torch.testing.assert_close(first_current, network[1](network[0](images)), rtol=1e-5, atol=1e-5)
        outputs, currents = (values.unflatten(0, (4, -1)) for values in (first_out, second_current))
        assert bool(outputs.any())
        for step in range(4):
            torch.testing.assert_close(currents[step], network[4](network[3](outputs[step])), rtol=1e-5, atol=1e-5)
