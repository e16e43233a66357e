"""The plan of a run: its arguments, from the flags or of the checkpoint that it goes on from.

Refused (exit code 2), where a run goes on: flags that make it another run, other rows.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sft.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    build,
    check_values,
    choose_evaluation,
    defaults,
    set_lowest_rate,
    use_todays_names,
)
from sft.messages import Refused, note, read_json
from sft.parser import NO_EFFECT, parse_flags
from sft.training.environment import number_of_processes, prepare, read_deepspeed_file, use_built_arguments
from sft.training.resume import read_trainer_state

# Said by each start anew: where things are, and what changes nothing.
OF_A_START = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "train_data_file", "model_name_or_path"}
OF_A_START |= {"tokenizer_name_or_path", "any_base", "local_rank", "hub_token", "ddp_timeout", "do_train", "do_eval"}
OF_A_START |= {"do_predict"}
# The checkpoint's unless given: how long, saving, logging, evaluating, reporting, and what changes no value.
MAY_CHANGE = re.compile(
    r"max_steps|num_train_epochs|(save|log|logging|hub|trackio|ddp)_\w+|eval_(?!split)\w+"
    r"|dataloader_(num|pin|persistent|prefetch|multiprocessing)_\w+|(load|metric)_\w*best_model\w*|greater_is_better"
    r"|\w+_full_eval|batch_eval_metrics|include_\w+|prediction_loss_only|per_device_eval_batch_size|probe_file"
    r"|early_stopping_patience|report_to|run_name|project|push_to_hub|disable_tqdm|skip_memory_metrics|debug"
    r"|(gradient|activation)_checkpointing(_kwargs)?|make_moe_param_leaf_module|preprocessing_num_workers|cache_dir"
    r"|use_cpu|trust_remote_code|torch_empty_cache_steps|enable_jit_checkpoint|restore_callback\w+"
)
# What checkpoints of earlier releases, and of other programs, do not say.
MUST_BE_KNOWN = ("max_seq_length", "packing", "train_on", "overlong")
ROWS = ("num_rows", "num_examples", "rows_checksum")  # what a plan has beside flags and `processes`
NOT_KNOWN = ("eval_split", "model_code", "trainable_params", "train_attention_params_only", "router_aux_loss_coef")


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The arguments of a run, from its command line and, where it goes on, from the checkpoint. The process group has
    started.

    Refuses what parser.py, arguments.py and environment.py refuse, and flags that differ from the checkpoint's run.
    """
    given = parse_flags(argv)
    for name in NO_EFFECT.keys() & given.keys():
        note(f"--{name}: no effect: {NO_EFFECT[name]}")
        del given[name]
    values, earlier = defaults() | given, {}
    if "resume_from_checkpoint" in given:
        checkpoint = Path(given["resume_from_checkpoint"])
        read_trainer_state(checkpoint)
        earlier = read_plan(checkpoint)
        values = go_on_with(earlier, given)
    chosen = dict(values)
    check_values(chosen)
    choose_evaluation(chosen)
    use_todays_names(chosen)
    with refusing():
        set_lowest_rate(chosen)
        prepare(chosen)
        model, data, training = build(chosen)
        use_built_arguments(training)
    model.given = frozenset(given)
    training.plan = plan_of(values, training) | {name: earlier[name] for name in ROWS if name in earlier}
    return model, data, training


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What Hugging Face's and DeepSpeed's arguments raise becomes Refused, in one line."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{' '.join(str(error).split())} ({type(error).__name__})") from error


# ------------------------------------------------------------------------------------------------ the same run


class Inert(tuple):
    """Stands for every class that a pickled file names, so that reading it runs no code: what it is made of."""

    def __new__(cls, *parts):
        return super().__new__(cls, parts)


def read_plan(checkpoint: Path) -> dict[str, Any]:
    """{flag: value} of the run that a checkpoint is of, and its `processes`, `num_rows`, `num_examples`, as far as the
    checkpoint says; refuses one whose training_args.bin is missing or damaged."""
    file = checkpoint / "training_args.bin"
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            stored = vars(torch.load(file, weights_only=True))
    except Exception as error:  # damaged files raise anything
        why = "is missing" if not file.exists() else f"cannot be read ({type(error).__name__})"
        raise Refused(f"--resume_from_checkpoint {checkpoint}: training_args.bin {why}") from error
    return stored["plan"] if "plan" in stored else guessed_plan(stored, checkpoint)


