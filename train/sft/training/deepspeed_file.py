"""The DeepSpeed file: found, put right where today's DeepSpeed differs from what was published, and checked.

Refused (exit code 2): a file that is not there or not an object, keys that DeepSpeed does not know, with the nearest
that it knows, values that it does not take, an optimizer or a scheduler beside flags that choose another.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sft.messages import Refused, choice, read_json
from sft.training.fields import names

TRAIN = Path(__file__).resolve().parents[2]
# Published with the models, and asked for by their scripts: numbers stand where ours has `auto`.
OTHER_NAMES = {"ds_zero3_offload_no_auto.json": "ds_zero3_offload.json"}
GATHER = "stage3_gather_16bit_weights_on_model_save"

# Of DeepSpeed 0.19.8, which ignores others at the top level: what DeepSpeedConfig, and code around it, reads.
OBJECTS = names("""
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger compile csv_monitor
    data_efficiency data_types datastates_ckpt flops_profiler fp16 optimizer pipeline scheduler tensorboard timers
    torch_autocast wandb weight_quantization zero_optimization
""")
VALUES = names("""
    communication_data_type dataloader_drop_last disable_allgather disable_python_gc dump_state
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor log_level
    managed_gradient_accumulation memory_breakdown prescale_gradients seq_parallel_communication_data_type
    steps_per_print train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer
