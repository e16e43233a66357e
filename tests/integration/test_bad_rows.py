"""Each bad input by name, through the command line: exit code 2, one message with file, line and what, and no more."""

import gzip
import json
import random

import pytest

from conftest import run_script
from mutations import mutated

SECRET = "the row's own text"
GOOD = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": SECRET}]}).encode()


def row(**changes):
    return json.dumps(json.loads(GOOD) | changes).encode()


def said(*messages):
    return row(messages=[{"role": role, "content": content} for role, content in messages])


THINKING = f"<think>\n{SECRET}\n</think>\n<answer>\n2\n</answer>"
LINES = {  # name: (the second line, what is said of it)
    "broken JSON": (GOOD[:-5], "not JSON: "),
    "not an object": (b'"the row\'s own text"', "a JSON object is expected, not str"),
    "no messages": (b'{"note": "the row\'s own text"}', 'no "messages"'),
    "empty messages": (row(messages=[]), '"messages" is empty'),
    "unknown role": (said(("user", SECRET), ("robot", "x")), "messages[1] has no role of system, user, assistant, "),
    "content of the wrong type": (said(("user", [SECRET]), ("assistant", "x")), 'messages[0] has no "content" that '),
    "no assistant turn": (said(("user", SECRET)), "no message of the assistant"),
    "assistant first": (said(("assistant", SECRET)), "begins with the assistant"),
    "not UTF-8": (GOOD.replace(b"row", b"r\xf6w"), "not UTF-8"),
    "NUL": (GOOD.replace(b"row", b"r\\u0000w"), "holds a NUL character"),
    "lone surrogate": (GOOD.replace(b"row", b"r\\ud83dw"), "holds half a surrogate pair"),
    "over 16 MB": (GOOD.replace(b"row", b"x" * (17 * 2**20)), "is longer than 16 MB"),
    "duplicate keys": (GOOD[:-1] + b', "messages": []}', "an object has the same key twice"),
    "nested too deep": (row(note="X").replace(b'"X"', b"[" * 5000 + b"]" * 5000), "nested too deep"),
    "Alpaca": (b'{"instruction": "the row\'s own text", "output": "x"}', "in the shape Alpaca, and the file's first"),
    "preference pairs": (b'{"chosen": "the row\'s own text", "rejected": "x"}', "preference pairs (chosen, rejected)"),
    "no_think that thinks": (
        said(("user", "q"), ("assistant", THINKING))[:-1] + b', "enable_thinking": false}',
        "the row says no_think, but messages[1] carries thinking",
    ),
    "weight": (said(("user", SECRET), ("assistant", "x"))[:-3] + b', "weight": 2}]}', 'messages[1] has a "weight"'),
}  # fmt: skip


def files(folder):
    """name: (file, what is said of it); `{file}` is the path."""
    (folder / "empty.jsonl").touch()
    (folder / "blank.jsonl").write_bytes(b"\n \r\n")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress((GOOD + b"\n") * 100)[:-9])
    (folder / "array.json").write_bytes(b"[" + GOOD + b",\n" + GOOD)
    (folder / "table.parquet").write_bytes(b"PAR1" + GOOD)
    return {
        "empty file": ("empty.jsonl", "{file}: is empty"),
        "blank lines only": ("blank.jsonl", "{file}: is empty: it has no row"),
        "directory": (".", "{file}: is a directory"),
        "missing": ("none.jsonl", "{file}: no such file"),
        "glob of nothing": ("none*.jsonl", "{file}: no such file"),
        "truncated .gz": ("cut.jsonl.gz", "{file}:101: cannot be read (EOFError): is the file whole?"),
        "JSON array without end": (
            "array.json",
            "{file}:2: not JSON: the array has no end. No row after",
        ),
        "parquet": ("table.parquet", "{file}: is parquet: convert it to a text file in UTF-8"),
    }


def refused(run, says):
    assert run.returncode == 2, run.stdout + run.stderr
    message = run.stderr[run.stderr.index("refused:") :]
    assert says in message, message
    assert run.stderr.count("refused:") == 1
    output = run.stdout + run.stderr
    assert "Traceback" not in output and "attention = " not in output
    assert SECRET not in output and "own text" not in output


