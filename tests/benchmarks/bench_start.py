"""How long it takes to be told of a wrong flag: against the import that no script here can do without.

    python tests/benchmarks/bench_start.py [--pairs 5]

Prints the medians of alternating pairs, in seconds of wall clock and of CPU, and their ratio: at most 1.3.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "train"
IMPORT = [sys.executable, "-c", "from transformers import TrainingArguments"]
STARTS = {
    "train.py --help": [sys.executable, TRAIN / "train.py", "--help"],
    "train.py, a refused flag": [sys.executable, TRAIN / "train.py", "--use_loar"],
    "train.sh, a refused flag": ["bash", TRAIN / "train.sh", "--use_loar"],
}


def seconds(command: list) -> tuple[float, float]:
    """Of wall clock and of CPU, until a command has ended."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([str(word) for word in command], capture_output=True)
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    print(f"{'':26}{'wall':>8}{'import':>8}{'ratio':>7}{'CPU':>8}{'import':>8}{'ratio':>7}")
    for name, command in STARTS.items():
        measured = [seconds(command) + seconds(IMPORT) for _ in range(pairs)]
        wall, cpu, wall_import, cpu_import = map(statistics.median, zip(*measured))
        print(
            f"{name:26}{wall:8.2f}{wall_import:8.2f}{wall / wall_import:7.2f}"
            f"{cpu:8.2f}{cpu_import:8.2f}{cpu / cpu_import:7.2f}"
        )


if __name__ == "__main__":
    main()
