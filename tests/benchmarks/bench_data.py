"""Rows to memory-mapped tokens: rows per second with 1 and 2 workers against the plain way, memory, the second start.

    python tests/benchmarks/bench_data.py                              # 1,000,000 rows, about 1 GB; ten minutes
    python tests/benchmarks/bench_data.py --rows 100000 --tokenizer train/example/tokenizer
    python tests/benchmarks/bench_data.py --against ../before    # another clone: the same rows, in turn, 60 times

The plain way is `json.loads` and `apply_chat_template` for each row, in one process, nothing found or stored. Its rows
are the file's first; all ways alternate. The tokenizer is the tests' own over the real vocabulary (../shared), unless
given.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "train"), str(REPO / "tests")]
PLAIN_ROWS = 20_000


def write_rows(file: Path, number: int) -> None:
    """Conversations of one to three turns with thinking, of words of both READMEs: about 1 KB each."""
    draw = random.Random(0)
    words = (REPO / "README.md").read_text(encoding="utf-8").split()
    words += [text[:6] for text in (REPO / "README_CN.md").read_text(encoding="utf-8").split()]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    with file.open("w", encoding="utf-8") as out:
        for i in range(number):
            messages = [{"role": "system", "content": "You are a helpful assistant."}]
            for _ in range(draw.choice([1, 1, 2, 3])):
                reply = f"<think>\n{text(10, 40)}\n</think>\n<answer>\n{text(5, 40)} {i}\n</answer>"
                messages += [{"role": "user", "content": text(5, 40)}, {"role": "assistant", "content": reply}]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def plain(file: Path, tokenizer) -> dict:
    rows, began = 0, time.perf_counter()
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False)
            rows += 1
            if rows == PLAIN_ROWS:
                break
    return {"rows": rows, "seconds": time.perf_counter() - began}


def ours(file: Path, tokenizer_dir: str, workers: int) -> dict:
    """From the end of imports to the first batch."""
    import torch
    from transformers import AutoTokenizer

    from sft.data.batches import Collator
    from sft.data.examples import Options, load_examples

    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=True)
    examples = load_examples([str(file)], tokenizer, Options(), workers=workers)
    loader = torch.utils.data.DataLoader(examples, batch_size=8, shuffle=True, collate_fn=Collator(0))
    tokens = next(iter(loader))["input_ids"].numel()
    seconds = time.perf_counter() - began
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, worker = (resource.getrusage(each).ru_maxrss * 1024 for each in who)
    return {
        "rows": examples.figures()["num_rows"],
        "seconds": seconds,
        "memory": own,
        "worker": worker,
        "first_batch": tokens,
    }


def plan(rows: int, capacity: int) -> dict:
    """Bins of `capacity` tokens for as many rows as asked, of lengths spread like those of real conversations."""
    import numpy as np

    from sft.data.batches import plan_bins

    lengths = np.random.default_rng(0).lognormal(5.5, 1.1, rows)
    lengths = np.clip(lengths, 8, capacity).astype(np.int32)
    began = time.perf_counter()
    starts = plan_bins(lengths, capacity, seed=0)[1]
    seconds = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fill = float(lengths.sum() / (capacity * (len(starts) - 1)))
    return {"rows": rows, "seconds": seconds, "memory": memory, "bins": len(starts) - 1, "fill": fill}


def encode_in_turn(file: Path, tokenizer_dir: str, tree: Path) -> None:
    """For each line of stdin, encode the file's rows with a clone's code, and print the CPU's seconds."""
    sys.path.insert(0, str(tree / "train"))
    from transformers import AutoTokenizer

    from sft.data.examples import ChatFormat, Options, encode_rows

    chat = ChatFormat(AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=True))
    lines = list(enumerate(file.read_bytes().splitlines(), 1))
    for _ in sys.stdin:
        began = time.process_time()
        encode_rows(lines, chat, Options())
        print(time.process_time() - began, flush=True)