@pytest.fixture
def train(model_dir, example_tokenizer_dir, run_train, run_here, tmp_path):
    """`train(file, flags…)`: train.py for one step on the file, with fast thinking allowed; `train(…, here=True)` in
    this process."""
    model = model_dir("dense", example_tokenizer_dir)

    def run(file, *flags, here=False):
        args = ["--model_name_or_path", model, "--train_data_file", file, "--output_dir", tmp_path / "out"]
        args += ["--max_steps", 1, *flags]
        return run_here("train.py", args) if here else run_train(args)

    return run


@pytest.mark.parametrize("name", LINES)
def test_a_bad_row_is_named(name, train, tmp_path):
    line, says = LINES[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    run = train(file, here=name != "broken JSON")  # that one as a user runs it
    refused(run, f"1 of 3 rows are bad:\n{file}:2: {says}")
    assert "leave them out with --bad_rows skip" in run.stderr
    assert not (tmp_path / "out").exists()


FILES = ["empty file", "blank lines only", "directory", "missing", "glob of nothing", "truncated .gz"]
FILES += ["JSON array without end", "parquet"]


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name, train, tmp_path):
    file, says = files(tmp_path)[name]
    refused(train(tmp_path / file, here=True), says.format(file=tmp_path / file))
    assert not (tmp_path / "out").exists()


def test_a_row_too_long_is_named_with_overlong_error(train, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b"\n" + GOOD.replace(b"row", b"row " * 100) + b"\n")
    refused(train(file, "--overlong", "error", "--max_seq_length", 64, here=True), f"(--overlong error):\n{file}:2: 4")


def test_10000_mutated_rows_are_trained_on_or_counted(example_rows, train, tmp_path):
    """With --bad_rows skip: as many rows as lines, the first bad ones named, and the run ends well."""
    draw, good = random.Random(1), example_rows.read_bytes().splitlines()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(mutated(draw.choice(good), draw) for _ in range(10_000)) + b"\n")
    lines = [n for n, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()]
    run = train(file, "--bad_rows", "skip", "--max_steps", 2)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["num_rows"] == len(lines)
    assert results["num_rows_skipped"] + results["num_rows_unsupervised"] + results["num_examples"] == len(lines)
    assert 2000 < results["num_rows_skipped"] < 9000
    named = [line for line in run.stdout.splitlines() if line.startswith(f"{file}:")]
    assert 20 <= len(named) <= 40 and f"… {results['num_rows_skipped'] - 20} more" in run.stdout


def test_show_rows_prints_a_row_as_it_is_trained(example_tokenizer_dir, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n" + GOOD + b"\n{}\n")
    args = ["--model", example_tokenizer_dir, "--file", file]
    run = run_script("show_rows.py", [*args, "--row", "2"], cold=True)
    assert run.returncode == 0, run.stderr
    remark, *lines = run.stdout.splitlines()
    assert remark.startswith(f"{file}:2: assistant turns without a think block")
    assert lines[0] == f"sequence 1 of 1: {len(SECRET) + 4} tokens, {len(SECRET) + 1} supervised"
    marked = [line.split(" * ")[1] for line in lines[1:] if " * " in line]
    assert "".join(marked) == SECRET + "<|eos|>"
    assert SECRET not in run.stderr
    for number, says in (("1", "has no row in that line"), ("3", f'{file}:3: no "messages"')):
        run = run_script("show_rows.py", [*args, "--row", number])
        assert run.returncode == 2 and says in run.stderr and "Traceback" not in run.stderr
    run = run_script("show_rows.py", [*args, "--warnings"])
    said = run.stdout.splitlines()
    assert said[:-1] == [remark, f'{file}:3: bad: no "messages", nor the keys of another shape that is read']
    assert run.returncode == 0 and said[-1] == "2 remarks"
    run = run_script("show_rows.py", [*args, "--bad_rows", "skip"])
    assert run.returncode == 0 and f"supervised: {len(SECRET) + 1} tokens" in run.stdout
    assert "2 rows, 1 sequences" in run.stdout and SECRET not in run.stdout
