"""Which networks of torchvision and timm convert, how far their readout is off, and what that takes.

    python bench/zoo.py [--only PATTERN...] [--source torchvision timm] [--limit 240] [--out results/zoo.json] [--page docs/zoo.md]

Weights are drawn from a seed, and the statistics of batch norm are those of the drawn images, as after a training: drawn
weights alone let activations vanish. Networks see 64 x 64 pixels unless they need more. Calibrated on 8 images, one image
is run: at T = 16 with the method's own ceilings, at T = 256 with the largest activations as ceilings, since ceilings that
balance clipping for 16 steps would still clip after 256. Every network is converted in a process of its own, from small to
large. What is in the file already is not done again, except what failed, and what a shorter --limit cut off.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import multiprocessing
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from timing import largest_memory

from quickspike.files import write_text
from quickspike.provenance import commit, machine, versions

SHORT, LONG, SIZE, SEED, IMAGES = 16, 256, 64, 0, 8
LIMIT = 240
"""Seconds for one network. At T = 256 the largest take minutes, and the whole of it is to take an hour."""
MEMORY = 20
"""GiB that a process may take: one that wants more fails by itself, before the system ends something else."""
TIMM_WANTED = 45
"""Networks of timm that are to convert."""
FAMILIES = {
    "VGG": "vgg*",
    "ResNet": "resnet*",
    "ResNeXt": "resnext*",
    "Wide ResNet": "wide_resnet*",
    "DenseNet": "densenet*",
    "GoogLeNet": "googlenet",
    "Inception v3": "inception_v3",
    "SqueezeNet": "squeezenet*",
    "MobileNet v2 and v3": "mobilenet_v[23]*",
    "MNASNet": "mnasnet*",
    "ShuffleNet v2": "shufflenet_v2*",
    "RegNet": "regnet_*",
    "EfficientNet": "efficientnet_*",
}
"""Of torchvision; every network of them is to convert."""

# One or two of every family of convolutional networks and some others, for contrast; millions of parameters beside them.
TIMM = {
    name: float(millions)
    for name, millions in (
        line.split() for line in Path(__file__).with_name("zoo_timm.txt").read_text(encoding="utf-8").splitlines() if line
    )
}
SIZES = {
    **dict.fromkeys(("inception_v3", "inception_v4", "inception_resnet_v2"), 80),
    **{"vit_h_14": 56, "halonet26t": 256, "maxvit_t": 224},
}
"""Pixels of those that take no 64."""
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")},
    **{f"vit_{name}": {"image_size": SIZES.get(f"vit_{name}", SIZE)} for name in ("b_16", "b_32", "l_16", "l_32", "h_14")},
    **{name: {"img_size": SIZE} for name in ("vit_tiny_patch16_224", "botnet26t_256")},
}


def names_of(source: str) -> dict[str, float]:
    """The networks of a source, with their millions of parameters; all that torchvision has for classification."""
    if source == "timm":
        return TIMM
    from torchvision import models

    names = models.list_models(module=models)
    return {name: next(iter(models.get_model_weights(name))).meta["num_params"] / 1e6 for name in names}


def built(source: str, name: str) -> Any:
    """(a network with drawn weights, dropout off, images for it)."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    # Both libraries have an inception_v3; only torchvision's has heads for training.
    own = {} if source == "timm" and name == "inception_v3" else OPTIONS.get(name, {})
    if source == "timm":
        import timm

        net = timm.create_model(name, pretrained=False, **own)
    else:
        import torchvision

        net = torchvision.models.get_model(name, weights=None, **own)
    images = drawn_images(IMAGES, SIZES.get(name, SIZE))
    net.eval()
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None
            layer.train()
    with torch.no_grad():
        net(images)
    return net.eval().requires_grad_(False), images


