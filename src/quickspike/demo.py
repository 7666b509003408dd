"""The demo: train a small network on the embedded digits, convert it, compare, save, and prove the file by loading it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from quickspike.api import convert
from quickspike.checkpoint import load
from quickspike.conversion import SpikingNetwork
from quickspike.data import DataSet, load_data
from quickspike.errors import QuickspikeError
from quickspike.evaluation import Report, evaluate, make_fabric
from quickspike.files import check_writable, write_text
from quickspike.models import digits_cnn, save_weights
from quickspike.page import described, write_page
from quickspike.report import plot_accuracy

STEPS = (1, 2, 4, 8)
METHODS = ("threshold_balancing", "potential_init")
Track = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Demo:
    """What the demo gave."""

    reports: dict[str, Report]
    """By method, each converted for T = 8 and read out after 1, 2, 4 and 8 steps."""
    network: Path
    """The saved spiking network, loaded again and found equal."""
    picture: Path
    page: Path
    """What the networks do, and what they cost, as HTML."""


def run_demo(folder: str | Path, track: Track = lambda items, _: items) -> Demo:
    """Train, convert, evaluate, save and load again; everything lands in `folder`.

    Args:
        folder: made if missing; files of an earlier demo are replaced.
        track: wraps long loops to show progress.

    Raises:
        OutputError: the folder cannot be written.
        QuickspikeError: the loaded network differs from the saved one.
    """
    folder = Path(folder)
    check_writable(folder / "network.safetensors")
    data = load_data("digits")
    source = train_digits(data, track=track)
    save_weights(source, folder / "source.safetensors")
    networks = {name: convert(source, data.loader("train", limit=500), method=name, steps=STEPS[-1]) for name in METHODS}
    reports = {name: evaluate(snn, data.loader("test"), source, STEPS) for name, snn in networks.items()}
    path = folder / "network.safetensors"
    networks[METHODS[0]].save(path)
    _prove(networks[METHODS[0]], path, data)
    write_text(folder / "report.json", json.dumps({name: report.to_json() for name, report in reports.items()}, indent=2))
    plot_accuracy(reports, folder / "accuracy.png")
    entries = [described(name, reports[name], snn, data) for name, snn in networks.items()]
    write_page(folder / "report.html", "Handwritten digits in a few time steps", entries, "quickspike demo")
    return Demo(reports, path, folder / "accuracy.png", folder / "report.html")


def train_digits(data: DataSet, epochs: int = 20, seed: int = 0, track: Track = lambda items, _: items) -> nn.Module:
    """A small network trained on the digits from scratch in some seconds; the global random state is left alone."""
    fabric = make_fabric("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits_cnn()
        optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
        shuffle = torch.Generator().manual_seed(seed)
        loader = DataLoader(data.train, batch_size=64, shuffle=True, generator=shuffle, drop_last=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=epochs * len(loader))
        network, optimiser = fabric.setup(model, optimiser)
        for _ in track(range(epochs), "training the source network"):
            for images, labels in loader:
                optimiser.zero_grad()
                fabric.backward(F.cross_entropy(network(images), labels))
                optimiser.step()
                schedule.step()
    return model.eval()


def _prove(snn: SpikingNetwork, path: Path, data: DataSet) -> None:
    images = next(iter(data.loader("test")))[0]
    with torch.inference_mode():
        same = torch.equal(snn(images), load(path)(images))
    if not same:
        raise QuickspikeError(f"{path}: the loaded network answers differently from the saved one")
