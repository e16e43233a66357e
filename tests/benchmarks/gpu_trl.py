"""One run of TRL's SFTTrainer on a model and rows of bench_gpu.py: an adapter as ours, packed rows.

    python tests/benchmarks/gpu_trl.py MODEL ROWS FILE --length 4096 --batch 1 --steps 25 [--device cpu]

FILE gets tokens_per_second, without the first step, and peak_memory_bytes. Needs trl (1.16 was read).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))
from sft.data.examples import Options, load_examples
from sft.training.progress import peak_memory_bytes


class Clock(TrainerCallback):
    """The time of each step's end, and the tokens of each batch."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("file", type=Path)
    for name in ("length", "batch", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    tokenizer, clock = AutoTokenizer.from_pretrained(args.model), Clock()
    examples = load_examples([args.rows], tokenizer, Options(args.length))
    rows = [examples[i] for i in range(len(examples))]
    columns = {key: [row[key].tolist() for row in rows] for key in ("input_ids", "labels")}
    with tempfile.TemporaryDirectory() as out:
        options = SFTConfig(
            output_dir=out, max_length=args.length, packing=True, per_device_train_batch_size=args.batch, bf16=True,
            max_steps=args.steps, learning_rate=1e-5, lr_scheduler_type="constant", logging_steps=1,
            save_strategy="no", report_to="none", gradient_checkpointing=False, use_cpu=args.device == "cpu",
        )  # fmt: skip
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16),
            args=options, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer, callbacks=[clock],
            peft_config=LoraConfig(r=64, lora_alpha=128, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        )  # fmt: skip
        collate = trainer.data_collator

        def counted(features):
            batch = collate(features)
            clock.tokens.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counted
        trainer.train()
        seconds = clock.times[-1] - clock.times[0]
        tokens = sum(clock.tokens[1 : args.steps])
        figures = {"tokens_per_second": tokens / seconds, "peak_memory_bytes": peak_memory_bytes(options.device)}
    args.file.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