def drawn_images(count: int, size: int) -> Any:
    """Smooth random fields with some noise, `[N, 3, size, size]`."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * torch.randn(count, 3, size, size, generator=generator)


def fill_row(row: dict[str, Any], tell: Any = lambda row: None) -> None:
    """Complete the row of the network that it names; `tell(row)` is called whenever something is known."""
    import torch

    import quickspike as qs
    from quickspike.api import finish, fit
    from quickspike.data import ImageStream
    from quickspike.method import create

    net, images = built(row["source"], row["name"])
    row |= {"pixels": images.shape[-1], "parameters": sum(p.numel() for p in net.parameters())}
    coverage = qs.inspect(net, images[:1])
    analog: tuple[str, ...] = ()
    if not coverage.convertible:
        row["refused"] = dict(Counter(finding.operator for finding in coverage.unsupported))
        row["reason"] = coverage.unsupported[0].sentence() if coverage.unsupported else "holds no activation"
        # What becomes of it with parts kept analog is more than has to be known.
        tell(row | {"status": "refused"})
        analog = tuple(sorted({finding.operator for finding in coverage.unsupported if "analog=" in finding.way_out}))
        coverage = qs.inspect(net, images[:1], analog) if analog else coverage
        if not coverage.convertible:
            row["status"] = "refused"
            return
    row |= {"status": "kept analog" if analog else "converted", "analog": list(analog)}
    row["approximated"] = max((finding.error for finding in coverage.findings), default=0.0)
    with torch.no_grad():
        wanted = net(images[:1])
        stream = ImageStream(images)
        started = time.perf_counter()
        ann = fit(net, stream, create("threshold_balancing", steps=SHORT), analog=analog)
        for steps, options in ((SHORT, {}), (LONG, {"ceiling": "percentile", "percentile": 100.0})):
            snn = finish(ann, stream, create("threshold_balancing", steps=steps, **options))
            row.setdefault("sites", len(snn.sites))
            row.setdefault("convert_seconds", round(time.perf_counter() - started, 1))
            tell(row)
            snn.memory = "2GiB"
            started = time.perf_counter()
            off = float((snn(images[:1]) - wanted).abs().max() / wanted.abs().max())
            row[f"run_{steps}_seconds"] = round(time.perf_counter() - started, 1)
            row[f"error_{steps}"] = float(f"{off:.4g}")
            row["peak_mebibytes"] = largest_memory() // 2**20
            tell(row)
            del snn


def _worker(source: str, name: str, connection: Any, memory: int) -> None:
    import logging

    logging.disable(logging.WARNING)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (memory * 2**30, memory * 2**30))
    row: dict[str, Any] = {"source": source, "name": name}
    try:
        fill_row(row, connection.send)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        row |= failed(row, f"{type(error).__name__}: {text[:300]}")
    connection.send(row)
    connection.send(None)


def failed(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """What to note; a network that was refused by name stays so, whatever becomes of it with parts kept analog."""
    return {"status": "refused", "analog_attempt": reason} if "refused" in row else {"status": "failed", "reason": reason}


def in_own_process(source: str, name: str, limit: float, memory: int = MEMORY) -> dict[str, Any]:
    """The row, as far as it came within `limit` seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(source, name, sender, memory))
    process.start()
    sender.close()
    end = time.monotonic() + limit
    row: dict[str, Any] = {"source": source, "name": name}
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            found = receiver.recv()
            if found is None:
                break
            row = found
        else:
            row |= {"cut_off_after": limit}
            if "status" not in row:
                row |= {"status": "too slow", "reason": f"was not converted within {limit:g} s"}
    except EOFError:
        row |= failed(row, "its process died, out of memory as a rule")
    process.kill()
    process.join()
    about = {"steps": [SHORT, LONG], "images": IMAGES, "seed": SEED, "commit": commit(), "machine": machine(), "versions": versions()}
    return row | about


def is_done(row: dict[str, Any], limit: float) -> bool:
    """Whether a row stays: it did not fail, and more time would not add to it."""
    return row["status"] != "failed" and row.get("cut_off_after", math.inf) >= limit


def checks(rows: list[dict[str, Any]]) -> list[tuple[str, bool, str]]:
    """(what is to be shown, whether it is, with which figures)."""
    status = {(row["source"], row["name"]): row["status"] for row in rows}
    found = []
    for family, pattern in FAMILIES.items():
        names = fnmatch.filter(names_of("torchvision"), pattern)
        left = [name for name in names if status.get(("torchvision", name)) != "converted"]
        figures = f"{len(names) - len(left)} of {len(names)}" + (f", not {', '.join(left)}" if left else "")
        found.append((f"torchvision: every {family} converts", bool(names) and not left, figures))
    named = [name for name in names_of("torchvision") if status.get(("torchvision", name)) in ("converted", "kept analog", "refused")]
    every = len(names_of("torchvision"))
    found.append(("torchvision: what does not convert is refused by name", len(named) == every, f"{len(named)} of {every} rows say so"))
    converted = sum(status.get(("timm", name)) == "converted" for name in TIMM)
    kept = sum(status.get(("timm", name)) == "kept analog" for name in TIMM)
    figures = f"{converted} of {len(TIMM)}, {kept} more with parts kept analog"
    found.append((f"timm: at least {TIMM_WANTED} of {len(TIMM)} convert", converted >= TIMM_WANTED, figures))
    return found


