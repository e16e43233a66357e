"""Where the run happens: the device, the other processes, the DeepSpeed file; how a rank ends."""

import atexit
import contextlib
import fcntl
import functools
import glob
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch.distributed.distributed_c10d import _get_default_store

from sft.messages import Refused, choice
from sft.processes import free_port
from sft.stopping import EXIT_STOPPED, end_children

TRAIN = Path(__file__).resolve().parents[2]


def prepare(values: dict[str, Any]) -> None:
    """Prepare what Hugging Face's arguments need when they are built: the DeepSpeed configuration instead of its name,
    the rendezvous variables, `use_cpu` where there is no GPU, and on CPUs the process group."""
    if values["deepspeed"] is not None:
        values["deepspeed"] = read_deepspeed_file(values["deepspeed"])
    set_rendezvous_variables(bool(values["deepspeed"]))
    choose_device(values)
    if values["deepspeed"]:
        build_one_at_a_time()
    if values["use_cpu"]:
        init_gloo(values["ddp_timeout"], values["ddp_backend"] or "gloo")


def choose_device(values: dict[str, Any]) -> None:
    """Set `use_cpu` where there is no NVIDIA device; refuse a device that torch cannot use."""
    if not values["use_cpu"] and torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    if values["deepspeed"]:  # compiles a library at its first use; pip's ninja lies beside the interpreter
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        if shutil.which("g++") is None:
            raise Refused("--deepspeed on a CPU compiles a library: install g++, or leave --deepspeed out")
    if values["use_cpu"]:
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
    values["use_cpu"] = True
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


def build_one_at_a_time() -> None:
    """Hold a lock of the kernel while an extension of DeepSpeed is built and loaded. torch 2.13's own is a file: a
    process that is killed leaves it behind, and every later one waits for ever. Whoever holds ours removes it. Goes
    with the release that locks as the kernel does."""
    from deepspeed.ops.op_builder.builder import OpBuilder
    from torch.utils.cpp_extension import _get_build_directory

    load = OpBuilder.jit_load
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def locked(builder: OpBuilder, verbose: bool = True) -> Any:
        folder = Path(_get_build_directory(builder.name, verbose=False))
        with open(f"{folder}.flock", "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
                (folder / "lock").unlink(missing_ok=True)
            return load(builder, verbose)

    OpBuilder.jit_load = locked


def number_of_processes() -> int:
    """Of the whole job, from the launcher's or Slurm's variables."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def set_rendezvous_variables(deepspeed: bool) -> None:
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
    elif deepspeed:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())


def init_gloo(seconds: int, backend: str) -> None:
    """Start the process group of ranks on CPUs with --ddp_timeout. transformers 5.23 starts it with gloo's own 30
    minutes; goes with the release that passes the timeout on (tests/unit/test_arguments.py says when)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))


def use_built_arguments(training: transformers.TrainingArguments) -> None:
    """Do what needs Hugging Face's arguments: start DeepSpeed's process group on CPUs, because a ZeRO-3 model that is
    built before sees a world of one; use one GPU in one process."""
    if training.deepspeed and training.use_cpu:
        import deepspeed

        deepspeed.init_distributed("gloo")
    if training._n_gpu > 1:  # nn.DataParallel would split the batch's one-dimensional tensors
        why = "plain python runs one process; torchrun or train.sh uses all"
        choice("GPUs used", f"1 of {training._n_gpu}", why)
        training._n_gpu = 1


# ------------------------------------------------------------------------------------------------- the end


def first_rank_refuses() -> bool:
    """Whether the first rank has come to a refusal, too, and has said so: waited for on the other ranks, for 20 s.
    False before the ranks have met."""
    if not torch.distributed.is_initialized():
        return False
    store, key = _get_default_store(), "the first rank refuses"
    try:
        if torch.distributed.get_rank() == 0:
            store.set(key, "")
        store.wait([key], timedelta(seconds=20))
    except torch.distributed.DistStoreError:
        return False
    except torch.distributed.DistNetworkError:  # the store has ended with it
        pass
    return True


def exit_all_ranks(code: int) -> NoReturn:
    """End the process; of several ranks past the interpreter's own shutdown, after what is registered with atexit.

    There torch 2.13 sometimes aborts after a gloo job is done ("terminate called without an active exception"), which
    would turn any exit code into a failure. Goes with the release that does not.
    """
    end_children()
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        atexit._run_exitfuncs()
        if code in (0, 3, EXIT_STOPPED):  # all ranks come here, and the launcher ends the others with the first
            with contextlib.suppress(RuntimeError):  # a peer is gone, and reported
                torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
