"""What a saved directory holds: the weights in the dtype that the precision rule says, and everything that makes it
stand alone.

A full checkpoint gets what the base directory has beside its weights (config, tokenizer, chat template, code), byte
for byte but for the dtype in config.json. Saving a tokenizer anew is avoided: the released A13B tokenizer writes a
file name that it does not read again.
"""

import json
import math
import shutil
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from console import Refused, note

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
RUN_FILES = ("checkpoint-*", "*.safetensors*", "adapter_config.json", "train_results.json", "trainer_state.json")
NOT_COPIED = (
    "config.json",
    "README.md",
    "adapter_config.json",
    "train_results.json",
    "trainer_state.json",
    "log_*.txt",
    "*.png",
)
NOT_COPIED += ("latest", "zero_to_fp32.py", "zero_to_torch.py")  # of DeepSpeed's checkpoint


def holds_run(output_dir: Path) -> bool:
    """Whether a directory has a run in it that a new one would mix with."""
    return (output_dir / "train_results.json").exists() or any(output_dir.glob("checkpoint-*"))


def set_aside(output_dir: Path) -> None:
    """Move an earlier run's checkpoints, final model and results into `previous-<time>/`; logs and curves stay."""
    aside = output_dir / time.strftime("previous-%Y%m%d-%H%M%S")
    for pattern in RUN_FILES:
        for file in list(output_dir.glob(pattern)):
            aside.mkdir(exist_ok=True)
            file.rename(aside / file.name)
    note(f"--overwrite_output_dir: the earlier run in {output_dir} was moved to {aside}")


def check_output_dir(args: TrainingArguments, model_path: str | None, tokenizer_path: str | None) -> None:
    """Refuse an output directory that holds another run, that is a file, or that overwriting would take the model
    from."""
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise Refused(f"--output_dir {output}: is a file")
    resumed = args.resume_from_checkpoint and Path(args.resume_from_checkpoint).resolve().parent == output.resolve()
    for flag, path in (("model", model_path), ("tokenizer", tokenizer_path)):
        if path is None or resumed or not Path(path).exists():
            continue
        inside = Path(path).resolve().is_relative_to(output.resolve())
        if inside and args.overwrite_output_dir:
            raise Refused(
                f"--{flag}_name_or_path {path}: lies in --output_dir, which --overwrite_output_dir would move"
            )
        if Path(path).resolve() == output.resolve():
            raise Refused(f"--output_dir {output}: is the {flag}'s own directory, its files would be overwritten")
    if holds_run(output) and not resumed:
        if not args.overwrite_output_dir:
            raise Refused(
                f"--output_dir {output}: holds another run. Choose another directory, go on with it "
                "(--resume_from_checkpoint), or set it aside (--overwrite_output_dir)"
            )
        if args.process_index == 0:
            set_aside(output)


# ------------------------------------------------------------------------------------------------ a finished run


def steps_of_run(args: TrainingArguments, num_examples: int) -> int:
    """Optimizer steps that the arguments ask for, counted as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    round_up = math.floor if args.dataloader_drop_last else math.ceil
    batches = round_up(round_up(num_examples / args.per_device_train_batch_size) / args.world_size)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def last_step(checkpoint: str) -> int:
    """The step that a checkpoint was written at."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def finish_from(checkpoint: Path, args: TrainingArguments, base: str | None, tokenizer_path: str, tokenizer) -> None:
    """Write the final files of a run whose last step is in `checkpoint`: no step is left to make."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    adapter = (checkpoint / "adapter_config.json").is_file()
    dtype = torch.float32 if adapter else save_dtype(args)
    for file in checkpoint.glob("*.safetensors"):
        save_file(cast(load_file(file), dtype, fp32_tensors(base)), output / file.name, metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, output / name)
    complete_directory(output, base or str(checkpoint), tokenizer_path, tokenizer, None if adapter else dtype)
    shutil.copyfile(checkpoint / "trainer_state.json", output / "trainer_state.json")
    if not (output / "train_results.json").exists():
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        figures = {"global_step": state["global_step"], "train_loss": sum(losses) / len(losses) if losses else None}
        (output / "train_results.json").write_text(json.dumps(figures, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------- what is written


def save_dtype(args: TrainingArguments) -> torch.dtype:
    """The dtype of the final model: half precision where a flag asks for it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def fp32_tensors(base: str | None) -> set[str]:
    """Names of the tensors that a half-precision base keeps in fp32 (a router, Hy3's correction bias)."""
    if base is None or not Path(base).is_dir():
        return set()
    config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    if (config.get("dtype") or config.get("torch_dtype") or "float32") == "float32":
        return set()
    names = set()
    for file in Path(base).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= {name for name in tensors.keys() if tensors.get_slice(name).get_dtype() == "F32"}  # noqa: SIM118
    return names


def master_values(model: PreTrainedModel, names: set[str]) -> dict[str, torch.Tensor]:
    """The named parameters' fp32 values, on the CPU; under ZeRO from the optimiser. All ranks must call."""
    from deepspeed.utils import safe_get_full_fp32_param

    values = {}
    for name, parameter in model.named_parameters():
        if name in names:
            value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if value is not None:
                values[name] = value.detach().float().cpu()
    return values


def cast(state: dict[str, torch.Tensor], dtype: torch.dtype, keep_fp32: set[str]) -> dict[str, torch.Tensor]:
    """Floating-point tensors in `dtype`, but for those of `keep_fp32`, which are fp32."""
    return {
        name: value.to(torch.float32 if name in keep_fp32 else dtype) if value.is_floating_point() else value
        for name, value in state.items()
    }


def complete_directory(
    directory: Path,
    base: str | None,
    tokenizer_path: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None,
) -> None:
    """Put beside the weights what makes the directory loadable alone.

    Args:
        base: the model's directory; where it is none, the config stays as transformers saved it.
        dtype: of the weights, for the config; None for an adapter, which has no config.
    """
    if Path(tokenizer_path).is_dir():
        copy_beside_weights(Path(tokenizer_path), directory)
    else:
        tokenizer.save_pretrained(directory)
    if dtype is None:
        return
    if base is not None and Path(base).is_dir():
        copy_beside_weights(Path(base), directory)
        config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    else:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config["use_cache"] = True  # off in the Trainer, wanted where the model is used
    for key in {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}:
        config[key] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_beside_weights(source: Path, target: Path) -> None:
    """Copy the files at a directory's top that are neither weights, nor the config, nor a run's own."""
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_FILES + NOT_COPIED):
            shutil.copyfile(file, target / file.name)
