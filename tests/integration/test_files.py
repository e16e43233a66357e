"""The files that training and merging write: of the base's directory only those of a model are copied, the rest is
named once, and every file has the mode that the umask says."""

import json
import os
import shutil

import pytest

from sft.model.directory import ModelDirectory, code_files, files_of_a_model

LEFT = (".env", "backup.tar.gz", "checkpoint.md", "notes.py", "run.log", "sub/tokenizer.json", "tokenizer_backup.zip")
NAMED = ".env, backup.tar.gz, checkpoint.md, notes.py, run.log, sub, tokenizer_backup.zip"
OURS = ("optimizer.pt", "log_1.txt", "trainer_state.json", "checkpoint-3/config.json", "runs/x", ".lock", "base.json")
COPIED = ("LICENSE", "Notice.txt", "generation_config.json", "additional_chat_templates/rag.jinja", "hy.tiktoken")
CODE = ("modeling_hunyuan.py", "configuration_hunyuan.py", "helper.py")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def base(make_model_dir, example_tokenizer_dir, tmp_path):
    """A model with code that imports a helper, and all kinds of files beside it."""
    base = make_model_dir("remote", example_tokenizer_dir, tmp_path / "base")
    with open(base / "modeling_hunyuan.py", "a") as code:
        code.write("\nfrom .helper import HELP\n")
    (base / "helper.py").write_text("HELP = 1\n")
    for name in LEFT + OURS + COPIED:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    return base


@pytest.fixture
def umask():
    """`umask(mask)` until the test ends; processes that are started inherit it."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def check_modes(directory, mask):
    """That of every file and directory."""
    wrong = {}
    for path in [directory, *directory.rglob("*")]:
        mode, wanted = path.stat().st_mode & 0o777, (0o777 if path.is_dir() else 0o666) & ~mask
        if mode != wanted:
            wrong[str(path)] = oct(mode)
    assert not wrong


def check_files(directory, base):
    """All of a model is there, byte for byte, and nothing of the rest."""
    for name in COPIED + CODE + TOKENIZER:
        assert (directory / name).read_bytes() == (base / name).read_bytes(), name
    assert not [name for name in LEFT if (directory / name).exists()]


@pytest.mark.parametrize(("mask", "lora"), [(0o022, True), (0o027, False)])
def test_trained_and_merged(mask, lora, base, example_rows, run_train, run_here, umask, tmp_path):
    umask(mask)
    out, named = tmp_path / "out", f"not copied from {base}: {NAMED} (not files of a model)\n"
    args = ["--model_name_or_path", base, "--train_data_file", example_rows, "--output_dir", out, "--max_steps", 2]
    args += ["--save_steps", 1, "--report_to", "tensorboard", *(["--use_lora"] if lora else [])]
    run = run_train(args)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("not copied from") == 1 and named in run.stdout
    for directory in (out, out / "checkpoint-1", out / "checkpoint-2"):
        check_files(directory, base)
    check_modes(out, mask)

    # the end of a finished run, written anew; what was saved holds nothing that would be named
    again = [*args, "--resume_from_checkpoint", out / "checkpoint-2", "--output_dir", tmp_path / "again"]
    run = run_here("train.py", again)
    assert run.returncode == 0 and "no step is left" in run.stdout, run.stderr
    assert run.stdout.count("not copied from") == lora, (
        "an adapter needs its base; all weights come from the checkpoint"
    )
    check_files(tmp_path / "again", base)
    check_modes(tmp_path / "again", mask)
    alone = [word for word in again if word not in ("--model_name_or_path", base)]
    if lora:
        merged = ["--adapter_model_path", out, "--output_path", tmp_path / "deep" / "merged"]
        run = run_here("merge_lora_weight.py", merged)
        assert run.returncode == 0 and run.stdout.count("not copied from") == 1 and named in run.stdout, run.stderr
        check_files(tmp_path / "deep" / "merged", base)
        check_modes(tmp_path / "deep", mask)
    else:
        shutil.rmtree(tmp_path / "again")
        run = run_here("train.py", alone)
        assert run.returncode == 0 and "not copied from" not in run.stdout, run.stderr
        check_files(tmp_path / "again", base)


def test_another_directorys_tokenizer_wins_and_each_directory_is_named(
    base, example_tokenizer_dir, example_rows, run_here, tmp_path
):
    other = shutil.copytree(example_tokenizer_dir, tmp_path / "tokenizer")
    (other / "tokenizer_config.json").write_text('{"other": 1}')
    (other / "notes.txt").write_text("x")
    (other / "generation_config.json").write_text("the tokenizer's model's")
    (other / "chat_template.jinja").unlink()  # the base's would win over one in tokenizer_config.json
    (base / "tokenization.py").touch()
    (base / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization.T", null]}}')
    files = ModelDirectory(base, other).contents
    assert files["tokenizer_config.json"] == b'{"other": 1}' and files["generation_config.json"] == b"{}"
    assert set(files) == {
        "LICENSE",
        "Notice.txt",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *CODE,
    }


def test_code_is_followed_and_what_is_missing_is_no_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps({"auto_map": {"AutoConfig": "a.C", "AutoModel": "user/hub--z.M"}})
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": ["t.Slow", None]}))  # as it once was
    (tmp_path / "a.py").write_text("from .b import x\nfrom .gone import y\nimport os\n")
    (tmp_path / "b.py").write_text("from .a import C\n")
    (tmp_path / "t.py").write_bytes("# 中文\nfrom .unseen import x".encode("gbk"))  # Python itself refuses it
    (tmp_path / "z.py").touch()
    assert sorted(code_files(tmp_path, {"AutoConfig": "a.C"})) == ["a.py", "b.py", "gone.py"]
    assert sorted(files_of_a_model(tmp_path)) == ["a.py", "b.py", "t.py", "tokenizer_config.json"]
    assert capsys.readouterr().out == f"not copied from {tmp_path}: z.py (not files of a model)\n"


def test_at_most_twenty_are_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    for i in range(23):
        (tmp_path / f"{i:02}.log").touch()
    assert files_of_a_model(tmp_path) == {}
    assert capsys.readouterr().out.endswith(", 18.log, 19.log, … (not files of a model)\n")


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "LICENCE", "License.txt", "license", "NOTICE", "Notice.md", "LICENSE-MODEL", "Tencent_License.pdf",
     "THIRD_PARTY_NOTICES.txt", "tokenizer.model", "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt",
     "hy.tiktoken", "spiece.model", "x.vocab", "added_tokens.json", "special_tokens_map.json", "chat_template.json",
     "processor_config.json", "preprocessor_config.json", "generation_config.json"],
)  # fmt: skip
def test_a_models_file_is_kept(name, tmp_path, capsys):
    (tmp_path / name).write_text("{}")
    assert files_of_a_model(tmp_path) == {name: tmp_path / name} and not capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [".env", ".tokenizer.json", "tokenizer.py", "vocab.tar.gz", "license.key", "README.md", "a.json",
     "unlicensed.txt", "noticeable.md", "Tokenizer.json"],
)  # fmt: skip
def test_another_file_is_named(name, tmp_path, capsys):
    (tmp_path / name).write_text("{}")
    kept = files_of_a_model(tmp_path)
    assert not kept and f": {name} (not files" in capsys.readouterr().out
