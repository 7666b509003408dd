"""The benchmarks: every script can be imported and says what it does, and what their figures are made of is right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import quickspike as qs

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py"))
LIBRARIES = ("peers", "timing")


@pytest.fixture(autouse=True)
def bench_is_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def script(name: str) -> Any:
    return importlib.import_module(name)


def run_main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself_and_shadows_no_standard_module(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name not in sys.stdlib_module_names
    module = script(name)
    if name in LIBRARIES:
        return
    with pytest.raises(SystemExit) as caught:
        run_main(module, monkeypatch, "--help")
    assert caught.value.code == 0
    # Folders of reports are for the caller to name; all else goes to a file of its own by default.
    shown = " ".join(capsys.readouterr().out.split())
    default = {"many_steps": "a report for each", "zoo": "--out"}.get(name, f"results/bench/{name}.json".replace("/", os.sep))
    assert default in shown.replace(f"{os.sep} ", os.sep)


# What scripts share


def grows() -> Any:
    """Memory that a call takes and gives back, on top of what its preparation took."""
    kept = bytearray(20 * 2**20)

    def run() -> None:
        kept[::4096] = bytes(len(kept[::4096]))
        block = bytearray(200 * 2**20)
        block[::4096] = b"1" * len(block[::4096])

    return run


def keeps() -> Any:
    """The first call keeps memory, each takes some."""
    kept: list[bytearray] = []

    def run() -> None:
        if not kept:
            kept.append(bytearray(200 * 2**20))
            kept[0][::4096] = b"1" * len(kept[0][::4096])
        block = bytearray(200 * 2**20)
        block[::4096] = b"1" * len(block[::4096])

    return run


def compiles() -> Any:
    """What a first call costs if no kernel lies on disk."""
    folder = Path(os.environ["NUMBA_CACHE_DIR"])

    def run() -> None:
        if not (folder / "kernel").exists():
            time.sleep(1.5)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "kernel").write_text("")

    return run


def test_memory_is_that_of_the_call() -> None:
    # A large parent, as the tests are after a while: what it has is not the child's.
    ballast = bytearray(600 * 2**20)
    ballast[::4096] = b"1" * len(ballast[::4096])
    cost = script("timing").in_own_process(grows)
    assert 190 * 2**20 < cost.grown < 260 * 2**20


def test_memory_of_a_later_call_is_without_what_stays_of_the_first() -> None:
    # The first call keeps 200 MiB, and a later one takes as much again for a while.
    cost = script("timing").in_own_process(keeps, earlier=1)
    assert 190 * 2**20 < cost.grown < 260 * 2**20


def test_short_calls_are_made_twice_in_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = script("timing")
    clock, calls = [0.0], {"short": 0, "long": 0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def run(name: str) -> None:
        calls[name] += 1
        # The first call of a turn finds strange caches; the very first turn has one call only.
        clock[0] += 2.0 if name == "long" else 0.1 if calls[name] % 2 else 0.4

    found = timing.interleaved({"long": lambda: run("long"), "short": lambda: run("short")}, 3)
    assert calls == {"long": 4, "short": 7}
    assert found["short"] == {"ratio": 0.05, "least": 0.05, "largest": 0.05, "runs": 3}


def test_a_first_call_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that this process or an earlier one has compiled must not be found in the cold run, and are in the warm one."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", "elsewhere")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    found = script("timing").first_calls(compiles)
    assert found["cold"] >= 1.5 > max(found["warm"], found["later"])
    assert os.environ["NUMBA_CACHE_DIR"] == "elsewhere"
    assert "TRITON_CACHE_DIR" not in os.environ


def test_times_are_ratios_of_the_first_one_and_the_first_call_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    timing, clock = script("timing"), [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    taken = {"short": iter([50.0, 1.0, 2.0, 9.0]), "long": iter([90.0, 8.0, 4.0, 6.0])}

    def call(name: str) -> None:
        clock[0] += next(taken[name])

    found = timing.interleaved({name: partial(call, name) for name in taken}, 3)
    assert found == {
        "short": {"ratio": 1.0, "least": 0.5, "largest": 4.5, "runs": 3},
        "long": {"ratio": 3.0, "least": 2.0, "largest": 4.0, "runs": 3},
    }


@pytest.mark.parametrize(("at_most", "runs"), [(0.0, 3), (45.0, 4), (1000.0, 9)])
def test_repetitions_end_when_the_time_is_over_but_for_the_fewest(at_most: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timing, clock = script("timing"), [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call() -> None:
        clock[0] += 10.0

    assert timing.interleaved({"one": call}, 9, at_most)["one"]["runs"] == runs


def test_a_reader_of_nir_is_compared(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nir", reason="needs the package nir")
    out = tmp_path / "nir.json"
    settings = ("--calibration-images", 20, "--images", 10, "--out", out)
    run_main(script("nir_agreement"), monkeypatch, *toy, *settings)
    found = json.loads(out.read_text())
    rows = {row["reader"]: row for row in found["rows"] if not row["program"]}
    assert set(rows) == {"nir", "sinabs", "spikingjelly", "snntorch", "norse"} - set(found["left_out"])
    assert all(row["images"] == 10 and row["spikes"] >= 0 and 0 <= row["agreement"] <= 100 for row in rows.values())
    assert {"nir", "sinabs"} <= set(rows)


def test_onnxruntime_is_held_against_us(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    out = tmp_path / "onnx.json"
    settings = ("--calibration-images", 20, "--images", 10, "--batch", 4, "--repetitions", 1, "--out", out)
    run_main(script("onnx_runtime"), monkeypatch, *toy, *settings)
    rows = {row["form"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"float32", "integers", "integers, the image in 10 bits"}
    assert all(row["images"] == 10 and row["same answers"] >= 9 for row in rows.values())
    assert rows["integers, the image in 10 bits"]["same answers"] == 10
    assert rows["integers, the image in 10 bits"]["beyond 1e-4"] == 0


def test_bytes_kept_for_the_backward_pass() -> None:
    net = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Sigmoid(), nn.Linear(100, 1, bias=False))
    x = torch.randn(64, 100)
    kept = script("tuning_step").kept_bytes(lambda: net(x).sum(), list(net.parameters()))
    # The input of the first layer and what the sigmoid gives, once each; weights are not counted.
    assert kept == 2 * x.numel() * 4


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mkldnn_convolution", "layers"),
        ("aten::addmm", "layers"),
        ("onednn::qlinear_pointwise", "layers"),
        ("quickspike::fire", "neurons"),
        ("aten::add", "other"),
        ("aten::copy_", "other"),
    ],
)
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert script("profiling").kind_of(operator) == kind


@pytest.mark.parametrize("engine", ["fused", "integer"])
def test_neurons_show_in_a_profile(engine: Any) -> None:
    profiling = script("profiling")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 3))
    images = torch.randn(8, 3, 16, 16)
    network = profiling.marked(qs.accelerate(qs.convert(net, images, steps=4), engine))
    with torch.inference_mode():
        found = profiling.times_of(partial(network, images), 1)
    assert set(found) == {"total", "layers", "neurons", "other"}
    assert min(found["neurons"], found["layers"]) > 0


# Scripts on a toy network


@pytest.fixture
def toy(tmp_path: Path) -> list[str]:
    """MODEL WEIGHTS DATA and the statistics, as scripts take them: three classes told apart by their brightest channel."""
    (tmp_path / "toy.py").write_text(
        "from torch import nn\n\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))\n"
    )
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 40), ("test", 20)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 100, (count, 8, 8, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 120
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(tmp_path / "toy.npz", **arrays)
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    torch.save(net.state_dict(), tmp_path / "toy.pt")
    return [f"{tmp_path}/toy.py:net", f"{tmp_path}/toy.pt", f"npz:{tmp_path}/toy.npz", "--mean", "0.5", "--std", "0.25"]


def test_one_calibration_gives_what_a_conversion_for_each_number_of_steps_gives(
    toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quickspike.data import load_data
    from quickspike.models import load_model
    from quickspike.preprocessing import Preprocessing

    many, out = script("many_steps"), tmp_path / "out"
    modes = ("streaming:0.9", "signed", "synchronous", "weighted")
    arguments = (*toy, "--steps", 2, 4, 8, "--calibration-images", 30, "--share", 4, "--modes", *modes, "--out", out)
    run_main(many, monkeypatch, *arguments)
    reports = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert set(reports) == {f"{mode}-{steps}" for mode in many.MODES for steps in (2, 4, 8)}
    assert reports["streaming-8"]["method"]["options"] | {"steps": 4, "scale": 0.9} == reports["streaming-8"]["method"]["options"]
    assert (reports["streaming-8"]["fitted_for"], reports["synchronous-8"]["fitted_for"]) == (4, 8)
    assert reports["synchronous-4"]["settings"]["engine"]["name"] == reports["weighted-4"]["settings"]["engine"]["name"] == "count"
    assert (reports["weighted-8"]["fitted_for"], reports["weighted-8"]["method"]["options"]["weighted"]) == (8, True)
    assert sum(report["reference_accuracy"] is not None for report in reports.values()) == 1
    data = load_data(toy[2], preprocessing=Preprocessing((0.5,), (0.25,)))
    model, images = load_model(toy[0], toy[1]), data.loader("train", limit=30)
    for steps, fitted in ((2, 2), (4, 4), (8, 4)):
        snn = qs.convert(model, images, steps=fitted, signed=True)
        expected = qs.evaluate(snn, data.loader("test"), model, (steps,), device="cpu")
        assert reports[f"signed-{steps}"]["accuracy"][str(steps)] == expected.accuracy[steps]
    # A second run finds everything there, one file less is made again.
    (out / "signed-2.json").unlink()
    before = (out / "streaming-2.json").stat().st_mtime_ns
    run_main(many, monkeypatch, *arguments)
    assert (out / "signed-2.json").exists()
    assert (out / "streaming-2.json").stat().st_mtime_ns == before


def test_choosing_looks_at_held_out_calibration_images_only(
    toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    many = script("many_steps")
    seen: list[int] = []
    original = many.calibrated
    monkeypatch.setattr(many, "calibrated", lambda *given: seen.append((found := original(*given))[1].first.shape[0]) or found)
    arrays = dict(np.load(tmp_path / "toy.npz"))
    # Without a look at them nothing can depend on them.
    np.savez(tmp_path / "toy.npz", **{**arrays, "test_images": arrays["test_images"] * 0})
    run_main(
        many, monkeypatch, *toy, "--steps", 64, "--modes", "signed", "--calibration-images", 40, "--held-out", 4, "--out", tmp_path / "o"
    )
    assert seen == [30]
    assert "calibrated on 30 images" in (shown := capsys.readouterr().out)
    assert float(shown.split("T = 64: ")[1].split()[0]) >= 80
    assert not (tmp_path / "o").exists()


def test_early_exit_saves_steps_for_a_loss(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "exit.json"
    settings = ("--steps", 8, "--calibration-images", 20, "--held-out", 20, "--losses", 0, 100, "--out", out)
    run_main(script("early_exit"), monkeypatch, *toy, *settings)
    whole, exact, careless = json.loads(out.read_text())["rows"]
    assert (whole["steps"], whole["loss"], careless["steps"]) == (8, None, 1)
    assert 1 <= exact["steps"] <= 8
    assert all(row["seconds"] > 0 and 0 <= row["accuracy"] <= 100 for row in (whole, exact, careless))


def test_start_up_times_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "startup.json"
    run_main(script("startup"), monkeypatch, "--repetitions", 1, "--only", "python", "quickspike --version", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert 0 < rows["python"]["seconds"] < rows["quickspike --version"]["seconds"]


# The zoo


def zoo_row(name: str, status: str = "converted", source: str = "torchvision", **more: Any) -> dict[str, Any]:
    made = {"source": source, "name": name, "status": status, "analog": [], "approximated": 0.0, "sites": 3, "error_16": 0.25}
    return (
        made | {"error_256": 0.0625, "convert_seconds": 1.5, "run_16_seconds": 2.5, "run_256_seconds": 30.5, "peak_mebibytes": 777} | more
    )


def test_hours_are_images_over_rates() -> None:
    sizing = script("sizing")
    costs = {
        "forward pass": {"seconds": 0.1, "multiplications": 4.0},
        "spiking forward pass": {"seconds": 0.5, "multiplications": 16.0},
        "training step": {"seconds": 0.3, "multiplications": 12.0},
        "fine-tuning step": {"seconds": 0.6, "multiplications": 48.0},
    }
    evaluation, tuning, source = sizing.hours(costs, 1000.0, 6000.0, 2, 90)
    # Five forward passes, each a third of a step; by time, as that is more than the count.
    assert evaluation["computed_hours"]["1"] == pytest.approx(50_000 * 5 / 3 / 1000 / 3600)
    assert evaluation["thread_hours"] == pytest.approx(50_000 * 0.5 / 3600)
    # Four training steps: by count.
    assert tuning["computed_hours"]["8"] == pytest.approx(2 * 1_281_167 * 4 / 6000 / 3600)
    assert tuning["thread_hours"] == pytest.approx(2 * 1_281_167 * 0.6 / 3600)
    assert source["computed_hours"]["64"] == pytest.approx(90 * 1_281_167 / 48_000 / 3600)


def test_multiplications_are_counted() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1)
    assert script("sizing").multiplications(lambda: layer(torch.zeros(2, 3, 10, 10))) == pytest.approx(2 * 8 * 27 * 100 / 1e9)


def test_a_row_of_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = script("zoo")
    monkeypatch.setattr(zoo, "LONG", 32)
    monkeypatch.setattr(zoo, "IMAGES", 2)
    told: list[dict[str, Any]] = []
    row = {"source": "torchvision", "name": "squeezenet1_1"}
    zoo.fill_row(row, lambda row: told.append(dict(row)))
    assert (row["status"], row["analog"], row["approximated"], row["pixels"], row["sites"]) == ("converted", [], 0.0, 64, 26)
    assert 0 <= row["error_32"] < 1
    assert row["peak_mebibytes"] > 100
    assert all(row[key] >= 0 for key in ("convert_seconds", "run_16_seconds", "run_32_seconds", "error_16"))
    # What is known is told as it comes, so that a network that is cut off keeps it.
    wanted = {"sites", "error_16", "error_32"}
    assert [set(told[index]) & wanted for index in (0, 1, -1)] == [{"sites"}, {"sites", "error_16"}, wanted]


class Normed(nn.Module):
    """Nothing but a layer norm is in the way, and the sigmoid is approximated only where something is kept analog."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(torch.sigmoid(self.norm(torch.relu(self.first(x.flatten(1))))))
        return result


