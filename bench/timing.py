"""What benchmarks share: interleaved timing in one process, first calls and memory in a process of their own, input, the JSON file."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quickspike.data import DataSet, load_data
from quickspike.files import write_text
from quickspike.memory import keep_freed_memory
from quickspike.models import load_model
from quickspike.preprocessing import Preprocessing
from quickspike.provenance import commit, machine, versions

Times = dict[str, float]
MIB = 2**20
FEWEST = 3
"""Repetitions with a median and a spread."""
RESULTS = Path(__file__).parents[1] / "results" / "bench"
KERNEL_CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
"""Variables that say where compiled kernels are kept from one process to the next."""


BRIEF = 0.5
"""Seconds: for calls that take longer it does not count what the caches held before."""


def interleaved(timed: Mapping[str, Callable[[], object]], repetitions: int, at_most: float = math.inf) -> dict[str, Times]:
    """Median, least and largest time of each in units of the first one's median, and how many times it was run.

    Once `at_most` seconds are over, there are no more repetitions than the fewest that have a median, which is 3.

    All take turns, so that a slower minute of the machine hits them alike. A first call of each is not counted (see
    `first_calls`), and neither is the first call of a turn if it takes less than `BRIEF`: it finds what another program left
    in the caches, which a program that runs by itself never does. Freed memory is kept for all of them alike, since one of
    ours would do it for whatever comes after it.
    """
    keep_freed_memory()
    times = {name: list[float]() for name in timed}
    brief = dict.fromkeys(timed, True)
    started_at = time.perf_counter()
    for repetition in range(repetitions + 1):
        if repetition > FEWEST and time.perf_counter() - started_at > at_most:
            break
        for name, run in timed.items():
            if repetition and brief[name]:
                run()
            started = time.perf_counter()
            run()
            taken = time.perf_counter() - started
            brief[name] = taken < BRIEF
            if repetition:
                times[name].append(taken)
    base = statistics.median(times[next(iter(timed))])
    return {
        name: {
            "ratio": round(statistics.median(own) / base, 3),
            "least": round(min(own) / base, 3),
            "largest": round(max(own) / base, 3),
            "runs": len(own),
        }
        for name, own in times.items()
    }


@dataclass(frozen=True)
class Cost:
    """What a call took in a process of its own."""

    grown: int
    """Bytes that the process had more at most, during the call, than before it."""
    first: float
    """Seconds of the first call."""
    later: float
    """Seconds of the quickest of some further calls."""


def in_own_process(prepare: Callable[..., Callable[[], object]], *arguments: Any, earlier: int = 0, later: int = 0) -> Cost:
    """What the call that `prepare(*arguments)` gives back takes in a fresh process: the first one, and `later` more.

    `prepare` builds networks and images, whose memory is not counted. With `earlier` calls before it the one that is
    measured loads no libraries, compiles nothing and makes no state of an optimiser.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, earlier, later, prepare, arguments))
    process.start()
    sender.close()
    try:
        cost: Cost = receiver.recv()
    except EOFError:
        raise SystemExit(f"the process that measured {arguments} ended early") from None
    finally:
        process.join()
    return cost


def _measure(sender: Any, earlier: int, later: int, prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    run = prepare(*arguments)
    for _ in range(earlier):
        run()
    before = memory_from_here()
    first = seconds_of(run)
    grown = largest_memory() - before
    sender.send(Cost(grown, first, min((seconds_of(run) for _ in range(later)), default=first)))
    sender.close()


def seconds_of(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def first_calls(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> dict[str, float]:
    """Seconds of a first call in a fresh process, and of a later one.

    `cold`: no kernel was compiled before. `warm`: those are found that the cold process left on disk.
    """
    kept = {name: os.environ.get(name) for name in KERNEL_CACHES}
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.environ.update({name: str(Path(folder) / name) for name in KERNEL_CACHES})
            cold, warm = (in_own_process(prepare, *arguments, later=3) for _ in range(2))
        finally:
            for name, value in kept.items():
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})
    return {"cold": round(cold.first, 3), "warm": round(warm.first, 3), "later": round(warm.later, 3)}


def memory_from_here() -> int:
    """Bytes that this process has now; `largest_memory` counts anew from here where the system can do that.

    What was freed goes back to the system first: taken again it would not show.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return largest_memory()
    return _status("VmRSS") or largest_memory()


def largest_memory() -> int:
    """Bytes of the largest resident memory of this process so far, or since `memory_from_here`."""
    # On Linux getrusage begins with what the parent had. Kilobytes, but bytes on macOS.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(entry: str) -> int | None:
    status = Path("/proc/self/status")
    found = re.search(rf"^{entry}:\s*(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    return None if found is None else int(found[1]) * 1024


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option --out, by default the script's own file under results/bench."""
    parser.add_argument("--out", type=Path, default=RESULTS / f"{Path(sys.argv[0]).stem}.json", help="JSON [default: %(default)s]")


def network_and_data(parser: argparse.ArgumentParser, reports: bool = False) -> tuple[argparse.Namespace, nn.Module, DataSet]:
    """(options, network, data) from the command line, once the options that a benchmark adds to these are in `parser`.

    With `reports`, --out is a folder and may be left out.
    """
    parser.add_argument("model", help="as on the command line of quickspike")
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", help="as on the command line of quickspike")
    parser.add_argument("--mean", type=float, nargs="+", required=True)
    parser.add_argument("--std", type=float, nargs="+", required=True)
    parser.add_argument("--resize", type=int, default=0, help="shorter side of the pictures [unit: pixels; default: as they are]")
    parser.add_argument("--bgr", action="store_true", help="blue first, in --mean and --std too")
    if reports:
        parser.add_argument("--out", type=Path, metavar="FOLDER", help="where a report for each goes")
    else:
        add_out(parser)
    options = parser.parse_args()
    model = load_model(options.model, options.weights)
    preprocessing = Preprocessing(tuple(options.mean), tuple(options.std), options.resize, bgr=options.bgr)
    data = load_data(options.data, preprocessing=preprocessing)
    # What is saved names no file of whoever runs it.
    options.model, options.weights, options.data = options.model.rpartition(":")[2], options.weights.name, Path(options.data).name
    return options, model, data


def save(out: Path, rows: object, options: argparse.Namespace, **more: object) -> None:
    """Write what was found, with what it was found on, to `out`."""
    result = {
        "rows": rows,
        **more,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }
    write_text(out, json.dumps(result, indent=2) + "\n")
