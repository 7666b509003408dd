"""Bad input in its short form: spoiled files and recipes, wrong images, and that the watch over them is awake. Long form: `make fuzz`."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fuzz
import mutations
import trials
import wrong_data
from quickspike.errors import CheckpointError
from trials import Outcome, Trial, run
from wrong_data import MISTAKES, Mistake

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

EXAMPLES = int(os.environ.get("QUICKSPIKE_FUZZ", "6"))
"""Of some twenty trials each."""
# Slow to make; the long form has them.
KINDS = [(form, kind) for form, (_, kinds, _) in fuzz.FORMATS.items() if form not in ("training", "onnx") for kind in kinds]
spoiled = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**32 - 1)), min_size=15, max_size=25)


@pytest.fixture(scope="module")
def warm() -> Iterator[None]:
    fuzz.warm_up(("networks", "nir", "weights", "recipes", "archives"))
    yield


# Every fault stands for itself already, so there is nothing to shrink.
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(spoiled)
def test_spoiled_input_is_read_as_what_it_is_or_refused_by_name(warm: None, drawn: list[tuple[tuple[str, str], int]]) -> None:
    outcomes = run([fuzz.trial(form, kind, seed) for (form, kind), seed in drawn])
    assert [outcome for outcome in outcomes if outcome.fault] == []


def test_what_is_not_spoiled_is_read(warm: None) -> None:
    """Else refusals would mean nothing."""
    forms = ("networks", "nir", "weights", "recipes", "archives")
    outcomes = run([fuzz.trial(form, "unspoiled", seed, command) for form in forms for command in (False, True) for seed in range(2)])
    assert {outcome.what for outcome in outcomes} == {
        "the same network",
        "weights",
        "a recipe",
        "images",
        "exit status 0",
        *_other_recipes(outcomes),
    }


def _other_recipes(outcomes: list[Outcome]) -> set[str]:
    return {"a recipe for other images"} & {outcome.what for outcome in outcomes}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: f"{one.way.__name__}-{one.kind}")
def test_wrong_images_are_refused_or_warned_about(mistake: Mistake, tmp_path: Path) -> None:
    (outcome,) = run([Trial(mistake.kind, lambda path: wrong_data.judged(mistake), names_file=False)])
    assert not outcome.fault, outcome
    assert (outcome.what == "warned") == (mistake.expected == "warned")


@pytest.mark.parametrize(
    "given", [wrong_data.images(), wrong_data.images() * 1.3, wrong_data.images()[:20] + 0.2], ids=["same", "contrast", "few"]
)
def test_right_images_raise_no_warning(given: torch.Tensor) -> None:
    with trials.warned() as texts:
        wrong_data.calibrate(given)
        wrong_data.evaluate([(given, wrong_data.labels()[: len(given)])])
        wrong_data.limited((wrong_data.pixels().permute(0, 2, 3, 1).numpy(), wrong_data.labels().numpy()))
    assert texts == []


# What the watch must see


def forgets_a_key(path: Path) -> str:
    table: dict[str, str] = {}
    return table["missing"]


def opens_a_pickle(path: Path) -> str:
    return str(torch.load(path, weights_only=False))


def opens_a_harmless_pickle(path: Path) -> str:
    return str(pickle.loads(pickle.dumps(Path())))


def starts_a_program(path: Path) -> str:
    return subprocess.run(["true"], check=True).args


def runs_code(path: Path) -> str:
    return str(eval(trials.TOUCH))


def takes_memory(path: Path) -> str:
    return str(len(bytes(b"x" * 200 * 2**20)))


def hides_that_it_asked_for_memory(path: Path) -> str:
    try:
        return str(torch.ones(2**40))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not a network") from error


def hides_a_lack_of_memory(path: Path) -> str:
    try:
        return str(len(bytearray(2**40)))
    except MemoryError:
        raise CheckpointError(f"{path}: not a network") from None


def recurses(path: Path) -> str:
    return recurses(path)


def says_not_where(path: Path) -> str:
    raise CheckpointError("not a network")


def dies(path: Path) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def hangs(path: Path) -> str:
    while True:
        pass


def leaves(path: Path) -> str:
    raise SystemExit(0)


SEEN: dict[Callable[[Path], str], str] = {
    forgets_a_key: "KeyError",
    opens_a_pickle: "ran code",
    opens_a_harmless_pickle: "ran code",
    starts_a_program: "ran code",
    runs_code: "left files",
    takes_memory: "took memory",
    hides_that_it_asked_for_memory: "asked for memory",
    hides_a_lack_of_memory: "asked for memory",
    recurses: "RecursionError",
    says_not_where: "error without the file",
    dies: "died",
    hangs: "hung",
    leaves: "SystemExit",
}


def test_the_watch_sees_what_must_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "SECONDS", 2.0)
    fine = Trial("fine", lambda path: "read")
    data = mutations._saved({"x": mutations.Bomb()})
    outcomes = run([fine, *(Trial("planted", read, data) for read in SEEN), fine])
    assert [outcome.what for outcome in outcomes] == ["read", *SEEN.values(), "read"]
    assert [outcome.fault for outcome in outcomes] == [False, *[True] * len(SEEN), False]


def test_the_watch_sees_a_trial_that_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "PATIENCE", 0.5)
    (outcome,) = run([Trial("planted", lambda path: str(time.sleep(1000)))])
    assert (outcome.what, outcome.fault) == ("hung", True)


def test_an_error_of_the_package_that_names_the_file_is_no_fault() -> None:
    def refuses(path: Path) -> str:
        raise CheckpointError(f"{path}: not a network")

    (outcome,) = run([Trial("refused", refuses)])
    assert (outcome.what, outcome.fault) == ("CheckpointError", False)


@pytest.mark.parametrize(
    ("arguments", "what"), [(("evaluate", "nothing.safetensors", "--data", "digits"), "QuickspikeError"), (("methods",), "exit status 0")]
)
def test_the_command_line_is_judged_too(arguments: tuple[Any, ...], what: str) -> None:
    (outcome,) = run([Trial("command", lambda path: trials.by_command(*arguments), names_file=False)])
    assert (outcome.what, outcome.fault) == (what, False)


def test_a_command_with_a_traceback_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: list[str]) -> None:
        raise KeyError("missing")

    monkeypatch.setattr(trials, "main", fails)
    (outcome,) = run([Trial("command", lambda path: trials.by_command("run", path), names_file=False)])
    assert (outcome.what, outcome.fault) == ("KeyError", True)
