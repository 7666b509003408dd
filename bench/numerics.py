"""How far results move where docs/numerics.md promises no same bytes: layouts, threads, batches, precisions, engines.

    python bench/numerics.py MODEL WEIGHTS DATA --mean M... --std S... [--steps 8] [--images 200] [--out FILE]

Each row is held against the first of its group: share of the neurons whose number of spikes differs, largest distance of
an answer in units of the largest answer, share of images with another class, and whether all bytes are the same. The
network is converted with threshold_balancing, calibrated on the first 1,000 training images.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
from timing import network_and_data, save
from torch import Tensor

import quickspike as qs
from quickspike.simulation import Run, simulate

BATCH = 100
Row = dict[str, object]


def runs(snn: qs.SpikingNetwork, images: Tensor, batch: int = BATCH, threads: int = 1, **how: bool) -> Run:
    """All images in batches of that size, on so many threads."""
    torch.set_num_threads(threads)
    parts = [simulate(snn, part, **how) for part in images.split(batch)]
    torch.set_num_threads(1)
    return Run(
        torch.cat([part.logits for part in parts], 1),
        {site: torch.cat([part.spikes[site] for part in parts]) for site in parts[0].spikes},
    )


def distance(found: Run, wanted: Run) -> Row:
    """What differs, of spikes and of the answer after the last step."""
    moved = sum(int((counts != found.spikes[site]).sum()) for site, counts in wanted.spikes.items())
    answers, others = wanted.logits[-1].double(), found.logits[-1].double()
    return {
        "counts_percent": 100 * moved / sum(counts.numel() for counts in wanted.spikes.values()),
        "answers": float((answers - others).abs().max() / answers.abs().max()),
        "classes_percent": 100 * float((answers.argmax(1) != others.argmax(1)).double().mean()),
        "same_bytes": moved == 0 and torch.equal(found.logits[-1], wanted.logits[-1]),
    }


def ways(snn: qs.SpikingNetwork, images: Tensor) -> Iterator[tuple[str, str, Callable[[], Run]]]:
    """(group, way, run); the first of a group is what its others are held against."""
    last = images.contiguous(memory_format=torch.channels_last)
    fused = qs.accelerate(snn, "fused")
    yield "float32", "reference engine", lambda: runs(qs.accelerate(snn, "reference"), last)
    yield "float32", "fused engine", lambda: runs(fused, last)
    yield "float32", "two threads", lambda: runs(fused, last, threads=2)
    yield "float32", "batches of 1", lambda: runs(fused, last, batch=1)
    yield "float32", "batches of 7", lambda: runs(fused, last, batch=7)
    yield "float32", "step by step", lambda: runs(fused, last, step_by_step=True)
    yield "float32", "other layout of memory", lambda: runs(snn, images)
    yield "float32", "other layout, batches of 1", lambda: runs(snn, images, batch=1)
    yield "float32", "other layout, two threads", lambda: runs(snn, images, threads=2)
    yield "float32", "float64", lambda: runs(copy.deepcopy(snn).double(), images.double())
    yield "float32", "bf16 layers", lambda: runs(qs.accelerate(snn, "fused", precision="bf16"), last)
    yield "float32", "8-bit weights", lambda: runs(qs.accelerate(snn, "integer"), last)
    whole = qs.quantise(snn, image_bits=10).network
    yield "whole numbers", "reference engine", lambda: runs(qs.accelerate(whole, "reference"), last)
    yield "whole numbers", "integer engine", lambda: runs(qs.accelerate(whole, "integer"), last)
    yield "whole numbers", "integer engine, two threads", lambda: runs(qs.accelerate(whole, "integer"), last, threads=2)
    yield "whole numbers", "integer engine, batches of 1", lambda: runs(qs.accelerate(whole, "integer"), last, batch=1)
    yield "whole numbers", "other layout of memory", lambda: runs(whole, images)
    waiting = whole.as_synchronous()
    yield "whole numbers, synchronous", "reference engine", lambda: runs(qs.accelerate(waiting, "reference"), last)
    yield "whole numbers, synchronous", "count engine", lambda: runs(qs.accelerate(waiting, "count"), last)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int, default=200, help="first N test images")
    options, model, data = network_and_data(parser)
    torch.set_num_threads(1)
    snn = qs.convert(model, torch.cat([images for images, _ in data.loader("train", limit=1000)]), steps=options.steps)
    images = torch.cat([batch for batch, _ in data.loader("test", limit=options.images)])
    rows: list[Row] = []
    wanted: dict[str, Run] = {}
    for group, way, run in ways(snn, images):
        found = run()
        row = {"group": group, "way": way, **distance(found, wanted.setdefault(group, found))}
        rows.append(row)
        figures = f"{row['counts_percent']:.4f} % of counts, answers {row['answers']:.1e}, {row['classes_percent']:.2f} % of classes"
        print(f"{group}, {way}: {figures}{', same bytes' if row['same_bytes'] else ''}", flush=True)
    save(options.out, rows, options)


if __name__ == "__main__":
    main()
