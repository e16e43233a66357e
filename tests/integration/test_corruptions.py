"""What is deleted, cut, renamed or reshaped in a model directory, a checkpoint or an adapter: refused with exit code 2
and one message, before anything is written.

    pytest -s tests/integration/test_corruptions.py     # prints the table
"""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from runs import as_saved

WEIGHTS, ADAPTER, INDEX = "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"
NORM, EXPERT = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.experts.2.down_proj.weight"
SHARD = "model-00002-of-00004.safetensors"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def delete(name):
    return lambda d: (d / name).unlink()


def cut(name):
    return lambda d: os.truncate(d / name, (d / name).stat().st_size * 2 // 3)


def tensors(name, change):
    def spoil(d):
        state = load_file(d / name)
        change(state)
        save_file(state, d / name, metadata={"format": "pt"})

    return spoil


def reshape(key):
    return lambda state: state.update({key: state[key].flatten()[:-2].clone()})


def rename(key):
    return lambda state: state.update({key.replace("layers", "layer"): state.pop(key)})


def edit(name, **values):
    return lambda d: (d / name).write_text(json.dumps(json.loads((d / name).read_text()) | values))


def enlist(d):
    index = json.loads((d / INDEX).read_text())
    index["weight_map"]["model.other"] = SHARD
    (d / INDEX).write_text(json.dumps(index))


def no_tokenizer(d):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (d / name).unlink()


# what is spoiled, by name: (how, what the message has to say)
MODEL = {
    "config deleted": (delete("config.json"), "has no config.json"),
    "config cut": (cut("config.json"), "config.json: not a readable json object"),
    "config quantised": (edit("config.json", quantization_config={"bits": 4}), "is quantised"),
    "config of another size": (edit("config.json", hidden_size=32), "weights are mismatched"),
    "weights deleted": (delete(WEIGHTS), "holds no weights"),
    "weights cut": (cut(WEIGHTS), f"{WEIGHTS}: not a whole safetensors file"),
    "weights empty": (lambda d: (d / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: not a whole"),
    "tensor deleted": (tensors(WEIGHTS, lambda s: s.pop(NORM)), f"1 weights are missing: {NORM}"),
    "tensor renamed": (tensors(WEIGHTS, rename(NORM)), NORM),
    "tensor reshaped": (tensors(WEIGHTS, reshape(NORM)), f"1 weights are mismatched: {NORM}"),
    "expert deleted": (tensors(WEIGHTS, lambda s: s.pop(EXPERT)), "layers.1.mlp.experts"),
    "expert renamed": (
        tensors(WEIGHTS, rename(EXPERT)),
        f"1 weights are unexpected: {EXPERT.replace('layers', 'layer')}",
    ),
    "expert reshaped": (
        tensors(WEIGHTS, lambda s: s.update({EXPERT: s[EXPERT][:-1].clone()})),
        "weights are mismatched: model.layers.1.mlp.experts",
    ),
    "tokenizer deleted": (no_tokenizer, "holds no tokenizer"),
    "tokenizer cut": (cut("tokenizer.json"), "the tokenizer in"),
    "template deleted": (delete("chat_template.jinja"), "has no chat template"),
}
SHARDED = {
    "shard deleted": (delete(SHARD), f"{SHARD}: missing"),
    "shard cut": (cut(SHARD), f"{SHARD}: not a whole safetensors file"),
    "index deleted": (delete(INDEX), INDEX),
    "index cut": (cut(INDEX), INDEX),
    "index with another tensor": (enlist, f"{INDEX}: lists what is not in {SHARD}: model.other"),
}
CHECKPOINT = {
    "trainer_state deleted": (delete("trainer_state.json"), "is not a checkpoint"),
    "trainer_state cut": (cut("trainer_state.json"), "it has no whole trainer_state.json"),
    "optimizer deleted": (delete("optimizer.pt"), "optimizer.pt is missing"),
    "optimizer cut": (cut("optimizer.pt"), "optimizer.pt is not whole"),
    "scheduler deleted": (delete("scheduler.pt"), "scheduler.pt is missing"),
    "scheduler cut": (cut("scheduler.pt"), "scheduler.pt is not whole"),
    "random state deleted": (delete("rng_state.pth"), "rng_state.pth is missing"),
    "random state cut": (cut("rng_state.pth"), "rng_state.pth is not whole"),
    "weights deleted": (delete(WEIGHTS), "holds no weights"),
    "weights cut": (cut(WEIGHTS), f"{WEIGHTS}: not a whole safetensors file"),
    "tensor deleted": (tensors(WEIGHTS, lambda s: s.pop(NORM)), f"1 weights are missing: {NORM}"),
    "tokenizer deleted": (no_tokenizer, "holds no tokenizer"),
}
LORA_CHECKPOINT = {
    "adapter_config deleted": (delete("adapter_config.json"), "config.json"),
    "adapter_config cut": (cut("adapter_config.json"), "adapter_config.json: not a readable json object"),
    "base moved": (edit("adapter_config.json", base_model_name_or_path="/nowhere/base"), "/nowhere/base: no such"),
    "adapter deleted": (delete(ADAPTER), f"{ADAPTER}: missing"),
    "adapter cut": (cut(ADAPTER), f"{ADAPTER}: not a whole safetensors file"),
    "adapter empty": (lambda d: save_file({}, d / ADAPTER), "layers.0.self_attn"),
    "tensor deleted": (tensors(ADAPTER, lambda s: s.pop(LORA)), "layers.0.self_attn.q_proj.lora_A"),
    "tensor renamed": (tensors(ADAPTER, rename(LORA)), "layers.0.self_attn.q_proj.lora_A"),
    "tensor reshaped": (tensors(ADAPTER, lambda s: s.update({LORA: s[LORA][:, :32].clone()})), "q_proj.lora_A"),
    "of another rank": (edit("adapter_config.json", r=2), "lora_A"),
}
MERGED = {
    name: (how, says)
    for name, how, says in (
        ("adapter deleted", delete(ADAPTER), f"holds no {ADAPTER}"),
        ("adapter cut", cut(ADAPTER), "not a whole safetensors file"),
        ("adapter empty", lambda d: save_file({}, d / ADAPTER), "holds no tensors"),
        ("adapter_config deleted", delete("adapter_config.json"), "not a readable json object"),
        ("tensor deleted", tensors(ADAPTER, lambda s: s.pop(LORA)), "q_proj.lora_B"),
        ("tensor renamed", tensors(ADAPTER, rename(LORA)), "layer.0.self_attn.q_proj"),
        ("tensor reshaped", tensors(ADAPTER, lambda s: s.update({LORA: s[LORA][:, :32].clone()})), "q_proj ([64, 32]"),
        ("of another rank", edit("adapter_config.json", r=2), "rank or magnitude are not as"),
    )
}
TABLE = {"model": MODEL, "sharded model": SHARDED, "checkpoint": CHECKPOINT, "LoRA checkpoint": LORA_CHECKPOINT}
TABLE["adapter to merge"] = MERGED
CASES = [(what, case) for what, cases in TABLE.items() for case in cases]


@pytest.fixture(scope="module")
def whole(make_model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path_factory):
    """{what: a directory that is whole}."""
    folder = tmp_path_factory.mktemp("whole")
    model = make_model_dir("moe", example_tokenizer_dir, folder / "model")
    sharded = shutil.copytree(model, folder / "sharded")
    state, weight_map = load_file(sharded / WEIGHTS), {}
    for number, names in enumerate([sorted(state)[i::4] for i in range(4)], 1):
        file = f"model-{number:05d}-of-00004.safetensors"
        save_file({name: state[name] for name in names}, sharded / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (sharded / WEIGHTS).unlink()
    for out, flags in (("full", []), ("lora", ["--use_lora", "--lora_rank", 4])):
        args = ["--model_name_or_path", model, "--train_data_file", example_rows, "--output_dir", folder / out]
        run = run_train([*args, "--max_steps", 2, "--save_steps", 2, *flags])
        assert run.returncode == 0, run.stderr[-2000:]
    lora = folder / "lora" / "checkpoint-2"
    whole = {"model": model, "sharded model": sharded, "checkpoint": folder / "full" / "checkpoint-2"}
    return whole | {"LoRA checkpoint": lora, "adapter to merge": lora}


@pytest.mark.parametrize(("what", "case"), CASES)
def test_refused(what, case, whole, example_rows, tmp_path, run_here, capfd):
    spoil, says = TABLE[what][case]
    directory, out = tmp_path / "spoiled", tmp_path / "out"
    shutil.copytree(whole[what], directory)
    spoil(directory)
    if (directory / "manifest.json").exists():
        as_saved(directory)
    script, given = "train.py", "--resume_from_checkpoint" if "checkpoint" in what else "--model_name_or_path"
    args = [given, directory, "--train_data_file", example_rows, "--output_dir", out, "--max_steps", 4]
    if what == "adapter to merge":
        script, args = "merge_lora_weight.py", ["--adapter_model_path", directory, "--output_path", out]
    run = run_here(script, args)
    message = run.stderr[run.stderr.rindex("refused: ") :].strip()
    shown = message.replace(str(tmp_path), "…").replace("\n", " ")
    with capfd.disabled():
        print(f"| {what} | {case} | {run.returncode} | {shown[:160]} |")
    assert run.returncode == 2 and says in message and run.stderr.count("refused: ") == 1
    assert not out.exists() and "\n" not in message


def test_what_is_whole_goes_on(whole, example_rows, run_train, tmp_path):
    """The same runs, nothing spoiled."""
    for what, directory in whole.items():
        given = "--resume_from_checkpoint" if "checkpoint" in what else "--model_name_or_path"
        if what != "adapter to merge":
            args = ["--train_data_file", example_rows, "--output_dir", tmp_path / what, "--max_steps", 3]
            run = run_train([given, directory, *args])
            assert run.returncode == 0, run.stderr[-2000:]


ZERO = {
    "latest deleted": (lambda d: (d / "latest").unlink(), "latest is missing"),
    "states deleted": (lambda d: shutil.rmtree(d / "global_step2"), "global_step2 is missing"),
    "one rank's state deleted": (
        lambda d: next((d / "global_step2").glob("*rank_1*optim_states.pt")).unlink(),
        "optimizer states of 1 of 2",
    ),
    "one rank's state cut": (
        lambda d: os.truncate(next((d / "global_step2").glob("*rank_1*optim_states.pt")), 5000),
        "is not whole",
    ),
    "random state deleted": (delete("rng_state_1.pth"), "rng_state_1.pth is missing"),
}


@pytest.fixture(scope="module")
def whole_zero3(model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path_factory):
    """A checkpoint of two ranks."""
    out = tmp_path_factory.mktemp("zero3")
    args = ["--model_name_or_path", model_dir("dense", example_tokenizer_dir), "--train_data_file", example_rows]
    args += ["--deepspeed", "ds_zero3_no_offload.json", "--output_dir", out, "--max_steps", 2, "--save_steps", 2]
    run = run_train(args, launcher="torchrun", nproc=2)
    assert run.returncode == 0, run.stderr[-2000:]
    return out / "checkpoint-2"


@pytest.mark.needs_gxx
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.campaign] * (case != "one rank's state cut")) for case in ZERO],
)
def test_refused_under_zero(case, whole_zero3, example_rows, run_train, tmp_path):
    spoil, says = ZERO[case]
    directory = tmp_path / "spoiled"
    shutil.copytree(whole_zero3, directory)
    spoil(directory)
    args = ["--train_data_file", example_rows, "--deepspeed", "ds_zero3_no_offload.json", "--max_steps", 4]
    args += ["--resume_from_checkpoint", directory, "--output_dir", tmp_path / "out"]
    run = run_train(args, launcher="torchrun", nproc=2)
    assert run.returncode != 0 and run.stderr.count("refused: ") == 1 and says in run.stderr, run.stderr[-2000:]
    assert not (tmp_path / "out").exists()
