"""What `bash train.sh` does once Python runs: it reads the variables and the flags, chooses what they leave open, and
starts train.py, on this machine or on several.

    python -m sft.start TRAIN.SH RECIPE… -- LORA_RECIPE… -- EXAMPLE_RECIPE… -- FLAGS…

Refused (exit code 2), before anything is written: an unknown flag or a wrong value, a number of GPUs that is not known
or too high, a model without rows, an adapter without a model. A refusal of the training leaves neither a log nor a
directory behind.
"""

import contextlib
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sft import stopping
from sft.processes import name_job, step_made

if __name__ == "__main__":
    stopping.end_at_signals(stopping.BEFORE_THE_FIRST_STEP)  # the imports take seconds
    name_job()

from sft.arguments import defaults
from sft.checks import check_values
from sft.messages import Refused, guard, report_refusal, run_script
from sft.model.files import is_adapter
from sft.nodes.examine import number_of_gpus
from sft.nodes.launch import launch
from sft.nodes.preflight import number_from, read_nodes, visit
from sft.parser import parse_flags, with_config_file
from sft.training.choose import run_or_checkpoint
from sft.training.manifest import checkpoints_in

TRAIN = Path(__file__).resolve().parents[1]
EXAMPLE = TRAIN / "example"
FLAG_OF = {
    "MODEL_PATH": "model_name_or_path",
    "TOKENIZER_PATH": "tokenizer_name_or_path",
    "TRAIN_DATA_FILE": "train_data_file",
    "OUTPUT_DIR": "output_dir",
    "DS_CONFIG": "deepspeed",
    "STALL_TIMEOUT": "ddp_timeout",
}
# A flag, and what of the recipe would win over it.
EXCLUDES = {"warmup_steps": "warmup_ratio", "warmup_ratio": "warmup_steps", "num_train_epochs": "max_steps"}
# What a run that goes on is started with again.
WHERE = (
    "HOST_GPU_NUM", "CUDA_VISIBLE_DEVICES", "NODE_IP_LIST", "IP_LIST", "LOCAL_IP", "SSH_PORT", "MASTER_PORT",
    "NET_IFNAME", "FORWARD", "STALL_TIMEOUT", "MAX_RESTARTS",
)  # fmt: skip


@dataclass
class Job:
    """What is to be run."""

    given: dict[str, Any]  # the flags on the command line
    variables: dict[str, str]  # of train.sh; a flag counts as its variable
    choices: list[str] = field(default_factory=list)  # to be printed

    def choose(self, name: str, value: object, why: str) -> None:
        """Give a variable that is empty a value."""
        if not self.variables[name]:
            self.variables[name] = str(value)
            self.choices.append(f"{name} = {value} ({why})")


def read_variables(given: dict[str, Any]) -> dict[str, str]:
    """train.sh's variables, with the values of flags that are given."""
    variables = {name: os.environ.get(name, "") for name in (*FLAG_OF, "HOST_GPU_NUM")}
    variables |= {name: os.path.expanduser(variables[name]) for name in FLAG_OF}
    for name, flag in FLAG_OF.items():
        if given.get(flag):
            variables[name] = str(given[flag])
    number_from(variables, "HOST_GPU_NUM")
    number_from(variables, "STALL_TIMEOUT", highest=9_999_999)
    number_from(dict(os.environ), "MAX_RESTARTS", lowest=0)
    return variables


