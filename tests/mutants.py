"""Changes the code in small ways, one at a time: does a test notice? Uses mutmut (`pip install mutmut`), set up in pyproject.toml.

    python tests/mutants.py [--number 300] [--seed 0] [--processes 1] [--out results/mutants.json]

neuron.py, conversion.py, energy.py and the methods have thousands of places to change; a number of them is drawn, since all take hours.
Tests that compile the network or start other processes are left out: neither sees through the functions that mutmut puts around ours.
A change that no test notices has survived. It is listed with what was changed, to be judged: a missing test, or a change of nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MADE = ROOT / "mutants" / "src" / "quickspike"
KILLED, SURVIVED, UNTESTED = 1, 0, 33
"""What mutmut notes: a test failed, all passed, or there is none. Everything else ended in time-out or crash, which is noticed, too."""


def mutmut(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mutmut", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def noted() -> dict[str, tuple[str, int | None]]:
    """(file, exit status) of all changes that mutmut has made."""
    found = {}
    for path in sorted(MADE.rglob("*.py.meta")):
        for name, code in json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"].items():
            found[name] = (str(path.relative_to(MADE)).removesuffix(".meta"), code)
    return found


def verdict(code: int | None) -> str:
    """What became of a change."""
    return {KILLED: "killed", SURVIVED: "survived", UNTESTED: "untested", None: "not run"}.get(code, "killed")


def interval(share: float, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was found in `number` draws."""
    z = 1.96
    centre, spread = share + z * z / (2 * number), z * math.sqrt(share * (1 - share) / number + (z / number) ** 2 / 4)
    return (centre - spread) / (1 + z * z / number), (centre + spread) / (1 + z * z / number)


def changed(name: str) -> list[str]:
    """The lines that were taken out and put in."""
    lines = mutmut("show", name).stdout.splitlines()
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts for each file and for all, with the share that tests noticed, in percent."""
    files: dict[str, Counter[str]] = {}
    for row in rows:
        files.setdefault(row["file"], Counter())[row["verdict"]] += 1
    total = sum(files.values(), Counter())
    run = total["killed"] + total["survived"] + total["untested"]
    low, high = interval(total["killed"] / run, run) if run else (0.0, 1.0)
    share = 100 * total["killed"] / run if run else 0.0
    return {"files": files, "total": total, "killed": round(share, 1), "interval": [round(100 * low, 1), round(100 * high, 1)]}


def main() -> int:
    """Exit status 1 if fewer than 85 % were noticed, or some were not tried."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=300, help="changes that are tried")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="every change that was tried, as JSON")
    options = parser.parse_args()
    from quickspike.provenance import commit, machine, versions

    # The first call makes the changes and looks which test runs which function; it has nothing to try.
    if not noted():
        first = mutmut("run", "none.*")
        if not noted():
            raise SystemExit(f"mutmut made no changes:\n{first.stdout[-3000:]}{first.stderr[-3000:]}")
    everything = noted()
    drawn = sorted(random.Random(options.seed).sample(sorted(everything), min(options.number, len(everything))))
    subprocess.run([sys.executable, "-m", "mutmut", "run", "--max-children", str(options.processes), *drawn], cwd=ROOT, check=False)
    rows: list[dict[str, Any]] = []
    found = noted()
    for name in drawn:
        file, code = found[name]
        row = {"name": name, "file": file, "verdict": verdict(code)}
        rows.append(row if row["verdict"] == "killed" else row | {"change": changed(name)})
    about = summary(rows)
    if options.out is not None:
        head = {"command": f"python tests/mutants.py --number {options.number} --seed {options.seed}", "of": len(everything), **about}
        head |= {"commit": commit(), "versions": versions(), "machine": machine()}
        options.out.write_text(json.dumps(head | {"tried": rows}, indent=1) + "\n", encoding="utf-8")
    counts = ", ".join(f"{count} {what}" for what, count in about["total"].items())
    low, high = about["interval"]
    sys.stdout.write(f"{len(rows)} of {len(everything)} changes: {counts}; {about['killed']} % noticed ({low} to {high})\n")
    return 0 if about["killed"] >= 85 and not about["total"]["not run"] else 1


if __name__ == "__main__":
    sys.exit(main())
