"""Host memory while a 2 GB checkpoint is loaded under ZeRO-3 on two ranks: plain from_pretrained and ours.

    python tests/benchmarks/bench_load.py [--repeats 3]     # about three minutes; needs g++ and ninja

Each rank's peak of allocated (anonymous) memory and of all that is resident, mapped pages of the files included, above
what it had before loading. Both ways alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "train"), str(REPO / "tests"), str(REPO / "tests" / "benchmarks")]


def status() -> tuple[int, int]:
    """Bytes that this process has allocated, and that are resident."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024


def measured(load: Callable[[], object]) -> dict[str, float]:
    """What `load` allocates and makes resident at its peak, and what stays allocated while its result lives, in bytes
    above what there was before; and its seconds."""
    before, peaks, over = status(), [0, 0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peaks[:] = [max(pair) for pair in zip(peaks, status())]

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.monotonic()
    model = load()
    seconds = time.monotonic() - start
    over.set()
    thread.join()
    figures = {"allocated": peaks[0] - before[0], "resident": peaks[1] - before[1], "kept": status()[0] - before[0]}
    del model  # kept until here
    return figures | {"seconds": seconds}


def worker(way: str, base: str, folder: str) -> None:
    """One rank: load, and write the peaks."""
    from transformers import AutoModelForCausalLM

    from sft.model.load import load_model, open_directory
    from sft.training.plan import parse_arguments

    flags = ["--model_name_or_path", base, "--train_data_file", "x", "--output_dir", folder, "--bf16"]
    args, _, training = parse_arguments([*flags, "--deepspeed", "ds_zero3_no_offload.json"])
    if way == "plain":
        import torch

        figures = measured(lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    else:
        figures = measured(lambda: load_model(args, training, None, open_directory(args)))
    Path(folder, f"{way}-{os.environ['RANK']}.json").write_text(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    from bench_merge import make_base

    from runs import free_port

    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.mkdir()
        size = make_base(base)
        for _ in range(args.repeats):
            for way in ("plain", "ours"):
                command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
                command += [str(free_port()), __file__, "--worker", way, str(base), folder]
                env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                for rank in (0, 1):
                    figures = json.loads(Path(folder, f"{way}-{rank}.json").read_text())
                    found.setdefault((way, rank), []).append(figures)
    print(f"\ncheckpoint of {size / 1e9:.2f} GB in bf16, ZeRO-3, two ranks, medians of {args.repeats}")
    print("| way | rank | allocated at the peak | resident at the peak | kept |\n|---|---|---|---|---|")
    for (way, rank), runs in found.items():
        cells = [statistics.median(run[key] for run in runs) / 1e9 for key in ("allocated", "resident", "kept")]
        print(f"| {way} | {rank} | " + " | ".join(f"{cell:.2f} GB" for cell in cells) + " |")


if __name__ == "__main__":
    main()
