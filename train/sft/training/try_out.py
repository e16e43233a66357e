"""What would fail once the model is loaded is tried before, with a toy in its place.

Refused (exit code 2), with the flag and what to do: an optimiser, a scheduler, a data loader or a compiler that cannot
be built from their flags, a package that is not installed, a device that cannot do it, a hub that is not reached.
"""

import contextlib
import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.utils import is_liger_kernel_available

from sft.arguments import TrainingArguments
from sft.messages import Refused
from sft.training.environment import refuse_together
from sft.training.rates import keep_above_lowest

SET_BY_OTHER_FLAGS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
STEPS = 1000  # of a run whose length is not known yet
NEEDED = {
    "activation_offload": "gradient_checkpointing",
    "fsdp_config": "fsdp",
    "liger_kernel_config": "use_liger_kernel",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
}


@contextlib.contextmanager
def refusing(flags: str = "", advice: str = "") -> Iterator[None]:
    """What a library raises becomes Refused, in one line, with the flags in front."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:  # libraries raise anything
        why = re.sub(r"^[\w.<>]+\(\) ", "", " ".join(str(error).split())).rstrip(".") or type(error).__name__
        raise Refused(f"{flags}: " * bool(flags) + why + f". {advice}" * bool(advice)) from error


def try_out(args: TrainingArguments) -> None:
    """Build what the flags ask for, of a toy. No Trainer, Accelerator or engine: a second one in a process switches
    DeepSpeed off without a word. All ranks must call."""
    try_devices(args)
    try_scheduler(args, try_optimizer(args))
    options = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context")
    loader = {name: getattr(args, f"dataloader_{name}") for name in options}
    given = " ".join(f"--dataloader_{name} {value}" for name, value in loader.items() if value)
    with refusing(given, "Give --dataloader_num_workers above 0, or leave the others out"):
        torch.utils.data.DataLoader([0], **loader)
    again = getattr(args, "activation_checkpointing_kwargs", args.gradient_checkpointing_kwargs)  # 5.17: the old name
    with refusing(f"--gradient_checkpointing_kwargs {again}"):
        of_torch = {key: value for key, value in (again or {}).items() if key not in ("every_n_layers", "offload")}
        checkpoint(lambda x: x, torch.ones(1, requires_grad=True), **({"use_reentrant": False} | of_torch))
    with refusing(f"--report_to {' '.join(args.report_to)}"):
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    if args.torch_compile:
        backend, mode = args.torch_compile_backend, args.torch_compile_mode
        with refusing(f"--torch_compile_backend {backend} --torch_compile_mode {mode}"):
            torch.compile(lambda x: x, backend=backend, mode=mode)
    if args.push_to_hub:
        refuse_together(why_no_hub(args))


def try_devices(args: TrainingArguments) -> None:
    """Refuse what this device, or this number of processes, cannot do, and what has no effect."""
    several, config, liger = args.world_size > 1, args.accelerator_config, args.use_liger_kernel
    recomputing = getattr(args, "activation_checkpointing_kwargs", None) or {}  # 5.17 has the old name alone
    refused = [
        (getattr(args, what, None) and not getattr(args, needed), f"--{what}: has no effect without --{needed}")
        for what, needed in NEEDED.items()
    ]
    refused += [
        (args.fsdp and (args.use_cpu or not several or args.deepspeed),
         "--fsdp: needs several processes with a GPU each, and no --deepspeed. Leave it out"),
        (liger and args.use_cpu, "--use_liger_kernel: its kernels need a GPU. Leave it out"),
        (recomputing.get("offload") and args.use_cpu,
         "--activation_offload: without a GPU the layers' inputs are in host memory already. Leave it out"),
        (args.activation_offload and not hasattr(args, "activation_checkpointing"),
         f"--activation_offload: not with transformers {transformers.__version__}: pip install transformers==5.23.0"),
        (liger and not is_liger_kernel_available(),
         "--use_liger_kernel: liger-kernel is not installed: pip install liger-kernel"),
        (several and not config.even_batches,
         "--accelerator_config: with even_batches false ranks wait for ever for one that has no batch"),
        (several and (config.split_batches or config.dispatch_batches),
         "--accelerator_config: split_batches and dispatch_batches cannot divide rows of any length"),
    ]  # fmt: skip
    for is_wrong, why in refused:
        if is_wrong:
            raise Refused(why)
    if args.deepspeed and args.fp16:
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise Refused("--fp16: DeepSpeed does not support it on this device. Give --bf16, or neither")


def toy_model() -> torch.nn.Module:
    """A model with a linear layer under each name that a layer of these models has."""
    attention = "q_proj k_proj v_proj o_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj"
    toy = torch.nn.Module()
    for part, names in {"self_attn": attention, "mlp": "gate_proj up_proj down_proj"}.items():
        toy.add_module(part, torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names.split()}))
    return torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([toy])})})


def try_optimizer(args: TrainingArguments) -> Optimizer:
    """The optimiser of a toy. Refuses what of `--optim_args` it does not read, and under offload all but those that
    run on the CPU."""
    toy, name = toy_model(), args.optim.value
    flags = f"--optim {name}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
    pairs = [pair.strip() for pair in (args.optim_args or "").split(",") if pair.strip()]
    if odd := [pair for pair in pairs if not re.fullmatch(r"\w+\s*=[^=]+", pair)]:
        raise Refused(f"{flags}: {odd[0]}: must be key=value,key=value")
    if name.endswith("_layerwise"):
        raise Refused(f"{flags}: steps in hooks, past clipping, schedule and checkpoints. Give {name[:-10]}")
    with refusing(flags, "pip install torch_" + name.split("_")[2] if re.search("xla|npu", name) else ""):
        build, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args, toy)
        for key in (pair.partition("=")[0].strip() for pair in pairs):
            if not any(key in found for found in (kwargs, *kwargs.get("params", ()))) and not reads(args, key, toy):
                raise Refused(f"--optim_args {key}: has no effect with --optim {name}")
        groups: Any = [{"params": [*toy.parameters()], "weight_decay": args.weight_decay}]
        for instead in ("params", "model", "optimizer_dict"):
            groups = kwargs.pop(instead, groups)
        optimizer = build(groups, **kwargs)
    if args.optim_target_modules is not None and not re.match("galore|apollo", name):
        raise Refused(f"--optim_target_modules: has no effect with --optim {name}; galore and apollo read it")
    if args.deepspeed:
        check_offload(args, optimizer)
    return optimizer


def reads(args: TrainingArguments, key: str, toy: torch.nn.Module) -> bool:
    """Whether the optimiser's arguments depend on this key of `--optim_args`, which they do not have."""
    found = set()
    for value in "01":
        changed = copy.copy(args)
        changed.optim_args = f"{key}={value}"
        try:
            found.add(repr(transformers.Trainer.get_optimizer_cls_and_kwargs(changed, toy)[1]))
        except Exception:  # it has looked at the value
            return True
    return len(found) > 1


