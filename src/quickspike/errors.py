"""Every error a user can cause: a ValueError that says what broke, where, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuickspikeError(ValueError):
    """A rule of quickspike was broken by its input; the command line turns it into one line and exit status 2."""


class OptionError(QuickspikeError):
    """An option has a value outside its declared type or range."""


class TraceError(QuickspikeError):
    """The forward pass of the source network could not be captured as a graph."""


class UnsupportedOperatorError(TraceError):
    """The source network holds operators that have no exact spiking form here; the message names each with its line."""


class ConversionError(QuickspikeError):
    """A traced network cannot become a spiking one (no activation to convert, a site of unknown kind, ...)."""


class DataError(QuickspikeError):
    """Images or labels are unusable: empty, NaN, wrong shape, labels out of range, missing files."""


class CheckpointError(QuickspikeError):
    """A file is not a whole, unaltered quickspike network of a version this program reads."""


class UnknownNameError(QuickspikeError):
    """A method, model or data set of that name does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")
