"""What train.sh starts: the command of train.py that its variables, recipe and flags make."""

import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import TRAIN
from sft import parser, start
from sft.messages import Refused
from sft.nodes import preflight
from sft.nodes.ssh import Node

EXAMPLE = [
    "--num_layers",
    "4",
    "--max_steps",
    "800",
    "--learning_rate",
    "4e-3",
    "--min_lr",
    "1e-4",
    "--warmup_steps",
    "50",
]
LORA = ["--learning_rate", "1e-4", "--min_lr", "1e-5"]
RECIPE = [
    "--bf16",
    "--gradient_checkpointing",
    "--learning_rate",
    "1e-5",
    "--min_lr",
    "1e-6",
    "--warmup_ratio",
    "0.01",
]
VARIABLES = ("MODEL_PATH", "TOKENIZER_PATH", "TRAIN_DATA_FILE", "OUTPUT_DIR", "DS_CONFIG", "HOST_GPU_NUM")
VARIABLES += ("NODE_IP_LIST", "IP_LIST", "CUDA_VISIBLE_DEVICES", "STALL_TIMEOUT", "MAX_RESTARTS")


@pytest.fixture
def started(monkeypatch):
    """`started(*flags, gpus=0, **variables)`: what would run: ({flag: value}, words, choices)."""

    def get(*flags, gpus=0, **variables):
        for name in (*VARIABLES, "GO_ON_WITH", "ON_TERMINAL"):
            monkeypatch.setenv(name, "")  # put back at the end
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        ran = []
        monkeypatch.setattr(start, "number_of_gpus", lambda env: gpus)
        monkeypatch.setattr(start, "run", lambda job, command, values: ran.append((job, command)) or 7)
        words = ["/x/train.sh", *RECIPE, "--", *LORA, "--", *EXAMPLE, "--", *map(str, flags)]
        with pytest.raises(SystemExit) as end:
            start.main(words)
        assert end.value.code == 7
        job, command = ran[0]
        assert command[0] == str(TRAIN / "train.py")
        return parser.parse_flags(command[1:]), command[1:], job.choices

    return get


def test_a_model_gets_the_recipe(started):
    values, words, choices = started(MODEL_PATH="/m/Hunyuan", TRAIN_DATA_FILE="r.jsonl")
    assert values["learning_rate"] == 1e-5 and values["warmup_ratio"] == 0.01
    assert "bf16" not in values, "on a CPU"
    assert values["deepspeed"] == "none" and values["output_dir"] == str(TRAIN / "output" / "Hunyuan")
    assert values["model_name_or_path"] == "/m/Hunyuan" and values["train_data_file"] == ["r.jsonl"]
    assert f"OUTPUT_DIR = {TRAIN}/output/Hunyuan (the name of MODEL_PATH)" in choices
    assert len(set(words)) == len(words), "nothing is passed twice"


def test_on_gpus(started):
    values, _, choices = started(MODEL_PATH="/m/Hunyuan", TRAIN_DATA_FILE="r", gpus=2)
    assert values["bf16"] is True and values["deepspeed"] == "ds_zero3_no_offload.json"
    assert "HOST_GPU_NUM = 2 (the GPUs of this machine)" in choices and os.environ["HOST_GPU_NUM"] == "2"
    values, _, _ = started("--fp16", MODEL_PATH="/m/Hunyuan", TRAIN_DATA_FILE="r", gpus=2)
    assert "bf16" not in values and values["fp16"] is True
    values, _, _ = started("--use_cpu", MODEL_PATH="/m/Hunyuan", TRAIN_DATA_FILE="r", gpus=2)
    assert "bf16" not in values and values["deepspeed"] == "none"


def test_4_bits_without_deepspeed(started):
    """Unless a file is asked for, which train.py refuses."""
    given = {"MODEL_PATH": "/m/Hunyuan", "TRAIN_DATA_FILE": "r", "gpus": 2}
    values, _, choices = started("--use_lora", "--load_in_4bit", **given)
    assert values["deepspeed"] == "none" and values["bf16"] is True
    assert "DS_CONFIG = none (--load_in_4bit: each process holds the whole model)" in choices
    assert started("--use_lora", "--load_in_4bit", DS_CONFIG="d.json", **given)[0]["deepspeed"] == "d.json"


@pytest.mark.parametrize(
    "spelling", [["--learning_rate", "3"], ["--learning-rate=3"], ["--learning_rate=2", "--learning-rate", "3"]]
)
def test_a_flag_wins_over_the_recipe_however_it_is_spelled(spelling, started):
    values, words, _ = started(*spelling, MODEL_PATH="/m/x", TRAIN_DATA_FILE="r")
    assert values["learning_rate"] == 3 and "1e-5" not in words and values["min_lr"] == 1e-6


