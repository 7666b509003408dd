"""The command line: in this process wherever possible, since every new one loads torch anew."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quickspike as qs
from cli_results import failed
from quickspike.claims import CLAIMS
from quickspike.cli import main
from quickspike.method import all_methods
from quickspike.options import options_of
from quickspike.preprocessing import Preprocessing
from quickspike.refinement import REFINEMENTS

MODEL = """
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))


def refused():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Softmax(1), nn.Linear(8, 10))


def colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def smooth():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.SiLU(), nn.Linear(8, 10))


def other_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.py"
    path.write_text(MODEL)
    return path


@pytest.fixture(scope="module")
def network(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "network.safetensors"
    main(["convert", f"{model}:net", "--data", "digits", "--steps", "4", "--calibration-images", "100", "--out", str(path), "--json"])
    return path


# Help


HELP = {
    "demo": ["--out DIR", "--json"],
    "methods": ["[NAME]", "--json"],
    "inspect": ["MODEL", "--input N", "--weights FILE", "--analog PATTERN", "--pieces N", "--json"],
    "convert": [
        *("MODEL", "--data NAME", "--data-dir DIR", "--mean M", "--std S", "--download", "--out FILE", "--method NAME", "--weights FILE"),
        *("--calibration-images N", "[unit: images; range: >= 1]", "--json", "--analog PATTERN"),
        *("--pieces N", "--at PATTERN:OPTION=VALUE"),
    ],
    "evaluate": [
        *(
            "NETWORK",
            "--data NAME",
            "--data-dir DIR",
            "--mean M",
            "--std S",
            "--download",
            "--steps T",
            "--reference MODEL",
            "--weights FILE",
        ),
        *("--images N", "--out FILE", "--plot FILE", "--device NAME", "--precision NAME", "--json", "unit: steps", "range: >= 1"),
        *("--engine NAME", "--engine-precision NAME", "--memory AMOUNT", "--first-layer HOW-OFTEN"),
    ],
}


@pytest.mark.parametrize("command", HELP)
def test_help_lists_every_option(command: str, run: Any) -> None:
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    for part in HELP[command]:
        assert part in result.out, part


@pytest.mark.parametrize("name", all_methods())
@pytest.mark.parametrize("form", ["two", "one"])
def test_help_of_convert_shows_the_options_of_the_method(name: str, form: str, run: Any) -> None:
    cls = all_methods()[name]
    result = run("convert", *(["--method", name] if form == "two" else [f"--method={name}"]), "--help")
    assert result.code == 0
    assert str(cls.paper) in result.out
    for key, (declared, kind, default) in options_of(cls).items():
        # A switch that is on by default is shown as the way to turn it off.
        assert f"--{'no-' if default is True else ''}{key.replace('_', '-')} " in result.out
        assert declared.describe() in result.out
        assert f"default: {default}" in result.out
        for choice in getattr(kind, "__args__", ()):
            assert str(choice) in result.out
    strange = {key for other in all_methods().values() for key in options_of(other)} - set(options_of(cls))
    for key in strange:
        assert f"--{key.replace('_', '-')} " not in result.out


def test_help_and_version(run: Any) -> None:
    result = run("--help")
    assert result.code == 0
    for command in HELP:
        assert command in result.out
    assert run("--version").out == f"quickspike {qs.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["transmute"], ["convert"], ["convert", "digits_cnn"], ["methods", "--nonsense"]])
def test_a_wrong_call_ends_with_2_and_says_why(arguments: list[str], run: Any) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert result.err.strip()
    assert result.out == ""


# Methods


def test_methods_lists_all(run: Any) -> None:
    result = run("methods")
    assert result.code == 0
    for name, cls in all_methods().items():
        assert name in result.out
        assert str(cls.paper) in result.out


def test_methods_as_json(run: Any) -> None:
    data = json.loads(run("methods", "--json").out)
    both = {**all_methods(), **REFINEMENTS.all()}
    assert [entry["name"] for entry in data] == list(both)
    for entry in data:
        cls = both[entry["name"]]
        assert list(entry["options"]) == list(options_of(cls))
        for key, (declared, _, default) in options_of(cls).items():
            assert entry["options"][key]["default"] == default
            assert entry["options"][key]["unit"] == declared.unit


@pytest.mark.parametrize("name", all_methods())
def test_methods_of_one_name(name: str, run: Any) -> None:
    result = run("methods", name)
    assert str(all_methods()[name].paper) in result.out
    for key, (declared, _, _) in options_of(all_methods()[name]).items():
        assert key in result.out
        assert declared.help in result.out
        assert declared.range_text() in result.out
    assert [entry["name"] for entry in json.loads(run("methods", name, "--json").out)] == [name]


def test_the_range_of_a_whole_number_is_written_in_full(run: Any) -> None:
    assert "e+" not in run("methods", "--json").out


# Inspect


def test_inspect(model: Path, run: Any) -> None:
    result = run("inspect", f"{model}:net", "--input", 1, 8, 8)
    assert (result.code, result.err) == (0, "")
    assert "Sequential: converts" in result.out
    for part in ("Conv2d", "analog", "folded", "neuron", "synapse"):
        assert part in result.out
    data = json.loads(run("inspect", f"{model}:net", "--input", 1, 8, 8, "--json").out)
    assert data["convertible"] is True
    assert [finding["status"] for finding in data["findings"]] == ["analog", "folded", "neuron", "synapse", "synapse"]


def test_inspect_of_what_does_not_convert(model: Path, run: Any) -> None:
    result = run("inspect", f"{model}:refused", "--input", 1, 8, 8)
    assert "does not convert" in result.out
    assert "Softmax" in result.out
    assert "Way out" in result.out
    assert json.loads(run("inspect", f"{model}:refused", "--input", 1, 8, 8, "--json").out)["convertible"] is False


def test_inspect_with_choices(model: Path, run: Any) -> None:
    kept = json.loads(run("inspect", f"{model}:refused", "--input", 1, 8, 8, "--analog", "Softmax", "--json").out)
    assert kept["convertible"] is True
    smooth = json.loads(run("inspect", f"{model}:smooth", "--input", 1, 8, 8, "--pieces", 4, "--json").out)
    assert [finding["error"] > 0.02 for finding in smooth["findings"] if finding["status"] == "neuron"] == [True]
    failed(run("inspect", f"{model}:refused", "--input", 1, 8, 8, "--analog", "softmaks"), "'softmaks' fits no call")
    failed(run("inspect", f"{model}:smooth", "--input", 1, 8, 8, "--pieces", 1), "pieces must be a whole number in [2, 64]")


@pytest.mark.parametrize("sizes", [[0, 8, 8], [-1, 8, 8], [3, 8, 8], [1, 8], [1, 1, 1]])
def test_inspect_with_a_wrong_input(sizes: list[int], model: Path, run: Any) -> None:
    failed(run("inspect", f"{model}:net", "--input", *sizes))


# Convert and evaluate


def test_convert_evaluate_end_to_end(model: Path, tmp_path: Path, run: Any) -> None:
    out, report, plot = tmp_path / "new" / "net.safetensors", tmp_path / "report.json", tmp_path / "a.png"
    arguments = ("--data", "digits", "--method", "potential_init", "--steps", 4, "--calibration-images", 150, "--out", out)
    result = run("convert", f"{model}:net", *arguments)
    assert (result.code, result.err) == (0, "")
    assert "potential_init, T = 4, calibrated on 150 images" in result.out
    assert str(out) in result.out
    snn = qs.load(out)
    assert (snn.steps, snn.method["name"], snn.input_shape) == (4, "potential_init", (1, 8, 8))
    assert snn.provenance["calibration_images"] == 150
    assert str(tmp_path) not in json.dumps(snn.provenance)
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    arguments = ("--data", "digits", "--reference", f"{model}:net", "--steps", 1, 4, "--images", 60, "--device", "cpu")
    result = run("evaluate", out, *arguments, "--out", report, "--plot", plot)
    assert (result.code, result.err) == (0, "")
    for part in ("T = 1", "T = 4", "60 images", "same class as the source network", "potential_init"):
        assert part in result.out
    assert plot.read_bytes().startswith(b"\x89PNG")
    data = json.loads(report.read_text())
    assert (data["samples"], data["steps"]) == (60, [1, 4])
    again = json.loads(run("evaluate", out, *arguments, "--json").out)
    for key in ("samples", "steps", "accuracy", "agreement", "reference_accuracy", "rates", "method", "provenance"):
        assert data[key] == again[key]


@pytest.mark.parametrize(("engine", "expected"), [("auto", "fused"), ("integer", "integer"), ("reference", "reference")])
def test_evaluate_on_an_engine(engine: str, expected: str, network: Path, run: Any) -> None:
    result = run("evaluate", str(network), "--data", "digits", "--images", "40", "--engine", engine, "--json")
    assert result.code == 0
    assert json.loads(result.out)["settings"]["engine"]["name"] == expected


def test_evaluate_says_which_engine_ran_and_why(network: Path, run: Any) -> None:
    arguments = ("evaluate", network, "--data", "digits", "--images", 20, "--device", "cpu")
    assert "engine: none asked for; the network as it is" in run(*arguments).out
    assert "engine: fused, fp32 (exact for weights in floating point)" in run(*arguments, "--engine", "auto").out
    half = run(*arguments, "--engine", "fused", "--engine-precision", "bf16", "--memory", "20MiB")
    assert "engine: fused, bf16 (asked for)" in half.out
    failed(run(*arguments, "--engine-precision", "bf16"), "engine_precision='bf16' needs an engine")
    failed(run(*arguments, "--memory", "much"), "memory must be a number with a unit such as 2GiB")
    failed(run(*arguments, "--memory", "10B"), "one sample needs about")


def test_what_stops_early_is_what_was_measured(network: Path, run: Any) -> None:
    from quickspike.data import load_data
    from quickspike.early_exit import savings

    options = ("--engine", "integer", "--bits", 2, "--exit", 3, "--device", "cpu", "--json")
    shown = json.loads(run("evaluate", network, "--data", "digits", *options).out)["early_exit"]
    data = load_data("digits")
    held_out, test = data.loader("train", limit=data.size("train"), last=True), data.loader("test")
    coarse, plain = (
        json.loads(json.dumps([dataclasses.asdict(row) for row in savings(snn, held_out, test, (3.0,))]))
        for snn in (qs.accelerate(qs.load(network), "integer", bits=2), qs.load(network))
    )
    assert shown == coarse
    assert shown != plain
    failed(run("evaluate", network, "--data", "digits", "--engine", "count", "--exit", 1), "--engine count", "take fused or integer")


def test_evaluate_shows_what_stopping_early_saves(network: Path, tmp_path: Path, run: Any) -> None:
    plot = tmp_path / "a.png"
    arguments = ("evaluate", str(network), "--data", "digits", "--images", "40", "--exit", "0.5", "10", "--device", "cpu")
    shown = run(*arguments, "--plot", str(plot))
    assert shown.code == 0
    assert "early exit" in shown.out
    assert plot.stat().st_size > 0
    rows = json.loads(run(*arguments, "--json").out)["early_exit"]
    assert [row["loss"] for row in rows] == [0.5, 10]
    assert rows[1]["steps"] <= rows[0]["steps"] <= 4
    failed(run("evaluate", str(network), "--data", "digits", "--exit", "nan"), "loss must be")
    waiting = tmp_path / "waiting.safetensors"
    qs.load(network).as_synchronous().save(waiting)
    failed(run("evaluate", str(waiting), "--data", "digits", "--exit", "1"), "wait for whole windows")


def test_evaluate_shows_where_the_error_comes_from(network: Path, run: Any) -> None:
    arguments = ("evaluate", str(network), "--data", "digits", "--images", "30", "--steps", "2", "--anatomy", "--device", "cpu")
    shown = run(*arguments)
    assert shown.code == 0
    assert "quantisation" in shown.out
    assert "of it" in shown.out
    found = json.loads(run(*arguments, "--json").out)["anatomy"]
    assert (found["steps"], found["images"]) == (2, 30)
    assert sum(found["sites"][0]["shares"].values()) == pytest.approx(1, abs=1e-4)


def test_evaluate_writes_a_page(network: Path, tmp_path: Path, run: Any) -> None:
    page = tmp_path / "page.html"
    result = run("evaluate", str(network), "--data", "digits", "--images", "30", "--page", page, "--device", "cpu")
    assert result.code == 0
    text = page.read_text(encoding="utf-8")
    for part in (f"{network.name} on digits", "Where the error comes from", "45nm_fp32", "One image: "):
        assert part in text
    assert str(tmp_path) not in text
    assert "engine: none asked for" in text
    failed(run("evaluate", str(network), "--data", "digits", "--page", tmp_path / "page.html" / "a"), "cannot write")


def test_a_page_says_how_to_make_it_again(model: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, page = tmp_path / "net.safetensors", tmp_path / "page.html"

    def typed(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["quickspike", *map(str, arguments)])
        assert run(*arguments).code == 0
        return page.read_text(encoding="utf-8") if page.exists() else ""

    typed("convert", f"{model}:net", "--data", "digits", "--steps", 2, "--calibration-images", 50, "--out", out, "--device", "cpu")
    evaluate = ("evaluate", out, "--data", "digits", "--images", 20, "--page", page, "--device", "cpu")
    text = typed(*evaluate)
    convert = "quickspike convert tiny.py:net --data digits --steps 2 --calibration-images 50 --out net.safetensors --device cpu"
    assert f"<pre>{convert}\nquickspike evaluate net.safetensors --data digits" in text
    assert str(tmp_path) not in text
    snn = qs.load(out)
    snn.neuron("2").threshold.data *= 2
    snn.save(out)
    assert f"<pre>{convert}\n# ... and net.safetensors was changed afterwards" in typed(*evaluate)
    del snn.provenance["made"]
    snn.save(out)
    assert "# net.safetensors was made in Python" in typed(*evaluate)


def test_evaluate_shows_what_it_costs(network: Path, run: Any) -> None:
    arguments = ("evaluate", str(network), "--data", "digits", "--images", "30", "--energy", "45nm_fp32", "loihi", "--device", "cpu")
    shown = run(*arguments)
    assert shown.code == 0
    assert "energy per image" in shown.out
    found = json.loads(run(*arguments, "--json").out)
    assert found["operations"]["images"] == 30
    assert found["as_papers_count"].keys() == {"diet_snn", "ultra_low_latency"}
    assert f"{found['as_papers_count']['diet_snn']:.2f}" in shown.out
    assert [(one["device"], one["account"]) for one in found["energy"]] == [
        (device, account) for device in ("45nm_fp32", "loihi") for account in ("papers", "conservative", "memory")
    ]
    # What a formula leaves out, and that the third takes a second network.
    for claim in CLAIMS.values():
        assert claim.caveat in " ".join(shown.out.split())
        assert f"{claim.published:g} ({claim.network})" in shown.out
    assert "image read once" in shown.out
    again = run(*arguments, "--first-layer", "every-step")
    assert "image read at every step" in again.out
    often = json.loads(run(*arguments, "--first-layer", "every-step", "--json").out)["operations"]
    assert often["first"] == "every step"
    assert often["metrics"]["Effective_MACs"] == 4 * found["operations"]["metrics"]["Effective_MACs"]
    papers = found["energy"][0]
    metrics = found["operations"]["metrics"]
    assert papers["spiking"] == pytest.approx(4.6 * metrics["Effective_MACs"] + 0.9 * metrics["Effective_ACs"])
    failed(run("evaluate", str(network), "--data", "digits", "--energy", "lohi"), "did you mean 'loihi'")


def test_evaluate_refuses_an_engine_that_cannot(network: Path, run: Any) -> None:
    failed(run("evaluate", str(network), "--data", "digits", "--engine", "integer", "--bits", "9"), "bits must be")


def test_convert_equals_the_library(model: Path, network: Path) -> None:
    from quickspike.data import load_data
    from quickspike.models import load_model

    direct = qs.convert(load_model(f"{model}:net"), load_data("digits").loader("train", limit=100), steps=4)
    saved = qs.load(network)
    assert saved.method == direct.method
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in direct.state_dict().items())


def test_convert_with_choices(model: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "net.safetensors"
    arguments = ("--data", "digits", "--steps", 4, "--calibration-images", 150, "--out", out, "--device", "cpu")
    assert run("convert", f"{model}:refused", *arguments, "--analog", "Softmax", "--at", "2:scale=0.5").code == 0
    snn = qs.load(out)
    assert snn.provenance["analog"] == ["Softmax"]
    assert snn.method["options"]["sites"] == {"2": {"scale": 0.5}}
    assert run("convert", f"{model}:smooth", *arguments, "--pieces", 4).code == 0
    assert qs.load(out).provenance["pieces"] == 4
    for text, reason in (
        ("2:scale", "--at takes PATTERN:OPTION=VALUE, got '2:scale'"),
        ("2:scale=half", "scale must be a number, got 'half'"),
        ("7:scale=0.5", "'7' fits no site"),
        ("2:steps=2", "steps cannot differ from site to site"),
    ):
        failed(run("convert", f"{model}:net", *arguments, "--at", text), reason)


def test_convert_refines(model: Path, tmp_path: Path, run: Any) -> None:
    from quickspike.data import load_data
    from quickspike.models import load_model

    out = tmp_path / "net.safetensors"
    arguments = ("--data", "digits", "--steps", 2, "--calibration-images", 150, "--out", out, "--device", "cpu")
    result = run("convert", f"{model}:net", *arguments, "--refine", "bias_correction:passes=3,rate=0.5", "potential_correction")
    assert "threshold_balancing | bias_correction:passes=3,rate=0.5 | potential_correction, T = 2" in result.out.replace("\n", " ")
    snn = qs.load(out)
    method = (
        qs.methods.ThresholdBalancing(steps=2) | qs.refinements.BiasCorrection(passes=3, rate=0.5) | qs.refinements.PotentialCorrection()
    )
    direct = qs.convert(load_model(f"{model}:net"), load_data("digits").loader("train", limit=150), method)
    assert snn.method == direct.method
    assert all(torch.equal(value, snn.state_dict()[key]) for key, value in direct.state_dict().items())
    failed(run("convert", f"{model}:net", *arguments, "--refine", "bias"), "unknown refinement 'bias'")
    shown = run("methods", "bias_correction").out
    assert "2106.06984" in shown
    assert "passes" in shown


def test_evaluate_values_needs_no_labels(model: Path, network: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "report.json"
    arguments = ("evaluate", str(network), "--data", "digits", "--images", 50, "--values")
    assert run(*arguments, "--reference", f"{model}:net", "--out", out).code == 0
    report = json.loads(out.read_text())
    assert report["accuracy"] == {}
    assert 0 < report["deviation"]["4"] < 100
    failed(run(*arguments), "--values compares with the source network; name it with --reference")
    for more in ("--plot", "--page"):
        failed(run(*arguments, "--reference", f"{model}:net", more, tmp_path / "a.png"), "--values")
    failed(run(*arguments, "--reference", f"{model}:net", "--exit", 1), "--values")


def test_convert_as_json(model: Path, tmp_path: Path, run: Any) -> None:
    result = run("convert", f"{model}:net", "--data", "digits", "--calibration-images", 50, "--out", tmp_path / "a", "--json")
    data = json.loads(result.out)
    assert result.err == ""
    assert data["out"] == str(tmp_path / "a")
    assert data["coverage"]["convertible"] is True
    assert data["method"]["options"]["steps"] == 8


def test_evaluation_normalises_as_the_conversion_did(model: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "a"
    run("convert", f"{model}:net", "--data", "digits", "--calibration-images", 50, "--mean", 0.2, "--std", 0.7, "--out", out)
    assert Preprocessing.from_json(qs.load(out).provenance["preprocessing"]) == Preprocessing((0.2,), (0.7,))
    own = json.loads(run("evaluate", out, "--data", "digits", "--images", 50, "--device", "cpu", "--json").out)
    explicit = run("evaluate", out, "--data", "digits", "--images", 50, "--mean", 0.2, "--std", 0.7, "--device", "cpu", "--json")
    other = run("evaluate", out, "--data", "digits", "--images", 50, "--mean", 0.9, "--std", 0.1, "--device", "cpu", "--json")
    assert own["rates"] == json.loads(explicit.out)["rates"]
    assert own["rates"] != json.loads(other.out)["rates"]


def test_negative_means_are_read(model: Path, tmp_path: Path, run: Any) -> None:
    arguments = ("--data", "digits", "--mean", "-0.5", "--std", "0.5", "--calibration-images", 20, "--out", tmp_path / "a")
    assert run("convert", f"{model}:net", *arguments).code == 0
    assert qs.load(tmp_path / "a").provenance["preprocessing"]["mean"] == [-0.5]


def test_weights_are_loaded(model: Path, tmp_path: Path, run: Any) -> None:
    from quickspike.models import load_model

    source = load_model(f"{model}:net")
    with torch.no_grad():
        source[4].bias.fill_(3.25)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    arguments = ("--data", "digits", "--calibration-images", 20, "--weights", tmp_path / "w.pt", "--out", tmp_path / "a")
    assert run("convert", f"{model}:net", *arguments).code == 0
    assert float(qs.load(tmp_path / "a").state_dict()["network.4.bias"][0]) == 3.25


def test_a_path_of_this_machine_does_not_reach_the_file(network: Path, model: Path) -> None:
    assert str(model.parent).encode() not in network.read_bytes()


def test_numbers_stay_readable_in_a_narrow_terminal(network: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run("evaluate", network, "--data", "digits", "--images", 20, "--device", "cpu", "--steps", *range(1, 13))
    assert result.code == 0
    assert "…" not in result.out


# Compare and search


def test_compare_draws_what_accuracy_takes(model: Path, tmp_path: Path, run: Any) -> None:
    page = tmp_path / "page.html"
    arguments = ("--methods", "potential_init", "rate_norm", "--steps", 1, 3, "--calibration-images", 50, "--images", 15, "--page", page)
    assert run("compare", f"{model}:net", "--data", "digits", *arguments, "--device", "cpu").code == 0
    text = page.read_text(encoding="utf-8")
    for part in ("What accuracy takes", "accuracy against latency", "accuracy against energy", "4 conversions on the same images"):
        assert part in text


def test_search_takes_options_and_writes_a_page(model: Path, tmp_path: Path, run: Any) -> None:
    page = tmp_path / "page.html"
    arguments = ("search", f"{model}:net", "--data", "digits", "--calibration-images", 50, "--images", 60, "--most-steps", 4)
    candidates = ("--candidate", "potential_init:ceiling=percentile,percentile=99", "threshold_balancing")
    result = run(*arguments, *candidates, "--max-drop", 30, "--page", page, "--device", "cpu", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert {one["candidate"] for one in found["trials"]} == {"potential_init ceiling=percentile percentile=99.0", "threshold_balancing"}
    text = page.read_text(encoding="utf-8")
    for part in ("What accuracy takes", "Pareto front", "accuracy against energy", "Where the error comes from", "on 450 test images"):
        assert part in text
    assert run(*arguments, "--candidate", "qcfs", "--max-drop", 0, "--most-steps", 1, "--page", page, "--device", "cpu").code == 0
    assert "Nothing loses at most 0 points" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("potential_ini", ["did you mean 'potential_init'"]),
        ("potential_init:percentil=99", ["percentil"]),
        ("potential_init:percentile=high", ["percentile must be a number, got 'high'"]),
        ("potential_init:percentile", ["NAME:OPTION=VALUE", "'potential_init:percentile'"]),
        ("potential_init:percentile=101", ["percentile must be in range"]),
        ("potential_init:steps=3", ["steps is what is searched for"]),
        ("potential_init | bias_corection", ["did you mean 'bias_correction'"]),
        ("potential_init | bias_correction:passes=none", ["passes must be a whole number, got 'none'"]),
    ],
)
def test_search_refuses_a_candidate_in_one_line(text: str, parts: list[str], model: Path, run: Any) -> None:
    failed(run("search", f"{model}:net", "--data", "digits", "--candidate", text, "--device", "cpu"), *parts)


# A user's errors


CONVERT = {
    "unknown method": (["--method", "threshold-balancing"], ["'threshold-balancing'", "did you mean 'threshold_balancing'"]),
    "no method": (["--method"], ["method"]),
    "unknown data": (["--data", "digit"], ["'digit'", "did you mean 'digits'"]),
    "data without a folder": (["--data", "mnist"], ["--data-dir"]),
    "missing npz": (["--data", "npz:/nowhere/a.npz"], ["/nowhere/a.npz", "no such file"]),
    "missing weights": (["--weights", "nowhere.pt"], ["nowhere.pt", "no such file"]),
    "steps 0": (["--steps", "0"], ["steps", "[1, 65536]", "0"]),
    "steps negative": (["--steps", "-4"], ["steps", "-4"]),
    "percentile over 100": (["--percentile", "101"], ["percentile", "(0, 100]", "101"]),
    "percentile NaN": (["--percentile", "nan"], ["percentile", "finite"]),
    "initial infinite": (["--initial", "inf"], ["initial", "finite"]),
    "no calibration images": (["--calibration-images", "0"], ["--calibration-images", "0"]),
    "too many calibration images": (["--calibration-images", "100000"], ["100000", "1347"]),
    "mean without std": (["--mean", "0.5"], ["--mean", "--std"]),
    "std without mean": (["--std", "0.5"], ["--mean", "--std"]),
    "std 0": (["--mean", "0.5", "--std", "0"], ["std"]),
    "std NaN": (["--mean", "0.5", "--std", "nan"], ["std"]),
    "mean NaN": (["--mean", "nan", "--std", "1"], ["mean"]),
    "std infinite": (["--mean", "0.5", "--std", "inf"], ["std"]),
    "too many means": (["--mean", "0.5", "0.5", "--std", "0.5", "0.5"], ["channel"]),
    "no values": (["--mean", "--std"], ["--std"]),
    "out is a folder": (["--out", "."], ["cannot write", "folder"]),
}


@pytest.mark.parametrize("case", CONVERT)
def test_convert_refuses_in_one_line(case: str, model: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extra, parts = CONVERT[case]
    data = [] if "--data" in extra else ["--data", "digits"]
    failed(run("convert", f"{model}:net", *data, *extra), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [("--steps", "four"), ("--steps", "2.5"), ("--ceiling", "low"), ("--percentile", "many")])
def test_a_value_of_the_wrong_kind_is_refused(option: str, value: str, model: Path, tmp_path: Path, run: Any) -> None:
    result = run("convert", f"{model}:net", "--data", "digits", "--out", tmp_path / "a", option, value)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert option in result.err
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


MODELS = {
    "unknown": ("digits-cn", ["did you mean 'digits_cnn'"]),
    "missing file": ("nowhere.py:net", ["nowhere.py", "no such Python file"]),
    "unknown factory": ("{model}:nett", ["did you mean 'net'"]),
    "other channels": ("{model}:colour", ["Sequential", "[1, 1, 8, 8]"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_wrong_model_is_refused(case: str, model: Path, tmp_path: Path, run: Any) -> None:
    name, parts = MODELS[case]
    failed(run("convert", name.format(model=model), "--data", "digits", "--out", tmp_path / "a"), *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_does_not_convert_is_refused_by_operator(model: Path, tmp_path: Path, run: Any) -> None:
    result = run("convert", f"{model}:refused", "--data", "digits", "--out", tmp_path / "a")
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    for part in ("quickspike: error: ", "Softmax", "--analog Softmax"):
        assert part in result.err
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_is_refused_before_the_work(
    model: Path, network: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("quickspike.data.load_data", lambda *args, **kwargs: pytest.fail("the work was begun"))
    path = tmp_path / "file" / "net.safetensors"
    failed(run("convert", f"{model}:net", "--data", "digits", "--out", path), str(path), "cannot write")
    for option in ("--out", "--plot"):
        failed(run("evaluate", network, "--data", "digits", option, path), str(path), "cannot write")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_unwritable_demo_folder_is_refused_before_the_work(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("quickspike.demo.train_digits", lambda *args, **kwargs: pytest.fail("the work was begun"))
    failed(run("demo", "--out", tmp_path / "file"), "cannot write")


EVALUATE = {
    "unknown data": (["--data", "digit"], ["did you mean 'digits'"]),
    "steps 0": (["--steps", "0"], ["steps", ">= 1"]),
    "no steps": (["--steps"], ["steps"]),
    "too many images": (["--images", "451"], ["451", "450"]),
    "no images": (["--images", "0"], ["0"]),
    "negative images": (["--images", "-5"], ["-5"]),
    "unknown reference": (["--reference", "digits-cnn"], ["did you mean 'digits_cnn'"]),
    "unknown device": (["--device", "abacus"], ["'abacus'"]),
    "unknown precision": (["--precision", "3-true"], ["'3-true'"]),
    "missing weights": (["--reference", "digits_cnn", "--weights", "nowhere.pt"], ["nowhere.pt"]),
    "reference for other images": (["--reference", "{model}:colour"], ["reference"]),
    "reference with other classes": (["--reference", "{model}:other_classes"], ["class"]),
    "weights without a reference": (["--weights", "nowhere.pt"], ["--reference"]),
}


@pytest.mark.parametrize("case", EVALUATE)
def test_evaluate_refuses_in_one_line(
    case: str, model: Path, network: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extra, parts = EVALUATE[case]
    data = [] if "--data" in extra else ["--data", "digits"]
    device = [] if "--device" in extra else ["--device", "cpu"]
    images = [] if "--images" in extra else ["--images", "10"]
    failed(run("evaluate", network, *data, *device, *images, *(part.format(model=model) for part in extra)), *parts)
    assert list(tmp_path.iterdir()) == []


def test_evaluate_refuses_what_is_no_network(model: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "text").write_text("hello")
    for path, part in (
        (tmp_path / "missing", "no such file"),
        (tmp_path / "text", "not a safetensors file"),
        (tmp_path, "folder"),
        (model, "pickle"),
    ):
        failed(run("evaluate", path, "--data", "digits"), str(path), part)


def test_evaluate_refuses_images_of_another_size(network: Path, tmp_path: Path, run: Any) -> None:
    import numpy as np

    for shape in ((3, 9, 11), (3, 8, 8, 3)):
        pixels, labels = np.zeros(shape, np.uint8), np.zeros(3, np.int64)
        np.savez(tmp_path / "a.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
        failed(run("evaluate", network, "--data", f"npz:{tmp_path / 'a.npz'}", "--device", "cpu"))


def test_statistics_of_a_strange_file_are_refused(network: Path, tmp_path: Path, run: Any) -> None:
    """Provenance is free-form: a file may hold anything under this key."""
    for strange in (3, "abc", [], {"mean": [0.5]}, {"mean": 1, "std": 1}, {"mean": ["a"], "std": ["b"]}, {"mean": [0.5], "std": [0]}):
        snn = qs.load(network)
        snn.provenance["preprocessing"] = strange
        snn.save(tmp_path / "a")
        result = run("evaluate", tmp_path / "a", "--data", "digits", "--images", 5, "--device", "cpu")
        assert "Traceback" not in result.err
        if result.code != 0:
            failed(result)


def test_an_interrupt_leaves_no_file(model: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for target in ("quickspike.data.ImageStream.feed", "pathlib.Path.write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(target, interrupt)
            result = run("convert", f"{model}:net", "--data", "digits", "--calibration-images", 20, "--out", tmp_path / "net.safetensors")
        assert result.code == 130
        assert result.out == ""
        assert "Traceback" not in result.err
        assert "interrupted" in result.err
        assert list(tmp_path.iterdir()) == []


def test_an_interrupt_keeps_the_file_of_an_earlier_run(
    model: Path, network: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = network.read_bytes()
    (tmp_path / "net.safetensors").write_bytes(old)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quickspike.data.ImageStream.feed", interrupt)
    assert run("convert", f"{model}:net", "--data", "digits", "--calibration-images", 20, "--out", tmp_path / "net.safetensors").code == 130
    assert (tmp_path / "net.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_mistake_of_ours_is_not_dressed_up_as_the_users(model: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("quickspike.data.ImageStream.feed", fail)
    with pytest.raises(ValueError, match="a bug"):
        run("convert", f"{model}:net", "--data", "digits", "--calibration-images", 20, "--out", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_too_little_memory_is_one_line(error: Exception, model: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("quickspike.data.ImageStream.feed", fail)
    arguments = ("convert", f"{model}:net", "--data", "digits", "--calibration-images", 20, "--out", tmp_path / "a")
    failed(run(*arguments), "out of memory", "--batch-size", code=1)
    assert list(tmp_path.iterdir()) == []


# Progress


class Terminal:
    """A stderr that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_progress_shows_on_a_terminal_only_and_never_on_stdout(network: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("evaluate", network, "--data", "digits", "--device", "cpu", "--json")
    silent = run(*arguments)
    assert silent.err == ""
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        shown = run(*arguments)
    assert "evaluating" in terminal.text
    assert "5/5" in terminal.text
    assert json.loads(shown.out)["accuracy"] == json.loads(silent.out)["accuracy"]


# In processes of their own


def process(*arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120, env=environment, **kwargs
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["evaluate", "--help"], ["inspect", "--help"]])
def test_help_is_quick_because_nothing_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom quickspike.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as leaving:\n    assert not leaving.code\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib', 'sklearn', 'lightning_fabric', 'timm'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    result = process("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_module_runs_as_a_program(network: Path, tmp_path: Path) -> None:
    result = process("-m", "quickspike", "evaluate", network, "--data", "digits", "--images", 10, "--device", "cpu", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["samples"] == 10
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_program_is_one_line_and_status_2(tmp_path: Path) -> None:
    result = process("-m", "quickspike", "evaluate", tmp_path / "missing", "--data", "digits")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"quickspike: error: .*missing: no such file\n", result.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_printed_is_one_line_and_status_1() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "quickspike", "methods"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    assert (result.returncode, result.stderr) == (1, "quickspike: error: [Errno 28] No space left on device\n")


def test_the_help_tells_the_exit_statuses(run: Any) -> None:
    shown = run("--help").out
    for status in ("0 done", "1 the machine", "2 something to put right", "130 Ctrl-C", "143 SIGTERM"):
        assert status in shown


def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    command = f"'{sys.executable}' -m quickspike methods --json | true"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
