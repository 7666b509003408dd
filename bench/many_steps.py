"""Accuracy of a network as it comes at many T, from one calibration: what `quickspike convert` and `evaluate` give for each.

    python bench/many_steps.py MODEL WEIGHTS DATA --mean M... --std S... [--resize N] [--bgr] [--steps 8 16 32 64 128]
        [--modes streaming:0.85 signed synchronous] [--calibration-images 1000] [--share 32] [--held-out N] [--out FOLDER]

A mode is streaming, signed (neurons take spikes back), synchronous (layers wait for whole windows) or weighted (likewise, and the
spike of step t counts 2^(T-t) times as much as the last; T up to 8), with the factor on every ceiling behind it. Ceilings depend on
T, the activations that they are drawn from do not: the images are gone through once. Each T has a conversion of its own, but
those above --share take the one for that many steps and run longer, all in one simulation. Weights have 8 bits: synchronous and
weighted networks run on the engine `count`, whose time does not depend on T, streaming ones on `integer`. Spikes that are taken
back are no bytes, so that `signed` stays in floating point, as all do with --float.

With --held-out every N-th calibration image calibrates nothing, and the agreement with the source network on these is
shown instead: this is how the factors are chosen, without a look at the test images. With --refine each T has a conversion
of its own, with the ceilings for at most --share steps, refined for that T.

FOLDER gets a report MODE-T.json each; what is there already is not done again. `recipes/table.py FOLDER` makes the table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import network_and_data
from torch import Tensor, nn

import quickspike as qs
from quickspike.api import finish, fit
from quickspike.data import BATCH, DataSet, ImageStream
from quickspike.engines import Engine
from quickspike.method import Method, create
from quickspike.provenance import commit
from quickspike.refinement import Refinement, refinements_of

ENGINES: dict[str, Engine] = {"streaming": "integer", "signed": "fused", "synchronous": "count", "weighted": "count"}
MODES = tuple(ENGINES)
KINDS = tuple(mode for mode in MODES if mode != "streaming")


def mode_of(text: str) -> tuple[str, float]:
    """(mode, factor) from `signed:0.9` or `signed`."""
    mode, _, scale = text.partition(":")
    if mode not in MODES:
        raise argparse.ArgumentTypeError(f"a mode is one of {', '.join(MODES)}, got {mode!r}")
    return mode, float(scale or 1)


def method_of(
    mode: str, scale: float, steps: int, fitted: int = 0, refinements: tuple[Refinement, ...] = (), initial: float = 0.5
) -> Method:
    kinds = {kind: kind == mode for kind in KINDS}
    return create("threshold_balancing", steps=steps, scale=scale, initial=initial, fit_steps=fitted, refinements=refinements, **kinds)


def groups_of(mode: str, steps: Sequence[int], share: int | None) -> list[tuple[int, tuple[int, ...]]]:
    """(steps that ceilings are fitted for, steps to read out after), one simulation each; windows cannot be cut short."""
    if share is None or mode in ("synchronous", "weighted"):
        return [(step, (step,)) for step in steps]
    long = tuple(step for step in steps if step >= share)
    return [*((step, (step,)) for step in steps if step < share), *([(share, long)] if long else [])]


def calibrated(model: nn.Module, data: DataSet, images: int, every: int | None) -> tuple[Any, ImageStream, Tensor]:
    """(the network with its activations seen, the images that it saw, those held out)."""
    everything = torch.cat([batch for batch, _ in data.loader("train", limit=images)])
    held_out = torch.zeros(len(everything), dtype=torch.bool)
    if every is not None:
        held_out[every - 1 :: every] = True
    stream = ImageStream(everything[~held_out])
    started = time.perf_counter()
    ann = fit(model, stream, method_of("streaming", 1.0, 8))
    print(f"calibrated on {stream.samples} images in {time.perf_counter() - started:.0f} s", flush=True)
    return ann, stream, everything[held_out]


def agreement(snn: qs.SpikingNetwork, images: Tensor, classes: Tensor, steps: Sequence[int], engine: Engine) -> dict[int, float]:
    """Share of images, in percent, on which the network chooses these classes, after each number of steps."""
    labelled = zip(torch.split(images, BATCH), torch.split(classes, BATCH), strict=True)
    return qs.evaluate(snn, list(labelled), None, steps, device="cpu", engine=engine).accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--modes", type=mode_of, nargs="+", default=[(mode, 1.0) for mode in MODES], metavar="MODE[:FACTOR]")
    parser.add_argument("--initial", type=float, default=0.5, help="potential that neurons start from, in thetas")
    parser.add_argument("--calibration-images", type=int, default=1000)
    parser.add_argument("--share", type=int, help="conversions for more steps are the one for so many, run longer [default: none is]")
    parser.add_argument("--held-out", type=int, metavar="N", help="agreement on every N-th calibration image instead")
    parser.add_argument(
        "--refine", nargs="+", default=[], metavar="NAME", help="refinements of the converted networks, see quickspike methods"
    )
    parser.add_argument("--label", default="refined", help="what the reports of refined networks are called: MODE_LABEL-T.json")
    parser.add_argument("--float", action="store_true", help="everything in floating point")
    parser.add_argument("--images", type=int, help="first N test (or held-out) images [default: all]")
    options, model, data = network_and_data(parser, reports=True)
    folder: Path | None = options.out
    if folder is None and not options.held_out:
        raise SystemExit("--out must name a folder for the reports, unless images are held out")
    refinements = refinements_of(options.refine)
    todo = [
        (mode, scale, *group)
        for mode, scale in options.modes
        for group in groups_of(mode, sorted(options.steps), None if refinements else options.share)
    ]
    named = f"_{options.label}" if refinements else ""
    if folder is not None and not options.held_out:
        folder.mkdir(parents=True, exist_ok=True)
        todo = [one for one in todo if not all((folder / f"{one[0]}{named}-{step}.json").exists() for step in one[3])]
    if not todo:
        return
    ann, stream, held_out = calibrated(model, data, options.calibration_images, options.held_out)
    held_out = held_out[: options.images]
    with torch.inference_mode():
        classes = torch.cat([model(part).argmax(1) for part in torch.split(held_out, BATCH)]) if len(held_out) else torch.empty(0)
    for mode, scale, fitted, steps in todo:
        started = time.perf_counter()
        ceilings = min(fitted, options.share or fitted) if refinements else 0
        snn = finish(ann, stream, method_of(mode, scale, fitted, ceilings, refinements, options.initial))
        converted = time.perf_counter() - started
        engine = "fused" if options.float else ENGINES[mode]
        if options.held_out:
            found = agreement(snn, held_out, classes, steps, engine)
        else:
            # The first report also holds the accuracy of the source network.
            reference = model if (mode, scale, fitted, steps) == todo[0] else None
            report = qs.evaluate(snn, data.loader("test", limit=options.images), reference, steps, device="cpu", engine=engine)
            found = report.accuracy
            made = {"convert_seconds": round(converted, 1), "commit": commit(), "model": Path(options.model).name, "fitted_for": fitted}
            for step in steps:
                (folder / f"{mode}{named}-{step}.json").write_text(json.dumps(report.to_json() | made, indent=1) + "\n")
        shown = "  ".join(f"T = {step}: {value:.2f}" for step, value in found.items())
        print(
            f"{mode}{named}, ceilings for {ceilings or fitted} steps x {scale:g}: {shown}  ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
