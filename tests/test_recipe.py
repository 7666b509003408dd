"""Recipes: what a file may say, what running it leaves behind, and that the figures are what the networks do."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quickspike as qs
import quickspike.training
from quickspike import recipe as recipe_module
from quickspike.augmentation import Augmentation
from quickspike.cli import main
from quickspike.errors import QuickspikeError
from quickspike.evaluation import make_fabric
from quickspike.files import OutputError
from quickspike.method import Method
from quickspike.models import load_model, preprocessing_of, save_weights
from quickspike.preprocessing import Preprocessing
from quickspike.recipe import Place, Recipe, RecipeError, plan, read_recipe, run_recipe, summarise
from quickspike.report import recipe_tables
from quickspike.training import Interrupted, Silent, Training
from quickspike.tuning import Tuning

TEXT = """
title = "digits with QCFS"
seeds = [0, 1]
model = "digits_cnn,width=4"
precision = "32-true"

[data]
name = "digits"
mean = [0.3]
std = [0.4]
calibration = 100

[method]
name = "qcfs"
steps = 2
levels = 2

[evaluate]
steps = [1, 2]

[source]
epochs = 2
batch_size = 100
learning_rate = 0.05

[train]
epochs = 1
batch_size = 256
optimiser = "adam"
learning_rate = 0.001

[tune]
epochs = 1
batch_size = 256
optimiser = "adam"
learning_rate = 0.0001
thresholds = false
dropout = 0.1

[augmentation]
noise = 0.01

