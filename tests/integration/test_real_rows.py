"""A dense and a MoE model of some million parameters learn the real rows, under the real vocabulary and a tokenizer
that is code of its own; the final directory gives the same loss in another process."""

import math

import pytest

from conftest import TESTS, run_script

LOSS_ON_FIXED_ROWS = """
import sys
sys.path.insert(0, {tests!r})
import reference, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
rows = reference.encode_rows(sys.argv[2], tokenizer, 512)[:16]
batch = reference.pad(rows, tokenizer.pad_token_id)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print("LOSS", repr(model(**batch).loss.item()))
"""


@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.campaign), "moe"])
def test_loss_falls_and_the_final_directory_gives_it_again(
    kind, shared, model_dir, hy_tokenizer_dir, run_train, losses, tmp_path
):
    rows = shared / "data" / "car_train.jsonl"
    base = model_dir(kind, hy_tokenizer_dir, hidden_size=32, intermediate_size=64)
    args = ["--model_name_or_path", base, "--train_data_file", rows, "--output_dir", tmp_path / "out"]
    args += ["--max_steps", 100, "--logging_steps", 1, "--learning_rate", 1e-2, "--min_lr", 1e-3, "--warmup_steps", 5]
    args += ["--per_device_train_batch_size", 8, "--max_seq_length", 512, "--packing", "batch"]
    args += ["--save_steps", 100]
    run = run_train(args)
    assert run.returncode == 0, run.stderr[-3000:]
    said = losses(tmp_path / "out")
    vocabulary = math.log(128_167)
    assert all(map(math.isfinite, said))
    assert abs(said[0] - vocabulary) < 0.5, said[0]
    last = sum(said[-10:]) / 10
    print(f"{kind}: loss {said[0]:.3f} (ln vocabulary {vocabulary:.3f}) → {last:.3f}")
    assert last < vocabulary / 3

    script = tmp_path / "reload.py"
    script.write_text(LOSS_ON_FIXED_ROWS.format(tests=str(TESTS)))
    again = []
    for directory in (tmp_path / "out", tmp_path / "out" / "checkpoint-100"):
        reload = run_script(script, [directory, rows])
        assert reload.returncode == 0, reload.stderr[-2000:]
        again.append(float(reload.stdout.split("LOSS ")[1]))
    assert abs(again[0] - again[1]) <= 1e-5
    assert again[0] < vocabulary / 3
