"""One pass over a file of rows, kept: a memory-mapped Arrow file for all ranks of a node and all later runs.

An entry's name is a hash of the file's content, the tokenizer with its template, the options and this code: what has
not changed is not tokenized again. Ranks wait for one another at a file lock, never in a collective. An entry appears
whole, by a rename; what an interrupted pass leaves behind is removed by the next.
"""

import gc
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import datasets
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from sft.data.lines import Unreadable, is_gzip, read_lines
from sft.data.report import Report
from sft.data.shapes import shape_in
from sft.messages import Refused
from sft.processes import die_with_parent

CHUNK = 2**19  # bytes of rows that are tokenized at a time
WORTH_A_WORKER = 2**23  # bytes of rows for which one more process starts
MOST_WORKERS = 16
A_DAY = 86_400  # seconds after which what another pass left behind is nobody's
RACY = 2 * 10**9  # nanoseconds within which a file may change again without its times telling
OF_A_PLACE = ("_file", "name_or_path", "auto_map", "is_local", "local_files_only", "_commit_hash", "trust_remote_code")
CODE = sorted(Path(__file__).parent.glob("*.py"))

Line = tuple[int, bytes | None]
Chunk = tuple[list[Line], str | None]  # lines, and the shape of their file
Encode = Callable[..., tuple[pa.Table, Report]]  # of lines and the keyword shape
_encode: Encode  # a worker's


