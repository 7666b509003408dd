"""The measurements, on networks whose right answers follow from their construction."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
import quickspike.simulation
from quickspike import evaluation
from quickspike.anatomy import anatomy_of
from quickspike.errors import DataError, OptionError
from quickspike.evaluation import Report
from quickspike.report import accuracy_table, plot_accuracy, report_tables


class Direct(nn.Module):
    """Three inputs, a neuron each, and the rates as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(3))
            self.head.weight.copy_(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu())


def direct(steps: int = 4) -> qs.SpikingNetwork:
    """Theta = 1, v(0) = 0: a neuron with input x has fired floor(t x) times after step t."""
    snn = qs.convert(Direct(), torch.rand(8, 3, generator=torch.Generator().manual_seed(0)), steps=steps, granularity="layer")
    neuron = snn.neuron(snn.sites[0].name)
    with torch.no_grad():
        neuron.threshold.fill_(1.0)
        neuron.initial.fill_(0.0)
    return snn


# Inputs whose spikes can be counted by hand. Ties go to the lowest class, as in argmax.
IMAGES = torch.tensor(
    [
        [0.25, 0.50, 0.00],  # neuron 1 fires at 2 and 4, neuron 0 at 4: classes 0 1 1 1
        [1.00, 0.00, 0.00],  # neuron 0 fires at every step: classes 0 0 0 0
        [0.00, 0.25, 0.50],  # neuron 2 fires at 2 and 4, neuron 1 at 4: classes 0 2 2 2
        [0.00, 0.00, 0.25],  # neuron 2 fires at 4: classes 0 0 0 2
    ]
)
LABELS = torch.tensor([1, 0, 2, 2])
ACCURACY = {1: 25.0, 2: 75.0, 3: 75.0, 4: 100.0}
SPIKES = (1 + 2) + 4 + (1 + 2) + 1


def measure(snn: qs.SpikingNetwork, data: Any, *args: Any, **kwargs: Any) -> Report:
    return qs.evaluate(snn, data, *args, device="cpu", **kwargs)


def test_accuracy_agreement_and_rates_by_hand() -> None:
    report = measure(direct(), [(IMAGES, LABELS)], Direct(), steps=(1, 2, 3, 4))
    assert report.accuracy == ACCURACY
    assert report.reference_accuracy == 100.0
    assert report.agreement == ACCURACY
    assert report.samples == 4
    assert report.steps == (1, 2, 3, 4)
    assert list(report.rates.values()) == [SPIKES / (4 * 3 * 4)]
    assert report.seconds > 0


def test_agreement_is_with_the_reference_and_not_with_the_labels() -> None:
    reference = Direct()
    with torch.no_grad():
        reference.head.weight.copy_(torch.eye(3)[[1, 2, 0]])
    report = measure(direct(), [(IMAGES, LABELS)], reference, steps=(4,))
    # The permuted reference answers 0, 2, 1 and 1 where the truth is 1, 0, 2 and 2.
    assert report.reference_accuracy == 0.0
    assert report.agreement == {4: 0.0}
    assert report.accuracy == {4: 100.0}
    wrong = measure(direct(), [(IMAGES, torch.tensor([2, 1, 0, 0]))], Direct(), steps=(4,))
    assert (wrong.accuracy, wrong.reference_accuracy, wrong.agreement) == ({4: 0.0}, 0.0, {4: 100.0})


def test_without_a_reference_there_is_no_agreement() -> None:
    report = measure(direct(), [(IMAGES, LABELS)])
    assert report.reference_accuracy is None
    assert report.agreement == {}


@pytest.mark.parametrize(
    ("own", "expected"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (9, (1, 2, 4, 8, 9))]
)
def test_default_steps_are_powers_of_two_and_the_own(own: int, expected: tuple[int, ...]) -> None:
    assert measure(direct(own), [(IMAGES, LABELS)]).steps == expected


