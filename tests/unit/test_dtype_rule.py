"""The precision rule: what is trained has fp32 master values."""

from types import SimpleNamespace

import pytest
import torch

from sft.model.load import load_dtype
from sft.training.save import save_dtype

TABLE = [  # flag, DeepSpeed, adapter: dtype while training, dtype of the final directory
    (None, False, False, torch.float32, torch.float32),
    (None, False, True, torch.float32, torch.float32),
    (None, True, False, torch.float32, torch.float32),
    (None, True, True, torch.float32, torch.float32),
    ("bf16", False, False, torch.float32, torch.bfloat16),
    ("bf16", False, True, "auto", torch.bfloat16),
    ("bf16", True, False, torch.bfloat16, torch.bfloat16),
    ("bf16", True, True, torch.bfloat16, torch.bfloat16),
    ("fp16", False, False, torch.float32, torch.float16),
    ("fp16", False, True, "auto", torch.float16),
    ("fp16", True, False, torch.float16, torch.float16),
]


@pytest.mark.parametrize(("flag", "deepspeed", "adapter", "loaded", "saved"), TABLE)
def test_the_rule(flag, deepspeed, adapter, loaded, saved, capsys):
    training = SimpleNamespace(bf16=flag == "bf16", fp16=flag == "fp16", deepspeed={} if not deepspeed else {"x": 1})
    assert load_dtype(SimpleNamespace(use_lora=adapter), training) == loaded
    assert capsys.readouterr().out.startswith(f"dtype of the weights = {str(loaded).removeprefix('torch.')} (")
    assert save_dtype(training) == saved
