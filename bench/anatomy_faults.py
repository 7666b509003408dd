"""Whether the anatomy names a planted fault: each fault at each site of a network, its site and its source.

    python bench/anatomy_faults.py MODEL WEIGHTS DATA --mean M... --std S... [--steps 8] [--images 100] [--out FILE]

Faults: the thresholds of one site divided by 10 (to be named as clipping), multiplied by 10 (quantisation), and neurons that
reset to zero instead of subtracting theta (neuron). Named means: `Anatomy.worst` is that site, and its largest own part that
source. Ends with status 1 unless all are.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable

import torch
from timing import network_and_data, save
from torch import Tensor

import quickspike as qs
from quickspike.anatomy import anatomy_of, main_source
from quickspike.cli_options import without_paths
from quickspike.neuron import Neuron, unfold


def divided(neuron: Neuron) -> None:
    neuron.threshold.data /= 10


def multiplied(neuron: Neuron) -> None:
    neuron.threshold.data *= 10


def reset_to_zero(neuron: Neuron) -> None:
    def forward(current: Tensor) -> Tensor:
        theta, _ = neuron.bounded()
        v, spikes = neuron.initial * theta, []
        for part in [current] * neuron.steps if neuron.constant_input else unfold(current, neuron.steps):
            v = v + part
            fired = (v >= theta).to(v)
            spikes.append(fired * theta)
            v = v * (1 - fired)
        return torch.cat(spikes)

    neuron.forward = forward


FAULTS: dict[str, tuple[Callable[[Neuron], None], str]] = {
    "threshold / 10": (divided, "clipping"),
    "threshold x 10": (multiplied, "quantisation"),
    "hard reset": (reset_to_zero, "neuron"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int, default=100, help="first test images that the error is split on")
    parser.add_argument("--calibration-images", type=int, default=1000)
    options, model, data = network_and_data(parser)
    images = torch.cat([batch for batch, _ in data.loader("test", limit=options.images)])
    whole = qs.convert(model, data.loader("train", limit=options.calibration_images), steps=options.steps)
    rows = []
    for fault, (plant, source) in FAULTS.items():
        for site in whole.sites:
            snn = copy.deepcopy(whole)
            plant(snn.neuron(site.name))
            worst = anatomy_of(snn, images).worst
            named = {"site": worst.site, "source": main_source(worst.sizes)}
            right = named == {"site": site.name, "source": source}
            rows.append({"fault": fault, "site": site.name, "expected": source, "named": named, "right": right})
            print(f"{fault} at {site.name}: {named['site']}, {named['source']}{'' if right else ' (WRONG)'}", flush=True)
    right = {fault: sum(bool(row["right"]) for row in rows if row["fault"] == fault) for fault in FAULTS}
    print(", ".join(f"{fault}: {count} of {len(whole.sites)}" for fault, count in right.items()))
    save(options.out, rows, options, right=right, sites=len(whole.sites), command=_command())
    if sum(right.values()) < len(rows):
        raise SystemExit("a fault was not named")


def _command() -> str:
    """What was typed, without the folders of whoever typed it."""
    return shlex.join(["python", "bench/anatomy_faults.py", *without_paths(sys.argv[1:])])


if __name__ == "__main__":
    main()