def test_a_flag_takes_out_what_it_excludes(started):
    given = {"MODEL_PATH": "/m/x", "TRAIN_DATA_FILE": "r"}
    values, _, _ = started("--warmup_steps", 0, **given)
    assert "warmup_ratio" not in values and values["warmup_steps"] == 0
    values, _, _ = started("--learning_rate", 1e-7, **given)
    assert "min_lr" not in values, "the recipe's lowest rate is above it"
    values, _, _ = started("--learning_rate", 1e-7, "--min_lr", 1e-8, **given)
    assert values["min_lr"] == 1e-8


def test_a_flag_counts_as_its_variable(started):
    values, words, choices = started(
        "--model-name-or-path=/m/a",
        "--train_data_file",
        "r",
        "s",
        "--deepspeed",
        "d.json",
        MODEL_PATH="/m/b",
        DS_CONFIG="e",
    )
    assert values["model_name_or_path"] == "/m/a" and values["train_data_file"] == ["r", "s"]
    assert values["output_dir"] == str(TRAIN / "output" / "a") and "d.json" in words and "e" not in words
    assert not any("DS_CONFIG" in line for line in choices)


def test_lora_has_rates_and_a_directory_of_its_own(started):
    values, _, _ = started("--use_lora", MODEL_PATH="/m/x", TRAIN_DATA_FILE="r")
    assert (values["learning_rate"], values["min_lr"]) == (1e-4, 1e-5)
    assert values["output_dir"] == str(TRAIN / "output" / "x-lora")
    values, _, _ = started("--use_lora", "false", MODEL_PATH="/m/x", TRAIN_DATA_FILE="r")
    assert values["learning_rate"] == 1e-5 and values["output_dir"] == str(TRAIN / "output" / "x")


def test_the_example(started):
    values, _, choices = started()
    assert (
        values["num_layers"] == 4 and values["overwrite_output_dir"] is True and "gradient_checkpointing" not in values
    )
    assert values["tokenizer_name_or_path"] == str(TRAIN / "example" / "tokenizer")
    assert "model = the embedded example (MODEL_PATH is not set)" in choices


@pytest.mark.parametrize(("flag", "excluded"), [("warmup_ratio", "warmup_steps"), ("num_train_epochs", "max_steps")])
def test_what_would_win_over_a_flag_goes(flag, excluded, started):
    values, _, _ = started(f"--{flag}", 0.1)
    assert values[flag] == 0.1 and excluded not in values


def test_on_a_cpu_by_choice_a_run_goes_on_with_as_many_processes(started):
    started("--use_cpu", MODEL_PATH="/m/a", TRAIN_DATA_FILE="r", gpus=8)
    assert os.environ["GO_ON_WITH"] == "HOST_GPU_NUM=1 bash /x/train.sh"


def test_a_run_that_goes_on_gets_no_recipe(started, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint-1")
    given = {"TRAIN_DATA_FILE": "r", "NET_IFNAME": "eth 0", "STALL_TIMEOUT": 60, "MAX_RESTARTS": 3}
    words = started("--resume_from_checkpoint", tmp_path / "link", **given)[1]
    assert words[:6] == ["--train_data_file", "r", "--output_dir", str(tmp_path), "--ddp_timeout", "60"]
    assert words[6:] == ["--resume_from_checkpoint", str(tmp_path / "link")]
    assert os.environ["GO_ON_WITH"] == "NET_IFNAME='eth 0' STALL_TIMEOUT=60 MAX_RESTARTS=3 bash /x/train.sh"
    started("--resume_from_checkpoint", tmp_path / "link", "--ddp_timeout", 90)
    assert "STALL_TIMEOUT=90" in os.environ["GO_ON_WITH"], "the flag wins"


def test_a_configuration_file_in_front(started, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: /m/a\ntrain_data_file: [r, s]\nlearning_rate: 1e-3\n")
    values, _, _ = started(file, "--max_steps", 3)
    assert (values["learning_rate"], values["train_data_file"], values["max_steps"]) == (1e-3, ["r", "s"], 3)
    assert values["output_dir"] == str(TRAIN / "output" / "a")


@pytest.mark.parametrize(
    ("flags", "variables", "says"),
    [
        (["--lora_rank", 0], {}, "--lora_rank 0: must be at least 1"),
        (["--use_loar"], {}, "did you mean --use_lora?"),
        ([], {"HOST_GPU_NUM": 3, "gpus": 2}, "HOST_GPU_NUM=3: only 2 GPUs are visible"),
        ([], {"HOST_GPU_NUM": "a[$(x)]"}, "HOST_GPU_NUM=a[$(x)]: must be a number from 1"),
        ([], {"HOST_GPU_NUM": "８"}, "HOST_GPU_NUM=８: has full-width characters; write 8"),
        (["--lr", 1], {}, "unknown argument --lr: did you mean --learning_rate?"),
        (["--batch_size", 1], {}, "unknown argument --batch_size: did you mean --per_device_train_batch_size?"),
        (["--learning_rate", 1, 2], {}, "2: belongs to no flag: the flag before it takes fewer values"),
        ([], {"STALL_TIMEOUT": "0"}, "STALL_TIMEOUT=0: must be a number from 1"),
        ([], {"MODEL_PATH": "m"}, "TRAIN_DATA_FILE is not set: the rows to train m on"),
    ],
)
def test_refused_before_anything_is_started(flags, variables, says, started):
    with pytest.raises(Refused, match=re.escape(says)):
        started(*flags, **variables)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("10.0.0.2：8", "'10.0.0.2：8': has full-width characters; write 10.0.0.2:8"),
        ("10.0.0.2:8，10.0.0.3:8", "write 10.0.0.2:8,10.0.0.3:8"),
        ("${ip1}:8", "a variable in it was not replaced; write its value"),
        ("10.0.0.2:8:8", "each entry is host:slots, e.g. 10.0.0.2:8"),
    ],
)
def test_an_entry_that_looks_odd(entry, says):
    """T13."""
    with pytest.raises(Refused, match=re.escape(says)):
        preflight.read_nodes({"NODE_IP_LIST": f"10.0.0.1:8,{entry}"})