def page(rows: list[dict[str, Any]]) -> str:
    """The table as a page of the docs."""
    lines = [
        "# The model zoos",
        "",
        f"Made by `bench/zoo.py` from `results/zoo.json`. Drawn weights, batch norm with the statistics of {IMAGES} drawn images, method",
        "`threshold_balancing` calibrated on the same. *error*: largest difference of the readout from the source network's, in units",
        f"of its largest value, on one image: at T = {SHORT} with the method's own ceilings, at T = {LONG} with the largest activations;",
        "deep networks with drawn weights blow up small differences, so it is an upper end rather than what a trained network shows.",
        "*lines*: largest error of the straight lines that stand for a smooth activation. Seconds are those of a conversion for",
        f"T = {SHORT}, calibration included, and of one image; *MiB* is the largest memory of the whole process, source network, libraries",
        "and both conversions included.",
        "",
    ]
    for source in sorted({row["source"] for row in rows}):
        found = Counter(row["status"] for row in rows if row["source"] == source)
        lines.append(f"{source}: " + ", ".join(f"{number} {status}" for status, number in found.most_common()) + ".")
    lines += ["", "| to be shown | | |", "|---|---|---|"]
    lines += [f"| {what} | {'pass' if passed else 'FAIL'} | {figures} |" for what, passed, figures in checks(rows)]
    head = ("network", "", "sites", "lines", f"error, T = {SHORT}", f"T = {LONG}", "s to convert", f"s, T = {SHORT}", f"T = {LONG}", "MiB")
    lines += ["", "| " + " | ".join(head) + " |", "|---|---|" + "--:|" * 8]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in sorted(rows, key=lambda row: (row["source"] == "timm", row["name"]))]
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    name, status = f"{row['source']} {row['name']}", row["status"]
    if "sites" not in row or status == "failed":
        what = ", ".join(f"{operator} x{count}" for operator, count in row.get("refused", {}).items()) or row.get("reason", "")
        return [name, f"{status}: {what[:200]}", *[""] * 8]
    status = f"kept analog: {', '.join(row['analog'])}" if row["analog"] else status
    status += f" (cut off after {row['cut_off_after']:g} s)" if "cut_off_after" in row else ""
    figures = [row.get(key, "") for key in (f"error_{SHORT}", f"error_{LONG}", "convert_seconds", f"run_{SHORT}_seconds")]
    lines = f"{row['approximated']:.2g}" if row["approximated"] else "exact"
    return [name, status, *map(str, (row["sites"], lines, *figures, row.get(f"run_{LONG}_seconds", ""), row.get("peak_mebibytes", "")))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs="+", default=["torchvision", "timm"], choices=["torchvision", "timm"])
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one network")
    parser.add_argument("--memory", type=int, default=MEMORY, help="GiB for one network")
    parser.add_argument("--out", type=Path, default=Path("results/zoo.json"))
    parser.add_argument("--page", type=Path, help="also write the table there")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["source"], row["name"]) for row in rows if is_done(row, options.limit)}
    sizes = {(source, name): size for source in options.source for name, size in names_of(source).items()}
    left = [
        one
        for one in sorted(sizes, key=lambda one: sizes[one])
        if one not in done and any(fnmatch.fnmatch(one[1], pattern) for pattern in options.only)
    ]
    for number, (source, name) in enumerate(left, 1):
        row = in_own_process(source, name, options.limit, options.memory)
        rows = [old for old in rows if (old["source"], old["name"]) != (source, name)] + [row]
        write_text(options.out, json.dumps({"rows": rows}, indent=1) + "\n")
        shown = row.get(f"error_{LONG}", row.get("refused", row.get("reason", "")))
        print(f"{number}/{len(left)} {source} {name}: {row['status']} {shown}", flush=True)
    for what, passed, figures in checks(rows):
        print(f"{'pass' if passed else 'FAIL'}  {what}: {figures}")
    if options.page is not None:
        write_text(options.page, page(rows))


if __name__ == "__main__":
    main()
