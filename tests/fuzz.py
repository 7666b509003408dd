"""Bad input, much of it: `make fuzz`. 1,000 spoiled networks, weights and checkpoints, 500 recipes, 200 archives, all wrong images.

    python tests/fuzz.py [--checkpoints 1000] [--recipes 500] [--archives 200] [--seed 0] [--out results/fuzz.json]

Ends with status 1 if anything came of an input but a result or an error that says so; see `trials.py`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor

import mutations
import nir_networks
import quickspike as qs
import test_checkpoint
import test_recipe
import wrong_data
from quickspike.api import train
from quickspike.augmentation import Augmentation
from quickspike.conversion import SpikingNetwork
from quickspike.data import DataSet, load_data
from quickspike.errors import QuickspikeError
from quickspike.evaluation import make_fabric
from quickspike.hub import model_card
from quickspike.models import load_model, save_weights
from quickspike.nir_export import export_nir
from quickspike.nir_import import load_nir
from quickspike.onnx_export import check_onnx, to_onnx
from quickspike.provenance import commit
from quickspike.recipe import plan, read_recipe
from quickspike.structure import tensors
from quickspike.training import Trainer, Training
from trials import Fault, Outcome, Trial, by_command, run

Mutations = dict[str, Callable[[Any, Random], Any]]
ROOT = Path(__file__).parents[1]
BY_COMMAND = 0.1
"""Share of the trials that are read by the command line, where it reads such files."""
MODEL = "digits_cnn,width=2"
TRAINING = Training(epochs=1, batch_size=256)

# What is spoiled


@functools.cache
def digits() -> DataSet:
    return load_data("digits")


def _file(write: Callable[[Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def _with_loaded(made: dict[str, bytes], load: Callable[[Path], SpikingNetwork]) -> dict[str, tuple[bytes, SpikingNetwork]]:
    """Every file with the network that it is read as."""
    loaded: dict[str, tuple[bytes, SpikingNetwork]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for name, data in made.items():
            path.write_bytes(data)
            loaded[name] = data, load(path)
    return loaded


@functools.cache
def networks() -> dict[str, tuple[bytes, SpikingNetwork]]:
    made = {name: test_checkpoint.network(name)[0] for name in test_checkpoint.NETWORKS}
    made["digits"] = qs.convert(load_model(MODEL), digits().loader("train", limit=100), steps=4)
    return _with_loaded({name: _file(snn.save) for name, snn in made.items()}, qs.load)


@functools.cache
def nir_files() -> dict[str, tuple[bytes, SpikingNetwork]]:
    made = {name: nir_networks.spiking(name)[0] for name in ("chain", "shortcuts")}
    return _with_loaded({name: _file(functools.partial(export_nir, snn)) for name, snn in made.items()}, load_nir)


@functools.cache
def weights() -> dict[str, bytes]:
    model = load_model(MODEL)
    old = functools.partial(torch.save, model.state_dict(), _use_new_zipfile_serialization=False)
    return {
        ".pt": _file(functools.partial(torch.save, model.state_dict())),
        ".pth": _file(old),
        ".safetensors": _file(functools.partial(save_weights, model)),
    }


@functools.cache
def training_checkpoint() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        _train(Path(folder))
        (file,) = Path(folder).glob("*.ckpt")
        return file.read_bytes()


@functools.cache
def onnx_file() -> bytes:
    return _file(functools.partial(to_onnx, networks()["vector"][1]))


@functools.cache
def recipes() -> list[str]:
    return [test_recipe.TEXT, *(path.read_text(encoding="utf-8") for path in mutations.sources(ROOT))]


@functools.cache
def archive() -> bytes:
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {"class_names": np.array(["a", "b", "c"])}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = generator.integers(0, 256, (40, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(40) % 3
    return mutations.npz(arrays)


# How it is read


def _answers(snn: SpikingNetwork) -> list[Tensor]:
    shape = snn.input_shape
    if np.prod([float(size) for size in shape]) > 1e7:
        raise Fault(f"the network takes images of shape {shape}")
    dtype = next((value.dtype for value in snn.parameters() if value.is_floating_point()), torch.float32)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        return list(tensors(snn.with_steps(min(snn.steps, 4))(images)))


def _behaves(found: SpikingNetwork, original: SpikingNetwork, unaltered: bool) -> str:
    """What was loaded; it must answer, describe itself and be saved again."""
    answers, wanted = _answers(found), _answers(original)
    model_card(found)
    assert found.code
    assert repr(found)
    alike = len(answers) == len(wanted) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(answers, wanted, strict=True)
    )
    if unaltered and not (alike and found.method == original.method and found.provenance == original.provenance):
        raise Fault("it loads as another network, although nobody sealed it")
    return "the same network" if alike else "another network"


def read_network(original: SpikingNetwork, sealed: bool, path: Path) -> str:
    return _behaves(qs.load(path), original, not sealed)


def read_nir(original: SpikingNetwork, sealed: bool, steps: int | None, path: Path) -> str:
    return _behaves(load_nir(path, steps), original, not sealed)


def read_weights(path: Path) -> str:
    model = load_model(MODEL, path)
    with torch.no_grad():
        model(torch.zeros(2, 1, 8, 8))
    return "weights"


@functools.cache
def _fabric() -> Any:
    return make_fabric("cpu")


def _train(folder: Path) -> None:
    trainer = Trainer(fabric=_fabric(), data=digits(), settings=TRAINING, augmentation=Augmentation(), folder=folder, resume=True)
    train(load_model(MODEL), trainer)


def read_training(path: Path) -> str:
    _train(path.parent)
    return "a training that goes on"


def read_onnx(path: Path) -> str:
    check_onnx(path)
    return "an ONNX file"


def read_plan(path: Path) -> str:
    try:
        recipe = read_recipe(path)
    except QuickspikeError as error:
        if str(path) not in str(error):
            raise Fault(f"does not name the file: {type(error).__name__}: {error}") from error
        raise
    if recipe.data != "digits":
        return "a recipe for other images"
    plan(recipe, digits())
    return "a recipe"


def read_archive(path: Path) -> str:
    data = load_data(f"npz:{path}")
    for split in ("train", "test"):
        images, labels = next(iter(data.loader(split)))
        assert torch.isfinite(images).all()
        assert len(images) == len(labels)
    return "images"


# How the command line reads it


def evaluated(path: Path) -> str:
    return by_command("evaluate", path, "--data", "digits", "--images", 4, "--steps", 1, "--device", "cpu")


def inspected(path: Path) -> str:
    return by_command("inspect", MODEL, "--weights", path, "--input", 1, 8, 8)


def planned(path: Path) -> str:
    return by_command("run", path, "--dry-run")


def converted(path: Path) -> str:
    return by_command("convert", MODEL, "--data", f"npz:{path}", "--steps", 2, "--out", "out.safetensors", "--device", "cpu")


# Trials


def _networks(kind: str, draw: Random, command: bool) -> Trial:
    name = "digits" if command else draw.choice(sorted(networks()))
    data, original = networks()[name]
    read = functools.partial(read_network, original, kind.startswith("header") or kind == "tensor")
    return Trial(
        f"network, {kind}", evaluated if command else read, mutations.NETWORK[kind](data, draw), "input.safetensors", names_file=not command
    )


def _nir(kind: str, draw: Random, command: bool) -> Trial:
    data, original = nir_files()[draw.choice(sorted(nir_files()))]
    # A file from elsewhere does not say for how many steps it was made.
    elsewhere = "elsewhere" in kind
    read = functools.partial(read_nir, original, kind.startswith("metadata") or elsewhere, 16 if elsewhere else None)
    return Trial(f"NIR, {kind}", read, mutations.NIR[kind](data, draw), "input.nir", multiple=1100)


def _weights(kind: str, draw: Random, command: bool) -> Trial:
    suffix = draw.choice(sorted(weights())) if kind in mutations.BYTES else ".pt"
    return Trial(
        f"weights, {kind}", inspected if command else read_weights, mutations.STATE[kind](weights()[suffix], draw), f"input{suffix}"
    )


def _training(kind: str, draw: Random, command: bool) -> Trial:
    data = mutations.STATE[kind](training_checkpoint(), draw)
    return Trial(f"training checkpoint, {kind}", read_training, data, "source.ckpt", leaves=True)


def _onnx(kind: str, draw: Random, command: bool) -> Trial:
    return Trial(f"ONNX, {kind}", read_onnx, mutations.ONNX[kind](onnx_file(), draw), "input.onnx")


def _recipes(kind: str, draw: Random, command: bool) -> Trial:
    text = recipes()[0] if command or draw.random() < 0.7 else draw.choice(recipes())
    if kind in mutations.RECIPE_BYTES:
        data = mutations.RECIPE_BYTES[kind](text.encode(), draw)
    else:
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            text = mutations.RECIPE[kind](text, draw)
        data = text.encode()
    return Trial(f"recipe, {kind}", planned if command else read_plan, data, "input.toml", multiple=200, names_file=False)


def _archives(kind: str, draw: Random, command: bool) -> Trial:
    data = mutations.NPZ[kind](archive(), draw)
    return Trial(f"archive of images, {kind}", converted if command else read_archive, data, "input.npz", multiple=1100, leaves=command)


FORMATS: dict[str, tuple[Callable[[str, Random, bool], Trial], tuple[str, ...], float]] = {
    "networks": (_networks, tuple(mutations.NETWORK), 0.5),
    "nir": (_nir, tuple(mutations.NIR), 0.25),
    "weights": (_weights, tuple(mutations.STATE), 0.15),
    "training": (_training, tuple(mutations.STATE), 0.06),
    "onnx": (_onnx, tuple(mutations.ONNX), 0.04),
    "recipes": (_recipes, (*mutations.RECIPE, *mutations.RECIPE_BYTES), 1.0),
    "archives": (_archives, tuple(mutations.NPZ), 1.0),
}
"""Maker of a trial, kinds of mutations, and the share of all files of its sort."""
CHECKPOINTS = ("networks", "nir", "weights", "training", "onnx")
WITH_COMMAND = ("networks", "weights", "recipes", "archives")


def trial(form: str, kind: str, seed: int, command: bool | None = None) -> Trial:
    """The trial that is drawn from a seed; `command` chooses whether the command line reads it."""
    draw = Random(f"{form} {kind} {seed}")
    drawn = draw.random() < BY_COMMAND
    return FORMATS[form][0](kind, draw, form in WITH_COMMAND and (drawn if command is None else command))


def trials_of(form: str, count: int, seed: int) -> list[Trial]:
    """So many trials, the kinds in turn."""
    kinds = FORMATS[form][1]
    return [trial(form, kinds[n % len(kinds)], seed * 100_000 + n) for n in range(count)]


def warm_up(forms: Sequence[str] = tuple(FORMATS)) -> None:
    """Everything is read once unspoiled, so that what is imported and kept then is not taken for a price of bad input."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, wrong_data.inside(folder):
        warnings.simplefilter("ignore")
        for form, by_command_too in itertools.product(forms, (False, True)):
            one = trial(form, "unspoiled", 0, by_command_too)
            path = Path(folder) / one.name
            path.write_bytes(one.data)
            one.read(path)


