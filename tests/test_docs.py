"""The documents say what is true: their code runs, and their lists are complete."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import quickspike as qs
from quickspike import method
from quickspike.cli import main
from quickspike.data import DataSet, Images
from quickspike.demo import run_demo
from quickspike.graph import trace
from quickspike.method import all_methods
from quickspike.methods.rate_encoded import EncodedInput
from quickspike.models import load_model
from quickspike.operators import FUNCTIONS, LAYERS
from quickspike.preprocessing import PREPROCESSING
from quickspike.recipe import plan, read_recipe
from quickspike.refinement import REFINEMENTS

ROOT = Path(__file__).parent.parent


def test_the_python_in_the_readme_runs(digits_source, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 4
    loader = digits.loader("test")
    images = next(iter(loader))[0]
    names = {"model": digits_source, "images": images, "calibration": digits.loader("train", limit=200)}
    names |= {"test_loader": loader, "held_out": loader}
    layers = {
        "layer1": nn.Sequential(nn.Linear(6, 8), nn.SiLU()),
        "norm": nn.LayerNorm(8),
        "head": nn.Sequential(nn.ReLU(), nn.Linear(8, 3)),
    }
    names |= {"other": nn.Sequential(OrderedDict(layers)), "photos": torch.randn(20, 6)}
    for part in code:
        exec(part, names)
    assert len(names["mixed"].sites) == 9
    assert names["mixed"].provenance["analog"] == ["head.*", "LayerNorm"]
    assert names["logits"].shape == (len(images), 10)
    assert names["report"].accuracy[8] > 95
    assert names["fast"].provenance["engine"]["name"] == "integer"
    assert names["run"].stopped.shape == (len(images),)
    assert (tmp_path / "network.safetensors").is_file()


def test_the_readme_names_every_method_and_command():
    text = (ROOT / "README.md").read_text()
    for name in (*all_methods(), *REFINEMENTS.all()):
        assert f"`{name}`" in text
    for command in ("make demo", "make test", "quickspike convert", "quickspike evaluate", "quickspike inspect", "quickspike methods"):
        assert command in text


@pytest.mark.parametrize("name", sorted({layer.__name__ for layer in LAYERS} | set(FUNCTIONS)))
def test_the_page_of_operators_lists_it(name):
    assert re.search(rf"(?<!\w){name}(?!\w)", (ROOT / "docs" / "operators.md").read_text())


def test_the_page_of_dependencies_lists_every_one():
    project = (ROOT / "pyproject.toml").read_text()
    page = (ROOT / "docs" / "dependencies.md").read_text()
    names = re.findall(r'"([a-z-]+)>=', project)
    assert {"torch", "tyro", "pytest", "mypy"} <= set(names)
    for name in set(names) - {"setuptools"}:
        assert name in page


def test_the_page_on_adding_a_method_adds_one(digits_source, digits, tmp_path, monkeypatch, capsys):
    all_methods()  # registered before the registry is replaced, or they would be gone with it
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    assert len(page.splitlines()) <= 60
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setattr(method.METHODS, "_classes", method.all_methods())
    (tmp_path / "added.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.import_module("added")
    snn = qs.convert(digits_source, digits.loader("train", limit=200), "max_norm", steps=32, share=0.9)
    assert qs.evaluate(snn, digits.loader("test"), device="cpu").accuracy[32] > 95
    main(["methods", "max_norm", "--json"])
    assert "share of the largest activation" in capsys.readouterr().out
    # What the page says works now.
    common = ["--data", "digits", "--device", "cpu"]
    training = [*common, "--epochs", "1", "--batch-size", "256", "--json"]
    chosen = ["--method", "max_norm", "--share", "0.9", "--steps", "4", "--calibration-images", "100", "--learning-rate", "0.05"]
    main(["train", "digits_cnn,width=4", *chosen, *training, "--out", "trained"])
    main(["tune", "trained/network.safetensors", *training, "--out", "tuned"])
    trained, tuned = (qs.load(tmp_path / name / "network.safetensors") for name in ("trained", "tuned"))
    assert trained.method == tuned.method == {"name": "max_norm", "options": {**trained.method["options"], "steps": 4, "share": 0.9}}
    capsys.readouterr()
    main(["compare", "digits_cnn,width=4", *common, "--methods", "max_norm", "qcfs", "--steps", "2", "--images", "50", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == {"max_norm", "qcfs"}
    del sys.modules["added"]


RECIPES = sorted((ROOT / "recipes").glob("*/*.toml"))

# What the five papers report: method, data, network, numbers of steps (0: none is given).
PUBLISHED = [
    ("diet_snn", "CIFAR-10", "ResNet-20 wide", (5, 10, 25)),
    ("diet_snn", "CIFAR-10", "VGG-16", (5, 10, 20)),
    ("diet_snn", "CIFAR-10", "VGG-6", (5, 10, 15)),
    ("diet_snn", "CIFAR-100", "ResNet-20 wide", (5, 25)),
    ("diet_snn", "CIFAR-100", "VGG-16", (5, 20)),
    ("diet_snn", "ImageNet", "ResNet-34", (35,)),
    ("diet_snn", "ImageNet", "VGG-16", (5, 25)),
    ("potential_init", "CIFAR-10", "ResNet-20", (8, 16, 32, 64, 128, 512)),
    ("potential_init", "CIFAR-10", "VGG-16", (8, 16, 32, 64, 128, 512)),
    ("potential_init", "CIFAR-100", "ResNet-20", (8, 16, 32, 64, 128, 512)),
    ("potential_init", "CIFAR-100", "VGG-16", (8, 16, 32, 64, 128, 512)),
    ("potential_init", "ImageNet", "VGG-16", (8, 16, 32, 64, 128, 512)),
    ("rate_encoded", "CIFAR-10", "VGG-*", (8,)),
    ("rate_encoded", "CIFAR-100", "VGG-*", (8,)),
    ("rate_encoded", "ImageNet", "RepVGG-B3", (100, 200)),
    ("rate_encoded", "MIT-BIH ECG", "two-stage SNN", (50,)),
    ("rate_encoded", "MNIST", "MNIST net", (1,)),
    ("rate_norm", "CIFAR-10", "PreActResNet-18", (0,)),
    ("rate_norm", "CIFAR-10", "VGG-16", (0, 16, 32, 64, 256, 512)),
    ("rate_norm", "CIFAR-100", "PreActResNet-18", (0,)),
    ("rate_norm", "CIFAR-100", "PreActResNet-34", (0,)),
    ("rate_norm", "CIFAR-100", "VGG-16", (0,)),
    ("rate_norm", "MNIST", "7-layer CNN", (0,)),
    ("rate_norm", "MNIST", "AlexNet (repository)", (0,)),
    ("rate_norm", "MNIST", "cnn (repository)", (0,)),
    ("ultra_low_latency", "CIFAR-10", "ResNet-20 wide", (2, 3)),
    ("ultra_low_latency", "CIFAR-10", "VGG-11", (2, 3)),
    ("ultra_low_latency", "CIFAR-10", "VGG-16", (1, 2, 3)),
    ("ultra_low_latency", "CIFAR-100", "ResNet-20 wide", (2, 3)),
    ("ultra_low_latency", "CIFAR-100", "VGG-16", (2, 3)),
]
WITHOUT_RECIPE = {("rate_encoded", "MIT-BIH ECG", "two-stage SNN"): "electrocardiograms: there is no such data set or network here"}
DATA = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet": "imagefolder:imagenet", "MNIST": "mnist"}


def test_every_published_experiment_of_the_five_papers_has_a_recipe_or_a_reason():
    recipes = [read_recipe(path) for path in RECIPES if path.parent.name != "ours"]
    has = {
        (recipe.method.name, recipe.data, figure.network, figure.steps)
        for recipe in recipes
        for figure in recipe.published
        # The network is made for that T, or measured at it.
        if figure.steps in (0, recipe.method.steps, *recipe.steps)
    }
    wanted = {(method, data, network, steps) for method, data, network, counts in PUBLISHED for steps in counts}
    missing = {one for one in wanted if (one[0], DATA.get(one[1]), *one[2:]) not in has}
    assert {one[:3] for one in missing} == set(WITHOUT_RECIPE)
    five = {method for method, *_ in PUBLISHED}
    added = {one for one in has if one[0] in five} - {(one[0], DATA.get(one[1]), *one[2:]) for one in wanted}
    assert not added, "a figure that this list lacks"


def test_every_recipe_can_be_read_and_names_what_it_is_held_against():
    for path in RECIPES:
        recipe = read_recipe(path)
        assert recipe.published or path.parent.name == "ours", path
        assert {figure.steps for figure in recipe.published} - {0} <= set(recipe.steps), path


@pytest.fixture(scope="module")
def cheaply():
    """Networks and their graphs, each made once; how many classes one has makes no difference here."""
    patch = pytest.MonkeyPatch()

    @functools.cache
    def network(name, weights):
        return load_model(name, weights)

    @functools.cache
    def graph(model, copies, shape, options):
        return trace(model if copies == 0 else EncodedInput(model, copies), torch.zeros(shape), **dict(options))

    def traced(model, example, **options):
        inner, copies = (model.model, model.copies) if isinstance(model, EncodedInput) else (model, 0)
        return graph(inner, copies, tuple(example.shape), tuple(sorted(options.items())))

    patch.setattr("quickspike.recipe.load_model", lambda name, weights=None: network(name.replace(",classes=100", ""), weights))
    patch.setattr("quickspike.recipe.trace", traced)
    yield
    patch.undo()


@functools.cache
def blank(name):
    """A data set of the shape and size of the real one."""
    side, channels, size = {"mnist": (28, 1, 60_000)}.get(name, (32, 3, 50_000))
    test = Images(np.zeros((1, side, side, channels), np.uint8), np.zeros(1, np.int64), PREPROCESSING[name], name)
    train = copy.copy(test)
    # One picture in the memory of one, as many times as there are training images.
    train.pixels, train.labels = test.pixels.expand(size, -1, -1, -1), test.labels.expand(size)
    return DataSet(name, train, test, PREPROCESSING[name], tuple("0123456789"))


PLANNED = [path for path in RECIPES if "imagenet" not in path.name]


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_can_be_planned(path, cheaply):
    recipe = read_recipe(path)
    lines = plan(recipe, blank(recipe.data))
    stages = [line.partition(":")[0] for line in lines if " steps, learning rate " in line]
    extra = [f"train, {stage}" for stage in recipe.method.stages()] if len(recipe.method.stages()) > 1 else ["train"]
    expected = ["source"] * (recipe.source is not None) + extra * (recipe.train is not None) + ["tune"] * (recipe.tune is not None)
    assert stages == expected
    assert f"T = {recipe.method.steps}" in lines[-1]


def test_the_page_of_the_architecture_lists_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for module in (ROOT / "src" / "quickspike").glob("*.py"):
        assert module.name in page or module.name in ("__init__.py", "__main__.py", "version.py", "errors.py", "provenance.py")


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(example, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert "T = 8" in capsys.readouterr().out
    assert len(example.read_text().splitlines()) < 60


def test_the_demo_keeps_its_promise(tmp_path):
    demo = run_demo(tmp_path)
    report = demo.reports["threshold_balancing"]
    assert report.reference_accuracy is not None
    assert report.reference_accuracy > 97
    assert report.accuracy[8] >= report.reference_accuracy - 1
    assert report.accuracy[4] >= report.reference_accuracy - 5
    assert demo.network.is_file()
    assert demo.picture.read_bytes().startswith(b"\x89PNG")


def against_published():
    return runpy.run_path(str(ROOT / "recipes" / "against_published.py"))


def test_the_table_of_the_readme_is_what_the_results_give():
    assert against_published()["table"]() in (ROOT / "README.md").read_text()


def test_published_figures_are_those_that_were_gathered():
    gathered = ROOT.parent / "shared" / "papers" / "results.toml"
    if not gathered.is_file():
        pytest.skip("needs ../shared/papers/results.toml")
    made = against_published()
    wanted = [
        (one["dataset"], one["steps"], one["snn_accuracy"], one["architecture"], one.get("ann_accuracy", 0), one["method"], one["stage"])
        for one in made["tomllib"].loads(gathered.read_text())["result"]
        if one["dataset"] in ("CIFAR-10", "MNIST") and 1 <= one["steps"] <= 16
    ]
    assert sorted(wanted) == sorted(tuple(one.values())[:7] for one in made["rows_of"]("figures"))
    assert len(made["published"]()) == len(wanted) + len(made["rows_of"]("later"))
