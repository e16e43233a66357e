"""Going on from a checkpoint: its run's flags, whether what is asked for is that run, what the Trainer forgets.

Refused (exit code 2): a directory that is no checkpoint or not a whole one, flags that make it another run, other
rows.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sft.messages import NOTHING_SAVED, Refused, choice, end_by_ctrl_c, note, read_json
from sft.model.directory import ModelDirectory
from sft.model.weight_files import open_tensors
from sft.training.environment import number_of_processes, read_deepspeed_file
from sft.training.save import save_dtype

# Said by each start anew: where things are, and what has no effect.
OF_A_START = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "train_data_file", "model_name_or_path"}
OF_A_START |= {"tokenizer_name_or_path", "any_base", "local_rank", "hub_token", "ddp_timeout", "do_train", "do_eval"}
OF_A_START |= {"do_predict", "complex_data", "use_dummy_data", "model_size", "type_vocab_size", "layer_norm_eps"}
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
NOT_KNOWN = ("eval_split", "model_code", "trainable_params", "train_attention_params_only", "router_aux_loss_coef")


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
    if "plan" in stored:
        return stored["plan"]
    # Of an earlier release or another program: Hugging Face's arguments alone, after their own checks.
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


def go_on_with(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run that goes on: the checkpoint's, and what is given anew.

    Args:
        given: the flags that are given, `resume_from_checkpoint` among them.
        defaults: every flag's default.

    Refuses, in one message with both values, what is given and would make it another run.
    """
    checkpoint = Path(given["resume_from_checkpoint"])
    read_trainer_state(checkpoint)
    plan = read_plan(checkpoint)
    unknown = [f"--{name}" for name in (*MUST_BE_KNOWN, *NOT_KNOWN) if name not in plan and name not in given]
    if needed := [flag for flag in unknown if flag[2:] in MUST_BE_KNOWN]:
        raise Refused(
            f"--resume_from_checkpoint {checkpoint}: was saved by an earlier release or another program and does not "
            f"record {', '.join(needed)}. Give the values that its run had"
        )
    if unknown:
        note(f"{checkpoint} does not record {', '.join(unknown)}: taken as not given")
    asked = {name: value for name, value in given.items() if name not in OF_A_START and not MAY_CHANGE.fullmatch(name)}
    known = dict(plan)
    if "deepspeed" in asked:
        now, then = zero_of(read_deepspeed_file(asked.pop("deepspeed"))), zero_of(plan.get("deepspeed"))
        for part in {"deepspeed"} if now["deepspeed"] != then["deepspeed"] else now.keys() | then.keys():
            asked[part], known[part] = now.get(part, "none"), then.get(part, "none")
    asked["processes"] = number_of_processes()
    both = {name: (spelled(value), spelled(known[name])) for name, value in asked.items() if name in known}
    differ = [f"{'--' * (n in defaults)}{n} {now} (the run: {then})" for n, (now, then) in both.items() if now != then]
    if differ:
        raise Refused(
            f"--resume_from_checkpoint {checkpoint}: these differ from its run: {'; '.join(differ)}. Leave a flag out "
            f"to keep the run's value. To begin a new run from the weights: --model_name_or_path {checkpoint}"
        )
    for flag, winner in (("num_train_epochs", "max_steps"), ("gradient_checkpointing", "activation_checkpointing")):
        if flag in given:  # the run's would win over it
            plan.pop(winner, None)
    return defaults | {n: v for n, v in plan.items() if n in defaults and n not in OF_A_START} | given


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
    resume = training.resume_from_checkpoint
    known = read_plan(Path(resume)) if resume else {}
    hashes = examples.rows.data.column("row_hash").to_numpy()[examples.index]
    now = {name: figures[name] for name in ("num_rows", "num_examples")} | {"rows_checksum": zlib.crc32(hashes)}
    for name, value in now.items():
        if known.get(name, value) != value:
            raise Refused(f"--train_data_file: {name}: {value} (the run: {known[name]}): these are not the run's rows")
    training.plan |= now