def test_the_error_of_straight_lines_is_that_of_what_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = script("zoo")
    torch.manual_seed(0)
    monkeypatch.setattr(zoo, "LONG", 32)
    monkeypatch.setattr(zoo, "built", lambda source, name: (Normed().eval(), torch.randn(4, 3, 2, 2)))
    row = {"source": "timm", "name": "normed"}
    zoo.fill_row(row)
    assert (row["status"], row["analog"]) == ("kept analog", ["LayerNorm"])
    net = Normed().eval()
    expected = max(finding.error for finding in qs.inspect(net, torch.randn(1, 3, 2, 2), ("LayerNorm",)).findings)
    assert expected > 0
    assert row["approximated"] == pytest.approx(expected, rel=0.5)


def test_what_failed_or_was_cut_off_is_done_again() -> None:
    zoo = script("zoo")
    assert zoo.is_done(zoo_row("a"), 240)
    assert zoo.is_done(zoo_row("a", "refused"), 240)
    assert not zoo.is_done(zoo_row("a", "failed"), 240)
    assert zoo.is_done(zoo_row("a", cut_off_after=240), 240)
    assert not zoo.is_done(zoo_row("a", cut_off_after=240), 241)


def test_a_slow_network_is_no_failed_one() -> None:
    zoo = script("zoo")
    row = zoo.in_own_process("torchvision", "squeezenet1_1", 0.01)
    assert (row["status"], row["cut_off_after"]) == ("too slow", 0.01)
    assert {"commit", "versions", "machine", "steps", "seed"} <= set(row)


