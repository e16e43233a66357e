"""One pass, kept: what makes a new one, what an end in the middle leaves, and who waits for whom."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import datasets
import psutil
import pytest
from transformers import AutoTokenizer

from conftest import EXAMPLE_TOKENIZER, TRAIN
from sft.data import examples, rows, tokenized
from sft.data.examples import Options, load_examples
from sft.messages import Refused


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE_TOKENIZER)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hunyuan"


@pytest.fixture
def passes(monkeypatch):
    """The rows that were tokenized since it was last emptied."""
    seen, encode = [], examples.encode_rows

    def counting(lines, **kwargs):
        seen.extend(lines)
        return encode(lines, **kwargs)

    monkeypatch.setattr(examples, "encode_rows", counting)
    return seen


def write(file, number=50, first=0):
    texts = [
        json.dumps({"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]})
        for i in range(first, first + number)
    ]
    data = ("\n".join(texts) + "\n").encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def entries(folder):
    return {path.name for path in folder.iterdir() if path.is_dir() and path.name != "digests"}


def test_a_second_start_tokenizes_nothing_and_a_change_does(tokenizer, folder, passes, tmp_path):
    file = write(tmp_path / "rows.jsonl")

    def number_of_passes(**changes):
        passes.clear()
        load_examples(
            [str(changes.get("file", file))], changes.get("tokenizer", tokenizer), changes.get("options", Options())
        )
        return len(passes) // 50

    assert number_of_passes() == 1 and number_of_passes() == 0
    assert number_of_passes(options=Options(100)) == 1 and number_of_passes(options=Options(train_on="last")) == 1
    assert number_of_passes(options=Options(overlong="drop")) == 1
    other = AutoTokenizer.from_pretrained(EXAMPLE_TOKENIZER, chat_template=tokenizer.chat_template + " ")
    assert number_of_passes(tokenizer=other) == 1
    more = AutoTokenizer.from_pretrained(EXAMPLE_TOKENIZER)
    more.add_tokens(["<new>"])
    assert number_of_passes(tokenizer=more) == 1
    shutil.copytree(EXAMPLE_TOKENIZER, tmp_path / "copy")
    copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert number_of_passes(tokenizer=copy) == 0, "where a tokenizer lies says nothing about it"
    assert number_of_passes(file=shutil.copy(file, tmp_path / "same.jsonl")) == 0, "nor does a file's name"
    # one row changed, with the file's size and times as before
    before = file.stat()
    content = file.read_bytes()
    file.write_bytes(content.replace(b"a7", b"b7"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert number_of_passes() == 1
    file.write_bytes(content)
    assert number_of_passes() == 0


def test_a_large_files_digest_is_kept_with_its_times(folder, tmp_path, monkeypatch):
    file = write(tmp_path / "rows.jsonl")
    folder.mkdir(parents=True)
    digest = tokenized.content_digest(file, folder)
    assert not (folder / "digests").exists(), "just written: it might change again within the clock's grain"
    monkeypatch.setattr(tokenized, "RACY", -(10**18))
    assert tokenized.content_digest(file, folder) == digest
    monkeypatch.setattr(tokenized.hashlib, "file_digest", None)  # not read any more
    assert tokenized.content_digest(file, folder) == digest


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_workers_change_nothing(suffix, tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "CHUNK", 1000)
    file = write(tmp_path / f"rows.jsonl{suffix}", 500)
    with open(tmp_path / "bad.jsonl", "wb") as bad:
        bad.write(gzip.decompress(file.read_bytes()) if suffix else file.read_bytes())
        bad.write(b"{}\n" * 30)
    found = {}
    for workers in (1, 3):
        shutil.rmtree(folder, ignore_errors=True)
        examples = load_examples([str(file), str(tmp_path / "bad.jsonl")], tokenizer, Options(), "skip", workers)
        found[workers] = [examples.rows.data.to_pydict(), examples.report.counts, examples.report.lines]
        assert len(examples) == 1000 and examples.report.lines["bad"][0][0] == 501
        assert tokenizer.decode(examples[77]["input_ids"]).endswith("a77<|eos|>")
    assert found[1] == found[3]


def test_a_file_cut_off_is_refused_and_the_refusal_kept(tokenizer, folder, tmp_path, passes):
    file = write(tmp_path / "rows.jsonl.gz", 5000)
    file.write_bytes(file.read_bytes()[:-20])
    for _ in range(2):
        with pytest.raises(Refused, match=r"rows.jsonl.gz:\d+: cannot be read \(EOFError\): is the file whole"):
            load_examples([str(file)], tokenizer, Options())
    (tmp_path / "other").mkdir()
    moved = file.rename(tmp_path / "other" / "moved.jsonl.gz")
    number = len(passes)
    with pytest.raises(Refused, match="moved.jsonl.gz"):
        load_examples([str(moved)], tokenizer, Options())
    assert len(passes) == number


def test_what_could_not_be_read_now_is_read_another_time(tokenizer, folder, tmp_path, monkeypatch):
    file = write(tmp_path / "rows.jsonl")
    with monkeypatch.context() as patch, pytest.raises(Refused, match="rows.jsonl:1: cannot be read"):
        patch.setattr(rows, "is_array", Mock(side_effect=OSError(5, "Input/output error")))
        load_examples([str(file)], tokenizer, Options())
    with monkeypatch.context() as patch, pytest.raises(Refused, match="Permission denied"):
        patch.setattr(
            tokenized, "content_digest", Mock(side_effect=PermissionError(13, "Permission denied", str(file)))
        )
        load_examples([str(file)], tokenizer, Options())
    assert len(load_examples([str(file)], tokenizer, Options())) == 50


def test_a_worker_that_is_killed_is_named(tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "CHUNK", 100)
    monkeypatch.setattr(tokenized, "begin_worker", lambda encode: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(Refused, match="ended from outside: out of memory"):
        load_examples([str(write(tmp_path / "rows.jsonl"))], tokenizer, Options(), workers=2)
    assert not entries(folder)


def test_what_was_left_behind_goes_after_a_day(tokenizer, folder, tmp_path):
    for name, age in (("a.part-1", 0), ("b.part-1", 2 * tokenized.A_DAY)):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (time.time() - age,) * 2)
    load_examples([str(write(tmp_path / "rows.jsonl"))], tokenizer, Options())
    assert {name for name in entries(folder) if "part" in name} == {"a.part-1"}


PASS = """
import sys, time
sys.path.insert(0, {train!r})
from sft.data import tokenized
from sft.data import examples
from transformers import AutoTokenizer
tokenized.CHUNK, slow = 1000, examples.parse_row
parsed = []
def parse_row(line):
    parsed.append(line)
    time.sleep({pause})
    return slow(line)
