"""What a saved directory holds: weights in the dtype that the precision rule says, and all that makes it stand alone.

A full checkpoint gets what the base directory has beside its weights (config, tokenizer, chat template, code), byte
for byte but for the dtype in config.json. Saving a tokenizer anew is avoided: that of the released A13B writes a file
name that it does not read again.

Refused (exit code 2): an output directory that holds another run, or that is or holds the model to train.
"""

import fcntl
import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion

from sft.messages import Refused, note, read_json
from sft.model.weight_files import CORRECTION_BIAS, apply_umask, model_files, open_tensors, read_tensors, some

RUN_FILES = ("checkpoint-*", "*.safetensors*", "config.json", "adapter_config.json", "train*_results.json")
RUN_FILES += ("trainer_state.json", "base.json")
MODEL_MARKS = ("config.json", "adapter_config.json", "tokenizer_config.json", "*.safetensors", "pytorch_model*.bin")
LOCK = ".lock"
locks = {}  # {path: open file}, for as long as this process lives


# ------------------------------------------------------------------------------------------------- an earlier run


def check_output_dir(args: TrainingArguments, model_path: str | None, tokenizer_path: str | None) -> bool:
    """Refuse an output directory that is a file, holds another run, or that overwriting would take the model from.

    Returns whether there is an earlier run to set aside, once the new one is about to begin.
    """
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise Refused(f"--output_dir {output}: is a file")
    resumed = args.resume_from_checkpoint and Path(args.resume_from_checkpoint).resolve().parent == output.resolve()
    for flag, path in (("model", model_path), ("tokenizer", tokenizer_path)):
        if path is None or resumed or not Path(path).exists():
            continue
        if Path(path).resolve().is_relative_to(output.resolve()) and args.overwrite_output_dir:
            raise Refused(
                f"--{flag}_name_or_path {path}: lies in --output_dir, which --overwrite_output_dir would move"
            )
        if Path(path).resolve() == output.resolve():
            raise Refused(f"--output_dir {output}: is the {flag}'s own directory, its files would be overwritten")
    if resumed:
        return False
    held = sorted(file.name for mark in MODEL_MARKS for file in output.glob(mark))
    runs = (output / "train_results.json").exists() or any(output.glob("checkpoint-*"))
    if held and not runs and not (output / LOCK).exists():
        raise Refused(
            f"--output_dir {output}: contains a model that no run has written ({some(held)}). It would be "
            "overwritten: choose another directory"
        )
    if not held and not runs:
        return False
    if not args.overwrite_output_dir:
        raise Refused(
            f"--output_dir {output}: holds another run. Choose another directory, go on with it "
            "(--resume_from_checkpoint), or set it aside (--overwrite_output_dir)"
        )
    return True


