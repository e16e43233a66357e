"""An adapter knows its base: base.json is written wherever an adapter is saved, and merging, chat and resuming hold to
it."""

import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs import as_saved
from sft.model.adapter_base import check_base, fingerprint
from sft.model.directory import ModelDirectory
from tiny import fuse_experts

CASES = [  # (kind of base, --model_code, code that is recorded, in every push)
    ("dense", "auto", "native", True),
    ("remote", "remote", "remote", True),
    ("moe", "auto", "native", False),
    ("hy_v3", "auto", "native", False),
    ("remote", "native", "native", False),
    ("hy_v4", "auto", "native", False),
]
ALL = [pytest.param(case, marks=[pytest.mark.campaign] * (not case[3]), id="-".join(case[:2])) for case in CASES]
TARGETS = {"remote": ["q_proj", "experts"], "moe": ["q_proj", "experts"]}


@pytest.fixture
def made(request, tmp_path_factory, example_tokenizer_dir, example_rows, make_model_dir, run_train):
    """An adapter of two steps with a checkpoint at each: `base` and `other` (another seed), `out`, its training
    `flags`. Made once for a case; do not write into it."""
    kind, model_code, code, _ = case = request.param
    if case not in MADE:
        folder = tmp_path_factory.mktemp("made")
        base = make_model_dir(kind, example_tokenizer_dir, folder / "base", initializer_range=0.2)
        other = make_model_dir(kind, example_tokenizer_dir, folder / "other", initializer_range=0.2, seed=1)
        flags = ["--train_data_file", example_rows, "--save_steps", 1, "--logging_steps", 1, "--max_seq_length", 128]
        flags += ["--per_device_train_batch_size", 4, "--learning_rate", 1e-2]
        lora = ["--use_lora", "--model_code", model_code, "--lora_target_modules", *TARGETS.get(kind, ["o_proj"])]
        out = folder / "out"
        run = run_train([*flags, *lora, "--max_steps", 2, "--model_name_or_path", base, "--output_dir", out])
        assert run.returncode == 0, run.stderr[-3000:]
        MADE[case] = SimpleNamespace(kind=kind, base=base, other=other, out=out, flags=flags, code=code)
    return MADE[case]


MADE = {}
by_case = pytest.mark.parametrize("made", ALL, indirect=True)
dense = pytest.mark.parametrize("made", ALL[:1], indirect=True)
remote = pytest.mark.parametrize("made", ALL[1:2], indirect=True)


def read(directory, name="base.json"):
    return json.loads((directory / name).read_text())


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def refused(run, made):
    said = ("is not the base that it was trained on", str(made.base), str(made.other), "--any_base", "differ (")
    return run.returncode == 2 and "Traceback" not in run.stderr and all(text in run.stderr for text in said)


@by_case
def test_it_is_written_beside_every_adapter(made):
    for directory in (made.out, made.out / "checkpoint-1", made.out / "checkpoint-2"):
        record = read(directory)
        assert record["path"] == str(made.base) == read(directory, "adapter_config.json")["base_model_name_or_path"]
        assert record["code"] == made.code and record["class"].endswith("ForCausalLM")
        assert record["tensors"] == fingerprint(ModelDirectory(made.base), made.code)
        assert "\n" not in (directory / "base.json").read_text()


@by_case
def test_merging(made, run_here, tmp_path):
    args = ["--adapter_model_path", made.out, "--output_path", tmp_path / "merged"]
    run = run_here("merge_lora_weight.py", [*args, "--base_model_path", made.other])
    assert refused(run, made) and listing(tmp_path) == [], run.stderr
    run = run_here("merge_lora_weight.py", [*args, "--base_model_path", made.other, "--any_base"])
    assert run.returncode == 0 and run.stdout.count("is not the base that it was trained on") == 1, run.stderr
    shutil.rmtree(tmp_path / "merged")
    moved = shutil.copytree(made.base, tmp_path / "moved")
    run = run_here("merge_lora_weight.py", [*args, "--base_model_path", moved, "--verify", "logits"])
    assert run.returncode == 0 and "base that it was trained on" not in run.stdout, run.stderr
    assert float(run.stdout.split("verify logits = ")[1].split()[0]) < 1e-3
    if made.code == "remote":
        assert run.stdout.count("model code = the directory's own") == 2