def test_steps_are_sorted_and_unique() -> None:
    report = measure(direct(), [(IMAGES, LABELS)], steps=[4, 1, 4, 2])
    assert report.steps == (1, 2, 4)
    assert report.accuracy == {step: ACCURACY[step] for step in (1, 2, 4)}


def test_fewer_steps_than_the_own_give_the_rates_up_to_the_largest() -> None:
    snn = direct()
    report = measure(snn, [(IMAGES, LABELS)], steps=[1, 2])
    assert report.accuracy == {1: ACCURACY[1], 2: ACCURACY[2]}
    # Up to step 2: one spike of the first image, two of the second, one of the third.
    assert list(report.rates.values()) == [4 / (4 * 3 * 2)]
    assert snn.steps == 4


def test_more_steps_than_the_own_run_longer_with_the_same_thresholds() -> None:
    snn = direct()
    report = measure(snn, [(IMAGES, LABELS)], steps=(1, 4, 8))
    assert report.accuracy == {1: ACCURACY[1], 4: ACCURACY[4], 8: 100.0}
    # Every input is a multiple of 1/4, so that 8 steps fire exactly twice as often as 4.
    assert list(report.rates.values()) == [2 * SPIKES / (4 * 3 * 8)]
    assert snn.steps == 4
    assert report.rates == measure(snn.with_steps(8), [(IMAGES, LABELS)]).rates


@pytest.mark.parametrize("steps", [[0], [-1], [1, 0], [1.0], [True], ["2"], [], ()])
def test_steps_below_one_or_not_whole_are_refused(steps: Any) -> None:
    with pytest.raises(OptionError, match="steps"):
        measure(direct(), [(IMAGES, LABELS)], steps=steps)


# Against a direct computation


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.drop, self.norm = nn.Dropout(), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        x = self.drop(self.norm(self.conv2(x)).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, qs.SpikingNetwork, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(23, 2, 6, 6, generator=generator), torch.randint(0, 5, (23,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small()
        model(images)
    return model, qs.convert(model, images, steps=4), images, labels


def same(one: Report, other: Report) -> None:
    for name in ("samples", "steps", "accuracy", "reference_accuracy", "agreement", "rates", "method", "provenance"):
        assert getattr(one, name) == getattr(other, name), name


def test_equals_a_direct_computation(small: Any) -> None:
    model, snn, images, labels = small
    model.train()
    report = measure(snn, [(images[:10], labels[:10]), (images[10:], labels[10:])], model)
    assert model.training
    with torch.no_grad():
        run, answer = snn.run(images), copy.deepcopy(model).eval()(images).argmax(1)
    for step in report.steps:
        chosen = run.logits[step - 1].argmax(1)
        assert report.accuracy[step] == 100 * int((chosen == labels).sum()) / 23
        assert report.agreement[step] == 100 * int((chosen == answer).sum()) / 23
    assert report.reference_accuracy == 100 * int((answer == labels).sum()) / 23
    assert report.rates == pytest.approx(run.rates, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 300, 72 * 4 * 7, 10**9])
def test_chunking_changes_nothing(chunk: int, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, snn, images, labels = small
    whole = measure(snn, [(images, labels)], model)
    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    same(measure(snn, [(images, labels)], model), whole)


def test_batching_and_the_form_of_the_data_change_nothing(small: Any) -> None:
    model, snn, images, labels = small
    whole = measure(snn, [(images, labels)], model)
    pieces = list(zip(images.split(4), labels.split(4), strict=True))
    forms: list[Any] = [
        pieces,
        iter(pieces),
        [{"image": a, "label": b} for a, b in pieces],
        [(a, b.to(torch.int32)) for a, b in pieces],
        [(a, b.to(torch.uint8)) for a, b in pieces],
        [(a, b.tolist()) for a, b in pieces],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=5),
    ]
    for form in forms:
        same(measure(snn, form, model), whole)


def test_neither_network_is_modified(small: Any) -> None:
    model, snn, images, labels = small
    model.train()
    before = [copy.deepcopy(network.state_dict()) for network in (model, snn)]
    strides = [parameter.stride() for parameter in snn.parameters()]
    random_state = torch.get_rng_state()
    measure(snn, [(images, labels)], model, steps=(1, 9))
    for network, state in zip((model, snn), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert [parameter.stride() for parameter in snn.parameters()] == strides
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert not snn.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_an_evaluated_network_can_still_be_trained(small: Any) -> None:
    model, snn, images, labels = small
    measure(snn, [(images, labels)], model)
    torch.nn.functional.cross_entropy(snn(images), labels).backward()
    assert all(parameter.grad is not None for name, parameter in snn.named_parameters() if name.endswith("weight"))
    snn.zero_grad(set_to_none=True)


# What is refused


@pytest.mark.parametrize(
    ("labels", "rule"),
    [
        (torch.tensor([0, 1, 2, 3]), r"0\.\.3.*3 classes"),
        (torch.tensor([0, 1, -1, 2]), r"-1\.\.2"),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), "float32"),
        (torch.tensor([0, 1, 2]), "4 whole numbers"),
        (torch.tensor([[0], [1], [2], [0]]), "4 whole numbers"),
        (torch.eye(4, 3, dtype=torch.int64), "4 whole numbers"),
        (torch.tensor(1), "4 whole numbers"),
        (torch.tensor([True, False, True, False]), "bool"),
        (None, "no labels"),
    ],
    ids=["too high", "negative", "float", "too few", "column", "one-hot", "scalar", "bool", "missing"],
)
def test_bad_labels_are_refused_with_the_batch_number(labels: Tensor | None, rule: str) -> None:
    bad = IMAGES if labels is None else (IMAGES, labels)
    with pytest.raises(DataError, match=rule) as caught:
        measure(direct(), [(IMAGES, LABELS), bad])
    assert "batch 2" in str(caught.value)


def test_a_tensor_alone_has_no_labels() -> None:
    with pytest.raises(DataError, match="no labels"):
        measure(direct(), IMAGES)


@pytest.mark.parametrize("data", [[], iter([]), {}])
def test_no_data_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match="empty"):
        measure(direct(), data)


