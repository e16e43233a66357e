"""The parser of train.py and of train.sh: flags, or a yaml or json file of them, and --help.

Refused here (exit code 2): an unknown flag or key, a value of the wrong type, a configuration file that does not
parse.
"""

import argparse
import difflib
import json
import os
import re
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import transformers
import yaml
from transformers import HfArgumentParser

from sft.arguments import GROUPS, DataArguments, ModelArguments, TrainingArguments, settable
from sft.messages import Refused, given_secrets, is_secret

# Flags of older scripts that nothing reads, and why.
NO_EFFECT = {
    "complex_data": "every row may have any number of turns",
    "use_dummy_data": "`bash train.sh` with nothing set is the run to try",
    "model_size": "the chat format is the tokenizer's own",
    "type_vocab_size": "these models have no token types",
    "layer_norm_eps": "these models have no LayerNorm",
    "save_safetensors": "weights are always saved as safetensors",
}
# Hugging Face's that would change nothing here, and why.
OURS, LOSS = "what a batch has is decided here", "the loss is what an evaluation measures"
IGNORED = dict.fromkeys(("label_names", "remove_unused_columns", "length_column_name"), OURS)
IGNORED |= dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "prediction_loss_only", "do_predict"), LOSS)
IGNORED |= dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), LOSS)
IGNORED |= {"restore_callback_states_from_checkpoint": "a run that goes on always does"}
# What people mean who come from other toolkits, where that is not the nearest in spelling.
MEANT = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size bs micro_batch_size per_gpu_train_batch_size train_batch_size",
    "gradient_accumulation_steps": "grad_accum accumulation_steps gradient_accumulation",
    "num_train_epochs": "epochs epoch num_epochs",
    "max_seq_length": "max_length max_len cutoff_len seq_length seq_len",
    "train_data_file": "data dataset data_path train_file train_data",
    "model_name_or_path": "model model_path model_id",
    "output_dir": "output save_path save_dir out",
    "lora_rank": "rank lora_r r",
    "lora_target_modules": "lora_target target_modules",
    "use_lora": "lora finetuning_type peft",
    "lr_scheduler_type": "scheduler lr_scheduler",
    "warmup_steps": "warmup",
    "optim": "optimizer",
    "resume_from_checkpoint": "resume",
}
PATHS = (
    "model_name_or_path", "tokenizer_name_or_path", "cache_dir", "train_data_file", "eval_data_file", "output_dir",
    "resume_from_checkpoint", "probe_file", "logging_dir", "deepspeed",
)  # fmt: skip
# Their value may be a JSON object; of all but the last also a file of one.
OBJECTS = (
    "accelerator_config", "fsdp_config", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs", "deepspeed", "liger_kernel_config",
)  # fmt: skip


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message.removeprefix("argument "))

    def format_help(self) -> str:
        return help_text()


