"""Runs of train.py that are killed at random moments and started again with --auto_resume until they end.

A `Story` is one run: each of its moments aims at a phase, waits until what the run does shows that it is there, and
sends SIGKILL. What was hit is read from the files that are left, and may be another phase.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from runs import TRAIN, ServerRun, environment

PHASES = ("loading", "tokenizing", "stepping", "saving", "rotating", "exporting")
WEIGHTS = {"saving": 3}  # how often a phase is aimed at; the others once
STEPS, SAVE_STEPS, KEPT = 12, 2, 2
KINDS = {  # name: (model, ranks, flags)
    "one process": ("dense", 1, ["--gradient_accumulation_steps", 2]),
    "ZeRO-2": ("moe", 2, ["--deepspeed", "ds_zero2_no_offload.json"]),
    "ZeRO-3": ("moe", 2, ["--deepspeed", "ds_zero3_no_offload.json"]),
    "LoRA": ("moe", 1, ["--use_lora", "--lora_dropout", 0.1]),
    "packed": ("dense", 1, ["--packing", "bin", "--max_seq_length", 128]),
    "epoch's end": ("dense", 2, ["--packing", "batch"]),  # of 20 rows: an epoch is 5 steps
}
SECONDS = {  # between the sign of a phase and the kill, at most
    "loading": 1.5, "tokenizing": 0.005, "stepping": 0.05, "saving": 0.04, "rotating": 0.003, "exporting": 0.06,
}  # fmt: skip
TARGETS = ("a rank", "all ranks", "the launcher")
JUNK = 400  # empty files in each checkpoint that is whole: what deletes it takes some milliseconds more


@dataclass
class Tally:
    """What was hit, and what came of it."""

    hit: Counter = field(default_factory=Counter)  # (kind, phase): moments
    targets: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: int = 0  # steps, at most

    def count(self, kind: str | None = None, phase: str | None = None) -> int:
        return sum(n for (k, p), n in self.hit.items() if kind in (None, k) and phase in (None, p))

    def table(self) -> str:
        rows = [["", *PHASES, "all"]]
        rows += [[kind, *(self.hit[kind, phase] for phase in PHASES), self.count(kind)] for kind in KINDS]
        rows.append(["all", *(self.count(phase=phase) for phase in PHASES), self.count()])
        lines = ["".join(f"{cell!s:>12}" for cell in row) for row in rows]
        lines.append(", ".join(f"{target}: {n}" for target, n in sorted(self.targets.items())))
        return "\n".join([*lines, f"wrong results: {len(self.wrong)}; lost at most {self.lost} steps", *self.wrong])


@dataclass
class Attempt:
    """One start of the command."""

    run: ServerRun
    job: str  # what its lock says
    began: float
    torn: set[Path]  # checkpoints without manifest that it found


class Story:
    """A run of a kind in `folder`, with rows of its own.

    Args:
        model: the directory of the kind's model.
        rows: the lines of all stories.
    """

    def __init__(self, kind: str, model: Path, rows: list[bytes], folder: Path, draw: random.Random):
        _, self.ranks, flags = KINDS[kind]
        self.kind, self.draw, self.out, self.said = kind, draw, folder / "out", ""
        lines = rows[:20] if kind == "epoch's end" else rows
        self.rows = folder / "rows.jsonl"  # the spaces change no token, but there is no cached entry
        self.rows.write_bytes(b"".join(line + b" " * draw.randrange(200) + b"\n" for line in lines))
        args = ["--model_name_or_path", model, "--train_data_file", self.rows, "--output_dir", self.out, "--use_cpu"]
        args += ["--max_steps", STEPS, "--save_steps", SAVE_STEPS, "--save_total_limit", KEPT, "--logging_steps", 1]
        args += ["--learning_rate", 1e-3, "--per_device_train_batch_size", 2, "--report_to", "none", *flags]
        self.args = [str(arg) for arg in args]
        self.attempts, self.newest = 0, 0

    # ------------------------------------------------------------------------------------------------- one start

    def start(self) -> Attempt:
        more = ["--auto_resume"] if self.attempts else []
        self.attempts += 1
        job = f"{time.time():.6f}"
        env = environment({"OMP_NUM_THREADS": "1", "JOB_STARTED": job})
        torn = {path for path in self.checkpoints() if not (path / "manifest.json").exists()}
        run = ServerRun(TRAIN / "train.py", [*self.args, *more], self.ranks, env, None, "")
        return Attempt(run, job, time.time(), torn)

    def checkpoints(self) -> list[Path]:
        """By their steps."""
        return sorted(self.out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))

    def step(self, attempt: Attempt) -> int | None:
        """The last step of this start; None before its training begins."""
        with contextlib.suppress(OSError, ValueError):
            job, step = (self.out / ".lock").read_text().split()
            return int(step) if job == attempt.job else None
        return None

    def exports(self, attempt: Attempt) -> bool:
        """Whether final files are being written."""
        with contextlib.suppress(FileNotFoundError):
            files = [
                entry for entry in os.scandir(self.out) if entry.is_file() and entry.name not in (".lock", "stop")
            ]
            return any(entry.stat().st_mtime > attempt.began for entry in files)
        return False

    def phase(self, attempt: Attempt) -> str:
        """Where the start is, by what it has written."""
        if self.exports(attempt):
            return "exporting"
        here = self.checkpoints()
        for path in here:
            if not (path / "manifest.json").exists() and path not in attempt.torn:
                return "saving" if path == here[-1] else "rotating"
        step = self.step(attempt)
        if step is not None and step > 0:
            return "rotating" if len(here) > KEPT else "stepping"
        cache = Path(os.environ["HF_DATASETS_CACHE"], "hunyuan")
        tokenizes = any(list(cache.glob(f"*.part-{pid}")) for pid in attempt.run.pids)
        return "tokenizing" if tokenizes else "loading"

    # ---------------------------------------------------------------------------------------------- moments

    def live(self, moments: list[tuple[str, str]], tally: Tally) -> None:
        """Kill the run at each moment (phase, target) that comes, and let it end."""
        for phase, target in moments:
            attempt = self.start()
            if not self.wait_for(phase, attempt):
                return self.end(attempt, tally)
            pids = self.kill(attempt, target)
            hit, step = self.phase(attempt), self.step(attempt) or 0
            wait_until_gone(pids)
            tally.hit[self.kind, hit] += 1
            tally.targets[target] += 1
            whole = [path for path in self.checkpoints() if (path / "manifest.json").exists()]
            newest = int(whole[-1].name.partition("-")[2]) if whole else 0
            tally.lost = max(tally.lost, step - newest)
            if newest < self.newest:
                tally.wrong.append(f"{self.kind}, {hit}, {target}: checkpoint-{self.newest} is gone")
            self.newest = newest
            self.said += f"{phase} aimed at, {hit} hit at step {step}, {target}, left: {newest}\n"
        self.end(self.start(), tally)

    def wait_for(self, phase: str, attempt: Attempt) -> bool:
        """Wait for a moment in the phase; False where the run has ended before."""
        draw, watched = self.draw, self.watched(phase, attempt)
        rest = draw.uniform(0, SECONDS[phase])
        junked: set[Path] = set()
        while not next(watched):
            with contextlib.suppress(TimeoutError):
                codes = attempt.run.read_line(timeout=0.001)
                attempt.run.lines = json.dumps(codes).encode() + b"\n"  # for wait()
                return False
            if phase == "rotating":
                self.fill(junked)
        deadline = time.monotonic() + rest
        while time.monotonic() < deadline and (phase != "loading" or not self.step(attempt)):
            time.sleep(0.001)
        return True

    def watched(self, phase: str, attempt: Attempt) -> Iterator[bool]:
        """Whether the phase has come, each time it is asked."""
        if phase == "loading":
            yield True
        begin = self.draw.randrange(1, STEPS)
        while True:
            now = self.phase(attempt)
            step = self.step(attempt) or 0
            late = phase in ("exporting", "tokenizing") or step >= min(begin, STEPS - 1) or step >= STEPS - SAVE_STEPS
            yield now == phase and late or now == "exporting"

    def fill(self, junked: set[Path]) -> None:
        """Give whole checkpoints more files, which a rotation has to delete."""
        for path in self.checkpoints():
            if path not in junked and (path / "manifest.json").exists():
                junked.add(path)
                with contextlib.suppress(FileNotFoundError):
                    for number in range(JUNK):
                        (path / f"junk-{number}").touch()

    def kill(self, attempt: Attempt, target: str) -> list[int]:
        """SIGKILL; returns all processes of the start."""
        session, ranks = attempt.run.session, attempt.run.pids
        children = [p.pid for rank in ranks if psutil.pid_exists(rank) for p in psutil.Process(rank).children()]
        for pid in {"a rank": [self.draw.choice(ranks)], "all ranks": ranks, "the launcher": [session]}[target]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [session, *ranks, *children]

    def end(self, attempt: Attempt, tally: Tally) -> None:
        """Wait for the end of a start that is left alone."""
        done = attempt.run.wait(timeout=300)
        if done.returncode or not (self.out / "train_results.json").exists():
            tally.wrong.append(f"{self.kind}: exit code {done.returncode}\n{self.said}{done.stderr[-1500:]}")

    def weights(self) -> dict[str, torch.Tensor]:
        """The final ones."""
        name = "adapter_model.safetensors" if self.kind == "LoRA" else "model.safetensors"
        return load_file(self.out / name) if (self.out / name).exists() else {}


def wait_until_gone(pids: list[int]) -> None:
    """Wait for the end of processes; one that nobody reaps has ended."""
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"still there 60 s after the kill: {alive}")
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    bits = lambda tensor: tensor.contiguous().view(torch.uint8)
    return one.keys() == two.keys() and all(torch.equal(bits(one[name]), bits(two[name])) for name in one)


def tell(stories: Iterator[tuple[Story, list]], undisturbed: dict[str, dict], tally: Tally) -> Iterator[Tally]:
    """Live through stories one by one, compare their ends, and yield what has come so far."""
    for story, moments in stories:
        story.live(moments, tally)
        if not same(story.weights(), undisturbed[story.kind]):
            tally.wrong.append(f"{story.kind}: other weights\n{story.said}")
        shutil.rmtree(story.out, ignore_errors=True)
        yield tally