def tokenized(file: Path, key: list[str], encode: Encode, workers: int) -> tuple[datasets.Dataset, Report]:
    """What `encode` makes of the file's lines, and what it found: from the cache, or by one pass of several workers.

    `key` is what decides about the result beside the file's content. Refuses a folder that cannot be written, and what
    read_lines refuses.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hunyuan"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{digest(str(file.resolve()), *key)}.lock", poll_interval=0.2):
            entry = folder / digest(content_digest(file, folder), *key)
            with FileLock(f"{entry}.lock", poll_interval=0.2):  # the same content may lie in two places
                if not entry.is_dir():
                    make_entry(entry, file, encode, workers)
    except OSError as error:
        why = f"cannot be tokenized into {folder}: {error.strerror or error} ({error.filename or folder})"
        raise Refused(f"{file}: {why}. HF_DATASETS_CACHE names another folder") from error
    found = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    if refusal := found.pop("refused", None):
        raise Refused(refusal.replace("FILE", str(file)))
    report = Report(Counter(found.pop("counts")), **found)
    return datasets.Dataset.from_file(str(entry / "rows.arrow")), report


def workers_for(files: list[Path]) -> int:
    """One process a core that this one may use, where there is enough for each to do."""
    size = sum(file.stat().st_size * (5 if is_gzip(file) else 1) for file in files)
    return max(1, min(len(os.sched_getaffinity(0)), MOST_WORKERS, size // WORTH_A_WORKER))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how a tokenizer renders and tokenizes, this code included."""
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in CODE]
    versions = [version(name) for name in ("transformers", "tokenizers", "jinja2", "tiktoken")]
    return digest(tokenizer_digest(tokenizer), *contents, *versions)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer and its template. Where it lies does not count: a checkpoint's copy is the same."""
    given = sorted(tokenizer.init_kwargs.items())
    settings = [(name, value) for name, value in given if not name.endswith(OF_A_PLACE)]
    files = []
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = repr(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
        named = [Path(value) for name, value in given if name.endswith("_file") and isinstance(value, str)]
        files = [file for file in named if file.is_file()]
        code = Path(inspect.getsourcefile(type(tokenizer)) or "")
        if "transformers_modules" in code.parts:
            files += [code, *map(Path, sorted(get_relative_import_files(code)))]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return digest(vocabulary, repr(tokenizer.chat_template), repr(settings), *contents)


def stamp(file: Path) -> str:
    """What changes when a file's content is changed, short of reading it."""
    s = file.stat()
    return digest(str(file.resolve()), repr((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)))


def content_digest(file: Path, folder: Path) -> str:
    """sha256 of a file's content. It is kept under the file's stamp, so that a second start reads nothing; but not
    where the file is so new that it might change again within the clock's grain."""
    kept = folder / "digests" / stamp(file)
    if kept.is_file():
        return kept.read_text()
    began, times = time.time_ns(), file.stat()
    with open(file, "rb") as content:
        value = hashlib.file_digest(content, "sha256").hexdigest()
    if began - max(times.st_mtime_ns, times.st_ctime_ns) > RACY:
        kept.parent.mkdir(exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_text(value)
        temporary.rename(kept)
    return value


# --- the pass --------------------------------------------------------------------------------------------------------


def make_entry(entry: Path, file: Path, encode: Encode, workers: int) -> None:
    """Encode all lines into a temporary folder, and rename it to `entry` at the end.

    A file that is refused leaves an entry that says so: neither the other ranks nor a later run read it again.
    """
    for old in entry.parent.glob("*.part-*"):
        if old.name.startswith(entry.name) or time.time() - old.stat().st_mtime > A_DAY:
            shutil.rmtree(old, ignore_errors=True)
    temporary = entry.with_name(f"{entry.name}.part-{os.getpid()}")
    before = stamp(file)
    try:
        temporary.mkdir()
        try:
            found = vars(write_rows(temporary / "rows.arrow", file, encode, workers))
        except Unreadable:
            raise
        except Refused as refusal:
            found = {"refused": str(refusal).replace(str(file), "FILE")}
        if stamp(file) != before:
            raise Unreadable(f"{file}: was changed while it was read")
        (temporary / "report.json").write_text(json.dumps(found), encoding="utf-8")
        temporary.rename(entry)
    except BrokenExecutor as error:
        why = "out of memory? Fewer --preprocessing_num_workers need less"
        raise Refused(f"{file}: a process that tokenized it was ended from outside: {why}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_rows(path: Path, file: Path, encode: Encode, workers: int) -> Report:
    """Stream the file's lines through `encode` into an Arrow file, in order."""
    size, report = file.stat().st_size, Report()
    workers = workers if is_gzip(file) else min(workers, math.ceil(size / CHUNK))
    # the bar appears when a pass takes more than a moment; in a log file it is a line now and then
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenizing {file.name}", delay=2,
               mininterval=0.5 if sys.stderr.isatty() else 20)  # fmt: skip
    schema = encode([])[0].schema
    with bar, pa.ipc.new_stream(str(path), schema) as writer:
        for (table, found), position in encoded(chunks(file, report.notes), encode, workers):
            report.add(found)
            writer.write_table(table)
            bar.update(position - bar.n)
    return report


def chunks(file: Path, notes: list[str]) -> Iterator[tuple[Chunk, int]]:
    """Lines together, about CHUNK bytes of them, with the shape of the file's first row, and the place in the file
    after them."""
    lines, size, shape = [], 0, None
    for number, line, position in read_lines(file, notes):
        shape = shape or (shape_in(line) if line else None)
        lines.append((number, line))
        size += len(line or b"")
        if size >= CHUNK:
            yield (lines, shape), position
            lines, size = [], 0
    if lines:
        yield (lines, shape), position
    notes += [shape] if shape not in (None, "messages") else []


def encoded(chunks: Iterator[tuple[Chunk, int]], encode: Encode, workers: int) -> Iterator:
    """Yield what `encode` makes of each chunk, in order. With several workers a few chunks are under way at a time."""
    if workers == 1:
        for (lines, shape), position in chunks:
            yield encode(lines, shape=shape), position
        return
    # forked: the tokenizer is not loaded again. A worker touches neither torch nor a device
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=begin_worker, initargs=(encode,))
    try:
        under_way: deque[tuple[Future, int]] = deque()
        for (lines, shape), position in chunks:
            under_way.append((pool.submit(work, lines, shape), position))
            if len(under_way) > 2 * workers:
                future, position = under_way.popleft()
                yield future.result(), position
        for future, position in under_way:
            yield future.result(), position
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def begin_worker(encode: Encode) -> None:
    """A worker ends with its parent, leaves signals to it, and has one core."""
    global _encode
    _encode = encode
    gc.freeze()  # what the parent has imported is not searched for garbage again and again
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # with which the pool ends it when another has failed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def work(lines: list[Line], shape: str | None) -> tuple[pa.Table, Report]:
    return _encode(lines, shape=shape)
