"""Merge a LoRA adapter into its base, offline: adapter + base → one model directory.

    python merge_lora_weight.py                  # newest adapter under train/output, its own base, <adapter>-merged
    python merge_lora_weight.py --base_model_path BASE --adapter_model_path ADAPTER --output_path OUT --save_dtype bf16
    python merge_lora_weight.py --verify logits  # and compare the result with base + adapter as PEFT computes them

Works on the safetensors files shard by shard and never builds the model: it needs memory for about one shard. A weight
is merged in fp32 and rounded once; names, shards, index and the other files of a model are the base's, config.json but
for its dtype; the tokenizer is the adapter's. Only `--verify logits` runs code that the base brings. The result is
written to a temporary directory and renamed at the end. Refused (exit code 2, nothing at the output): what
sft/merging.py refuses; another base than the adapter's; a base that is quantised, not whole or not safetensors; an
output that is not empty.
"""

import argparse
import re
import shutil
import time
from argparse import Namespace
from pathlib import Path
from shlex import quote

import sft  # noqa: F401  first: it says what is missing

# isort: split
from safetensors import SafetensorError

from sft import merging
from sft.messages import OUTPUT_ROOT, Parser, Refused, choice, in_units, newest, run_script
from sft.model.adapter_base import check_base, named_base
from sft.model.directory import ModelDirectory
from sft.model.files import ADAPTER_FILE, tokenizer_beside
from sft.model.generations import report_code
from sft.model.weight_files import DTYPES


def main(argv: list[str] | None = None) -> None:
    """The job, step by step."""
    # 1. Which adapter, base and output.
    args = parse_arguments(argv)
    adapter_path, base_path, output = find_paths(args)

    # 2. The base: whole, and the one that the adapter was trained on.
    base = ModelDirectory(base_path, tokenizer_beside(adapter_path), args.trust_remote_code, tokenizer_trusted=False)
    base.check()
    if not base.tensors:
        command = f"cd {quote(str(Path(__file__).parent))} && python -m sft.model.to_safetensors"
        advice = f"Convert its pytorch_model*.bin: {command} {quote(str(base_path))} NEW_DIR"
        raise Refused(f"{base_path}: holds no *.safetensors. {advice}")
    check_base(adapter_path, base, args.any_base)
    if args.verify == "logits":  # merging runs no code
        report_code(base)

    # 3. What the adapter changes, and which files that makes.
    adapter = merging.Adapter(adapter_path)
    updates = merging.plan_updates(adapter, base)
    plan = merging.plan_files(base, args.save_dtype, args.max_shard_size)
    free = shutil.disk_usage(next(parent for parent in output.parents if parent.exists())).free
    if free < plan.total_size:
        needed = f"needs {in_units(plan.total_size)}, {in_units(free)} are free"
        raise Refused(f"--output_path {output}: {needed}; make room")

    # 4. Write all of it, or nothing.
    try:
        with merging.whole_or_absent(output) as temporary:
            merging.write_weights(temporary, plan, base, adapter, updates)
            base.write(temporary, DTYPES[plan.dtype], masters=plan.dtype == "F32")
            if args.verify:
                merging.check_keys(temporary, plan, base)
            if is_occupied(output):
                earlier = output.with_name(f"{output.name}-previous-{time.strftime('%Y%m%d-%H%M%S')}")
                output.rename(earlier)
                choice("earlier merge", earlier, "moved aside")
    except (OSError, SafetensorError) as error:  # a full disk among them
        raise Refused(f"--output_path {output}: could not be written, nothing is left there: {error}") from None
    print(f"merged {len(updates)} of {len(base.tensors)} tensors into {output} ({in_units(plan.total_size)})")

    # 5. What it computes.
    if args.verify == "logits":
        merging.check_logits(output, base, adapter_path)


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The flags; refuses unknown ones and wrong values."""
    parser = Parser(description="Merge a LoRA adapter into its base model.", allow_abbrev=False)
    parser.add_argument("--base_model_path", help="model directory (default: the one that adapter_config.json names)")
    parser.add_argument("--adapter_model_path", help="adapter directory (default: the newest under train/output)")
    parser.add_argument("--output_path", help="directory to write (default: <adapter>-merged)")
    parser.add_argument("--save_dtype", choices=merging.SAVE_DTYPES, help="dtype of the result (default: the base's)")
    parser.add_argument("--max_shard_size", type=byte_size, default="5GB", help="split larger files (default: 5GB)")
    parser.add_argument("--verify", choices=("keys", "logits"), help="check the result's tensors, or what it computes")
    parser.add_argument("--any_base", action="store_true", help="merge into another base than the adapter's own")
    parser.add_trust()
    return parser.parse_args(argv)


def byte_size(text: str) -> int:
    """Bytes in "5GB", "500MB" or a plain number, decimal as Hugging Face counts them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def find_paths(args: Namespace) -> tuple[Path, Path, Path]:
    """(adapter, base, output) as given, else the newest adapter under train/output, the base that it names, and
    <adapter>-merged. Refuses a given output that is not empty."""
    given = args.adapter_model_path or newest(OUTPUT_ROOT, (ADAPTER_FILE,))
    if given is None:
        raise Refused(f"no adapter under {OUTPUT_ROOT}; train one with --use_lora, or give --adapter_model_path")
    adapter = Path(given).resolve()
    if not (adapter / ADAPTER_FILE).is_file():
        raise Refused(f"{adapter}: holds no {ADAPTER_FILE}; give the directory of an adapter")
    base = named_base(adapter, args.base_model_path, "--base_model_path").resolve()
    output = Path(args.output_path or f"{adapter}-merged").resolve()
    for flag, path, default in (
        ("adapter_model_path", adapter, "newest under train/output"),
        ("base_model_path", base, "named by adapter_config.json"),
        ("output_path", output, "<adapter>-merged"),
    ):
        choice(flag, path, "given" if getattr(args, flag) else default)
    if output in (base, adapter):
        itself = "base" if output == base else "adapter"
        raise Refused(f"--output_path {output}: is the {itself} itself; give another directory")
    if args.output_path and is_occupied(output):
        raise Refused(f"--output_path {output}: is there and not empty; remove it or give another directory")
    return adapter, base, output


def is_occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


if __name__ == "__main__":
    run_script(main)