@by_case
def test_chat(made, run_here, tmp_path):
    args = ["--adapter", made.out, "--prompt", "1", "--max_new_tokens", 3]
    run = run_here("chat.py", [made.other, *args])
    assert refused(run, made) and run.stdout == ""
    run = run_here("chat.py", [made.other, *args, "--any_base"])
    assert run.returncode == 0 and run.stderr.count("is not the base that it was trained on") == 1, run.stderr
    assert "trained on" not in run.stdout and "= " not in run.stdout
    named = run_here("chat.py", [made.out, *args[2:]])
    moved = run_here("chat.py", [shutil.copytree(made.base, tmp_path / "moved"), *args])
    assert named.returncode == moved.returncode == 0 and named.stdout == moved.stdout, moved.stderr
    assert "base that it was trained on" not in moved.stderr
    assert ("the directory's own" in moved.stderr) == (made.code == "remote")


@by_case
def test_resuming(made, run_here, run_train, losses, tmp_path):
    """Another base is refused; from one that has moved the step is the undisturbed run's, and its path is saved."""
    args = [*made.flags, "--max_steps", 2, "--output_dir", tmp_path / "out"]
    args += ["--resume_from_checkpoint", made.out / "checkpoint-1"]
    run = run_here("train.py", [*args, "--model_name_or_path", made.other])
    assert refused(run, made) and listing(tmp_path) == [], run.stderr
    moved = shutil.copytree(made.base, tmp_path / "moved")
    run = run_train([*args, "--model_name_or_path", moved])
    assert run.returncode == 0 and "base that it was trained on" not in run.stdout, run.stderr[-3000:]
    assert losses(tmp_path / "out") == pytest.approx(losses(made.out), abs=1e-5)
    for directory in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        assert read(directory, "adapter_config.json")["base_model_name_or_path"] == str(moved)
        assert read(directory) == read(made.out) | {"path": str(moved)}


BASES = {  # what is done with the base in a directory of its own: whether it stays the adapter's
    "right": (lambda made, to, train: made.base, True),
    "moved": (lambda made, to, train: shutil.copytree(made.base, to), True),
    "bf16": (lambda made, to, train: rewritten(shutil.copytree(made.base, to)), True),
    "fused": (lambda made, to, train: fused(shutil.copytree(made.base, to)), True),
    "same shapes": (lambda made, to, train: made.other, False),
    "trained": (lambda made, to, train: train(made, to), False),
}
QUICK = ("bf16", "same shapes")


def rewritten(directory):
    state = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def fused(directory):
    fuse_experts(directory)
    return directory


@pytest.mark.parametrize(
    ("made", "names"),
    [pytest.param(CASES[0], QUICK, id="dense-quick")]
    + [pytest.param(case, tuple(BASES), marks=pytest.mark.campaign, id="-".join(case[:2])) for case in CASES],
    indirect=["made"],
)
def test_table_of_adapters_and_bases(made, names, run_here, run_train, tmp_path):
    """What merge, chat and resume do with an adapter on each base: it works, or it is refused for the base."""

    def train(made, out):
        args = [*made.flags, "--learning_rate", 1e-5, "--max_steps", 1, "--model_name_or_path", made.base]
        assert run_train([*args, "--model_code", made.code, "--output_dir", out]).returncode == 0
        return out

    table = []
    for name in names:
        if name == "fused" and (made.kind in ("dense", "hy_v4") or made.code == "remote"):
            continue  # there are no experts, they always are, or its code has them one by one
        make, is_its_own = BASES[name]
        base, to = make(made, tmp_path / f"base-{name}", train), tmp_path / name
        goes_on = [*made.flags, "--max_steps", 2, "--resume_from_checkpoint", made.out / "checkpoint-1"]
        goes_on += ["--model_name_or_path", base, "--output_dir", to / "out"]
        run = run_train if is_its_own else lambda args: run_here("train.py", args)
        merged = ["--base_model_path", base, "--adapter_model_path", made.out, "--output_path", to / "merged"]
        done = {
            "merge": run_here("merge_lora_weight.py", [*merged, "--verify", "keys"]),
            "chat": run_here("chat.py", [base, "--adapter", made.out, "--prompt", "1", "--max_new_tokens", 2]),
            "resume": run(goes_on),
        }
        refused = {"is not the base that it was trained on" in one.stderr for one in done.values()}
        assert refused == {not is_its_own}, [one.stderr[-500:] for one in done.values()]
        assert {one.returncode for one in done.values()} == {0 if is_its_own else 2}
        said = [f"{script} {'works' if one.returncode == 0 else 'refused'}" for script, one in done.items()]
        table.append(f"\n{made.kind:<8}{made.code:<8}{name:<13}{', '.join(said)}")
    print(*table, sep="")


