"""What a node finds out about itself before a job. preflight.py compares it between the nodes.

agent.py runs it there, from the chief's text. Standard library, and psutil where it is there.
"""

import contextlib
import glob
import hashlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

GPU_SECONDS = 60  # for nvidia-smi: eight GPUs without persistence mode take more than 11
GPU_DEVICES = "/dev/nvidia[0-9]*"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "datasets", "psutil")


def number_of_gpus(env: dict[str, str]) -> int | None:
    """The NVIDIA GPUs that processes with this environment see. None where that is unknown: nvidia-smi takes too long,
    or it fails or is missing although there are devices."""
    chosen, lines = env.get("CUDA_VISIBLE_DEVICES"), ""
    named = [name for name in (chosen or "").split(",") if name.strip() and name.strip() != "-1"]
    if chosen is not None and not named:
        return 0
    try:
        with contextlib.suppress(OSError):  # there is none
            lines = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=GPU_SECONDS).stdout
    except subprocess.TimeoutExpired:
        return None
    number = sum(line.startswith("GPU") for line in lines.splitlines())
    if number == 0 and glob.glob(GPU_DEVICES):
        return None
    return number if chosen is None else min(number, len(named))


def sizes(path: str) -> dict[str, int] | None:
    """{file: bytes} of a file, of a glob's files or of a directory's top; None where there is nothing."""
    if os.path.isdir(path):
        files = [entry.path for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith(".")]
        return {os.path.basename(file): os.path.getsize(file) for file in files}
    return {file: os.path.getsize(file) for file in sorted(glob.glob(path) or [path]) if os.path.exists(file)} or None


def code(directory: str) -> dict[str, str]:
    """{file: hash} of the scripts and DeepSpeed files of a directory, its packages included."""
    found = {}
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if name not in ("output", "example", "__pycache__")]
        for file in files:
            if file.endswith((".py", ".json")):
                path = os.path.join(folder, file)
                with open(path, "rb") as content:
                    found[os.path.relpath(path, directory)] = hashlib.sha256(content.read()).hexdigest()
    return found


def versions() -> dict[str, str]:
    """Of Python and the packages that have to agree, without importing them."""
    installed = reversed(list(importlib.metadata.distributions()))  # the first of a name is the one that is imported
    found = {package.name: package.version for package in installed if package.name in PACKAGES}
    return found | {"python": ".".join(map(str, sys.version_info[:2]))}


def interface_towards(host: str, port: int) -> str | None:
    """The network interface from which this machine reaches a host. Nothing is sent."""
    with contextlib.suppress(OSError, ImportError):
        import psutil  # a node without it is still examined

        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as s:
            s.connect(address)
            own = s.getsockname()[0].partition("%")[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address.partition("%")[0] == own for address in addresses):
                return name
    return None


def reach(host: str, port: int) -> str | None:
    """What prevents a connection, or None."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def writable(marker: str, made: list[str]) -> str | None:
    """Write the file `marker`, with its directory; what prevents it, or None. `made` gets the new directories, the
    innermost first."""
    folder = Path(marker).absolute().parent
    made += [str(new) for new in (folder, *folder.parents) if not os.path.lexists(new)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Path(marker).write_text("x" * 4096)
    except OSError as error:
        return error.strerror
    return None


def examine(wanted: dict, made: list[str]) -> dict:
    """What the launcher compares between the nodes; `made` as in writable."""
    there = os.path.isdir(wanted["cwd"])
    if there:
        os.chdir(wanted["cwd"])
    return {
        "cwd": there,
        "code": code(wanted["code"]),
        "versions": versions(),
        "paths": {path: sizes(path) for path in wanted["paths"]},
        "lacks": [file for file in wanted["resumed"] if not os.path.isfile(file)],
        "gpus": number_of_gpus(dict(os.environ)),
        "shm": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        "interface": wanted["interface"] or interface_towards(*wanted["towards"]),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "reach": reach(*wanted["reach"]) if wanted["reach"] else None,
        "output": writable(wanted["marker"], made) if there and wanted["marker"] else None,  # last: others take time
    }