def compare(other: Path, file: Path, tokenizer: str, turns: int = 60) -> None:
    """Print the rows per second of this clone over another's, two living processes in turn. The first warms up."""
    command = [sys.executable, __file__, "--mode", "in turn", "--file", str(file), "--tokenizer", tokenizer, "--tree"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    children = [subprocess.Popen([*command, str(tree.resolve())], **pipes) for tree in (other, REPO)]
    seconds: list[list[float]] = [[], []]
    for _ in range(turns + 1):
        for child, found in zip(children, seconds):
            child.stdin.write("\n")
            child.stdin.flush()
            found.append(float(child.stdout.readline()))
    for child in children:
        child.stdin.close()
    ratios = [theirs / ours for theirs, ours in zip(*(found[1:] for found in seconds))]
    print(f"rows/s over {other}: median {statistics.median(ratios):.2f}, of the fastest turns "
          f"{min(seconds[0][1:]) / min(seconds[1][1:]):.2f}")  # fmt: skip


def run(mode: str, file: Path, tokenizer: str, cache: Path, workers: int = 1) -> dict:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--mode", mode, "--file", str(file), "--tokenizer", tokenizer]
    env = os.environ | {"HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--workers", str(workers)], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer")
    parser.add_argument("--mode", choices=("all", "plain", "ours", "plan", "in turn"), default="all")
    parser.add_argument("--against", type=Path, help="another clone, to compare the code of both")
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    if args.mode == "in turn":
        return encode_in_turn(args.file, args.tokenizer, args.tree)
    if args.mode == "ours":
        print(json.dumps(ours(args.file, args.tokenizer, args.workers)))
        return
    if args.mode == "plan":
        print(json.dumps(plan(args.rows, 4096)))
        return
    if args.mode == "plain":
        from transformers import AutoTokenizer

        print(json.dumps(plain(args.file, AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=True))))
        return

    folder = Path(tempfile.mkdtemp())
    try:
        if args.tokenizer is None:
            from conftest import make_hy_tokenizer

            args.tokenizer = str(make_hy_tokenizer(folder / "tokenizer"))
        if args.against:
            write_rows(folder / "rows.jsonl", 600)
            return compare(args.against, folder / "rows.jsonl", args.tokenizer)
        large, small, cache = folder / "large.jsonl", folder / "small.jsonl", folder / "cache"
        write_rows(large, args.rows)
        write_rows(small, args.rows // 20)
        print(f"{args.rows} rows, {large.stat().st_size / 1e9:.2f} GB; {os.cpu_count()} cores")
        rates = {"plain": [], "1 worker": [], "2 workers": []}
        for _ in range(args.repeats):
            for way, mode, workers in (("plain", "plain", 1), ("1 worker", "ours", 1), ("2 workers", "ours", 2)):
                shutil.rmtree(cache, ignore_errors=True)
                figures = run(mode, small, args.tokenizer, cache, workers)
                rates[way].append(figures["rows"] / figures["seconds"])
        base = statistics.median(rates["plain"])
        print(f"\nfile of {args.rows // 20} rows, medians of {args.repeats}")
        print(f"{'way':<12}{'rows/s':>8}{'ratio':>7}{'spread':>8}")
        for way, values in rates.items():
            median = statistics.median(values)
            print(f"{way:<12}{median:>8.0f}{median / base:>7.2f}{max(values) / min(values):>8.2f}")
        print(
            f"\n{'rows':>9} {'workers':>8} {'seconds':>8} {'rows/s':>7} {'GB':>6} {'GB, a worker':>13} {'again, s':>9}"
        )
        for file, workers in ((small, 2), (large, 2), (large, 1)):
            shutil.rmtree(cache, ignore_errors=True)
            first = run("ours", file, args.tokenizer, cache, workers)
            again = run("ours", file, args.tokenizer, cache, workers)
            print(
                f"{first['rows']:>9} {workers:>8} {first['seconds']:>8.1f} {first['rows'] / first['seconds']:>7.0f} "
                f"{first['memory'] / 1e9:>6.2f} {first['worker'] / 1e9:>13.2f} {again['seconds']:>9.2f}",
                flush=True,
            )
        for rows in (args.rows, 10 * args.rows):
            done = subprocess.run(
                [sys.executable, __file__, "--mode", "plan", "--rows", str(rows)], capture_output=True
            )
            bins = json.loads(done.stdout.splitlines()[-1])
            print(
                f"bins of 4096 for {rows} rows: {bins['seconds']:.1f} s, {bins['memory'] / 1e9:.2f} GB, "
                f"{bins['bins']} bins, {bins['fill']:.2%} full"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
