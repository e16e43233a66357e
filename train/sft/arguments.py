"""What can be set: three dataclasses, read from the command line or from a yaml or json file.

Refused here (exit code 2): an unknown flag or key, a value of the wrong type or outside its range, a configuration
file or DeepSpeed file that does not parse, a device that torch cannot use, a DeepSpeed value that contradicts a flag.
"""

import argparse
import difflib
import json
import os
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import transformers
import yaml
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations

from sft.messages import Refused, choice, note
from sft.training.environment import choose_device, join_the_others, meet_on_cpus, read_deepspeed_file
from sft.training.resume import go_on_with, plan_of


def option(default=None, text: str = "", factory=None):
    """A dataclass field with its help text."""
    if factory is not None:
        return field(default_factory=factory, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def yes_no(text: str):
    """A flag that may be given with or without a value, or not at all (None)."""
    return field(default=None, metadata={"help": text, "nargs": "?", "const": True})


@dataclass
class ModelArguments:
    """Which model is trained, how it is built, and which part of it."""

    model_name_or_path: str | None = option(None, "Model directory. Not given: built from the architecture flags.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer directory. Default: the model's.")
    trust_remote_code: bool | None = yes_no(
        "Run the code that the directory brings. Default: true for a local directory, false for a hub id."
    )
    model_code: Literal["auto", "native", "remote"] = option(
        "auto", "auto: transformers' own class where it computes the same model, the directory's code otherwise."
    )
    use_flash_attn: bool = option(False, "Variable-length FlashAttention, from the flash_attn package (CUDA only).")
    cache_dir: str | None = option(None, "Where models of a hub id are kept once downloaded.")

    # Architecture of a model built from scratch. None: what the class does by itself.
    hidden_size: int = option(2048, "Width of the hidden states.")
    num_layers: int = option(24, "Number of decoder layers.")
    num_attention_heads: int = option(16, "Attention heads a layer.")
    num_key_value_heads: int | None = option(None, "Key and value heads a layer. Default: num_attention_heads.")
    intermediate_size: int = option(8192, "Width of the MLP, and of each expert.")
    max_position_embeddings: int | None = option(None, "Positions the model is made for. Default: model_max_length.")
    model_max_length: int = option(4096, "Positions, where max_position_embeddings is not given.")
    vocab_size: int | None = option(None, "Size of the vocabulary. Default: the tokenizer's.")
    tie_word_embeddings: bool = option(True, "Input and output embeddings are one tensor.")
    use_qk_norm: bool | None = yes_no("Normalise queries and keys: always so in this class.")
    num_experts: int = option(1, "Experts a layer; above 1 the model is a hunyuan_v1_moe, else a hunyuan_v1_dense.")
    moe_topk: int = option(1, "Experts a token is sent to.")
    num_shared_expert: int | None = option(None, "Experts that every token is sent to: 1 in this class.")
    use_mixed_mlp_moe: bool | None = yes_no("A shared expert beside the routed ones: always so in this class.")
    moe_intermediate_size: int | None = option(None, "Width of an expert: must equal intermediate_size in this class.")
    moe_layer_num_skipped: int = option(0, "First layers without experts: 0 in this class.")
    use_cla: bool = option(False, "Cross-layer attention (Hunyuan-Large): not in this class, refused.")
    cla_share_factor: int | None = option(None, "Layers that share keys and values: has no effect without use_cla.")

    # What is trained.
    use_lora: bool = option(False, "Train a low-rank adapter (LoRA) and leave the model as it is.")
    lora_rank: int = option(64, "Rank of the adapter.")
    lora_alpha: int = option(128, "The adapter's output is scaled by alpha / rank.")
    lora_dropout: float = option(0.0, "Dropout on the adapter's input, from 0 to 1.")
    lora_target_modules: list[str] | None = option(
        None, "Names of modules, all-linear, shared_mlp or experts. Default: the attention's projections."
    )
    use_rslora: bool = option(False, "Scale the adapter by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = option(False, "Train the magnitudes of the weights' columns beside the adapter (DoRA).")
    any_base: bool = option(False, "Resume an adapter on another base than the one that it was trained on.")
    trainable_params: str | None = option(None, "Regular expression: train the parameters whose names it is found in.")
    train_attention_params_only: bool = option(False, "Train the attention layers and nothing else.")
    make_moe_param_leaf_module: bool = option(
        False, "Under ZeRO-3, gather an MoE layer's parameters at once (for experts that only some ranks use)."
    )
    router_aux_loss_coef: float = option(
        0.0, "Weight of the routers' load-balancing loss, which is added to the loss of a mixture of experts."
    )

    # Of older scripts; see old_flags().
    model_size: str | None = option(None, "No effect: the chat format is the tokenizer's own.")
    type_vocab_size: int | None = option(None, "No effect: these models have no token types.")
    layer_norm_eps: float | None = option(None, "No effect: these models have no LayerNorm.")

    hub_ids: ClassVar[dict[str, str]] = {}  # {directory: the hub id whose files were fetched into it}
    given = frozenset()  # the flags that this start was given

    def __post_init__(self):
        at_least(self, 1, "hidden_size", "num_layers", "num_attention_heads", "intermediate_size", "lora_rank")
        at_least(self, 1, "num_experts", "moe_topk", "model_max_length", "lora_alpha", "vocab_size")
        at_least(self, 1, "num_key_value_heads", "max_position_embeddings")
        at_least(self, 0, "router_aux_loss_coef")
        if self.trainable_params is not None:
            if self.use_lora or self.train_attention_params_only:
                raise Refused("--trainable_params: not beside --use_lora or --train_attention_params_only")
            try:
                re.compile(self.trainable_params)
            except re.error as error:
                raise Refused(f"--trainable_params {self.trainable_params}: {error}") from error
        if not 0 <= self.lora_dropout < 1:
            raise Refused(f"--lora_dropout {self.lora_dropout}: must be at least 0 and below 1")


@dataclass
class DataArguments:
    """Which rows are trained on, and how they become batches."""

    train_data_file: list[str] = option(text="jsonl files or globs, one conversation a line.", factory=list)
    max_seq_length: int = option(4096, "Tokens a row at most; what is beyond is cut off.")
    eval_data_file: list[str] = option(text="jsonl files or globs to evaluate on.", factory=list)
    eval_split: float | None = option(
        None, "Share of the training rows that is split off to evaluate on, by row hash."
    )
    train_on: Literal["all", "last"] = option(
        "all", 'Supervised turns: all, or those after the last user message. Never one with "weight": 0.'
    )
    overlong: Literal["truncate", "drop", "error"] = option("truncate", "What is done with a row over max_seq_length.")
    bad_rows: Literal["error", "skip"] = option(
        "error", "error: end before the model is loaded. skip: leave them out."
    )
    packing: Literal["none", "batch", "bin"] = option(
        "none",
        "none: pad to the longest row of the batch. batch: lay its rows end to end, no padding. "
        "bin: pack rows into bins of max_seq_length tokens; a batch and an epoch count bins.",
    )
    preprocessing_num_workers: int | None = option(
        None, "Processes that tokenize. Default: one a core, for large files."
    )
    complex_data: str | None = option(None, "No effect: every row may have any number of turns.")
    use_dummy_data: bool = option(False, "No effect: `bash train.sh` with nothing set is the run to try.")

    def __post_init__(self):
        at_least(self, 2, "max_seq_length")
        at_least(self, 1, "preprocessing_num_workers")
        if self.eval_split is not None and not 0 < self.eval_split < 1:
            raise Refused(f"--eval_split {self.eval_split}: must be above 0 and below 1")
        if self.eval_split is not None and self.eval_data_file:
            raise Refused("--eval_split and --eval_data_file: one of them")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """All of Hugging Face's TrainingArguments, with our defaults, and what older scripts pass beside them."""

    report_to: None | str | list[str] = option("tensorboard", "Where the curves go: tensorboard, wandb, none, ….")
    logging_nan_inf_filter: bool = option(False, "Hide a non-finite loss in the log. Off: such a loss ends the run.")
    eval_strategy: str | None = option(
        None, "When to evaluate: no, steps, epoch. Default: when a checkpoint is saved, where there are rows for it."
    )
    per_device_eval_batch_size: int | None = option(None, "Default: per_device_train_batch_size.")
    min_lr: float = option(0.0, "Lowest learning rate after the warmup, absolute; with any scheduler.")
    overwrite_output_dir: bool = option(False, "Set an earlier run in output_dir aside, in previous-<time>/.")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better metric_for_best_model (default: the loss)."
    )
    probe_file: str | None = option(
        None, "jsonl of conversations whose last answer is known: answered before and after training, and scored."
    )

    # Of older scripts; see old_flags().
    warmup_ratio: float | None = option(None, "Warmup as a share of all steps; the same as --warmup_steps below 1.")
    group_by_length: bool = option(False, "Batches of rows of similar length (--train_sampling_strategy).")
    logging_dir: str | None = option(None, "Where TensorBoard's files go. Default: output_dir/runs/<time>.")
    save_safetensors: bool | None = yes_no("No effect: weights are always saved as safetensors.")

    plan = None  # what a checkpoint says of its run; see resume.py

    def __getstate__(self) -> dict:
        """For training_args.bin: without a token."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def __post_init__(self):
        if self.output_dir is None:
            raise Refused("--output_dir is not given: say where the run's files go")
        at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        at_least(self, 0, "learning_rate", "min_lr", "warmup_steps", "num_train_epochs", "weight_decay", "seed")
        if self.min_lr > self.learning_rate:
            raise Refused(f"--min_lr {self.min_lr:g} is above --learning_rate {self.learning_rate:g}")
        at_least(self, 1, "early_stopping_patience")
        if self.deepspeed is not None:
            self.deepspeed = read_deepspeed_file(self.deepspeed)
        join_the_others(self)
        choose_device(self)
        old_flags(self)
        if self.lr_scheduler_type in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
            own = self.lr_scheduler_kwargs or {}
            own = json.loads(own) if isinstance(own, str) else dict(own)
            if "min_lr_rate" not in own:
                # a rate: under ZeRO-3 the absolute one asks the optimiser for what it has not
                own["min_lr_rate"] = own.pop("min_lr", self.min_lr) / (self.learning_rate or 1)
            self.lr_scheduler_kwargs = own
        meet_on_cpus(self)
        super().__post_init__()
        if self.deepspeed and self.use_cpu:  # before a ZeRO-3 model is built, else DeepSpeed sees a world of one
            import deepspeed

            deepspeed.init_distributed("gloo")
        missing = set(self.report_to) - set(get_available_reporting_integrations())
        if missing:
            raise Refused(
                f"--report_to {' '.join(sorted(missing))}: not known or not installed (pip install it, or none)"
            )
        if self._n_gpu > 1:  # nn.DataParallel would split the batch's one-dimensional tensors
            choice("GPUs used", f"1 of {self._n_gpu}", "plain python runs one process; torchrun or train.sh uses all")
            self._n_gpu = 1
        if self.deepspeed and self.hf_deepspeed_config.mismatches:
            raise Refused(
                'the DeepSpeed file contradicts the flags (its easiest value is "auto"): '
                + "; ".join(m.removeprefix("- ds ") for m in self.hf_deepspeed_config.mismatches)
            )


def at_least(arguments: object, least: float, *names: str) -> None:
    """Refuse a numeric field below `least`; None (not given) passes."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise Refused(f"--{name} {value}: must be at least {least}")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise Refused(message.removeprefix("argument "))


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read `--flag value …`, or `config.yaml` / `config.json`, optionally followed by flags that win over it.

    Raises Refused with the flag or key and, for an unknown one, the nearest that exists.
    """
    launcher = [arg for arg in argv[:1] if arg.startswith("--local_rank=")]  # deepspeed puts it in front
    argv = argv[len(launcher) :]
    if argv and not argv[0].startswith("-"):
        argv = config_file_as_flags(argv[0]) + argv[1:]
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)
    if not {"-h", "--help"} & set(argv):  # which shows the defaults
        for action in parser._actions:
            action.default = argparse.SUPPRESS
    namespace, unknown = parser.parse_known_args(launcher + argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, known, n=1)
        raise Refused(f"unknown argument {flag}" + (f": did you mean {near[0]}?" if near else ""))
    given, flags = vars(namespace), [f for cls in parser.dataclass_types for f in fields(cls) if f.init]
    values = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in flags}
    resumed = given.get("resume_from_checkpoint") is not None
    values = go_on_with(given, values) if resumed else values | given
    chosen = dict(values)
    choose_evaluation(chosen)
    try:
        model, data, training = (
            cls(**{f.name: chosen[f.name] for f in fields(cls) if f.init}) for cls in parser.dataclass_types
        )
    except Refused:
        raise
    except Exception as error:  # what TrainingArguments and DeepSpeed's configuration refuse themselves
        raise Refused(f"{' '.join(str(error).split())} ({type(error).__name__})") from error
    model.given, training.plan = frozenset(given), plan_of(values, training)
    again = training.activation_checkpointing_kwargs or {}
    if model.router_aux_loss_coef and training.activation_checkpointing and again.get("use_reentrant"):
        raise Refused("--router_aux_loss_coef: gets no gradient with use_reentrant in --gradient_checkpointing_kwargs")
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    zero3 = training.deepspeed and training.hf_deepspeed_config.is_zero3()
    if zero3 and not model.use_lora and not training.hf_deepspeed_config.get_value(gather):
        raise Refused(f"--deepspeed: {gather} must be true, else the final directory has no weights")
    return model, data, training


def choose_evaluation(values: dict) -> None:
    """With rows to evaluate on, evaluate when a checkpoint is saved, unless told otherwise; refuse what needs such
    rows where there are none."""
    batch_size, saving = values["per_device_train_batch_size"], str(values["save_strategy"])
    values["per_device_eval_batch_size"] = values["per_device_eval_batch_size"] or batch_size
    rows = values["eval_data_file"] or values["eval_split"] is not None
    needing = {"eval_strategy": values["eval_strategy"] not in (None, "no"), "save_strategy": saving == "best"}
    needing |= {name: bool(values[name]) for name in ("early_stopping_patience", "load_best_model_at_end")}
    if not rows and any(needing.values()):
        name = next(name for name, needs in needing.items() if needs)
        raise Refused(f"--{name}: there are no rows to evaluate on: --eval_data_file or --eval_split")
    if any(needing.values()) and values["metric_for_best_model"] is None:
        values["metric_for_best_model"] = "loss"
    if values["metric_for_best_model"] not in (None, "loss", "eval_loss"):
        raise Refused(f"--metric_for_best_model {values['metric_for_best_model']}: the loss is what is measured")
    if values["eval_strategy"] is None:
        values["eval_strategy"] = "no"
        if rows:
            values["eval_strategy"] = saving if saving in ("steps", "epoch") else "epoch"
            choice("eval_strategy", values["eval_strategy"], "there are rows to evaluate on")
    if values["eval_strategy"] == "steps" and values["eval_steps"] is None:
        values["eval_steps"] = values["save_steps"]
        choice("eval_steps", f"{values['eval_steps']:g}", "as save_steps")
    if values["packing"] == "bin" and values["group_by_length"]:
        raise Refused("--group_by_length with --packing bin: bins are equally full, there is nothing to group")


def config_file_as_flags(path: str) -> list[str]:
    """The keys of a yaml or json file as command-line flags, so that both are checked alike."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read ({type(error).__name__}); flags begin with --") from error
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise Refused(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise Refused(f"{path}: must hold keys and values, the flags without their dashes")
    flags = []
    for key, value in values.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def old_flags(args: TrainingArguments) -> None:
    """Do what flags did that transformers 5 renamed or dropped."""
    name_checkpointing(args)
    if args.warmup_ratio is not None:
        if not 0 <= args.warmup_ratio < 1:
            raise Refused(f"--warmup_ratio {args.warmup_ratio}: must be at least 0 and below 1")
        if args.warmup_steps not in (0, args.warmup_ratio):
            note("--warmup_ratio has no effect: --warmup_steps is given")
        else:
            args.warmup_steps = args.warmup_ratio
    if args.group_by_length:
        args.train_sampling_strategy = "group_by_length"
    if args.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = args.logging_dir


def name_checkpointing(args: TrainingArguments) -> None:
    """Take --gradient_checkpointing for --activation_checkpointing, its name in transformers 5.23. 5.17 knows the old
    name alone, so there both are set. Goes when 5.17 is no longer tried."""
    if not hasattr(transformers.TrainingArguments, "activation_checkpointing"):
        args.activation_checkpointing = args.gradient_checkpointing
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs
        return
    if args.gradient_checkpointing is not None and args.activation_checkpointing is None:
        args.activation_checkpointing = args.gradient_checkpointing
    if args.gradient_checkpointing_kwargs is not None and args.activation_checkpointing_kwargs is None:
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs
    args.gradient_checkpointing = args.gradient_checkpointing_kwargs = None


def note_without_effect(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Say, once each, which given flags of older scripts have no effect, and why."""
    for group, names in (
        (model, ("model_size", "type_vocab_size", "layer_norm_eps")),
        (data, ("complex_data", "use_dummy_data")),
        (training, ("save_safetensors",)),
    ):
        for f in fields(group):
            if f.name in names and getattr(group, f.name) not in (None, False):
                note(f"--{f.name}: {f.metadata['help'][0].lower()}{f.metadata['help'][1:]}")
    if training.save_safetensors is False:
        note("--save_safetensors False: no effect: weights are always saved as safetensors")
