"""Options of a method: declared once, read by validation, the command line, the docs and the report."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from quickspike.errors import OptionError, UnknownNameError

_KEY = "quickspike.option"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Option:
    """What is known of one option besides its type and default."""

    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    """True: `low` itself is not allowed."""

    @staticmethod
    def _number(value: float | None) -> str:
        return "" if value is None else str(int(value)) if float(value).is_integer() else f"{value:g}"

    def range_text(self) -> str:
        """The allowed interval in words, "" if any value goes."""
        if self.low is None and self.high is None:
            return ""
        if self.high is None:
            return f"{'>' if self.low_open else '>='} {self._number(self.low)}"
        if self.low is None:
            return f"<= {self._number(self.high)}"
        return f"{'(' if self.low_open else '['}{self._number(self.low)}, {self._number(self.high)}]"

    def describe(self) -> str:
        """Help, unit and range in one line, for `--help` and the docs."""
        unit = "" if not self.unit else f"unit: {self.unit}"
        interval = f"range: {self.range_text()}" if self.range_text() else ""
        notes = "; ".join(note for note in (unit, interval) if note)
        return f"{self.help} [{notes}]" if notes else self.help


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
) -> Any:
    """A dataclass field with its documentation and range.

    Choices come from a `Literal` annotation, so that the type checker knows them too.
    """
    return dataclasses.field(default=default, metadata={_KEY: Option(help, unit, low, high, low_open)})


def options_of(owner: Any) -> dict[str, tuple[Option, Any, Any]]:
    """Name -> (Option, resolved type, default) for a dataclass type or instance."""
    cls = owner if isinstance(owner, type) else type(owner)
    hints = typing.get_type_hints(cls)
    fields = (field for field in dataclasses.fields(cls) if _KEY in field.metadata)
    return {field.name: (field.metadata[_KEY], hints[field.name], field.default) for field in fields}


def validate(owner: Any) -> None:
    """Check every option of a dataclass instance.

    Raises:
        OptionError: a value has the wrong type, is not finite, or lies outside its range or choices.
    """
    for name, (declared, kind, _) in options_of(owner).items():
        value = getattr(owner, name)
        rule = _broken_rule(value, kind, declared)
        if rule:
            raise OptionError(f"{getattr(owner, 'name', type(owner).__name__)}: {name} must be {rule}, got {value!r}")


def check_names(owner: Any, names: Iterable[str]) -> None:
    """Raise OptionError if `owner` has no option of one of these names; the message offers the nearest."""
    known = options_of(owner)
    for name in names:
        if name not in known:
            raise OptionError(str(UnknownNameError(f"option of {owner.name}", name, known)))


def parsed(owner: Any, name: str, text: str) -> Any:
    """The value of an option that is written as text.

    Raises:
        OptionError: there is no such option, or the text is no value of its kind.
    """
    known = options_of(owner)
    if name not in known:
        raise OptionError(f"{getattr(owner, 'name', owner)} has no option {name!r}; options: {', '.join(known)}")
    kind = known[name][1]
    choices = {"true": True, "false": False} if kind is bool else {str(choice): choice for choice in typing.get_args(kind)}
    try:
        return choices[text] if choices else kind(text)
    except (KeyError, ValueError):
        expected = f"one of {', '.join(choices)}" if choices else "a whole number" if kind is int else "a number"
        raise OptionError(f"{getattr(owner, 'name', owner)}: {name} must be {expected}, got {text!r}") from None


def named(text: str, get: Callable[[str], T]) -> tuple[T, dict[str, Any]]:
    """(what `get` finds by the name, its options) from NAME or NAME:OPTION=VALUE,OPTION=VALUE.

    Raises:
        OptionError: it is written otherwise, there is no such option, or its value is of another kind.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    owner, options = get(name), dict[str, Any]()
    for part in rest.split(",") if colon else ():
        match = re.fullmatch(r"(\w+)=(.*)", part.strip())
        if match is None:
            raise OptionError(f"expected NAME:OPTION=VALUE,OPTION=VALUE, got {text!r}")
        options[match[1]] = parsed(owner, match[1], match[2])
    return owner, options


def is_finite(value: float) -> bool:
    """Whether a number is one in floating point, too: math.isfinite raises an error for whole numbers that are larger."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _broken_rule(value: Any, kind: Any, declared: Option) -> str:
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        # A bool equals 0 or 1, so membership alone would let True pass for the choice 1.
        known = any(type(value) is type(choice) and value == choice for choice in choices)
        return "" if known else f"one of {', '.join(map(repr, choices))}"
    if kind is bool:
        return "" if isinstance(value, bool) else "True or False"
    if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
        return "a whole number"
    if kind is float and (not isinstance(value, (int, float)) or isinstance(value, bool) or not is_finite(value)):
        return "a finite number"
    if kind in (int, float):
        low, high = declared.low, declared.high
        below = low is not None and (value <= low if declared.low_open else value < low)
        if below or (high is not None and value > high):
            return f"in range {declared.range_text()}" + (f" {declared.unit}" if declared.unit else "")
    return ""
