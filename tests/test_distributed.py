"""Two processes instead of one: the same network, every image counted once, and one hand that writes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quickspike as qs
from quickspike.cli import main
from quickspike.evaluation import make_fabric
from quickspike.models import load_model

WORK = '''
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import quickspike as qs
from quickspike.api import tune
from quickspike.augmentation import Augmentation
from quickspike.data import load_data
from quickspike.errors import QuickspikeError
from quickspike.evaluation import accuracy_of, evaluate, make_fabric
from quickspike.models import load_model
from quickspike.recipe import Place, Recipe, run_recipe
from quickspike.training import Interrupted, Silent, Trainer, Training


def net():
    """No batch norm, no dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


class Stopping(Silent):
    def __init__(self, batch):
        self.left = batch

    def advance(self, samples):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def work(fabric, out, snn):
    """Everything that is compared between one process and two, for this process."""
    data, found, tensors = load_data("digits"), {}, {}
    settings = Training(epochs=3, batch_size=64, learning_rate=0.1, validation=101, accumulate=2, clip=1.0, ema=0.5, keep="best")

    def train(network, folder=None, **changes):
        around = {name: changes.pop(name) for name in ("watcher", "resume", "augmentation", "tensorboard") if name in changes}
        trainer = Trainer(fabric=fabric, data=data, settings=dataclasses.replace(settings, **changes), folder=folder, **around)
        return trainer(network, "source")

    plain = net()
    rows = train(plain, out / "plain", tensorboard=True).rows
    tensors["plain"] = plain.state_dict()
    found["rows"] = [{key: value for key, value in row.items() if "second" not in key} for row in rows]

    if fabric.world_size > 1:
        # As on machines that share no folder.
        try:
            train(net(), out / ("plain" if fabric.global_rank == 0 else "elsewhere"), resume=True)
        except QuickspikeError as error:
            found["apart"] = str(error)

    normed = load_model("digits_cnn,width=8")
    train(normed, epochs=4, ema=0.0, accumulate=1, learning_rate=0.15)
    tensors["normed"] = normed.state_dict()
    found["accuracy"] = accuracy_of(normed, data.loader("test"), fabric)

    drawn = {"augmentation": Augmentation(noise=0.1), "epochs": 2, "batch_size": 200}
    whole, cut = (load_model("digits_cnn,width=4,dropout=0.2,head_dropout=0.2", seed=seed) for seed in (0, 0))
    train(whole, **drawn)
    try:
        train(cut, out / "cut", watcher=Stopping(9), **drawn)
    except Interrupted as stop:
        found["stop"] = str(stop)
    cut = load_model("digits_cnn,width=4,dropout=0.2,head_dropout=0.2", seed=5)
    train(cut, out / "cut", resume=True, **drawn)
    tensors["whole"], tensors["cut"] = whole.state_dict(), cut.state_dict()

    try:
        train(net(), batch_size=63)
    except QuickspikeError as error:
        found["odd"] = str(error)

    every = dataclasses.replace(settings, epochs=1, every_step=True, learning_rate=0.01)
    tensors["every step"] = tune(qs.load(snn), Trainer(fabric=fabric, data=data, settings=every)).state_dict()

    broken = net()

    def spoil():
        # In the last of the processes alone.
        if fabric.global_rank == 1:
            broken[3].weight[0, 0] = float("inf")

    try:
        trainer = Trainer(fabric=fabric, data=data, settings=dataclasses.replace(settings, accumulate=1))
        trainer(broken, "broken", after_step=spoil)
    except QuickspikeError as error:
        found["broken"] = str(error)

    for name, limit in (("report", None), ("one batch", 60)):
        report = evaluate(qs.load(snn), data.loader("test", limit=limit), normed, (1, 2), fabric=fabric)
        found[name] = {key: report.to_json()[key] for key in ("samples", "accuracy", "agreement", "reference_accuracy", "rates")}

    def spoiled():
        images = torch.rand(40, 1, 8, 8)
        for number in range(3):
            # The second batch is the second process's.
            yield images, torch.full((40,), 10 if number == 1 else 0)

    try:
        evaluate(qs.load(snn), spoiled(), fabric=fabric)
    except QuickspikeError as error:
        found["spoiled"] = str(error)

    class Unreadable(torch.utils.data.Dataset):
        def __len__(self):
            return 80

        def __getitem__(self, index):
            if index == 50:
                raise ValueError("picture 50 is broken")
            return torch.rand(1, 8, 8), 0

    try:
        accuracy_of(normed, torch.utils.data.DataLoader(Unreadable(), batch_size=40), fabric)
    except (QuickspikeError, ValueError) as error:
        found["unreadable"] = str(error)
    recipe = Recipe(
        title="small",
        data="digits",
        model="digits_cnn,width=4",
        method=qs.methods.QCFS(steps=2),
        calibration=100,
        steps=(2,),
        source=Training(epochs=3, batch_size=64, learning_rate=0.15),
        train=Training(epochs=1, batch_size=256, learning_rate=0.01),
        tune=Training(epochs=1, batch_size=256, learning_rate=0.0001),
    )
    found["recipe"] = run_recipe(recipe, Place(out=out / "runs" / "small", fabric=fabric))["runs"][0]["accuracy"]
    return found, tensors


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, snn = Path(sys.argv[1]), sys.argv[2]
    written, make = [], tempfile.mkstemp

    def noted(*args, **kwargs):
        written.append(kwargs.get("prefix", "?"))
        return make(*args, **kwargs)

    tempfile.mkstemp = noted
    fabric = make_fabric("cpu", devices=2, strategy="ddp")
    fabric.launch()
    found, tensors = work(fabric, out, snn)
    rank = fabric.global_rank
    # Files of its own, past the one that is watched.
    Path(out, f"rank{rank}.json").write_text(json.dumps({**found, "written": written, "processes": fabric.world_size}))
    torch.save(tensors, Path(out, f"rank{rank}.pt"))
