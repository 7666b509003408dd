"""The commands that are stopped, what they read, and what their files have to hold."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils._pytree import tree_leaves

import quickspike as qs
from quickspike.nir_import import load_nir
from quickspike.onnx_export import check_onnx
from quickspike.program_export import load_program

MODEL = "digits_cnn,width=4"
DATA = ("--data", "digits")
CPU = ("--device", "cpu")
RECIPE = """
title = "a small experiment"
model = "digits_cnn,width=4"
seeds = [0, 1]
[data]
name = "digits"
calibration = 50
[method]
name = "potential_init"
steps = 2
[evaluate]
steps = [1, 2]
[source]
epochs = 2
batch_size = 512
learning_rate = 0.05
[train]
epochs = 1
batch_size = 512
learning_rate = 0.02
[tune]
epochs = 1
batch_size = 512
learning_rate = 0.001
"""
OTHER = RECIPE.replace("seeds = [0, 1]", "seeds = [0]").replace("steps = 2", "steps = 3", 1).replace("0.05", "0.04")
TIMES = ("seconds", "images_per_second")
"""Figures that are others every time."""


@dataclass(frozen=True)
class Command:
    """A command and what it makes below the folder `out`."""

    name: str
    group: str
    arguments: tuple[str, ...]
    other: tuple[str, ...]
    """A run before it with other settings, whose files lie in the way."""
    results: tuple[str, ...]
    """What is either from before, or whole and right, at any time."""
    resumes: bool = False
    """Takes --resume; others go on by themselves, or begin anew."""
    removed: tuple[str, ...] = ()
    """What of an earlier run may go before there is something new: descriptions of it, and checkpoints."""


def commands(only: str = "") -> Iterator[Command]:
    """All commands, or one by its name or the name of its group."""
    weights, network = ("--weights", "inputs/weights.safetensors"), "inputs/network.safetensors"
    made = ("--calibration-images", "100", *CPU)
    training = (*DATA, "--batch-size", "256", *CPU, "--out", "out")
    averaged = ("--epochs", "4", "--validation", "100", "--keep", "best", "--ema", "0.8", "--crop", "1", "--learning-rate", "0.05")
    stages = ("--method", "rate_norm", *weights, "--epochs", "2", "--learning-rate", "0.01", "--calibration-images", "100")
    checkpoints, figures = ("*.ckpt",), ("metrics.csv",)
    spiking = ("network.safetensors",)
    tuning = ("tune", network, *training, "--epochs", "3", "--dropout", "0.1")
    searching = ("search", MODEL, *weights, *DATA, "--methods", "threshold_balancing", "--max-drop", "10", "--most-steps", "4")
    found = ("--images", "100", *made, "--tune-epochs", "1", "--network", "out/best.safetensors", "--page", "out/page.html")
    every = [
        Command(
            "train",
            "train",
            ("train", MODEL, *training, *averaged),
            ("train", MODEL, *training, *averaged, "--seed", "5"),
            ("weights.safetensors",),
            True,
            checkpoints + figures,
        ),
        Command(
            "train, two stages",
            "train",
            ("train", MODEL, *stages, *training),
            ("train", MODEL, *stages, *training, "--seed", "5"),
            spiking,
            True,
            checkpoints + figures,
        ),
        Command("tune", "tune", tuning, (*tuning, "--seed", "5"), spiking, True, checkpoints + figures),
        Command(
            "convert",
            "convert",
            ("convert", MODEL, *weights, *DATA, *made, "--steps", "2", "--out", "out/network.safetensors"),
            ("convert", MODEL, *weights, *DATA, *made, "--steps", "4", "--out", "out/network.safetensors"),
            spiking,
        ),
        Command(
            "search",
            "search",
            (*searching, *found, "--out", "out/trials.json"),
            (*searching, "--candidate", "potential_init", *found, "--out", "out/others.json"),
            ("best.safetensors", "page.html"),
        ),
        Command(
            "run",
            "run",
            ("run", "inputs/recipe.toml", *CPU, "--out", "out/run"),
            ("run", "inputs/other.toml", *CPU, "--out", "out/run"),
            ("run/result.json", "run/seed0/tuned.safetensors", "run/seed0/converted.safetensors"),
            True,
            (*checkpoints, *figures, "run.json"),
        ),
    ]
    endings = {"nir": "network.nir", "onnx": "network.onnx", "torch": "network.pt2", "folder": "shared"}
    for kind, name in endings.items():
        how = ("--to", kind, "--out", f"out/{name}")
        results = (f"{name}/network.safetensors",) if kind == "folder" else (name,)
        every.append(
            Command(
                f"export, {kind}",
                "export",
                ("export", network, *how),
                ("export", "inputs/other.safetensors", *how),
                results,
                removed=("README.md", "config.json") if kind == "folder" else (),
            )
        )
    return (command for command in every if only in ("", command.name, command.group))


def contents(folder: Path) -> dict[str, Any]:
    """What the files below `folder` hold, by path, without times and commands.

    Raises:
        Broken: one of them is not whole.
    """
    return {str(path.relative_to(folder)): content(path) for path in files(folder)}


def files(folder: Path) -> list[Path]:
    """All but what a killed process may leave: temporary names."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not is_left(path.relative_to(folder)))


def is_left(path: Path) -> bool:
    return any(part.startswith(".") and part.endswith(".part") for part in path.parts)


class Broken(Exception):
    """A file is not whole."""


def content(path: Path) -> Any:
    """What a file holds, once it is found whole.

    Raises:
        Broken: it is not.
    """
    try:
        return READERS[path.suffix](path)
    except Exception as error:
        raise Broken(f"{path.name}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}") from error


def _safetensors(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    if "quickspike" in header:
        qs.load(path)
        described = json.loads(header["quickspike"])
        # With --resume the command that made it is another.
        described["provenance"].get("made", {}).pop("by", None)
        return [described, _digest(tensors)]
    return _digest(tensors)


def _checkpoint(path: Path) -> Any:
    state = torch.load(path, weights_only=True)
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in state["rows"]]
    return [rows, *(_digest(state[name]) for name in ("module", "optimiser", "average", "best"))]


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(tensors):
        digest.update(leaf.contiguous().numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
    return digest.hexdigest()


def _json(path: Path) -> Any:
    def timeless(data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: timeless(value) for key, value in data.items() if key not in (*TIMES, "command", "commit")}
        return [timeless(one) for one in data] if isinstance(data, list) else data

    text = path.read_text(encoding="utf-8")
    return type(json.loads(text)) if path.name == "seconds.json" else timeless(json.loads(text))


def _csv(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    if not text.endswith("\n") or not all(row["stage"] and None not in row.values() for row in rows):
        raise ValueError("cut off")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def _page(path: Path) -> str:
    if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("cut off")
    return "page"


def _bytes(check: Callable[[Path], object]) -> Callable[[Path], str]:
    def read(path: Path) -> str:
        check(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return read


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _safetensors,
    ".ckpt": _checkpoint,
    ".json": _json,
    ".csv": _csv,
    ".html": _page,
    ".nir": _bytes(load_nir),
    ".onnx": _bytes(check_onnx),
    ".pt2": _bytes(load_program),
    ".md": _bytes(lambda path: path.read_text(encoding="utf-8").index("quickspike")),
    ".toml": _bytes(lambda path: path.read_text(encoding="utf-8").index("[tune]")),
}
