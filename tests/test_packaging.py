"""What is installed: with the base dependencies alone everything imports, packages hold all files, oldest versions are named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from quickspike.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}

IMPORT_ALL = """
import importlib.metadata, importlib.util, json, pkgutil, sys

barred, absent = map(set, json.loads(sys.argv[1]))

class Barrier:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in barred:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Barrier())
look = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in barred else look(name, package)
ask = importlib.metadata.distribution

def distribution(name):
    if name.lower().replace("_", "-") in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return ask(name)

importlib.metadata.distribution = distribution
import quickspike
names = [module.name for module in pkgutil.walk_packages(quickspike.__path__, "quickspike.")]
missing = {}
for name in names:
    if name == "quickspike.__main__":
        continue  # runs the program
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing[name] = error.name
print(json.dumps([len(names), missing]))
"""


def with_what_it_needs(requirements: list[Requirement]) -> set[str]:
    """Distributions that these bring with them, themselves included."""
    found: set[str] = set()
    todo = list(requirements)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += map(Requirement, needs)
    return found


def imports_without(barred: set[str]) -> tuple[int, dict[str, str]]:
    """(modules of the package, those that do not import with the name of the module that they miss)."""
    owners = metadata.packages_distributions()
    absent = {canonicalize_name(owner) for module in barred for owner in owners.get(module, ())}
    given = json.dumps([sorted(barred), sorted(absent)])
    ran = subprocess.run([sys.executable, "-c", IMPORT_ALL, given], capture_output=True, text=True, check=True)
    count, missing = json.loads(ran.stdout)
    return count, missing


def test_every_module_imports_with_the_base_dependencies_alone() -> None:
    base = with_what_it_needs(BASE) | {"quickspike"}
    assert {"torch", "numba", "tyro"} <= base
    modules = metadata.packages_distributions()
    barred = {module for module, owners in modules.items() if not base & set(map(canonicalize_name, owners))}
    # What the extras bring is here, and out of reach.
    assert {"pytest", "hypothesis", "timm", "onnx", "nir"} <= barred
    count, missing = imports_without(barred)
    assert count == sum(1 for path in (ROOT / "src/quickspike").rglob("*.py")) - 1
    # Only for GPUs, where torch brings triton.
    assert missing in ({}, {"quickspike.triton_loops": "triton"})
    # A base dependency that is not there is noticed.
    assert imports_without({"safetensors"})[1]


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (Version(specifier.version) for specifier in requirement.specifier if specifier.operator == ">=")
    return bound


def test_the_oldest_versions_are_those_that_the_project_allows() -> None:
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(one.name): Version(next(iter(one.specifier)).version) for one in map(Requirement, lines)}
    allowed = {canonicalize_name(one.name): lower_bound(one) for one in [*BASE, *EXTRAS["test"]]}
    assert pinned == allowed
    for name in ("timm", "tensorboard", "nir", "onnx", "hub"):
        for one in EXTRAS[name]:
            assert lower_bound(one) == allowed[canonicalize_name(one.name)], one


def test_the_pinned_versions_are_allowed() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned: dict[str, list[Version]] = {}
    for one in map(Requirement, lines):
        pinned.setdefault(canonicalize_name(one.name), []).append(Version(next(iter(one.specifier)).version))
    for requirement in [*BASE, *EXTRAS["test"], *EXTRAS["check"]]:
        assert all(version in requirement.specifier for version in pinned[canonicalize_name(requirement.name)]), requirement


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source package, wheel made from it), built with what is installed."""
    folder = tmp_path_factory.mktemp("packages")
    place = folder / "project"
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    build = [sys.executable, "-W", "ignore", "-m", "build", "--no-isolation", "--outdir", str(folder), str(place)]
    ran = subprocess.run(build, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


def test_packages_hold_every_file(packages: tuple[Path, Path]) -> None:
    source, wheel = packages
    assert wheel.name == f"quickspike-{__version__}-py3-none-any.whl"
    ours = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/quickspike").rglob("*") if path.suffix in (".py", ".typed")}
    assert "quickspike/py.typed" in ours
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (about,) = (archive.read(name).decode() for name in held if name.endswith(".dist-info/METADATA"))
    assert {name for name in held if ".dist-info/" not in name} == ours
    assert any(name.endswith("licenses/LICENSE") for name in held)
    needs = [Requirement(text) for text in re.findall(r"^Requires-Dist: (.*)$", about, re.MULTILINE)]
    assert {str(one) for one in needs if "extra" not in str(one.marker)} == {str(one) for one in BASE}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in ours} | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_a_wheel_works_where_it_is_installed(packages: tuple[Path, Path], tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "installed")]
    subprocess.run([*install, str(packages[1])], check=True, capture_output=True)
    seen = "import sys; sys.path.insert(0, sys.argv[1]); import quickspike; print(quickspike.__file__, quickspike.__version__)"
    ran = subprocess.run(
        [sys.executable, "-c", seen, str(tmp_path / "installed")], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert ran.stdout.split() == [str(tmp_path / "installed/quickspike/__init__.py"), __version__]
