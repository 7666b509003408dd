"""Where the time of a call goes on every engine: convolutions, neurons, additions and copies.

    python bench/profiling.py [--models resnet20 vgg16] [--steps 4] [--batch 32] [--calls 5] [--out FILE]

Milliseconds a call from torch.profiler: the time in an operator itself, not in those that it calls, added up by kind. The
total is the wall time of calls without the profiler. Compiled loops of the neurons are no operators, but for the one with
a backward pass; a mark around each layer of neurons makes the others visible. What is left of the total is Python.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial

import torch
from engines import IMAGE, prepared
from timing import add_out, save, seconds_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import quickspike as qs
from quickspike.memory import keep_freed_memory
from quickspike.networks import NETWORKS

MARK = "quickspike::"
KINDS = {
    "layers": r"conv|linear|addmm|\bmm\b|matmul|bmm|mkldnn",
    "neurons": rf"{MARK}|_Fused",
    "other": r"",
}
"""Kind of an operator: the first whose pattern is found in its name."""


def kind_of(operator: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, operator))


def marked(network: qs.SpikingNetwork) -> qs.SpikingNetwork:
    """The same network, whose neurons show in a profile."""
    for neuron in network.neurons().values():

        def forward(x: Tensor, run: Callable[[Tensor], Tensor] = neuron.forward) -> Tensor:
            with record_function(f"{MARK}neurons"):
                return run(x)

        neuron.forward = forward
    return network


def times_of(run: Callable[[], object], calls: int) -> dict[str, float]:
    """Milliseconds of a call: the total, and by kind of operator."""
    run()
    total = min(seconds_of(run) for _ in range(calls))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            run()
    kinds = dict.fromkeys(KINDS, 0.0)
    for event in found.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1000 / calls
    return {"total": round(1000 * total, 2), **{kind: round(milliseconds, 2) for kind, milliseconds in kinds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "vgg16"], choices=sorted(NETWORKS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--calls", type=int, default=5)
    add_out(parser)
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    print("| network | engine | total | convolutions, linear layers | neurons | additions, products, copies |\n|---|---|--:|--:|--:|--:|")
    for name in options.models:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        ann, snn = prepared(name, generator)
        snn = snn.with_steps(options.steps)
        images = torch.randn(options.batch, *IMAGE, generator=generator).contiguous(memory_format=torch.channels_last)
        networks = {
            "source network": ann.to(memory_format=torch.channels_last),
            "fused": marked(qs.accelerate(snn, "fused")),
            "integer": marked(qs.accelerate(snn, "integer")),
            "count": marked(qs.accelerate(snn.as_synchronous(), "count")),
        }
        for engine, network in networks.items():
            with torch.inference_mode():
                times = times_of(partial(network, images), options.calls)
            rows.append({"model": name, "engine": engine, **times})
            print(f"| {name} | {engine} | " + " | ".join(f"{value:.1f}" for value in times.values()) + " |", flush=True)
    save(options.out, rows, options)


if __name__ == "__main__":
    main()
