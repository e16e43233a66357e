"""What a person reads: lines of text in the log, one bar on a terminal, no message of a library that says nothing."""

import logging
import os
import pty
import re
import subprocess
import sys
import warnings

import pytest

from conftest import TRAIN
from runs import environment, run_script
from sft import quiet


@pytest.fixture
def command(model_dir, example_tokenizer_dir, example_rows):
    flags = ["--max_seq_length", 64, "--save_steps", 10, "--eval_split", 0.05, "--gradient_checkpointing", "false"]
    paths = {"MODEL_PATH": model_dir("moe", example_tokenizer_dir), "TRAIN_DATA_FILE": example_rows}
    return ["bash", TRAIN / "train.sh", *flags], environment({"OMP_NUM_THREADS": "1"} | paths)


def run(command, env, *flags, **more):
    arguments = [str(part) for part in (*command, *flags)]
    return subprocess.run(arguments, env=env | {k: str(v) for k, v in more.items()}, capture_output=True, timeout=300)


@pytest.mark.needs_gxx
def test_a_zero3_run_is_a_page(command, tmp_path):
    """20 steps, an evaluation and a checkpoint twice, on two ranks."""
    args, env = command
    more = {"HOST_GPU_NUM": 2, "DS_CONFIG": "ds_zero3_no_offload.json", "OUTPUT_DIR": tmp_path / "输出"}
    done = run(args, env, "--max_steps", 20, **more, PYTHONIOENCODING="latin-1")
    said = done.stdout.decode()
    assert done.returncode == 0, (said + done.stderr.decode())[-3000:]
    (log,) = (tmp_path / "输出").glob("log_*.txt")
    lines = log.read_bytes().decode("utf-8", "replace").splitlines()
    assert len(lines) <= 60 and "\r" not in said and "Warning" not in said
    steps = [line for line in lines if re.match(r"step \d+/20  loss \d", line)]
    assert len(steps) == 20 and all("  tokens/s " in line and "  left 0:" in line for line in steps[1:])
    assert re.match(r"train_loss \d\.\d+, 0:\d\d:\d\d, \d+ tokens/s, at most \d+ MB of memory$", lines[-4])
    assert lines[-3].startswith("to train it further: ") and lines[-3].endswith("--max_steps 40")
    assert lines[-2].startswith("to talk to it: python ") and lines[-1].startswith("done: ")


ASKS = """
import runpy, sys
from sft.training import trainer
class Asked(trainer.Trainer):
    def train(self, **kwargs):
        print("is_deepspeed_enabled:", self.is_deepspeed_enabled)
        return super().train(**kwargs)
trainer.Trainer = Asked
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.needs_gxx
def test_deepspeed_is_on_after_all_that_was_tried(model_dir, example_tokenizer_dir, example_rows, tmp_path):
    """Nothing that is tried before the model is loaded switches it off."""
    script = tmp_path / "asks.py"
    script.write_text(ASKS)
    flags = ["--train_data_file", example_rows, "--max_steps", 1, "--deepspeed", "ds_zero2_no_offload.json"]
    flags += ["--optim", "adamw_torch", "--optim_args", "eps=1e-7", "--lr_scheduler_type", "cosine"]
    flags += ["--dataloader_num_workers", 1, "--gradient_checkpointing", "--report_to", "tensorboard"]
    model = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--output_dir", tmp_path / "out"]
    done = run_script(script, [TRAIN / "train.py", *model, *flags])
    assert "is_deepspeed_enabled: True" in done.stdout and done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("flags", [[], ["--disable_tqdm", "true"]], ids=["bar", "no bar"])
def test_a_terminal_shows_one_bar_and_the_log_none(flags, command, tmp_path):
    args, env = command
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(part) for part in (*args, "--max_steps", 4, "--save_steps", 2, *flags)],
        env=env | {"OUTPUT_DIR": str(tmp_path / "out")}, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with open(ours, "rb", buffering=0) as terminal:
        try:
            while block := terminal.read(4096):
                shown += block
        except OSError:  # its end
            pass
    assert process.wait(60) == 0, shown[-3000:]
    assert (b"4/4 [" in shown) == (b"evaluating: " in shown) == (not flags)
    assert b"\x1b[A" not in shown and b"model shards" not in shown, "a bar below another one"
    (log,) = (tmp_path / "out").glob("log_*.txt")
    text = log.read_bytes()
    assert len(re.findall(rb"^step \d/4  loss", text, re.MULTILINE)) == 4 and b"\r" not in text and b"it/s" not in text


def test_what_is_left_out(monkeypatch, capsys):
    """A message that is not on the list is shown."""
    monkeypatch.setattr(warnings, "showwarning", lambda message, *more, **others: print(message, file=sys.stderr))
    quiet.leave_out_harmless_messages()
    warnings.showwarning("`torch.distributed.reduce_scatter_tensor` is deprecated.", FutureWarning, "f", 1)
    warnings.showwarning("the loss is wrong", UserWarning, "f", 1)
    for text in ("Unrecognized keys in `rope_parameters` for", "The weights are wrong"):
        logging.getLogger("transformers.trainer").warning(text)
    said = capsys.readouterr().err
    assert "the loss is wrong" in said and "deprecated" not in said and "rope_parameters" not in said
