"""What benchmarks share: interleaved timing in one process, peak memory in a process of its own, their input, the JSON file."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from quickspike.data import DataSet, load_data
from quickspike.memory import keep_freed_memory
from quickspike.models import load_model
from quickspike.preprocessing import Preprocessing
from quickspike.provenance import commit, machine, versions

Times = dict[str, float]
MIB = 2**20


def interleaved(timed: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, Times]:
    """Median, least and largest time of each in units of the first one's median, and the first call's.

    All take turns, so that a slower minute of the machine hits them alike. The first call is apart: it compiles.
    Freed memory is kept for all of them alike, since one of ours would do it for whatever comes after it.
    """
    keep_freed_memory()
    first, times = {}, {name: list[float]() for name in timed}
    for repetition in range(repetitions + 1):
        for name, run in timed.items():
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
            if repetition:
                times[name].append(seconds)
            else:
                first[name] = seconds
    base = statistics.median(times[next(iter(timed))])
    return {
        name: {
            "ratio": round(statistics.median(own) / base, 3),
            "least": round(min(own) / base, 3),
            "largest": round(max(own) / base, 3),
            "first_call": round(first[name] / base, 3),
        }
        for name, own in times.items()
    }


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Bytes by which the largest memory of a fresh process grows while it runs what `prepare(*arguments)` gives back.

    `prepare` builds networks and images and warms up; what that took is not counted, unless it took more.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    try:
        grown: int = receiver.recv()
    except EOFError:
        raise SystemExit(f"the process that measured {arguments} ended early") from None
    finally:
        process.join()
    return grown


def _measure(sender: Any, prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    run = prepare(*arguments)
    before = _largest()
    run()
    sender.send(_largest() - before)
    sender.close()


def _largest() -> int:
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def network_and_data(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, nn.Module, DataSet]:
    """(options, network, data) from the command line, once the options that a benchmark adds to these are in `parser`."""
    parser.add_argument("model", help="as on the command line of quickspike")
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", help="as on the command line of quickspike")
    parser.add_argument("--mean", type=float, nargs="+", required=True)
    parser.add_argument("--std", type=float, nargs="+", required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = load_model(options.model, options.weights)
    data = load_data(options.data, preprocessing=Preprocessing(tuple(options.mean), tuple(options.std)))
    # What is saved names no file of whoever runs it.
    options.model, options.weights, options.data = options.model.rpartition(":")[2], options.weights.name, Path(options.data).name
    return options, model, data


def save(out: Path | None, rows: object, options: argparse.Namespace, **more: object) -> None:
    """Write what was found, with what it was found on, to `out`; nothing if that is None."""
    if out is None:
        return
    result = {
        "rows": rows,
        **more,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
