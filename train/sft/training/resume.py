"""Going on from a checkpoint: what a run starts from, whether a checkpoint is whole, the end of a finished run.

Refused (exit code 2): a directory that is no checkpoint or not a whole one, another base than an adapter's, another
tokenizer than the checkpoint's.
"""

import json
import math
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainingArguments

from sft.arguments import DataArguments, ModelArguments
from sft.data.tokenized import tokenizer_digest
from sft.messages import Refused, choice, note, read_json
from sft.model.adapter_base import base_digest, check_base
from sft.model.directory import ModelDirectory
from sft.model.files import ADAPTER_FILE, write_json
from sft.model.generations import report_code
from sft.model.hub import fetch
from sft.model.load import check_flash_attention, check_own_code, open_directory
from sft.model.pretrained import load_tokenizer
from sft.model.weight_files import INDEX, open_tensors
from sft.training.choose import fault_on_any_rank, kind_of
from sft.training.environment import ranks_of_this_disk
from sft.training.go_on import losses_so_far
from sft.training.output_dir import has_stopped_early, read_if_whole
from sft.training.progress import Meter
from sft.training.record import compare, record_start
from sft.training.reshard import check_shards, saved_by, shards_in
from sft.training.save import save_dtype


@dataclass
class Start:
    """What a run starts from: a model directory and its tokenizer; if it goes on, its checkpoint and the best one."""

    directory: ModelDirectory
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Path | None
    best: Path | None = None


def find_start(args: ModelArguments, data: DataArguments, training: TrainingArguments) -> Start:
    """What the flags name, opened and checked; hub ids are fetched."""
    fetch(args)
    named = args.model_name_or_path
    checkpoint = find_checkpoint(args, training)
    fetch(args)  # the base that a resumed adapter names
    directory = open_directory(args)
    if training.use_liger_kernel:
        check_liger(directory)
    if args.use_flash_attn:
        check_flash_attention(training, data.packing)
    if args.adapter:
        choice("adapter", args.adapter, f"of the base {named}; the training begins at step 0 from it")
    adapter = checkpoint if args.use_lora and checkpoint else args.adapter
    if adapter:
        check_base(adapter, directory, args.any_base)
    elif args.any_base:
        note("--any_base has no effect: no adapter is loaded")
    check_own_code(directory, data.packing, training.label_smoothing_factor)
    report_code(directory)
    tokenizer = load_tokenizer(directory.tokenizer_path, directory.tokenizer_trusted)
    rows = directory.config.get("vocab_size", len(tokenizer))
    if len(tokenizer) > rows:
        why = f"has {len(tokenizer)} tokens, and the embedding of {directory.name} {rows} rows: another model's?"
        raise Refused(f"{directory.tokenizer_path}: the tokenizer {why} --tokenizer_name_or_path names the right one")
    if checkpoint and "tokenizer_name_or_path" in args.given and "tokenizer" not in training.record:
        training.record["tokenizer"] = tokenizer_digest(load_tokenizer(checkpoint, directory.tokenizer_trusted))
    record_start(training, directory, tokenizer)
    if not args.use_lora and not checkpoint:  # an adapter has base.json
        training.record["base"] = base_digest(directory) if directory.path else None
    elif not args.use_lora and named and Path(named).resolve() != Path(str(checkpoint)).resolve():
        base = open_directory(replace(args, model_name_or_path=named))
        what = f"--model_name_or_path {named}: is not the base of the run"
        compare(training.record, "base", base_digest(base), what, training.resume_anyway)
    return Start(directory, tokenizer, checkpoint, find_best(checkpoint, training) if checkpoint else None)


