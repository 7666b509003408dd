"""The documents say what is true: their code runs, and their lists are complete."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import quickspike as qs
from quickspike import method
from quickspike.cli import main
from quickspike.demo import run_demo
from quickspike.method import all_methods
from quickspike.operators import FUNCTIONS, LAYERS
from quickspike.recipe import read_recipe

ROOT = Path(__file__).parent.parent


def test_the_python_in_the_readme_runs(digits_source, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 3
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
    for name in all_methods():
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
    monkeypatch.setattr(method, "_REGISTRY", dict(method._REGISTRY))
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


def test_every_recipe_can_be_read_and_names_what_it_is_held_against():
    recipes = sorted((ROOT / "recipes").glob("*/*.toml"))
    assert len(recipes) > 40
    for path in recipes:
        recipe = read_recipe(path)
        assert recipe.published or path.parent.name == "ours", path
        assert {figure.steps for figure in recipe.published} - {0} <= set(recipe.steps), path


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
