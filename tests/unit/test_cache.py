"""One pass over rows, kept: what makes a new one, and what is refused or left behind."""

import os
import shutil
import time
from unittest.mock import Mock

import pytest
from transformers import AutoTokenizer

from conftest import EXAMPLE_TOKENIZER
from conversations import write_rows
from sft.data import examples, lines, tokenized
from sft.data.examples import Options, load_examples
from sft.messages import Refused


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE_TOKENIZER)


@pytest.fixture
def passes(monkeypatch):
    """The rows that were tokenized since it was last emptied."""
    seen, encode = [], examples.encode_rows

    def counting(lines, **kwargs):
        seen.extend(lines)
        return encode(lines, **kwargs)

    monkeypatch.setattr(examples, "encode_rows", counting)
    return seen


def entries(rows_cache):
    return {path.name for path in rows_cache.iterdir() if path.is_dir() and path.name != "digests"}


def test_a_second_start_tokenizes_nothing_and_a_change_does(tokenizer, rows_cache, passes, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl")

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


def test_a_large_files_digest_is_kept_with_its_times(rows_cache, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl")
    rows_cache.mkdir(parents=True)
    digest = tokenized.content_digest(file, rows_cache)
    assert not (rows_cache / "digests").exists(), "just written: it might change again within the clock's grain"
    monkeypatch.setattr(tokenized, "RACY", -(10**18))
    assert tokenized.content_digest(file, rows_cache) == digest
    monkeypatch.setattr(tokenized.hashlib, "file_digest", None)  # not read any more
    assert tokenized.content_digest(file, rows_cache) == digest


def test_a_file_cut_off_is_refused_and_the_refusal_kept(tokenizer, rows_cache, tmp_path, passes):
    file = write_rows(tmp_path / "rows.jsonl.gz", 5000)
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


def test_what_could_not_be_read_now_is_read_another_time(tokenizer, rows_cache, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl")
    with monkeypatch.context() as patch, pytest.raises(Refused, match="rows.jsonl:1: cannot be read"):
        patch.setattr(lines, "layout_of", Mock(side_effect=OSError(5, "Input/output error")))
        load_examples([str(file)], tokenizer, Options())
    with monkeypatch.context() as patch, pytest.raises(Refused, match="Permission denied"):
        patch.setattr(
            tokenized, "content_digest", Mock(side_effect=PermissionError(13, "Permission denied", str(file)))
        )
        load_examples([str(file)], tokenizer, Options())
    assert len(load_examples([str(file)], tokenizer, Options())) == 50


def test_what_was_left_behind_goes_after_a_day(tokenizer, rows_cache, tmp_path):
    for name, age in (("a.part-1", 0), ("b.part-1", 2 * tokenized.A_DAY)):
        (rows_cache / name).mkdir(parents=True)
        os.utime(rows_cache / name, (time.time() - age,) * 2)
    load_examples([str(write_rows(tmp_path / "rows.jsonl"))], tokenizer, Options())
    assert {name for name in entries(rows_cache) if "part" in name} == {"a.part-1"}
