"""The commands that train: train, tune, run and compare, in this process wherever possible."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quickspike as qs
from cli_results import Result
from quickspike.augmentation import Augmentation
from quickspike.cli import main
from quickspike.console import TrainingWatcher, show
from quickspike.data import DataSet, load_data
from quickspike.method import all_methods
from quickspike.models import load_model
from quickspike.options import options_of
from quickspike.report import search_tables
from quickspike.searching import Found, Trial
from quickspike.training import Training
from quickspike.tuning import Tuning

MODEL = """
from torch import nn


def net():
    layers = (nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, 10))
    return nn.Sequential(*layers)


def large_pictures():
    return nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""

RECIPE = """
title = "a small experiment"
model = "digits_cnn,width=4"
[data]
name = "digits"
calibration = 50
[method]
name = "potential_init"
steps = 2
[evaluate]
steps = [2]
[source]
epochs = 1
batch_size = 512
learning_rate = 0.05
[[published]]
steps = 2
accuracy = 77.5
source = "arXiv 0000.00000"
evidence = "paper"
network = "digits net"
"""


def failed(result: Result, *parts: str, code: int = 2) -> None:
    """A user's error: its status, one line on stderr, nothing on stdout."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert result.err.startswith("quickspike: error: "), result.err
    assert result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err


def ended_well(result: Result) -> None:
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert "Warning" not in result.err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.py"
    path.write_text(MODEL)
    return path


def save(path: Path, pixels: Any, labels: Any) -> str:
    np.savez(path, train_images=pixels, train_labels=labels, test_images=pixels[:20], test_labels=labels[:20])
    return f"npz:{path}"


@pytest.fixture(scope="module")
def few(digits: DataSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 digits as an npz file."""
    train: Any = digits.train
    return save(tmp_path_factory.mktemp("data") / "few.npz", train.pixels[:300, 0].numpy(), train.labels[:300].numpy())


QUICK = ("--device", "cpu", "--epochs", 1, "--batch-size", 100, "--learning-rate", 0.05)


