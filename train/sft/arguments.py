"""What can be set: three dataclasses. parser.py reads them, checks.py looks at the values.

Refused here (exit code 2): a DeepSpeed file that contradicts the flags, a reporter that is not installed.
"""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Literal, cast

import transformers
from transformers.integrations import get_available_reporting_integrations

from sft.messages import Refused, is_secret, masked


def option(default: Any = MISSING, text: str = "", factory: Any = MISSING) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, default_factory=factory, metadata={"help": text})


def yes_no(text: str, const: Any = True) -> Any:
    """A flag that may be given with a value, without one (`const`), or not at all (None)."""
    return field(default=None, metadata={"help": text, "nargs": "?", "const": const})


@dataclass
class ModelArguments:
    """Which model is trained, how it is built, and which part of it."""

    model_name_or_path: str | None = option(
        None, "A model, an adapter, or a hub id. Not given: built from the architecture flags."
    )
    tokenizer_name_or_path: str | None = option(None, "Tokenizer directory. Default: the model's.")
    trust_remote_code: bool | None = yes_no("Run code that a directory brings. Default: a local one's, no hub id's.")
    model_code: Literal["auto", "native", "remote"] = option(
        "auto", "auto: transformers' class where it computes the same model."
    )
    use_flash_attn: bool = option(False, "Variable-length FlashAttention, from the flash_attn package (CUDA only).")
    cache_dir: str | None = option(None, "Where models of a hub id are kept once downloaded.")

    # None: what the class does by itself.
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
    num_experts: int = option(1, "Experts a layer; above 1: hunyuan_v1_moe, else hunyuan_v1_dense.")
    moe_topk: int = option(1, "Experts a token is sent to.")
    num_shared_expert: int | None = option(None, "Experts that every token is sent to: 1 in this class.")
    use_mixed_mlp_moe: bool | None = yes_no("A shared expert beside the routed ones: always so in this class.")
    moe_intermediate_size: int | None = option(None, "Width of an expert: must equal intermediate_size in this class.")
    moe_layer_num_skipped: int = option(0, "First layers without experts: 0 in this class.")
    use_cla: bool = option(False, "Cross-layer attention (Hunyuan-Large): not in this class, refused.")
    cla_share_factor: int | None = option(None, "Layers that share keys and values: has no effect without use_cla.")

    use_lora: bool = option(False, "Train a low-rank adapter (LoRA) and leave the model as it is.")
    lora_rank: int = option(64, "Rank of the adapter.")
    lora_alpha: int = option(128, "The adapter's output is scaled by alpha / rank.")
    lora_dropout: float = option(0.0, "Dropout on the adapter's input, from 0 to 1.")
    lora_target_modules: list[str] | None = option(
        None, "Module names, all-linear, shared_mlp or experts. Default: attention projections."
    )
    use_rslora: bool = option(False, "Scale the adapter by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = option(False, "Train the magnitudes of the weights' columns beside the adapter (DoRA).")
    load_in_4bit: bool = option(False, "With --use_lora: keep the frozen base in 4 bits, fused experts included.")
    any_base: bool = option(False, "Train an adapter on another base than the one that it was trained on.")
    trainable_params: str | None = option(None, "Regular expression: train the parameters in whose names it is found.")
    train_attention_params_only: bool = option(False, "Train the attention layers and nothing else.")
    make_moe_param_leaf_module: bool = option(False, "Under ZeRO-3, gather an MoE layer's parameters at once.")
    router_aux_loss_coef: float = option(0.0, "Weight of the routers' load-balancing loss.")

    hub_ids: ClassVar[dict[str, str]] = {}  # {directory: the hub id whose files were fetched into it}
    given = frozenset[str]()  # the flags that this start was given
    adapter = cast(Any, None)  # the directory of one to begin from; model_name_or_path is then its base


@dataclass
class DataArguments:
    """Which rows are trained on, and how they become batches."""

    train_data_file: list[str] = option(text="jsonl files or globs, one conversation a line.", factory=list)
    max_seq_length: int = option(4096, "Tokens a row at most; what is beyond is cut off.")
    eval_data_file: list[str] = option(text="jsonl files or globs to evaluate on.", factory=list)
    eval_split: float | None = option(None, "Share of the training rows to split off and evaluate on, by row hash.")
    train_on: Literal["all", "last"] = option("all", "Supervised turns: all, or those after the last user message.")
    history: Literal["as_written", "answers"] = option("as_written", "Earlier turns: as they are, or answers alone.")
    overlong: Literal["truncate", "drop", "error"] = option("truncate", "What is done with a row over max_seq_length.")
    bad_rows: Literal["error", "skip"] = option("error", "End before the model is loaded, or leave them out.")
    packing: Literal["none", "batch", "bin"] = option("none", "Pad, lay a batch's rows end to end, or fill bins.")
    preprocessing_num_workers: int | None = option(
        None, "Processes that tokenize. Default: one a core, for large files."
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """All of Hugging Face's TrainingArguments, with our defaults, and what older scripts pass beside them."""

    min_lr: float = option(0.0, "Lowest learning rate after the warmup, absolute; with any scheduler.")
    resume_from_checkpoint: str | None = yes_no(
        "A checkpoint, or a run: goes on. No value: output_dir's, or the newest run.", const=""
    )
    auto_resume: bool = option(False, "Go on from the newest whole checkpoint in output_dir, if there is one.")
    resume_anyway: bool = option(False, "Go on although it is not exact: other rows, batches, rates, missing state.")
    overwrite_output_dir: bool = option(False, "Set an earlier run in output_dir aside, in previous-<time>/.")
    eval_strategy: str | None = option(
        None, "no, steps or epoch. Default: as checkpoints are saved, where there are rows."
    )
    per_device_eval_batch_size: int | None = option(None, "Rows. Default: per_device_train_batch_size.")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better metric_for_best_model."
    )
    probe_file: str | None = option(None, "jsonl of conversations; asked before and after training, and scored.")
    report_to: list[str] = option(
        text="Where the curves go: tensorboard (default), wandb, none, ….", factory=lambda: ["tensorboard"]
    )
    activation_offload: bool = option(False, "With --gradient_checkpointing: keep the layers' inputs in host memory.")
    verify_checkpoints: bool = option(False, "Hash optimizer files above 1 GB whole: when saved and when resumed.")
    include_num_input_tokens_seen: str = field(
        default="no", metadata={"help": "Log the tokens so far: all, non_padding or no.", "nargs": "?", "const": "all"}
    )
    liger_kernel_config: str | None = option(None, "Which of Liger's kernels are used, as a JSON object.")
    logging_nan_inf_filter: bool = option(False, "Hugging Face's. A non-finite loss ends the run all the same.")

    warmup_ratio: float | None = option(None, "Warmup as a share of all steps; the same as --warmup_steps below 1.")
    group_by_length: bool = option(False, "Batches of rows of similar length (--train_sampling_strategy).")
    logging_dir: str | None = option(None, "Where TensorBoard's files go. Default: output_dir/runs/<time>.")

    record = dict[str, Any]()  # what run.json says of the run; see training/record.py

    def __getstate__(self) -> dict:
        """For training_args.bin: without secrets, and what holds DeepSpeed's configuration once more."""
        left_out = {"record", "hf_deepspeed_config", "deepspeed_plugin"}
        return {k: masked(v) for k, v in vars(self).items() if k not in left_out and not is_secret(k)}

    def to_dict(self) -> dict[str, Any]:
        """For TensorBoard and the like: without secrets."""
        return masked(super().to_dict())

    def __post_init__(self):
        super().__post_init__()
        if self.activation_offload:
            given = getattr(self, "activation_checkpointing_kwargs", None) or {}  # 5.17: try_out refuses
            self.activation_checkpointing_kwargs = given | {"offload": True}
        missing = set(self.report_to) - set(get_available_reporting_integrations())
        if missing:
            names = " ".join(sorted(missing))
            raise Refused(f"--report_to {names}: not known or not installed (pip install it, or none)")
        if self.deepspeed and self.hf_deepspeed_config.mismatches:
            mismatches = [mismatch.removeprefix("- ds ") for mismatch in self.hf_deepspeed_config.mismatches]
            raise Refused(
                'the DeepSpeed file contradicts the flags (its easiest value is "auto"): ' + "; ".join(mismatches)
            )


GROUPS = (ModelArguments, DataArguments, TrainingArguments)


def settable() -> list[Field]:
    """The field of every flag that is read, in the order of the three dataclasses."""
    return [f for cls in GROUPS for f in fields(cls) if f.init]


def defaults() -> dict[str, Any]:
    """Every flag's default; a new one where it can be changed."""
    read: list[Any] = settable()
    return {f.name: f.default_factory() if f.default is MISSING else f.default for f in read}