def lock_output_dir(args: TrainingArguments, begin: bool = False) -> None:
    """Refuse an output directory that another job writes to, and keep others out until this process ends. All ranks
    must call.

    The kernel holds the lock (flock), on a file that stays. It is made when the run is about to `begin`.
    """
    path, why = Path(args.output_dir, LOCK), None
    if args.should_save and path not in locks and (begin or path.exists()):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            locks[path] = open(path, "a")  # noqa: SIM115
            fcntl.flock(locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locks.pop(path).close()
            why = f"--output_dir {path.parent}: another running job uses it. Choose another directory, or end that job"
        except OSError as error:
            if path not in locks:
                why = f"--output_dir {path.parent}: cannot be written ({error.strerror})"
            else:
                note(f"{path.parent}: is not locked, its file system has no locks ({error.strerror})")
    ranks = [why] * args.world_size
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(ranks, why)
    if any(ranks):
        raise Refused(next(filter(None, ranks)))


def set_aside(output_dir: Path) -> None:
    """Move an earlier run's checkpoints, final model and results into `previous-<time>/`; logs and curves stay."""
    aside = output_dir / time.strftime("previous-%Y%m%d-%H%M%S")
    aside.mkdir()
    for pattern in RUN_FILES:
        for file in list(output_dir.glob(pattern)):
            file.rename(aside / file.name)
    note(f"--overwrite_output_dir: the earlier run in {output_dir} was moved to {aside}")


# ------------------------------------------------------------------------------------------------ what is written


def save_dtype(args: TrainingArguments) -> torch.dtype:
    """The dtype of the final model: half precision where a flag asks for it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def as_stored(
    model: PreTrainedModel, state: dict[str, torch.Tensor], stored: dict[str, str]
) -> dict[str, torch.Tensor]:
    """The state by the names of the base's files; what they hold in another form, experts one by one, as transformers
    takes it apart.

    Args:
        stored: {name in the model: name in the base's files}.
    """
    known = {stored[name]: value for name, value in state.items() if name in stored}
    others = {name: value for name, value in state.items() if name not in stored}
    return known | (revert_weight_conversion(model, others) if others else {})


def master_values(model: PreTrainedModel, names: set[str], keep: bool) -> dict[str, torch.Tensor]:
    """The named parameters' fp32 values from the optimiser of ZeRO, on the CPU of the ranks that `keep` them. All
    ranks must call."""
    from deepspeed.utils import safe_get_full_fp32_param

    values = {}
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        value = safe_get_full_fp32_param(parameter)  # collective
        if keep and value is not None:
            values[name] = value.detach().float().cpu()
    return values


def gathered_state(model: PreTrainedModel, keep: bool) -> dict[str, torch.Tensor]:
    """The whole state under ZeRO-3, on the CPU of the ranks that `keep` it; DeepSpeed's own way gives it to rank 0
    alone. A parameter at a time. All ranks must call."""
    import deepspeed

    state = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    if keep:
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state |= {name: buffer.cpu() for name, buffer in model.state_dict().items() if name not in names}
    return state


def write_on_this_rank(model: PreTrainedModel) -> None:
    """Let save_pretrained write weights where the caller is, for --save_on_each_node: transformers 5.23 does so on
    global rank 0 alone. Goes with the release that asks for the node (tests/unit/test_arguments.py says when)."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process


def name_states(checkpoint: Path) -> None:
    """Write `latest`, from which DeepSpeed finds its states: 0.19.8 does so on global rank 0 alone, on a node's own
    disk too. Goes with the release that does it on every node."""
    states = sorted(checkpoint.glob("global_step*"))
    if states and not (checkpoint / "latest").exists():
        (checkpoint / "latest").write_text(states[-1].name, encoding="utf-8")


@dataclass
class Companions:
    """What a saved directory gets beside its weights. Read once, at the start: the directory that it comes from may be
    a checkpoint that is rotated away before the run ends.

    Attributes:
        files: name → content of the files of a model in the tokenizer's directory and the base's, weights and config
            left out.
        config: the base's config.json; None: the config stays as transformers saves it.
        names: its tensors.
        fp32_names: those that stay fp32 in a half-precision directory: what the base keeps so beside weights in half
            precision (a router), and the correction bias of Hy3 and Hy4.
        unused: those of next-token-prediction layers, which transformers' classes do not have.
        sources: the opened file of each of both.
    """

    files: dict[str, bytes]
    config: dict | None = None
    names: frozenset[str] = frozenset()
    fp32_names: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    sources: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, base: str | None, tokenizer_path: str) -> "Companions":
        """Of the tokenizer's directory and the base's, where there is one."""
        found = model_files(Path(tokenizer_path))
        if base and Path(base).is_dir() and not Path(base).samefile(tokenizer_path):
            # the tokenizer's own files win: --tokenizer_name_or_path may be another directory than the base
            found = model_files(Path(base)) | found
        files = {name: path.read_bytes() for name, path in found.items()}
        if base is None or not Path(base).is_dir():
            return cls(files)
        config = read_json(Path(base) / "config.json")
        tensors = read_tensors(Path(base))[1] if any(Path(base).glob("*.safetensors")) else {}
        names, fp32 = set(tensors), {name for name, tensor in tensors.items() if tensor.dtype == "F32"}
        if (Path(base) / "kept_in_fp32.json").is_file():  # a checkpoint of a run without DeepSpeed: all of it is fp32
            fp32 = set(read_json(Path(base) / "kept_in_fp32.json")["tensors"])
        elif (config.get("dtype") or config.get("torch_dtype") or "float32") == "float32":
            fp32 = {name for name in fp32 if name.endswith(CORRECTION_BIAS)}
        layers = config.get("num_hidden_layers") or math.inf
        beyond = {name for name in names if name.startswith("model.mtp_layers.")}
        beyond |= {n for n in names if (layer := re.match(r"model\.layers\.(\d+)\.", n)) and int(layer[1]) >= layers}
        opened = {file: open_tensors(Path(base) / file) for file in {tensors[name].file for name in beyond | fp32}}
        sources = {name: opened[tensors[name].file] for name in beyond | fp32}
        return cls(files, config, frozenset(names), frozenset(fp32), frozenset(beyond), sources)

    def cast(self, state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Floating-point tensors of a file in `dtype`, but for `fp32_names`, which are fp32, and `unused`."""
        kept = dict.fromkeys(self.fp32_names | {n for n in state if n.endswith(CORRECTION_BIAS)}, torch.float32)
        cast = {name for name, value in state.items() if value.is_floating_point()} - self.unused
        return {n: value.to("cpu", kept.get(n, dtype)) if n in cast else value for n, value in state.items()}

    def base_values(self, names: set[str]) -> dict[str, torch.Tensor]:
        """The base's own values of the named tensors."""
        return {name: self.sources[name].get_tensor(name) for name in names}

    def write(self, directory: Path, dtype: torch.dtype | None, masters: bool = False) -> None:
        """Put the files beside weights of `dtype`; None for an adapter, which has no config. `masters`: the weights
        are fp32 although the base is not."""
        apply_umask(directory)
        for name, content in self.files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        if masters and self.fp32_names:
            text = json.dumps({"tensors": sorted(self.fp32_names)}, indent=2) + "\n"
            (directory / "kept_in_fp32.json").write_text(text, encoding="utf-8")
        if dtype is None:
            return
        config = dict(self.config or json.loads((directory / "config.json").read_text(encoding="utf-8")))
        if self.config is None:
            config["use_cache"] = True  # off in the Trainer, wanted where the model is used
        for key in {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}:
            config[key] = str(dtype).removeprefix("torch.")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
