"""Stops commands at many moments and takes away what they need: what files are left, and does going on give the same?

    python tests/faults/campaign.py [--kills 50] [--seed 0] [--out FILE.json]

Every trial is a process of its own, forked from this one. It is killed (kill -9) at a random time, before a random
operation on its files, or by the kernel in the middle of a write, with or without files of an earlier run in the way. Then

- every file is whole and loads, but for those under temporary names;
- a result is the earlier one or the new one, and none that was there is gone;
- the same command again (with --resume where there is that) ends like one that nothing stopped.

The other faults end in one line, the exit status that `quickspike --help` tells, and no file changed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

# Threads would outnumber the cores, and a process that has some cannot be forked safely.
os.environ.update(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1", MKL_NUM_THREADS="1")

import injection
from injection import Ended, Operations, Setup

TERMINATED = 128 + signal.SIGTERM
LINUX = sys.platform == "linux"
"""Elsewhere neither is memory taken away nor output."""
PROGRESS = re.compile(r".*, epoch \d+: |.*, T = \d+: ")
Mend = Callable[[], list[str]]
"""Takes a fault away; what is wrong with what it leaves."""
Prepare = Callable[[Path, contextlib.ExitStack], Mend]
"""Brings a fault into the folder of a trial; the stack ends what has to end with it."""


@dataclass
class Trial:
    """One command that something happened to."""

    command: str
    fault: str
    moment: str = ""
    earlier: bool = False
    """Files of an earlier run lay in the way."""
    exit: int = 0
    message: str = ""
    """Last line on stderr."""
    files: list[str] = field(default_factory=list)
    """Whole files after it."""
    left: int = 0
    """Files under temporary names after it."""
    wrong: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "wrong" if self.wrong else "right"


@dataclass
class Known:
    """What a command does when nothing stops it."""

    contents: dict[str, Any]
    earlier: dict[str, Any]
    seconds: float
    operations: int
    sizes: list[int]


class Campaign:
    """Makes trials below a folder of its own.

    Args:
        folder: for everything.
        seed: of the moments.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.plant: tuple[Setup, ...] = ()
        """Called in every process from the fault on: breaks the program, to see that it is noticed."""
        self.known: dict[str, Known] = {}
        self.number = 0
        self._inputs()

    def _inputs(self) -> None:
        from commands import CPU, DATA, MODEL, OTHER, RECIPE

        place = self.folder / "inputs"
        place.mkdir(parents=True)
        (place / "recipe.toml").write_text(RECIPE)
        (place / "other.toml").write_text(OTHER)
        train = ["train", MODEL, *DATA, *CPU, "--batch-size", "128", "--epochs", "4", "--learning-rate", "0.1", "--out", "inputs"]
        convert = ["convert", MODEL, "--weights", "inputs/weights.safetensors", *DATA, *CPU, "--calibration-images", "100"]
        well(injection.run(train, self.folder))
        for name, steps in (("network", "2"), ("other", "3")):
            well(injection.run([*convert, "--steps", steps, "--out", f"inputs/{name}.safetensors"], self.folder))

    def place(self, earlier: Path | None = None) -> Path:
        """A folder for a trial, with inputs and the files of an earlier run."""
        self.number += 1
        folder = self.folder / f"trial{self.number}"
        shutil.copytree(self.folder / "inputs", folder / "inputs")
        if earlier is not None:
            shutil.copytree(earlier, folder / "out")
        return folder

    def know(self, command: Any) -> Known:
        """Run a command without faults, alone and over an earlier one, and look what it does."""
        if command.name not in self.known:
            from commands import contents, files

            before, after = self.folder / f"{command.name}, before", self.place()
            folder = self.place()
            well(injection.run(list(command.other), folder))
            shutil.copytree(folder / "out", before)
            count = Operations(after / "out")
            # The first time something is compiled for good.
            well(injection.run(list(command.arguments), folder))
            ended = well(injection.run(list(command.arguments), after, count))
            sizes = [path.stat().st_size for path in files(after / "out")]
            self.known[command.name] = Known(contents(after / "out"), contents(before), ended.seconds, count.count, sizes)
            shutil.rmtree(folder)
            shutil.rmtree(after)
        return self.known[command.name]

    # Stopped

    def stopped(self, command: Any, fault: str, earlier: bool) -> Trial:
        """Stop a command once, or twice, and go on."""
        known = self.know(command)
        folder = self.place(self.folder / f"{command.name}, before" if earlier else None)
        trial = Trial(command.name, fault, earlier=earlier)
        send = signal.SIGTERM if "SIGTERM" in fault else signal.SIGKILL
        for again in (False, True) if "twice" in fault else (False,):
            moment, setup, after = self._moment(fault, known, folder, send)
            trial.moment += f", then {moment}" if again else moment
            ended = injection.run(self._going_on(command, again), folder, *self.plant, *setup, after=after, send=send)
            self._note(trial, ended, folder)
            self._check_stopped(trial, ended, send)
            trial.wrong += judged(command, known, folder / "out", earlier)
        self._go_on(command, known, folder, trial)
        shutil.rmtree(folder)
        return trial

    def _moment(self, fault: str, known: Known, folder: Path, send: int) -> tuple[str, list[Setup], float | None]:
        if "at a time" in fault:
            after = self.random.uniform(0, known.seconds)
            return f"{after:.3f} s", [], after
        if "at an operation" in fault:
            at = self.random.randint(1, known.operations)
            return f"operation {at} of {known.operations}", [Operations(folder / "out", at, send)], None
        size = self.random.randrange(max(known.sizes))
        return f"byte {size}", [injection.killed_at_size(size)], None

    def _going_on(self, command: Any, again: bool) -> list[str]:
        return [*command.arguments, *(["--resume"] if again and command.resumes else [])]

    def _check_stopped(self, trial: Trial, ended: Ended, send: int) -> None:
        """A run that was over before its moment was not stopped, nor was one that refused to go on; that is no fault."""
        if ended.code == 0 or refused_to_go_on(trial, ended):
            return
        if send == signal.SIGKILL:
            expected = (-signal.SIGKILL, -signal.SIGXFSZ)
            trial.wrong += [] if ended.code in expected else [f"exit {ended.code}: {_end_of(ended.err)}"]
            return
        if ended.code != TERMINATED:
            trial.wrong.append(f"exit {ended.code} instead of {TERMINATED}: {_end_of(ended.err)}")
        if "Traceback" in ended.err or not trial.message.startswith("quickspike: "):
            trial.wrong.append(f"not one line: {_end_of(ended.err)}")
        if trial.left:
            trial.wrong.append("files under temporary names are left")

    def _note(self, trial: Trial, ended: Ended, folder: Path) -> None:
        from commands import files, is_left

        out = folder / "out"
        trial.exit, trial.message = ended.code, next(iter(ended.err.strip().splitlines()[-1:]), "")
        trial.files = [str(path.relative_to(out)) for path in files(out)]
        trial.left = sum(is_left(path.relative_to(out)) for path in out.rglob("*") if path.is_file())

    def _go_on(self, command: Any, known: Known, folder: Path, trial: Trial) -> None:
        from commands import Broken, contents

        ended = injection.run(self._going_on(command, True), folder, *self.plant)
        if refused_to_go_on(trial, ended):
            ended = injection.run(list(command.arguments), folder, *self.plant)
        if ended.code != 0:
            trial.wrong.append(f"going on: exit {ended.code}: {_end_of(ended.err)}")
            return
        try:
            found = contents(folder / "out")
        except Broken as error:
            trial.wrong.append(f"after going on: {error}")
            return
        wanted = {**(known.earlier if trial.earlier else {}), **known.contents}
        if set(found) - set(wanted) or set(known.contents) - set(found):
            trial.wrong.append(f"after going on there is {sorted(found)} instead of {sorted(wanted)}")
        trial.wrong += [f"after going on {name} is another" for name in known.contents if found.get(name) != known.contents[name]]

    # Other faults

    def refused(
        self,
        command: Any,
        fault: str,
        *setups: Setup,
        prepare: Prepare | None = None,
        arguments: Sequence[str] | None = None,
        code: int = 2,
        says: str = "",
    ) -> Trial:
        """Let something fail: one line, a status, no file of before changed; then, without the fault, the result."""
        known = self.know(command)
        folder = self.place(self.folder / f"{command.name}, before")
        trial = Trial(command.name, fault, earlier=True)
        with contextlib.ExitStack() as fault_free:
            mend = None if prepare is None else prepare(folder, fault_free)
            given = list(command.arguments if arguments is None else arguments)
            ended = injection.run(given, folder, *self.plant, *setups)
            trial.wrong += [] if mend is None else mend()
            self._note(trial, ended, folder)
            lines = [line for line in ended.err.splitlines() if not PROGRESS.match(line)]
            if ended.code != code:
                trial.wrong.append(f"exit {ended.code} instead of {code}: {_end_of(ended.err)}")
            elif len(lines) != 1 or not lines[0].startswith("quickspike: error: ") or says not in lines[0]:
                trial.wrong.append(f"not one line with {says!r}: {_end_of(ended.err)}")
            if trial.left:
                trial.wrong.append("files under temporary names are left")
            trial.wrong += judged(command, known, folder / "out", True)
            self._go_on(command, known, folder, trial)
        shutil.rmtree(folder)
        return trial

    def unharmed(self, command: Any, fault: str, *setups: Setup) -> Trial:
        """Let something happen that changes nothing."""
        known = self.know(command)
        folder = self.place()
        trial = Trial(command.name, fault)
        ended = injection.run(list(command.arguments), folder, *self.plant, *setups)
        self._note(trial, ended, folder)
        if ended.code != 0:
            trial.wrong.append(f"exit {ended.code}: {_end_of(ended.err)}")
        trial.wrong += judged(command, known, folder / "out", False)
        trial.wrong += [f"{name} is missing" for name in known.contents if name not in trial.files]
        shutil.rmtree(folder)
        return trial