def choose_machine(job: Job) -> int:
    """Choose the number of processes and the DeepSpeed file; returns the number of GPUs."""
    several = os.environ.get("NODE_IP_LIST") or os.environ.get("IP_LIST")
    wanted = int(job.variables["HOST_GPU_NUM"] or 0)
    gpus = 0 if job.given.get("use_cpu") else number_of_gpus(dict(os.environ))
    if gpus is None:  # there are some
        if not wanted and not several:
            raise Refused(
                "the number of GPUs is not known: nvidia-smi -L does not answer. Set HOST_GPU_NUM, or run: "
                "nvidia-smi -pm 1"
            )
        gpus = wanted or 1
    if wanted > gpus > 0:
        raise Refused(f"HOST_GPU_NUM={wanted}: only {gpus} GPUs are visible")
    if not several:
        job.choose("HOST_GPU_NUM", gpus or 1, "the GPUs of this machine" if gpus else "no GPU")
    if "resume_from_checkpoint" not in job.given:  # whose DeepSpeed file is the checkpoint's
        if job.given.get("load_in_4bit"):
            job.choose("DS_CONFIG", "none", "--load_in_4bit: each process holds the whole model")
        elif gpus:
            job.choose("DS_CONFIG", "ds_zero3_no_offload.json", "the default on GPUs")
        else:
            job.choose("DS_CONFIG", "none", "no GPU: DeepSpeed compiles for minutes on a CPU")
    return gpus


def choose_model(job: Job, script: str, recipe: list[str], lora: list[str], example: list[str]) -> list[str]:
    """Choose model, rows and output directory; returns the recipe of such a run."""
    variables, model = job.variables, job.variables["MODEL_PATH"]
    use_lora = job.given.get("use_lora") or bool(model) and is_adapter(model)
    resumed = "resume_from_checkpoint" in job.given
    output = TRAIN / "output"
    recipe = recipe + lora if use_lora else recipe
    if model and not resumed and not variables["TRAIN_DATA_FILE"]:
        raise Refused(f"TRAIN_DATA_FILE is not set: the rows to train {model} on")
    name = os.path.basename(os.path.realpath(model)) + ("-lora" if use_lora else "")
    if resumed:
        default = variables["OUTPUT_DIR"] or (str(output / name) if model else None)
        place = run_or_checkpoint(job.given["resume_from_checkpoint"], default)
        run = place if checkpoints_in(place) else Path(os.path.realpath(place)).parent
        job.choose("OUTPUT_DIR", run, "the run that goes on")
        return []  # flags and rows are the checkpoint's
    if model:
        job.choose("OUTPUT_DIR", output / name, "the name of MODEL_PATH")
    elif use_lora:
        job.choose("MODEL_PATH", output / "example", "the trained example")
        if not list((output / "example").glob("model*.safetensors")):
            raise Refused(
                "--use_lora without MODEL_PATH adapts the trained example, which is not there: "
                f"run first: bash {script}"
            )
        if not variables["OUTPUT_DIR"]:
            recipe = [*recipe, "--overwrite_output_dir"]
        job.choose("OUTPUT_DIR", output / "example-lora", "an adapter of the example")
    else:
        recipe = [*example, "--bf16", "--overwrite_output_dir", "--probe_file", str(EXAMPLE / "prompts.jsonl")]
        job.choices.append("model = the embedded example (MODEL_PATH is not set)")
        job.choose("TOKENIZER_PATH", EXAMPLE / "tokenizer", "the example's")
        job.choose("OUTPUT_DIR", output / "example", "the example")
    job.choose("TRAIN_DATA_FILE", EXAMPLE / "rows.jsonl", "the example's")
    return recipe


def left_of(recipe: list[str], given: dict[str, Any], gpus: int) -> list[str]:
    """The recipe without what is given, and without what a given flag excludes. Of a flag that is there twice, the
    last."""
    values = parse_flags(recipe)
    words_of: dict[str, list[str]] = {}
    for word in recipe:
        if word.startswith("--"):
            flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
            words_of[flag] = []
        words_of[flag].append(word)
    excluded = set(given)
    if not gpus or given.get("fp16"):
        excluded.add("bf16")
    for flag, other in EXCLUDES.items():
        if flag in given:
            excluded.add(other)
    if given.get("learning_rate", math.inf) < values.get("min_lr", 0):  # the recipe's lowest is above the given rate
        excluded.add("min_lr")
    return [word for flag, words in words_of.items() if flag not in excluded for word in words]


