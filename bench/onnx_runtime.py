"""onnxruntime on our ONNX files: how far its logits are from ours, and its time beside that of our engines.

    python bench/onnx_runtime.py MODEL WEIGHTS DATA --mean M... --std S... [--steps 4] [--images N] [--batch 32] [--out FILE]

The network is converted once, with threshold_balancing unless --method says otherwise, on the first 1,000 training images, and
written unrolled over T: in float32, beside our fused engine, and in whole numbers (QDQ), beside our integer engine, once with
the image as it is and once with the image in whole numbers, too, where no sum depends on the order of its terms. Logits
are compared on all test images: the largest difference, alone and in units of the largest logit, and how many answers agree.
A spike on the boundary that one rounding moves changes logits by more than rounding itself does: `beyond 1e-4` counts
such images. Times are those of one batch, by turns, with as many threads for each, in units of the fused engine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from timing import interleaved, network_and_data, save
from torch import Tensor

import quickspike as qs
from quickspike.data import DataSet
from quickspike.onnx_export import to_onnx
from quickspike.quantisation import quantise

CLOSE = 1e-4
IMAGE_BITS = 10
FORMS = {"fused": "float32", "integer": "integers", "integer, whole image": f"integers, the image in {IMAGE_BITS} bits"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--method", default="threshold_balancing")
    parser.add_argument("--calibration-images", type=int, default=1000)
    parser.add_argument("--images", type=int, help="first N test images [default: all]")
    parser.add_argument("--batch", type=int, default=32, help="images whose time is taken")
    parser.add_argument("--repetitions", type=int, default=10)
    options, model, data = network_and_data(parser)
    calibration = data.loader("train", limit=options.calibration_images)
    snn = qs.convert(model, calibration, options.method, steps=options.steps)
    whole = {"integer": quantise(snn).network, "integer, whole image": quantise(snn, image_bits=IMAGE_BITS).network}
    engines = {"fused": qs.accelerate(snn, "fused"), **{name: qs.accelerate(one, "integer") for name, one in whole.items()}}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        files = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(engines)}
        for name, path in files.items():
            to_onnx(whole.get(name, snn), path, integers=name in whole)
        sessions = {name: session(path) for name, path in files.items()}
        rows = [
            {"form": FORMS[name], "bytes": path.stat().st_size, **compared(engines[name], sessions[name], data, options.images)}
            for name, path in files.items()
        ]
        images = next(iter(data.loader("test", batch_size=options.batch, limit=options.batch)))[0]
        runs = {name: lambda engine=engine: engine(images) for name, engine in engines.items()}
        ours = {f"onnxruntime {name}": lambda one=one: answers(one, images) for name, one in sessions.items()}
        times = interleaved({**runs, **ours}, options.repetitions)
    for row in rows:
        print("  ".join(f"{name}: {value}" for name, value in row.items()))
    for name, found in times.items():
        print(f"{name:>20}  {found['ratio']:6.3f}  ({found['least']:.3f} to {found['largest']:.3f})")
    save(options.out, rows, options, times=times, onnxruntime=onnxruntime.__version__)


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers(file: Any, images: Tensor) -> Tensor:
    """The first output."""
    return torch.from_numpy(file.run(None, {"images": images.numpy()})[0])


def compared(engine: qs.SpikingNetwork, file: Any, data: DataSet, limit: int | None) -> dict[str, float]:
    """How far the logits for all test images are apart."""
    pairs = [(engine(images), answers(file, images)) for images, _ in data.loader("test", limit=limit)]
    ours, theirs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    apart, largest = (theirs - ours).abs().amax(1), float(ours.abs().max())
    return {
        "images": len(ours),
        "largest difference": float(f"{float(apart.max()):.3g}"),
        "median difference": float(f"{float(apart.median()):.3g}"),
        "largest logit": round(largest, 3),
        "beyond 1e-4": int((apart > CLOSE).sum()),
        "same answers": int((ours.argmax(1) == theirs.argmax(1)).sum()),
    }


if __name__ == "__main__":
    main()
