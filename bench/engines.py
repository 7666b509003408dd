"""What a spiking network costs on each engine, as multiples of one forward pass of its source network (fp32, batch norm folded).

    python bench/engines.py [--models vgg16 resnet18 resnet20] [--steps 1 2 4 8] [--batches 32] [--out results/bench/engines.json]

Everything is timed in one process, interleaved, after a first call apart; the table shows medians. Before that every
engine's spikes are compared with the reference's (the integer and count engines': with the same network in whole
numbers), and a difference ends the run. Networks have random weights and calibrated thresholds: time does not depend
on accuracy, and dense layers do not on rates. SpikingJelly's converted network is timed too if it is installed.
Two CPU cores: 5 minutes a network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike.api import finish, fit
from quickspike.conversion import SpikingNetwork
from quickspike.data import ImageStream
from quickspike.method import create
from quickspike.models import load_model
from quickspike.networks import NETWORKS
from quickspike.provenance import commit, machine, versions
from quickspike.simulation import simulate

IMAGE = (3, 32, 32)


def prepared(name: str, generator: torch.Generator) -> tuple[nn.Module, SpikingNetwork]:
    """(source network with its batch norm folded, converted network), with statistics of random images."""
    model = load_model(name).train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(64, *IMAGE, generator=generator))
    images = ImageStream(torch.randn(64, *IMAGE, generator=generator))
    method = create("threshold_balancing", steps=4)
    ann = fit(model.eval(), images, method)
    return ann.module.eval(), finish(ann, images, method)


def spikes_of(network: SpikingNetwork, images: Tensor) -> dict[str, Tensor]:
    return dict(simulate(network, images).spikes)


def check(reference: SpikingNetwork, fast: SpikingNetwork, images: Tensor) -> None:
    """Raise if two networks differ in a spike."""
    expected, found = spikes_of(reference, images), spikes_of(fast, images)
    for site, counts in expected.items():
        if not torch.equal(counts, found[site]):
            raise SystemExit(f"{fast.provenance['engine']['name']}: spikes of {site} are not those of the reference")


def runners(ann: nn.Module, snn: SpikingNetwork, steps: int, images: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, checked."""
    snn = snn.with_steps(steps).to(memory_format=torch.channels_last)
    whole = qs.quantise(snn).network.to(memory_format=torch.channels_last)
    windows = whole.as_synchronous()
    fast = {
        "reference": qs.accelerate(snn, "reference"),
        "fused": qs.accelerate(snn, "fused"),
        "fused bf16": qs.accelerate(snn, "fused", "bf16"),
        "integer": qs.accelerate(whole, "integer"),
        "count": qs.accelerate(windows, "count"),
    }
    few = images[:8]
    check(fast["reference"], fast["fused"], few)
    check(qs.accelerate(whole, "reference"), fast["integer"], few)
    check(qs.accelerate(windows, "reference"), fast["count"], few)
    found: dict[str, Callable[[], object]] = {"ANN": lambda: ann(images)}
    found |= {name: (lambda network=network: network(images)) for name, network in fast.items()}
    return found | spikingjelly(ann, steps, images)


def spikingjelly(ann: nn.Module, steps: int, images: Tensor) -> dict[str, Callable[[], object]]:
    """SpikingJelly's converted network, step by step; nothing if it is not installed."""
    try:
        from spikingjelly.activation_based import ann2snn, functional
    except ImportError:
        return {}
    loader = [(images[:16], torch.zeros(16, dtype=torch.long))]
    converted = ann2snn.Converter(mode="max", dataloader=loader)(ann).to(memory_format=torch.channels_last).eval()

    def run() -> object:
        functional.reset_net(converted)
        return sum(converted(images) for _ in range(steps))

    return {"SpikingJelly": run}


def measure(timed: dict[str, Callable[[], object]], repetitions: int) -> dict[str, dict[str, float]]:
    """Median, least and largest time of each in units of the first one's median, and the first call's."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet18", "resnet20"], choices=sorted(NETWORKS), metavar="NAME")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for name in options.models:
            generator = torch.Generator().manual_seed(0)
            torch.manual_seed(0)
            ann, snn = prepared(name, generator)
            ann.to(memory_format=torch.channels_last)
            for batch in options.batches:
                images = torch.randn(batch, *IMAGE, generator=generator).contiguous(memory_format=torch.channels_last)
                for steps in options.steps:
                    found = measure(runners(ann, snn, steps, images), options.repetitions)
                    rows.append({"model": name, "batch": batch, "steps": steps, "times": found})
                    shown = "  ".join(f"{engine} {times['ratio']:.2f}" for engine, times in found.items())
                    print(f"{name}, batch {batch}, T = {steps}:  {shown}", flush=True)
    result = {"rows": rows, "options": {**vars(options), "out": None}, "commit": commit(), "versions": versions(), "machine": machine()}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