def check_offload(args: TrainingArguments, optimizer: Optimizer) -> None:
    """Refuse under offload what would be replaced without a word: accelerate 1.15 puts DeepSpeed's Adam on the CPU in
    place of any optimiser; with Adagrad it fails."""
    config = args.hf_deepspeed_config.config
    device = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if device == "none" or "optimizer" in config or not config.get("zero_force_ds_cpu_optimizer", True):
        return
    if not isinstance(optimizer, AdamW):
        raise Refused(
            f"--optim {args.optim.value}: under offload_optimizer DeepSpeed runs AdamW on the CPU in its place. Give "
            "--optim adamw_torch, or a DeepSpeed file without offload"
        )
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builder = CPUAdamBuilder()
    if not builder.is_compatible(verbose=False):
        raise Refused(
            f"--deepspeed: offload_optimizer: cpu_adam cannot be built here: {builder.error_log or 'see ds_report'}"
        )


def try_scheduler(args: TrainingArguments, optimizer: Optimizer) -> None:
    """Refuse a scheduler that its flags cannot build, or that ignores them."""
    kind, kwargs, steps = args.lr_scheduler_type, args.lr_scheduler_kwargs, max(args.max_steps, 0) or STEPS
    flags = f"--lr_scheduler_type {kind.value}" + (f" --lr_scheduler_kwargs {kwargs}" if kwargs else "")
    if kwargs and kind.value in ("constant", "constant_with_warmup"):  # get_scheduler leaves them out
        raise Refused(f"{flags}: this schedule takes none")
    known = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters.keys() - SET_BY_OTHER_FLAGS
    advice = f"--lr_scheduler_kwargs takes: {' '.join(sorted(known)) or 'nothing'}" if "kwargs" not in known else ""
    with refusing(flags, advice):
        scheduler = get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps, kwargs)
        keep_above_lowest(scheduler, args, steps)


def why_no_hub(args: TrainingArguments) -> str | None:
    """Why --push_to_hub would fail on this rank, or None."""
    if not args.should_save:
        return None
    from huggingface_hub import HfApi

    try:
        HfApi().whoami(token=args.hub_token)
    except Exception as error:  # offline, no login, no such server
        why = " ".join(str(error).split()).split(". ")[0]
        return f"--push_to_hub: {why}. Log in with `hf auth login` where there is a way to the hub, or leave it out"
    return None
