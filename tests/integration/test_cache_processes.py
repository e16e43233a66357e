"""One pass over rows with processes of its own: what they change, what their end leaves, and who waits for whom."""

import gzip
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from transformers import AutoTokenizer

from conftest import EXAMPLE_TOKENIZER, TRAIN
from conversations import write_rows
from sft.data import tokenized
from sft.data.examples import Options, load_examples
from sft.messages import Refused


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE_TOKENIZER)


def entries(rows_cache):
    return {path.name for path in rows_cache.iterdir() if path.is_dir() and path.name != "digests"}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_workers_change_nothing(suffix, tokenizer, rows_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "CHUNK", 1000)
    file = write_rows(tmp_path / f"rows.jsonl{suffix}", 500)
    with open(tmp_path / "bad.jsonl", "wb") as bad:
        bad.write(gzip.decompress(file.read_bytes()) if suffix else file.read_bytes())
        bad.write(b"{}\n" * 30)
    found = {}
    for workers in (1, 3):
        shutil.rmtree(rows_cache, ignore_errors=True)
        examples = load_examples([str(file), str(tmp_path / "bad.jsonl")], tokenizer, Options(), "skip", workers)
        found[workers] = [examples.rows.data.to_pydict(), examples.report.counts, examples.report.lines]
        assert len(examples) == 1000 and examples.report.lines["bad"][0][0] == f"{tmp_path}/bad.jsonl:501"
        assert tokenizer.decode(examples[77]["input_ids"]).endswith("a77<|eos|>")
    assert found[1] == found[3]


def test_a_worker_that_is_killed_is_named(tokenizer, rows_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "CHUNK", 100)
    monkeypatch.setattr(tokenized, "begin_worker", lambda encode: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(Refused, match="ended from outside: out of memory"):
        load_examples([str(write_rows(tmp_path / "rows.jsonl"))], tokenizer, Options(), workers=2)
    assert not entries(rows_cache)


PASS = """
import sys, time
sys.path.insert(0, {train!r})
from sft.data import tokenized
from sft.data import examples
from transformers import AutoTokenizer
tokenized.CHUNK, slow = 1000, examples.parse_row
parsed = []
def parse_row(line, *more):
    parsed.append(line)
    time.sleep({pause})
    return slow(line, *more)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupting_leaves_no_half_cache_and_no_worker(number, tmp_path, rows_cache, tokenizer):
    file = write_rows(tmp_path / "rows.jsonl", 2000)
    process = start_pass(tmp_path, file, 0.01, workers=2)
    while not (rows_cache.is_dir() and entries(rows_cache)):
        time.sleep(0.05)
    time.sleep(1)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert all(".part-" in name for name in entries(rows_cache))
    assert number != signal.SIGINT or not entries(rows_cache)
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert len(load_examples([str(file)], tokenizer, Options())) == 2000
    assert len(entries(rows_cache)) == 1, "what the killed pass had begun is gone"


def test_two_at_once_make_one_pass(tmp_path, rows_cache):
    """Also where the same rows lie in two places."""
    files = [write_rows(tmp_path / "rows.jsonl", 300), write_rows(tmp_path / "copy.jsonl", 300)]
    processes = [start_pass(tmp_path, file, 0.01, workers=1) for file in files]
    last_lines = sorted(process.communicate(timeout=60)[0].splitlines()[-1] for process in processes)
    assert last_lines == ["rows 300 parsed 0", "rows 300 parsed 300"]
    assert len(entries(rows_cache)) == 1