@dense
def test_resuming_on_any_base(made, run_train, tmp_path):
    """From then on the other base is the adapter's own."""
    args = [*made.flags, "--max_steps", 2, "--resume_from_checkpoint", made.out / "checkpoint-1", "--any_base"]
    run = run_train([*args, "--model_name_or_path", made.other, "--output_dir", tmp_path / "out"])
    assert run.returncode == 0 and run.stdout.count("is not the base that it was trained on") == 1, run.stderr[-3000:]
    assert read(tmp_path / "out")["path"] == str(made.other)
    check_base(tmp_path / "out", ModelDirectory(made.other), any_base=False)


@dense
def test_resuming_a_finished_run(made, run_here, example_tokenizer_dir, tmp_path):
    """No model is loaded, but base.json is there; with another tokenizer too."""
    args = [*made.flags, "--max_steps", 2, "--resume_from_checkpoint", made.out / "checkpoint-2"]
    for more in ([], ["--tokenizer_name_or_path", example_tokenizer_dir]):
        run = run_here("train.py", [*args, *more, "--output_dir", tmp_path / f"out{len(more)}"])
        assert run.returncode == 0 and "no step is left" in run.stdout, run.stderr
        assert read(tmp_path / f"out{len(more)}") == read(made.out)
    run = run_here("train.py", [*args, "--model_name_or_path", made.other, "--output_dir", tmp_path / "other"])
    assert refused(run, made) and not (tmp_path / "other").exists()


@remote
def test_resuming_with_other_code_is_refused(made, run_here, tmp_path):
    args = [*made.flags, "--max_steps", 2, "--output_dir", tmp_path / "out", "--model_code", "native"]
    run = run_here("train.py", [*args, "--resume_from_checkpoint", made.out / "checkpoint-1"])
    assert run.returncode == 2 and "Traceback" not in run.stderr and not (tmp_path / "out").exists(), run.stderr


@remote
@pytest.mark.parametrize("script", ["merge", "chat", "train", "rows"])
def test_consent_to_code(script, made, run_here, tmp_path):
    """M21: with `false` nothing of the directory runs, and what only its code computes is refused; else the files that
    run are named, each once with its hash."""
    command = {
        "merge": ["merge_lora_weight.py", "--adapter_model_path", made.out, "--verify", "logits", "--output_path"],
        "chat": ["chat.py", made.out, "--prompt", "1", "--max_new_tokens", 2],
        "train": ["train.py", *made.flags, "--max_steps", 2, "--resume_from_checkpoint", made.out / "checkpoint-2"],
        "rows": ["show_rows.py", "--model", made.base, "--file", made.flags[1]],
    }[script]
    command += {"merge": [tmp_path / "merged"], "train": ["--output_dir", tmp_path / "out"]}.get(script, [])
    run = run_here(command[0], [*command[1:], "--trust_remote_code", "false"])
    assert "code that runs" not in run.stdout + run.stderr and "Traceback" not in run.stderr
    if script != "rows":  # the tokenizer brings none
        assert run.returncode == 2 and "is computed by code that it brings: allow that (--trust" in run.stderr
        assert not (tmp_path / "merged").exists() and not (tmp_path / "out").exists()
    run = run_here(command[0], command[1:])
    assert run.returncode == 0, run.stderr
    said = re.findall(r"^code that runs = (\S+) \(sha256 (\w+);", run.stderr if script == "chat" else run.stdout, re.M)
    names = ["configuration_hunyuan.py"] + ["modeling_hunyuan.py"] * (script != "rows")
    assert sorted(said) == [(str(made.base / name), sha256(made.base / name)[:16]) for name in names]