# The long form


class Progress:
    """One line that tells how far it is."""

    def __init__(self, count: int) -> None:
        self.count, self.done, self.faults, self.started = count, 0, 0, time.perf_counter()

    def __call__(self, outcome: Outcome) -> None:
        self.done += 1
        self.faults += outcome.fault
        if outcome.fault:
            sys.stdout.write(f"\rFAULT {outcome.kind}: {outcome.what}: {outcome.detail}\n")
        left = (time.perf_counter() - self.started) / self.done * (self.count - self.done)
        sys.stdout.write(f"\r{self.done}/{self.count}, {self.faults} faults, {left:.0f} s left   ")
        sys.stdout.flush()


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How often what came of what."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.kind, Counter())[("FAULT " if outcome.fault else "") + outcome.what] += 1
    return {
        "trials": len(outcomes),
        "faults": sum(outcome.fault for outcome in outcomes),
        "largest growth in MiB": round(max(outcome.peak for outcome in outcomes) / 2**20, 1),
        "slowest in seconds": round(max(outcome.seconds for outcome in outcomes), 2),
        "outcomes": {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--recipes", type=int, default=500)
    parser.add_argument("--archives", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("quickspike").addHandler(logging.NullHandler())
    started = time.perf_counter()
    warm_up()
    parts = {
        "checkpoints": [trials_of(form, round(chosen.checkpoints * FORMATS[form][2]), chosen.seed) for form in CHECKPOINTS],
        "recipes": [trials_of("recipes", chosen.recipes, chosen.seed)],
        "archives of images": [trials_of("archives", chosen.archives, chosen.seed)],
        "wrong images": [wrong_data.trials()],
    }
    groups = {name: list(itertools.chain(*lists)) for name, lists in parts.items()}
    progress = Progress(sum(map(len, groups.values())))
    found = {name: run(trials, progress) for name, trials in groups.items()}
    sys.stdout.write("\n")
    result = {
        "command": "python tests/fuzz.py "
        + " ".join(f"--{key} {vars(chosen)[key]}" for key in ("checkpoints", "recipes", "archives", "seed")),
        "commit": commit(),
        "versions": {"torch": torch.__version__, "nir": nir.version, "numpy": np.__version__, "python": sys.version.split()[0]},
        "seconds": round(time.perf_counter() - started),
        **{name: summary(outcomes) for name, outcomes in found.items() if outcomes},
    }
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name in found:
        if found[name]:
            sys.stdout.write(f"{name}: {result[name]['trials']} trials, {result[name]['faults']} faults\n")
    sys.exit(1 if progress.faults else 0)


if __name__ == "__main__":
    main()