def test_an_ssh_port_where_nothing_listens(monkeypatch):
    monkeypatch.setenv("SSH_PORT", "36000")
    node = Node("10.0.0.2", 8, process=SimpleNamespace(poll=lambda: 255, wait=lambda timeout: 255))
    monkeypatch.setattr(node, "last_words", lambda: "ssh: connect to host 10.0.0.2 port 36000: Connection refused")
    says = "port 36000: Connection refused; is sshd there on port 36000? SSH_PORT sets another; try: ssh -p 36000"
    assert says in preflight.why_no_answer(node)


def test_a_home_directory_is_expanded_wherever_it_comes_from(started, monkeypatch):
    """T11: a shell leaves it as it is in a variable and after `--flag=`."""
    monkeypatch.setenv("HOME", "/h")
    values, _, _ = started("--output_dir=~/out", MODEL_PATH="~/m", TRAIN_DATA_FILE="~/r")
    assert values["model_name_or_path"] == "/h/m" and values["output_dir"] == "/h/out"
    assert values["train_data_file"] == ["/h/r"]


def test_an_old_python_and_missing_packages(monkeypatch, capsys):
    """T14: said before anything is imported."""
    code = str(TRAIN / "sft" / "__init__.py")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("importlib.util.find_spec", lambda name: None if name in ("peft", "torch") else 1)
        runpy.run_path(code)
    assert end.value.code == 2
    assert f"lacks peft torch: {sys.executable} -m pip install -r " in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "version_info", (3, 9, 18))
        runpy.run_path(code)
    assert end.value.code == 2 and "is Python 3.9, and 3.11 or newer is needed" in capsys.readouterr().err


def test_an_adapter_as_the_model_gets_the_recipe_of_adapters(started, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    values, _, _ = started(MODEL_PATH=tmp_path, TRAIN_DATA_FILE="rows.jsonl")
    assert (values["learning_rate"], values["min_lr"]) == (1e-4, 1e-5) and "use_lora" not in values
    assert values["output_dir"].endswith(f"output/{tmp_path.name}-lora")
    (tmp_path / "model.safetensors").touch()  # a merge beside its adapter
    assert started(MODEL_PATH=tmp_path, TRAIN_DATA_FILE="rows.jsonl")[0]["learning_rate"] == 1e-5


def test_help_has_a_line_for_each_flag():
    text = parser.help_text()
    ours, theirs = text.split("Hugging Face's TrainingArguments:")
    names = re.findall(r"^  --(\w+) ", text, re.M)
    assert len(names) == len(set(names)) and {f.name for f in parser.settable()} | set(parser.NO_EFFECT) == set(names)
    assert all(len(line) < 120 for line in ours.splitlines())
    assert ours.index("Model:") < ours.index("Architecture") < ours.index("What is trained:") < ours.index("Data:")
    assert "--packing {none,batch,bin}" in ours and "(default 64)" in ours
    assert "--max_steps " in theirs and "--use_lora" not in theirs


def test_the_recipe_stands_in_train_sh():
    """And every flag of it exists."""
    text = Path(TRAIN / "train.sh").read_text(encoding="utf-8")
    arrays = dict(re.findall(r"^(\w*RECIPE)=\((.*?)\)$", text, re.M | re.S))
    assert set(arrays) == {"RECIPE", "LORA_RECIPE", "EXAMPLE_RECIPE"}
    words = [re.sub(r"#.*", "", value).split() for value in arrays.values()]
    assert parser.parse_flags(words[0])["save_total_limit"] == 2
    assert parser.parse_flags(words[1]) == {"learning_rate": 1e-4, "min_lr": 1e-5}
    assert parser.parse_flags(words[2])["num_experts"] == 4
