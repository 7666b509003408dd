"""What calls of the command line give, for tests of its commands; the fixture `run` makes them."""

from __future__ import annotations


class Result:
    """Exit status and output of one call."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def failed(result: Result, *parts: str, code: int = 2) -> None:
    """A user's error: its status, one line on stderr, nothing on stdout."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert result.err.startswith("quickspike: error: ")
    assert result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err