# ------------------------------------------------------------------------------------------------ the checkpoint


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's trainer_state.json; refuses a directory that has none."""
    file = checkpoint / "trainer_state.json"
    state = read_json(file) if file.is_file() else {}
    if not {"global_step", "log_history"} <= set(state) or (checkpoint / "train_results.json").exists():
        why = "it has no whole trainer_state.json" if checkpoint.is_dir() else "no such directory"
        inner = max(checkpoint.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
        why = f"it is a run's directory: give {inner}" if inner else why
        raise Refused(f"--resume_from_checkpoint {checkpoint}: is not a checkpoint ({why})")
    return state


def take_up(args, training: TrainingArguments) -> str | None:
    """With --resume_from_checkpoint, take model and tokenizer from there; an adapter's base from its config if none is
    given.

    Returns the checkpoint's directory, or None.
    """
    if training.resume_from_checkpoint is None:
        if args.use_lora and args.model_name_or_path is None:
            raise Refused("--use_lora: an adapter needs a model: give --model_name_or_path")
        return None
    directory = Path(training.resume_from_checkpoint)
    if not args.use_lora:
        given = Path(args.model_name_or_path or directory, "config.json")
        kinds = [read_json(file).get("model_type") for file in (given, directory / "config.json") if file.is_file()]
        if len(set(kinds)) > 1:
            raise Refused(f"--model_name_or_path {given.parent}: is a {kinds[0]}, the checkpoint is a {kinds[1]}")
        args.model_name_or_path = str(directory)
    else:
        open_tensors(directory / "adapter_model.safetensors")
        if args.model_name_or_path is None:
            args.model_name_or_path = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        if args.model_name_or_path is None:
            raise Refused(f"{directory}: its adapter_config.json names no base: give --model_name_or_path")
    args.tokenizer_name_or_path = args.tokenizer_name_or_path or str(directory)
    return str(directory)


def check_training_state(directory: str, args: TrainingArguments) -> None:
    """Refuse a checkpoint that lacks a part of the training's state: the Trainer would begin it afresh and not say so.

    The optimiser's, the scheduler's, each rank's random state. What torch.save writes is a zip file, which ends in a
    table: one that is cut has none.
    """
    checkpoint, advice = Path(directory), "To begin anew from its weights, give it as --model_name_or_path"
    deepspeed, world_size = bool(args.deepspeed), args.world_size
    engine = args.hf_deepspeed_config.config if deepspeed else {}
    here = range(world_size)  # the ranks whose states are on this disk
    if args.save_on_each_node:
        first = args.process_index - args.local_process_index
        here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    ranks = [""] if world_size == 1 else [f"_{rank}" for rank in here]
    own_scheduler = engine.get("scheduler") or engine.get("optimizer")  # then it is in the engine's states
    needed = [] if own_scheduler else [checkpoint / "scheduler.pt"]
    needed += [*(checkpoint / f"rng_state{rank}.pth" for rank in ranks)]
    if not deepspeed:
        needed.insert(0, checkpoint / "optimizer.pt")
    elif (checkpoint / "latest").is_file():
        states = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
        needed += [states, *states.glob("*.pt")]
        number = len(list(states.glob("*optim_states.pt")))
        fits = number == world_size or args.save_on_each_node and number == len(here)
        if states.is_dir() and not fits and engine.get("zero_optimization", {}).get("stage", 0) > 0:
            raise Refused(
                f"--resume_from_checkpoint {directory}: holds the optimizer states of {number} of {len(here)} ranks. "
                + advice
            )
    else:
        needed.insert(0, checkpoint / "latest")
    for file in needed:
        why = "missing" if not file.exists() else "not whole"
        if why == "missing" or not (file.is_dir() or zipfile.is_zipfile(file)):
            raise Refused(f"--resume_from_checkpoint {directory}: {file.name} is {why}. {advice}")
    note(f"going on from {directory}: weights, optimiser, scheduler, data position and random state")


def steps_left(checkpoint: str, args: TrainingArguments, num_examples: int, given: frozenset[str]) -> int:
    """Optimizer steps from a checkpoint to the end that its run planned, or that is given; refuses one that lacks a
    part of the training's state, if there are any."""
    state = read_trainer_state(Path(checkpoint))
    end = state["max_steps"]
    if given & {"max_steps", "num_train_epochs"}:  # counted as the Trainer counts them
        whole = math.floor if args.dataloader_drop_last else math.ceil
        batches = whole(whole(num_examples / args.per_device_train_batch_size) / args.world_size)
        epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        end = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    if end > state["global_step"]:
        check_training_state(checkpoint, args)
    return max(0, end - state["global_step"])


def finish_from(
    checkpoint: Path, args: TrainingArguments, companions: ModelDirectory, base: str | None, figures: dict
) -> None:
    """Write the final files of a run whose last step is in `checkpoint`: no step is left to make.

    Args:
        base: what an adapter's files are to name as its base; None: as in the checkpoint.
        figures: for train_results.json, beside the step and the mean loss.
    """
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    state = read_trainer_state(checkpoint)
    best = checkpoint.with_name(Path(state.get("best_model_checkpoint") or checkpoint).name)
    weights = best if args.load_best_model_at_end and best.is_dir() else checkpoint
    adapter = (checkpoint / "adapter_config.json").is_file()
    dtype = torch.float32 if adapter else save_dtype(args)
    for file in weights.glob("*.safetensors"):
        save_file(companions.cast(load_file(file), dtype), output / file.name, metadata={"format": "pt"})
    for name in ("config.json", "model.safetensors.index.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, output / name)
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("base.json", "path")):
        if (checkpoint / name).is_file():
            content = read_json(checkpoint / name) | ({key: base} if base else {})
            text = json.dumps(content, indent=2 if name == "adapter_config.json" else None)
            (output / name).write_text(text, encoding="utf-8")
    companions.write(output, None if adapter else dtype)
    shutil.copyfile(checkpoint / "trainer_state.json", output / "trainer_state.json")
    if not (output / "train_results.json").exists():
        losses = losses_so_far(state)
        figures |= {"global_step": state["global_step"], "train_loss": losses["logged"] + losses["unlogged"]}
        figures["train_loss"] /= state["global_step"]
        (output / "train_results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ what goes on


def losses_so_far(state: dict[str, Any]) -> dict[str, float]:
    """Of a trainer_state.json: the sums of its steps' losses until the last logging step and since, and that step."""
    if kept := state.get("stateful_callbacks", {}).get("GoOn"):
        return kept["attributes"]
    total, last = 0.0, 0  # of an earlier release: the losses since are not known, and counted as the mean
    for entry in (entry for entry in state["log_history"] if "loss" in entry):
        total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
    step = state["global_step"]
    return {"logged": total * step / max(last, 1), "unlogged": 0.0, "last_logged": step}


def follow_schedule(scheduler: Any, step: int, max_steps: int) -> None:
    """Give the optimizer the rate that the schedule now has for the next step, and say so where it was another: the
    Trainer would take the checkpoint's once more."""
    if not hasattr(scheduler, "lr_lambdas"):  # it follows the loss, or is DeepSpeed's own
        return
    before, scheduler.last_epoch = scheduler.get_last_lr()[0], scheduler.last_epoch - 1
    scheduler.step()
    if (now := scheduler.get_last_lr()[0]) != before:
        choice("next learning rate", f"{now:.4g}", f"step {step + 1} of {max_steps}; as it was planned {before:.4g}")


class GoOn(TrainerCallback, ExportableState):
    """What the Trainer forgets at a checkpoint: losses that are not logged yet, intervals that are given anew. At
    Ctrl-C, what was saved last and the command that goes on."""

    def __init__(self, trainer: transformers.Trainer, train_data_file: list[str]):
        self.trainer, self.train_data_file, self.saved = trainer, train_data_file, None

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps, as losses_so_far() returns it."""
        kept = {"logged": "_total_loss_scalar", "unlogged": "unlogged", "last_logged": "_globalstep_last_logged"}
        return {"args": {}, "attributes": {name: getattr(self.trainer, own, 0) for name, own in kept.items()}}

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Put back what a checkpoint kept, follow this start's schedule and intervals, and wait for Ctrl-C."""
        if state.global_step:
            losses, trainer = losses_so_far(vars(state)), self.trainer
            trainer._total_loss_scalar, trainer._globalstep_last_logged = losses["logged"], losses["last_logged"]
            trainer._tr_loss += losses["unlogged"]
            follow_schedule(getattr(lr_scheduler, "scheduler", lr_scheduler), state.global_step, state.max_steps)
        for callback in self.trainer.callback_handler.callbacks:  # one that the checkpoint does not know
            if isinstance(callback, ExportableState):
                state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        state.compute_steps(args, state.max_steps)  # the Trainer takes the checkpoint's intervals
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as under nohup
            end, begin = os.pipe()
            os.set_blocking(begin, False)
            signal.set_wakeup_fd(begin, warn_on_full_buffer=False)
            signal.signal(signal.SIGINT, lambda *_: None)
            threading.Thread(target=self.wait, args=(end, args, state), daemon=True).start()

    def wait(self, end: int, args: TrainingArguments, state: TrainerState) -> None:
        """Until Ctrl-C. In a thread: the main one may be in a collective, which does not end once a peer has gone."""
        while os.read(end, 1)[0] != signal.SIGINT:
            pass
        end_by_ctrl_c(f"at step {state.global_step}", self.command(args) if self.saved else NOTHING_SAVED)

    def on_save(self, args, state, control, **kwargs):
        self.saved = str(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def command(self, args: TrainingArguments) -> str:
        """What was saved last, and the command that goes on from it: train.sh where that has started us."""
        if args.save_only_model:
            return f"Last checkpoint: {self.saved}, without optimizer state (--save_only_model)"
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        launcher = "python" if args.world_size == 1 else f"torchrun --nproc_per_node {ranks}"
        begin = os.environ.get("GO_ON_WITH") or f"{launcher} {shlex.quote(sys.argv[0])}"
        flags = ["--resume_from_checkpoint", self.saved, "--train_data_file", *self.train_data_file]
        flags += ["--output_dir", args.output_dir]
        return f"Last checkpoint: {self.saved}. Continue with:\n{begin} {shlex.join(flags)}"
