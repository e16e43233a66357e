"""Going on with another number of processes: the same rows in each step, and the optimizer's shards divided anew.

Each rank copies its parts straight from the old shards. DeepSpeed 0.19.8's own way (universal checkpoints) writes all
of them twice, and under ZeRO-3 gives every group the first one's weight decay and one `step` for all.

Refused (exit code 2): a number of processes with which the steps would have other rows, shards that cannot be divided.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from sft.messages import Refused, choice, note, read_json
from sft.training.manifest import MANIFEST

# What ZeRO's state calls the optimizer's state and the master values, by the stage.
KEYS = {
    2: ("base_optimizer_state", "single_partition_of_fp32_groups"),
    3: ("optimizer_state_dict", "fp32_flat_groups"),
}
Groups = list[dict[Any, int]]  # of each flat tensor of a rank: {what is divided among the ranks: its elements}


# ------------------------------------------------------------------------------------------ the same rows in each step


def steps_for_ranks(record: dict[str, Any], values: dict[str, Any], world_size: int) -> int | None:
    """The gradient_accumulation_steps with which `world_size` processes take the run's rows in each step; None where
    the number of processes is the run's.

    Refuses a number with which that cannot be; with --resume_anyway a line says so, and the result is None.

    Args:
        record: run.json's.
        values: every flag's. Of `gradient_accumulation_steps` and in the record it is what the run began with, unless
            it is given otherwise (--resume_anyway).
    """
    before, batch = record.get("processes", world_size), values["per_device_train_batch_size"]
    if before == world_size:
        return None
    batches = before * values["gradient_accumulation_steps"]
    steps, rest = divmod(batches, world_size)
    planned, sizes = record.get("arguments", {}), ("per_device_train_batch_size", "gradient_accumulation_steps")
    others = [f"--{name} {values[name]}" for name in sizes if values[name] != planned.get(name, values[name])]
    why = ""
    if others:  # with --resume_anyway alone
        why = f"{' and '.join(others)} as given"
    elif rest:
        fit = ", ".join(str(n) for n in range(1, batches + 1) if batches % n == 0)
        why = f"a step has {batches} batches of {batch} rows; numbers of processes that divide it: {fit}"
    elif values["group_by_length"] or values["train_sampling_strategy"] == "group_by_length":
        why = "--group_by_length orders the rows by what one process takes in a step"
    elif values["average_tokens_across_devices"] is False:
        why = "with --average_tokens_across_devices false each process weighs its own tokens"
    elif flag := next((n for n in ("dataloader_drop_last", "label_smoothing_factor") if values[n]), None):
        why = f"with --{flag} an epoch's last step would have other rows"
    if not why:
        choice("gradient_accumulation_steps", steps, f"processes {world_size}, the run {before}: the same rows a step")
        return steps
    text = f"processes {world_size} (the run: {before}): {why}"
    if not values["resume_anyway"]:
        advice = f"Start it with {before} processes, or go on although it is not exact (--resume_anyway)"
        raise Refused(f"--resume_from_checkpoint: {text}. {advice}")
    note(f"--resume_anyway: not exact: {text}")
    return None


def seed_ranks(args: transformers.TrainingArguments, model: transformers.PreTrainedModel, step: int) -> None:
    """Seed this rank by seed, step and rank: the random states that were saved are of other ranks."""
    generator = torch.Generator().manual_seed(args.seed + 7919 * step)
    transformers.set_seed(int(torch.randint(2**32, (args.world_size,), generator=generator)[args.process_index]))
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    if any([*rates, getattr(model.config, "attention_dropout", None), args.neftune_noise_alpha]):
        note("not exact: dropout draws other random numbers than with the run's number of processes")


# ------------------------------------------------------------------------------------------------- DeepSpeed's shards


def shards_in(checkpoint: Path) -> list[Path]:
    """The optimizer's shards in the order of ranks; none without DeepSpeed."""
    latest = checkpoint / "latest"
    states = checkpoint / (latest.read_text(encoding="utf-8").strip() if latest.is_file() else "none")
    return sorted(states.glob("*optim_states.pt"), key=lambda file: (len(file.name), file.name))


def saved_by(checkpoint: Path, default: int) -> int:
    """The number of processes that saved a checkpoint; `default` where no manifest says it."""
    file = checkpoint / MANIFEST
    return read_json(file)["world_size"] if file.is_file() else default


