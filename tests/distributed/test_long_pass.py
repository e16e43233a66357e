"""No collective waits for the pass over the rows: two ranks that time out after 30 s, a pass of more than a minute."""

import json
import time

import pytest

from conftest import launch_command, run_command

SLOW = """
import sys, time
sys.path.insert(0, {train!r})
from sft.data import examples
parse = examples.parse_row
def parse_row(line, *more):
    time.sleep({pause})
    return parse(line, *more)
examples.parse_row = parse_row
import train
try:
    train.main(sys.argv[1:])
except train.Refused as refusal:
    print(f"refused: {{refusal}}", file=sys.stderr, flush=True)
    train.leave(2)
train.leave(0)
"""


@pytest.mark.campaign
@pytest.mark.parametrize("deepspeed", [None, pytest.param("ds_zero3_no_offload.json", marks=pytest.mark.needs_gxx)])
def test_a_pass_longer_than_the_ddp_timeout(deepspeed, model_dir, example_tokenizer_dir, example_rows, tmp_path):
    """900 rows at 75 ms each; the second start of the same rows waits for nothing."""
    from conftest import TRAIN

    script = tmp_path / "slow_train.py"
    script.write_text(SLOW.format(train=str(TRAIN), pause=0.075))
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(example_rows.read_bytes() + b"\n" * (1 if deepspeed else 2))  # a content of its own
    args = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--train_data_file", rows]
    args += ["--max_steps", 2, "--ddp_timeout", 30, "--preprocessing_num_workers", 1, "--save_strategy", "no"]
    args += ["--deepspeed", deepspeed] if deepspeed else []
    seconds = []
    for number in range(2):
        began = time.monotonic()
        command = [
            *launch_command(script, "torchrun", 2),
            *map(str, args),
            "--output_dir",
            str(tmp_path / f"out{number}"),
        ]
        run = run_command(command, {"OMP_NUM_THREADS": "1"})
        seconds.append(time.monotonic() - began)
        assert run.returncode == 0, run.stderr[-3000:]
    print(f"first start {seconds[0]:.0f} s, second {seconds[1]:.0f} s")
    assert seconds[0] > 60 and seconds[1] < 45
    results = json.loads((tmp_path / "out0" / "train_results.json").read_text())
    assert (results["num_rows"], results["world_size"]) == (900, 2)