def test_old_rows_keep_their_own_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, out = script("zoo"), tmp_path / "zoo.json"
    old = [zoo_row("resnet18", commit="old"), zoo_row("vgg11", "failed", commit="old"), zoo_row("alexnet", commit="old")]
    out.write_text(json.dumps({"rows": old}))
    asked: list[str] = []

    def row(source: str, name: str, limit: float, memory: int) -> dict[str, Any]:
        asked.append(name)
        assert memory == 3
        return zoo_row(name, commit="new")

    monkeypatch.setattr(zoo, "in_own_process", row)
    only = ("resnet18", "vgg11", "alexnet", "squeezenet1_0")
    run_main(zoo, monkeypatch, "--source", "torchvision", "--memory", 3, "--only", *only, "--out", out, "--page", tmp_path / "zoo.md")
    assert asked == ["squeezenet1_0", "vgg11"]  # from small to large
    rows = {row["name"]: row["commit"] for row in json.loads(out.read_text())["rows"]}
    assert rows == {"resnet18": "old", "alexnet": "old", "squeezenet1_0": "new", "vgg11": "new"}
    assert "| torchvision vgg11 | converted | 3 | exact | 0.25 | 0.0625 | 1.5 | 2.5 | 30.5 | 777 |" in (tmp_path / "zoo.md").read_text()


