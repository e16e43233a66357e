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
import os
import re
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import sft  # noqa: F401  first: it says what is missing

# isort: split
from safetensors import SafetensorError

from sft.merging import (
    SAVE_DTYPES,
    Adapter,
    check_keys,
    check_logits,
    free_space,
    plan_files,
    plan_updates,
    write_weights,
)
from sft.messages import OUTPUT_ROOT, Parser, Refused, choice, first_few, in_units, newest, read_json, run_script
from sft.model.adapter_base import check_base, use_code
from sft.model.directory import ModelDirectory
from sft.model.files import ADAPTER_FILE, tokenizer_beside
from sft.model.generations import report_code
from sft.model.weight_files import DTYPES, INDEX


def main(argv: list[str] | None = None) -> None:
    """The job, step by step."""
    # 1. Which adapter, base and output.
    args = parse_arguments(argv)
    adapter_path = find_adapter(args.adapter_model_path)
    base_path = find_base(args.base_model_path, adapter_path)
    output = find_output(args.output_path, adapter_path, base_path)

    # 2. The base: whole, and the one that the adapter was trained on.
    base = open_base(base_path, adapter_path, args.trust_remote_code)
    code = check_base(adapter_path, base, args.any_base)
    if args.verify == "logits":  # merging runs no code
        use_code(base, code)
        report_code(base, tokenizer=False)

    # 3. What the adapter changes, and which files that makes.
    adapter = Adapter(adapter_path)
    updates = plan_updates(adapter, base)
    plan = plan_files(base, args.save_dtype, args.max_shard_size)
    free = free_space(output)
    if free < plan.total_size:
        needed = f"needs {in_units(plan.total_size)}, {in_units(free)} are free"
        raise Refused(f"--output_path {output}: {needed}; make room")

    # 4. Write all of it, or nothing.
    try:
        with whole_or_absent(output) as temporary:
            write_weights(temporary, plan, base, adapter, updates)
            base.write(temporary, DTYPES[plan.dtype], masters=plan.dtype == "F32")
            if args.verify:
                check_keys(temporary, plan, base)
            move_earlier_merge(output)
    except (OSError, SafetensorError) as error:  # a full disk among them
        raise Refused(f"--output_path {output}: could not be written, nothing is left there: {error}") from None
    print(f"merged {len(updates)} of {len(base.tensors)} tensors into {output} ({in_units(plan.total_size)})")

    # 5. What it computes.
    if args.verify == "logits":
        check_logits(output, base, adapter_path)


def parse_arguments(argv: list[str] | None) -> Namespace:
    """The flags; refuses unknown ones and wrong values."""
    parser = Parser(description="Merge a LoRA adapter into its base model.", allow_abbrev=False)
    parser.add_argument("--base_model_path", help="model directory (default: the one that adapter_config.json names)")
    parser.add_argument("--adapter_model_path", help="adapter directory (default: the newest under train/output)")
    parser.add_argument("--output_path", help="directory to write (default: <adapter>-merged)")
    parser.add_argument("--save_dtype", choices=SAVE_DTYPES, help="dtype of the result (default: the base's)")
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


def find_adapter(given: str | None) -> Path:
    """The adapter's directory: the one that is given, else the newest under train/output."""
    adapter = Path(given) if given else newest(OUTPUT_ROOT, (ADAPTER_FILE,))
    if adapter is None:
        raise Refused(f"no adapter under {OUTPUT_ROOT}; train one with --use_lora, or give --adapter_model_path")
    adapter = adapter.resolve()
    if not (adapter / ADAPTER_FILE).is_file():
        raise Refused(f"{adapter}: holds no {ADAPTER_FILE}; give the directory of an adapter")
    choice("adapter_model_path", adapter, "given" if given else "newest under train/output")
    return adapter


def find_base(given: str | None, adapter: Path) -> Path:
    """The base's directory: the one that is given, else the one that the adapter names."""
    path = given or read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    if not path or not Path(path).is_dir():
        raise Refused(f"base {path!r}: not a directory here; give --base_model_path")
    base = Path(path).resolve()
    choice("base_model_path", base, "given" if given else "named by adapter_config.json")
    return base


def find_output(given: str | None, adapter: Path, base: Path) -> Path:
    """The directory to write; refuses a given one that is not empty, or is the base or the adapter."""
    output = Path(given or f"{adapter}-merged").resolve()
    choice("output_path", output, "given" if given else "<adapter>-merged")
    if output in (base, adapter):
        itself = "base" if output == base else "adapter"
        raise Refused(f"--output_path {output}: is the {itself} itself; give another directory")
    if given and is_occupied(output):
        raise Refused(f"--output_path {output}: is there and not empty; remove it or give another directory")
    return output


def is_occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def open_base(path: Path, adapter: Path, trusted: bool) -> ModelDirectory:
    """The base, with the adapter's tokenizer if it has one; refuses a base that is not whole."""
    base = ModelDirectory(path, tokenizer_beside(adapter), trusted)
    base.check()
    index, tensors = base.headers
    unlisted = sorted(tensors.keys() - index["weight_map"].keys()) if index else []
    if unlisted:
        file = tensors[unlisted[0]].file
        raise Refused(
            f"{path / INDEX}: does not list what is in {file}: {first_few(unlisted)}; fetch or save both again"
        )
    return base


def move_earlier_merge(output: Path) -> None:
    """Move an earlier merge at the default place to another name."""
    if is_occupied(output):
        earlier = output.with_name(f"{output.name}-previous-{time.strftime('%Y%m%d-%H%M%S')}")
        output.rename(earlier)
        choice("earlier merge", earlier, "moved aside")


@contextmanager
def whole_or_absent(output: Path) -> Iterator[Path]:
    """A temporary directory beside `output`, which it becomes at the end; removed on any error or signal to stop, with
    the parents that were made for it."""
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    made = [parent for parent in output.parents if not parent.exists()]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # as under nohup

    def clean_up() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # the result is in it, or another program's files
                parent.rmdir()

    def stop(number: int, _frame: Any) -> NoReturn:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second signal must not cut the clean-up short
        clean_up()
        print(f"\nstopped by {signal.Signals(number).name}, nothing is left at {output}", file=sys.stderr, flush=True)
        os._exit(128 + number)  # not SystemExit: torch swallows what is raised within a call of its own

    try:
        for number in before:
            signal.signal(number, stop)
        temporary.mkdir(parents=True)
        yield temporary
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # whole from here on
        temporary.rename(output)
    finally:
        clean_up()
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_script(main)
