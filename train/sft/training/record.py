"""What a run is: run.json in each of its checkpoints. Its arguments, rows, tokenizer, base, code and versions.

Refused (exit code 2): other rows, another tokenizer, base or code than the run's, a training_args.bin that is damaged.
"""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from sft.arguments import TrainingArguments
from sft.data.examples import Examples
from sft.data.tokenized import tokenizer_digest
from sft.messages import Refused, masked, note, read_json
from sft.model.directory import ModelDirectory
from sft.training.deepspeed_file import read_deepspeed_file
from sft.training.fields import BY_CONTENT, NO_EFFECT_ON_RUN
from sft.training.from_adapter import SETTINGS, targets
from sft.training.manifest import RUN

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers", "jinja2")


def new_record(values: dict[str, Any], training: TrainingArguments) -> dict[str, Any]:
    """What run.json says of the flags' values, as they were given or defaulted, before anything was derived; secrets
    in them are masked."""
    own = {*NO_EFFECT_ON_RUN, *BY_CONTENT}
    arguments = {name: value for name, value in values.items() if name not in own}
    arguments["eval_data_file"] = [os.path.abspath(path) for path in arguments["eval_data_file"]]  # from anywhere
    arguments["probe_file"] = arguments["probe_file"] and os.path.abspath(arguments["probe_file"])
    versions = {name: version(name) for name in LIBRARIES}
    arguments["deepspeed"] = training.deepspeed
    return {"arguments": masked(arguments), "processes": training.world_size, "versions": versions}


def compare(record: dict[str, Any], name: str, value: Any, what: str, anyway: bool) -> None:
    """Put a value into the record; refuse one that differs from the earlier run's. With `anyway` it is said."""
    if record.get(name, value) != value:
        if not anyway:
            raise Refused(f"{what} (--resume_anyway goes on with it)")
        note(f"--resume_anyway: not exact: {what}")
    record[name] = value


def record_start(training: TrainingArguments, directory: ModelDirectory, tokenizer: Any) -> None:
    """Put the tokenizer and the model's code into the record; refuses others than the earlier run's."""
    record, anyway = training.record, training.resume_anyway
    what = f"{directory.tokenizer_path}: is not the run's tokenizer"
    compare(record, "tokenizer", tokenizer_digest(tokenizer), what, anyway)
    python = sorted((name, content) for name, content in directory.contents.items() if name.endswith(".py"))
    code = {name: xxhash.xxh3_128_hexdigest(content) for name, content in python}
    code["computes the model"] = "the directory's code" if directory.runs_own_code else "transformers' class"
    compare(record, "code", code, f"{directory.path}: its code, or --trust_remote_code, is not as in the run", anyway)


def record_rows(training: TrainingArguments, files: list[str], examples: Examples, figures: dict[str, int]) -> None:
    """Put the rows into the record; refuses others than the run began with."""
    hashes = np.ascontiguousarray(examples.rows.data.column("row_hash").to_numpy()[examples.index])
    now: dict[str, Any] = {name: figures[name] for name in ("num_rows", "num_examples")}
    now["digest"] = xxhash.xxh3_128_hexdigest(hashes)
    rows = training.record.setdefault("rows", {})
    for name, value in now.items():
        what = f"--train_data_file: {name} {value} (the run: {rows.get(name)}): these are not the run's rows"
        compare(rows, name, value, what, training.resume_anyway)
    rows["files"] = masked([os.path.abspath(file) for file in files])


# ---------------------------------------------------------------------------------------- of an earlier checkpoint


class Inert(tuple):
    """Stands for every class that a pickled file names, so that reading it runs no code: what it is made of."""

    def __new__(cls, *parts):
        return super().__new__(cls, parts)


def read_record(checkpoint: Path) -> dict[str, Any]:
    """run.json; of a checkpoint of an earlier release or another program, which has none, what its training_args.bin
    says. Refuses one that is missing or damaged."""
    if (checkpoint / RUN).is_file():
        record = read_json(checkpoint / RUN)
        then = record.get("versions", {})
        now = {name: version(name) for name in then}
        changed = [f"{name} {now[name]} (the run: {then[name]})" for name in then if now[name] != then[name]]
        if changed:
            note(f"not exact: other releases than in the run: {', '.join(changed)}")
        return record
    file = checkpoint / "training_args.bin"
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            stored = vars(torch.load(file, weights_only=True))
    except Exception as error:  # damaged files raise anything
        why = "is missing" if not file.exists() else f"cannot be read ({type(error).__name__})"
        raise Refused(f"--resume_from_checkpoint {checkpoint}: training_args.bin {why}") from error
    plan = stored["plan"] if "plan" in stored else guessed_plan(stored, checkpoint)
    return {"arguments": plan} | ({"processes": plan["processes"]} if "processes" in plan else {})


def guessed_plan(stored: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The flags as far as Hugging Face's own arguments say them, which an earlier release or another program saved
    after their checks; and `processes`."""
    plan = {n: str(v[-1]).lower() if isinstance(v, Inert) else v for n, v in stored.items() if v != Inert()}
    plan |= {"use_cpu": False, "gradient_checkpointing": plan.pop("activation_checkpointing", None)}
    if isinstance(plan.get("deepspeed"), str):
        plan["deepspeed"] = read_deepspeed_file(plan["deepspeed"])
    if not plan.get("save_on_each_node"):
        plan["processes"] = len(list(checkpoint.glob("rng_state*.pth"))) or 1
    plan["use_lora"] = (checkpoint / "adapter_config.json").is_file()
    if plan["use_lora"]:
        adapter = read_json(checkpoint / "adapter_config.json")
        plan |= {flag: adapter.get(key) for flag, key in SETTINGS.items()} | {"lora_target_modules": targets(adapter)}
    return plan
