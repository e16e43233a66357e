"""Hugging Face's Trainer with seven things of ours: real tokens are counted, a lowest learning rate holds for every
scheduler, rows of similar length are found without reading them, the routers' balance is watched, an evaluation's loss
is the mean over its supervised tokens, what is saved follows the precision rule, and each saved directory stands
alone."""

from pathlib import Path

import torch
import transformers
from torch.utils.data import SequentialSampler
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler

from sft.data.batches import Filled
from sft.data.examples import IGNORE_INDEX
from sft.messages import choice
from sft.model.directory import ModelDirectory
from sft.model.moe import Routers, moe_layers
from sft.model.pretrained import load_pretrained
from sft.model.weight_files import is_transformers_own, names_in_model
from sft.training.progress import Meter, stop_if_not_finite
from sft.training.save import (
    gathered_state,
    master_values,
    save_dtype,
    with_base_names,
    write_deepspeed_latest,
    write_on_this_rank,
)

TAKES_MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "reduce_lr_on_plateau", "greedy")


def mean_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross entropy of the next tokens over the supervised ones of the whole step, for models whose own loss is the
    mean of their batch alone. `labels` (batch, length)."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(outputs.logits.device)
    total = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets.ne(IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


class GroupedByLength(LengthGroupedSampler):
    """Another order each epoch, by the seed alone: the same on every rank and after a resume."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class Trainer(transformers.Trainer):
    """transformers.Trainer.

    Args:
        meter: counts tokens and seconds.
        companions: what a saved directory gets beside its weights. The tokenizer is among it, and not handed on as
            `processing_class`: the Trainer would change the special tokens in the model's config after it.
        router_aux_loss_coef: see model/moe.py.
    """

    def __init__(self, *args, meter: Meter, companions: ModelDirectory, router_aux_loss_coef: float = 0.0, **kwargs):
        if kwargs.get("eval_dataset") is not None:
            world = kwargs["args"].world_size * kwargs["args"].eval_batch_size
            kwargs["eval_dataset"] = Filled(kwargs["eval_dataset"], world)
        super().__init__(*args, **kwargs)
        self.meter, self.companions, self.masters, self.unlogged = meter, companions, {}, 0.0
        self.add_callback(meter)
        self.routers = Routers(self.model, router_aux_loss_coef) if moe_layers(self.model) else None
        if self.routers:
            self.callback_handler.callbacks.insert(0, self.routers)  # before those that report
        if companions.unused and not self.is_adapter:
            why = "layers for next-token prediction, which the class does not have: saved as the base has them"
            choice("tensors copied", len(companions.unused), why)
        found = {} if self.is_adapter else names_in_model(self.model, companions.tensors)
        self.stored = {name: files[0] for name, files in found.items() if len(files) == 1}
        if self.args.should_save and self.is_deepspeed_enabled and not self.is_adapter:
            # the engine rounds them, and frozen tensors have no masters to read
            trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
            frozen = {stored for name, stored in self.stored.items() if name not in trained}
            self.masters = companions.values(frozen & companions.fp32_names)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Count what a step really processes."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.meter.count(batches)
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """With --router_aux_loss_coef, the mean over the step's micro-batches of their load-balancing losses is added:
        the ranks' gradients are averaged, the micro-batches' are summed."""
        if not (self.routers and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.routers.watch(inputs.get("attention_mask")):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.routers.coefficient:
            in_whole = self.model_accepts_loss_kwargs or self.compute_loss_func  # else the Trainer divides
            loss = loss + self.routers.loss() / (self.current_gradient_accumulation_steps if in_whole else 1)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The load-balancing loss beside the loss that it is part of; at the end the mean loss of the whole run, its
        steps before a checkpoint included. All ranks must call."""
        if self.routers and self.routers.coefficient and "loss" in logs:
            logs["router_aux_loss"] = self.routers.mean_loss()
        if "train_loss" in logs:
            self.stop_if_not_finite()
            total = self._total_loss_scalar - self._tr_loss.item() + self.unlogged  # the Trainer adds rank 0's share
            logs["train_loss"] = total / self.state.global_step
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return GroupedByLength(size, dataset.lengths.tolist(), self.args.seed)

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Keep the sum over supervised tokens: the Trainer's own figure is a mean of the batches' means."""
        supervised = inputs["labels"].ne(IGNORE_INDEX).sum()
        loss = super().prediction_step(model, inputs, True, ignore_keys)[0]
        if supervised:
            self.evaluated += torch.stack([loss.double().cpu() * supervised.cpu(), supervised.double().cpu()])
        return loss.nan_to_num(), None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """The Trainer's, with the loss as the mean over all supervised tokens of all ranks. All ranks must call."""
        self.evaluated = torch.zeros(2, dtype=torch.float64)
        average, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.args.average_tokens_across_devices = average
        total, supervised = self.accelerator.reduce(self.evaluated.to(self.args.device)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / supervised
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """After the warmup a scheduler's factor f becomes low + (1 - low) f, with low = min_lr / learning_rate."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.min_lr and self.args.lr_scheduler_type not in TAKES_MIN_LR:
            low, warmup = self.args.min_lr / self.args.learning_rate, self.args.get_warmup_steps(num_training_steps)
            scheduler.lr_lambdas = [
                lambda step, factor=factor: factor(step) if step < warmup else low + (1 - low) * factor(step)
                for factor in scheduler.lr_lambdas
            ]
        return scheduler

    def stop_if_not_finite(self) -> None:
        """Look at the losses since the last logging step, and keep their sum. All ranks must call."""
        self.unlogged = self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean().item()
        stop_if_not_finite(self.unlogged, self.state.global_step)

    def _save_checkpoint(self, model, trial) -> None:
        self.stop_if_not_finite()
        super()._save_checkpoint(model, trial)
        if self.args.save_on_each_node and self.args.should_save and self.is_deepspeed_enabled:
            write_deepspeed_latest(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Not a second time: load_model has taken the weights from there, experts that the Trainer misses included."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Without ZeRO and adapter by from_pretrained: the Trainer takes a file's tensors by their names and passes
        over those of the experts, which stand one by one in the file and fused in the model."""
        if self.is_deepspeed_enabled or self.is_adapter:
            return super()._load_best_model()
        code = "native" if is_transformers_own(self.model) else "remote"
        best = load_pretrained(ModelDirectory(self.state.best_model_checkpoint, model_code=code), dtype="auto")
        self.model.load_state_dict(best.state_dict())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter. The Trainer itself calls with `_internal_call` for a checkpoint, train.py without
        for the end."""
        self.is_final_save = not _internal_call
        if self.is_deepspeed_enabled:  # collective: before rank 0 goes on alone
            trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
            if self.is_adapter:
                self.masters = master_values(self.model, trained)
            else:
                fp32 = {name for name in trained if self.stored.get(name) in self.companions.fp32_names}
                self.masters |= {self.stored[name]: value for name, value in master_values(self.model, fp32).items()}
        if self.args.save_on_each_node and is_deepspeed_zero3_enabled():
            state = {} if self.is_adapter else gathered_state(self.model, self.args.should_save)
            return self._save(output_dir, state_dict=state)
        super().save_model(output_dir, _internal_call)

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        if self.is_adapter:
            adapter = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            state_dict = {name: self.masters.get(name, p.detach()).float() for name, p in adapter.items()}
            super()._save(output_dir, state_dict=state_dict)
            return self.companions.write(Path(output_dir or self.args.output_dir), None)
        directory, dtype = Path(output_dir or self.args.output_dir), save_dtype(self.args)
        masters = not self.is_deepspeed_enabled and not self.is_final_save
        if masters:
            dtype = torch.float32  # resuming is exact
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        for tied in getattr(self.model, "all_tied_weights_keys", {}):
            state_dict.pop(tied, None)  # ZeRO-2 hands out both names of a tied tensor
        saved = self.companions.cast(with_base_names(self.model, state_dict, self.stored) | self.masters, dtype)
        saved |= self.companions.values(self.companions.unused)
        state_dict.clear()  # the caller holds it too: its tensors go as their parts are written
        directory.mkdir(parents=True, exist_ok=True)
        if self.args.save_on_each_node:
            write_on_this_rank(self.model)
        self.model.save_pretrained(directory, state_dict=saved, save_original_format=False)
        torch.save(self.args, directory / "training_args.bin")
        self.companions.write(directory, dtype, masters)
