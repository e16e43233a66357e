"""Where the run happens: the device, the other processes, the DeepSpeed file."""

import contextlib
import glob
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import transformers

from sft.messages import Refused, choice
from sft.processes import free_port

TRAIN = Path(__file__).resolve().parents[2]


def choose_device(args: transformers.TrainingArguments) -> None:
    """Set `use_cpu` where there is no NVIDIA device; refuse a device that torch cannot use."""
    if not args.use_cpu and torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    if args.deepspeed:  # compiles a library at its first use; pip's ninja lies beside the interpreter
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        if shutil.which("g++") is None:
            raise Refused("--deepspeed on a CPU compiles a library: install g++, or leave --deepspeed out")
    if args.use_cpu:
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if glob.glob("/dev/nvidia[0-9]*") and not hidden:
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            driver = "unknown"
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise Refused(
            f"there is an NVIDIA device that torch cannot use: driver {driver}, torch {torch.__version__} ({built}). "
            "Install a torch built for this driver's CUDA version or a newer driver, or pass --use_cpu"
        )
    args.use_cpu = True
    choice("device", "cpu", "no NVIDIA device" + (" visible: CUDA_VISIBLE_DEVICES is empty" if hidden else ""))


def read_deepspeed_file(name: str | dict) -> dict | None:
    """The DeepSpeed configuration, from a path or the name of a file in this folder, or as a checkpoint has it. `none`
    is no DeepSpeed."""
    if isinstance(name, dict):
        return name
    if name.lower() == "none":
        return None
    path = next((p for p in (Path(name), TRAIN / name) if p.is_file()), None)
    if path is None:
        offered = ", ".join(sorted(p.name for p in TRAIN.glob("ds_*.json")))
        raise Refused(f"--deepspeed {name}: no such file, here or in {TRAIN} (which has {offered})")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"--deepspeed {path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise Refused(f"--deepspeed {path}: must hold a JSON object")
    scale = config.get("fp16", {}).get("min_loss_scale", 1) if isinstance(config.get("fp16", {}), dict) else None
    if not isinstance(scale, int) or not isinstance(config.get("zero_optimization", {}), dict):
        what = "fp16.min_loss_scale must be an integer, e.g. 1" if not isinstance(scale, int) else "zero_optimization"
        raise Refused(f"--deepspeed {path}: {what}: today's DeepSpeed does not take it as it stands")
    return config


def number_of_processes() -> int:
    """Of the whole job, from the launcher's or Slurm's variables."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def join_the_others(args: transformers.TrainingArguments) -> None:
    """Set the rendezvous variables where the launcher did not: under srun from Slurm's own, else, for DeepSpeed, a
    world of one. DeepSpeed otherwise looks for MPI.
    """
    if "RANK" in os.environ:
        return
    slurm_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if slurm_tasks > 1:
        os.environ.update(RANK=os.environ["SLURM_PROCID"], LOCAL_RANK=os.environ["SLURM_LOCALID"])
        os.environ.update(WORLD_SIZE=str(slurm_tasks))
        per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # as in 8(x2),4
        numbers = [n for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node) for _ in range(int(times or 1))]
        if numbers:
            os.environ["LOCAL_WORLD_SIZE"] = numbers[int(os.environ.get("SLURM_NODEID", 0))]
        if os.environ.get("SLURM_STEP_NUM_NODES") == "1":
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_ADDR" not in os.environ:
            raise Refused("MASTER_ADDR is not set: under srun on several nodes export the first node's name")
        os.environ.setdefault("MASTER_PORT", "29500")
    elif args.deepspeed:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())


def meet_on_cpus(args: transformers.TrainingArguments) -> None:
    """Start the process group with --ddp_timeout. On CPUs transformers 5.23 starts it with gloo's own 30 minutes; goes
    with the release that passes the timeout on (tests/unit/test_arguments.py says when)."""
    if args.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        timeout = timedelta(seconds=args.ddp_timeout)
        torch.distributed.init_process_group(args.ddp_backend or "gloo", timeout=timeout)


def let_all_come() -> None:
    """Before a refusal ends the job, let every rank come to it.

    One that is killed while it loads DeepSpeed's extension for CPUs leaves a lock behind, on which every later run
    waits for ever. Goes when DeepSpeed has no such extension.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        with contextlib.suppress(RuntimeError):
            torch.distributed.monitored_barrier(timeout=timedelta(seconds=20))
