"""Whole files or none."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from quickspike.files import ABANDONED, OutputError, write_bytes, write_text


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".part"))


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / "a.json.is_mine.part").write_text("mine")
    (tmp_path / ".b.json.abandone.part").write_text("of another file")
    (tmp_path / ".a.json.0beinguz.part").write_text("half")
    (tmp_path / ".a.json.0abandon.part").write_text("half")
    (tmp_path / ".a.json.1abandon.part").mkdir()
    (tmp_path / ".a.json.1abandon.part" / "inside").write_text("half")
    for name in (".b.json.abandone.part", ".a.json.0abandon.part", ".a.json.1abandon.part"):
        os.utime(tmp_path / name, (0, time.time() - ABANDONED - 60))
    write_text(tmp_path / "a.json", "{}")
    assert parts(tmp_path) == [".a.json.0beinguz.part", ".b.json.abandone.part", "a.json.is_mine.part"]


def test_names_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / ".abc.0abandon.part").write_text("of another file")
    os.utime(tmp_path / ".abc.0abandon.part", (0, 0))
    write_text(tmp_path / "a[b]c", "text")
    write_text(tmp_path / "a*", "text")
    assert parts(tmp_path) == [".abc.0abandon.part"]


def test_a_clock_that_went_back_makes_nothing_old(tmp_path: Path) -> None:
    (tmp_path / ".a.0beinguz.part").write_text("half")
    os.utime(tmp_path / ".a.0beinguz.part", (0, time.time() + 1e6))
    write_text(tmp_path / "a", "text")
    assert parts(tmp_path) == [".a.0beinguz.part"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_bytes(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]