[[published]]
steps = 2
accuracy = 77.5
ann = 88.25
source = "arXiv 0000.00000, table 1"
evidence = "paper"
network = "digits net"
"""


def without(table: str) -> str:
    """The recipe without a table."""
    return re.sub(rf"^\[+{table}\]+\n(?:[^\[\n].*\n)*", "", TEXT, flags=re.MULTILINE)


def of_seconds(data: dict[str, Any]) -> dict[str, Any]:
    """A run without what a clock said."""
    return {name: value for name, value in data.items() if name != "seconds"}


class Stages(Silent):
    """Which stages were begun, and how many epochs were done; presses Ctrl-C at a batch of the stage of that number."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.begun: list[str] = []
        self.stop, self.batches, self.epochs = stop, 0, 0

    def begin(self, stage: str, samples: int) -> None:
        self.begun.append(stage)
        self.batches = 0

    def row(self, stage: str, row: dict[str, float]) -> None:
        self.epochs += 1

    def advance(self, samples: int) -> None:
        self.batches += samples > 0
        if (len(self.begun), self.batches) == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def make(text: str, name: str = "recipe.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


@pytest.fixture(scope="module")
def fabric() -> Any:
    return make_fabric("cpu")


@dataclasses.dataclass(frozen=True)
class Done:
    """A recipe that was run on the command line."""

    path: Path
    out: Path
    shown: str

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.out / "result.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("recipes")
    path, out = folder / "digits.toml", folder / "runs" / "digits"
    path.write_text(TEXT)
    arguments = ["run", str(path), "--out", str(out), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quickspike", *arguments])
        patch.setenv("COLUMNS", "200")
        shown: list[str] = []
        patch.setattr("quickspike.cli_training.show", lambda what: shown.append(rendered(what)))
        main(arguments)
    return Done(path, out, "\n".join(shown))


def rendered(what: Any) -> str:
    from rich.console import Console

    console = Console(width=200, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


# Reading


def test_a_recipe_says_everything(write: Callable[[str], Path]) -> None:
    recipe = read_recipe(write(TEXT))
    assert (recipe.title, recipe.seeds, recipe.data, recipe.model) == ("digits with QCFS", (0, 1), "digits", "digits_cnn,width=4")
    assert recipe.preprocessing == Preprocessing((0.3,), (0.4,))
    assert (recipe.calibration, recipe.steps, recipe.precision) == (100, (1, 2), "32-true")
    assert recipe.method == qs.methods.QCFS(steps=2, levels=2)
    assert recipe.source == Training(epochs=2, batch_size=100, learning_rate=0.05)
    assert recipe.train == Training(epochs=1, batch_size=256, optimiser="adam", learning_rate=0.001)
    assert recipe.tune == Training(epochs=1, batch_size=256, optimiser="adam", learning_rate=0.0001)
    assert recipe.tuning == Tuning(thresholds=False, dropout=0.1)
    assert recipe.augmentation == Augmentation(noise=0.01)
    assert [(figure.steps, figure.accuracy, figure.ann, figure.stage) for figure in recipe.published] == [(2, 77.5, 88.25, "converted")]
    assert recipe.text == TEXT


def test_what_a_recipe_leaves_out_is_not_done(write: Callable[[str], Path]) -> None:
    recipe = read_recipe(write('title = "t"\nmodel = "digits_cnn"\n[data]\nname = "digits"\n[method]\nname = "qcfs"\n'))
    assert (recipe.source, recipe.train, recipe.tune, recipe.preprocessing, recipe.published) == (None, None, None, None, ())
    assert (recipe.seeds, recipe.tuning, recipe.augmentation) == ((0,), Tuning(), Augmentation())


@pytest.mark.parametrize("table", ["source", "train", "tune"])
def test_an_empty_table_means_that_the_stage_is_done(table: str, write: Callable[[str], Path]) -> None:
    recipe = read_recipe(write(without(table) + f"\n[{table}]\n"))
    assert getattr(recipe, table) == Training()


def test_tuning_with_nothing_but_what_is_learned_is_done_too(write: Callable[[str], Path]) -> None:
    recipe = read_recipe(write(without("tune") + "\n[tune]\nleaks = false\n"))
    assert recipe.tuning == Tuning(leaks=False)
    assert recipe.tune == Training()


MISTAKES: dict[str, tuple[str, str, list[str]]] = {
    "no TOML": ('title = "digits', "title = digits", ["TOML"]),
    "no title": ('title = "digits with QCFS"', "", ["title"]),
    "no model": ('model = "digits_cnn,width=4"', "", ["model"]),
    "no name of data": ('name = "digits"', "", ["name"]),
    "no name of method": ('name = "qcfs"', "", ["name"]),
    "mean without std": ("std = [0.4]", "", ["std"]),
    "unknown key": ("seeds =", "seed =", ["'seed'", "'seeds'"]),
    "unknown table": ("[augmentation]", "[augmentations]", ["'augmentations'", "'augmentation'"]),
    "unknown key of data": ("calibration =", "calibrations =", ["'calibrations'", "'calibration'"]),
    "unknown key of evaluate": ("[evaluate]\nsteps", "[evaluate]\nstep", ["'step'", "'steps'"]),
    "unknown method": ('"qcfs"', '"qcsf"', ["'qcsf'", "'qcfs'"]),
    "unknown option of method": ("levels", "level", ["'level'", "'levels'"]),
    "unknown option of source": ("batch_size = 100", "batchsize = 100", ["'batchsize'", "'batch_size'"]),
    "unknown option of train": ("learning_rate = 0.001", "learning_rat = 0.001", ["'learning_rat'", "'learning_rate'"]),
    "unknown option of tune": ("dropout", "drop_out", ["'drop_out'"]),
    "unknown option of augmentation": ("noise", "nois", ["'nois'", "'noise'"]),
    "value out of range": ("learning_rate = 0.05", "learning_rate = -1", ["learning_rate", "-1"]),
    "value of another kind": ("epochs = 2", 'epochs = "two"', ["epochs", "'two'"]),
    "choice": ('"adam"', '"adan"', ["optimiser", "'adan'"]),
    "option of method out of range": ("levels = 2", "levels = 0", ["levels", "0"]),
    "option of augmentation out of range": ("noise = 0.01", "noise = 2", ["noise", "2"]),
    "option of tuning out of range": ("dropout = 0.1", "dropout = 1.5", ["dropout", "1.5"]),
    "std 0": ("std = [0.4]", "std = [0.0]", ["std"]),
    "mean is text": ("mean = [0.3]", 'mean = ["a"]', []),
    "mean is no list": ("mean = [0.3]", "mean = 0.3", []),
    "data is text": ('[data]\nname = "digits"\n', 'data = "digits"\n[evaluate_]\n', []),
    "published lacks": ("accuracy = 77.5\n", "", ["accuracy"]),
    "published adds": ("accuracy = 77.5\n", "accuracy = 77.5\nprecision = 3\n", ["precision"]),
    "no seeds": ("seeds = [0, 1]", "seeds = []", ["seeds"]),
    "seeds are text": ("seeds = [0, 1]", 'seeds = "01"', ["seeds"]),
    "seed is negative": ("seeds = [0, 1]", "seeds = [-1]", ["seeds"]),
    "seed twice": ("seeds = [0, 1]", "seeds = [1, 1]", ["seeds"]),
    "no steps": ("steps = [1, 2]", "steps = []", ["steps"]),
    "steps 0": ("steps = [1, 2]", "steps = [0]", ["steps"]),
    "steps are text": ("steps = [1, 2]", 'steps = ["2"]', ["steps"]),
    "calibration 0": ("calibration = 100", "calibration = 0", ["calibration"]),
    "calibration is text": ("calibration = 100", 'calibration = "all"', ["calibration"]),
    "answers after every step of a network that knows no steps": (
        "learning_rate = 0.001",
        "learning_rate = 0.001\nevery_step = true",
        ["every_step", "[tune]"],
    ),
    "whitening of a trained network": ("learning_rate = 0.001", "learning_rate = 0.001\nwhiten = true", ["whiten", "[source]"]),
    "a source with a teacher": ("learning_rate = 0.05", "learning_rate = 0.05\ndistill = 0.5", ["distill", "[source]"]),
    "a source with a teacher's layers": (
        "learning_rate = 0.05",
        "learning_rate = 0.05\ndistill_features = 0.5",
        ["distill_features", "[source]"],
    ),
    "name of data is a number": ('name = "digits"', "name = 4", ["name", "4"]),
    "name of method is a list": ('name = "qcfs"', 'name = ["qcfs"]', ["name", "'qcfs'"]),
    "a number that is none in floating point": ("learning_rate = 0.05", f"learning_rate = 1{'0' * 400}", ["learning_rate"]),
    "a mean that is none in floating point": ("mean = [0.3]", f"mean = [1{'0' * 400}]", ["mean"]),
    "a number of more digits than are read": ("epochs = 2", f"epochs = 1{'0' * 5000}", ["not a TOML file"]),
    "nested deeply": ("seeds = [0, 1]", f"seeds = {'[' * 100_000}", ["nested too deeply"]),
    "pictures larger than memory": ("mean = [0.3]", "resize = 1000000000\nmean = [0.3]", ["resize", "16384"]),
    "a seed that is too large": ("seeds = [0, 1]", "seeds = [9223372036854775808]", ["seeds"]),
    "steps that are too many": ("steps = [1, 2]", "steps = [65537]", ["steps", "65536"]),
    "published accuracy is text": ("accuracy = 77.5", 'accuracy = "high"', ["accuracy", "'high'"]),
    "published accuracy is no percentage": ("accuracy = 77.5", "accuracy = nan", ["accuracy", "nan"]),
    "published steps are text": ("[[published]]\nsteps = 2", '[[published]]\nsteps = "2"', ["steps", "'2'"]),
    "published source is a number": ('source = "arXiv 0000.00000, table 1"', "source = 3", ["source", "3"]),
    "model is a number": ('model = "digits_cnn,width=4"', "model = 4", ["model"]),
}


@pytest.mark.parametrize("option", ["distill", "distill_features"])
def test_distillation_without_a_source_is_refused(option: str, write: Callable[[str], Path]) -> None:
    text = without("source").replace("learning_rate = 0.001", f"learning_rate = 0.001\n{option} = 0.5")
    with pytest.raises(RecipeError, match=rf"{option} in \[train\] needs a \[source\]"):
        read_recipe(write(text))


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_refused_with_the_name_of_the_file(case: str, write: Callable[[str], Path]) -> None:
    old, new, parts = MISTAKES[case]
    assert TEXT.count(old) >= 1
    path = write(TEXT.replace(old, new, 1))
    with pytest.raises(QuickspikeError) as caught:
        read_recipe(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", ["data", "method", "source", "train", "tune", "augmentation", "evaluate", "published"])
def test_a_table_that_is_none_is_refused_by_its_name(table: str, write: Callable[[str], Path]) -> None:
    path = write(f"{table} = [3]\n{without(table)}")
    with pytest.raises(QuickspikeError, match=rf"\[{table}\] must be a table, got ") as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\0"])
def test_a_damaged_result_of_an_earlier_run_is_refused(content: str, fabric: Any, tmp_path: Path, write: Callable[[str], Path]) -> None:
    file = tmp_path / "out" / "seed0" / "run.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(RecipeError, match=r"is damaged.*remove it, or run without --resume") as caught:
        run_recipe(read_recipe(write(TEXT)), Place(out=tmp_path / "out", fabric=fabric, resume=True))
    assert str(file) in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b'title = "\xff"')
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "bytes.toml"):
        with pytest.raises(RecipeError, match=re.escape(str(path))):
            read_recipe(path)


# Planning


def test_a_dry_run_trains_nothing_and_says_what_would_be_done(
    write: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(TEXT)
    monkeypatch.chdir(tmp_path)
    for name in ("quickspike.training.Trainer.__call__", "quickspike.recipe.run_recipe"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("the work was begun"))
    main(["run", str(path), "--dry-run"])
    shown = capsys.readouterr()
    for part in ("digits with QCFS", "2 seed(s) 0, 1", "digits_cnn,width=4", "4 sites", "1347 training and 450 test images", "qcfs, T = 2"):
        assert part in shown.out
    parameters = sum(parameter.numel() for parameter in load_model("digits_cnn,width=4").parameters())
    assert f"{parameters:,} parameters" in shown.out
    # 1347 images make 13 whole batches of 100, and 5 of 256.
    assert "source: 2 epochs of sgd, 26 steps, learning rate 0.05" in shown.out
    assert "train: 1 epochs of adam, 5 steps" in shown.out
    assert "tune: 1 epochs of adam, 5 steps" in shown.out
    assert shown.err == ""
    main(["run", str(path), "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out) == [line for line in shown.out.splitlines() if line]
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_plan_counts_steps_as_the_trainer_does(digits: Any, write: Callable[[str], Path]) -> None:
    """A batch larger than the set is the whole set."""
    recipe = read_recipe(write(TEXT.replace("batch_size = 100", "batch_size = 5000\nvalidation = 47")))
    assert "source: 2 epochs of sgd, 2 steps" in "\n".join(plan(recipe, digits))


def test_a_plan_finds_what_cannot_be_done(digits: Any, write: Callable[[str], Path]) -> None:
    recipe = read_recipe(write(TEXT))
    for changes, part in (
        ({"model": "digits_cn"}, "digits_cnn"),
        ({"model": "resnet20"}, r"\[1, 1, 8, 8\]"),
        ({"train": Training(validation=1347)}, "1347"),
        ({"calibration": 1348}, "1348"),
    ):
        if "calibration" in changes:
            # More than there are means all.
            plan(dataclasses.replace(recipe, **changes), digits)
            continue
        with pytest.raises(QuickspikeError, match=part):
            plan(dataclasses.replace(recipe, **changes), digits)


STAGES: list[tuple[Method, list[str]]] = [
    (qs.methods.RateEncoded(steps=2, clamp_epochs=3), ["train, clamp: 3 epochs of adam, 15 steps", "train, ann: 1 epochs", "tune: 1"]),
    (qs.methods.RateEncoded(steps=2), ["train: 1 epochs", "tune: 1"]),
    (
        qs.methods.RateNorm(speed_epochs=2, speed_rate=0.5),
        [
            "train, accuracy: 1 epochs of adam",
            "train, speed1: 1 epochs of sgd, 5 steps, learning rate 0.5",
            "train, speed2: 1 epochs of sgd",
            "tune: 1",
        ],
    ),
    (qs.methods.DietSNN(steps=2, longer=5), ["train: 1 epochs", "tune, tune5: 1 epochs of adam", "tune, tune: 1 epochs of adam"]),
]


@pytest.mark.parametrize(("method", "expected"), STAGES, ids=lambda value: getattr(value, "name", ""))
def test_a_plan_lists_the_stages_that_a_method_adds(method: Method, expected: list[str], digits: Any, write: Callable[[str], Path]) -> None:
    recipe = dataclasses.replace(read_recipe(write(without("source"))), method=method)
    lines = [line for line in plan(recipe, digits) if re.match("source|train|tune", line)]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


# Given weights


def test_a_recipe_may_start_from_a_file_of_weights(digits: Any, fabric: Any, write: Callable[[str], Path], tmp_path: Path) -> None:
    given = load_model("digits_cnn,width=4", seed=11)
    save_weights(given, tmp_path / "given.safetensors")
    text = without("source").replace(
        'model = "digits_cnn,width=4"', f'model = "digits_cnn,width=4"\nweights = "{tmp_path}/given.safetensors"'
    )
    recipe = read_recipe(write(text.replace("seeds = [0, 1]", "seeds = [5]")))
    assert recipe.weights == f"{tmp_path}/given.safetensors"
    assert "given.safetensors" in "\n".join(plan(recipe, digits))
    place = Place(out=tmp_path / "runs" / "given", fabric=fabric)
    calibrated = dataclasses.replace(recipe, train=None, tune=None)
    [run] = run_recipe(calibrated, place)["runs"]
    data = qs.data.load_data("digits", preprocessing=recipe.preprocessing)
    assert run["accuracy"]["source"] == pytest.approx(by_hand(given, data))
    snn = qs.load(place.out / "seed5" / "converted.safetensors")
    torch.testing.assert_close(
        snn(torch.ones(2, 1, 8, 8)), qs.convert(given, data.loader("train", limit=100), recipe.method)(torch.ones(2, 1, 8, 8))
    )
    # Other weights under the same name make another experiment.
    assert run_recipe(calibrated, dataclasses.replace(place, resume=True))["runs"] == [run]
    save_weights(load_model("digits_cnn,width=4", seed=12), tmp_path / "given.safetensors")
    with pytest.raises(RecipeError, match=r"run\.json"):
        run_recipe(calibrated, dataclasses.replace(place, resume=True))


def test_a_source_training_may_start_from_weights(fabric: Any, tmp_path: Path) -> None:
    """An epoch at a tiny rate leaves a network where it started."""
    given = load_model("digits_cnn,width=4", seed=11)
    save_weights(given, tmp_path / "given.safetensors")
    still = Training(epochs=1, batch_size=512, learning_rate=1e-9)
    for number, weights in enumerate((str(tmp_path / "given.safetensors"), None)):
        run_recipe(small(source=still, train=None, weights=weights), Place(out=tmp_path / "runs" / str(number), fabric=fabric))
    networks = [load_model("digits_cnn,width=4", path) for path in tmp_path.glob("runs/sources/*/seed0/weights.safetensors")]
    assert len(networks) == 2
    distances = sorted(float((network[0].weight - given[0].weight).detach().abs().max()) for network in networks)
    assert distances[0] < 1e-6 < 1e-2 < distances[1]


def test_pretrained_weights_bring_their_preprocessing(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, digits: Any) -> None:
    text = 'title = "t"\nmodel = "timm:repvgg_a0"\nweights = "pretrained"\n[data]\nname = "imagefolder:x"\n[method]\nname = "qcfs"\n'
    asked = preprocessing_of("timm:repvgg_a0")
    assert read_recipe(write(text)).preprocessing == asked
    changed = read_recipe(
        write(text.replace('"imagefolder:x"\n', '"imagefolder:x"\nmean = [0.0]\nstd = [1.0]\nresize = 320\ncrop = 320\n'))
    )
    assert changed.preprocessing == dataclasses.replace(asked, mean=(0.0,), std=(1.0,), resize=320, crop=320)
    loaded = []
    monkeypatch.setattr("quickspike.recipe.load_model", lambda name, weights=None: loaded.append(weights) or load_model("digits_cnn"))
    assert "from pretrained weights" in "\n".join(plan(read_recipe(write(text)), digits))
    assert loaded == ["pretrained"]
    with pytest.raises(RecipeError, match="weights must be a text"):
        read_recipe(write(text.replace('"pretrained"', "3")))
    with pytest.raises(RecipeError, match="digits_cnn"):
        read_recipe(write(text.replace("timm:repvgg_a0", "digits_cnn")))


# Running


def test_the_result_says_how_it_was_made(done: Done) -> None:
    result = done.result
    assert result["title"] == "digits with QCFS"
    assert result["command"] == "quickspike run digits.toml --out digits --device cpu"
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert result["recipe"] == TEXT
    assert set(result["versions"]) >= {"quickspike", "python", "torch", "torchvision", "numpy", "safetensors"}
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["machine"]) >= {"processor", "instructions", "cores", "threads", "system", "accelerator"}
    git = ["git", "-C", str(Path(qs.__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False)
    assert (result["commit"] or "").rstrip("+") == (head.stdout.strip() if head.returncode == 0 else "")
    expected = {"steps": 2, "accuracy": 77.5, "ann": 88.25, "source": "arXiv 0000.00000, table 1", "evidence": "paper"}
    assert result["published"] == [{**expected, "network": "digits net", "stage": "converted"}]
    for run in result["runs"]:
        assert run["test_images"] == 450
        assert set(run["accuracy"]) == {"source", "ann", "converted", "tuned"}
        assert run["latency"] == {"1": 1, "2": 2}
        assert all(0 <= rate <= 1 for rate in run["rates"].values())
        assert set(run["seconds"]) == {"source", "train and convert", "tune"}


def test_files_lie_where_they_belong(done: Done) -> None:
    files = {str(path.relative_to(done.out.parent)) for path in done.out.parent.rglob("*") if path.is_file()}
    [digest] = [path.name for path in (done.out.parent / "sources").iterdir()]
    seed = ("ann.ckpt", "tune.ckpt", "metrics.csv", "converted.safetensors", "tuned.safetensors", "run.json")
    source = ("source.ckpt", "metrics.csv", "recipe.toml", "seconds.json", "weights.safetensors")
    expected = {f"digits/seed{number}/{name}" for number in (0, 1) for name in seed} | {"digits/result.json"}
    assert files == expected | {f"sources/{digest}/seed{number}/{name}" for number in (0, 1) for name in source}
    assert (done.out.parent / "sources" / digest / "seed0" / "recipe.toml").read_text() == TEXT


def by_hand(network: Callable[[Tensor], Tensor], data: Any) -> float:
    right = 0
    with torch.no_grad():
        for images, labels in data.loader("test"):
            right += int((network(images).argmax(1) == labels).sum())
    return 100 * right / 450


def test_the_accuracies_are_those_of_the_networks_on_disk(done: Done) -> None:
    data = qs.data.load_data("digits", preprocessing=Preprocessing((0.3,), (0.4,)))
    [source] = (done.out.parent / "sources").iterdir()
    for run in done.result["runs"]:
        folder = done.out / f"seed{run['seed']}"
        plain = load_model("digits_cnn,width=4", source / f"seed{run['seed']}" / "weights.safetensors")
        assert run["accuracy"]["source"] == pytest.approx(by_hand(plain, data))
        for stage, name in (("converted", "converted.safetensors"), ("tuned", "tuned.safetensors")):
            snn = qs.load(folder / name)
            assert snn.steps == 2
            for step in (1, 2):
                assert run["accuracy"][stage][str(step)] == pytest.approx(by_hand(snn.with_steps(step), data))
            assert snn.provenance["model"] == "digits_cnn,width=4"
            assert snn.provenance["seed"] == run["seed"]
            assert Preprocessing.from_json(snn.provenance["preprocessing"]) == Preprocessing((0.3,), (0.4,))
        assert run["accuracy"]["source"] > 15


def test_mean_and_deviation_are_those_of_the_seeds(done: Done) -> None:
    result = done.result
    summary = result["summary"]
    assert set(summary) == {"source", "ann", "converted", "tuned"}
    for stage in ("source", "ann"):
        values = [run["accuracy"][stage] for run in result["runs"]]
        assert summary[stage] == pytest.approx({"mean": sum(values) / 2, "std": abs(values[0] - values[1]) / 2**0.5, "n": 2})
    for stage in ("converted", "tuned"):
        assert set(summary[stage]) == {"1", "2"}
        for step in ("1", "2"):
            values = [run["accuracy"][stage][step] for run in result["runs"]]
            assert summary[stage][step] == pytest.approx({"mean": sum(values) / 2, "std": abs(values[0] - values[1]) / 2**0.5, "n": 2})
    # Two seeds give two networks.
    assert result["runs"][0]["accuracy"] != result["runs"][1]["accuracy"]


def test_the_summary_of_given_runs() -> None:
    values = [80.0, 82.0, 87.0]
    runs = [{"accuracy": {"ann": value, "converted": {"4": value - 1}}} for value in values]
    summary = summarise(runs)
    assert summary["ann"] == {"mean": 83.0, "std": pytest.approx(statistics.stdev(values)), "n": 3}
    assert summary["converted"]["4"] == {"mean": 82.0, "std": pytest.approx(13**0.5), "n": 3}
    assert set(summary) == {"ann", "converted"}
    assert summarise(runs[:1])["ann"] == {"mean": 80.0, "std": 0.0, "n": 1}


def test_the_table_shows_the_figures_beside_the_published_ones(done: Done) -> None:
    summary = done.result["summary"]
    assert "digits with QCFS: accuracy in % on 450 images, 2 seed(s)" in done.shown
    assert f"{summary['ann']['mean']:.2f} ± {summary['ann']['std']:.2f}" in done.shown
    line = next(line for line in done.shown.splitlines() if "T = 2" in line)
    for part in (f"{summary['converted']['2']['mean']:.2f} ±", f"{summary['tuned']['2']['mean']:.2f} ±", "77.50", "digits net", "[paper]"):
        assert part in line
    assert "88.25" in done.shown


def test_no_path_of_this_machine_reaches_the_result(done: Done) -> None:
    text = (done.out / "result.json").read_text()
    for path in (done.out, done.path.parent, Path.home(), Path.cwd(), Path(qs.__file__).parent):
        assert str(path) not in text
    assert not re.findall(r'"[^"]*[ :=]?/(?:home|root|tmp|work|usr)[^"]*"', text)


def test_no_path_of_this_machine_reaches_the_command(
    digits: Any, write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is written."""
    path = write(TEXT)
    commands: list[str] = []

    def run(recipe: Recipe, place: Place) -> Any:
        commands.append(place.command)
        raise OutputError("that will do")

    monkeypatch.setattr("quickspike.recipe.run_recipe", run)
    for arguments in (
        [str(path), "--out", str(tmp_path / "out"), "--data", f"npz:{tmp_path}/a.npz"],
        [str(path), f"--out={tmp_path / 'out'}", f"--data=npz:{tmp_path}/a.npz"],
        [str(path), "--data", f"imagefolder:{tmp_path}/pictures", "--data-dir", str(tmp_path)],
        [str(path), f"--data-dir={tmp_path}", "--device=cpu"],
    ):
        monkeypatch.setattr(sys, "argv", ["quickspike", "run", *arguments])
        with pytest.raises(SystemExit):
            main(["run", *arguments])
        assert commands[-1].startswith("quickspike run recipe.toml ")
        assert str(tmp_path.parent) not in commands[-1]
    assert len(commands) == 4


# Sharing and going on


def small(**changes: Any) -> Recipe:
    """Seed 0 only, one epoch, no tuning."""
    recipe = Recipe(
        title="small",
        data="digits",
        model="digits_cnn,width=4",
        method=qs.methods.QCFS(steps=2),
        calibration=100,
        steps=(2,),
        source=Training(epochs=1, batch_size=512, learning_rate=0.05),
        train=Training(epochs=1, batch_size=512, learning_rate=0.05),
    )
    return dataclasses.replace(recipe, **changes)


def test_the_converted_network_is_measured_in_other_ways_too(fabric: Any, tmp_path: Path) -> None:
    result = run_recipe(small(synchronous=True, signed=True, train=None), Place(out=tmp_path / "out", fabric=fabric))
    [run] = result["runs"]
    snn, data = qs.load(tmp_path / "out" / "seed0" / "converted.safetensors"), qs.data.load_data("digits")
    ways = {"converted": snn, "synchronous": snn.as_synchronous(), "signed": snn.as_signed()}
    for stage, network in ways.items():
        assert run["accuracy"][stage] == {"2": pytest.approx(by_hand(network, data))}
    assert list(result["summary"])[2:] == list(ways)
    assert [column.header for column in recipe_tables(result).columns] == ["", "latency", *ways, "published"]


def test_recipes_with_the_same_source_share_it(fabric: Any, tmp_path: Path) -> None:
    def begun(name: str, **changes: Any) -> list[str]:
        stages = Stages()
        run_recipe(small(**changes), Place(out=tmp_path / name, fabric=fabric, watcher=stages))
        return stages.begun

    assert begun("first") == ["source", "ann"]
    assert begun("other method", method=qs.methods.PotentialInit(steps=2), train=None) == []
    assert begun("the same once more") == ["ann"]
    settings = Training(epochs=1, batch_size=500, learning_rate=0.05)
    assert begun("other settings", source=settings) == ["source", "ann"]
    assert begun("other augmentation", augmentation=Augmentation(noise=0.1)) == ["source", "ann"]
    assert begun("other preprocessing", preprocessing=Preprocessing((0.5,), (0.5,))) == ["source", "ann"]
    assert begun("other width", model="digits_cnn,width=5") == ["source", "ann"]
    assert begun("other seed", seeds=(0, 7), train=None) == ["source"]
    assert begun("other precision", precision="bf16-true", train=None) == ["source"]


def test_both_stages_learn_from_the_trained_source(fabric: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = []
    teacher_of = quickspike.training._teacher_of

    def watched(trainer: Any, settings: Training, *others: Any) -> Any:
        teachers.append((settings.distill, trainer.teacher))
        return teacher_of(trainer, settings, *others)

    monkeypatch.setattr("quickspike.training._teacher_of", watched)
    taught = Training(epochs=1, batch_size=512, learning_rate=0.001, distill=0.7, distill_features=0.1)
    run_recipe(small(train=taught, tune=taught), Place(out=tmp_path / "out", fabric=fabric))
    (weights,) = tmp_path.glob("sources/*/seed0/weights.safetensors")
    source = load_model("digits_cnn,width=4", weights)
    assert [share for share, _ in teachers] == [0.0, 0.7, 0.7]
    for _, teacher in teachers[1:]:
        assert teacher.state_dict().keys() == source.state_dict().keys()
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in teacher.state_dict().items())


def test_a_source_trained_on_other_images_is_not_taken(fabric: Any, tmp_path: Path, digits: Any) -> None:
    """`--data` names another place of the images; it may hold others."""
    pixels, labels = digits.train.pixels[:600, 0].numpy(), digits.train.labels[:600].numpy()
    np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=labels, test_images=pixels[:50], test_labels=labels[:50])
    for data, expected in ((None, ["source"]), (f"npz:{tmp_path / 'a.npz'}", ["source"]), (None, [])):
        stages = Stages()
        run_recipe(small(train=None), Place(out=tmp_path / "out", fabric=fabric, data=data, watcher=stages))
        assert stages.begun == expected


def test_the_seed_reaches_the_training_and_not_only_the_first_weights(fabric: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickspike.recipe.load_model", lambda name, weights=None, seed=0: load_model(name, weights))
    run_recipe(small(seeds=(0, 1)), Place(out=tmp_path / "out", fabric=fabric))
    for pattern in ("sources/*/seed*/weights.safetensors", "out/seed*/converted.safetensors"):
        one, other = sorted(tmp_path.glob(pattern))
        assert one.read_bytes() != other.read_bytes()


def test_without_a_source_training_random_weights_of_the_seed_are_taken(fabric: Any, tmp_path: Path) -> None:
    stages = Stages()
    result = run_recipe(small(source=None, train=None, seeds=(3,)), Place(out=tmp_path / "out", fabric=fabric, watcher=stages))
    assert stages.begun == []
    data = qs.data.load_data("digits")
    assert result["runs"][0]["accuracy"]["ann"] == pytest.approx(by_hand(load_model("digits_cnn,width=4", seed=3), data), abs=3)
    assert "source" not in result["runs"][0]["accuracy"]
    assert not (tmp_path / "sources").exists()


# (number of the stage, batch) of the interrupt, and the epochs done before it, of 8: source, ann and tune of the first
# seed, ann of the second.
@pytest.mark.parametrize(("stop", "before"), [((1, 2), 0), ((2, 1), 2), ((3, 2), 3), ((5, 2), 6)])
def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(
    stop: tuple[int, int], before: int, done: Done, fabric: Any, tmp_path: Path
) -> None:
    recipe, place = read_recipe(done.path), Place(out=tmp_path / "runs" / "digits", fabric=fabric)
    with pytest.raises(Interrupted, match=r"\.ckpt"):
        run_recipe(recipe, dataclasses.replace(place, watcher=Stages(stop)))
    assert not (place.out / "result.json").exists()
    stages = Stages()
    result = run_recipe(recipe, dataclasses.replace(place, resume=True, watcher=stages))
    expected = done.result
    assert [of_seconds(run) for run in result["runs"]] == [of_seconds(run) for run in expected["runs"]]
    assert result["summary"] == expected["summary"]
    for number in (0, 1):
        one, other = (folder / f"seed{number}" / "tuned.safetensors" for folder in (place.out, done.out))
        weights, wanted = qs.load(one).state_dict(), qs.load(other).state_dict()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    # What was done was not done again.
    assert stages.epochs == 8 - before


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_sessions(fabric: Any, tmp_path: Path) -> None:
    """The checkpoints are made to say that their epochs took very long."""
    two = Training(epochs=2, batch_size=512, learning_rate=0.001)
    recipe, place = small(source=two, train=two, tune=two, text="mine"), Place(out=tmp_path / "runs" / "small", fabric=fabric)
    with pytest.raises(Interrupted):
        # In the second epoch of the tuning, of two batches each.
        run_recipe(recipe, dataclasses.replace(place, watcher=Stages((3, 3))))
    folder = place.out / "seed0"
    for name, seconds in (("ann", [1000.0, 200.0]), ("tune", [4000.0])):
        state = torch.load(folder / f"{name}.ckpt", weights_only=True)
        assert len(state["rows"]) == len(seconds)
        for row, value in zip(state["rows"], seconds, strict=True):
            row["seconds"] = value
        torch.save(state, folder / f"{name}.ckpt")
    [took] = tmp_path.glob("runs/sources/*/seed0/seconds.json")
    [run] = run_recipe(recipe, dataclasses.replace(place, resume=True))["runs"]
    assert run["seconds"]["source"] == json.loads(took.read_text()) > 0
    assert 1200 < run["seconds"]["train and convert"] < 1500
    assert 4000 < run["seconds"]["tune"] < 4300
    [again] = run_recipe(recipe, dataclasses.replace(place, out=tmp_path / "runs" / "again"))["runs"]
    # Its source network was there already.
    assert set(again["seconds"]) == {"train and convert", "tune"}
    assert max(again["seconds"].values()) < 300


def test_a_finished_run_that_is_resumed_gives_the_same(done: Done, fabric: Any) -> None:
    stages = Stages()
    result = run_recipe(read_recipe(done.path), Place(out=done.out, fabric=fabric, resume=True, watcher=stages, command="again"))
    assert stages.begun == []
    assert result["runs"] == json.loads(json.dumps(result["runs"]))
    assert result["summary"] == summarise(result["runs"])


def test_results_of_another_recipe_are_not_taken_for_this_ones(fabric: Any, tmp_path: Path) -> None:
    """Someone edits a recipe and goes on with --resume."""
    place = Place(out=tmp_path / "out", fabric=fabric)
    run_recipe(small(train=None, text="first"), place)
    other = small(train=None, text="second", method=qs.methods.QCFS(steps=3), steps=(3,))
    with pytest.raises(QuickspikeError, match=r"run\.json"):
        run_recipe(other, dataclasses.replace(place, resume=True))
    assert list(run_recipe(other, place)["runs"][0]["accuracy"]["converted"]) == ["3"]


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "3", lambda text: ""])
def test_a_damaged_result_of_a_seed_is_refused(damage: Callable[[str], str], fabric: Any, tmp_path: Path) -> None:
    place = Place(out=tmp_path / "out", fabric=fabric)
    run_recipe(small(train=None, source=None), place)
    run = tmp_path / "out" / "seed0" / "run.json"
    run.write_text(damage(run.read_text()))
    with pytest.raises(QuickspikeError, match=r"run\.json is damaged.* remove it"):
        run_recipe(small(train=None, source=None), dataclasses.replace(place, resume=True))


def test_options_that_came_later_change_no_digest_where_they_are_off(write: Callable[[str], Path]) -> None:
    """Results, checkpoints and shared source networks made before they came are taken up as they are."""
    recipe = read_recipe(write(TEXT))
    later = (
        r", (every_step=False|weights=None|default_threshold=0\.0|refinements=\(\)|weighted=False|distill_features=0\.0|groups=1|members=1)"
    )
    assert recipe_module._spelled(recipe) == re.sub(later, "", repr(recipe))
    diet = dataclasses.replace(recipe, method=qs.methods.DietSNN())
    assert "default_threshold" not in recipe_module._spelled(diet)
    assert recipe_module._spelled(diet) == re.sub(later, "", repr(diet))
    tune = recipe.tune
    assert tune is not None
    assert "every_step" not in recipe_module._in_force(tune)
    assert recipe_module._in_force(dataclasses.replace(tune, every_step=True))["every_step"] is True
    on = dataclasses.replace(recipe, tune=dataclasses.replace(tune, every_step=True))
    assert recipe_module._spelled(on) == re.sub(later, "", repr(on))
    assert len({recipe_module._spelled(one) for one in (recipe, on, diet, dataclasses.replace(recipe, weights="pretrained"))}) == 4


def test_a_recipe_may_refine(write: Callable[[str], Path]) -> None:
    text = TEXT.replace("levels = 2\n", 'levels = 2\nrefinements = ["bias_correction:passes=3", "potential_correction"]\n')
    recipe = read_recipe(write(text))
    assert recipe.method.refinements == (qs.refinements.BiasCorrection(passes=3), qs.refinements.PotentialCorrection())
    assert recipe_module._spelled(recipe) != recipe_module._spelled(read_recipe(write(TEXT)))
    with pytest.raises(QuickspikeError, match="did you mean 'bias_correction'"):
        read_recipe(write(text.replace("bias_correction", "bias_corection")))


def test_an_unwritable_folder_is_refused_before_the_work(fabric: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    stages = Stages()
    with pytest.raises(OutputError, match=r"result\.json"):
        run_recipe(small(), Place(out=tmp_path / "file" / "run", fabric=fabric, watcher=stages))
    assert stages.begun == []


def test_a_recipe_measures_groups(write: Callable[[str], Path], fabric: Any, tmp_path: Path) -> None:
    text = TEXT.replace("[evaluate]\n", "[evaluate]\ngroups = 2\nsynchronous = true\n")
    recipe = read_recipe(write(text))
    assert recipe.groups == 2
    assert recipe_module._spelled(recipe) != recipe_module._spelled(read_recipe(write(TEXT)))
    for wrong in ("0", "257", "true", "2.0"):
        with pytest.raises(QuickspikeError, match=r"groups in \[evaluate\] must be a whole number"):
            read_recipe(write(text.replace("groups = 2", f"groups = {wrong}")))
    made = small(train=None, source=None, groups=2, synchronous=True, steps=(1, 2))
    accuracy = run_recipe(made, Place(out=tmp_path / "out", fabric=fabric))["runs"][0]["accuracy"]
    # In one step two neurons answer what one does in two.
    assert accuracy["groups"]["1"] == accuracy["synchronous"]["2"]
    assert set(accuracy["groups"]) == {"1", "2"}
