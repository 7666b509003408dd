"""Which networks of torchvision and timm convert, how far their readout is off, and what that takes.

    python bench/zoo.py [--only PATTERN...] [--source torchvision timm] [--out results/zoo.json] [--page docs/zoo.md]

Weights are drawn from a seed, and the statistics of batch norm are those of the drawn images, as after a training: drawn
weights alone let activations vanish. Networks see 64 x 64 pixels unless they need more. Every network is converted in
a process of its own; what is in the file already is not done again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from quickspike.provenance import commit, machine, versions

SHORT, LONG, SIZE, SEED = 16, 256, 64, 0
LIMIT = 900
"""Seconds for one network."""

# Those of torchvision are all there are for classification; of timm, one or two of every family of convolutional networks
# and some others, for contrast.
TIMM = Path(__file__).with_name("zoo_timm.txt").read_text(encoding="utf-8").split()
SIZES = {
    **dict.fromkeys(("inception_v3", "inception_v4", "inception_resnet_v2"), 299),
    **dict.fromkeys(("halonet26t", "botnet26t_256"), 256),
    **dict.fromkeys(("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_tiny_patch16_224", "maxvit_t"), 224),
    **dict.fromkeys(("vit_h_14", "nasnetalarge", "pnasnet5large"), 224),
}


def names_of(source: str) -> list[str]:
    """The networks of a source."""
    if source == "timm":
        return TIMM
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def built(source: str, name: str) -> Any:
    """A network with drawn weights, dropout off."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    if source == "timm":
        import timm

        net = timm.create_model(name, pretrained=False)
    else:
        import torchvision

        own = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        net = torchvision.models.get_model(name, weights=None, **own)
    size = SIZES.get(name, SIZE)
    images = drawn_images(16, size)
    net.eval()
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None
            layer.train()
    with torch.no_grad():
        net(images)
    return net.eval(), images


def drawn_images(count: int, size: int) -> Any:
    """Smooth random fields with some noise, `[N, 3, size, size]`."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * torch.randn(count, 3, size, size, generator=generator)


def row_of(source: str, name: str) -> dict[str, Any]:
    """One row of the table."""
    import torch

    import quickspike as qs

    net, images = built(source, name)
    row: dict[str, Any] = {
        "source": source,
        "name": name,
        "pixels": images.shape[-1],
        "parameters": sum(p.numel() for p in net.parameters()),
    }
    coverage = qs.inspect(net, images[:1])
    analog: tuple[str, ...] = ()
    if not coverage.convertible:
        row["refused"] = dict(Counter(finding.operator for finding in coverage.unsupported))
        row["reason"] = coverage.unsupported[0].sentence() if coverage.unsupported else "holds no activation"
        analog = tuple(sorted({finding.operator for finding in coverage.unsupported if "analog=" in finding.way_out}))
        if not analog or not qs.inspect(net, images[:1], analog).convertible:
            return row | {"status": "refused"}
    row["status"] = "kept analog" if analog else "converted"
    row["analog"] = list(analog)
    row["approximated"] = max((finding.error for finding in coverage.findings), default=0.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        wanted = net(images[:2])
        for steps in (SHORT, LONG):
            started = time.perf_counter()
            snn = qs.convert(net, images, steps=steps, analog=analog)
            row.setdefault("sites", len(snn.sites))
            row[f"convert_{steps}_seconds"] = round(time.perf_counter() - started, 1)
            snn.memory = "2GiB"
            started = time.perf_counter()
            off = float((snn(images[:2]) - wanted).abs().max() / wanted.abs().max())
            row[f"run_{steps}_seconds"] = round(time.perf_counter() - started, 1)
            row[f"error_{steps}"] = round(off, 4)
    row["mebibytes"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    return row


def _worker(source: str, name: str, connection: Any) -> None:
    import logging

    logging.disable(logging.WARNING)
    try:
        connection.send(row_of(source, name))
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        connection.send({"source": source, "name": name, "status": "failed", "reason": f"{type(error).__name__}: {text}"})


def in_own_process(source: str, name: str) -> dict[str, Any]:
    """The row, or why there is none."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(source, name, sender))
    process.start()
    sender.close()
    answered = receiver.poll(LIMIT)
    try:
        row: dict[str, Any] = receiver.recv() if answered else {"status": "failed", "reason": f"took more than {LIMIT} s"}
    except EOFError:
        row = {"status": "failed", "reason": "its process died, out of memory as a rule"}
    process.kill()
    process.join()
    return {"source": source, "name": name} | row


def page(rows: list[dict[str, Any]]) -> str:
    """The table as a page of the docs."""
    counts = {
        source: Counter(row["status"] for row in rows if row["source"] == source) for source in sorted({row["source"] for row in rows})
    }
    lines = [
        "# The model zoos",
        "",
        "Made by `bench/zoo.py` from `results/zoo.json`. Drawn weights, batch norm with the statistics of drawn images, method",
        "`threshold_balancing` calibrated on 16 images. *error*: largest difference of the readout from the source network's at",
        f"T = {LONG}, in units of its largest value, on two images; deep networks with drawn weights blow up small differences, so it",
        "is an upper end rather than what a trained network shows. *lines*: largest error of the straight lines that stand for a",
        "smooth activation.",
        "",
    ]
    for source, found in counts.items():
        lines.append(f"{source}: " + ", ".join(f"{number} {status}" for status, number in found.most_common()) + ".")
    lines += ["", "| network | | sites | lines | error | seconds to convert | MiB |", "|---|---|--:|--:|--:|--:|--:|"]
    for row in sorted(rows, key=lambda row: (row["source"] != "torchvision", row["source"], row["name"])):
        name = f"{row['source']} {row['name']}"
        if row["status"] in ("refused", "failed"):
            what = ", ".join(f"{operator} x{count}" for operator, count in row.get("refused", {}).items()) or row["reason"]
            lines.append(f"| {name} | {row['status']}: {what[:200]} | | | | | |")
            continue
        status = row["status"] if not row["analog"] else f"kept analog: {', '.join(row['analog'])}"
        lines_error = f"{row['approximated']:.2g}" if row["approximated"] else "exact"
        cells = (row["sites"], lines_error, row[f"error_{LONG}"], row[f"convert_{SHORT}_seconds"], row["mebibytes"])
        lines.append(f"| {name} | {status} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs="+", default=["torchvision", "timm"], choices=["torchvision", "timm"])
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--out", type=Path, default=Path("results/zoo.json"))
    parser.add_argument("--page", type=Path, help="also write the table there")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["source"], row["name"]) for row in rows}
    wanted = [(source, name) for source in options.source for name in names_of(source)]
    left = [one for one in wanted if one not in done and any(fnmatch.fnmatch(one[1], pattern) for pattern in options.only)]
    for number, (source, name) in enumerate(left, 1):
        row = in_own_process(source, name)
        rows.append(row)
        about = {"commit": commit(), "machine": machine(), "versions": versions(), "steps": [SHORT, LONG], "seed": SEED}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        shown = row.get(f"error_{LONG}", row.get("refused", row.get("reason", "")))
        sys.stdout.write(f"{number}/{len(left)} {source} {name}: {row['status']} {shown}\n")
        sys.stdout.flush()
    if options.page is not None:
        options.page.write_text(page(rows))


if __name__ == "__main__":
    main()
