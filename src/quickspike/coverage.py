"""What of a network converts, what stays analog, what is refused and why: the answer of `inspect`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal

from quickspike.errors import UnsupportedOperatorError

Status = Literal["neuron", "synapse", "analog", "folded", "removed", "unsupported"]

MEANING: dict[Status, str] = {
    "neuron": "activation that becomes a spiking neuron",
    "synapse": "computed on spikes, at every time step",
    "analog": "computed on real values, once per input (it precedes the first neuron)",
    "folded": "merged into a neighbour",
    "removed": "does nothing in inference",
    "unsupported": "refused",
}


SHOWN = 8
"""Kinds of refused operators that a message names in full; `findings` holds every call."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One operator of the source network and what becomes of it."""

    name: str
    """Qualified name of the call, for example `layer1.0.relu_2`."""
    operator: str
    """Its type or function, for example `Conv2d`."""
    status: Status
    reason: str = ""
    way_out: str = ""
    source: str = ""
    """File, line and text in the network's own code."""
    error: float = 0.0
    """Largest error of the straight lines that stand for an activation."""

    def sentence(self) -> str:
        """One line that says what, where, why and what to do."""
        where = f" at {self.source}" if self.source else ""
        return f"{self.operator} ({self.name}){where}: {self.reason}. Way out: {self.way_out}"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """All findings of one network, in the order of its forward pass."""

    network: str
    findings: tuple[Finding, ...]

    def having(self, status: Status) -> tuple[Finding, ...]:
        """The findings of one status."""
        return tuple(finding for finding in self.findings if finding.status == status)

    @property
    def unsupported(self) -> tuple[Finding, ...]:
        """What stands in the way of a conversion; empty if the network converts."""
        return self.having("unsupported")

    @property
    def convertible(self) -> bool:
        """True if nothing is unsupported and there is at least one activation to convert."""
        return not self.unsupported and bool(self.having("neuron"))

    def raise_if_unsupported(self) -> None:
        """Raise UnsupportedOperatorError that names the first findings in full and counts the rest."""
        if self.unsupported:
            count = len(self.unsupported)
            title = f"{self.network} cannot be converted: {count} unsupported operator call{'s' if count > 1 else ''}"
            raise UnsupportedOperatorError("\n".join([title, *self._refusals()]))

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "network": self.network,
            "convertible": self.convertible,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        counts = Counter(finding.status for finding in self.findings)
        verdict = "converts" if self.convertible else "does not convert"
        lines = [f"{self.network}: {verdict}"]
        for status, meaning in MEANING.items():
            if counts[status]:
                lines.append(f"  {counts[status]:4d} {status:<11} {meaning}")
        return "\n".join(lines + self._notes() + self._refusals())

    def _notes(self) -> list[str]:
        """What is no plain ReLU and no affine map, by operator: what becomes of it, and how often."""
        notes = Counter((finding.operator, finding.reason) for finding in self.findings if finding.status in ("neuron", "synapse"))
        return [f"  {operator} x{count}: {reason}" for (operator, reason), count in notes.items() if reason]

    def _refusals(self) -> list[str]:
        """The first refusal of each kind in full, and how many there are of each."""
        first: dict[str, Finding] = {}
        for finding in self.unsupported:
            first.setdefault(finding.operator, finding)
        lines = [f"  {finding.sentence()}" for finding in list(first.values())[:SHOWN]]
        if len(self.unsupported) > min(len(first), SHOWN):
            kinds = Counter(finding.operator for finding in self.unsupported)
            lines.append("  all: " + ", ".join(f"{kind} x{count}" for kind, count in kinds.most_common()))
        return lines
