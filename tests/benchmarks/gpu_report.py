"""What bench_gpu.py has found so far: a line each as it comes, a table, the goals; in two files after each line."""

import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

COLUMNS = ("tokens/s", "MFU", "HFU", "of ceiling", "peak GiB", "1st step", "waits")
Result = dict[str, Any]


class Report:
    """Results in the order in which they came: name, part, status (ok, FAILED, out of memory, not run), text, and
    figures as train_results.json calls them."""

    def __init__(self, file: Path, device: str):
        self.file, self.device, self.began, self.results = file, device, time.monotonic(), list[Result]()
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, name: str, status: str, text: str = "", **figures: Any) -> None:
        seconds = time.monotonic() - self.began
        said = ", ".join(filter(None, (status, text, *in_words(figures))))
        print(f"[{seconds:4.0f} s] {part}: {name}: {said}", flush=True)
        first = {"part": part, "name": name, "status": status, "text": text, "seconds": seconds}
        self.results.append(first | figures)
        self.file.write_text(json.dumps(self.results, indent=1))
        Path(f"{self.file}.txt").write_text(self.table() + "\n")

    @property
    def fast(self) -> dict[str, Result]:
        """By name, what has a speed."""
        return {result["name"]: result for result in self.results if result.get("tokens_per_second")}

    def share(self, result: Result) -> float | None:
        """What the model needs each second, over the fastest product of matrices; None where one is not known."""
        ceiling = max((found.get("tflops", 0.0) for found in self.results), default=0.0)
        if not ceiling or not result.get("flops"):
            return None
        return result["flops"] / result["tokens"] * result["tokens_per_second"] / ceiling / 1e12

    def table(self) -> str:
        """What has a speed in columns, then the rest, then the goals."""
        lines = [f"{'':<46}" + "".join(f"{column:>11}" for column in COLUMNS) + "  attention"]
        for name, result in self.fast.items():
            first, peak = result.get("seconds_to_first_step"), result["peak_memory_bytes"] / 2**30
            cells = [f"{result['tokens_per_second']:.0f}"]
            cells += [percent(share) for share in (result.get("mfu"), result.get("hfu"), self.share(result))]
            cells += [f"{peak:.1f}", f"{first:.0f} s" if first else "-", percent(result.get("data_wait_share"))]
            attention = result.get("attention", "")
            lines.append(f"{name:<46}" + "".join(f"{cell:>11}" for cell in cells) + f"  {attention}")
        right = [result["most"] for result in self.results if result["status"] == "ok" and "most" in result]
        if right:
            lines += ["", f"correct: {len(right)} paths give what the CPU gives in fp32, to {max(right):.1e}"]
        lines.append("")
        for r in self.results:
            if not r.get("tokens_per_second") and not (r["status"] == "ok" and "most" in r):
                lines.append(f"{r['part']}: {r['name']}: {r['status']}{', ' * bool(r['text'])}{r['text']}")
        lines += dict.fromkeys(line for result in self.fast.values() for line in result.get("warnings", ()))
        return "\n".join([*lines, "", *self.goals()])

    def goals(self) -> list[str]:
        """The goals, which are those on one H100, and whether they are met."""
        if self.device == "cpu":
            return []
        ours = {name: result for name, result in self.fast.items() if "TRL" not in name}
        theirs = [result["tokens_per_second"] for name, result in self.fast.items() if "TRL" in name]

        def speed(pattern: str) -> float | None:
            return max((r["tokens_per_second"] for name, r in ours.items() if re.search(pattern, name)), default=None)

        def share(pattern: str) -> float | None:
            return max((self.share(r) or 0.0 for name, r in ours.items() if re.search(pattern, name)), default=None)

        seven = r"^7B .*LoRA 4k"
        lines = [goal("7B shape, LoRA 4k", speed(seven), least, "tokens/s") for least in (12_500, 14_500)]
        lines.append(goal("7B shape, LoRA 4k", share(seven), 0.5, "of the ceiling"))
        lines.append(goal("MoE slice, 4k", share("^(A13B|Hy-MT2) .*4k"), 0.35, "of the ceiling"))
        for name in [name for name in ours if name.endswith(", 4 bits")]:
            plain = speed(f"^{re.escape(name.removesuffix(', 4 bits'))}$")
            ratio = ours[name]["tokens_per_second"] / plain if plain else None
            lines.append(goal(name, ratio, 0.5, "of the speed in bf16"))
        if theirs:
            ours_again = speed(rf"{seven}(, again)?$")
            lines.append(goal("7B shape, LoRA 4k", ours_again and ours_again / max(theirs), 1, "of TRL's speed"))
        return lines


def goal(what: str, value: float | None, least: float, unit: str) -> str:
    reached = "not measured" if not value else f"{value:,.2f}, {'met' if value >= least else 'missed'}"
    return f"goal: {what} ≥ {least:,} {unit}: {reached}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def in_words(figures: dict[str, Any]) -> list[str]:
    """The figures of a run that its line shows."""
    if not figures.get("tokens_per_second"):
        return []
    said = [f"{figures['tokens_per_second']:.0f} tokens/s", f"peak {figures['peak_memory_bytes'] / 2**30:.1f} GiB"]
    said += [f"{key} {figures[key]:.1%}" for key in ("mfu", "hfu") if figures.get(key)]
    if figures.get("busiest"):
        said.append(f"the busiest expert has {figures['busiest']:.1f} times the mean")
    return [*said, figures.get("attention", "")]


def said_in(log: str) -> dict[str, Any]:
    """What a run of train.py printed: how it attends to packed rows, each step's tokens/s, what of it is a warning."""
    return {
        "attention": (re.findall(r"attention of packed rows = (\S+)", log) or [""])[-1],
        "speeds": [int(speed) for speed in re.findall(r"^step .* tokens/s (\d+)", log, re.M)],
        "warnings": re.findall(r"warning: attention .*", log),
    }


def take_second_half(figures: dict[str, Any]) -> None:
    """Let a run's figures be those of the second half of its steps, by their median: what is compiled is compiled once
    more when lengths change, mostly in the second or third step."""
    speeds = figures["speeds"]
    faster = statistics.median(speeds[len(speeds) // 2 :]) / figures["tokens_per_second"]
    for key in ("tokens_per_second", "mfu", "hfu"):
        figures[key] = figures[key] and figures[key] * faster


def busiest_expert(out: Path, model: Path) -> float | None:
    """The largest load of an expert in the last step, over the mean; None where the model has no experts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loads = []
    for file in out.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file))
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if "expert_load" in tag and tag.endswith("/most")]
        loads += [events.Scalars(tag)[-1].value for tag in tags]
    return max(loads) * json.loads((model / "config.json").read_text())["num_experts"] if loads else None