def test_the_page_says_whether_the_zoos_pass() -> None:
    zoo = script("zoo")
    torchvision = [zoo_row(name) for name in zoo.names_of("torchvision")]
    timm = [zoo_row(name, "converted" if index < 45 else "refused", "timm") for index, name in enumerate(zoo.TIMM)]
    assert (len(torchvision), len(timm)) == (80, 60)
    found = zoo.checks([*torchvision, *timm])
    assert all(passed for _, passed, _ in found)
    assert found[-1][2] == "45 of 60, 0 more with parts kept analog"
    families = {name for pattern in zoo.FAMILIES.values() for name in zoo.fnmatch.filter(zoo.names_of("torchvision"), pattern)}
    assert "vit_b_16" not in families
    assert {"vgg11_bn", "regnet_y_128gf", "mobilenet_v3_large", "efficientnet_v2_l", "wide_resnet50_2"} <= families
    torchvision[zoo_at(torchvision, "vgg13")]["status"] = "failed"
    timm[0]["status"] = "kept analog"
    page = zoo.page([*torchvision, *timm])
    assert "| torchvision: every VGG converts | FAIL | 7 of 8, not vgg13 |" in page
    assert "| timm: at least 45 of 60 convert | FAIL | 44 of 60, 1 more with parts kept analog |" in page
    assert "| torchvision: every ResNet converts | pass | 5 of 5 |" in page


