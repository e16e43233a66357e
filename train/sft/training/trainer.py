"""Hugging Face's Trainer and what we add: the count of tokens, `--min_lr` with every scheduler, grouping by known
lengths, the watches on routers and on what is not finite, an `eval_loss` over all supervised tokens, and complete
saved directories."""

import contextlib
from pathlib import Path

import torch
import transformers
from torch.utils.data import SequentialSampler
from transformers.integrations import is_deepspeed_zero3_enabled

from sft.data.batches import FILLING, NO_ROW, Filled, FilledAtTheEnd, GroupedByLength
from sft.data.examples import IGNORE_INDEX
from sft.messages import Refused, choice
from sft.model.directory import ModelDirectory
from sft.model.files import write_json
from sft.model.head import Head
from sft.model.load import without_adapter
from sft.model.moe import Routers, moe_layers
from sft.model.pretrained import load_pretrained
from sft.model.weight_files import is_transformers_own, names_in_model
from sft.training import save
from sft.training.disk import Reporter, checkpoint_bytes, saving
from sft.training.finite import FiniteWatch
from sft.training.manifest import RUN, RestOfSave, remove
from sft.training.progress import Meter
from sft.training.rates import keep_above_lowest, report_warmup
from sft.training.reshard import OtherRanks


class Trainer(OtherRanks):
    """transformers.Trainer.

    Args:
        meter: counts tokens and seconds.
        companions: what a saved directory gets beside its weights. The tokenizer is among it, and not handed on as
            `processing_class`: the Trainer would change the special tokens in the model's config after it.
        head: see loss.py.
        router_aux_loss_coef: see model/moe.py.
    """

    def __init__(
        self,
        *args,
        meter: Meter,
        companions: ModelDirectory,
        head: Head | None = None,
        router_aux_loss_coef: float = 0.0,
        **kwargs,
    ):
        training_args: transformers.TrainingArguments = kwargs["args"]
        if kwargs.get("eval_dataset") is not None:
            ranks_batch = training_args.world_size * training_args.eval_batch_size
            kwargs["eval_dataset"] = Filled(kwargs["eval_dataset"], ranks_batch)
        if training_args.ddp_find_unused_parameters is None and is_transformers_own(without_adapter(kwargs["model"])):
            # DDP need not search the graph at each step. Each trained parameter of these classes gets a gradient:
            # their experts are fused, and load_model freezes Hy4's indexer.
            training_args.ddp_find_unused_parameters = False
        # The Trainer's rotation goes by mtime: after a clock change it deletes the newest.
        self.save_total_limit, training_args.save_total_limit = training_args.save_total_limit, None
        training_args.remove_unused_columns = False  # the rows' numbers are for us
        super().__init__(*args, **kwargs)
        handler = self.callback_handler
        handler.callbacks = [Reporter(c) if "integration" in type(c).__module__ else c for c in handler.callbacks]
        self.meter, self.head = meter, head
        self.finite = FiniteWatch(self)
        self.rest_of_save = RestOfSave()
        self.companions = companions
        companions.hold()
        self.masters: dict[str, torch.Tensor] = {}  # on the saving rank while it saves, see masters_to_save
        self.unlogged = 0.0
        self.add_callback(meter)
        self.add_callback(self.finite)
        self.routers = self.make_routers(router_aux_loss_coef)
        if companions.unused and not self.is_adapter:
            why = "layers for next-token prediction, which the class does not have: saved as the base has them"
            choice("tensors copied", len(companions.unused), why)
        found = {} if self.is_adapter else names_in_model(self.model, companions.tensors)
        self.stored = {name: files[0] for name, files in found.items() if len(files) == 1}

    def make_routers(self, coefficient: float) -> Routers | None:
        """What watches the routers; None where there are none, or where nothing shows what it sees."""
        reported = bool(self.args.report_to)
        if not moe_layers(self.model) or not (coefficient or reported):
            return None
        routers = Routers(self.model, coefficient, report_load=reported)
        self.callback_handler.callbacks.insert(0, routers)  # before those that report
        return routers

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step, whose tokens are counted."""
        batches, num_items_in_batch = super().get_batch_samples(self.meter.timed(epoch_iterator), num_batches, device)
        numbers = [batch.pop("numbers") for batch in batches]
        self.finite.begin_step([[number for number in part if number != NO_ROW] for part in numbers])
        self.meter.count(batches, filling=FILLING * sum(part.count(NO_ROW) for part in numbers))
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss, with `--router_aux_loss_coef` the load-balancing loss included. That is divided by the number of
        micro-batches, because their gradients are summed (those of the ranks are averaged)."""
        nothing = contextlib.nullcontext()
        watched = self.routers.watch(inputs.get("attention_mask")) if self.routers and model.training else nothing
        with watched, self.head.knows(inputs["shift_labels"]) if self.head else nothing:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training:
            return (loss, outputs) if return_outputs else loss
        if self.routers and self.routers.coefficient:
            balance = self.routers.loss()
            if self.model_accepts_loss_kwargs or self.compute_loss_func:  # else the Trainer divides
                balance = balance / self.current_gradient_accumulation_steps
            loss = loss + balance
        loss = self.finite.keep(loss)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm, after whose check the step is made or not."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.finite.check(None if norm is None else float(norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, besides, the load-balancing loss that `loss` contains; at the end the mean loss of the whole run, the
        steps before a resume included. All ranks must call."""
        if self.routers and self.routers.coefficient and "loss" in logs:
            logs["router_aux_loss"] = self.routers.mean_loss()
        if "train_loss" in logs:
            self.gather_unlogged()
            # the Trainer has added what rank 0 has not logged; all ranks' mean takes its place
            total = self._total_loss_scalar - self._tr_loss.item() + self.unlogged
            logs["train_loss"] = total / self.state.global_step
        super().log(logs, start_time)

    def get_train_dataloader(self):
        """The Trainer's. Where an epoch's rows do not go into the ranks' batches, the last ones are filled up with
        sequences that have no supervised token; accelerate would take the first rows twice."""
        rows, args, size = self.train_dataset, self.args, self._train_batch_size
        filled = Filled(rows, size * args.world_size)
        fits = args.world_size == 1 or len(filled) == len(rows)
        if fits or args.dataloader_drop_last or args.label_smoothing_factor:
            return super().get_train_dataloader()
        loader = self._get_dataloader(filled, "", size, lambda _: self._get_train_sampler(rows), is_training=True)
        batches = loader.batch_sampler.batch_sampler  # of all ranks
        batches.sampler = FilledAtTheEnd(batches.sampler, filled)
        return loader

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        rows_a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return GroupedByLength(rows_a_step, dataset.lengths.tolist(), self.args.seed)

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # with --group_by_length the Trainer would read every row first

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The batch's loss. Its sum over supervised tokens is kept for evaluation_loop."""
        del inputs["numbers"]
        supervised = inputs["labels"].ne(IGNORE_INDEX).sum().item()
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if supervised:
            self.evaluated += torch.tensor([loss.item() * supervised, supervised], dtype=torch.float64)
        return loss.nan_to_num(), None, None  # nan: no token is supervised

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """The Trainer's output, with the loss as the mean over all supervised tokens of all ranks; the Trainer itself
        takes the mean of the batches' means. All ranks must call."""
        self.evaluated = torch.zeros(2, dtype=torch.float64)  # sum of the losses, supervised tokens
        average = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False  # each batch's own mean
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.args.average_tokens_across_devices = average
        total, supervised = self.accelerator.reduce(self.evaluated.to(self.args.device)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / supervised
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The scheduler, with `--min_lr` as its lowest learning rate."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        keep_above_lowest(scheduler, self.args, num_training_steps)
        report_warmup(self.args, num_training_steps)
        return scheduler

    def gather_unlogged(self) -> None:
        """Keep the sum of the losses since the last logging step. All ranks must call."""
        self.unlogged = self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean().item()

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint and begin to make it whole; where it cannot be written, all ranks end with exit code 1."""
        self.finish_save()
        self.gather_unlogged()
        args, checkpoint = self.args, Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with saving(checkpoint, checkpoint_bytes(self.model, args)):
            if args.should_save:
                remove(checkpoint)  # a torn one, or of a branch that was abandoned
                checkpoint.mkdir()
                write_json(checkpoint / RUN, args.record)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if args.save_on_each_node and args.should_save and self.is_deepspeed_enabled:
                save.write_deepspeed_latest(checkpoint)
            self.rest_of_save.begin(checkpoint, args, self.save_total_limit, self.state.best_model_checkpoint)
        if self.control.should_training_stop or self.finite.stops:
            self.finish_save()

    def finish_save(self) -> None:
        """Wait until the last checkpoint is whole."""
        with saving(self.rest_of_save.checkpoint):
            self.accelerator.wait_for_everyone()  # fails where a rank is gone
            self.rest_of_save.wait(self.args.ddp_timeout)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Do nothing but for FSDP: load_model has read the weights already, and the Trainer would miss the experts."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's. With --resume_anyway weight decay and the like are this start's, and not the checkpoint's."""
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and self.args.resume_anyway and not self.is_deepspeed_enabled:
            for group, values in zip(self.optimizer.param_groups, own, strict=True):
                group.update(values)

    def _load_best_model(self) -> None:
        """Put the best checkpoint's weights into the model. Without ZeRO and adapter from_pretrained reads them: the
        Trainer takes tensors by name and would skip the experts, which are single in the file and fused in the
        model."""
        if self.is_deepspeed_enabled or self.is_adapter:
            return super()._load_best_model()
        code = "native" if is_transformers_own(self.model) else "remote"
        directory = ModelDirectory(self.state.best_model_checkpoint, model_code=code)
        try:
            best = load_pretrained(directory, dtype="auto")
        except Refused as refusal:  # the run has trained: this is a failure, not a refusal
            raise RuntimeError(f"the best checkpoint: {refusal}") from refusal
        self.model.load_state_dict(best.state_dict())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter. The Trainer calls with `_internal_call` for a checkpoint, train.py without it for
        the final model. All ranks must call."""
        self.is_final_save = not _internal_call
        self.masters = self.masters_to_save()  # collective: before rank 0 goes on alone
        try:
            if self.args.save_on_each_node and is_deepspeed_zero3_enabled():
                state = {} if self.is_adapter else save.gathered_state(self.model, self.args.should_save)
                self._save(output_dir, state_dict=state)
            else:
                super().save_model(output_dir, _internal_call)
        finally:
            self.masters = {}

    def masters_to_save(self) -> dict[str, torch.Tensor]:
        """{name in the file: fp32 value} of what is saved in fp32 although ZeRO rounds it: an adapter, and what the
        base keeps in fp32. Empty on ranks that do not save. All ranks must call."""
        if not self.is_deepspeed_enabled:
            return {}
        keep = self.args.should_save
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if self.is_adapter:
            return save.master_values(self.model, trained, keep)
        fp32 = {name for name, stored in self.stored.items() if stored in self.companions.fp32_names}
        masters = save.master_values(self.model, fp32 & trained, keep)
        values = {self.stored[name]: value for name, value in masters.items()}
        if keep:  # frozen tensors have no masters
            values |= self.companions.values({self.stored[name] for name in fp32 - trained})
        return values

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        if self.is_adapter:
            adapter = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
            super()._save(output_dir, {name: self.masters.get(name, p).float() for name, p in adapter.items()})
            return self.companions.write(directory, None)
        saves_masters = not self.is_deepspeed_enabled and not self.is_final_save  # resuming is exact
        dtype = torch.float32 if saves_masters else save.save_dtype(self.args)
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        for tied in getattr(self.model, "all_tied_weights_keys", {}):
            state_dict.pop(tied, None)  # ZeRO-2 hands out both names of a tied tensor
        saved = self.companions.cast(save.with_base_names(self.model, state_dict, self.stored) | self.masters, dtype)
        saved |= self.companions.values(self.companions.unused)
        state_dict.clear()  # the caller holds it too: now each tensor is freed once its part is written
        directory.mkdir(parents=True, exist_ok=True)
        if self.args.save_on_each_node:
            save.write_on_this_rank(self.model)
        self.model.save_pretrained(directory, state_dict=saved, save_original_format=False)
        torch.save(self.args, directory / "training_args.bin")
        self.companions.write(directory, dtype, saves_masters)
