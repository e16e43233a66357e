"""One pass over a file of rows, kept: a memory-mapped Arrow file for all ranks of a node and all later runs.

The name is a hash of the file's content, the tokenizer with its template, the options and this code: what has not
changed is not tokenized again, what has changed is. Ranks wait for one another at a file lock, never in a collective.
An entry appears whole, by a rename; what an interrupted pass leaves behind is removed by the next.
"""

import gc
import hashlib
import inspect
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sft.data.report import Report
from sft.data.rows import Unreadable, read_lines
from sft.messages import Refused
from sft.processes import die_with_parent

CHUNK = 2**19  # bytes of rows that are tokenized at a time
WORTH_A_WORKER = 2**23  # bytes of rows for which one more process starts
MOST_WORKERS = 16
A_DAY = 86_400  # seconds after which what another pass left behind is nobody's
RACY = 2 * 10**9  # nanoseconds within which a file may change again without its times telling
CODE = sorted(Path(__file__).parent.glob("*.py"))

Line = tuple[int, bytes | None]
Encode = Callable[[list[Line]], tuple[pa.Table, Report]]


def tokenized(file: Path, parts: list[str], encode: Encode, workers: int) -> tuple[datasets.Dataset, Report]:
    """What `encode` makes of the file's lines, and what it found: from the cache, or by one pass.

    Args:
        parts: beside the file's content, what decides about the result.
        workers: processes that encode.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hunyuan"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{digest(str(file.resolve()), *parts)}.lock", poll_interval=0.2):
            entry = folder / digest(content_digest(file, folder), *parts)
            with FileLock(f"{entry}.lock", poll_interval=0.2):  # the same content may lie in two places
                if not entry.is_dir():
                    make_entry(entry, file, encode, workers)
    except OSError as error:
        why = f"{error.strerror or error} ({error.filename or folder})"
        raise Refused(
            f"{file}: cannot be tokenized into {folder}: {why}. HF_DATASETS_CACHE names another folder"
        ) from error
    found = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    if refusal := found.pop("refused", None):
        raise Refused(refusal.replace("FILE", str(file)))
    report = Report(
        Counter(found["counts"]), {k: [tuple(x) for x in v] for k, v in found["lines"].items()}, found["notes"]
    )
    return datasets.Dataset.from_file(str(entry / "rows.arrow")), report


def workers_for(files: list[Path]) -> int:
    """One process a core that this one may use, where there is enough for each to do."""
    size = sum(file.stat().st_size * (5 if file.suffix == ".gz" else 1) for file in files)
    return max(1, min(len(os.sched_getaffinity(0)), MOST_WORKERS, size // WORTH_A_WORKER))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides how a tokenizer renders and tokenizes, this code included: not of where it lies, so
    that a checkpoint's copy is the same tokenizer."""
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = repr(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    kept = {k: v for k, v in tokenizer.init_kwargs.items() if not k.endswith(("_file", "name_or_path", "auto_map"))}
    files = [Path(v) for k, v in sorted(tokenizer.init_kwargs.items()) if k.endswith("_file") and isinstance(v, str)]
    code = Path(inspect.getsourcefile(type(tokenizer)))
    files += sorted(code.parent.glob("*.py")) if "transformers_modules" in code.parts else []
    files = CODE + ([] if tokenizer.is_fast else [file for file in files if file.is_file()])
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    versions = [version(name) for name in ("transformers", "tokenizers", "jinja2", "tiktoken")]
    return digest(vocabulary, repr(tokenizer.chat_template), repr(sorted(kept.items())), *contents, *versions)


def stamp(file: Path) -> str:
    """What changes when a file's content is changed, short of reading it."""
    s = file.stat()
    return digest(str(file.resolve()), repr((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)))


def content_digest(file: Path, folder: Path) -> str:
    """sha256 of a file's content. Large files are read once: the digest is kept with the file's stamp, unless the file
    is so new that it might change again within the clock's grain."""
    kept = folder / "digests" / stamp(file)
    if kept.is_file():
        return kept.read_text()
    began, times = time.time_ns(), file.stat()
    with open(file, "rb") as content:
        value = hashlib.file_digest(content, "sha256").hexdigest()
    if began - max(times.st_mtime_ns, times.st_ctime_ns) > RACY:
        kept.parent.mkdir(exist_ok=True)
        aside = kept.with_suffix(f".{os.getpid()}")
        aside.write_text(value)
        aside.rename(kept)
    return value


# ------------------------------------------------------------------------------------------------------------ the pass


def make_entry(entry: Path, file: Path, encode: Encode, workers: int) -> None:
    """Encode all lines into `entry`, in a folder aside that is renamed at the end. A file that is refused leaves an
    entry that says so: the other ranks need not read it again."""
    for old in entry.parent.glob("*.part-*"):
        if old.name.startswith(entry.name) or time.time() - old.stat().st_mtime > A_DAY:
            shutil.rmtree(old, ignore_errors=True)
    aside = entry.with_name(f"{entry.name}.part-{os.getpid()}")
    before = stamp(file)
    try:
        with stops_cleanly():
            aside.mkdir()
            try:
                found = vars(write_rows(aside / "rows.arrow", file, encode, workers))
            except Unreadable:
                raise
            except Refused as refusal:
                found = {"refused": str(refusal).replace(str(file), "FILE")}
            if stamp(file) != before:
                raise Unreadable(f"{file}: was changed while it was read")
            (aside / "report.json").write_text(json.dumps(found), encoding="utf-8")
            aside.rename(entry)
    except BrokenProcessPool as error:
        why = "out of memory? Fewer --preprocessing_num_workers need less"
        raise Refused(f"{file}: a process that tokenized it was ended from outside: {why}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_rows(path: Path, file: Path, encode: Encode, workers: int) -> Report:
    """Stream the file's lines through `encode` into an Arrow file, in order."""
    size, report = file.stat().st_size, Report()
    workers = min(workers, -(-size // CHUNK)) if file.suffix != ".gz" else workers
    # the bar appears when a pass takes more than a moment; in a log file it is a line now and then
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenizing {file.name}", delay=2,
               mininterval=0.5 if sys.stderr.isatty() else 20)  # fmt: skip
    empty = encode([])[0]
    with bar, ArrowWriter(schema=empty.schema, path=str(path)) as writer:
        writer.write_table(empty)
        for (table, found), position in encoded(chunks(file, report.notes), encode, workers):
            report.add(found)
            if table.num_rows:
                writer.write_table(table)
            bar.update(position - bar.n)
        writer.finalize()
    return report


def chunks(file: Path, notes: list[str]) -> Iterator[tuple[list[Line], int]]:
    """Lines together, up to about CHUNK bytes, and the place in the file after them."""
    lines, size = [], 0
    for number, line, position in read_lines(file, notes):
        lines.append((number, line))
        size += len(line or b"")
        if size >= CHUNK:
            yield lines, position
            lines, size = [], 0
    if lines:
        yield lines, position


def encoded(chunks: Iterator[tuple[list[Line], int]], encode: Encode, workers: int):
    """`encode` on each chunk, in order; with several workers no more than a few chunks are under way."""
    if workers == 1:
        yield from ((encode(lines), position) for lines, position in chunks)
        return
    # forked: the tokenizer is not loaded again. A worker touches neither torch nor a device
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=begin_worker, initargs=(encode,))
    try:
        under_way = deque()
        for lines, position in chunks:
            under_way.append((pool.submit(work, lines), position))
            if len(under_way) > 2 * workers:
                future, position = under_way.popleft()
                yield future.result(), position
        yield from ((future.result(), position) for future, position in under_way)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def begin_worker(encode: Encode) -> None:
    """A worker ends with its parent, leaves signals to it, and has one core."""
    global _encode
    _encode = encode
    gc.freeze()  # what the parent has imported is not searched for garbage again and again
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def work(lines: list[Line]) -> tuple[pa.Table, Report]:
    return _encode(lines)


@contextmanager
def stops_cleanly():
    """SIGTERM ends the pass like Ctrl-C does: what it has written so far is removed."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
