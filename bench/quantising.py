"""What weights of few bits cost in accuracy, on the integer engine.

    python bench/quantising.py MODEL WEIGHTS DATA --mean M... --std S... [--steps 4 8 16] [--bits 8 6 4] [--out FILE]

The network is converted for each T with threshold_balancing, calibrated on the first 1,000 training images; accuracy is
that on the test images, in percent.
"""

from __future__ import annotations

import argparse

import torch
from timing import network_and_data, save

import quickspike as qs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--scale", type=float, default=1.0, help="of the thresholds from T = 8 on (threshold_balancing)")
    parser.add_argument("--images", type=int, help="first N test images [default: all]")
    options, model, data = network_and_data(parser)
    calibration = torch.cat([images for images, _ in data.loader("train", limit=1000)])
    rows = []
    print(f"{'T':>3}  {'float':>6}  " + "  ".join(f"{bits} bits" for bits in options.bits))
    for steps in options.steps:
        scale = options.scale if steps >= 8 else 1.0
        snn = qs.convert(model, calibration, "threshold_balancing", steps=steps, scale=scale)

        def accuracy(bits: int | None, snn: qs.SpikingNetwork = snn, steps: int = steps) -> float:
            test = data.loader("test", limit=options.images)
            how = {} if bits is None else {"engine": "integer", "bits": bits}
            return qs.evaluate(snn, test, None, (steps,), device="cpu", **how).accuracy[steps]

        row = {"steps": steps, "scale": scale, "float": accuracy(None), **{f"{bits} bits": accuracy(bits) for bits in options.bits}}
        rows.append(row)
        print(f"{steps:>3}  {row['float']:6.2f}  " + "  ".join(f"{row[f'{bits} bits']:6.2f}" for bits in options.bits), flush=True)
    save(options.out, rows, options)


if __name__ == "__main__":
    main()
