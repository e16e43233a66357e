"""What is read from the command line and from files, and what is refused."""

import inspect
import json
import os

import pytest
import transformers

from sft.arguments import TrainingArguments
from sft.messages import Refused
from sft.training import environment
from sft.training.plan import parse_arguments

BASE = ["--output_dir", "out", "--use_cpu"]


def test_old_flags_do_what_they_did(capsys):
    _, _, args = parse_arguments(
        [*BASE, "--warmup_ratio", "0.1", "--group_by_length", "--gradient_checkpointing", "--overwrite_output_dir"]
    )
    assert args.warmup_steps == 0.1
    assert args.train_sampling_strategy == "group_by_length"
    assert args.activation_checkpointing is True
    assert args.overwrite_output_dir is True


def test_warmup_steps_wins_over_ratio(capsys):
    _, _, args = parse_arguments([*BASE, "--warmup_ratio", "0.1", "--warmup_steps", "7"])
    assert args.warmup_steps == 7
    assert "--warmup_ratio has no effect" in capsys.readouterr().out


def test_min_lr_reaches_the_cosine_schedule():
    _, _, args = parse_arguments(
        [*BASE, "--lr_scheduler_type", "cosine_with_min_lr", "--min_lr", "1e-6", "--learning_rate", "1e-5"]
    )
    assert args.lr_scheduler_kwargs == {"min_lr_rate": pytest.approx(0.1)}


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_min_lr_reaches_the_schedules_that_follow_the_loss(schedule):
    flags = ["--lr_scheduler_type", schedule, "--eval_split", "0.1", "--min_lr", "1e-6"]
    highest = {"max_lr": 5e-5} if schedule == "greedy" else {}
    assert parse_arguments([*BASE, *flags])[2].lr_scheduler_kwargs == {"min_lr": 1e-6} | highest
    own = parse_arguments([*BASE, *flags, "--lr_scheduler_kwargs", '{"min_lr": 1e-7}'])[2]
    assert own.lr_scheduler_kwargs == {"min_lr": 1e-7} | highest


def test_optional_switches_need_no_value():
    model, _, _ = parse_arguments([*BASE, "--use_qk_norm", "--use_mixed_mlp_moe", "--trust_remote_code", "false"])
    assert (model.use_qk_norm, model.use_mixed_mlp_moe, model.trust_remote_code) == (True, True, False)


def test_a_config_file_reads_like_flags(tmp_path):
    """1e-5 without a dot is a text in yaml: it must still arrive as a number."""
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nuse_cpu: true\nlearning_rate: 1e-5\nuse_lora: true\nlora_rank: 8\n")
    model, _, args = parse_arguments([str(file), "--lora_rank", "4"])
    assert (args.learning_rate, model.use_lora, model.lora_rank) == (1e-5, True, 4)
    (tmp_path / "run.json").write_text(json.dumps({"output_dir": "out", "use_cpu": True, "max_steps": 3}))
    assert parse_arguments([str(tmp_path / "run.json")])[2].max_steps == 3


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("save_strategy: no", "no"),
        ("report_to: [tensorboard, tensorboard]", ["tensorboard", "tensorboard"]),
        ("report_to: none", []),
        ("include_num_input_tokens_seen: all", "all"),
        ("include_num_input_tokens_seen: true", "all"),
        ("lr_scheduler_kwargs: {power: 1e-1}", {"power": 0.1}),
        ("run_name: 007", "007"),
        ("ddp_timeout: 1_000", 1000),
        ("disable_tqdm: on", True),
        ("learning_rate: [1e-4]", 1e-4),
    ],
)
def test_values_of_a_yaml_file(line, value, tmp_path):
    """T7: as Hugging Face documents them."""
    (tmp_path / "run.yaml").write_text(f"output_dir: out\nuse_cpu: true\nlr_scheduler_type: polynomial\n{line}\n")
    assert getattr(parse_arguments([str(tmp_path / "run.yaml")])[2], line.split(":")[0]) == value


