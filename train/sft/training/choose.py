"""Which checkpoint a run goes on from: the same on all ranks, and whole.

Refused (exit code 2): a checkpoint that is not whole, a run's directory without a whole one.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.messages import OUTPUT_ROOT, Refused, choice, first_few, note
from sft.training.environment import from_all_ranks, number_of_processes
from sft.training.manifest import MANIFEST, RUN, checkpoints_in, find_fault, step_of


def choose_checkpoint(given: dict[str, Any]) -> Path | None:
    """The checkpoint that the flags name or mean; None where the run begins at step 0. All ranks must call.

    It is the newest whole one in --output_dir with --auto_resume, if there is one; else what --resume_from_checkpoint
    names: a checkpoint, or the newest whole one of a run. Prints a line for each that is passed over.
    """
    named = given.get("resume_from_checkpoint")
    if given.get("auto_resume"):
        if not given.get("output_dir"):
            raise Refused("--auto_resume goes on in --output_dir, which is not given")
        if found := newest_whole(Path(given["output_dir"]), given, refuses_foreign=named is None):
            return found
    if named is None:
        return None
    place = run_or_checkpoint(named, given.get("output_dir"), lambda run: from_all_ranks(run)[0])
    if from_all_ranks(bool(checkpoints_in(place)))[0]:
        if found := newest_whole(place, given):
            return found
        raise Refused(f"--resume_from_checkpoint {place}: none of its checkpoints is whole")
    check_named(place, given)
    return place


def run_or_checkpoint(named: str, output_dir: str | None, agree: Callable[[str], str] = str) -> Path:
    """The directory that --resume_from_checkpoint names. Without a name it is output_dir, else the newest run of
    train.sh; `agree` returns rank 0's, because the disks of the others may differ."""
    if named.lower() not in ("", "true"):
        return Path(named)
    if output_dir:
        return Path(output_dir)
    runs = OUTPUT_ROOT.iterdir() if OUTPUT_ROOT.is_dir() else ()
    times = ((path.stat().st_mtime, str(run)) for run in runs for path in checkpoints_in(run))
    newest = agree(max(times, default=(0, ""))[1])
    if not newest:
        raise Refused(f"--resume_from_checkpoint: there is no run in {OUTPUT_ROOT}; name a checkpoint or a run")
    choice("resume_from_checkpoint", newest, "the newest run")
    return Path(newest)


def newest_whole(run: Path, given: dict[str, Any], refuses_foreign: bool = True) -> Path | None:
    """The newest checkpoint of a run that is whole on every disk; prints a line for each newer one. Refuses a run that
    has only checkpoints of an earlier release or another program, and one of which a rank sees nothing."""
    here = checkpoints_in(run)
    seen = from_all_ranks([step_of(path) for path in here])
    saved = any(from_all_ranks(any((path / MANIFEST).exists() for path in here)))
    if saved and [] in seen and not given.get("overwrite_output_dir"):
        raise Refused(
            f"{run}: rank {seen.index([])} does not see the checkpoints in it: is it mounted on that rank's machine? "
            "To begin at step 0: --overwrite_output_dir"
        )
    foreign = None
    for step in sorted(set().union(*seen), reverse=True):
        checkpoint = run / f"checkpoint-{step}"
        fault = fault_on_any_rank(checkpoint, given)
        if fault is None:
            return checkpoint
        note(f"{checkpoint.name}: {fault[0]}: {fault[1]}; passed over")
        if "foreign" in from_all_ranks(kind_of(checkpoint)):
            foreign = checkpoint
    if foreign and refuses_foreign:
        raise Refused(
            f"{foreign}: was saved by an earlier release or another program, which writes no {MANIFEST}. To go on "
            f"from it, name it: --resume_from_checkpoint {foreign}"
        )
    return None


def check_named(checkpoint: Path, given: dict[str, Any]) -> None:
    """Refuse a checkpoint that is named and is not whole. One without manifest is taken as it is if an earlier release
    or another program has saved it; under DeepSpeed, which unpickles what it loads, with --resume_anyway."""
    kinds = from_all_ranks(kind_of(checkpoint))
    for rank, kind in enumerate(kinds):
        if kind in ("none", "other"):
            why = "no such directory" if kind == "none" else "is not a checkpoint, it has no trainer_state.json"
            why += f" on the disk of rank {rank}" if rank else ""
            raise Refused(f"--resume_from_checkpoint {checkpoint}: {why}{those_beside(checkpoint)}")
    fault = fault_on_any_rank(checkpoint, given)
    if fault is None:
        return
    file, word = fault
    if file == MANIFEST and word == "missing" and ("foreign" in kinds or given.get("resume_anyway")):
        if any(from_all_ranks((checkpoint / "latest").exists())) and not given.get("resume_anyway"):
            raise Refused(
                f"--resume_from_checkpoint {checkpoint}: has no {MANIFEST}, and DeepSpeed would unpickle its files, "
                "which can run code. If you trust them: --resume_anyway"
            )
        return note(f"{checkpoint}: has no {MANIFEST}: its files are not compared")
    if word == "missing" and given.get("resume_anyway"):
        return note(f"--resume_anyway: {checkpoint.name}: {file}: missing")
    newer = f"give its run's directory, {checkpoint.parent}, to go on from the newest whole one"
    raise Refused(f"--resume_from_checkpoint {checkpoint}: is not whole: {file}: {word}. Instead, {newer}")


def kind_of(place: Path) -> str:
    """`ours`; `foreign`, of an earlier release or another program; `other`, which is no checkpoint; `none`."""
    if (place / RUN).exists() or (place / MANIFEST).exists():
        return "ours"
    return "foreign" if (place / "trainer_state.json").is_file() else "other" if place.is_dir() else "none"


def those_beside(place: Path) -> str:
    """Words on the checkpoints or runs that are in a directory, or else in the one around it."""
    for folder in (place, place.parent):
        runs = (run for run in sorted(folder.glob("*")) if checkpoints_in(run))
        if found := checkpoints_in(folder)[::-1] or list(runs):
            return f". There are: {first_few(list(map(str, found)))}"
    return ""


def fault_on_any_rank(checkpoint: Path, given: dict[str, Any]) -> tuple[str, str] | None:
    """(file, what is wrong with it) of the first rank that finds something. All ranks must call."""
    rank, text = int(os.environ.get("RANK", 0)), ""
    with contextlib.suppress(OSError):
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8", errors="replace")
    own_disk = '"save_on_each_node": true' in text and os.environ.get("LOCAL_RANK", "0") == "0"
    verify = bool(given.get("verify_checkpoints"))
    fault = find_fault(checkpoint, rank, number_of_processes(), rank == 0 or own_disk, verify)
    return next((tuple(found) for found in from_all_ranks(fault) if found), None)
