"""Learning a teacher's answers: the distance, what it is mixed with, whose answers they are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quickspike as qs
from quickspike.api import finish, fit, train, tune
from quickspike.conversion import prepare
from quickspike.data import DataSet, ImageStream
from quickspike.errors import CheckpointError, DataError, OptionError
from quickspike.evaluation import make_fabric
from quickspike.features import distance, watched
from quickspike.graph import trace
from quickspike.method import all_methods, create
from quickspike.training import Trainer, Training, divergence
from quickspike.tuning import Tuning

PLAIN = {"epochs": 1, "batch_size": 100, "learning_rate": 0.05, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


@pytest.fixture
def trainer(digits: DataSet) -> Callable[..., Trainer]:
    """On 400 digits; `labels` are put in the place of the true ones."""

    def make(labels: Tensor | None = None, folder: Path | None = None, resume: bool = False, **settings: Any) -> Trainer:
        images = copy.copy(digits.train)
        images.pixels, images.labels = images.pixels[:400], images.labels[:400] if labels is None else labels
        data = dataclasses.replace(digits, train=images)
        return Trainer(fabric=make_fabric("cpu"), data=data, settings=Training(**(PLAIN | settings)), folder=folder, resume=resume)

    return make


def net(seed: int, classes: int = 10) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, classes))
        return nn.Sequential(*layers).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# The distance


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_distance_is_that_of_the_definition(temperature: float) -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 7, 5, dtype=torch.float64)
    p, q = ((values / temperature).softmax(1) for values in (wanted, logits))
    expected = (p * (p / q).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(divergence(logits, wanted, temperature), expected)


def test_the_distance_is_zero_for_the_same_answers_and_shifts_change_nothing() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.arange(4, dtype=torch.float64).unsqueeze(1)
    assert float(divergence(logits + shift, logits, 3.0)) == pytest.approx(0, abs=1e-12)
    assert float(divergence(logits * 2, logits, 3.0)) > 0.01


def test_its_gradient_at_a_high_temperature_is_that_of_squared_differences() -> None:
    """Hinton et al., equation 4: for logits of mean zero, (v - w)/K. The size does not fall with the temperature."""
    torch.manual_seed(0)
    logits, wanted = (values - values.mean(1, keepdim=True) for values in torch.randn(2, 1, 5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(divergence(logits.requires_grad_(), wanted, 1e4), logits)
    torch.testing.assert_close(gradient, (logits.detach() - wanted) / 5, rtol=1e-3, atol=1e-5)


# What it is mixed with


def test_at_share_1_labels_do_not_matter(trainer: Callable[..., Trainer], digits: DataSet) -> None:
    teacher, wrong = net(1), (digits.train.labels[:400] + 3) % 10
    one, other = (
        train(net(0), dataclasses.replace(trainer(labels, distill=1.0, label_smoothing=0.1), teacher=teacher))[0]
        for labels in (None, wrong)
    )
    assert same(one, other)
    one, other = (train(net(0), dataclasses.replace(trainer(labels, distill=0.9), teacher=teacher))[0] for labels in (None, wrong))
    assert not same(one, other)


def test_the_share_weighs_labels_against_answers(trainer: Callable[..., Trainer]) -> None:
    """One step on one batch: the change of the weights is the mixture of the changes that either loss makes."""
    teacher, start = net(1), net(0)

    def change(share: float) -> Tensor:
        made = dataclasses.replace(trainer(distill=share, batch_size=400, temperature=3.0), teacher=teacher)
        return train(start, made)[0].state_dict()["4.weight"] - start.state_dict()["4.weight"]

    torch.testing.assert_close(change(0.25), 0.75 * change(0.0) + 0.25 * change(1.0), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(change(0.0), change(1.0), atol=1e-4)


def test_the_step_is_the_one_of_the_loss_written_out(trainer: Callable[..., Trainer]) -> None:
    made = dataclasses.replace(trainer(distill=0.5, temperature=2.0, batch_size=400), teacher=net(1))
    trained, history = train(net(0), made)
    images, labels = made.data.train.pixels.float(), made.data.train.labels
    batch = torch.cat([images for images, _ in made.data.loader("train")])
    assert len(images) == len(batch)
    student, teacher = net(0).train(), net(1)
    logits = student(batch)
    p, q = (teacher(batch).detach() / 2).softmax(1), (logits / 2).log_softmax(1)
    loss = 0.5 * F.cross_entropy(logits, labels) + 0.5 * 4 * (p * (p.log() - q)).sum(1).mean()
    loss.backward()
    assert history.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = student[4].weight - 0.05 * student[4].weight.grad
    torch.testing.assert_close(trained.state_dict()["4.weight"], expected.detach(), rtol=1e-4, atol=1e-6)


# Whose answers


def test_a_method_learns_the_answers_of_the_source_network(trainer: Callable[..., Trainer], digits: DataSet) -> None:
    source, images = net(0), ImageStream(digits.loader("train", limit=50))
    before = copy.deepcopy(source)
    made = trainer(distill=1.0)
    own = fit(source, images, create("qcfs", steps=2), made)
    given = fit(source, images, create("qcfs", steps=2), dataclasses.replace(made, teacher=copy.deepcopy(source)))
    foreign = fit(source, images, create("qcfs", steps=2), dataclasses.replace(made, teacher=net(1)))
    assert same(own.module, given.module)
    assert not same(own.module, foreign.module)
    assert same(source, before)


def test_tuning_brings_answers_closer_to_the_teachers(trainer: Callable[..., Trainer], digits_source: nn.Module, digits: DataSet) -> None:
    snn = qs.convert(digits_source, digits.loader("train", limit=200), "ultra_low_latency", steps=2)
    before = copy.deepcopy(digits_source)
    tuned = tune(snn, trainer(distill=1.0, epochs=2, learning_rate=0.002, momentum=0.9), teacher=digits_source)
    images = torch.cat([batch for batch, _ in digits.loader("test")])
    with torch.no_grad():
        wanted = digits_source(images)
        distances = [float(divergence(network.run(images).logits[-1], wanted, 2.0)) for network in (snn, tuned)]
    assert distances[1] < 0.7 * distances[0]
    assert same(digits_source, before)


def test_without_a_teacher_nothing_begins(trainer: Callable[..., Trainer], digits: DataSet, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^distill=0\.5 needs a teacher"):
        train(net(0), trainer(distill=0.5, folder=tmp_path))
    with pytest.raises(OptionError, match=r"^distill=0\.5 and distill_features=2 needs a teacher"):
        train(net(0), trainer(distill=0.5, distill_features=2.0, folder=tmp_path))
    snn = qs.convert(net(0), digits.loader("train", limit=50), steps=2)
    with pytest.raises(OptionError, match=r"distill=0\.5 needs a teacher"):
        tune(snn, trainer(distill=0.5, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_classes_is_refused(trainer: Callable[..., Trainer]) -> None:
    made = dataclasses.replace(trainer(distill=0.5), teacher=net(1, classes=7))
    with pytest.raises(DataError, match=r"the teacher answers \[100, 7\], the network \[100, 10\]"):
        train(net(0), made)


class Answering(nn.Module):
    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("teacher", "text"),
    [
        (Answering(torch.full((100, 10), torch.nan)), "NaN or infinity"),
        (Answering({"logits": "zeros"}), r"finite logits \[B, K\], got dict"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 10)), r"the teacher cannot take images \[100, 1, 8, 8\]"),
    ],
)
def test_answers_that_cannot_be_learned_are_refused(teacher: nn.Module, text: str, trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(DataError, match=text):
        train(net(0), dataclasses.replace(trainer(distill=0.5), teacher=teacher))


def test_the_teacher_that_is_named_goes_before_the_trainers(trainer: Callable[..., Trainer], digits: DataSet) -> None:
    snn = qs.convert(net(0), digits.loader("train", limit=50), steps=2)
    made = trainer(distill=1.0, learning_rate=0.001)
    named = tune(snn, dataclasses.replace(made, teacher=net(2)), teacher=net(1))
    assert same(named, tune(snn, made, teacher=net(1)))
    assert same(named, tune(snn, dataclasses.replace(made, teacher=net(1))))
    assert not same(named, tune(snn, made, teacher=net(2)))


def test_a_checkpoint_knows_its_teacher(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    first = dataclasses.replace(trainer(distill=0.5, folder=tmp_path), teacher=net(1))
    trained, _ = train(net(0), first)
    again, _ = train(net(0), dataclasses.replace(first, teacher=copy.deepcopy(net(1)), resume=True))
    assert same(trained, again)
    with pytest.raises(CheckpointError, match="teacher="):
        train(net(0), dataclasses.replace(first, teacher=net(2), resume=True))


# Features


def test_the_distance_of_features_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    student = {"a": torch.randn(4, 3, 2, 2, dtype=torch.float64), "b": torch.randn(4, 5, dtype=torch.float64)}
    teacher = {name: torch.randn_like(values) for name, values in student.items()}
    shares = [((student[name] - teacher[name]) ** 2).sum() / (teacher[name] ** 2).sum() for name in "ab"]
    torch.testing.assert_close(distance(student, teacher), (shares[0] + shares[1]) / 2)
    # Layers count alike, however large their activations are.
    torch.testing.assert_close(
        distance(student | {"a": 100 * student["a"]}, teacher | {"a": 100 * teacher["a"]}), distance(student, teacher)
    )
    assert float(distance(teacher, teacher)) == 0


def test_the_gradient_of_the_distance_of_features() -> None:
    torch.manual_seed(0)
    teacher = {"a": torch.randn(4, 3, dtype=torch.float64), "silent": torch.zeros(4, 2, dtype=torch.float64)}
    student = {name: torch.randn_like(values).requires_grad_() for name, values in teacher.items()}
    to_a, to_silent = torch.autograd.grad(distance(student, teacher), list(student.values()))
    torch.testing.assert_close(to_a, (student["a"] - teacher["a"]).detach() / (teacher["a"] ** 2).sum())
    assert bool((to_silent == 0).all())
    same_values = {name: values.clone().requires_grad_() for name, values in teacher.items()}
    for gradient in torch.autograd.grad(distance(same_values, teacher), list(same_values.values())):
        assert bool((gradient == 0).all())


def test_the_distance_of_features_in_half_precision_is_measured_in_single() -> None:
    student = {"a": torch.full((1000, 1000), 1.5, dtype=torch.bfloat16)}
    teacher = {"a": torch.ones(1000, 1000)}
    assert float(distance(student, teacher)) == pytest.approx(0.25, rel=1e-5)


def test_features_of_neurons_are_means_over_their_steps(digits_source: nn.Module, digits: DataSet) -> None:
    snn = qs.convert(digits_source, digits.loader("train", limit=200), steps=3)
    images = next(iter(digits.loader("test", limit=20)))[0]
    sites = [site.name for site in snn.sites]
    with torch.no_grad(), watched(snn.network, sites) as seen:
        snn(images)
    assert list(seen) == sites
    rates = snn.run(images).rates
    for name, values in seen.items():
        neuron = snn.neuron(name)
        share = (values / neuron.height(neuron.threshold).detach()).mean()
        assert float(share) == pytest.approx(rates[name], rel=1e-4)
    before = dict(seen)
    snn(images[:3])
    assert all(seen[name] is values for name, values in before.items())


METHODS = sorted(all_methods())


@pytest.mark.parametrize("method", METHODS)
def test_features_of_every_method_are_in_the_units_of_the_source(method: str, digits_source: nn.Module, digits: DataSet) -> None:
    """A network that does almost as well as its source gives almost what its source gives, layer by layer."""
    images = ImageStream(digits.loader("train", limit=300))
    chosen = create(method, steps=64, **({"levels": 64} if method == "qcfs" else {}))
    guide = trace(chosen.source(digits_source), images.example, pools_in_front=not chosen.pools_spikes)
    ann = fit(digits_source, images, chosen)
    snn = finish(ann, images, chosen)
    sites = [site.name for site in guide.sites]
    batch = images.example[:50]
    with torch.no_grad():
        seen = []
        for network, call in ((guide.module, guide.module), (ann.module, ann.module), (snn.network, snn)):
            with watched(network, sites) as given:
                call(batch)
            seen.append(given)
    assert float(distance(seen[1], seen[0])) < 0.1
    assert float(distance(seen[2], seen[0])) < 0.2
    wrong = {name: values * 2 for name, values in seen[2].items()}
    assert float(distance(wrong, seen[0])) > 0.5


def test_one_step_with_features_is_the_one_of_the_loss_written_out(trainer: Callable[..., Trainer]) -> None:
    source = net(0)
    made = trainer(distill_features=2.0, batch_size=400)
    images = ImageStream(made.data.loader("train"))
    batch, labels = torch.cat([batch for batch, _ in made.data.loader("train")]), made.data.train.labels
    method = create("qcfs", steps=2, levels=2)
    ann = prepare(trace(source, images.example, trainable=True), method)
    method.fit(ann, images)
    student = copy.deepcopy(ann.module).train().requires_grad_(True)
    history = dataclasses.replace(made, teacher=source, guide=trace(source, images.example))(ann.module, "ann")
    (site,) = ann.sites
    with watched(student, [site.name]) as given:
        logits = student(batch)
    wanted = source[:3](batch).detach()
    loss = F.cross_entropy(logits, labels) + 2 * ((given[site.name] - wanted) ** 2).sum() / (wanted**2).sum()
    loss.backward()
    assert history.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        moved = parameter - 0.05 * parameter.grad
        if name != f"{site.name}.mu":  # the ceiling has a weight decay of its own
            torch.testing.assert_close(ann.module.get_parameter(name), moved.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tuned", [False, True], ids=["fit", "tune"])
def test_learning_features_brings_layers_closer_to_the_teachers(
    tuned: bool, trainer: Callable[..., Trainer], digits_source: nn.Module, digits: DataSet
) -> None:
    images, before = ImageStream(digits.loader("train", limit=200)), copy.deepcopy(digits_source)
    snn = qs.convert(digits_source, digits.loader("train", limit=200), "qcfs", steps=2)
    guide = trace(digits_source, images.example)
    batch, distances = images.example, []
    for weight in (0.0, 20.0):
        made = trainer(distill_features=weight, epochs=4, learning_rate=0.01, momentum=0.9)
        student = tune(snn, made, teacher=digits_source) if tuned else fit(digits_source, images, create("qcfs", steps=2), made)
        network = student.network if isinstance(student, qs.SpikingNetwork) else student.module
        sites = [site.name for site in guide.sites]
        with torch.no_grad(), watched(network, sites) as given, watched(guide.module, sites) as wanted:
            guide.module(batch)
            (student if isinstance(student, qs.SpikingNetwork) else network)(batch)
        distances.append(float(distance(given, wanted)))
    assert distances[1] < 0.95 * distances[0]
    assert same(digits_source, before)


@pytest.mark.parametrize(("method", "options"), [("ultra_low_latency", {}), ("qcfs", {"weighted": True}), ("rate_encoded", {})])
def test_features_of_networks_with_max_pooling_and_shared_modules(
    method: str, options: dict[str, Any], trainer: Callable[..., Trainer], digits: DataSet
) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
            self.linear = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(self.relu(self.conv1(x)), 2)
            return self.linear(F.max_pool2d(F.relu(self.conv2(self.relu(self.conv2(x)))), 2).flatten(1))

    images = ImageStream(digits.loader("train", limit=100))
    chosen, source = create(method, steps=2, **options), Pooled().eval()
    snn = finish(fit(source, images, chosen), images, chosen)
    learned, plain = (tune(snn, trainer(distill_features=weight), teacher=source) for weight in (1.0, 0.0))
    assert not same(learned, plain)
    ann, other = (fit(source, images, chosen, trainer(distill_features=weight)).module for weight in (1.0, 0.0))
    assert not same(ann, other)


def test_features_that_cannot_be_learned_are_refused(trainer: Callable[..., Trainer], digits: DataSet) -> None:
    made = dataclasses.replace(trainer(distill_features=0.5), teacher=net(1))
    with pytest.raises(OptionError, match="training with a method and for fine-tuning"):
        train(net(0), made)
    snn = qs.convert(net(0), digits.loader("train", limit=50), steps=4)
    with pytest.raises(OptionError, match="leave chunk=2 out"):
        tune(snn, made, Tuning(chunk=2), net(1))
    # The answers alone can be learned by parts.
    tune(snn, trainer(distill=0.5), Tuning(chunk=2), net(1))
    deeper = nn.Sequential(*list(net(1)[:3]), nn.Conv2d(6, 6, 1), nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(54, 10)).eval()
    with pytest.raises(OptionError, match=r"no layer '5' as the teacher has"):
        tune(snn, made, teacher=deeper)
    wider = nn.Sequential(nn.Conv2d(1, 7, 3, stride=2), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(63, 10)).eval()
    with pytest.raises(DataError, match=r"the teacher gives \[100, 7, 3, 3\], the network \[100, 6, 3, 3\]"):
        tune(snn, made, teacher=wider)
