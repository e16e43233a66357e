"""The parser of train.py and of train.sh: flags, or a yaml or json file of them, and --help.

Refused here (exit code 2): an unknown flag or key, a value of the wrong type, a configuration file that does not
parse.
"""

import argparse
import difflib
import json
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
        known = [name for action in parser._actions for name in action.option_strings]
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, known, n=1)
        raise Refused(f"unknown argument {flag}" + (f": did you mean {near[0]}?" if near else ""))
    values = vars(namespace)
    given_secrets.update(value for name, value in values.items() if is_secret(name) and value)
    return values


def with_config_file(argv: list[str]) -> list[str]:
    """A command line whose first word, a yaml or json file, is replaced by its keys as flags: both are checked
    alike."""
    if not argv or argv[0].startswith("-"):
        return argv
    path = argv[0]
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