def make_parser() -> HfArgumentParser:
    """A parser of all flags whose result has those that are given, and no default."""
    parser = _Parser(GROUPS, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    for name in NO_EFFECT:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", default=argparse.SUPPRESS)
    return parser


def parse_flags(argv: list[str]) -> dict[str, Any]:
    """{name: value} of the flags that are given: `--flag value …`, or a yaml or json file, which flags may follow that
    win over it.

    Refuses an unknown flag, with the nearest one that exists, and a value that is not of its type. With --help it
    prints the flags and ends the process.
    """
    launcher = [arg for arg in argv[:1] if arg.startswith("--local_rank=")]  # deepspeed puts it in front
    argv = with_config_file(argv[len(launcher) :])
    parser = make_parser()
    namespace, unknown = parser.parse_known_args(launcher + argv)
    if unknown:
        refuse_unknown(unknown[0], [name for action in parser._actions for name in action.option_strings])
    values = vars(namespace)
    for name in values.keys() & set(PATHS):  # after --flag= a shell leaves it as it is
        path = values[name]
        values[name] = [*map(os.path.expanduser, path)] if isinstance(path, list) else os.path.expanduser(path)
    for name in values.keys() & set(OBJECTS):
        if values[name].startswith("{") or name == "liger_kernel_config":
            try:
                json.loads(values[name])
            except json.JSONDecodeError as error:
                raise Refused(f"--{name} {values[name]}: not a JSON object: {error}") from error
    given_secrets.update(value for name, value in values.items() if is_secret(name) and value)
    return values


def refuse_unknown(word: str, known: list[str]) -> NoReturn:
    """Refuse a word of the command line, with the flag that is meant."""
    if not word.startswith("-"):
        raise Refused(f"{word}: belongs to no flag: the flag before it takes fewer values")
    flag = word.split("=")[0]
    name = flag.strip("-").replace("-", "_")
    meant = [f"--{ours}" for ours, others in MEANT.items() if name in others.split()]
    near = meant or difflib.get_close_matches(flag, known, n=1)
    raise Refused(f"unknown argument {flag}" + (f": did you mean {near[0]}?" if near else ""))


class _Yaml(yaml.SafeLoader):
    """1e-5 is a number, as in YAML 1.2, and `no` the text that --save_strategy takes; dates and 1:30 are texts."""


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for kind, pattern, first in (
    ("bool", "(?i:true|false|on|off)", "tTfFoO"),
    ("int", "[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+[.]|[0-9]*[.][0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{pattern})$"), list(first))


def with_config_file(argv: list[str]) -> list[str]:
    """A command line whose first word, a yaml or json file, is replaced by its keys as flags: both are checked
    alike."""
    if not argv or argv[0].startswith("-"):
        return argv
    path = argv[0]
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.load(text, _Yaml)
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
    return flags + argv[1:]


HEADINGS = {  # first flag of a group: its title
    "model_name_or_path": "Model",
    "hidden_size": "Architecture of a model that is built from scratch",
    "use_lora": "What is trained",
    "train_data_file": "Data",
    "min_lr": "The run",
    "warmup_ratio": "Of older scripts, doing what they did",
}


def help_text() -> str:
    """A line for each flag: ours in groups, then Hugging Face's."""
    by_name = {f.name: f for f in settable()}
    ours = [f.name for f in (*fields(ModelArguments), *fields(DataArguments))]
    ours += [name for name in TrainingArguments.__annotations__ if name in by_name]
    lines = ["usage: bash train.sh    [config.yaml | config.json] [--flag value …]    (variables: at its top)"]
    lines += ["       python train.py  [config.yaml | config.json] [--flag value …]"]
    for name in ours:
        if name in HEADINGS:
            lines += ["", f"{HEADINGS[name]}:"]
        lines.append(help_line(by_name[name]))
    lines += ["", "Of older scripts, without effect:"]
    lines += [f"  {'--' + name:<33} No effect: {why}." for name, why in NO_EFFECT.items()]
    lines += ["", "Hugging Face's TrainingArguments:"]
    theirs = [f for f in fields(transformers.TrainingArguments) if f.init and f.name not in ours]
    lines += [help_line(f, sentences=1) for f in theirs]
    return "\n".join(lines) + "\n"


def help_line(f: Field, sentences: int | None = None) -> str:
    """A flag with its choices, the first `sentences` of its help, and its default where that is a value."""
    choices = get_args(f.type) if getattr(f.type, "__origin__", None) is Literal else ()
    flag = f"--{f.name}" + (f" {{{','.join(choices)}}}" if choices else "")
    text = ". ".join(f.metadata["help"].replace("%%", "%").split(". ")[:sentences])
    default = f.default.value if isinstance(f.default, Enum) else f.default
    if default not in (None, MISSING, False, "") and "Default" not in text:
        text = f"{text.removesuffix('.')} (default {default})."
    return f"  {flag:<33} {text}"
