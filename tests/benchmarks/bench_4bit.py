"""Host memory while a generated 2 GB mixture of experts in 8 shards is loaded for an adapter: in bf16, and in 4 bits.

    python tests/benchmarks/bench_4bit.py [--repeats 3]     # about four minutes; needs bitsandbytes

Peak of allocated (anonymous) memory and of all that is resident (mapped pages of the files among it, which the system
takes back when it needs them), above what there was before loading, and what stays allocated. Both ways alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "train"), str(REPO / "tests" / "benchmarks")]
WAYS = {"bf16": [], "4 bits": ["--load_in_4bit"]}


def worker(way: str, base: str, file: str) -> None:
    """Load in this process, and write what it took, in bytes and seconds."""
    from bench_load import measured

    from sft.model.load import load_model, open_directory
    from sft.training.plan import parse_arguments

    flags = ["--model_name_or_path", base, "--train_data_file", "x", "--output_dir", "x", "--bf16", "--use_lora"]
    args, _, training = parse_arguments([*flags, "--lora_rank", "16", *WAYS[way]])
    if args.load_in_4bit:
        import sft.model.four_bits  # noqa: F401 (not what is measured)
    figures = measured(lambda: load_model(args, training, None, open_directory(args)))
    Path(file).write_text(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    from bench_merge import SHARDS, make_base

    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.mkdir()
        size = make_base(base)
        for _ in range(args.repeats):
            for way in WAYS:
                file = Path(folder, "figures.json")
                command = [sys.executable, __file__, "--worker", way, str(base), str(file)]
                env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                found.setdefault(way, []).append(json.loads(file.read_text()))
        shard = max(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"\n{size / 1e9:.2f} GB in bf16, {SHARDS} shards of at most {shard / 1e9:.2f} GB; medians of {args.repeats}")
    print("| way | allocated at the peak | resident at the peak | kept | loading |\n|---|---|---|---|---|")
    for way, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        cells = [f"{middle[key] / 1e9:.2f} GB" for key in ("allocated", "resident", "kept")]
        print(f"| {way} | " + " | ".join(cells) + f" | {middle['seconds']:.1f} s |")


if __name__ == "__main__":
    main()
