"""Where the run happens: the device, the other processes, the DeepSpeed file; how a rank ends."""

import atexit
import contextlib
import fcntl
import functools
import glob
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch.distributed.distributed_c10d import _get_default_store

from sft.messages import Refused, choice, note
from sft.processes import free_port
from sft.stopping import EXIT_STOPPED, end_children


def prepare(values: dict[str, Any]) -> None:
    """Prepare what Hugging Face's arguments need when they are built: the rendezvous variables, `use_cpu` where there
    is no GPU, and on CPUs the process group. No variable of accelerate's wins over the flags."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        if os.environ.pop(name).lower() not in ("", "0", "no", "false"):
            note(f"{name} has no effect: the flags decide")
    os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "true"  # --torch_compile: batches are of any size
    set_rendezvous_variables(bool(values["deepspeed"]))
    complete_variables()
    choose_device(values)
    if values["deepspeed"]:
        build_one_at_a_time()
    if values["use_cpu"]:
        if values["fp16"]:
            note("--fp16: a CPU computes in fp32; what is saved is fp16")
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


def from_all_ranks(value: Any) -> list[Any]:
    """What each rank has called this with, by rank: values that json knows. By the rendezvous's store: there may be no
    process group yet, or another thread uses it. All ranks must call, from one thread at a time."""
    if number_of_processes() == 1:
        return [value]
    store, rank, size = _meeting()
    call = store.add(f"calls of rank {rank}", 1)
    store.set(f"call {call} of rank {rank}", json.dumps(value))
    values = [json.loads(store.get(f"call {call} of rank {other}")) for other in range(size)]
    store.set(f"call {call} read by rank {rank}", "")
    if rank == 0:  # it may end the process next, and the store with it
        store.wait([f"call {call} read by rank {other}" for other in range(size)])
    return values


@functools.cache  # rank 0 serves the store for as long as it is kept
def _meeting() -> tuple[torch.distributed.Store, int, int]:
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timedelta(minutes=30)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the ranks
    return torch.distributed.PrefixStore(f"ours {attempt}", store), rank, size


def ranks_of_this_disk(args: transformers.TrainingArguments) -> range:
    """The ranks that save where this one does: all, with --save_on_each_node those of its node."""
    if not args.save_on_each_node:
        return range(args.world_size)
    first = args.process_index - args.local_process_index
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def set_rendezvous_variables(deepspeed: bool) -> None:
    """Set the rendezvous variables where the launcher did not: under srun from Slurm's own, else, for DeepSpeed, a
    world of one. DeepSpeed otherwise looks for MPI."""
    if "RANK" in os.environ:
        return
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "WORLD_SIZE": "STEP_NUM_TASKS"}
        os.environ.update({name: os.environ[f"SLURM_{theirs}"] for name, theirs in names.items()})
        if os.environ.get("SLURM_STEP_NUM_NODES") == "1":
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_ADDR" not in os.environ:
            raise Refused("MASTER_ADDR is not set: under srun on several nodes export the first node's name")
        os.environ.setdefault("MASTER_PORT", "29500")
    elif deepspeed:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())


def complete_variables() -> None:
    """Set what of several processes only torchrun and train.sh set: how many a node has, and gloo's interface, which
    is NCCL's where that is named in full. All ranks must call."""
    if "RANK" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        first = int(os.environ["RANK"]) - int(os.environ.get("LOCAL_RANK", 0))  # of the ranks of this node
        os.environ["LOCAL_WORLD_SIZE"] = str(from_all_ranks(first).count(first))
    interfaces = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if {*interfaces.split(",")} <= {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interfaces)


def init_gloo(seconds: int, backend: str) -> None:
    """Start the process group of ranks on CPUs with --ddp_timeout. transformers 5.23 starts it with gloo's own 30
    minutes; goes with the release that passes the timeout on (tests/unit/test_arguments.py says when)."""
    if number_of_processes() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))


def use_built_arguments(training: transformers.TrainingArguments) -> None:
    """Do what needs Hugging Face's arguments: start DeepSpeed's process group on CPUs, because a ZeRO-3 model that is
    built before sees a world of one; use one GPU in one process."""
    if training.deepspeed and training.use_cpu:
        import deepspeed

        deepspeed.init_distributed("gloo")
    if training._n_gpu > 1:  # nn.DataParallel would split the batch's one-dimensional tensors
        choice("GPUs used", f"1 of {training._n_gpu}", "plain python runs one process; torchrun or train.sh uses all")
        training._n_gpu = 1


# ------------------------------------------------------------------------------------------------- the end


def refuse_together(why: str | None) -> None:
    """Refuse on all ranks with the first reason that one has. All ranks must call."""
    if first := next(filter(None, from_all_ranks(why)), None):
        raise Refused(first)


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


FAILED = "a rank has failed"  # a key of the process group's store
LAST_SECONDS = 1.0  # twice what the others take to see it


@contextlib.contextmanager
def failing_together(explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """A block that all ranks begin and end together. Once it fails on one, all end with exit code 1, also those that
    wait in a collective, where nothing else would reach them.

    Args:
        explain: one line to print for an exception, or None: then it goes on with its traceback.
    """
    store = _get_default_store() if torch.distributed.is_initialized() else None
    done = threading.Event()
    watch = threading.Thread(target=end_with_the_others, args=(store, done), daemon=True)
    if store:
        watch.start()
    try:
        yield
        if store:
            torch.distributed.barrier()
    except Exception as error:
        line = explain(error)
        done.set()
        if store:
            watch.join()
            if store.add(FAILED, 1) > 1:  # another rank has said why
                end_after_another()
        if line:
            print(f"\n{line}", file=sys.stderr, flush=True)  # below the bar
        if store:
            time.sleep(2 * LAST_SECONDS)  # with the store, which rank 0 serves, the others would end noisily
        if line:
            sys.exit(1)
        raise
    finally:
        done.set()


def end_with_the_others(store: torch.distributed.Store, done: threading.Event) -> None:
    """End this process with exit code 1 once another rank has failed, or has taken the store with it. In a thread."""
    while not done.wait(LAST_SECONDS / 2):
        try:
            if store.check([FAILED]):
                end_after_another()
        except torch.distributed.DistError:
            os._exit(1)


def end_after_another() -> NoReturn:
    """End this process with exit code 1, from any thread; the rank that serves the store after the others."""
    time.sleep(LAST_SECONDS if torch.distributed.get_rank() == 0 else 0)
    os._exit(1)


def exit_all_ranks(code: int) -> NoReturn:
    """End the process; of several ranks past the interpreter's own shutdown, after what is registered with atexit:
    there torch 2.13 sometimes aborts after a gloo job ("terminate called without an active exception"), which would
    make a failure of any exit code. Goes with the release that does not."""
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
