"""Figures of a training on disk: metrics.csv, and TensorBoard where it is asked for."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quickspike.errors import OptionError, QuickspikeError
from quickspike.files import OutputError, check_writable, write_text


class Metrics:
    """Rows of figures, written after every epoch.

    Args:
        folder: gets `metrics.csv`, whole at any time; None writes nothing.
        tensorboard: also write event files for TensorBoard into `folder`.
    """

    def __init__(self, folder: Path | None, tensorboard: bool = False) -> None:
        self.folder = folder
        self._events = _event_writer(folder) if tensorboard and folder is not None else None

    def begin(self, stage: str, rows: Sequence[dict[str, float]]) -> None:
        """Start or continue a stage: its rows are these now, whatever an earlier training left."""
        if self.folder is None:
            return
        path = self.folder / "metrics.csv"
        found = _read(path)
        kept = [row for row in found if row["stage"] != stage]
        if rows or len(kept) < len(found):
            write_text(path, _to_csv([*kept, *({"stage": stage, **row} for row in rows)]))

    def extend(self, stage: str, rows: Sequence[dict[str, float]]) -> None:
        """Add rows of a stage; rows of the same stage and epoch that are there already are replaced."""
        if self.folder is None or not rows:
            return
        path = self.folder / "metrics.csv"
        new = {(stage, int(row["epoch"])) for row in rows}
        kept = [row for row in _read(path) if (row["stage"], int(row["epoch"])) not in new]
        write_text(path, _to_csv([*kept, *({"stage": stage, **row} for row in rows)]))
        if self._events is not None:
            with _writing(self.folder):
                for row in rows:
                    for name, value in row.items():
                        if name != "epoch":
                            self._events.add_scalar(f"{stage}/{name}", value, int(row["epoch"]))
                self._events.flush()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = [{key: value for key, value in row.items() if value != ""} for row in reader]
        whole = {"stage", "epoch"} <= set(reader.fieldnames or ()) and all(row["stage"] and int(row["epoch"]) > 0 for row in rows)
    except (KeyError, ValueError, TypeError, csv.Error):
        whole = False
    if not whole:
        raise QuickspikeError(f"{path}: not a table that quickspike has written; move it away, or choose another folder")
    return rows


def _to_csv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(["stage", "epoch", *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def _event_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise OptionError("tensorboard is not installed; install it with: pip install 'quickspike[tensorboard]'") from None
    check_writable(folder / "metrics.csv")
    with _writing(folder):
        return SummaryWriter(str(folder))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """TensorBoard writes by itself, bit by bit."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write the figures for TensorBoard in {folder}: {error.strerror or error}") from error