def check_liger(directory: ModelDirectory) -> None:
    """Refuse a model that Liger's kernels would leave as it is, with no more than a warning."""
    kind = directory.config.get("model_type", "hunyuan_v1_moe")  # one that is built from flags
    if directory.runs_own_code or kind not in ("hunyuan_v1_dense", "hunyuan_v1_moe"):
        what = "the code that its directory brings" if directory.runs_own_code else kind
        raise Refused(f"--use_liger_kernel: liger-kernel has none for {what}. Leave it out")


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's trainer_state.json; refuses a directory that has none."""
    state, is_run = read_if_whole(checkpoint / "trainer_state.json"), (checkpoint / "train_results.json").exists()
    if is_run or not {"global_step", "log_history"} <= state.keys():
        why = "it has no whole trainer_state.json" if checkpoint.is_dir() else "no such directory"
        why = "it is a run's directory without checkpoints" if is_run else why
        raise Refused(f"--resume_from_checkpoint {checkpoint}: is not a checkpoint ({why})")
    return state


def find_checkpoint(args: ModelArguments, training: TrainingArguments) -> Path | None:
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
        args.model_name_or_path = str(directory)
    else:
        open_tensors(directory / ADAPTER_FILE)
        if args.model_name_or_path is None:
            args.model_name_or_path = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        if args.model_name_or_path is None:
            raise Refused(f"{directory}: its adapter_config.json names no base: give --model_name_or_path")
    args.tokenizer_name_or_path = args.tokenizer_name_or_path or str(directory)
    return directory


def find_best(checkpoint: Path, args: TrainingArguments) -> Path | None:
    """The best checkpoint of the run so far: beside the one that it goes on from, because the run's directory may have
    been moved or copied, else where it was saved. None where there is none. All ranks must call.

    Refuses one that --load_best_model_at_end may have to load and that is gone or not whole; with --resume_anyway a
    line says so.
    """
    saved = read_trainer_state(checkpoint).get("best_model_checkpoint")
    if saved is None or Path(saved).name == checkpoint.name:
        return saved and checkpoint
    places = [path.with_name(Path(saved).name) for path in (checkpoint, checkpoint.resolve())]
    best = next((place for place in (*places, Path(saved)) if place.is_dir()), places[0])
    if best.is_dir() and best.resolve() != Path(saved).resolve():
        choice("best checkpoint", best, f"it was saved as {saved}")
    fault = fault_on_any_rank(best, vars(args)) if args.load_best_model_at_end else None
    if fault is None or kind_of(best) == kind_of(checkpoint) == "foreign":  # it was asked for
        return best if best.is_dir() else None
    what = f"{best}: is the run's best checkpoint and is not whole: {fault[0]}: {fault[1]}"
    deleted = args.auto_resume and not best.is_dir()  # by the rotation after a newer checkpoint, which is damaged
    if not args.resume_anyway and not deleted:
        raise Refused(f"{what}. To go on without it: --load_best_model_at_end false, or --resume_anyway")
    note(f"not exact: {what}" if deleted else f"--resume_anyway: not exact: {what}")
    return None


def check_training_state(checkpoint: Path, args: TrainingArguments) -> None:
    """Refuse a checkpoint that lacks a part of the training's state: the Trainer would begin it afresh and not say so.

    The optimiser's, the scheduler's, each rank's random state. What torch.save writes is a zip file, which ends in a
    table: one that is cut has none.
    """
    advice = "To begin anew from its weights, give it as --model_name_or_path"
    engine = args.hf_deepspeed_config.config if args.deepspeed else {}
    before, here = saved_by(checkpoint, args.world_size), ranks_of_this_disk(args)
    needed = [checkpoint / ("latest" if engine else "optimizer.pt")]
    if not (engine.get("scheduler") or engine.get("optimizer")):  # else it is in the engine's states
        needed.append(checkpoint / "scheduler.pt")
    if before == args.world_size:
        needed += [checkpoint / ("rng_state.pth" if before == 1 else f"rng_state_{rank}.pth") for rank in here]
    elif engine:
        check_shards(checkpoint, args)
    if engine and needed[0].is_file():
        states = checkpoint / needed.pop(0).read_text(encoding="utf-8").strip()
        needed += [states, *states.glob("*.pt")]
        number, stage = len(shards_in(checkpoint)), engine.get("zero_optimization", {}).get("stage", 0)
        if states.is_dir() and stage > 0 and number not in (before, len(here)):
            what = f"holds the optimizer states of {number} of {len(here)} ranks"
            raise Refused(f"--resume_from_checkpoint {checkpoint}: {what}. {advice}")
    for file in needed:
        why = "missing" if not file.exists() else "not whole"
        if why == "missing" and args.resume_anyway and not engine:
            note(f"--resume_anyway: not exact: {file.name} is missing: begun afresh")
        elif why == "missing" or not (file.is_dir() or zipfile.is_zipfile(file)):
            raise Refused(f"--resume_from_checkpoint {checkpoint}: {file.name} is {why}. {advice}")
    note(f"going on from {checkpoint}: weights, optimiser, scheduler, data position and random state")