@dense
def test_code_that_the_base_does_not_bring_is_refused(made, run_here, tmp_path):
    """Where the adapter's tensors would fit the other class."""
    adapter = shutil.copytree(made.out / "checkpoint-1", tmp_path / "checkpoint-1")
    (adapter / "base.json").write_text(json.dumps(read(adapter) | {"code": "remote"}))
    as_saved(adapter)
    args = [*made.flags, "--max_steps", 2, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", adapter]
    for run in (run_here("train.py", args), run_here("chat.py", [adapter, "--prompt", "1"])):
        assert run.returncode == 2 and "brings no code that computes it" in run.stderr, run.stderr
    assert not (tmp_path / "out").exists()


@dense
def test_all_weights_trained_from_it_are_another_base(made, run_train, run_here, tmp_path):
    """Two steps, at a learning rate of fine-tuning, in fp32 and in bf16; and nothing of base.json in them."""
    shutil.copytree(made.out, tmp_path / "tokenizer")
    args = [*made.flags, "--learning_rate", 1e-5, "--max_steps", 2, "--bf16", "--output_dir", tmp_path / "full"]
    args += ["--use_cpu", "--lr_scheduler_type", "constant"]
    run = run_train([*args, "--model_name_or_path", made.base])
    assert run.returncode == 0, run.stderr[-3000:]
    for other in (tmp_path / "full", tmp_path / "full" / "checkpoint-2"):
        dtype = load_file(other / "model.safetensors")["model.norm.weight"].dtype
        assert dtype == (torch.bfloat16 if other.name == "full" else torch.float32)
        merged = ["--adapter_model_path", made.out, "--output_path", tmp_path / "merged", "--base_model_path", other]
        run = run_here("merge_lora_weight.py", merged)
        assert run.returncode == 2 and "is not the base that it was trained on" in run.stderr, run.stderr
        assert not (other / "base.json").exists()


@dense
@pytest.mark.parametrize("script", ["merge", "chat", "train"])
def test_a_foreign_adapter_is_warned_of(script, made, run_here, tmp_path):
    """Without base.json, and used with another base than its adapter_config.json names."""
    adapter = shutil.copytree(made.out / "checkpoint-2", tmp_path / "checkpoint-2")
    (adapter / "base.json").unlink()
    as_saved(adapter)
    args = {
        "merge": ("merge_lora_weight.py", "--adapter_model_path", adapter, "--output_path", tmp_path / "merged"),
        "chat": ("chat.py", "--adapter", adapter, "--prompt", "1", "--max_new_tokens", 2),
        "train": ("train.py", *made.flags, "--max_steps", 2, "--resume_from_checkpoint", adapter, "--output_dir"),
    }[script]
    flag = {"merge": "--base_model_path", "train": "--model_name_or_path"}.get(script)
    for base, warned in ((made.other, 1), (made.base, 0)):
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        more = [tmp_path / f"out{warned}"] if script == "train" else []
        run = run_here(args[0], [*args[1:], *more, *filter(None, [flag, base])])
        said = run.stderr if script == "chat" else run.stdout
        assert run.returncode == 0 and said.count("names another base") == warned, run.stderr
        if script == "chat":
            assert "warning" not in run.stdout
        if script == "train":
            assert not (tmp_path / f"out{warned}" / "base.json").exists()
