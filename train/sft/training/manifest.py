"""Checkpoints that are whole: manifest.json, which is renamed in last, and the deletion of old ones by step number.

manifest.json: {"step": N, "world_size": W, "save_on_each_node": bool, "files": {relative path: {"size": bytes,
"xxh3_128": hex}}}. Of an optimizer's file above SAMPLED_ABOVE bytes head, tail and a sample are hashed
("xxh3_128_sample"); with --verify_checkpoints the whole file as well.
"""

import atexit
import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from xxhash import xxh3_128

from sft.arguments import TrainingArguments
from sft.messages import note
from sft.training.environment import from_all_ranks, ranks_of_this_disk

MANIFEST = "manifest.json"
RUN = "run.json"
SAMPLED_ABOVE = 1 << 30  # bytes
BLOCK, BLOCKS = 1 << 20, 256  # a sample: bytes of each block, number of blocks
AT_ONCE = 4  # files that a rank hashes at the same time
Hashed = dict[str, Future[dict[str, Any]]]  # {relative path: what the manifest says of the file}
SEEN_WITHIN = 60  # seconds, of a file that another node has written on a shared disk


def checkpoints_in(output: Path) -> list[Path]:
    """The directories checkpoint-N in `output`, in the order of their steps."""
    there = output.glob("checkpoint-*") if os.path.isdir(output) else ()  # glob raises where a parent is closed
    found = [path for path in there if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


# --------------------------------------------------------------------------------------------------------- writing


class RestOfSave:
    """What makes a checkpoint whole, in a thread while training goes on: its manifest, and then the deletion of old
    checkpoints. A process that ends waits for it, a minute at most."""

    def __init__(self) -> None:
        self.checkpoint = Path()
        self.work: Future[None] = Future()
        self.work.set_result(None)
        atexit.register(lambda: concurrent.futures.wait([self.work], timeout=60))

    def begin(self, checkpoint: Path, args: TrainingArguments, limit: int | None, best: str | None) -> None:
        """Begin it on this rank. All ranks must call, after the save; see rotate()."""
        self.checkpoint, self.work = checkpoint, Future()
        hashed = begin_hashing(checkpoint, args)  # here: a process that ends takes on no work, but ends what it has
        threading.Thread(target=self.complete, args=(hashed, args, limit, best), daemon=True).start()

    def complete(self, hashed: Hashed, args: TrainingArguments, limit: int | None, best: str | None) -> None:
        """The work itself."""
        try:
            write_manifest(self.checkpoint, args, hashed)
            if args.should_save:
                rotate(self.checkpoint.parent, limit, best)
            self.work.set_result(None)
        except Exception as error:
            self.work.set_exception(error)

    def has_failed(self) -> bool:
        """Whether it has ended with an error, on this rank."""
        return self.work.done() and self.work.exception() is not None

    def wait(self, seconds: float | None = None) -> None:
        """Wait for it, and raise what it has raised; OSError where it takes longer."""
        if not concurrent.futures.wait([self.work], seconds).done:
            raise OSError(f"{self.checkpoint} could not be made whole in {seconds} s")
        self.work.result()


def begin_hashing(checkpoint: Path, args: TrainingArguments) -> Hashed:
    """Hash the files that this rank has just written, from the page cache, in threads: that releases the GIL."""
    rank, disk = args.process_index, ranks_of_this_disk(args)
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    owners = {path: rank_in(path.name) for path in paths}
    mine = [path for path in paths if owners[path] == rank or args.should_save and owners[path] not in disk]
    pool = ThreadPoolExecutor(AT_ONCE)
    return {p.relative_to(checkpoint).as_posix(): pool.submit(entry_of, p, args.verify_checkpoints) for p in mine}


def write_manifest(checkpoint: Path, args: TrainingArguments, hashed: Hashed | None = None) -> None:
    """Make a checkpoint whole: rename its manifest in, once every file is hashed. All ranks must call, after the save.
    Raises OSError where the saving rank does not see another's files."""
    disk, hashed = ranks_of_this_disk(args), begin_hashing(checkpoint, args) if hashed is None else hashed
    own = {name: entry.result() for name, entry in hashed.items()}
    ranks = from_all_ranks(own)
    if args.should_save:
        files = {name: entry for rank in disk for name, entry in ranks[rank].items()}
        deadline = time.monotonic() + SEEN_WITHIN
        while fault := wrong_size(checkpoint, files):
            if time.monotonic() > deadline:
                advice = "Where each machine has a disk of its own, give --save_on_each_node"
                raise OSError(f"{checkpoint}: {fault[0]}, which another rank has saved: {fault[1]}. {advice}")
            time.sleep(1)
        content = {"step": step_of(checkpoint), "world_size": args.world_size}
        content |= {"save_on_each_node": args.save_on_each_node, "files": files}
        aside = checkpoint / f"{MANIFEST}.tmp"
        aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        aside.rename(checkpoint / MANIFEST)


def rank_in(name: str) -> int | None:
    """The rank that writes and loads a file of this name; None where that is no single one."""
    found = re.search(r"(?:zero_pp_rank|rng_state)_(\d+)", name)
    return int(found.group(1)) if found else None


def entry_of(path: Path, verify: bool) -> dict[str, Any]:
    """What the manifest says of a file."""
    size = path.stat().st_size
    sampled = path.name.endswith(("optim_states.pt", "optimizer.pt")) and size > SAMPLED_ABOVE
    return {"size": size} | hashes(path, sampled, whole=verify or not sampled)


def hashes(path: Path, sampled: bool, whole: bool) -> dict[str, str]:
    """A file's hashes in hex. It is read in blocks; a sample's blocks lie at even distances, from head to tail."""
    found = {}
    with path.open("rb") as file:
        if whole:
            found["xxh3_128"] = hashlib.file_digest(file, xxh3_128).hexdigest()  # type: ignore[arg-type]
        if sampled:
            digest, last = xxh3_128(), max(0, path.stat().st_size - BLOCK)
            for number in range(BLOCKS):
                file.seek(last * number // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
            found["xxh3_128_sample"] = digest.hexdigest()
    return found


# -------------------------------------------------------------------------------------------------------- checking


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """{relative path: size and hashes}. Raises OSError where there is no manifest, ValueError where it is damaged or
    a path in it leaves the checkpoint."""
    content: Any = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError("it lists no files")
    for name, entry in files.items():
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\0" not in name
        hashed = isinstance(entry, dict) and entry.keys() & {"xxh3_128", "xxh3_128_sample"}
        if not (inside and hashed and isinstance(entry.get("size"), int)):
            raise ValueError(name)
    return files


def find_fault(
    checkpoint: Path, rank: int, world_size: int, checks_others: bool, verify: bool = False
) -> tuple[str, str] | None:
    """(file, `missing`, `size` or `content`) of the first fault in what this rank checks; None where there is none.
    It waits for no other rank.

    Args:
        world_size: of this run. After a save by more or fewer ranks one checks several shards, or none.
        checks_others: also the sizes of all files, and the content of those that belong to no single rank. For rank 0,
            and of separate disks for the first rank of each node.
        verify: hash sampled files whole, where the manifest can tell.
    """
    try:
        files = read_manifest(checkpoint)
    except (OSError, ValueError) as error:
        return MANIFEST, "content" if isinstance(error, ValueError) else "missing"
    ranks = {name: rank_in(PurePosixPath(name).name) for name in files}
    own = [name for name, owner in ranks.items() if (checks_others if owner is None else owner % world_size == rank)]
    if fault := wrong_size(checkpoint, {name: files[name] for name in (files if checks_others else own)}):
        return fault
    if verify and any("xxh3_128" not in files[name] for name in own):
        note(f"{checkpoint}: was saved without --verify_checkpoints: of its largest files only a sample is checked")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        same = pool.map(lambda name: has_hashes(checkpoint / name, files[name], verify), own)
        return next(((name, "content") for name, is_same in zip(own, same) if not is_same), None)


def has_hashes(path: Path, entry: dict[str, Any], verify: bool) -> bool:
    """Whether a file's content is what its entry says. Of one that was sampled only the sample is read, if not all of
    it is to be verified."""
    sampled = "xxh3_128_sample" in entry
    try:
        now = hashes(path, sampled, whole="xxh3_128" in entry and (verify or not sampled))
    except OSError:  # a bad sector
        return False
    return now.items() <= entry.items()


def wrong_size(checkpoint: Path, files: dict[str, dict[str, Any]]) -> tuple[str, str] | None:
    """The first file that is missing or of another size, and the word for it."""
    for name, entry in files.items():
        if not (checkpoint / name).is_file():
            return name, "missing"
        if (checkpoint / name).stat().st_size != entry["size"]:
            return name, "size"
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether there is a manifest, and every file in its size. The content is not read."""
    try:
        return wrong_size(checkpoint, read_manifest(checkpoint)) is None
    except (OSError, ValueError):
        return False


# -------------------------------------------------------------------------------------------------------- deleting


def is_torn(checkpoint: Path) -> bool:
    """Whether a save or a deletion of ours was cut off there. What was changed afterwards, or comes from an earlier
    release or another program, is not."""
    names = {path.name for path in checkpoint.iterdir()}
    return not names or RUN in names and MANIFEST not in names


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, or a symlink in its place and not what that points to. The manifest goes first and run.json
    last, so that a kill leaves a torn one."""
    if checkpoint.is_symlink() or checkpoint.is_file():
        return checkpoint.unlink()
    if checkpoint.exists():
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        for path in checkpoint.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != RUN:
                path.unlink()
        shutil.rmtree(checkpoint)


def rotate(output: Path, limit: int | None, best: str | None) -> None:
    """Delete all whole checkpoints but the newest `limit`, by step number; the best one is kept and counted among
    them. Delete torn ones that are older than the newest whole one. All others are left alone: changed ones, and those
    of an earlier release or another program."""
    here = checkpoints_in(output)
    whole = [path for path in here if is_whole(path)]
    if not whole:
        return
    kept = {path for path in whole if path == whole[-1] or best and path.resolve() == Path(best).resolve()}
    others = [path for path in whole if path not in kept]
    old = others[: max(0, len(whole) - max(limit, len(kept)))] if limit and limit > 0 else []
    for path in here[: here.index(whole[-1])]:
        with contextlib.suppress(OSError):  # a file is still open on a file server: the next rotation tries again
            if path in old or is_torn(path):
                remove(path)