def zoo_at(rows: list[dict[str, Any]], name: str) -> int:
    return next(index for index, row in enumerate(rows) if row["name"] == name)


def test_the_recipe_of_the_imagenet_sample_runs(tmp_path: Path) -> None:
    """The whole of it, on networks that stand in for the real ones."""
    networks = "from torch import nn\n"
    for name in ("squeezenet_v10_imagenet", "mobilenet_v1_075_imagenet"):
        layers = "nn.Conv2d(3, 4, 3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)"
        networks += f"def {name}():\n    return nn.Sequential({layers})\n"
    (tmp_path / "networks.py").write_text(networks)
    for name in ("a", "b"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    pictures = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(6) % 5
    arrays = {"train_images": pictures, "train_labels": labels, "test_images": pictures, "test_labels": labels}
    np.savez(tmp_path / "sample.npz", **arrays)
    files = [tmp_path / name for name in ("networks.py", "a.pt", "b.pt", "sample.npz", "out")]
    more = {"STEPS": "8", "CALIBRATION": "6", "IMAGES": "4", "PYTHON": sys.executable}
    subprocess.run([str(ROOT / "recipes/imagenet_sample.sh"), *map(str, files)], check=True, env=os.environ | more, cwd=ROOT)
    for network in ("squeezenet", "mobilenet"):
        assert (tmp_path / "out" / network / "table.md").read_text().startswith("| method | T = 8 |")
        report = json.loads((tmp_path / "out" / network / "signed-8.json").read_text())
        assert (report["samples"], report["method"]["options"]["signed"]) == (4, True)
        assert report["provenance"]["calibration_images"] == 6
        assert report["settings"]["engine"]["name"] == "fused"
