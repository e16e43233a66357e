"""Weights that are not whole are refused with their names, experts included: nothing is trained from random values."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from conftest import make_model_dir
from sft.model import hub

EXPERT, NORM = "model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.input_layernorm.weight"
EXTRA = "model.layers.7.mlp.up_proj.weight"


def spoiled(spoil, tokenizer_dir, directory):
    """A MoE's directory after `spoil` has changed its tensors."""
    make_model_dir("moe", tokenizer_dir, directory)
    state = load_file(directory / "model.safetensors")
    spoil(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.pop(NORM), f"1 weights are missing: {NORM}"),
        (lambda state: state.update({EXTRA: torch.zeros(2)}), f"1 weights are unexpected: {EXTRA}"),
        (lambda state: state.update({NORM: torch.zeros(3)}), f"1 weights are mismatched: {NORM}"),
        (lambda state: state.pop(EXPERT), "down_proj"),
    ],
    ids=["missing", "unexpected", "misshapen", "expert missing"],
)
def test_weights_that_are_not_whole(spoil, says, example_tokenizer_dir, example_rows, run_train, tmp_path):
    directory = spoiled(spoil, example_tokenizer_dir, tmp_path / "model")
    args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_train([*args, "--max_steps", 1])
    assert run.returncode == 2 and f"--model_name_or_path {directory}: " in run.stderr, run.stderr[-2000:]
    assert says in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.needs_gxx
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(lambda state: state.update({EXTRA: torch.zeros(2)}), EXTRA, marks=pytest.mark.campaign),
        (lambda state: state.update({NORM: torch.zeros(3)}), NORM),
        pytest.param(lambda state: state.pop(EXPERT), "mlp.experts.down_proj", marks=pytest.mark.campaign),
    ],
    ids=["unexpected", "misshapen", "expert missing"],
)
def test_under_zero3_too(spoil, says, example_tokenizer_dir, example_rows, run_train, tmp_path):
    directory = spoiled(spoil, example_tokenizer_dir, tmp_path / "model")
    args = ["--model_name_or_path", directory, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_train([*args, "--deepspeed", "ds_zero3_no_offload.json"], launcher="torchrun", nproc=2)
    assert run.returncode != 0 and run.stderr.count("refused: ") == 1 and says in run.stderr, run.stderr[-2000:]


def test_a_hub_id_is_its_directory(make_model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path):
    """From the hub's cache, there being no network: saved as the files are, config and all."""
    snapshot = tmp_path / "cache" / "models--someone--hunyuan" / "snapshots" / ("0" * 40)
    make_model_dir("dense", example_tokenizer_dir, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    args = ["--train_data_file", example_rows, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    run = run_train([*args, "--max_steps", 1, "--model_name_or_path", "someone/hunyuan"])
    assert run.returncode == 0, run.stderr[-3000:]
    config = json.loads((snapshot / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    lora = ["--use_lora", "--max_steps", 2, "--save_steps", 1, *args, "--output_dir", tmp_path / "lora"]
    run = run_train([*lora, "--model_name_or_path", "someone/hunyuan"])
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "someone/hunyuan"
    )
    run = run_train([*lora, "--resume_from_checkpoint", tmp_path / "lora" / "checkpoint-1"])
    assert run.returncode == 0 and "going on from" in run.stdout, run.stderr[-3000:]
    run = run_train([*args, "--max_steps", 1, "--model_name_or_path", "someone/else"])
    assert run.returncode == 2 and "--model_name_or_path someone/else: no such directory (looked in " in run.stderr
    assert all(word in run.stderr for word in ("https://huggingface.co", "HF_ENDPOINT", "modelscope download --model"))
    assert "its base" not in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("flag", "there", "fetched"),
    [
        ("model", {"model-1.safetensors", "pytorch_model.bin"}, {"model-1.safetensors"}),
        ("model", {"pytorch_model-1.bin", "flax.msgpack"}, {"pytorch_model-1.bin"}),
        ("tokenizer", {"model.safetensors", "pytorch_model.bin"}, set()),
    ],
)
def test_only_what_is_needed_is_fetched(flag, there, fetched, tmp_path, monkeypatch):
    """M16: of a hub id's files, as huggingface_hub chooses by patterns."""
    needed = {"config.json", "tokenizer.json", "hy.tiktoken", "chat_template.jinja", "modeling_hy.py", "LICENSE.txt"}
    needed |= {"additional_chat_templates/rag.jinja", "model.safetensors.index.json", "License"}
    others = {"README.md", "a.gguf", "assets/x.json", "original/params.json", "original/model.safetensors", "x.png"}
    got = set()

    def snapshot_download(path, cache_dir, allow_patterns, ignore_patterns):
        files = [*needed, *others, *there]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            got.add(name)
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    args = SimpleNamespace(model_name_or_path=None, tokenizer_name_or_path=None, cache_dir=None, hub_ids={})
    setattr(args, f"{flag}_name_or_path", "someone/hunyuan")
    hub.fetch(args)
    assert got == needed | fetched and args.hub_ids == {str(tmp_path): "someone/hunyuan"}


def test_a_model_without_a_tokenizer(model_dir, example_tokenizer_dir, example_rows, run_here, tmp_path):
    """M20: in training, chat and show_rows; and a message of a library is not cut at its first line."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(model_dir("dense", example_tokenizer_dir) / name, tmp_path / name)
    train = ["--model_name_or_path", tmp_path, "--output_dir", tmp_path / "out", "--train_data_file", example_rows]
    commands = (("train.py", train), ("chat.py", [tmp_path, "--prompt", "1"]))
    for script, args in (*commands, ("show_rows.py", ["--model", tmp_path, "--file", example_rows])):
        run = run_here(script, args)
        assert (
            run.returncode == 2 and f"{tmp_path}: holds no tokenizer" in run.stderr and "TOKENIZER_PATH" in run.stderr
        )
    (tmp_path / "tokenizer_config.json").write_text("{}")
    run = run_here("train.py", train)
    assert run.returncode == 2 and "does not load" in run.stderr and "(1) a `tokenizers` library" in run.stderr


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(
    make_model_dir, example_tokenizer_dir, example_rows, run_here, tmp_path
):
    """R21."""
    model = make_model_dir("dense", example_tokenizer_dir, tmp_path / "small", vocab_size=200)
    args = ["--model_name_or_path", model, "--train_data_file", example_rows, "--output_dir", tmp_path / "out"]
    run = run_here("train.py", args)
    assert run.returncode == 2 and " tokens, and the embedding of " in run.stderr and " 200 rows" in run.stderr