'''


def in_its_own_processes(*command: Any, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command that starts others; none of them outlives it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}
    arguments = [sys.executable, *map(str, command)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "work.py").write_text(WORK)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path, digits: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process finds; it also makes the spiking network that is evaluated."""
    spec = importlib.util.spec_from_file_location("work_of_one_process", folder / "work.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    qs.convert(load_model("digits_cnn,width=4"), digits.loader("train", limit=100), "potential_init", steps=2).save(folder / "snn")
    return module.work(make_fabric("cpu"), folder / "one", folder / "snn")


@pytest.fixture(scope="module")
def two(folder: Path, one: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each of two processes finds that torchrun starts."""
    (folder / "two").mkdir()
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    result = in_its_own_processes(*torchrun, folder / "work.py", folder / "two", folder / "snn")
    assert result.returncode == 0, result.stderr[-3000:]
    names = [folder / "two" / f"rank{rank}" for rank in (0, 1)]
    return [(json.loads(Path(f"{name}.json").read_text()), torch.load(f"{name}.pt")) for name in names]


def test_two_processes_give_the_weights_of_one(one: Any, two: Any) -> None:
    for _, tensors in two:
        for name, expected in one[1]["plain"].items():
            torch.testing.assert_close(tensors["plain"][name], expected, rtol=1e-4, atol=1e-5)
    for found, _ in two:
        assert found["processes"] == 2
        for row, expected in zip(found["rows"], one[0]["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-4)


def test_two_processes_hold_the_same_network(two: Any) -> None:
    """Statistics of batch norm too, though each process saw other images."""
    (_, first), (_, second) = two
    for stage, tensors in first.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second[stage][name]), (stage, name)


def test_two_processes_learn_the_answers_of_every_step(one: Any, two: Any, folder: Path) -> None:
    """Where a current lies at a threshold, sums in another order change a spike; on the whole both move alike."""
    start = qs.load(folder / "snn").state_dict()
    moves = [
        torch.cat([(tensors["every step"][name] - value).flatten() for name, value in start.items() if name.endswith("weight")])
        for _, tensors in (one, *two)
    ]
    assert float(moves[0].abs().max()) > 1e-3
    for move in moves[1:]:
        assert float(torch.cosine_similarity(move, moves[0], 0)) > 0.9


def test_with_batch_norm_the_accuracy_is_as_good(one: Any, two: Any) -> None:
    for found, _ in two:
        assert found["accuracy"] == two[0][0]["accuracy"]
        assert abs(found["accuracy"] - one[0]["accuracy"]) < 8
        assert found["accuracy"] > 75


def test_an_interrupted_training_of_two_processes_goes_on(two: Any) -> None:
    for found, tensors in two:
        assert "source.ckpt" in found["stop"]
        for name, expected in tensors["whole"].items():
            assert torch.equal(tensors["cut"][name], expected), name


@pytest.mark.parametrize("name", ["report", "one batch"])
def test_an_evaluation_counts_every_image_once(name: str, one: Any, two: Any) -> None:
    """With one batch, one of the two processes has none."""
    assert one[0][name]["samples"] == {"report": 450, "one batch": 60}[name]
    for found, _ in two:
        for key in ("samples", "accuracy", "rates"):
            assert found[name][key] == one[0][name][key]
        # The reference was trained by the processes themselves; they agree on it.
        assert found[name] == two[0][0][name]
        assert set(found[name]["agreement"]) == {"1", "2"}


def test_a_recipe_gives_every_process_the_same_figures(one: Any, two: Any) -> None:
    assert two[0][0]["recipe"] == two[1][0]["recipe"]
    for stage in ("source", "ann"):
        assert abs(two[0][0]["recipe"][stage] - one[0]["recipe"][stage]) < 15


def test_the_figures_of_a_recipe_are_those_of_the_network_on_disk(two: Any, folder: Path, digits: Any) -> None:
    for name in ("converted", "tuned"):
        snn = qs.load(folder / "two" / "runs" / "small" / "seed0" / f"{name}.safetensors")
        report = qs.evaluate(snn, digits.loader("test"), None, (2,), device="cpu")
        assert two[0][0]["recipe"][name]["2"] == report.accuracy[2]


def test_one_process_alone_writes(one: Any, two: Any, folder: Path) -> None:
    (first, _), (second, _) = two
    assert second["written"] == []
    assert len(first["written"]) > 5
    files = [
        {path.relative_to(folder / name) for path in (folder / name).rglob("*") if path.is_file() and "tfevents" not in path.name}
        for name in ("one", "two")
    ]
    assert files[1] == files[0] | {Path(f"rank{rank}.{kind}") for rank in (0, 1) for kind in ("json", "pt")}
    assert len(list((folder / "two" / "plain").glob("*tfevents*"))) == 1


def test_processes_that_see_different_checkpoints_do_not_go_on(two: Any) -> None:
    for found, _ in two:
        assert "holds 3 epochs for some processes and 0 for others; give a folder that all machines share" in found["apart"]


def test_a_batch_that_does_not_divide_is_refused(one: Any, two: Any) -> None:
    assert "odd" not in one[0]
    for found, _ in two:
        assert "63" in found["odd"]


def test_a_loss_that_is_no_number_in_one_process_stops_all_with_its_diagnosis(one: Any, two: Any) -> None:
    """The others would wait for it until a timeout that tells nothing."""
    assert "broken" not in one[0]
    (first, _), (second, _) = two
    assert first["broken"] == second["broken"]
    for part in ("stage broken", "epoch 1, step 2", "the parameter 3.weight", "learning rate"):
        assert part in first["broken"]


def test_a_batch_that_is_refused_in_one_process_stops_all(one: Any, two: Any) -> None:
    (first, _), (second, _) = two
    assert first["spoiled"] == "another process could not do its part, and says why"
    assert second["spoiled"] == one[0]["spoiled"]
    assert "evaluation batch 2: labels" in second["spoiled"]
    assert (first["unreadable"], second["unreadable"]) == (first["spoiled"], "picture 50 is broken")


def test_processes_of_the_command_line_share_an_evaluation(folder: Path, tmp_path: Path) -> None:
    main(["convert", f"{folder}/work.py:net", "--data", "digits", "--steps", "2", "--out", str(tmp_path / "net.safetensors")])
    arguments = ["evaluate", tmp_path / "net.safetensors", "--data", "digits", "--reference", f"{folder}/work.py:net", "--device", "cpu"]
    two = in_its_own_processes("-m", "quickspike", *arguments, "--json", "--devices", 2)
    assert two.returncode == 0, two.stderr[-3000:]
    main([*map(str, arguments), "--out", str(tmp_path / "one.json")])
    one, found = json.loads((tmp_path / "one.json").read_text()), json.loads(two.stdout)
    assert (found["settings"]["processes"], one["settings"]["processes"]) == (2, 1)
    for name in ("samples", "accuracy", "agreement", "reference_accuracy", "rates"):
        assert found[name] == one[name], name
    assert found["deviation"] == pytest.approx(one["deviation"], rel=1e-5)


def test_the_command_line_starts_the_processes_itself(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning Fabric starts the second process when `--devices 2` asks for it."""
    arguments = ["train", f"{folder}/work.py:net", "--data", "digits", "--device", "cpu", "--epochs", "2", "--batch-size", "64", "--json"]
    two = in_its_own_processes("-m", "quickspike", *arguments, "--out", tmp_path / "two", "--devices", 2, "--strategy", "ddp")
    assert two.returncode == 0, two.stderr[-3000:]
    assert json.loads(two.stdout)["out"] == str(tmp_path / "two" / "weights.safetensors")
    # Each line once, by one of the two.
    assert two.stderr.count("source, epoch 1:") == two.stderr.count("source, epoch 2:") == 1
    assert "Traceback" not in two.stderr
    assert "Warning" not in two.stderr
    main([*arguments, "--out", str(tmp_path / "one")])
    capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["metrics.csv", "source.ckpt", "weights.safetensors"]
    networks = [load_model(f"{folder}/work.py:net", tmp_path / name / "weights.safetensors") for name in ("one", "two")]
    for parameter, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(other, parameter, rtol=1e-4, atol=1e-5)
