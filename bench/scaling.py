"""How time and memory grow with the number of steps, the batch, the depth, the width and the number of images.

    python bench/scaling.py [--only steps batch depth width images calibration] [--out results/bench/scaling.json]

Each question varies one number and keeps the others. Time is that of the fused engine in forward passes of the source
network at the same batch (fp32), interleaved in one process. Memory is the growth of the largest resident memory of a
process of its own. A calibration is a whole conversion with that many images, in forward passes of the source network over them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from timing import MIB, add_out, in_own_process, interleaved, save
from torch import Tensor, nn

import quickspike as qs
from quickspike.models import load_model

DEFAULTS = {"steps": 4, "batch": 32, "depth": 8, "width": 64}
QUESTIONS = {
    "steps": (1, 2, 4, 8, 16, 32),
    "batch": (1, 8, 32, 128),
    "depth": (2, 4, 8, 16),
    "width": (16, 32, 64, 128),
    "images": (8, 32, 64),
    "calibration": (64, 256, 1024),
}
BUDGET = "2GiB"
LONG = 256


def plain(depth: int, width: int) -> nn.Sequential:
    """Convolutions of `width` channels on 16 x 16 pixels."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Conv2d(width if index else 3, width, 3, padding=1, stride=1 if index else 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).to(memory_format=torch.channels_last)


def time_of(steps: int, batch: int, depth: int, width: int) -> Callable[[int], dict[str, dict[str, float]]]:
    """Time of the source network and the fused engine."""
    torch.manual_seed(0)
    ann = plain(depth, width).eval()
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    fast = qs.accelerate(qs.convert(ann, images[:8], steps=steps), "fused")
    return lambda repetitions: interleaved({"ANN": lambda: ann(images), "fused": lambda: fast(images)}, repetitions)


def batches(count: int) -> Iterator[Tensor]:
    """Images that are made as they are asked for."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, count, 32):
        yield torch.randn(32, 3, 32, 32, generator=generator)


class Images:
    """Batches that can be gone through again."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return batches(self.count)


def calibration(count: int) -> Callable[[], object]:
    """Conversion with `count` calibration images, after one with few."""
    torch.manual_seed(0)
    ann = plain(DEFAULTS["depth"], DEFAULTS["width"]).eval()
    qs.convert(ann, Images(32), steps=4)
    return lambda: qs.convert(ann, Images(count), steps=4)


def passes(count: int) -> Callable[[], object]:
    """The source network over the same images."""
    torch.manual_seed(0)
    ann = plain(DEFAULTS["depth"], DEFAULTS["width"]).eval()
    return lambda: [ann(images) for images in batches(count)]


def simulation(count: int, model: str, steps: int, budget: str | None) -> Callable[[], object]:
    """`count` images at once through the fused engine, after one image for one step."""
    torch.manual_seed(0)
    snn = qs.convert(load_model(model), torch.randn(8, 3, 32, 32), steps=steps)
    fast = qs.accelerate(snn, "fused", memory=budget)
    images = torch.randn(count, 3, 32, 32)
    with torch.inference_mode():
        qs.accelerate(snn.with_steps(1), "fused")(images[:1])

    def run() -> None:
        with torch.inference_mode():
            fast(images)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS))
    parser.add_argument("--repetitions", type=int, default=7)
    add_out(parser)
    options = parser.parse_args()
    rows = []
    for question in options.only:
        for value in QUESTIONS[question]:
            if question in DEFAULTS:
                with torch.inference_mode(False), torch.no_grad():
                    times = time_of(**{**DEFAULTS, question: value})(options.repetitions)["fused"]
                steps = value if question == "steps" else DEFAULTS["steps"]
                row = {"fused": times, "per_step": round(times["ratio"] / steps, 3)}
                print(f"{question} {value}: {times['ratio']:.2f} ANN forwards, {row['per_step']:.2f} a step", flush=True)
            elif question == "images":
                grown = in_own_process(simulation, value, "vgg16", LONG, BUDGET).grown
                row = {"mebibytes": grown // MIB, "budget": BUDGET, "steps": LONG}
                print(f"{value} images, VGG-16, T = {LONG}, memory={BUDGET}: {grown / MIB:.0f} MiB", flush=True)
            else:
                grown = in_own_process(calibration, value).grown
                with torch.no_grad():
                    times = interleaved({"ANN": passes(value), "calibration": calibration(value)}, options.repetitions)["calibration"]
                row = {"mebibytes": grown // MIB, "calibration": times}
                print(f"calibration with {value} images: {times['ratio']:.2f} ANN forwards over them, {grown / MIB:.0f} MiB", flush=True)
            rows.append({"question": question, "value": value, **row})
    save(options.out, rows, options)


if __name__ == "__main__":
    main()
