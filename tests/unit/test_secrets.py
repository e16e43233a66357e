"""No secret is printed, whoever's message quotes it."""

import io
import sys

import pytest

from sft import messages, stopping
from sft.messages import Refused, guard, masked, note, report_refusal
from sft.training.plan import export_keys


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("proxy http://me:pass%40word@proxy:3128 failed", "proxy http://me:***@proxy:3128 failed"),
        ("redis://:secret@host/0 and https://host:8080/a@b", "redis://:***@host/0 and https://host:8080/a@b"),
        ("the key sk-0123456789 is wrong", "the key *** is wrong"),
        ("hf_abcdefgh", "***"),
        ("of a flag: hf_0123456789.", "of a flag: ***."),
        ("http_proxy=me:password@proxy:3128", "http_proxy=me:***@proxy:3128"),
        ("https://me:p@ss:word@host/a and ssh root@host:22", "https://me:***@host/a and ssh root@host:22"),
        ("https://ghp_0123@github.com/a/b, a@b.c", "https://***@github.com/a/b, a@b.c"),
        (
            "https://host/rows?a=1&api_key=0123&X-Signature=45&n=2",
            "https://host/rows?a=1&api_key=***&X-Signature=***&n=2",
        ),
        (
            "rows.jsonl:12: content: eos_token=2, key: value, 12:30@",
            "rows.jsonl:12: content: eos_token=2, key: value, 12:30@",
        ),
    ],
)
def test_a_secret_is_masked(text, shown, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "sk-0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setattr(messages, "given_secrets", {"hf_0123456789"})
    monkeypatch.setenv("SHORT_KEY", "a")  # too short to be one: it would be found everywhere
    assert masked(text) == shown
    note(text)
    report_refusal(Refused(text))
    said = capsys.readouterr()
    assert said.out == f"{shown}\n" and said.err == f"refused: {shown}\n"


def test_a_guarded_stream_shows_none_whoever_writes(monkeypatch, capfd):
    """Libraries, tracebacks, a signal handler's line."""
    monkeypatch.setenv("WANDB_API_KEY", "sk-0123456789")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    guard(sys.stderr)
    print("key", "sk-0123456789", file=sys.stderr)
    try:
        raise OSError("proxy http://me:password@proxy")
    except OSError as error:
        sys.__excepthook__(type(error), error, error.__traceback__)
    stopping.write_line("at sk-0123456789")
    said = sys.stderr.getvalue()
    assert said.startswith("key ***\n") and said.endswith("OSError: proxy http://me:***@proxy\n")
    assert capfd.readouterr().err == "\nat ***\n"


def test_structures_are_masked_within():
    value = {"a": ["redis://:secret@host", 1, None], "b": {"c": "x"}}
    assert masked(value) == {"a": ["redis://:***@host", 1, None], "b": {"c": "x"}}


def test_a_key_in_a_deepspeed_file_goes_to_the_environment(monkeypatch):
    """Also in one that an earlier checkpoint has recorded."""
    monkeypatch.setenv("COMET_API_KEY", "before")
    config = {"steps_per_print": 1, "comet": {"api_key": "sk-0123456789", "project": "p"}}
    export_keys(config)
    assert config == {"steps_per_print": 1, "comet": {"project": "p"}} and masked("sk-0123456789") == "***"