def guessed_plan(stored: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The plan as far as Hugging Face's own arguments say it, which an earlier release or another program saved after
    their checks."""
    plan = {n: str(v[-1]).lower() if isinstance(v, Inert) else v for n, v in stored.items() if v != Inert()}
    plan |= {"use_cpu": False, "gradient_checkpointing": plan.pop("activation_checkpointing", None)}
    if isinstance(plan.get("deepspeed"), str):
        plan["deepspeed"] = read_deepspeed_file(plan["deepspeed"])
    if not plan.get("save_on_each_node"):
        plan["processes"] = len(list(checkpoint.glob("rng_state*.pth"))) or 1
    plan["use_lora"] = (checkpoint / "adapter_config.json").is_file()
    if plan["use_lora"]:
        adapter = read_json(checkpoint / "adapter_config.json")
        plan |= {"lora_rank": adapter.get("r"), "lora_target_modules": adapter.get("target_modules")}
        plan |= {key: adapter.get(key) for key in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
    return plan


def go_on_with(plan: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Every flag's value of a run that goes on: what is given anew, else the plan's, else the default.

    Refuses, in one message with both values, what is given and would make it another run.
    """
    checkpoint, known, asked = given["resume_from_checkpoint"], dict(plan), {}
    unknown = [f"--{name}" for name in (*MUST_BE_KNOWN, *NOT_KNOWN) if name not in plan and name not in given]
    needed = [flag for flag in unknown if flag[2:] in MUST_BE_KNOWN]
    if needed:
        raise Refused(
            f"--resume_from_checkpoint {checkpoint}: was saved by an earlier release or another program and does not "
            f"record {', '.join(needed)}. Give the values that its run had"
        )
    if unknown:
        note(f"{checkpoint} does not record {', '.join(unknown)}: taken as not given")
    for name, value in given.items():
        if name not in OF_A_START and not MAY_CHANGE.fullmatch(name):
            asked[name] = value
    if "deepspeed" in asked:
        now, then = zero_of(read_deepspeed_file(asked.pop("deepspeed"))), zero_of(plan.get("deepspeed"))
        for part in {"deepspeed"} if now["deepspeed"] != then["deepspeed"] else now.keys() | then.keys():
            asked[part], known[part] = now.get(part, "none"), then.get(part, "none")
    asked["processes"] = number_of_processes()
    values, differ = defaults(), []
    for name, value in asked.items():
        if name in known and spelled(value) != spelled(known[name]):
            flag = f"--{name}" if name in values else name
            differ.append(f"{flag} {spelled(value)} (the run: {spelled(known[name])})")
    if differ:
        raise Refused(
            f"--resume_from_checkpoint {checkpoint}: these differ from its run: {'; '.join(differ)}. Leave a flag out "
            f"to keep the run's value. To begin a new run from the weights: --model_name_or_path {checkpoint}"
        )
    kept = {name: value for name, value in plan.items() if name in values and name not in OF_A_START}
    for flag, winner in (("num_train_epochs", "max_steps"), ("gradient_checkpointing", "activation_checkpointing")):
        if flag in given:  # the run's would win over it
            kept.pop(winner, None)
    return values | kept | given


def spelled(value: Any) -> str:
    """A flag's value as text: 0 and 0.0 are one, and the order in a list does not matter."""
    if isinstance(value, list):
        return " ".join(sorted(map(str, value)))
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def zero_of(config: dict | None) -> dict[str, str]:
    """What of a DeepSpeed configuration is a run's: its stage and offload as `deepspeed`, and its other parts, without
    sizes and reports."""
    if config is None:
        return {"deepspeed": "none"}
    zero = config.get("zero_optimization", {})
    places = [(zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")]
    stage = f"ZeRO-{zero.get('stage', 0)}" + f", offload to {' and '.join(places)}" * (set(places) != {"none"})
    others = sorted(config.keys() - {"zero_optimization", "steps_per_print", "wall_clock_breakdown", "aio"})
    return {"deepspeed": stage} | {f"deepspeed {key}": json.dumps(config[key], sort_keys=True) for key in others}


def plan_of(values: dict[str, Any], training: TrainingArguments) -> dict[str, Any]:
    """What a checkpoint says of its run: the flags as they were given or defaulted, before anything was derived."""
    plan = {name: value for name, value in values.items() if name not in OF_A_START}
    plan["eval_data_file"] = [os.path.abspath(path) for path in plan["eval_data_file"]]  # from wherever it goes on
    plan["probe_file"] = plan["probe_file"] and os.path.abspath(plan["probe_file"])
    return plan | {"deepspeed": training.deepspeed, "processes": training.world_size}


def keep_rows(training: TrainingArguments, examples: Any, figures: dict[str, int]) -> None:
    """Let checkpoints say how many rows there are, and which; refuses others than the run began with."""
    hashes = examples.rows.data.column("row_hash").to_numpy()[examples.index]
    now = {name: figures[name] for name in ("num_rows", "num_examples")} | {"rows_checksum": zlib.crc32(hashes)}
    for name, value in now.items():
        known = training.plan.get(name, value)
        if known != value:
            raise Refused(f"--train_data_file: {name}: {value} (the run: {known}): these are not the run's rows")
    training.plan |= now
