"""Our figures beside the published ones at the same T, as the table of the README.

Run: .venv/bin/python recipes/against_published.py

Published figures: results/published.toml. Ours: the reports in results/. Which network and method stands in a column is
written down here and is the same for every T; nothing is chosen by its accuracy on the test images.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
KEYS = ("data", "steps", "accuracy", "network", "ann", "method", "stage", "evidence", "source")
NAMES = {
    "ultra_low_latency": "ULL",
    "diet_snn": "DIET",
    "potential_init": "PI",
    "rate_norm": "RNL",
    "rate_encoded": "RE",
    "calibration": "SC",
    "sliprelu": "Slip",
    "error_compensation": "EC",
    "hybrid_conversion": "hybrid",
    "optimal_conversion": "OC",
    "qcfs": "QCFS",
    "polarity_multi_spike": "PMSM",
}
"""Methods in a narrow table."""
Figures = Mapping[int, str]


def published() -> list[dict[str, Any]]:
    """Every published figure."""
    return rows_of("figures") + rows_of("later")


def rows_of(table: str) -> list[dict[str, Any]]:
    """Those that were gathered at first (figures), or found since (later)."""
    rows = tomllib.loads((RESULTS / "published.toml").read_text(encoding="utf-8"))[table]
    return [dict(zip(KEYS, row, strict=True)) for row in rows]


def converted(wanted: Callable[[dict[str, Any], list[str]], bool]) -> Figures:
    """The ResNet-20 checkpoint, no training: by T, of the reports that `wanted` takes by their options and refinements."""
    found: dict[int, str] = {}
    for name in (
        "resnet20_cifar10.json",
        *(f"resnet20_cifar10_{kind}.json" for kind in ("signed", "refined", "weighted", "groups", "leaky")),
    ):
        for report in json.loads((RESULTS / name).read_text(encoding="utf-8")):
            method = report["method"]
            refinements = [one["name"] for one in method.get("refinements", ())]
            if method["name"] == "threshold_balancing" and wanted(method["options"], refinements):
                found |= {int(steps): f"{value:.2f}" for steps, value in report["accuracy"].items()}
    return found


def trained(name: str, stage: str) -> Figures:
    """What a recipe gave at one of its stages: the mean, and over several seeds the standard deviation."""
    summary = json.loads((RESULTS / name).read_text(encoding="utf-8"))["summary"][stage]
    return {
        int(steps): f"{one['mean']:.2f}" + (f" ± {one['std']:.2f}" if one["n"] > 1 else "")
        for steps, one in summary.items()
        if steps.isdigit()
    }


def own(recipe: str, steps: int) -> str:
    """What a recipe of `fast_cnn` gave at the T that it is for."""
    return trained(f"cifar10_fast_cnn_{recipe}.json", "converted")[steps]


def plain_weights(options: dict[str, Any], refinements: list[str]) -> bool:
    """Plain integrate-and-fire neurons with calibrated weights, and from T = 2 on a readout that leaks: the last file has those."""
    kinds = any(options.get(kind) for kind in ("signed", "synchronous", "weighted")) or options.get("members", 1) > 1
    return not kinds and refinements in (["weight_calibration"], ["weight_calibration", "leaky_readout"])


def signed_bias(options: dict[str, Any], refinements: list[str]) -> bool:
    """Neurons that take spikes back, with bias correction: an answer after T steps."""
    return bool(options.get("signed")) and refinements == ["bias_correction"]


def waiting_weights(options: dict[str, Any], refinements: list[str]) -> bool:
    """Layers that wait for whole windows, with calibrated weights."""
    return bool(options.get("synchronous")) and refinements == ["weight_calibration"]


def weighted(options: dict[str, Any], refinements: list[str]) -> bool:
    """Spikes weighted by their step, with bias correction where it was run: the file has those reports last."""
    return bool(options.get("weighted")) and refinements in ([], ["bias_correction"])


def groups_of_four(options: dict[str, Any], refinements: list[str]) -> bool:
    """Groups of four neurons in place of each one, with calibrated weights: an answer after T steps."""
    return options.get("members") == 4 and refinements == ["weight_calibration"]


def cell(figures: list[dict[str, Any]]) -> str:
    """Published figures, best first, by method."""
    by_method: dict[str, list[str]] = {}
    for one in sorted(figures, key=lambda one: -one["accuracy"]):
        by_method.setdefault(NAMES[one["method"]], []).append(f"{one['accuracy']:.2f} {one['network']}")
    return "; ".join(f"{method} {', '.join(values)}" for method, values in by_method.items())


def table() -> str:
    """The table, a row for every T that something is published for."""
    columns = {
        "ours, no training, after T": converted(plain_weights),
        "ours, no training, signed": converted(signed_bias),
        "ours, no training, synchronous": converted(waiting_weights),
        "ours, no training, weighted": converted(weighted),
        "ours, no training, groups of 4": converted(groups_of_four),
        "ours, trained, after T": trained("cifar10_fast_resnet_ultra_low_latency_t2.json", "tuned"),
        "ours, trained, synchronous": trained("cifar10_fast_cnn_qcfs_l8.json", "synchronous"),
        "ours, trained, weighted": {steps: own(f"qcfs_weighted_t{steps}", steps) for steps in (2, 4)},
        "ours, trained, groups of 4": trained("cifar10_fast_cnn_qcfs_groups_t2.json", "tuned"),
    }
    lines = ["| T | published, converted | published, fine-tuned | " + " | ".join(columns) + " |", "|--:|---|---|" + "--:|" * len(columns)]
    figures = published()
    for steps in sorted({one["steps"] for one in figures if one["data"] == "CIFAR-10"}):
        here = [one for one in figures if one["data"] == "CIFAR-10" and one["steps"] == steps]
        stages = [cell([one for one in here if one["stage"] == stage]) for stage in ("converted", "fine-tuned")]
        lines.append(f"| {steps} | " + " | ".join([*stages, *(column.get(steps, "") for column in columns.values())]) + " |")
    digits = [one for one in figures if one["data"] == "MNIST"]
    ours = trained("mnist_rate_encoded_t1.json", "converted")
    before = list(columns).index("ours, trained, synchronous")
    for one in digits:
        blank = " |" * (1 + before), " |" * (len(columns) - before - 1)
        lines.append(f"| {one['steps']}, MNIST | {cell([one])} |{blank[0]} {ours[one['steps']]} |{blank[1]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