@pytest.mark.parametrize(
    "images",
    [IMAGES * float("nan"), IMAGES[:0], IMAGES.byte(), torch.zeros(4, 2), torch.zeros(4, 3, 1), torch.zeros(4), IMAGES.numpy()],
    ids=["NaN", "empty", "uint8", "features", "axes", "one axis", "array"],
)
def test_bad_images_are_refused(images: Any) -> None:
    with pytest.raises(DataError):
        measure(direct(), [{"image": images, "label": LABELS}])


def test_images_of_another_size_are_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).relu().flatten(1))

    snn = qs.convert(Flat(), torch.rand(3, 1, 6, 6), steps=2)
    with pytest.raises(DataError, match=r"\[2, 1, 28, 28\]|28"):
        measure(snn, [(torch.rand(2, 1, 28, 28), torch.tensor([0, 1]))])


def test_a_reference_that_cannot_take_the_images_or_has_other_classes_is_refused() -> None:
    for reference in (nn.Linear(7, 3), nn.Linear(3, 5), nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 3, 1))):
        with pytest.raises((DataError, OptionError)):
            measure(direct(), [(IMAGES, LABELS)], reference)


def test_a_network_without_classes_is_refused() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())

    snn = qs.convert(Dense(), torch.rand(3, 1, 4, 4), steps=2)
    with pytest.raises(DataError, match="logits"):
        measure(snn, [(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))])


@pytest.mark.parametrize(("device", "precision"), [("abacus", "32-true"), ("cpu", "3-true"), ("", "32-true")])
def test_an_unknown_device_or_precision_is_refused(device: str, precision: str) -> None:
    with pytest.raises(OptionError, match=f"{device!r}.*{precision!r}"):
        qs.evaluate(direct(), [(IMAGES, LABELS)], device=device, precision=precision)


# Engines, memory, errors of the layers


