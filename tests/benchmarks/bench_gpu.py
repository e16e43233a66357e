"""On a machine with an NVIDIA GPU: the example, then a dense and a MoE model of some hundred million parameters in
bf16 under each of the three DeepSpeed files, tokens/s and peak memory, and the losses beside those of the CPU in fp32.

    python tests/benchmarks/bench_gpu.py [--steps 12] [--skip_example] [--device cpu]

Everything is made on the spot: the rows from the embedded example, the models from random weights with a vocabulary of
128,167. The table comes last. `--device cpu` runs the same script small, to try it out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TRAIN = REPO / "train"
EXAMPLE = TRAIN / "example"
STAGES = (None, "ds_zero2_no_offload.json", "ds_zero3_no_offload.json", "ds_zero3_offload.json")


def make_rows(file: Path, rows: int = 512, turns: int = 12) -> Path:
    """Longer rows than the example's: each is several of its conversations after one another."""
    lines = [
        json.loads(line)["messages"] for line in (EXAMPLE / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    plain = [m for m in lines if m[0]["role"] == "user"]
    with file.open("w", encoding="utf-8") as out:
        for i in range(rows):
            messages = sum((plain[(i * 7 + k) % len(plain)] for k in range(1 + i % turns)), [])
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return file


def make_model(kind: str, out: Path, small: bool) -> Path:
    """A dense (about 200 million parameters) or MoE (about 400 million) model with random weights, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, HunYuanDenseV1Config, HunYuanMoEV1Config

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "tokenizer")
    width = 64 if small else 1024
    shape = dict(vocab_size=1024 if small else 128_167, hidden_size=width, num_hidden_layers=2 if small else 8)
    shape |= dict(num_attention_heads=8, num_key_value_heads=4, head_dim=width // 8, max_position_embeddings=4096)
    shape |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True)
    shape |= dict(pad_token_id=tokenizer.pad_token_id)
    if kind == "dense":
        config = HunYuanDenseV1Config(intermediate_size=width * 3, **shape)
    else:
        config = HunYuanMoEV1Config(intermediate_size=width, num_experts=8, moe_topk=2, **shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def train(out: Path, *flags: object) -> tuple[dict, list[float], str]:
    """Run train.py; returns its figures, its losses, and what it said where it failed."""
    command = [sys.executable, TRAIN / "train.py", "--output_dir", out, "--overwrite_output_dir", *flags]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if run.returncode:
        return {}, [], f"exit {run.returncode}: {(run.stderr.strip().splitlines() or [''])[-1][:100]}"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return json.loads((out / "train_results.json").read_text()), [e["loss"] for e in history if "loss" in e], ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip_example", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    small = options.device == "cpu"
    table = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = make_rows(folder / "rows.jsonl")
        if not options.skip_example:
            command = ["bash", TRAIN / "train.sh", "--output_dir", folder / "example"]
            code = subprocess.run(command, capture_output=True).returncode
            results = folder / "example" / "train_results.json"
            figures = json.loads(results.read_text()) if code == 0 else {}
            score = f"{figures.get('example_correct_after')} of {figures.get('example_prompts')}"
            table.append(f"example: exit {code}, {score}")
        for kind in ("dense", "moe"):
            model = make_model(kind, folder / kind, small)
            common = ["--model_name_or_path", model, "--train_data_file", rows, "--learning_rate", 1e-4]
            common += ["--logging_steps", 1, "--save_strategy", "no", "--report_to", "none", "--packing", "batch"]
            common += ["--per_device_train_batch_size", 2 if small else 8, "--max_seq_length", 2048]
            _, reference, why = train(folder / "out", *common, "--use_cpu", "--max_steps", min(3, options.steps))
            table.append(f"{kind} cpu fp32: losses {' '.join(f'{x:.4f}' for x in reference)} {why}")
            common += ["--max_steps", options.steps]
            for stage in STAGES:
                flags = ["--deepspeed", stage] if stage else []
                figures, losses, why = train(folder / "out", *common, "--bf16", "--gradient_checkpointing", *flags)
                if why:
                    table.append(f"{kind} bf16 {stage}: {why}")
                    continue
                mfu = f", mfu {figures['mfu']:.3f}" if figures["mfu"] else ""
                table.append(
                    f"{kind} {figures['total_params'] / 1e6:.0f}M bf16 {stage}: "
                    f"{figures['tokens_per_second']:.0f} tokens/s{mfu}, "
                    f"peak {figures['peak_memory_bytes'] / 2**30:.2f} GiB, losses "
                    f"{' '.join(f'{x:.4f}' for x in losses[:3])} … {losses[-1]:.4f}"
                )
    if not small:
        import torch

        table.insert(0, f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    print("\n".join(table))


if __name__ == "__main__":
    main()
