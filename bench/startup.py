"""How long it takes until something can be done: importing the package, the command line's first words.

    python bench/startup.py [--repetitions 7] [--out FILE]

Every command runs in a fresh process, all of them in turns, beside the bare interpreter and the import of torch, of which
`import quickspike` consists for the most part. Files are in the system's cache after the first round, which is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from timing import add_out, save, seconds_of

COMMANDS = {
    "python": ["-c", ""],
    "import torch": ["-c", "import torch"],
    "import quickspike": ["-c", "import quickspike"],
    "quickspike --version": ["-m", "quickspike", "--version"],
    "quickspike --help": ["-m", "quickspike", "--help"],
    "quickspike convert --help": ["-m", "quickspike", "convert", "--help"],
    "quickspike methods": ["-m", "quickspike", "methods"],
}


def run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - the commands above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    add_out(parser)
    options = parser.parse_args()
    times = {name: list[float]() for name in options.only}
    for repetition in range(options.repetitions + 1):
        for name, own in times.items():
            seconds = seconds_of(lambda name=name: run(COMMANDS[name]))
            if repetition:
                own.append(seconds)
    rows = {
        name: {"seconds": round(statistics.median(own), 3), "least": round(min(own), 3), "largest": round(max(own), 3)}
        for name, own in times.items()
    }
    for name, row in rows.items():
        print(f"{name:>28}: {row['seconds']:.2f} s ({row['least']:.2f} to {row['largest']:.2f})")
    save(options.out, rows, options)


if __name__ == "__main__":
    main()
