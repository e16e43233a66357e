"""No secret that a run is given is printed or written, however it is given."""

import json
import os
import sys
from pathlib import Path

import pytest

from conftest import TRAIN, run_command

PLANTED = {  # where it is put: the secret
    "the environment": "planted-in-env-0123",
    "--hub_token": "hf_planted-flag-45",
    "a URL": "planted-password-67",
    "the DeepSpeed file": "planted-in-file-89",
}


def planted_in(run, folder):
    """(secret's place, where it shows) of each that shows in a run's output or in a file."""
    texts = {"the output": (run.stdout + run.stderr).encode()}
    texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [
        (place, name) for place, secret in PLANTED.items() for name, text in texts.items() if secret.encode() in text
    ]


@pytest.mark.needs_gxx
def test_no_secret_is_printed_or_written(model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path):
    config = json.loads((TRAIN / "ds_zero2_no_offload.json").read_text())
    config["comet"] = {"enabled": False, "api_key": PLANTED["the DeepSpeed file"]}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    secret, env = PLANTED["the environment"], {"PLANTED_API_KEY": PLANTED["the environment"]}
    flags = ["--model_name_or_path", model_dir("dense", example_tokenizer_dir), "--train_data_file", example_rows]
    flags += ["--max_steps", 2, "--save_steps", 1, "--logging_steps", 1, "--deepspeed", tmp_path / "ds.json"]
    flags += ["--hub_token", PLANTED["--hub_token"], "--run_name", f"http://me:{PLANTED['a URL']}@host/run"]
    flags += ["--project", f"of-{secret}", "--output_dir", tmp_path / "out"]
    run = run_train(flags, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert planted_in(run, tmp_path / "out") == []
    assert "http://me:***@host/run" in (tmp_path / "out" / "checkpoint-2" / "run.json").read_text()


@pytest.mark.campaign
def test_nor_by_train_sh():
    """In its own lines and a refusal; the output directory that it makes goes again."""
    secret = PLANTED["the environment"]
    env = {"PLANTED_API_KEY": secret, "MODEL_PATH": f"/nowhere/{secret}", "TRAIN_DATA_FILE": "rows.jsonl"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = run_command(["bash", str(TRAIN / "train.sh")], env)
    assert run.returncode == 2 and f"OUTPUT_DIR = {TRAIN}/output/*** (the name of MODEL_PATH)" in run.stdout
    assert "/nowhere/***: no such directory" in run.stdout and secret not in run.stdout + run.stderr
    assert not (TRAIN / "output" / secret).exists()