# ----------------------------------------------------------------------------------------------------------- run


@contextlib.contextmanager
def logged(log: Path) -> Iterator[None]:
    """Copy what this process and its children print to a file (copy_log.py), to the last line."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    copier = subprocess.Popen([sys.executable, TRAIN / "sft" / "copy_log.py", log], stdin=subprocess.PIPE)
    assert copier.stdin
    for number in (1, 2):
        os.dup2(copier.stdin.fileno(), number)
    copier.stdin.close()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in zip((1, 2), kept):
            os.dup2(own, number)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that has detached itself may hold it
            copier.wait(timeout=10)


def run(job: Job, command: list[str], values: dict[str, Any]) -> int:
    """Start the command, whose flags have these values, and wait for it, with a log in OUTPUT_DIR; returns its exit
    code."""
    output = Path(job.variables["OUTPUT_DIR"])
    made = [path for path in (output, *output.parents) if not path.exists()]
    with contextlib.suppress(OSError):
        output.mkdir(parents=True, exist_ok=True)
    if not (output.is_dir() and os.access(output, os.W_OK)):
        raise Refused(f"OUTPUT_DIR={output}: is not a directory that can be written")
    log = output / f"log_{time.strftime('%Y%m%d-%H%M%S')}.txt"
    if log.exists():
        log = log.with_name(f"{log.stem}-{os.getpid()}.txt")
    with logged(log):
        for line in job.choices:
            print(line, flush=True)
        try:
            visit(read_nodes(dict(os.environ)))  # hosts that ssh does not know: it asks, and reads the answer, here
            code = launch(command, values, log)
        except Refused as refusal:
            report_refusal(refusal)
            code = 2
    if code == 2 and step_made(output) is None:  # a refusal leaves nothing behind
        with contextlib.suppress(OSError):
            log.unlink(missing_ok=True)
            for path in made:
                path.rmdir()
    return code


def main(argv: list[str]) -> None:
    """Everything from the command line to the exit code, with which it ends the process."""
    parts: list[list[str]] = [[]]
    for word in argv[1:]:
        if word == "--" and len(parts) < 4:
            parts.append([])
        else:
            parts[-1].append(word)
    recipe, lora, example, flags = parts
    flags = with_config_file(flags)
    given = parse_flags(flags)
    job = Job(given, read_variables(given))
    gpus = choose_machine(job)
    env = os.environ | {"STALL_TIMEOUT": job.variables["STALL_TIMEOUT"]}  # or its flag
    go_on = {name: env[name] for name in WHERE if env.get(name)}
    if given.get("use_cpu"):  # the run's, and then again as many processes
        go_on["HOST_GPU_NUM"] = job.variables["HOST_GPU_NUM"]
    words = [f"{name}={shlex.quote(value)}" for name, value in go_on.items()]
    os.environ["GO_ON_WITH"] = " ".join([*words, "bash", shlex.quote(argv[0])])  # printed by a run that is stopped
    recipe = choose_model(job, argv[0], recipe, lora, example)
    command = [str(TRAIN / "train.py"), *left_of(recipe, given, gpus)]
    for name, flag in FLAG_OF.items():
        if job.variables[name] and flag not in given:
            command += [f"--{flag}", job.variables[name]]
    command += flags
    values = parse_flags(command[1:])
    if "resume_from_checkpoint" not in values:
        check_values(defaults() | values)
    os.environ["HOST_GPU_NUM"] = job.variables["HOST_GPU_NUM"]
    os.environ["ON_TERMINAL"] = str(int(os.isatty(1)))  # for the bar: what is printed is copied
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(run(job, command, values))


def exit_past_threads(code: int) -> NoReturn:
    """End the process although torch's agent may still wait in a thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    guard(sys.stdout)
    run_script(lambda: main(sys.argv[1:]), leave=exit_past_threads)