def test_an_engine_in_half_precision(small: Any) -> None:
    _, snn, images, labels = small
    report = measure(snn, [(images, labels)], engine="fused", engine_precision="bf16")
    assert report.settings["engine"]["precision"] == "bf16"
    with pytest.raises(OptionError, match="engine_precision='bf16' needs an engine"):
        measure(snn, [(images, labels)], engine_precision="bf16")
    with pytest.raises(OptionError, match="precision must be fp32, or bf16 with the fused engine"):
        measure(snn, [(images, labels)], engine="integer", engine_precision="bf16")


@pytest.mark.parametrize("engine", [None, "fused"])
def test_memory_is_a_bound_that_changes_no_figure(engine: Any, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, snn, images, labels = small
    budgets: list[int] = []
    real = quickspike.simulation.parts

    def watched(network: qs.SpikingNetwork, images: Tensor, memory: int, **more: Any) -> Any:
        budgets.append(memory)
        return real(network, images, memory, **more)

    monkeypatch.setattr(quickspike.simulation, "parts", watched)
    report = measure(snn, [(images, labels)], engine=engine, memory="100kB")
    same(report, measure(snn, [(images, labels)], engine=engine))
    assert set(budgets) == {100_000}
    assert report.settings["memory"] == "100kB"
    assert snn.memory is None
    with pytest.raises(OptionError, match="memory must be a number"):
        measure(snn, [(images, labels)], memory="much")
    with pytest.raises(OptionError, match="more than the"):
        measure(snn, [(images, labels)], memory="10B")


def test_the_layers_say_where_the_error_comes_from(small: Any) -> None:
    model, snn, images, labels = small
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    assert measure(snn, batches).layers == {}
    report = measure(snn, batches, model, steps=(1, 2), anatomy=10, engine="fused")
    wanted = anatomy_of(snn.with_steps(2), images[:10])
    assert list(report.layers) == [site.name for site in snn.sites]
    assert report.anatomy is not None
    assert (report.anatomy.images, report.anatomy.steps) == (10, 2)
    for one in wanted.sites:
        assert report.layers[one.site].error == pytest.approx(one.error, rel=1e-5)
    assert report.to_json()["anatomy"]["sites"][0]["site"] == snn.sites[0].name
    with pytest.raises(OptionError, match="anatomy must be"):
        measure(snn, batches, anatomy=-1)


# What becomes of a report


def test_a_report_is_plain_json(small: Any) -> None:
    model, snn, images, labels = small
    report = measure(snn, [(images, labels)], model)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["accuracy"] == {str(step): value for step, value in report.accuracy.items()}
    assert data["agreement"] == {str(step): value for step, value in report.agreement.items()}
    assert data["rates"] == report.rates
    assert data["method"]["name"] == "threshold_balancing"
    assert data["settings"]["device"] == "cpu"
    assert data["settings"]["versions"]["torch"] == torch.__version__
    assert set(data) == set(Report.__dataclass_fields__) - {"anatomy", "members"}
    assert all(type(value) is float for value in (*report.accuracy.values(), *report.agreement.values(), *report.rates.values()))


def test_a_report_does_not_share_its_data_with_the_network(small: Any) -> None:
    _, snn, images, labels = small
    snn = copy.deepcopy(snn)
    report = measure(snn, [(images, labels)])
    snn.provenance["later"] = 1
    snn.method["name"] = "another"
    assert "later" not in report.provenance
    assert report.method["name"] == "threshold_balancing"


def test_tables_and_picture_show_the_numbers(small: Any, tmp_path: Any) -> None:
    from rich.console import Console

    model, snn, images, labels = small
    steps = tuple(range(1, 13))
    report = measure(snn, [(images, labels)], model, steps=steps)
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(report_tables(report))
    console.print(accuracy_table({"a": report}))
    console.file.close()
    text = console.export_text()
    assert "…" not in text, "numbers must not be cut where the terminal is narrow"
    for step in steps:
        assert f"{report.accuracy[step]:.2f}" in text
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    plot_accuracy({"a": report}, first)
    plot_accuracy({"a": report}, second)
    assert first.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert first.read_bytes() == second.read_bytes()
