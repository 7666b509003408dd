"""The documents say what is true: their code runs, and their lists are complete."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from quickspike.demo import run_demo
from quickspike.method import all_methods
from quickspike.operators import FUNCTIONS, LAYERS

ROOT = Path(__file__).parent.parent


def test_the_python_in_the_readme_runs(digits_source, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    loader = digits.loader("test")
    images = next(iter(loader))[0]
    names = {"model": digits_source, "images": images, "calibration": digits.loader("train", limit=200), "test_loader": loader}
    exec(code[0], names)
    assert names["logits"].shape == (len(images), 10)
    assert names["report"].accuracy[8] > 95
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
