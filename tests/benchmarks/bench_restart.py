"""How long a run that has lost a process stands still: from the kill to the next step, against a normal start.

    python tests/benchmarks/bench_restart.py [--pairs 3] [--ranks 2] [--deepspeed ds_zero2_no_offload.json]

Each run of `MAX_RESTARTS=1 bash train.sh` on the embedded example is one pair: from its start to its first step,
and, after SIGKILL to its last rank past a checkpoint, to the first step of the restart. Prints both medians and their
ratio: at most 2.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

TRAIN = Path(__file__).resolve().parents[2] / "train"


def ranks_of(job: subprocess.Popen) -> list[psutil.Process]:
    """The processes that run train.py, first rank first."""
    children = psutil.Process(job.pid).children(recursive=True)
    return [child for child in children if any(word.endswith("train.py") for word in child.cmdline()[1:2])]


def pair(ranks: int, deepspeed: str) -> tuple[float, float]:
    """(seconds from the start to the first step, from the kill to the next)."""
    env = os.environ | {
        "HOST_GPU_NUM": str(ranks),
        "DS_CONFIG": deepspeed,
        "MAX_RESTARTS": "1",
        "OMP_NUM_THREADS": "1",
    }
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as out:
        flags = ["--max_steps", "400", "--save_steps", "20", "--logging_steps", "1", "--disable_tqdm", "true"]
        command = ["bash", str(TRAIN / "train.sh"), "--output_dir", f"{out}/run", *flags]
        began, first, killed = time.monotonic(), 0.0, 0.0
        job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in job.stdout or ():
            step = re.match(r"step (\d+)/", line)
            if step and killed:
                job.send_signal(signal.SIGTERM)
                gone = time.monotonic() - killed
                job.communicate()
                return first, gone
            first = first or (time.monotonic() - began if step else 0.0)
            if step and int(step[1]) == 25:
                killed = time.monotonic()
                ranks_of(job)[-1].kill()
    raise RuntimeError("the run did not go on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--deepspeed", default="none")
    args = parser.parse_args()
    starts, restarts = zip(*(pair(args.ranks, args.deepspeed) for _ in range(args.pairs)))
    start, restart = statistics.median(starts), statistics.median(restarts)
    print(f"{args.ranks} ranks, {args.deepspeed}: start {start:.1f} s, restart {restart:.1f} s, {restart / start:.2f}")


if __name__ == "__main__":
    main()
