"""No secret that a run is given is printed or written, however it is given; and one that goes on does without."""

import json

import pytest

from conftest import TRAIN

PLANTED = {  # where it is put: the secret
    "the environment": "planted-in-env-0123",
    "--hub_token": "hf_planted-flag-45",
    "a URL": "planted-password-67",
    "the DeepSpeed file": "planted-in-file-89",
}


def planted_in(run, folder):
    """(secret's place, where it shows) of each that shows in a run's output or in a file."""
    texts = {"the output": (run.stdout + run.stderr).encode()}
    texts |= {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
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
    on = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1", "--output_dir", tmp_path / "on"]
    run = run_train(on, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "checkpoint-1 does not record --project, --run_name: taken as not given" in " ".join(run.stdout.split())
    assert planted_in(run, tmp_path / "on") == []