examples.parse_row = parse_row
print("started", flush=True)
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
examples = examples.load_examples([{file!r}], tokenizer, examples.Options(), workers={workers})
print("rows", len(examples), "parsed", len(parsed), flush=True)
"""


def start_pass(tmp_path, file, pause, workers):
    code = PASS.format(
        train=str(TRAIN), file=str(file), tokenizer=str(EXAMPLE_TOKENIZER), pause=pause, workers=workers
    )
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)
    assert process.stdout.readline() == "started\n", process.stderr.read()
    return process


def children(pid):
    return [child.pid for child in psutil.Process(pid).children()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupting_leaves_no_half_cache_and_no_worker(number, tmp_path, folder, tokenizer):
    file = write(tmp_path / "rows.jsonl", 2000)
    process = start_pass(tmp_path, file, 0.01, workers=2)
    while not (folder.is_dir() and entries(folder)):
        time.sleep(0.05)
    time.sleep(1)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert all(".part-" in name for name in entries(folder))
    assert number == signal.SIGKILL or not entries(folder)
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    assert len(load_examples([str(file)], tokenizer, Options())) == 2000
    assert len(entries(folder)) == 1, "what the killed pass had begun is gone"


def test_two_at_once_make_one_pass(tmp_path, folder):
    """Also where the same rows lie in two places."""
    files = [write(tmp_path / "rows.jsonl", 300), write(tmp_path / "copy.jsonl", 300)]
    processes = [start_pass(tmp_path, file, 0.01, workers=1) for file in files]
    said = sorted(process.communicate(timeout=60)[0].splitlines()[-1] for process in processes)
    assert said == ["rows 300 parsed 0", "rows 300 parsed 300"]
    assert len(entries(folder)) == 1
