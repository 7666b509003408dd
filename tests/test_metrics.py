"""Figures on disk: one row per epoch, whole at any time, and what TensorBoard reads back."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quickspike.data import DataSet
from quickspike.errors import OptionError, QuickspikeError
from quickspike.evaluation import make_fabric
from quickspike.files import OutputError
from quickspike.metrics import Metrics
from quickspike.training import Interrupted, Silent, Trainer, Training


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def keys(folder: Path) -> list[tuple[str, int]]:
    return [(row["stage"], int(row["epoch"])) for row in table(folder)]


def rows(*epochs: int, **more: float) -> list[dict[str, float]]:
    return [{"epoch": epoch, "loss": 1 / epoch, **more} for epoch in epochs]


def test_rows_are_added_epoch_by_epoch(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for epoch in (1, 2, 3):
        metrics.extend("source", rows(epoch))
        assert keys(tmp_path) == [("source", number) for number in range(1, epoch + 1)]
    assert [float(row["loss"]) for row in table(tmp_path)] == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-5)


def test_a_row_that_is_there_is_replaced(tmp_path: Path) -> None:
    Metrics(tmp_path).extend("source", rows(1, 2, loss=5.0))
    Metrics(tmp_path).extend("source", rows(2, loss=7.0))
    assert keys(tmp_path) == [("source", 1), ("source", 2)]
    assert [float(row["loss"]) for row in table(tmp_path)] == [5, 7]


def test_two_stages_share_a_file_and_not_all_columns(tmp_path: Path) -> None:
    Metrics(tmp_path).extend("ann", rows(1, 2))
    Metrics(tmp_path).extend("tune", rows(1, validation_accuracy=91.5))
    Metrics(tmp_path).extend("ann", rows(3))
    assert sorted(keys(tmp_path)) == [("ann", 1), ("ann", 2), ("ann", 3), ("tune", 1)]
    found = {(row["stage"], row["epoch"]): row["validation_accuracy"] for row in table(tmp_path)}
    assert found == {("ann", "1"): "", ("ann", "2"): "", ("ann", "3"): "", ("tune", "1"): "91.5"}


def test_without_a_folder_or_rows_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Metrics(None).extend("source", rows(1))
    Metrics(None, tensorboard=True).extend("source", rows(1))
    Metrics(tmp_path / "new").extend("source", [])
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_whole_whenever_writing_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Metrics(tmp_path).extend("source", rows(1, 2))
    before = (tmp_path / "metrics.csv").read_bytes()

    def power_failure(*args: Any) -> None:
        assert (tmp_path / "metrics.csv").read_bytes() == before
        raise SystemError

    # The last moment at which the new rows are not yet in place.
    monkeypatch.setattr(os, "fsync", power_failure)
    with pytest.raises(SystemError):
        Metrics(tmp_path).extend("source", rows(3))
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("text", ["hello\n", "epoch,loss\n1,0.5\n", "stage,epoch\nsource,one\n", "\x00\x00\n"])
def test_a_file_that_is_no_table_of_ours_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(QuickspikeError, match=r"metrics\.csv") as caught:
        Metrics(tmp_path).extend("source", rows(1))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "metrics.csv").read_text() == text


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"metrics\.csv"):
        Metrics(tmp_path / "file").extend("source", rows(1))


# TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (epoch, value) of every curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_the_figures_back(tmp_path: Path) -> None:
    Metrics(tmp_path, tensorboard=True).extend("ann", rows(1, 2, validation_accuracy=50.0))
    Metrics(tmp_path, tensorboard=True).extend("tune", rows(1))
    found = scalars(tmp_path)
    assert sorted(found) == ["ann/loss", "ann/validation_accuracy", "tune/loss"]
    assert found["ann/loss"] == [(1, 1.0), (2, 0.5)]
    assert found["ann/validation_accuracy"] == [(1, 50.0), (2, 50.0)]
    assert found["tune/loss"] == [(1, 1.0)]


def test_without_tensorboard_the_option_is_refused_and_the_rest_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match=r"quickspike\[tensorboard\]"):
        Metrics(tmp_path, tensorboard=True)
    Metrics(tmp_path).extend("source", rows(1))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


# Of a training


class Stop(Silent):
    """Ctrl-C when the third epoch's row is there, before its checkpoint."""

    def row(self, stage: str, row: dict[str, float]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def train(digits: DataSet) -> Callable[..., Any]:
    def run(stage: str, folder: Path, resume: bool = False, tensorboard: bool = True, watcher: Any = None, **settings: Any) -> Any:
        chosen = Training(**{"epochs": 4, "batch_size": 500, "validation": 50, "learning_rate": 0.01, **settings})
        trainer = Trainer(
            fabric=make_fabric("cpu"),
            data=digits,
            settings=chosen,
            folder=folder,
            resume=resume,
            tensorboard=tensorboard,
            watcher=watcher or Silent(),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        return trainer(network, stage)

    return run


def test_a_resumed_training_has_every_row_once(train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train("source", tmp_path, watcher=Stop())
    history = train("source", tmp_path, resume=True)
    train("tune", tmp_path, epochs=2)
    assert keys(tmp_path) == [("source", 1), ("source", 2), ("source", 3), ("source", 4), ("tune", 1), ("tune", 2)]
    for row, found in zip(history.rows, table(tmp_path)[:4], strict=True):
        assert {name: float(found[name]) for name in row} == pytest.approx(row, rel=1e-5)
    curves = scalars(tmp_path)
    assert [step for step, _ in curves["tune/loss"]] == [1, 2]
    # The third epoch was run twice, with the same result; what the checkpoint held is not written again.
    assert [step for step, _ in curves["source/validation_accuracy"]] in ([1, 2, 3, 4], [1, 2, 3, 3, 4])
    assert list(dict(curves["source/loss"]).values()) == pytest.approx([row["loss"] for row in history.rows])


def test_a_training_that_starts_anew_leaves_no_row_of_the_one_before(train: Callable[..., Any], tmp_path: Path) -> None:
    train("other", tmp_path, epochs=1, tensorboard=False)
    train("source", tmp_path, epochs=4, tensorboard=False)
    train("source", tmp_path, epochs=2, tensorboard=False)
    assert keys(tmp_path) == [("other", 1), ("source", 1), ("source", 2)]


def test_figures_are_written_after_every_epoch(train: Callable[..., Any], tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(Silent):
        def row(self, stage: str, row: dict[str, float]) -> None:
            seen.append(len(table(tmp_path)))

    train("source", tmp_path, watcher=Look(), tensorboard=False)
    assert seen == [1, 2, 3, 4]


def test_a_disk_that_is_full_for_tensorboard_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    metrics = Metrics(tmp_path, tensorboard=True)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.raises(OutputError, match=r"TensorBoard .* No space left"):
        metrics.extend("ann", rows(1))