@pytest.fixture(scope="module")
def network(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spiking network."""
    path = tmp_path_factory.mktemp("network") / "network.safetensors"
    main(["convert", f"{model}:net", "--data", "digits", "--steps", "2", "--calibration-images", "100", "--out", str(path), "--json"])
    return path


def epochs_of(folder: Path) -> list[tuple[str, int]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return [(row["stage"], int(row["epoch"])) for row in csv.DictReader(stream)]


# Help


SETTINGS = {
    "train": (Training, Augmentation),
    "train --method qcfs": (Training, Augmentation, all_methods()["qcfs"]),
    "train --method=diet_snn": (Training, Augmentation, all_methods()["diet_snn"]),
    "tune": (Training, Augmentation, Tuning),
}
HARDWARE = ("--device NAME", "--devices N", "[unit: devices; range: >= 1]", "--nodes N", "--strategy NAME", "--precision NAME")
FILES = ("--out DIR", "--resume", "--tensorboard", "--json")
TEACHER = ("--teacher MODEL", "--teacher-weights FILE")
DATA = ("--data NAME", "--data-dir DIR", "--mean M", "--std S", "--download")
OTHER = {
    "train": ("MODEL", *DATA, *HARDWARE, *FILES, *TEACHER, "--method NAME", "--weights FILE", "--calibration-images N"),
    "tune": ("NETWORK", *DATA, *HARDWARE, *FILES, *TEACHER),
    "run": ("RECIPE", "--out DIR", "--seeds N", "--resume", "--tensorboard", "--dry-run", "--json", "--data NAME", *HARDWARE),
    "compare": (
        *("MODEL", *DATA, "--methods NAME", "--steps T", "--weights FILE", "--calibration-images N", "--images N", "--out FILE"),
        *("--page FILE", "--device NAME", "--json", "[unit: images; range: >= 1]"),
    ),
    "search": (
        *("MODEL", *DATA, "--methods NAME", "--max-drop LOSS", "--most-steps T", "--synchronous", "--energy DEVICE", "--weights FILE"),
        *("--max-energy NJ", "--max-minutes N", "--tune-epochs N", "--precision NAME"),
        *("--calibration-images N", "--images N", "--out FILE", "--network FILE", "--device NAME", "--json"),
    ),
}


@pytest.mark.parametrize("command", SETTINGS)
def test_help_names_every_setting_with_unit_and_range(command: str, run: Any) -> None:
    result = run(*command.split(), "--help")
    assert (result.code, result.err) == (0, "")
    for owner in SETTINGS[command]:
        for name, (declared, kind, _) in options_of(owner).items():
            flag = f"--{name.replace('_', '-')}"
            assert f"{flag} " in result.out or f"--no-{flag[2:]} " in result.out, flag
            assert declared.describe() in result.out
            for choice in typing.get_args(kind):
                assert str(choice) in result.out


@pytest.mark.parametrize("command", OTHER)
def test_help_names_every_other_option(command: str, run: Any) -> None:
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    for part in OTHER[command]:
        assert part in result.out, part


def test_help_of_tune_shows_its_own_defaults(run: Any) -> None:
    out = run("tune", "--help").out
    for part in ("(default: adam)", "(default: 0.0001)", "(default: cosine)"):
        assert part in out
    assert "(default: sgd)" not in out


def test_help_of_the_program_names_the_commands(run: Any) -> None:
    result = run("--help")
    for command in OTHER:
        assert command in result.out


# From end to end


def test_train(run: Any, tmp_path: Path, digits: DataSet) -> None:
    out = tmp_path / "run"
    result = run("train", "digits_cnn,width=4", "--data", "digits", *QUICK, "--seed", 3, "--validation", 100, "--out", out)
    ended_well(result)
    assert result.out == f"{out}/weights.safetensors; figures of every epoch: {out}/metrics.csv\n"
    assert result.err.startswith("source, epoch 1: loss ")
    assert "validation accuracy" in result.err
    assert result.err.count("\n") == 1
    assert epochs_of(out) == [("source", 1)]
    assert sorted(path.name for path in out.iterdir()) == ["metrics.csv", "source.ckpt", "weights.safetensors"]
    # The random weights that training starts from are those of the seed.
    before, after = load_model("digits_cnn,width=4", seed=3), load_model("digits_cnn,width=4", out / "weights.safetensors")
    moved = max(float((one - other).detach().abs().max()) for one, other in zip(before.parameters(), after.parameters(), strict=True))
    assert 0 < moved < 0.5


def test_train_goes_on_from_weights_and_says_json(run: Any, model: Path, few: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    ended_well(run("train", f"{model}:net", "--data", few, *QUICK, "--out", first))
    arguments = ("--data", few, *QUICK, "--weights", first / "weights.safetensors", "--optimiser", "sgd", "--momentum", 0)
    result = run("train", f"{model}:net", *arguments, "--warmup", 0, "--learning-rate", 1e-9, "--out", tmp_path / "next", "--json")
    ended_well(result)
    found = json.loads(result.out)
    assert found["out"] == str(tmp_path / "next" / "weights.safetensors")
    assert [row["epoch"] for row in found["history"]] == [1]
    one, other = (load_model(f"{model}:net", path / "weights.safetensors") for path in (first, tmp_path / "next"))
    for parameter, expected in zip(other.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5)


def test_train_with_a_method_converts_too(run: Any, model: Path, few: str, tmp_path: Path) -> None:
    arguments = ("--data", few, *QUICK, "--method", "qcfs", "--steps", 3, "--levels", 2, "--calibration-images", 50)
    result = run("train", f"{model}:net", *arguments, "--tensorboard", "--out", tmp_path)
    ended_well(result)
    assert result.out.startswith(f"{tmp_path}/network.safetensors; ")
    snn = qs.load(tmp_path / "network.safetensors")
    assert snn.steps == 3
    assert snn.method["name"] == "qcfs"
    assert snn.method["options"]["levels"] == 2
    assert snn.provenance["model"] == "tiny.py:net"
    assert snn.provenance["data"] == "few.npz"
    assert str(tmp_path.parent) not in json.dumps(snn.provenance)
    assert epochs_of(tmp_path) == [("ann", 1)]
    assert any(path.name.startswith("events.out.tfevents") for path in tmp_path.iterdir())
    evaluated = run("evaluate", tmp_path / "network.safetensors", "--data", few, "--device", "cpu", "--json")
    assert json.loads(evaluated.out)["samples"] == 20


def test_tune(run: Any, network: Path, few: str, tmp_path: Path) -> None:
    before = network.read_bytes()
    arguments = ("--data", few, "--device", "cpu", "--epochs", 2, "--learning-rate", 0.01, "--no-leaks", "--dropout", 0.1)
    result = run("tune", network, *arguments, "--out", tmp_path, "--json")
    ended_well(result)
    assert json.loads(result.out)["out"] == str(tmp_path / "network.safetensors")
    assert network.read_bytes() == before
    old, new = qs.load(network).state_dict(), qs.load(tmp_path / "network.safetensors").state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any(name.endswith("weight") for name in changed)
    assert any(name.endswith("threshold") for name in changed)
    assert not any(name.endswith("leak") for name in changed)
    assert epochs_of(tmp_path) == [("tune", 1), ("tune", 2)]


def test_tune_with_a_teacher(run: Any, network: Path, model: Path, few: str, tmp_path: Path) -> None:
    quick = ("--data", few, "--device", "cpu", "--epochs", 1, "--learning-rate", 0.01)
    weights = []
    for name, seed in (("one", 1), ("other", 2)):
        ended_well(run("train", f"{model}:net", "--data", few, *QUICK, "--epochs", 0, "--seed", seed, "--out", tmp_path / name))
        for share in ("--distill", "--distill-features"):
            taught = (share, 1, "--teacher", f"{model}:net", "--teacher-weights", tmp_path / name / "weights.safetensors")
            ended_well(run("tune", network, *quick, *taught, "--out", tmp_path / f"tuned by {name}, {share}"))
            weights.append(qs.load(tmp_path / f"tuned by {name}, {share}" / "network.safetensors").state_dict())
    for one, other in itertools.combinations(weights, 2):
        assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_distillation_from_nothing_is_refused(run: Any, network: Path, model: Path, few: str, tmp_path: Path) -> None:
    data = ("--data", few, "--device", "cpu", "--epochs", 1, "--out", tmp_path)
    for command, part in (
        (("train", f"{model}:net", "--distill", 0.5), "--distill needs a trained network"),
        (("train", "digits_cnn,width=2", "--method", "qcfs", "--distill", 0.5), "--distill needs a trained network"),
        (("tune", network, "--distill", 0.5), "distill=0.5 needs a teacher"),
        (("tune", network, "--teacher", f"{model}:net"), "--teacher does nothing without --distill"),
        (("train", f"{model}:net", "--distill-features", 0.5), "--distill-features needs a trained network"),
        (("tune", network, "--distill-features", 0.5), "distill_features=0.5 needs a teacher"),
    ):
        result = run(*command, *data)
        assert result.code == 2
        assert part in result.err
        assert not list(tmp_path.glob("*.safetensors"))


def test_run(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(RECIPE)
    arguments = ("run", "small.toml", "--device", "cpu", "--seeds", 4)
    monkeypatch.setattr(sys, "argv", ["quickspike", *map(str, arguments)])
    result = run(*arguments)
    ended_well(result)
    assert "a small experiment: accuracy in % on 450 images, 1 seed(s)" in result.out
    assert "77.50, digits net, converted [paper]" in result.out
    written = json.loads(Path("runs/small/result.json").read_text())
    assert written["command"] == "quickspike run small.toml --device cpu --seeds 4"
    assert [one["seed"] for one in written["runs"]] == [4]
    again = run(*arguments, "--resume", "--json")
    ended_well(again)
    assert json.loads(again.out)["runs"] == written["runs"]


def test_search(run: Any, model: Path, few: str, tmp_path: Path) -> None:
    out, network = tmp_path / "trials.json", tmp_path / "network.safetensors"
    arguments = ("search", f"{model}:net", "--data", few, "--methods", "threshold_balancing", "rate_norm", "--calibration-images", 50)
    options = ("--images", 60, "--max-drop", 30, "--most-steps", 4, "--device", "cpu", "--out", out, "--network", network)
    result = run(*arguments, *options, "--synchronous", "--energy", "45nm_fp32")
    ended_well(result)
    assert "threshold_balancing synchronous=True, T = " in result.err
    trials = json.loads(out.read_text())["trials"]
    assert result.err.count("T = ") == len(trials)
    again = json.loads(run(*arguments, *options, "--synchronous", "--energy", "45nm_fp32", "--json").out)
    assert again["trials"] == trials
    assert again["best"]["drop"] <= 30
    steps = again["best"]["steps"]
    report = json.loads(run("evaluate", network, "--data", few, "--device", "cpu", "--steps", steps, "--json").out)
    assert report["accuracy"] == again["test"]["accuracy"]
    failed(run(*arguments, "--device", "cpu", "--max-drop", -1), "max_drop")
    bounded = json.loads(run(*arguments, "--max-drop", 90, "--energy", "45nm_fp32", "--max-energy", 0.001, "--device", "cpu", "--json").out)
    assert (bounded["best"], bounded["max_energy"]) == (None, 1.0)
    hasty = run(*arguments, "--max-minutes", 1e-9, "--device", "cpu")
    assert "more time (--max-minutes): it was up before all was tried" in " ".join(hasty.out.split())


def test_a_search_that_fine_tunes(run: Any, model: Path, few: str, tmp_path: Path) -> None:
    out = tmp_path / "trials.json"
    arguments = ("search", f"{model}:net", "--data", few, "--methods", "threshold_balancing", "--device", "cpu", "--out", out)
    options = ("--calibration-images", 50, "--most-steps", 1, "--max-drop", 100, "--tune-epochs")
    found = json.loads(run(*arguments, *options, 1, "--images", 60, "--json").out)
    assert [one["candidate"] for one in found["trials"]] == ["threshold_balancing", "threshold_balancing tuned for 1 epoch"]
    assert len(list(out.with_suffix("").glob("*/network.safetensors"))) == 1
    size = load_data(few).size("train")
    failed(run(*arguments, *options, 1, "--images", size), f"{size} of {size} training images held out leave none to train on")
    failed(run(*arguments, *options, -1, "--images", 60), "epochs must be a whole number >= 0")


def test_a_search_that_finds_nothing_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show(search_tables(Found(None, (Trial("qcfs", 4, 4, 50.0, 40.0, None, 1.0),), (), 90.0, 0.5), None))
    shown = " ".join(capsys.readouterr().out.split())
    assert "qcfs" in shown
    assert "Nothing loses at most 0.5 points; allow more steps (--most-steps), fine-tune (--tune-epochs), or train (train)." in shown


def test_compare(run: Any, model: Path, few: str, tmp_path: Path) -> None:
    arguments = ("--data", few, "--methods", "potential_init", "rate_norm", "--steps", 1, 3, "--calibration-images", 50)
    files = ("--out", tmp_path / "found.json", "--page", tmp_path / "page.html")
    result = run("compare", f"{model}:net", *arguments, "--images", 15, "--device", "cpu", *files)
    ended_well(result)
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("Where the error comes from") == 2
    for part in ("potential_init", "rate_norm", "T = 1", "T = 3", "on 15 images"):
        assert part in result.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: list(reports) for name, reports in found.items()} == {"potential_init": ["1", "3"], "rate_norm": ["1", "3"]}
    for name, reports in found.items():
        for steps, report in reports.items():
            assert report["samples"] == 15
            assert report["method"]["options"]["steps"] == int(steps)
            assert f"{report['accuracy'][steps]:.2f}" in next(line for line in result.out.splitlines() if name in line)
    # Each of its figures is that of a network converted for that T.
    network = tmp_path / "network.safetensors"
    run("convert", f"{model}:net", "--data", few, "--method", "rate_norm", "--steps", 3, "--calibration-images", 50, "--out", network)
    alone = json.loads(run("evaluate", network, "--data", few, "--images", 15, "--device", "cpu", "--json").out)
    assert found["rate_norm"]["3"]["accuracy"]["3"] == alone["accuracy"]["3"]


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_training_shows_rate_and_time_left_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is told by the test: 500 images each second."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    watcher = TrainingWatcher()
    watcher.begin("tune", 10_000)
    progress = watcher._progress
    assert progress is not None
    for now in range(8):
        monkeypatch.setattr(progress, "get_time", lambda now=now: float(now))
        watcher.advance(500)
    progress.refresh()
    bar = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).splitlines()[-1]
    for part in ("training: tune", "4000/10000", "images, 500/s", "left 0:00:12"):
        assert part in bar, bar
    watcher.row("tune", {"epoch": 1, "loss": 0.25, "learning_rate": 0.1, "images_per_second": 500.0})
    assert "tune, epoch 1: loss 0.25, images per second 500" in shown.getvalue()
    watcher.end()
    assert watcher._progress is None


def test_without_a_terminal_or_when_quiet_there_is_no_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for watcher in (TrainingWatcher(), TrainingWatcher(quiet=True)):
        watcher.begin("tune", 100)
        watcher.advance(50)
        watcher.row("tune", {"epoch": 1, "loss": 0.25})
        watcher.end()
    assert capsys.readouterr().err == "tune, epoch 1: loss 0.25\n"
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    quiet = TrainingWatcher(quiet=True)
    quiet.begin("tune", 100)
    quiet.advance(50)
    quiet.end()
    assert shown.getvalue() == ""


# Options of every method


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_train_takes_the_options_of_every_method(method: str, run: Any) -> None:
    result = run("train", "digits_cnn", "--method", method, "--help")
    assert result.code == 0
    for option in options_of(all_methods()[method]):
        assert re.search(f"--(no-|method-)?{option.replace('_', '-')}", result.out), option


def test_an_option_that_a_method_shares_with_the_training_has_a_name_of_its_own(run: Any, tmp_path: Path) -> None:
    result = run("train", "digits_cnn", "--method", "potential_init", "--help")
    assert "--method-seed" in result.out and " --seed" in result.out
    chosen = ("--method", "potential_init", "--initial", "uniform", "--method-seed", 5, "--seed", 3)
    ended_well(run("train", "digits_cnn,width=2", "--data", "digits", "--epochs", 0, *chosen, "--out", tmp_path, "--device", "cpu"))
    assert qs.load(tmp_path / "network.safetensors").method["options"]["seed"] == 5


# Interrupts


LONG = ("--epochs", 3, "--ema", 0.8, "--validation", 50, "--keep", "best", "--crop", 1, "--noise", 0.05, "--cutout", 2, "--mixup", 0.2)


def interrupt_at(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def advance(watcher: Any, samples: int) -> None:
        nonlocal calls
        calls += 1
        if calls == batch + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("quickspike.console.TrainingWatcher.advance", advance)


@pytest.mark.parametrize("batch", [1, 4])
def test_an_interrupt_says_how_to_go_on_and_going_on_gives_the_same_weights(
    batch: int, run: Any, model: Path, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", f"{model}:net", "--data", few, *QUICK, *LONG, "--out")
    ended_well(run(*arguments, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(batch, patch)
        result = run(*arguments, tmp_path / "cut")
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err
    for part in ("stage source was interrupted", str(tmp_path / "cut" / "source.ckpt"), "--resume"):
        assert part in result.err
    assert not (tmp_path / "cut" / "weights.safetensors").exists()
    resumed = run(*arguments, tmp_path / "cut", "--resume")
    ended_well(resumed)
    # It goes on instead of beginning anew, which would give the same weights.
    assert ("source, epoch 1:" in resumed.err) == (batch == 1)
    one, other = (tmp_path / name / "weights.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    assert epochs_of(tmp_path / "cut") == [("source", 1), ("source", 2), ("source", 3)]


def test_an_interrupted_tune_goes_on(run: Any, network: Path, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("tune", network, "--data", few, *QUICK, *LONG, "--dropout", 0.2, "--out")
    ended_well(run(*arguments, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        result = run(*arguments, tmp_path / "cut")
    assert (result.code, result.out) == (130, "")
    assert "tune.ckpt" in result.err
    resumed = run(*arguments, tmp_path / "cut", "--resume")
    ended_well(resumed)
    assert "tune, epoch 1:" not in resumed.err
    assert "tune, epoch 2:" in resumed.err
    one, other = (qs.load(tmp_path / name / "network.safetensors").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupt_outside_a_training_says_that_nothing_is_half_written(
    run: Any, model: Path, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quickspike.data.load_data", interrupt)
    result = run("train", f"{model}:net", "--data", few, *QUICK, "--out", tmp_path)
    assert (result.code, result.out) == (130, "")
    assert "interrupted; no file was left half-written" in result.err


def test_a_killed_training_ends_like_one_that_was_not(run: Any, model: Path, few: str, tmp_path: Path) -> None:
    """kill -9 leaves no time to tidy up."""
    out = tmp_path / "cut"
    arguments = ("train", f"{model}:net", "--data", few, *QUICK, *LONG, "--epochs", 30, "--rotation", 5, "--out")
    ended_well(run(*arguments, tmp_path / "whole"))
    command = [sys.executable, "-m", "quickspike", *map(str, arguments), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL, lines
    assert not (out / "weights.safetensors").exists()
    done = len(epochs_of(out))
    assert 3 <= done < 30
    result = run(*arguments, out, "--resume")
    ended_well(result)
    # It did go on instead of beginning anew.
    assert result.err.count("\n") in (30 - done, 30 - done + 1)
    assert (out / "weights.safetensors").read_bytes() == (tmp_path / "whole" / "weights.safetensors").read_bytes()
    assert epochs_of(out) == [("source", epoch) for epoch in range(1, 31)]


# A user's errors


TRAIN: dict[str, tuple[list[Any], list[str]]] = {
    "epochs": (["--epochs", -1], ["epochs", "[0, 1000000]", "-1"]),
    "batch size": (["--batch-size", 0], ["batch_size", "0"]),
    "learning rate": (["--learning-rate", 0], ["learning_rate", "(0, 1000]"]),
    "learning rate NaN": (["--learning-rate", "nan"], ["learning_rate", "finite"]),
    "milestones": (["--milestones", "0.9 0.5"], ["milestones", "0.9 0.5"]),
    "patience": (["--patience", 3], ["patience", "validation"]),
    "keep": (["--keep", "best"], ["keep=best", "validation"]),
    "augmentation": (["--crop", -1], ["crop", "-1"]),
    "crop too large": (["--crop", 9], ["crop 9", "[100, 1, 8, 8]"]),
    "validation": (["--validation", 300], ["300 validation images of 300"]),
    "unknown method": (["--method", "qcsf"], ["'qcsf'", "did you mean 'qcfs'"]),
    "option of a method": (["--method", "qcfs", "--levels", 0], ["levels", "0"]),
    "calibration images": (["--method", "qcfs", "--calibration-images", 0], ["0"]),
    "missing weights": (["--weights", "nowhere.pt"], ["nowhere.pt"]),
    "devices": (["--devices", 0], ["cpu", "x 0"]),
    "nodes": (["--nodes", 0], ["node"]),
    "device": (["--device", "abacus"], ["'abacus'"]),
    "precision": (["--precision", "3-true"], ["'3-true'"]),
    "strategy": (["--strategy", "dpp"], ["dpp"]),
    "NaN": (["--learning-rate", 1000, "--clip", 0, "--epochs", 9], ["epoch", "step", "--clip"]),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses_in_one_line(case: str, run: Any, model: Path, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extra, parts = TRAIN[case]
    result = run("train", f"{model}:net", "--data", few, *QUICK, *extra)
    # Figures of whole epochs before a loss that is no number are no part of the message.
    result.err = "".join(line for line in result.err.splitlines(keepends=True) if not line.startswith("source, epoch"))
    failed(result, *parts)
    assert not list(tmp_path.rglob("*.safetensors"))


def pictures(folder: Path, broken: bool) -> str:
    from PIL import Image

    for split in ("train", "val"):
        for label in ("one", "other"):
            (folder / split / label).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (10 * number, 50, 90)).save(folder / split / label / f"{number}.png")
    if broken:
        (folder / "train" / "other" / "1.png").write_bytes(b"no picture")
    return f"imagefolder:{folder}"


IMAGES = {
    "channels": [[], ["3, 8, 8]"]],
    "size": [[], ["1, 12, 12]"]],
    "labels": [[], ["classes", "10"]],
    "channels, with a method": [["--method", "qcfs"], ["[1, 3, 8, 8]"]],
    "size, with a method": [["--method", "qcfs"], ["[1, 1, 12, 12]"]],
    "labels, with a method": [["--method", "qcfs"], ["classes", "10"]],
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_that_do_not_fit_are_refused_in_one_line(case: str, run: Any, model: Path, tmp_path: Path) -> None:
    extra, parts = IMAGES[case]
    shape = (100, 8, 8, 3) if case.startswith("channels") else (100, 12, 12) if case.startswith("size") else (100, 8, 8)
    labels = np.arange(100) % (13 if case.startswith("labels") else 10)
    data = save(tmp_path / "a.npz", np.zeros(shape, np.uint8), labels)
    failed(run("train", f"{model}:net", "--data", data, *QUICK, *extra, "--out", tmp_path / "run"), *parts)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("case", ["channels", "size", "labels"])
def test_images_that_do_not_fit_a_spiking_network_are_refused_in_one_line(case: str, run: Any, network: Path, tmp_path: Path) -> None:
    shape = {"channels": (100, 8, 8, 3), "size": (100, 12, 12), "labels": (100, 8, 8)}[case]
    data = save(tmp_path / "a.npz", np.zeros(shape, np.uint8), np.arange(100) % (13 if case == "labels" else 10))
    result = run("tune", network, "--data", data, *QUICK, "--out", tmp_path / "run")
    failed(result, {"channels": "3, 8, 8]", "size": "12, 12]", "labels": "classes"}[case])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_picture_that_cannot_be_read_is_refused_in_one_line(run: Any, model: Path, tmp_path: Path) -> None:
    """Workers load pictures; their errors come with a traceback."""
    data = pictures(tmp_path / "pictures", broken=True)
    result = run("train", f"{model}:large_pictures", "--data", data, *QUICK, "--batch-size", 4, "--out", tmp_path / "run")
    failed(result, "1.png")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_folder_of_pictures_trains(run: Any, model: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "pictures", broken=False)
    arguments = ("--batch-size", 2, "--validation", 2, "--flip", "--out", tmp_path / "run")
    ended_well(run("train", f"{model}:large_pictures", "--data", data, *QUICK, *arguments))
    assert epochs_of(tmp_path / "run") == [("source", 1)]


def test_an_unwritable_output_is_refused_before_the_work(
    run: Any, model: Path, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "small.toml").write_text(RECIPE)
    monkeypatch.setattr("quickspike.data.load_data", lambda *args, **kwargs: pytest.fail("the work was begun"))
    monkeypatch.setattr("quickspike.recipe.load_data", lambda *args, **kwargs: pytest.fail("the work was begun"))
    out = tmp_path / "file" / "run"
    for arguments in (
        ("train", f"{model}:net", "--data", "digits", "--out", out),
        ("train", f"{model}:net", "--data", "digits", "--method", "qcfs", "--tensorboard", "--out", out),
        ("tune", network, "--data", "digits", "--out", out),
        ("run", tmp_path / "small.toml", "--device", "cpu", "--out", out),
        ("compare", f"{model}:net", "--data", "digits", "--out", out / "found.json"),
    ):
        failed(run(*arguments), "cannot write", str(out))


def test_a_checkpoint_that_does_not_fit_is_refused(run: Any, model: Path, few: str, tmp_path: Path) -> None:
    arguments = ("train", f"{model}:net", "--data", few, *QUICK, "--out", tmp_path)
    ended_well(run(*arguments))
    failed(run(*arguments, "--epochs", 2, "--resume"), str(tmp_path / "source.ckpt"), "epochs=1 (now 2)")
    (tmp_path / "source.ckpt").write_bytes(b"nonsense")
    failed(run(*arguments, "--resume"), str(tmp_path / "source.ckpt"), "remove it")


TUNE: dict[str, tuple[list[Any], list[str]]] = {
    "chunk": (["--chunk", -1], ["chunk", "-1"]),
    "dropout": (["--dropout", 1], ["dropout"]),
    "nothing to learn": (["--no-weights", "--no-thresholds", "--no-leaks"], ["weights", "thresholds", "leaks"]),
    "epochs": (["--epochs", "-3"], ["epochs"]),
}


@pytest.mark.parametrize("case", TUNE)
def test_tune_refuses_in_one_line(case: str, run: Any, network: Path, few: str, tmp_path: Path) -> None:
    extra, parts = TUNE[case]
    failed(run("tune", network, "--data", few, *QUICK, *extra, "--out", tmp_path / "run"), *parts)


def test_tune_refuses_what_is_no_spiking_network(run: Any, model: Path, few: str, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", model):
        failed(run("tune", path, "--data", few, "--out", tmp_path / "run"), str(path))


COMPARE: dict[str, tuple[list[Any], list[str]]] = {
    "unknown method": (["--methods", "qcfs", "qcsf"], ["'qcsf'", "did you mean 'qcfs'"]),
    "steps 0": (["--steps", 0], ["steps"]),
    "no steps": (["--steps"], ["steps"]),
    "images": (["--images", 21], ["21", "20"]),
    "calibration images": (["--calibration-images", 0], ["0"]),
    "out": (["--out", "."], ["folder"]),
    "device": (["--device", "abacus"], ["'abacus'"]),
}


@pytest.mark.parametrize("case", COMPARE)
def test_compare_refuses_in_one_line(case: str, run: Any, model: Path, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extra, parts = COMPARE[case]
    device = [] if "--device" in extra else ["--device", "cpu"]
    methods = [] if "--methods" in extra else ["--methods", "potential_init"]
    failed(run("compare", f"{model}:net", "--data", few, *device, *methods, *extra), *parts)
    assert list(tmp_path.iterdir()) == []


RUN: dict[str, tuple[tuple[str, str], list[Any], list[str]]] = {
    "mistake": (("epochs = 1", "epochs = -1"), [], ["small.toml", "epochs"]),
    "unknown model": (("digits_cnn,", "digits_cn,"), [], ["'digits_cn'", "digits_cnn"]),
    "network for other images": (('model = "digits_cnn,width=4"', 'model = "resnet20"'), [], ["1, 8, 8]"]),
    "negative seed": (("", ""), ["--seeds", -1], ["seed", "-1"]),
    "no seeds": (("", ""), ["--seeds"], ["seeds"]),
    "precision of the recipe": (("[data]", 'precision = "3-true"\n[data]'), [], ["3-true"]),
    "unknown data": (('name = "digits"', 'name = "digit"'), [], ["'digit'", "'digits'"]),
}


@pytest.mark.parametrize("case", RUN)
def test_run_refuses_in_one_line(case: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (old, new), extra, parts = RUN[case]
    Path("small.toml").write_text(RECIPE.replace(old, new, 1))
    failed(run("run", "small.toml", "--device", "cpu", *extra), *parts)
    assert not list(tmp_path.rglob("result.json"))


def test_run_refuses_a_missing_recipe(run: Any, tmp_path: Path) -> None:
    failed(run("run", tmp_path / "missing.toml"), "missing.toml", "No such file")
