"""Merge the reports METHOD-T.json of a folder into one table: table.md to read, table.json with every figure.

Run: .venv/bin/python recipes/table.py FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Write table.md and table.json beside the reports."""
    found = sorted((match[1], int(match[2]), path) for path in folder.glob("*.json") if (match := re.fullmatch(r"(\w+)-(\d+)", path.stem)))
    if not found:
        sys.exit(f"{folder}: holds no reports METHOD-T.json")
    reports = {(method, steps): json.loads(path.read_text()) for method, steps, path in found}
    (folder / "table.json").write_text(json.dumps([reports[key] for key in sorted(reports)], indent=1) + "\n")
    (folder / "table.md").write_text(table(reports))


def table(reports: dict[tuple[str, int], Any]) -> str:
    """One row per method, one column per T; each cell was converted for its own T."""
    methods, steps = sorted({method for method, _ in reports}), sorted({step for _, step in reports})
    lines = ["| method | " + " | ".join(f"T = {step}" for step in steps) + " |", "|---|" + "--:|" * len(steps)]
    for method in methods:
        cells = [f"{reports[method, step]['accuracy'][str(step)]:.2f}" if (method, step) in reports else "-" for step in steps]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