def refused_to_go_on(trial: Trial, ended: Ended) -> bool:
    """Stopped before it had begun: what would be gone on with is the earlier run, with other settings, and still there."""
    return trial.earlier and ended.code == 2 and any(text in ended.err for text in ("was made with", "was made by another recipe"))


def _end_of(text: str) -> str:
    """What was said last, of a process that aborted what it said before the addresses; without folders of this machine."""
    text = re.sub(r"/[\w./+-]+/", "", text)
    return text.strip()[:600] if "terminate called" in text else text.strip()[-300:]


def well(ended: Ended) -> Ended:
    """A run that nothing happened to.

    Raises:
        RuntimeError: it failed all the same.
    """
    if ended.code != 0:
        raise RuntimeError(f"exit {ended.code} without a fault: {ended.err}")
    return ended


def judged(command: Any, known: Known, out: Path, earlier: bool) -> list[str]:
    """What is wrong with the files of a command that was stopped."""
    from commands import Broken, content, files

    wrong, found = [], {}
    for path in files(out) if out.exists() else []:
        try:
            found[str(path.relative_to(out))] = content(path)
        except Broken as error:
            wrong.append(f"not whole: {error}")
    before = known.earlier if earlier else {}
    for name, value in found.items():
        if Path(name).match("*.csv") or Path(name).match("*.ckpt") or name not in known.contents | before:
            continue
        progressing = name == "trials.json"
        if not progressing and value not in [known.contents.get(name), before.get(name)]:
            wrong.append(f"{name} is neither what it was nor what it should become")
    wrong += [
        f"{name} is neither known from before nor made when nothing stops it" for name in found if name not in known.contents | before
    ]
    return wrong + [
        f"{name} is gone" for name in before if name not in found and not any(Path(name).match(pattern) for pattern in command.removed)
    ]