def test_bf16_needs_no_use_cpu_on_a_cpu():
    _, _, args = parse_arguments(["--output_dir", "out", "--bf16"])
    assert args.bf16 and args.device.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*BASE, "--max_setps", "3"], "unknown argument --max_setps: did you mean --max_steps?"),
        ([*BASE, "--learning_rate", "abc"], "--learning_rate/--learning-rate: invalid float value: 'abc'"),
        ([*BASE, "--lr_scheduler_type", "zigzag"], "--lr_scheduler_type"),
        ([*BASE, "--packing", "tight"], "--packing: invalid choice: 'tight'"),
        ([*BASE, "--use_lora", "maybe"], "--use_lora"),
        ([*BASE, "--lora_rank", "0"], "--lora_rank 0: must be at least 1"),
        ([*BASE, "--lora_dropout", "1.5"], "--lora_dropout 1.5"),
        ([*BASE, "--max_seq_length", "1"], "--max_seq_length 1: must be at least 2"),
        ([*BASE, "--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0"),
        ([*BASE, "--learning_rate", "-1"], "--learning_rate -1.0"),
        ([*BASE, "--min_lr", "1"], "--min_lr 1 is above --learning_rate"),
        ([*BASE, "--warmup_ratio", "2"], "--warmup_ratio 2.0"),
        ([*BASE, "--deepspeed", "nowhere.json"], "--deepspeed nowhere.json: no such file"),
        ([*BASE, "--early_stopping_patience", "2"], "--early_stopping_patience: there are no rows to evaluate on"),
        (
            [*BASE, "--early_stopping_patience", "2", "--eval_split", "0.1", "--eval_strategy", "no"],
            "--early_stopping_patience: nothing is evaluated with --eval_strategy no",
        ),
        ([*BASE, "--max_steps", "0"], "--max_steps 0: must be at least 1, or -1"),
        ([*BASE, "--num_train_epochs", "0"], "--num_train_epochs 0.0: must be above 0"),
        ([*BASE, "--save_steps", "-5"], "--save_steps -5.0: must be above 0"),
        ([*BASE, "--learning_rate", "inf"], "--learning_rate inf: must be at least 0"),
        ([*BASE, "--seed", "4294967296"], "--seed 4294967296: must be below 2^32"),
        ([*BASE, "--lr_scheduler_type", "greedy"], "--lr_scheduler_type: there are no rows to evaluate on"),
        ([*BASE, "--do_eval"], "--do_eval: there are no rows to evaluate on"),
        ([*BASE, "--eval_on_start"], "--eval_on_start: there are no rows to evaluate on"),
        (
            [*BASE, "--packing", "bin", "--train_sampling_strategy", "group_by_length"],
            "--train_sampling_strategy with --packing bin",
        ),
        (["--use_cpu"], "--output_dir is not given"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_refused_with_the_flag_and_what_was_found(argv, says):
    with pytest.raises(Refused) as refusal:
        parse_arguments(argv)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_deepspeed_file_that_does_not_parse(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": ')
    with pytest.raises(Refused, match="ds.json: not a readable json object"):
        parse_arguments([*BASE, "--deepspeed", str(file)])


@pytest.mark.parametrize("text", ["- a\n- b\n", "learning_rate: [", "\0"])
def test_a_config_file_that_is_none(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(Refused, match="run.yaml"):
        parse_arguments([str(file)])


@pytest.fixture
def launched(monkeypatch):
    """`launched(**variables)`: what a launcher sets, and nothing else of a job."""

    def set_variables(**variables):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        for name in (*names, "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            monkeypatch.setenv(name, "")  # put back at the end
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


@pytest.mark.parametrize(("rank", "local", "expected"), [(9, 1, "8"), (17, 1, "4"), (0, 0, "8")])
def test_ranks_of_a_node_under_srun(rank, local, expected, launched, monkeypatch):
    """Of nodes with 8, 8 and 4 ranks."""
    launched(SLURM_STEP_NUM_TASKS=20, SLURM_PROCID=rank, SLURM_LOCALID=local, MASTER_ADDR="first")
    monkeypatch.setattr(environment, "from_all_ranks", lambda first: 8 * [0] + 8 * [8] + 4 * [16])
    environment.set_rendezvous_variables(deepspeed=False)
    environment.complete_variables()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == (str(rank), "20")
    assert os.environ["LOCAL_WORLD_SIZE"] == expected


@pytest.mark.parametrize(
    ("given", "gloo"),
    [
        ({"NCCL_SOCKET_IFNAME": "eth0"}, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "eth0,lo"}, "eth0,lo"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, None),  # NCCL takes it for the beginning of a name
        ({"NCCL_SOCKET_IFNAME": "^docker0"}, None),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, None),
        ({"NCCL_SOCKET_IFNAME": ""}, None),
        ({"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "lo"}, "lo"),
        ({}, None),
    ],
)
def test_gloo_takes_the_interface_that_is_named_for_nccl(given, gloo, launched, monkeypatch):
    monkeypatch.setattr(environment.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "docker0")])
    launched(**given)
    environment.complete_variables()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == gloo


def test_activation_offload_is_said_to_transformers():
    """What it does there needs a GPU."""
    flags = {"gradient_checkpointing": True, "activation_offload": True, "use_cpu": True, "eval_strategy": "no"}
    for given in ('{"use_reentrant": true}', {"use_reentrant": True}):
        args = TrainingArguments(**flags, gradient_checkpointing_kwargs=given)
        assert args.activation_checkpointing_kwargs == {"use_reentrant": True, "offload": True}
    assert TrainingArguments(**flags).activation_checkpointing_kwargs == {"offload": True}


def test_transformers_still_starts_gloo_without_the_timeout():
    """When this fails, environment.init_gloo can go."""
    source = inspect.getsource(transformers.TrainingArguments._setup_devices.func)
    cpu, _, others = source.partition('accelerator_state_kwargs["cpu"] = True')[2].partition("elif")
    assert "timeout" not in cpu and "timeout" in others


def test_transformers_and_deepspeed_still_save_on_global_rank_0_alone():
    """When this fails, save.write_on_this_rank or save.write_deepspeed_latest can go."""
    deepspeed = pytest.importorskip("deepspeed")
    saves = inspect.getsource(transformers.PreTrainedModel.should_save_on_this_rank)
    assert "_get_torch_distributed_rank() == 0" in saves
    latest = inspect.getsource(deepspeed.DeepSpeedEngine.save_checkpoint)
    assert "if save_latest and self.global_rank == 0" in latest
