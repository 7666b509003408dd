"""What a search saves against trying everything, and whether it finds the same.

    python bench/searching.py MODEL WEIGHTS DATA --mean M... --std S... [--max-drop 2] [--most-steps 32] [--out FILE]

Trying everything converts and measures each candidate at every T, on the same images. Both are timed in this process,
one after the other: they are too long to take turns.
"""

from __future__ import annotations

import argparse
import time

import torch
from timing import network_and_data, save

import quickspike as qs
from quickspike.evaluation import accuracy_of, make_fabric
from quickspike.searching import Candidate, search

CANDIDATES = (Candidate("threshold_balancing"), Candidate("threshold_balancing", {"scale": 0.85}), Candidate("potential_init"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-drop", type=float, default=2.0)
    parser.add_argument("--most-steps", type=int, default=32)
    parser.add_argument("--images", type=int, default=1000)
    options, model, data = network_and_data(parser)
    calibration = torch.cat([images for images, _ in data.loader("train", limit=1000)])
    held_out = list(data.loader("train", limit=options.images, last=True))

    started = time.perf_counter()
    found = search(model, calibration, held_out, CANDIDATES, max_drop=options.max_drop, most_steps=options.most_steps, device="cpu")
    searched = time.perf_counter() - started

    started = time.perf_counter()
    reference = accuracy_of(model, held_out, make_fabric("cpu"))
    least: dict[str, int | None] = {}
    for candidate in CANDIDATES:
        drops = {}
        for steps in range(1, options.most_steps + 1):
            snn = qs.convert(model, calibration, candidate.method, steps=steps, **candidate.options)
            drops[steps] = reference - qs.evaluate(snn, held_out, None, (steps,), device="cpu").accuracy[steps]
        least[str(candidate)] = next((steps for steps, drop in drops.items() if drop <= options.max_drop), None)
    everything = time.perf_counter() - started

    best = None if found.best is None else (found.best.candidate, found.best.steps)
    print(f"search: {best}, {len(found.trials)} trials")
    print(f"trying everything: {least}, {options.most_steps * len(CANDIDATES)} trials")
    print(f"time of the search: {searched / everything:.3f} of that of trying everything")
    reached = [steps for steps in least.values() if steps is not None]
    same = (None if best is None else best[1]) == min(reached, default=None)
    rows = {"search": found.to_json(), "everything": least, "ratio": round(searched / everything, 3), "same_least_T": same}
    save(options.out, rows, options)
    if not same:
        raise SystemExit("the search did not find the least T")


if __name__ == "__main__":
    main()