# Faults in a folder


def full_disk(size: int) -> Prepare:
    """`out` lies on a disk of its own, which has so many bytes left."""

    def prepare(folder: Path, stack: contextlib.ExitStack) -> Mend:
        out, aside = folder / "out", folder / "aside"
        out.rename(aside)
        used = sum(-(-path.stat().st_size // 4096) * 4096 for path in aside.rglob("*") if path.is_file())
        if not stack.enter_context(injection.small_disk(out, str(used + size))):
            raise Unavailable("a file system cannot be mounted here")
        shutil.copytree(aside, out, dirs_exist_ok=True)
        shutil.rmtree(aside)

        def mend() -> list[str]:
            subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
            return []

        return mend

    return prepare


def read_only(folder: Path, stack: contextlib.ExitStack) -> Mend:
    """Nothing in `out` can be changed."""
    paths = [folder / "out", *(folder / "out").rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & ~0o222)

    def mend() -> list[str]:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
        return []

    return mend


def unreadable(name: str, how: str) -> Prepare:
    """An input is a folder, or half of itself, or not for this user."""

    def prepare(folder: Path, stack: contextlib.ExitStack) -> Mend:
        path, aside = folder / name, folder / "aside"
        data = path.read_bytes()
        path.rename(aside)
        if how == "a folder":
            path.mkdir()
        else:
            path.write_bytes(data[: len(data) // 2])
            path.chmod(0 if how == "forbidden" else 0o644)

        def mend() -> list[str]:
            if how == "a folder":
                path.rmdir()
                changed = False
            else:
                path.chmod(0o644)
                changed = path.read_bytes() != data[: len(data) // 2]
            aside.replace(path)
            return ["the input was changed"] * changed

        return mend

    return prepare


class Unavailable(Exception):
    """A fault that this machine does not let happen."""


# Plants: a broken program, to see that it is noticed


def _instead_of_write_bytes(write: Callable[..., None]) -> None:
    from quickspike import files

    original = files.write_bytes
    for module in list(sys.modules.values()):
        if getattr(module, "write_bytes", None) is original:
            mock.patch.object(module, "write_bytes", write).start()


def plain_write() -> None:
    """Files are written where they belong, piece by piece."""

    def write(path: str | Path, data: bytes) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)

    _instead_of_write_bytes(write)


def remove_first() -> None:
    """What was there is removed before there is something new."""
    from quickspike.files import write_bytes

    def write(path: str | Path, data: bytes) -> None:
        Path(path).unlink(missing_ok=True)
        write_bytes(path, data)

    _instead_of_write_bytes(write)


def forget_momentum() -> None:
    """A training goes on without what its optimiser had gathered."""
    import torch

    mock.patch.object(torch.optim.Optimizer, "load_state_dict", lambda self, state: None).start()


def no_handler() -> None:
    """SIGTERM ends the process at once."""
    from quickspike import cli

    mock.patch.object(cli, "_interrupts", lambda: contextlib.nullcontext([])).start()


def tracebacks() -> None:
    """A user's errors are shown as if they were mistakes of the program."""
    from quickspike import cli

    mock.patch.object(cli, "_told", lambda error: None).start()


PLANTS: dict[str, tuple[Setup, str, str]] = {
    "files written in place": (plain_write, "convert", "killed in a write"),
    "old files removed first": (remove_first, "convert", "killed at an operation"),
    "momentum forgotten": (forget_momentum, "tune", "killed at an operation"),
    "no handler of SIGTERM": (no_handler, "convert", "SIGTERM at an operation"),
    "tracebacks": (tracebacks, "convert", "output is read-only"),
}
"""What is broken, the command that shows it, and the fault that does."""


# Trials

Planned = tuple[str, Callable[[Campaign], Trial]]
"""What is shown while it runs, and a trial."""


def kills(number: int) -> Iterator[Planned]:
    """So many kills of every group of commands, and a tenth as many SIGTERMs."""
    from commands import commands

    groups: dict[str, list[Any]] = {}
    for command in commands():
        groups.setdefault(command.group, []).append(command)
    faults = ("killed at a time", "killed at an operation", "killed at a time", "killed in a write", "killed twice at a time")
    for group in groups.values():
        for index in range(number):
            around = index // len(group)
            yield stopped(group[index % len(group)], faults[around % len(faults)], bool(around // len(faults) % 2))
        for index in range(-(-number // 10)):
            yield stopped(group[index % len(group)], f"SIGTERM at {'an operation' if index % 2 else 'a time'}", True)


def stopped(command: Any, fault: str, earlier: bool) -> Planned:
    return f"{command.name}: {fault}", lambda campaign: campaign.stopped(command, fault, earlier)


def refused(command: Any, fault: str, *setups: Setup, **how: Any) -> Planned:
    return f"{command.name}: {fault}", lambda campaign: campaign.refused(command, fault, *setups, **how)


def others() -> Iterator[Planned]:
    """Every other fault, of every command that it can happen to."""
    from commands import CPU, DATA, commands

    for command in commands():
        yield full(command, 0.0)
        yield full(command, 0.5)
        yield refused(command, "a small disk is full", prepare=full_disk(4096), says="No space left on device")
        yield forbidden(command)
        for name in INPUTS.get(command.name, ()):
            for how in ("a folder", "cut off", "forbidden"):
                yield not_readable(command, name, how)
        for how, move in CLOCKS.items():
            yield moved(command, how, move)
    (convert,), (train, _) = commands("convert"), commands("train")
    yield from memory(convert, train, (8, 32, 64, 128, 256))
    evaluate = ["evaluate", "inputs/network.safetensors", *DATA, *CPU, "--images", "50", "--json"]
    if not LINUX:
        return
    says = "No space left on device"
    yield refused(convert, "output cannot be printed", injection.full_output, arguments=evaluate, code=1, says=says)


def full(command: Any, share: float) -> Planned:
    """No space for more than a share of the largest file."""
    fault = "the disk is full in the middle of a file" if share else "the disk is full"

    def trial(campaign: Campaign) -> Trial:
        limit = injection.full_at_size(int(share * max(campaign.know(command).sizes)))
        return campaign.refused(command, fault, limit, says="cannot write")

    return f"{command.name}: {fault}", trial


def forbidden(command: Any) -> Planned:
    return refused(command, "output is read-only", injection.without_privileges, prepare=read_only, says="cannot write")


def not_readable(command: Any, name: str, how: str) -> Planned:
    arguments = [*command.other, *(["--resume"] if command.resumes else [])] if name.startswith("out/") else None
    setups = (injection.without_privileges,) if how == "forbidden" else ()
    return refused(command, f"{name} is {how}", *setups, prepare=unreadable(name, how), arguments=arguments, says=Path(name).name)


def moved(command: Any, how: str, move: Callable[[float], float]) -> Planned:
    return f"{command.name}: {how}", lambda campaign: campaign.unharmed(command, how, injection.clock(move))


def memory(convert: Any, train: Any, spares: Sequence[int]) -> Iterator[Planned]:
    """A budget that nothing fits into, and none that was set."""
    from commands import CPU, DATA

    bounded = ["evaluate", "inputs/network.safetensors", *DATA, *CPU, "--memory", "1KiB", "--out", "out/report.json"]
    yield refused(convert, "a memory budget too small", arguments=bounded, says="more than the 1 KiB allowed")
    wide = ["train", "digits_cnn,width=512", *DATA, *CPU, "--batch-size", "1024", "--out", "out"]
    for spare in spares if LINUX else ():
        fault = f"{spare} MiB of memory left"
        yield refused(train, fault, injection.small_memory(spare << 20), arguments=wide, code=1, says="out of memory")


INPUTS = {
    "train": ("out/source.ckpt",),
    "train, two stages": ("inputs/weights.safetensors",),
    "tune": ("inputs/network.safetensors", "out/tune.ckpt"),
    "convert": ("inputs/weights.safetensors",),
    "search": ("inputs/weights.safetensors", "out/others.json"),
    "run": ("inputs/recipe.toml", "out/run/seed0/run.json"),
    "export, nir": ("inputs/network.safetensors",),
}
CLOCKS: dict[str, Callable[[float], float]] = {
    "the clock goes back an hour": lambda seconds: seconds - 3600.0 * (seconds > 0.2),
    "the clock goes on a day": lambda seconds: seconds + 86400.0 * (seconds > 0.2),
    "the clock runs backwards": lambda seconds: -seconds,
    "the clock stands still": lambda seconds: 0.0,
}


def planted(campaign: Campaign, tries: int) -> dict[str, list[Trial]]:
    """What is seen of a program that is broken: trials with each plant until one is wrong."""
    from commands import commands

    found: dict[str, list[Trial]] = {}
    for name, (plant, command, fault) in PLANTS.items():
        (chosen,) = commands(command)
        _, trial = forbidden(chosen) if "read-only" in fault else stopped(chosen, fault, True)
        campaign.plant, found[name] = (plant,), []
        while len(found[name]) < tries and not any(one.wrong for one in found[name]):
            found[name].append(trial(campaign))
    campaign.plant = ()
    return found


def short() -> Iterator[Planned]:
    """A few of everything, at moments that do not depend on time."""
    from commands import commands

    (train, _), (tune,), (convert,), (search,), (nir, *_) = map(commands, ("train", "tune", "convert", "search", "export"))
    for command in (train, tune, convert, search, nir):
        yield stopped(command, "killed at an operation", True)
    yield stopped(train, "killed in a write", True)
    yield stopped(nir, "killed in a write", True)
    yield stopped(tune, "SIGTERM at an operation", True)
    yield full(train, 0.5)
    yield full(nir, 0.5)
    yield forbidden(convert)
    yield not_readable(tune, "out/tune.ckpt", "forbidden")
    yield moved(train, *next(item for item in CLOCKS.items() if "still" in item[0]))
    yield from memory(convert, train, (64,))


def main() -> int:
    """Everything; exit status 1 if something was wrong, or a planted fault not seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of every group of commands")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="every trial, as JSON")
    parser.add_argument("--short", action="store_true", help="the few trials that the tests make")
    parser.add_argument("--only", default="", help="trials whose description holds this text")
    chosen = parser.parse_args()
    if chosen.out is not None:
        # Before the work: a folder that is not there is none to write to after it.
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as made:
        warm_up()
        campaign = Campaign(Path(made) / "trials", chosen.seed)
        trials, untried = tried(campaign, chosen)
        seen = {} if chosen.only else planted(campaign, 20)
    missed = [name for name, ones in seen.items() if not any(trial.wrong for trial in ones)]
    wrong = [trial for trial in trials if trial.wrong]
    if chosen.out is not None:
        chosen.out.write_text(_json(chosen, trials, untried, seen, time.monotonic() - started))
    sys.stdout.write(
        f"{len(trials)} trials: {len(trials) - len(wrong)} right, {len(wrong)} wrong, {len(untried)} not possible here; "
        f"{len(seen) - len(missed)} of {len(seen)} planted faults seen; {time.monotonic() - started:.0f} s, "
        f"{sum(os.times()[:4]):.0f} s of them on a processor\n"
    )
    return 1 if wrong or missed else 0


def warm_up() -> None:
    """Import once what every process would.

    The number of threads comes from the environment: one that is set makes a pool, which does not live through a fork.
    """
    for name in IMPORTS:
        importlib.import_module(name)
    importlib.import_module("quickspike.method").all_methods()
    # What is there for good need not be looked at, and so copied, in every process.
    gc.freeze()


IMPORTS = (
    *("commands", "kornia.augmentation", "lightning_fabric", "matplotlib.backends.backend_agg", "nir", "onnxscript", "sklearn.datasets"),
    *(
        "sklearn.model_selection",
        "sympy.tensor",
        "torch._dynamo",
        "torch._export",
        "torch._functorch.aot_autograd",
        "torch._inductor.config",
    ),
    *("torch.export", "torch.onnx._internal.exporter", "torchvision.transforms.v2", "torchvision.datasets", "typeguard", "tyro.extras"),
    *("numba.experimental", "numba.core.typing.templates", "numba.typed"),
    *("quickspike.cli_exporting", "quickspike.cli_searching", "quickspike.cli_training", "quickspike.engines", "quickspike.hub"),
    *("quickspike.loops", "quickspike.nir_export", "quickspike.nir_programs", "quickspike.onnx_export", "quickspike.page"),
    *("quickspike.program_export", "quickspike.recipe", "quickspike.searching", "huggingface_hub.repocard"),
)


def tried(campaign: Campaign, chosen: argparse.Namespace) -> tuple[list[Trial], list[str]]:
    """All trials, and those that this machine does not let happen."""
    plans = list(short() if chosen.short else itertools.chain(kills(chosen.kills), others()))
    plans = [plan for plan in plans if chosen.only in plan[0]]
    trials, untried = [], []
    for number, (what, trial) in enumerate(plans, 1):
        sys.stderr.write(f"\r\x1b[K{number}/{len(plans)} {what}" if sys.stderr.isatty() else "")
        try:
            trials.append(trial(campaign))
        except Unavailable as error:
            untried.append(f"{what}: {error}")
            continue
        if trials[-1].wrong:
            sys.stderr.write(f"\nwrong: {trials[-1]}\n")
    sys.stderr.write("\n" if sys.stderr.isatty() else "")
    return trials, untried


def _json(chosen: argparse.Namespace, trials: Sequence[Trial], untried: Sequence[str], seen: dict[str, list[Trial]], seconds: float) -> str:
    """One trial in a line."""
    from quickspike.provenance import commit, machine, versions

    def row(trial: Trial) -> str:
        return json.dumps({**asdict(trial), "verdict": trial.verdict})

    def rows(ones: Sequence[Trial]) -> str:
        return "[\n    " + ",\n    ".join(map(row, ones)) + "\n  ]"

    counts: dict[str, dict[str, int]] = {}
    for trial in trials:
        count = counts.setdefault(trial.fault, {"right": 0, "wrong": 0})
        count[trial.verdict] += 1
    about = {
        "command": f"python tests/faults/campaign.py --kills {chosen.kills} --seed {chosen.seed}" + " --short" * chosen.short,
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "seconds": round(seconds),
        "processor seconds": round(sum(os.times()[:4])),
        "counts": counts,
        "not possible here": list(untried),
    }
    plants = ",\n  ".join(f"{json.dumps(name)}: {rows(ones)}" for name, ones in seen.items())
    head = json.dumps(about, indent=2).rstrip("}\n")
    return f'{head},\n  "planted": {{{plants}}},\n  "trials": {rows(trials)}\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
