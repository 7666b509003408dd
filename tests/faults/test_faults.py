"""The short form of the campaign: a few kills at operations on files and in the middle of writes, and a few other faults.

Everything runs in processes that one process of its own forks, so that no thread of another test is in the way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, CAMPAIGN, "--short", "--out", out]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert out.exists(), ended.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_what_is_stopped_leaves_whole_files_and_goes_on(found: dict[str, Any]) -> None:
    stopped = [trial for trial in found["trials"] if trial["fault"].startswith(("killed", "SIGTERM"))]
    assert {trial["command"] for trial in stopped} == {"train", "tune", "convert", "search", "export, nir"}
    assert {trial["exit"] for trial in stopped} >= {-9, 143}
    assert [trial for trial in stopped if trial["wrong"]] == []


def test_what_fails_says_so_in_a_line_and_changes_nothing(found: dict[str, Any]) -> None:
    failed = [trial for trial in found["trials"] if not trial["fault"].startswith(("killed", "SIGTERM"))]
    assert {trial["exit"] for trial in failed} >= {0, 2}
    assert [trial for trial in failed if trial["wrong"]] == []


def test_a_broken_program_is_noticed(found: dict[str, Any]) -> None:
    assert found["planted"].keys() >= {"files written in place", "old files removed first", "momentum forgotten"}
    assert [name for name, trials in found["planted"].items() if not trials[-1]["wrong"]] == []


def test_no_path_of_this_machine_shows(found: dict[str, Any]) -> None:
    shown = json.dumps(found)
    assert all(str(path) not in shown for path in (CAMPAIGN.parents[2], Path.home(), Path(tempfile.gettempdir())))
