"""What ImageNet takes: cost of an image measured here, hours on accelerators computed from it and from a published throughput.

    python bench/sizing.py [--steps 4] [--batch 2] [--repetitions 3] [--images-per-second 2470 --of-eight 16621] [--out FILE]

Measured, with one thread, in processor seconds, which other programs hardly change: a forward pass and a training step of
ResNet-50 at 224 pixels in float32, the same network converted with T steps on the fused engine, one step of its fine-tuning,
and one picture of 500 x 375 pixels read, resized and cut. Multiply-accumulates are counted by torch as it runs.

Computed: an accelerator takes as many times longer for a spiking step than for a step of the source network as this processor
does (or as the count of multiply-accumulates says, whichever is more), and a forward pass takes a third of a training step. How many
training steps of the source network it does is not measured but given: --images-per-second of one, --of-eight of eight together. For 64
the loss between machines is taken to be none, so that their hours are the least that can be hoped for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timing import add_out, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import quickspike as qs
from quickspike.data import load_data
from quickspike.models import load_model

TRAINING_IMAGES, VALIDATION_IMAGES = 1_281_167, 50_000
SOURCE = "NVIDIA DeepLearningExamples, ResNet-50 v1.5 for PyTorch: training in mixed precision on one A100 80GB and eight in one machine"
PICTURES = 48
Costs = dict[str, dict[str, float]]


def processor_seconds(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median of each; all take turns, and a first call of each is not counted."""
    times = {name: list[float]() for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if repetition:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(own) for name, own in times.items()}


def multiplications(call: Callable[[], object]) -> float:
    """Multiply-accumulates of convolutions and products of matrices, in billions."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9


def step_of(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """One training step."""
    labels = torch.arange(len(images))
    optimiser = torch.optim.SGD([parameter for parameter in network.parameters() if parameter.requires_grad], lr=1e-3, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimiser.step()

    return step


def measured(steps: int, batch: int, size: int, repetitions: int) -> Costs:
    """Processor seconds and billions of multiply-accumulates of one image."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    source = load_model("torchvision:resnet50").to(memory_format=torch.channels_last)
    snn = qs.convert(source.eval(), images, steps=steps)
    fused = qs.accelerate(snn, "fused")
    trained = load_model("torchvision:resnet50").to(memory_format=torch.channels_last).train()
    tuned = snn.to(memory_format=torch.channels_last)
    for neuron in tuned.neurons().values():
        neuron.threshold.requires_grad_(True)
    with torch.no_grad():
        plain = {"forward pass": lambda: source(images), "spiking forward pass": lambda: fused(images)}
        counts = {name: multiplications(call) for name, call in plain.items()}
        seconds = processor_seconds(plain, repetitions)
    learning = {"training step": step_of(trained, images), "fine-tuning step": step_of(tuned, images)}
    counts |= {name: multiplications(call) for name, call in learning.items()}
    seconds |= processor_seconds(learning, repetitions)
    return {name: {"seconds": seconds[name] / batch, "multiplications": counts[name] / batch} for name in counts}


def reading() -> float:
    """Processor seconds for one picture from its file to the tensor that a network takes."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            (Path(folder) / split / "class").mkdir(parents=True)
            for number in range(PICTURES if split == "train" else 1):
                # Blurred noise: its file has about the size of a photograph's.
                noise = Image.fromarray(generator.integers(0, 256, (75, 100, 3), dtype=np.uint8))
                noise.resize((500, 375), Image.Resampling.BICUBIC).save(Path(folder) / split / "class" / f"{number}.jpg", quality=90)
        data = load_data(f"imagefolder:{folder}")
        started = time.process_time()
        for _ in data.loader("train"):
            pass
        return (time.process_time() - started) / PICTURES


def slower(costs: Costs, spiking: str, plain: str) -> float:
    """How many times longer a spiking pass takes: by time or by multiply-accumulates, whichever is more."""
    return max(costs[spiking][what] / costs[plain][what] for what in ("seconds", "multiplications"))


def hours(costs: Costs, one: float, eight: float, epochs: int, source_epochs: int) -> list[dict[str, Any]]:
    """Hours of every task here on one thread, and computed ones on 1, 8 and 64 accelerators."""
    passes = slower(costs, "spiking forward pass", "forward pass")
    tuning = slower(costs, "fine-tuning step", "training step")
    # (task, images, what it costs here, how many training steps of the source network it costs there)
    tasks = [
        ("evaluation, 50,000 images", VALIDATION_IMAGES, "spiking forward pass", passes / 3),
        (f"fine-tuning, {epochs} epochs", epochs * TRAINING_IMAGES, "fine-tuning step", tuning),
        (f"source network, {source_epochs} epochs", source_epochs * TRAINING_IMAGES, "training step", 1.0),
    ]
    rates = {"1": one, "8": eight, "64": 8 * eight}
    return [
        {
            "task": task,
            "thread_hours": images * costs[what]["seconds"] / 3600,
            "computed_hours": {count: images * share / rate / 3600 for count, rate in rates.items()},
        }
        for task, images, what, share in tasks
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning")
    parser.add_argument("--source-epochs", type=int, default=90)
    parser.add_argument(
        "--images-per-second", type=float, default=2470, help="training of ResNet-50, one accelerator [default: %(default)s]"
    )
    parser.add_argument("--of-eight", type=float, default=16621, help="the same, eight together [default: %(default)s]")
    parser.add_argument("--throughput-from", default=SOURCE, help="where these two figures come from [default: %(default)s]")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    costs = measured(options.steps, options.batch, options.size, options.repetitions)
    for name, cost in costs.items():
        print(f"{name}: {cost['seconds']:.3f} s, {cost['multiplications']:.2f} G multiply-accumulates an image", flush=True)
    picture = reading()
    print(
        f"a picture: {1000 * picture:.1f} ms; {options.images_per_second * picture:.0f} such cores keep up with one accelerator's training"
    )
    rows = hours(costs, options.images_per_second, options.of_eight, options.epochs, options.source_epochs)
    for row in rows:
        there = ", ".join(f"{value:.3g} h on {count}" for count, value in row["computed_hours"].items())
        print(f"{row['task']}: {row['thread_hours']:.0f} h on one thread here; computed: {there}")
    save(options.out, rows, options, costs=costs, picture_seconds=picture)


if __name__ == "__main__":
    main()
