"""Two machines with two processes each, played on one: the results of one process. A process that dies ends the run and is named."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import quickspike as qs
from quickspike.data import DataSet
from quickspike.errors import OptionError
from quickspike.models import load_model
from quickspike.processes import _Watch, how_it_ended, start

NET = '''
import os
import signal

import torch
from torch import nn


def net():
    """No batch norm, no dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


class Dying(nn.Module):
    """Ends the last process in its second pass, as DIE says."""

    def __init__(self):
        super().__init__()
        self.layers, self.calls = net(), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 2 and os.environ.get("LOCAL_RANK") == "1":
            if os.environ["DIE"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the disk is on fire")
        return self.layers(x)
'''

WORK = """
import json
import os
import sys

import torch

import quickspike as qs
from quickspike.cli import main
from quickspike.data import load_data
from quickspike.models import load_model
from quickspike.provenance import digest


def work(net, snn, *processes):
    data = ["--data", "digits", "--device", "cpu"]
    training = [*data, *processes, "--epochs", "2", "--batch-size", "64", "--json"]
    main(["train", net, *training, "--out", "source", "--learning-rate", "0.1"])
    main(["tune", snn, *training, "--out", "tuned", "--learning-rate", "0.001"])
    main(["evaluate", snn, *data, *processes, "--reference", net, "--steps", "1", "2", "--out", "report.json", "--json"])
    # Every process calibrates by itself, on all images.
    made = qs.convert(load_model(net), load_data("digits").loader("train", limit=200), steps=4)
    return digest(value for _, value in sorted(made.state_dict().items()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    calibrated = work(*sys.argv[1:])
    with open(f"rank{os.environ['RANK']}", "w") as file:
        json.dump({"calibrated": calibrated, "processes": torch.distributed.get_world_size()}, file)
"""
TORCHRUN = ("-m", "torch.distributed.run")


class Job:
    """A command in a session of its own, from a folder; nothing of it outlives the test."""

    def __init__(self, folder: Path, *arguments: Any, **more: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}
        self.log = folder / f"log{time.monotonic_ns()}"
        with self.log.open("w") as log:
            command = [sys.executable, *map(str, arguments)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)

    def end(self, timeout: float = 240) -> tuple[int, str]:
        """(exit status, what all its processes said) once every one of them has ended."""
        try:
            code = self.process.wait(timeout)
            for _ in range(300):
                if not self._lives():
                    return code, self.log.read_text()
                time.sleep(0.1)
            raise AssertionError("a process outlived the run by 30 seconds")
        finally:
            if self._lives():
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _lives(self) -> bool:
        """True if any of its processes does."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: DataSet) -> Path:
    """The scripts, and a spiking network."""
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "net.py").write_text(NET)
    (folder / "work.py").write_text(WORK)
    model = load_model(f"{folder}/net.py:net")
    qs.convert(model, digits.loader("train", limit=200), steps=2).save(folder / "snn")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """What one process makes."""
    (folder / "one").mkdir()
    before = Path.cwd()
    names: dict[str, Any] = {"__name__": "work"}
    try:
        os.chdir(folder / "one")
        exec((folder / "work.py").read_text(), names)
        (folder / "one" / "calibrated").write_text(names["work"](f"{folder}/net.py:net", f"{folder}/snn"))
    finally:
        os.chdir(before)
    return folder / "one"


@pytest.fixture(scope="module")
def four(folder: Path) -> Path:
    """What two machines with two processes each make: one torchrun for each, which meet at a port."""
    (folder / "four").mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ("--nnodes", 2, "--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "run")
    command = (*TORCHRUN, *meeting, folder / "work.py", folder / "net.py:net", folder / "snn", "--devices", 2, "--nodes", 2)
    machines = [Job(folder / "four", *command) for _ in range(2)]
    for machine in machines:
        code, said = machine.end()
        assert code == 0, said[-3000:]
    return folder / "four"


def moves(folder: Path, file: str, start_of: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far training moved every weight."""
    if file == "source":
        state = load_model(f"{folder.parent}/net.py:net", folder / "source" / "weights.safetensors").state_dict()
    else:
        state = qs.load(folder / "tuned" / "network.safetensors").state_dict()
    return torch.cat([(state[name] - value).flatten() for name, value in start_of.items() if name.endswith(("weight", "bias"))])


def test_four_processes_on_two_machines_train_as_one(one: Path, four: Path) -> None:
    begin = load_model(f"{one.parent}/net.py:net").state_dict()
    wanted, found = moves(one, "source", begin), moves(four, "source", begin)
    assert float(wanted.abs().max()) > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    losses = [(folder / "source" / "metrics.csv").read_text().splitlines()[1:] for folder in (one, four)]
    assert len(losses[0]) == len(losses[1]) == 2
    for row, expected in zip(*losses, strict=True):
        assert float(row.split(",")[2]) == pytest.approx(float(expected.split(",")[2]), rel=1e-4)


def test_four_processes_on_two_machines_tune_as_one(one: Path, four: Path) -> None:
    """Up to spikes whose currents lie at a threshold; on the whole both move alike."""
    begin = qs.load(one.parent / "snn").state_dict()
    wanted, found = moves(one, "tuned", begin), moves(four, "tuned", begin)
    assert float(wanted.abs().max()) > 1e-3
    assert float(torch.cosine_similarity(found, wanted, 0)) > 0.99


def test_four_processes_on_two_machines_count_every_image_once(one: Path, four: Path) -> None:
    """Each takes whole batches, so that what is counted is the same; distances are sums of real numbers."""
    wanted, found = (json.loads((folder / "report.json").read_text()) for folder in (one, four))
    assert (found["settings"]["processes"], wanted["settings"]["processes"]) == (4, 1)
    for name in ("samples", "accuracy", "agreement", "reference_accuracy", "rates"):
        assert found[name] == wanted[name], name
    assert found["deviation"] == pytest.approx(wanted["deviation"], rel=1e-12)
    # Rounded to single precision they could be the same by chance.
    shares = [value / 100 for value in found["deviation"].values()]
    assert any(abs(float(torch.tensor(share, dtype=torch.float32)) - share) > 1e-12 for share in shares)


def test_every_process_calibrates_alike(one: Path, four: Path) -> None:
    for rank in range(4):
        found = json.loads((four / f"rank{rank}").read_text())
        assert found == {"calibrated": (one / "calibrated").read_text(), "processes": 4}


# Processes that die


@pytest.mark.parametrize(
    ("die", "command", "launcher"),
    [("kill", "train", "own"), ("kill", "evaluate", "torchrun"), ("raise", "train", "own"), ("raise", "evaluate", "own")],
)
def test_a_process_that_dies_ends_the_run_and_is_named(die: str, command: str, launcher: str, folder: Path) -> None:
    arguments = {
        "train": ["train", "net.py:Dying", "--epochs", 2, "--batch-size", 64, "--out", f"died{die}"],
        "evaluate": ["evaluate", "snn", "--reference", "net.py:Dying", "--images", 450],
    }[command]
    started = () if launcher == "own" else (*TORCHRUN, "--standalone", "--nproc-per-node", 2)
    arguments += ["--data", "digits", "--device", "cpu", "--devices", 2]
    code, said = Job(folder, *started, "-m", "quickspike", *arguments, DIE=die).end()
    assert code != 0
    if die == "raise":
        assert "the disk is on fire" in said
    elif launcher == "own":
        assert "quickspike: process 2 of 2 was ended by signal 9 (SIGKILL); the system does so where memory runs out" in said
    else:
        assert "Signal 9 (SIGKILL)" in said


def test_what_libraries_print_while_processes_start_goes_to_stderr() -> None:
    """Below Python, as Gloo does; a stderr that is closed hinders nobody, and stdout is what it was afterwards, errors or not."""
    program = """
import contextlib, os, sys
from quickspike.processes import _stdout_kept
if sys.argv[1] == "closed":
    os.close(2)
print("before")
with contextlib.suppress(ValueError), _stdout_kept():
    os.write(1, b"gloo\\n")
    raise ValueError
print("after")
"""
    ran = {
        how: subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True) for how in ("open", "closed")
    }
    assert (ran["open"].stdout, ran["open"].stderr) == ("before\nafter\n", "gloo\n")
    assert sorted(ran["closed"].stdout.split()) == ["after", "before", "gloo"]


def test_an_end_that_comes_a_little_late_is_still_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Sockets of a killed process close before it can be waited for."""
    late = subprocess.Popen([sys.executable, "-c", "import os, time; time.sleep(0.5); os.kill(os.getpid(), 9)"])
    _Watch([late]).last_look()
    assert "process 2 of 2 was ended by signal 9 (SIGKILL)" in capsys.readouterr().err


def test_an_ending_in_words() -> None:
    assert how_it_ended(3) == "ended with exit status 3; what it said is above"
    assert how_it_ended(-15) == "was ended by signal 15 (SIGTERM)"
    assert how_it_ended(-99) == "was ended by signal 99 (no name)"


@pytest.mark.parametrize(("here", "everywhere", "advice"), [(2, 2, "--devices 2 --nodes 1"), (2, 8, "--devices 2 --nodes 4")])
def test_another_number_of_processes_than_torchrun_started_is_refused(
    here: int, everywhere: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would do all of the work, and write the same files."""
    for name, value in (("TORCHELASTIC_RUN_ID", "run"), ("LOCAL_WORLD_SIZE", here), ("WORLD_SIZE", everywhere)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(OptionError, match=f"torchrun started {everywhere} processes, {here} on this machine.*give {advice}"):
        start("cpu")