""")
REMOVED = names("""
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients
""")  # by 0.19, which says so: what reads them is gone
NOT_HERE = names("tensor_parallel expert_parallel sequence_parallel_size data_parallel_size hybrid_engine inference")
OBJECTS_OF_ZERO = ("offload_optimizer", "offload_param", "zenflow", "leaf_module")
EXCLUDED = {"scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs", "min_lr"), "optimizer": ("optim", "optim_args")}


def read_deepspeed_file(name: str | dict | None) -> dict | None:
    """The DeepSpeed configuration, from a path or the name of a file in this folder, as JSON text, or as a checkpoint
    has it. `none` is no DeepSpeed."""
    if name is None or isinstance(name, dict):
        return name
    if name.lower() == "none":
        return None
    if name.startswith("{"):
        config, where = json.loads(name), "--deepspeed"
    else:
        other = OTHER_NAMES.get(Path(name).name, name)
        path = next((p for p in (Path(name), TRAIN / name, TRAIN / other) if p.is_file()), None)
        if path is None:
            offered = ", ".join(sorted(p.name for p in TRAIN.glob("ds_*.json")))
            raise Refused(f"--deepspeed {name}: no such file, here or in {TRAIN} (which has {offered})")
        if path.name != Path(name).name:
            choice("deepspeed", path.name, f"there is no {name}")
        config, where = read_json(path), f"--deepspeed {path}"
    check_names(config, where)
    put_right(config)
    return config


def check_names(config: dict[str, Any], where: str) -> None:
    """Refuse keys of the top level that DeepSpeed does not know, and a section that is not an object."""
    known = (*OBJECTS, *VALUES, *REMOVED)
    for key in config:
        if key in NOT_HERE:
            raise Refused(f"{where}: {key}: not supported here: each process trains the whole model. Leave it out")
        if key not in known:
            raise Refused(f"{where}: {key}: unknown key{nearest(key, known)}")
    zero = config.get("zero_optimization")
    sections = {key: config[key] for key in OBJECTS if key in config}
    if not zero:
        raise Refused(f'{where}: zero_optimization is missing, e.g. {{"stage": 2}}')
    if isinstance(zero, dict):
        sections |= {f"zero_optimization.{key}": zero[key] for key in OBJECTS_OF_ZERO if zero.get(key) is not None}
        stage = zero.get("stage", 0)
        if type(stage) is not int or not 0 <= stage <= 3:
            raise Refused(f"{where}: zero_optimization.stage: expected 0, 1, 2 or 3, found {json.dumps(stage)}")
    for key, section in sections.items():
        if not isinstance(section, dict):
            example = ', e.g. {"device": "cpu"}' if "offload" in key else ""
            raise Refused(f"{where}: {key}: expected an object{example}, found {json.dumps(section)}")


def nearest(key: str, known: Any) -> str:
    """What is added to a message on an unknown key."""
    near = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {near[0]}?" if near else ""


def put_right(config: dict[str, Any]) -> None:
    """Let values of published files mean what they did, and say so."""
    fp16, zero = config.get("fp16", {}), config["zero_optimization"]
    for key in [key for key, value in zero.items() if value is None]:
        del zero[key]
    scale, distance = fp16.get("min_loss_scale"), "stage3_max_reuse_distance"
    if isinstance(scale, float) and 0 < scale < 1:
        fp16["min_loss_scale"] = 1
        choice("fp16.min_loss_scale", 1, f"the file has {scale}; today's DeepSpeed takes whole numbers")
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, None) is True:
            zero.setdefault(new, {"device": "cpu"})
            choice(f"zero_optimization.{new}", zero[new], f"the file has {old}")
    if zero.get(distance) == "auto":
        zero[distance] = 10**9
        choice(f"zero_optimization.{distance}", "1e9", "nothing fills in the file's `auto`; this is the default")


def check_deepspeed(config: dict[str, Any], given: dict[str, Any], use_lora: bool) -> None:
    """Refuse what DeepSpeed itself would refuse once the model is loaded, and what contradicts a flag. Under ZeRO-3
    the weights are gathered to be saved, whatever the file says, but for an adapter. Imports DeepSpeed, which looks
    for its device then."""
    for section, flags in EXCLUDED.items():
        if section in config and (both := [f"--{flag}" for flag in flags if flag in given]):
            raise Refused(
                f"--deepspeed: its section `{section}` and {' '.join(both)}: one would be ignored. Leave out the "
                f"section, or the {'flags' if len(both) > 1 else 'flag'}"
            )
    zero = config["zero_optimization"]
    if zero.get("stage") == 3 and not use_lora and zero.get(GATHER) is not True:
        zero[GATHER] = True
        choice(f"zero_optimization.{GATHER}", True, "the final directory would have no weights")
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError

    for section, known in (("optimizer", DEEPSPEED_OPTIMIZERS), ("scheduler", lr_schedules.VALID_LR_SCHEDULES)):
        kind = str(config.get(section, {}).get("type", ""))
        if section in config and kind.lower() not in map(str.lower, known) and not hasattr(torch.optim, kind):
            raise Refused(f"--deepspeed: {section}.type: expected one of {' '.join(known)}, found {kind or 'nothing'}")
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    filled = {key: value for key, value in config.items() if value != "auto"} | dict.fromkeys(batch, 1)
    try:
        DeepSpeedConfig(json.loads(json.dumps(filled)))
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        found = faults(error) if hasattr(error, "errors") else str(error).split("\n")[:1]
        raise Refused(f"--deepspeed: {'; '.join(found)}") from error


def faults(error: Any) -> Iterator[str]:
    """What pydantic found, as `key: expected …, found …`."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    sections = {
        "DeepSpeedZeroConfig": "zero_optimization",
        "DeepSpeedFP16Config": "fp16",
        "DeepSpeedBF16Config": "bf16",
    }
    models = [model for model in DeepSpeedConfigModel.__subclasses__() if "runtime" in model.__module__]
    known = {field.alias or name for model in models for name, field in model.model_fields.items()}
    for fault in error.errors():
        where = ".".join(map(str, (sections.get(error.title, error.title), *fault["loc"])))
        if fault["type"] == "extra_forbidden":
            yield f"{where}: unknown key{nearest(str(fault['loc'][-1]), known)}"
        elif fault["loc"]:
            rule = fault["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
            found = json.dumps(fault["input"], default=str)
            yield f"{where}: {rule.removeprefix(f'{where} ')}, found {found}"
        else:
            yield f"{where}: {fault['msg'].removeprefix('Value error, ').removeprefix('Assertion failed, ')}"
