"""Prompts before and after training: any number of them."""

import json

import pytest
from transformers import AutoTokenizer

from sft.training.probe import Probe


@pytest.mark.parametrize("number", [1, 2, 4, 9])
def test_some_are_shown_and_all_are_scored(number, example_tokenizer_dir, tmp_path, capsys):
    rows = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(number)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    probe = Probe(str(file), AutoTokenizer.from_pretrained(example_tokenizer_dir))
    probe.before, probe.after = [""] * number, [f"a{i}" for i in range(number)]
    probe.print_some()
    shown = capsys.readouterr().out
    assert shown.count("before:") == min(number, 4) and f"0 of {number} before training, {number} after" in shown
