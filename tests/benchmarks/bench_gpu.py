"""On a machine with one NVIDIA GPU, in nine minutes: whether each path is right there, and how fast training is.

    python tests/benchmarks/bench_gpu.py [--minutes 9] [--parts dense moe …] [--output FILE] [--folder DIR]
    python tests/benchmarks/bench_gpu.py --device cpu --minutes 3      # the same, tiny, to try it out

Needs nothing but the repository: models in real shapes, tokenizer and rows are made on the spot (gpu_models.py; 41 GB
in --folder). Parts, by importance: correct, ceilings (gpu_checks.py), example (`bash train/train.sh`), dense, moe,
4bit, full, deepspeed, long, compile, trl (gpu_trl.py). Each measurement is a run of train.py in a process of its own:
one that fails or runs out of memory ends alone. What does not fit into --minutes is listed as not run: give its parts
to another call. The models are made beside the parts that are not timed, which are the example and `correct`.

Rows are packed in bins of 4,096 tokens; 32k: one row of 32,500 a step. Without DeepSpeed but for its own part; an
adapter has rank 64, on the attention. A slice has as many of a model's layers as its name says, and the head weighs
more in it than in the whole model. "of ceiling" is what the model needs, over the fastest product of matrices that was
measured. FILE (json, and the table in FILE.txt) is written after each measurement. Exit code 1 where a path differs,
or where a run fails and not for lack of memory.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpu_models import BYTES, LAYERS, MADE, MADE_SMALL
from gpu_report import Report, busiest_expert, said_in, take_second_half

HERE = Path(__file__).resolve().parent
TRAIN = HERE.parents[1] / "train"
UNTIMED = ("correct", "ceilings", "example")  # need no model of ours
PARTS = (*UNTIMED, "dense", "moe", "4bit", "full", "deepspeed", "long", "compile", "trl")
STAGES = ("ds_zero2_no_offload.json", "ds_zero3_no_offload.json", "ds_zero3_offload.json")
LOSSES_APART = 0.05  # at most, between bf16 and fp32
LENGTHS = {"4k": (4096, 256), "32k": (32_768, 2048)}  # --max_seq_length, and of a try on a CPU
COMMON = ("--logging_steps", 1, "--save_strategy", "no", "--report_to", "none", "--learning_rate", 1e-5)
SMALL_RUN = ("--packing", "batch", "--per_device_train_batch_size", 4, "--max_seq_length", 256, "--max_steps", 3)
LORA, AGAIN, FLASH = ("--use_lora",), ("--use_lora", "--gradient_checkpointing"), ("--use_flash_attn",)
FOUR, LOAD = ("--use_lora", "--load_in_4bit"), ("--report_to", "tensorboard")  # which gets the load of the experts


class Run(NamedTuple):
    """A run of train.py.

    Attributes:
        flags: and `gpu`, those that a CPU does not know.
        number: the model's place in MADE.
        batch: bins a step.
        seconds: what it takes at most, about; a fourth of what it may take.
    """

    part: str
    shape: str
    what: str
    flags: tuple[str, ...] = ()
    gpu: tuple[str, ...] = FLASH
    number: int = 0
    batch: int = 1
    steps: int = 20
    rows: str = "4k"
    seconds: int = 45


RUNS = (
    Run("dense", "7B", "LoRA 4k", LORA),
    Run("dense", "7B", "LoRA 4k, row by row", LORA, gpu=()),
    Run("dense", "7B", "LoRA 4k, recomputed, 4 bins", AGAIN, batch=4, steps=8),
    Run("moe", "A13B", "LoRA 4k, 4 bins", LORA, batch=4, steps=12),
    Run("moe", "Hy-MT2", "LoRA 4k, 4 bins", LORA, batch=4, steps=12),
    Run("moe", "Hy-MT2", "LoRA 4k, 4 bins, tf32", LORA, gpu=(*FLASH, "--tf32", "true"), batch=4, steps=12),
    Run("moe", "A13B", "LoRA 4k, recomputed, 8 bins", AGAIN + LOAD, batch=8, steps=6),
    Run("4bit", "7B", "LoRA 4k, 4 bits", FOUR, seconds=60),
    Run("4bit", "A13B", "LoRA 4k, 4 bins, 4 bits", FOUR, batch=4, steps=10, seconds=60),
    Run("full", "7B", "full 4k, 2 bins", number=1, batch=2, steps=10),
    Run("full", "A13B", "full 4k, 2 bins", number=1, batch=2, steps=10, seconds=60),
    Run("full", "Hy-MT2", "full 4k, 2 bins", number=1, batch=2, steps=10, seconds=60),
    Run("deepspeed", "", ""),
    Run("long", "7B", "LoRA 32k, recomputed", AGAIN, rows="32k", steps=4, seconds=60),
    Run("long", "7B", "LoRA 32k, offload", AGAIN, (*FLASH, "--activation_offload"), rows="32k", steps=4, seconds=70),
    Run("compile", "7B", "LoRA 4k, compiled", LORA, (*FLASH, "--torch_compile"), steps=40, seconds=120),
    Run("trl", "7B", "LoRA 4k, TRL"),
    Run("trl", "7B", "LoRA 4k, again", LORA),
    Run("trl", "7B", "LoRA 4k, TRL again"),
)


class Bench:
    """The clock, the folder, the processes, and the report."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work, self.small = args, work, args.device == "cpu"
        self.report = Report(args.output, args.device)
        self.env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.env["HF_DATASETS_CACHE"] = str(work / "cache")
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.env['PATH']}"  # for train.sh

    def left(self) -> float:
        """Seconds."""
        return 60 * self.args.minutes - (time.monotonic() - self.report.began)

    # ------------------------------------------------------------------------------------------------ processes

    @contextlib.contextmanager
    def process(self, name: str, *command: object) -> Iterator[tuple[subprocess.Popen, Path]]:
        """A process and its log; it does not outlive the block."""
        log = self.work / f"{name}.log"
        with log.open("w") as file:
            child = subprocess.Popen(
                list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=self.env, start_new_session=True
            )
        try:
            yield child, log
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def finish(self, child: subprocess.Popen, log: Path, seconds: float = 600) -> tuple[str, str]:
        """Wait for a process; its status and why it is not ok."""
        left = self.left()
        try:
            child.wait(max(1.0, min(left, seconds)))
        except subprocess.TimeoutExpired:
            return ("not run", "out of time") if left < seconds else ("FAILED", f"not done after {seconds:.0f} s")
        if child.returncode == 0:
            return "ok", ""
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""]
        if any("out of memory" in line.lower() for line in lines):
            return "out of memory", ""
        return "FAILED", f"exit code {child.returncode}: {lines[-1][:160]}"

    def train(self, name: str, seconds: float, *flags: object) -> tuple[str, str, dict[str, Any]]:
        """Run train.py; its status, why it is not ok, and its figures."""
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        with self.process(name, sys.executable, TRAIN / "train.py", "--output_dir", out, *flags) as (child, log):
            status, why = self.finish(child, log, seconds)
        if status != "ok":
            return status, why, {}
        figures = json.loads((out / "train_results.json").read_text())
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        figures["losses"] = [entry["loss"] for entry in history if "loss" in entry]
        return status, "", figures | said_in(log.read_text())

    # --------------------------------------------------------------------------------------------------- parts

    def prepare(self) -> None:
        """Make the models; beside it what is not timed: the example, and whether each path is right."""
        parts = self.args.parts
        small = ["--small"] if self.small else []
        to_example = ["--output_dir", self.work / "example", *(["--max_steps", 20] if self.small else [])]
        with contextlib.ExitStack() as beside:

            def begin(name: str, *command: object) -> tuple[subprocess.Popen, Path]:
                return beside.enter_context(self.process(name, *command))

            making = example = None
            if not set(parts) <= {*UNTIMED}:
                making = begin("models", sys.executable, HERE / "gpu_models.py", self.work, *small)
            if "example" in parts:
                example = begin("example", "bash", TRAIN / "train.sh", *to_example)
            if "correct" in parts:
                self.check("correct")
            if making:
                status, why = self.finish(*making)
                self.report.add("models", "made", status, why or making[1].read_text().strip().splitlines()[-1])
            if example:
                status, why = self.finish(*example)
                results = self.work / "example" / "train_results.json"
                figures = json.loads(results.read_text()) if results.exists() else {}
                right = f"{figures.get('example_correct_after')} of {figures.get('example_prompts')} right"
                self.report.add("example", "train.sh", status, why or right)

    def check(self, part: str) -> None:
        """A part of gpu_checks.py, whose lines are kept even where it does not come to its end."""
        file = self.work / f"{part}.json"
        command = [HERE / "gpu_checks.py", part, file, "--device", self.args.device]
        known, ended = 0, False
        with self.process(part, sys.executable, *command) as (child, log):
            while not ended:
                time.sleep(0.5)
                ended = child.poll() is not None or self.left() < 0
                results = json.loads(file.read_text()) if file.exists() else []
                for result in results[known:]:
                    self.report.add(part, **result)
                known = len(results)
            status, why = self.finish(child, log)
        if status != "ok" and not any(result["status"] == "FAILED" for result in results):
            self.report.add(part, "the rest", status, why)

    def measure(self, run: Run) -> None:
        """One run, and its line; or why there is none."""
        made, whole = (MADE_SMALL if self.small else MADE)[run.shape][run.number], LAYERS[run.shape]
        model = self.work / f"{run.shape}-{made}"
        name = f"{run.shape}{'' if made == whole else f' {made} of {whole} layers'} {run.what}"
        length, steps = LENGTHS[run.rows][self.small], 4 if self.small else run.steps
        if why := self.why_not(run, model):
            return self.report.add(run.part, name, "not run", why)
        log, rows, limit = re.sub(r"\W+", "-", name), self.work / f"{run.rows}.jsonl", 4 * run.seconds
        if "TRL" in name:
            file, flags = self.work / f"{log}.json", ["--length", length, "--batch", run.batch, "--steps", steps]
            command = [HERE / "gpu_trl.py", model, rows, file, *flags, "--device", self.args.device]
            with self.process(log, sys.executable, *command) as child:
                status, why = self.finish(*child, limit)
            figures = json.loads(file.read_text()) if file.exists() else {}
        else:
            flags = [*run.flags, *([] if self.small else run.gpu)]
            status, why, figures = self.train(
                log, limit, "--model_name_or_path", model, "--train_data_file", rows, "--max_seq_length", length,
                "--per_device_train_batch_size", run.batch, "--max_steps", steps, "--packing", "bin", "--bf16",
                *COMMON, *flags,
            )  # fmt: skip
            if status == "ok" and "tensorboard" in flags:
                figures["busiest"] = busiest_expert(self.work / "out", model)
            if status == "ok" and run.part == "compile":
                take_second_half(figures)
        return self.report.add(run.part, name, status, why, **figures)

    def why_not(self, run: Run, model: Path) -> str | None:
        """Why a run is left out; None where it is made."""
        if self.small and {"--activation_offload", "--torch_compile"} & {*run.gpu}:
            return "it needs a GPU"
        package = "bitsandbytes" if "--load_in_4bit" in run.flags else "trl" if "TRL" in run.what else "torch"
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if not (model / "config.json").is_file():
            return "its model was not made"
        return f"{self.left():.0f} s left" if self.left() < (20 if self.small else run.seconds) else None

    def compare_stages(self) -> None:
        """Small models under each DeepSpeed file in bf16: three losses beside those of the CPU in fp32."""
        for kind in ("moe", "dense"):
            reference = self.three_losses(kind, "on the CPU in fp32", [], "--use_cpu")
            self.three_losses(kind, "without DeepSpeed", reference, "--bf16")
            for stage in STAGES:
                self.three_losses(kind, stage, reference, "--bf16", "--deepspeed", stage)

    def three_losses(self, kind: str, name: str, reference: list[float], *flags: str) -> list[float]:
        """The losses of one run, and its line."""
        name, needed = f"{kind} {name}", 20 if self.small else 90 if name == STAGES[-1] else 30  # it compiles
        if self.left() < needed or (self.small and "--deepspeed" in flags):
            why = "it needs a GPU" if self.left() >= needed else f"{self.left():.0f} s left"
            self.report.add("deepspeed", name, "not run", why)
            return []
        status, why, figures = self.train(
            name, 3 * needed, "--model_name_or_path", self.work / kind, "--train_data_file", self.work / "4k.jsonl",
            *COMMON, *SMALL_RUN, "--learning_rate", 1e-4, *flags,
        )  # fmt: skip
        losses = figures.get("losses", [])
        apart = max((abs(a - b) for a, b in zip(losses, reference)), default=0.0)
        status = "FAILED" if not apart <= LOSSES_APART else status
        text = f"losses {' '.join(f'{loss:.4f}' for loss in losses)}, at most {apart:.4f} apart"
        self.report.add("deepspeed", name, status, why or text)
        return losses


