"""What a pass over rows found, and how the user learns of it. Bad rows stop the run or are listed, warnings counted.

Refused: bad rows, unless --bad_rows skip; rows over --max_seq_length with --overlong error.
"""

from collections import Counter
from dataclasses import dataclass, field

from sft.messages import Refused, note

SHOWN = 20  # lines of a kind that are named; the rest is counted
SHOWN_OF_WARNINGS = 5

# Training succeeds with these, but the model learns the wrong thing.
WARNINGS = {
    "no_think_with_thinking": "/no_think in the user's text, but the answer's think block is not empty",
    "without_thinking": "assistant turns without a think block: the model learns to answer without thinking",
    "against_prompt": "assistant turns that do not begin with the generation prompt of inference (thinking under "
    "enable_thinking false, no_think or a template that closes the block: set it in the row)",
    "thinking_left_out": "assistant turns whose thinking the template leaves out",
    "empty_answer": "assistant turns have neither text nor calls: the model learns to say nothing",
    "text_left_out": "messages whose text the template leaves out",
    "switches_left_out": "rows have a reasoning_effort, an enable_thinking or another variable that the template does "
    "not read",
    "without_end": "assistant turns that the template ends with no token of its own: the model does not learn to stop",
    "answer_cut": "rows lose an answer, or its end, at --max_seq_length",
    "tools_left_out": "times tools or tool calls are left out by the template (some render calls only beside tools)",
}


@dataclass
class Report:
    """Counts of what was found; of each kind the first lines, each with what is wrong; notes on accepted oddities; the
    tokens of the longest row."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[tuple[int | str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    longest: int = 0

    def found(self, kind: str, line: int, what: str = "") -> None:
        """Count one more of a kind, and keep its line if it is among the first."""
        self.counts[kind] += 1
        if len(self.lines.setdefault(kind, [])) < SHOWN:
            self.lines[kind].append((line, what))

    def counted(self, counts: Counter[str], line: int) -> None:
        """Add the counts of a row, and keep its line for each warning."""
        for kind, number in counts.items():
            if kind in WARNINGS and number:
                self.found(kind, line)
                number -= 1
            self.counts[kind] += number

    def add(self, later: "Report", file: object = None) -> None:
        """Add what was found further down or, with `file`, in one of several files: lines are then `file:line`."""
        self.counts.update(later.counts)
        for kind, lines in later.lines.items():
            if file is not None:
                lines = [(f"{file}:{line}", what) for line, what in lines]
            self.lines[kind] = (self.lines.get(kind, []) + lines)[:SHOWN]
        self.notes += [text for text in later.notes if text not in self.notes]
        self.longest = max(self.longest, later.longest)

    def remarks(self, file: object) -> list[str]:
        """All lines, each with what there is to say of it."""
        return [
            f"{file}:{line}: {WARNINGS.get(kind, kind)}" + (f": {what}" if what else "")
            for kind, lines in self.lines.items()
            for line, what in lines
        ]

    def listed(self, kind: str) -> str:
        """The first lines of a kind, one below the other, and how many more there are."""
        texts = [f"{line}: {what}" if what else str(line) for line, what in self.lines[kind]]
        more = self.counts[kind] - len(texts)
        return "\n".join(texts + ([f"… {more} more"] if more else []))


def report_findings(report: Report, bad_rows: str, overlong: str, max_seq_length: int) -> None:
    """Print what was found. Refuses bad and overlong rows where the flags say so."""
    counts = report.counts
    if counts["bad"]:
        text = f"{counts['bad']} of {counts['rows']} rows are bad:\n{report.listed('bad')}"
        if bad_rows == "error":
            raise Refused(f"{text}\nMend them, or leave them out with --bad_rows skip")
        note(f"--bad_rows skip: {text}")
    if counts["overlong"]:
        text = f"{counts['overlong']} rows are longer than --max_seq_length {max_seq_length}"
        if overlong == "error":
            raise Refused(f"{text} (--overlong error):\n{report.listed('overlong')}")
        if overlong == "drop":
            note(f"{text}: left out\n{report.listed('overlong')}")
        else:
            note(f"{text}: cut at the right")
    if counts["unsupervised"]:
        note(f"{counts['unsupervised']} rows are left out: no supervised token\n{report.listed('unsupervised')}")
    if counts["split"]:
        note(f"{counts['split']} rows become several sequences: earlier turns change once a later one is there")
    if counts["history_as_written"]:
        what = "earlier turns keep their thinking or tags before later ones"
        note(f"{counts['history_as_written']} {what}: --history answers leaves them out")
    if counts["turns_not_trained_on"]:
        note(f"{counts['turns_not_trained_on']} of {counts['turns']} assistant turns are not trained on")
    unused = [f"{key} ({counts[key]} rows)" for key in counts if key.startswith('"')]
    if unused:
        more = f", … {len(unused) - SHOWN} more" if len(unused) > SHOWN else ""
        note(f"keys that are not used: {', '.join(unused[:SHOWN])}{more}")
    for kind, text in WARNINGS.items():
        if counts[kind]:
            longest = f" {max_seq_length}; the longest row has {report.longest} tokens" * (kind == "answer_cut")
            places = ", ".join(str(line) for line, _ in report.lines[kind][:SHOWN_OF_WARNINGS])
            note(f"warning: {counts[kind]} {text}{longest}. The first: {places}")