def steps_left(checkpoint: Path, args: TrainingArguments, num_examples: int, given: frozenset[str]) -> int:
    """Optimizer steps from a checkpoint to the end that its run planned, or that is given; refuses one that lacks a
    part of the training's state, if there are any. `given`: the flags that are given anew."""
    state = read_trainer_state(checkpoint)
    end = state["max_steps"]
    if given & {"max_steps", "num_train_epochs"}:  # counted as the Trainer counts them
        whole = math.floor if args.dataloader_drop_last else math.ceil
        batches = whole(whole(num_examples / args.per_device_train_batch_size) / args.world_size)
        epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        end = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    if has_stopped_early(state, args):
        note(f"{checkpoint}: early stopping has ended the run; a greater --early_stopping_patience goes on")
        return 0
    if end > state["global_step"]:
        check_training_state(checkpoint, args)
    return max(0, end - state["global_step"])


def write_final_files(start: Start, args: TrainingArguments, any_base: bool, figures: dict[str, Any]) -> None:
    """Write the final files of a run whose last step is in the checkpoint that it goes on from: no step is left to
    make. All ranks must call.

    Args:
        any_base: an adapter's files go on naming the base that the checkpoint names, and not the one that is used.
        figures: for train_results.json, beside the step and the mean loss.
    """
    checkpoint, directory, output = Path(start.checkpoint or ""), start.directory, Path(args.output_dir)
    state = read_trainer_state(checkpoint)
    note(f"{checkpoint} is the end of a finished run: no step is left, its final files are written")
    if not args.should_save:
        return
    output.mkdir(parents=True, exist_ok=True)
    weights = start.best if args.load_best_model_at_end and start.best else checkpoint
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    dtype = torch.float32 if is_adapter else save_dtype(args)
    total_size = 0
    for file in weights.glob("*.safetensors"):
        open_tensors(file)  # refuses one that is cut
        saved = directory.cast(load_file(file), dtype)
        total_size += sum(value.nbytes for value in saved.values())
        save_file(saved, output / file.name, metadata={"format": "pt"})
    if (weights / INDEX).is_file():
        index = read_json(weights / INDEX)
        write_json(output / INDEX, index | {"metadata": index.get("metadata", {}) | {"total_size": total_size}})
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("base.json", "path")):
        if (checkpoint / name).is_file():
            content = read_json(checkpoint / name) | ({} if any_base else {key: directory.base_name})
            text = json.dumps(content, indent=2 if name == "adapter_config.json" else None)
            (output / name).write_text(text, encoding="utf-8")
    directory.write(output, None if is_adapter else dtype)
    for name in ("trainer_state.json", "training_args.bin"):
        shutil.copyfile(checkpoint / name, output / name)
    if read_if_whole(output / "train_results.json").get("global_step") != state["global_step"]:
        losses = losses_so_far(state)
        mean = (losses["logged"] + losses["unlogged"]) / state["global_step"]
        results = {"global_step": state["global_step"], "train_loss": mean}
        write_json(output / "train_results.json", figures | dict.fromkeys(Meter.FIGURES) | results)
