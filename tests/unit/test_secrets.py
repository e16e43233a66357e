"""No secret is printed, whoever's message quotes it."""

import pytest

from sft.messages import Refused, masked, note, report_refusal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("proxy http://me:pass%40word@proxy:3128 failed", "proxy http://me:***@proxy:3128 failed"),
        ("redis://:secret@host/0 and https://host:8080/a@b", "redis://:***@host/0 and https://host:8080/a@b"),
        ("the key sk-0123456789 is wrong", "the key *** is wrong"),
        ("hf_abcdefgh", "***"),
    ],
)
def test_a_secret_is_masked(text, shown, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "sk-0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("SHORT_KEY", "a")  # too short to be one: it would be found everywhere
    assert masked(text) == shown
    note(text)
    report_refusal(Refused(text))
    said = capsys.readouterr()
    assert said.out == f"{shown}\n" and said.err == f"refused: {shown}\n"
