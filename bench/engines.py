"""What a spiking network costs on each engine, as multiples of one forward pass of its source network (fp32, batch norm folded).

    python bench/engines.py [--models vgg16 resnet18 resnet20] [--steps 1 2 4 8] [--batches 32] [--at-most 120] [--out FILE.json]

Everything is timed in one process, interleaved; the table shows medians. What the first call of an engine costs more is timed
apart, for the first network, batch and T: in a fresh process with no compiled kernel on disk (cold), and in another one
that finds those kernels (warm), from the network to its first answer. Before anything is timed every engine's spikes are
compared with the reference's (the integer and count engines': with the same network in whole numbers), and a difference
ends the run. Networks have random weights and calibrated thresholds: time does not depend on accuracy, and dense layers do
not on rates. Other simulators are timed too where they are installed (pip install 'quickspike[bench]'; see peers.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from peers import peers
from timing import add_out, first_calls, interleaved, save
from torch import Tensor, fx
from torch.fx.experimental.optimization import fuse

import quickspike as qs
from quickspike.conversion import SpikingNetwork
from quickspike.models import load_model
from quickspike.networks import NETWORKS
from quickspike.processor import has_bfloat16
from quickspike.simulation import simulate

IMAGE = (3, 32, 32)


def prepared(name: str, generator: torch.Generator) -> tuple[fx.GraphModule, SpikingNetwork]:
    """(source network with its batch norm folded, converted network), with statistics of random images."""
    model = load_model(name).train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(64, *IMAGE, generator=generator))
    snn = qs.convert(model.eval(), torch.randn(64, *IMAGE, generator=generator), "threshold_balancing", steps=4)
    return fuse(model), snn


def spikes_of(network: SpikingNetwork, images: Tensor) -> dict[str, Tensor]:
    return dict(simulate(network, images).spikes)


def check(reference: SpikingNetwork, fast: SpikingNetwork, images: Tensor) -> None:
    """Raise if two networks differ in a spike."""
    expected, found = spikes_of(reference, images), spikes_of(fast, images)
    for site, counts in expected.items():
        if not torch.equal(counts, found[site]):
            raise SystemExit(f"{fast.provenance['engine']['name']}: spikes of {site} are not those of the reference")


ENGINES = {"fused": ("fused", "fp32"), "fused bf16": ("fused", "bf16"), "integer": ("integer", "fp32"), "count": ("count", "fp32")}


def first_answer(model: str, engine: str, steps: int, batch: int) -> Callable[[], object]:
    """From a converted network to its first answer on that engine; a later call accelerates nothing."""
    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    _, snn = prepared(model, generator)
    name, precision = ENGINES[engine]
    snn = snn.with_steps(steps)
    snn = snn.as_synchronous() if name == "count" else snn
    images = torch.randn(batch, *IMAGE, generator=generator).contiguous(memory_format=torch.channels_last)
    made: list[SpikingNetwork] = []

    def run() -> Tensor:
        if not made:
            made.append(qs.accelerate(snn, name, precision))
        logits: Tensor = made[0](images)
        return logits

    return run


def runners(ann: fx.GraphModule, snn: SpikingNetwork, steps: int, images: Tensor) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """(what is timed, checked; what is not, and why)."""
    snn = snn.with_steps(steps).to(memory_format=torch.channels_last)
    whole = qs.quantise(snn).network.to(memory_format=torch.channels_last)
    windows = whole.as_synchronous()
    fast = {
        "reference": qs.accelerate(snn, "reference"),
        "fused": qs.accelerate(snn, "fused"),
        "integer": qs.accelerate(whole, "integer"),
        "count": qs.accelerate(windows, "count"),
    }
    few = images[:8]
    check(fast["reference"], fast["fused"], few)
    check(qs.accelerate(whole, "reference"), fast["integer"], few)
    check(qs.accelerate(windows, "reference"), fast["count"], few)
    others, missing = peers(ann, steps, images[:16])
    if has_bfloat16():
        fast["fused bf16"] = qs.accelerate(snn, "fused", "bf16")
    else:
        missing["fused bf16"] = "this processor has no bfloat16 arithmetic"
    found: dict[str, Callable[[], object]] = {"ANN": lambda: ann(images)}
    found |= {name: (lambda run=run: run(images)) for name, run in fast.items()}
    found |= {name: (lambda run=peer.run: run(images)) for name, peer in others.items()}
    return found, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet18", "resnet20"], choices=sorted(NETWORKS), metavar="NAME")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--at-most", type=float, default=120, help="seconds for a row; three repetitions are made whatever they take")
    parser.add_argument("--no-first-calls", action="store_true", help="leave these out: two processes for every engine")
    add_out(parser)
    options = parser.parse_args()
    rows, missing, first = [], dict[str, str](), dict[str, dict[str, float]]()
    engines = [engine for engine in ENGINES if engine != "fused bf16" or has_bfloat16()]
    for engine in () if options.no_first_calls else engines:
        first[engine] = first_calls(first_answer, options.models[0], engine, options.steps[0], options.batches[0])
        shown = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in first[engine].items())
        print(f"first call of {engine}, {options.models[0]}: {shown}", flush=True)
    with torch.inference_mode():
        for name in options.models:
            generator = torch.Generator().manual_seed(0)
            torch.manual_seed(0)
            ann, snn = prepared(name, generator)
            ann.to(memory_format=torch.channels_last)
            for batch in options.batches:
                images = torch.randn(batch, *IMAGE, generator=generator).contiguous(memory_format=torch.channels_last)
                for steps in options.steps:
                    timed, missing = runners(ann, snn, steps, images)
                    found = interleaved(timed, options.repetitions, options.at_most)
                    rows.append({"model": name, "batch": batch, "steps": steps, "times": found})
                    shown = "  ".join(f"{engine} {times['ratio']:.2f}" for engine, times in found.items())
                    print(f"{name}, batch {batch}, T = {steps}:  {shown}", flush=True)
                    # Anew after every row: all of them together can take an hour.
                    save(options.out, rows, options, first_calls=first, left_out=missing)
    for peer, why in missing.items():
        print(f"left out: {peer}, {why}")


if __name__ == "__main__":
    main()