def check_shards(checkpoint: Path, args: transformers.TrainingArguments) -> None:
    """Refuse shards of another number of ranks that cannot be divided anew."""
    zero = args.hf_deepspeed_config.config.get("zero_optimization", {})
    devices = [(zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")]
    before, here, why = saved_by(checkpoint, args.world_size), len(shards_in(checkpoint)), ""
    if zero.get("stage", 0) not in KEYS or "nvme" in devices:
        why = "only ZeRO-2 and ZeRO-3, without NVMe, can go on with another number"
    elif here != before:
        why = f"it holds the optimizer states of {here} ranks, those of the others are on other disks"
    if why:
        raise Refused(
            f"--resume_from_checkpoint {checkpoint}: was saved by {before} processes, these are {args.world_size}: "
            f"{why}. Start it with {before} processes, each where it was, or begin anew from its weights: "
            f"--model_name_or_path {checkpoint}"
        )


def parts_of(groups: Groups, rank: int, ranks: int) -> Iterator[tuple[Any, int, int, int, int]]:
    """(what, number of the flat tensor, start in that, offset in the whole, elements) of each part that a rank has."""
    for flat, group in enumerate(groups):
        start = 0
        for what, numel in group.items():
            part = math.ceil(numel / ranks)
            yield what, flat, start, rank * part, part
            start += part


def saved_groups(shards: list[dict], stage: int, shapes: list[dict]) -> Groups:
    """What the shards hold. ZeRO-3 divides each parameter, ZeRO-2 a group of parameters, laid end to end."""
    if stage == 3:
        return [{name: shape.numel() for name, shape in group.items()} for group in shapes]
    groups: Groups = []
    for flat, padding in enumerate(shards[0]["group_paddings"]):
        names = dict.fromkeys(name for shard in shards for name in shard["param_slice_mappings"][flat])
        groups.append({tuple(names): (len(shards[0][KEYS[2][1]][flat]) + padding) * len(shards)})
    return groups


def own_groups(optimizer: Any, stage: int, ranks: int) -> tuple[Groups, list[torch.Tensor]]:
    """What the ranks hold now, and this rank's flat tensors of master values."""
    names = optimizer.param_names
    if stage == 3:
        groups: Groups = [{names[p]: p.ds_numel for p in group} for group in optimizer.fp16_groups]
        return groups, optimizer.fp32_partitioned_groups_flat
    flats = optimizer.single_partition_of_fp32_groups
    pairs = zip(optimizer.round_robin_bit16_groups, flats, strict=True)
    return [{tuple(names[p] for p in group): len(flat) * ranks} for group, flat in pairs], flats


def read_states(file: Path) -> dict[str, Any]:
    """What DeepSpeed saved in a file, which is mapped and not read as a whole. Runs no code that is in it."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


@torch.no_grad()
def own_shard(optimizer: Any, stage: int, shards: list[dict], shapes: list[dict]) -> dict[str, Any]:
    """What this rank would have saved. The master values are also written to their place.

    Refuses parameters in another order, and a state that is not one number for each weight (an 8-bit optimizer's).
    """
    rank, ranks, (base, masters) = torch.distributed.get_rank(), torch.distributed.get_world_size(), KEYS[stage]
    saved, then = defaultdict(list), saved_groups(shards, stage, shapes)
    for number, shard in enumerate(shards):
        for what, flat, *place in parts_of(then, number, len(shards)):
            saved[what].append((shard[base]["state"].get(flat, {}) | {masters: shard[masters][flat]}, *place))
    now, flats = own_groups(optimizer, stage, ranks)
    if saved.keys() != {what for group in now for what in group}:
        raise Refused("other processes: the optimizer's states are of other parameters, or in another order")
    own = optimizer.state_dict() | {key: shards[0][key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow")}
    for group, values in zip(own[base]["param_groups"], shards[0][base]["param_groups"], strict=True):
        group |= {key: value for key, value in values.items() if key != "params"}
    for what, flat, start, offset, numel in parts_of(now, rank, ranks):
        state = own[base]["state"].setdefault(flat, {})
        for tensors, at, begin, length in saved[what]:
            low = max(offset, begin)
            high = max(low, min(offset + numel, begin + length))
            for key, value in tensors.items():
                if not torch.is_tensor(value) or not value.dim():
                    state.setdefault(key, copy.deepcopy(value))  # the step: each group's own
                    continue
                if len(value) < len(tensors[masters]):
                    raise Refused(f"other processes: the optimizer's {key} is not one number for each weight")
                if key != masters and key not in state:
                    state[key] = torch.zeros_like(flats[flat], dtype=value.dtype)
                part = value[at + low - begin : at + high - begin]
                target = flats[flat] if key == masters else state[key]
                target[start + low - offset :][: len(part)] = part
    return own


def load_shards(engine: Any, checkpoint: Path) -> None:
    """Load DeepSpeed's states from the shards of another number of ranks: its own loader gets the shard that this rank
    would have saved. All ranks must call."""
    optimizer, stage, files = engine.optimizer, int(engine.zero_optimization_stage()), shards_in(checkpoint)
    general = read_states(min(files[0].parent.glob("*model_states.pt")))
    shards = [read_states(file)["optimizer_state_dict"] for file in files]
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    own = own_shard(optimizer, stage, shards, general["param_shapes"])
    optimizer.load_state_dict({torch.distributed.get_rank(): own}, load_from_fp32_weights=True)
    optimizer.checkpoint_event_epilogue() if stage == 3 else optimizer.update_lp_params()
    if engine.lr_scheduler is not None:  # DeepSpeed's own
        engine.lr_scheduler.load_state_dict(general["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, general[name])


class OtherRanks(transformers.Trainer):
    """The Trainer, which also goes on from a checkpoint of another number of processes."""

    def has_other_ranks(self, checkpoint: str | None) -> bool:
        """Whether another number of processes saved the checkpoint."""
        ranks = self.args.world_size
        return checkpoint is not None and saved_by(Path(checkpoint), ranks) != ranks

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not (self.is_deepspeed_enabled and self.has_other_ranks(resume_from_checkpoint)):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_shards(self.model_wrapped, Path(resume_from_checkpoint))
        self._load_optimizer_and_scheduler(resume_from_checkpoint)  # of DeepSpeed only the scheduler
        return prepared

    def _load_rng_state(self, checkpoint):
        if self.has_other_ranks(checkpoint):
            return seed_ranks(self.args, self.model, self.state.global_step)
        super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        if self.is_deepspeed_enabled and self.has_other_ranks(self.state.best_model_checkpoint):
            return load_shards(self.model_wrapped, Path(self.state.best_model_checkpoint))
        super()._load_best_model()
