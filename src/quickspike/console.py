"""What the command line shows: tables and JSON on stdout, progress and figures of a training on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quickspike.wrapped import Wrapped

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID


def show(what: RenderableType) -> None:
    """Print text or a table on stdout."""
    from rich.console import Console

    Console(soft_wrap=isinstance(what, str), highlight=False, markup=False).print(what)


def dump(data: Any) -> str:
    """JSON text; NaN and infinity are errors, since other programs cannot read them."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def print_json(data: Any) -> None:
    """Print JSON on stdout."""
    sys.stdout.write(dump(data))


class Tracked(Wrapped):
    """An iterable of known length whose passes show a progress bar."""

    def __init__(self, items: Any, what: str) -> None:
        super().__init__(items)
        self.what = what

    def __iter__(self) -> Any:
        return iter(track(self.source, self.what))


def track(items: Iterable[Any], what: str) -> Iterable[Any]:
    """Show a bar with progress, time taken and time left on stderr; nothing if that is not a terminal."""
    if not sys.stderr.isatty():
        return items

    def tracked() -> Iterable[Any]:
        with _progress() as progress:
            task = progress.add_task(what, total=_length(items), note="")
            for item in items:
                yield item
                progress.advance(task)

    return tracked()


def _length(items: Any) -> int | None:
    return len(items) if hasattr(items, "__len__") else None


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=120)


class TrainingWatcher:
    """Progress of a training: a bar with rate and time left if stderr is a terminal, and one line per epoch."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, stage: str, samples: int) -> None:
        """A stage begins."""
        if sys.stderr.isatty() and not self.quiet:
            self._progress = _progress()
            self._task = self._progress.add_task(f"training: {stage}", total=samples, note="images")
            self._progress.start()

    def advance(self, samples: int) -> None:
        """More images are done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, samples)
            speed = self._progress.tasks[-1].speed
            self._progress.update(self._task, note=f"images, {speed:,.0f}/s" if speed else "images")

    def row(self, stage: str, row: Mapping[str, float]) -> None:
        """The figures of an epoch."""
        if self.quiet:
            return
        figures = ", ".join(
            f"{name.replace('_', ' ')} {value:.5g}" for name, value in row.items() if name not in ("epoch", "learning_rate")
        )
        line = f"{stage}, epoch {int(row['epoch'])}: {figures}"
        if self._progress is not None:
            self._progress.console.print(line, highlight=False)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def end(self) -> None:
        """The stage is over."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