def roomy_folder(needed: int) -> str:
    """In memory where there is twice the room, else where temporary files go."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shared = shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0
    return "/dev/shm" if min(shared, memory / 2) > needed else tempfile.gettempdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9, help="after these nothing runs any more (default 9)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="default: all")
    parser.add_argument("--output", type=Path, default=TRAIN / "output" / "bench_gpu.json")
    parser.add_argument("--folder", help="where models are made (default: in memory, where there is room)")
    args = parser.parse_args()
    needed = 10**9 if args.device == "cpu" else BYTES
    folder = args.folder or roomy_folder(needed)
    if shutil.disk_usage(folder).free < needed:
        sys.exit(f"{folder}: {needed / 1e9:.0f} GB are needed: --folder names another place")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes end and the folder goes
    with tempfile.TemporaryDirectory(prefix="bench_gpu_", dir=folder) as work:
        bench = Bench(args, Path(work))
        bench.prepare()
        if "ceilings" in args.parts:
            bench.check("ceilings")
        for run in (run for part in args.parts for run in RUNS if run.part == part):
            bench.compare_stages() if run.part == "deepspeed" else bench.measure(run)
    print(f"\n{bench.report.table()}\n\nwritten to {args.output} and {args.output}.txt")
    sys.exit(any(result["status"] == "FAILED" for result in bench.report.results))


if __name__ == "__main__":
    main()
