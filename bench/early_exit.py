"""Accuracy against mean number of steps and against time, where images stop as soon as their answer is decided.

    python bench/early_exit.py MODEL WEIGHTS DATA --mean M... --std S... [--steps 32] [--losses 0.1 0.5 1 2] [--signed] [--out FILE]

The network is converted once, with threshold_balancing on the first 1,000 training images. Margins are set on the last
training images, which calibrate nothing, for the given losses of accuracy, and measured on the test images. Time is that of
the fused engine over all test images, in units of the whole run of all steps, each once: it takes minutes as a rule.
Stopping early simulates step by step, with a smaller batch after every step.
"""

from __future__ import annotations

import argparse

import torch
from timing import network_and_data, save, seconds_of

import quickspike as qs
from quickspike.early_exit import Exit, answers, choose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--losses", type=float, nargs="+", default=[0.1, 0.5, 1.0, 2.0], help="percentage points")
    parser.add_argument("--scale", type=float, default=1.0, help="of the thresholds (threshold_balancing)")
    parser.add_argument("--signed", action="store_true", help="neurons take spikes back")
    parser.add_argument("--calibration-images", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=2000, help="last N training images")
    parser.add_argument("--images", type=int, help="first N test images [default: all]")
    options, model, data = network_and_data(parser)
    calibration = data.loader("train", limit=options.calibration_images)
    snn = qs.convert(model, calibration, steps=options.steps, scale=options.scale, signed=options.signed)
    fast = qs.accelerate(snn, "fused")
    known = answers(fast, data.loader("train", limit=options.held_out, last=True))
    test = list(data.loader("test", limit=options.images))

    def measured(exit: Exit | None) -> dict[str, float]:
        """Accuracy in percent, mean steps and seconds."""
        right, taken, samples, seconds = 0, 0.0, 0, 0.0
        for images, labels in test:
            runs = []
            seconds += seconds_of(lambda images=images, runs=runs: runs.append(fast.run(images, exit=exit)))
            right += int((runs[0].logits[-1].argmax(1) == labels).sum())
            taken += float(options.steps * len(labels) if runs[0].stopped is None else runs[0].stopped.sum())
            samples += len(labels)
        return {"accuracy": round(100 * right / samples, 2), "steps": round(taken / samples, 2), "seconds": round(seconds, 4)}

    with torch.inference_mode():
        fast.run(test[0][0][:1])
        whole = measured(None)
        rows = [{"loss": None, **whole, "time": 1.0}]
        for loss in options.losses:
            found = measured(choose(*known, loss))
            rows.append({"loss": loss, **found, "time": round(found["seconds"] / whole["seconds"], 3)})
    print(f"{'loss':>6}  {'accuracy':>8}  {'steps':>6}  {'time':>6}")
    for row in rows:
        print(f"{'-' if row['loss'] is None else row['loss']:>6}  {row['accuracy']:8.2f}  {row['steps']:6.2f}  {row['time']:6.3f}")
    save(options.out, rows, options)


if __name__ == "__main__":
    main()
