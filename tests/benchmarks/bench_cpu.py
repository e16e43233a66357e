"""Speed, memory and losses of train.py beside a plain HF Trainer loop, on the real rows, on a CPU.

    python tests/benchmarks/bench_cpu.py [--cases small 0.5B …] [--steps 5] [--repeats 3]

Needs ../shared. Each case (CASES, below) alternates its ways, each run a process of its own: the plain loop (padded,
full logits, the model's own loss), train.py padded, with `--packing batch` and with `--packing bin`; fp32, the same
rows in each step but for the bins. Tokens/s counts real tokens, padding left out, without the first step; memory is
the process's peak resident size as the kernel reports it. `head` is the share of the plain loop's multiplications that
the output head makes. The table comes last; what a run prints is shown only where it fails.

One run of the plain loop alone (this is what the tests compare with; also under torchrun):

    python tests/benchmarks/bench_cpu.py --mode plain --model M --rows D --out O --steps 4 [--batch_size 8]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Neither imports torch: a child's peak counts from what its parent held when it was started.
from conftest import SHARED, TRAIN, losses, make_hy_tokenizer, make_model_dir

ROWS = SHARED / "data" / "car_train.jsonl"
LENGTH = 1024  # --max_seq_length
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "tie": False}
# Hunyuan-0.5B-Instruct's, with as many of its 24 layers as the plain loop trains in 8 GB
HALF_B = {
    "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "num_hidden_layers": 3, "vocab_size": 128_512, "tie": True,
}  # fmt: skip
ALL = {"plain": None, "padded": "none", "packed": "batch", "bins": "bin"}
# name: class, configuration, tokens of the vocabulary, rows a step, ways
CASES: dict[str, tuple[str, dict, int, int, tuple[str, ...]]] = {
    "small": ("dense", SMALL | {"vocab_size": 128_512}, 0, 8, (*ALL,)),
    "small-moe": ("moe", SMALL | {"vocab_size": 128_512}, 0, 8, (*ALL,)),
    "small-32k": ("dense", SMALL | {"vocab_size": 32_768}, 32_000, 8, (*ALL,)),
    "16-rows": ("dense", SMALL | {"vocab_size": 32_768}, 32_000, 16, ("padded", "packed")),
    "0.5B": ("dense", HALF_B, 0, 16, ("plain", "padded", "packed")),
}


# --- one run -------------------------------------------------------------------------------------------------------


def plain(args: argparse.Namespace) -> None:
    """The plain loop: HF Trainer as it is; writes `plain.json` (tokens, tokens_per_second, losses) to `--out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    import reference

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_, **__) -> None:
            self.times.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    rows = reference.encode_rows(args.rows, tokenizer, max_seq_length=LENGTH)
    options = TrainingArguments(
        output_dir=args.out, use_cpu=True, max_steps=args.steps, learning_rate=1e-4, report_to="none",
        per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulation,
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    clock = Clock()
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"), options, train_dataset=rows,
        data_collator=lambda batch: reference.pad(batch, tokenizer.pad_token_id), callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    order = reference.trainer_order(
        len(rows), options.seed, options.world_size, args.batch_size, args.accumulation, args.steps
    )
    tokens = [sum(len(rows[i]["input_ids"]) for batch in step for i in batch) for step in order]
    seconds = clock.times[-1] - clock.times[0]
    results = {
        "tokens": sum(tokens),
        "tokens_per_second": sum(tokens[1:]) / seconds if seconds else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    if trainer.is_world_process_zero():
        (Path(args.out) / "plain.json").write_text(json.dumps(results), encoding="utf-8")
    if options.world_size > 1:
        # torch 2.13: one DDP run over gloo in fifteen aborts while the interpreter is taken down ("terminate called
        # without an active exception"), rarely also after destroy_process_group. There is nothing to take down.
        sys.stdout.flush()
        os._exit(0)


def measure(case: str, way: str, model: Path, out: Path, steps: int) -> dict:
    """Runs one way to its end: tokens, tokens/s, losses and the process's peak resident size in bytes."""
    size = CASES[case][3]
    if way == "plain":
        command = [__file__, "--mode", "plain", "--model", model, "--rows", ROWS, "--out", out, "--steps", steps]
        command += ["--batch_size", size]
    else:  # a bin holds about four rows
        command = [
            TRAIN / "train.py", "--model_name_or_path", model, "--train_data_file", ROWS, "--output_dir", out,
            "--per_device_train_batch_size", size // 4 if way == "bins" else size, "--max_steps", steps,
            "--logging_steps", 1, "--learning_rate", 1e-4, "--max_seq_length", LENGTH, "--save_strategy", "no",
            "--report_to", "none", "--packing", ALL[way],
        ]  # fmt: skip
    out.mkdir(parents=True)
    log = out.with_suffix(".log")
    with log.open("w") as file:
        child = subprocess.Popen([sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        sys.exit(f"{case} {way}: exit code {child.returncode}; the end of {log}:\n{tail}")
    if way == "plain":
        results = json.loads((out / "plain.json").read_text(encoding="utf-8"))
    else:
        results = json.loads((out / "train_results.json").read_text(encoding="utf-8")) | {"losses": losses(out)}
    return results | {"peak": usage.ru_maxrss * 1024}


# --- the comparison ------------------------------------------------------------------------------------------------


def build(folder: Path, cases: list[str]) -> None:
    """Each case's model, with a tokenizer of its vocabulary."""
    for case in cases:
        kind, config, tokens, _, _ = CASES[case]
        tokenizer = make_hy_tokenizer(folder / f"tokenizer-{tokens}")
        if tokens:
            lines = (tokenizer / "hy.tiktoken").read_text().splitlines()[:tokens]
            (tokenizer / "hy.tiktoken").write_text("\n".join(lines) + "\n")
        make_model_dir(kind, tokenizer, folder / case, **config)


def head_share(config: dict, kind: str) -> float:
    """The head's share of the multiplications by weights that each position makes in the plain loop."""
    width, heads = config["hidden_size"], config.get("num_attention_heads", 4)
    size, groups = config.get("head_dim", width // heads), config.get("num_key_value_heads", 2)
    attention = width * size * (2 * heads + 2 * groups)
    mlp = 3 * width * config["intermediate_size"] * (3 if kind == "moe" else 1)  # top-2 and a shared one
    head = width * config["vocab_size"]
    return head / (head + config["num_hidden_layers"] * (attention + mlp))


def table(runs: dict[str, dict[str, list[dict]]]) -> str:
    """Medians, spread (fastest ÷ slowest) and ratios to a case's first way, one line a way."""
    head = (
        f"{'case':<10} {'head':>5} {'way':<7} {'tokens/s':>9} {'spread':>7} {'ratio':>6} {'peak GB':>8} {'ratio':>6}"
    )
    lines = [head + f" {'first loss':>11} {'last loss':>11} {'max |Δ|':>8}"]
    for case, ways in runs.items():
        share, base = head_share(CASES[case][1], CASES[case][0]), {}
        for way, results in ways.items():
            speeds = [result["tokens_per_second"] for result in results]
            speed, peak = statistics.median(speeds), statistics.median(result["peak"] for result in results)
            history = results[0]["losses"]
            base = base or {"speed": speed, "peak": peak, "losses": history, "tokens": results[0]["tokens"]}
            difference = max(abs(a - b) for a, b in zip(history, base["losses"], strict=True))
            same = (
                "" if results[0]["tokens"] == base["tokens"] else "  other rows" * (way == "bins") or "  other tokens!"
            )
            lines.append(
                f"{case:<10} {share:>5.0%} {way:<7} {speed:>9.0f} {max(speeds) / min(speeds):>6.2f}×"
                f" {speed / base['speed']:>5.2f}× {peak / 1e9:>8.2f} {peak / base['peak']:>5.2f}×"
                f" {history[0]:>11.6f} {history[-1]:>11.6f} {difference:>8.0e}{same}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a run, at least 2 (default 5)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of every run (default 2)")
    parser.add_argument("--mode", choices=["compare", "build", "plain"], default="compare", help="compare: everything")
    parser.add_argument("--model", help="plain, build: model directory")
    parser.add_argument("--rows", help="plain: jsonl file")
    parser.add_argument("--out", help="plain: output directory")
    parser.add_argument("--batch_size", type=int, default=8, help="plain: rows a process and micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="plain: micro-batches a step")
    args = parser.parse_args()
    if args.mode == "plain":
        return plain(args)
    if not ROWS.is_file():
        sys.exit("no ../shared: put the folder with data/hy.tiktoken and data/car_train.jsonl beside the repository")
    if args.mode == "build":
        return build(Path(args.model), args.cases)

    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        work = Path(folder)
        # In a process of its own, so that this one stays small.
        made = [sys.executable, __file__, "--mode", "build", "--model", folder, "--cases", *args.cases]
        subprocess.run(made, check=True, stderr=subprocess.DEVNULL)
        runs: dict[str, dict[str, list[dict]]] = {case: {way: [] for way in CASES[case][4]} for case in args.cases}
        for case in args.cases:
            for repeat in range(args.repeats):
                for way in CASES[case][4]:
                    result = measure(case, way, work / case, work / f"{case}-{way}-{repeat}", args.steps)
                    runs[case][way].append(result)
                    print(f"{case} {way} {repeat + 1}/{args.repeats}: {result['tokens_per_second']:.0f} tokens/s, "
                          f"{result['peak'] / 1e9:.2f} GB", flush=True)  # fmt: skip
    print(table(runs))
    return None


if __name__ == "__main__":
    main()
