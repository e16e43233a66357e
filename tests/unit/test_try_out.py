"""What would fail once the model is loaded is refused before, with the flag."""

import json

import pytest

from sft.messages import Refused
from sft.training import deepspeed_file, rates, try_out
from sft.training.plan import parse_arguments

BASE = ["--output_dir", "out", "--use_cpu"]
SCHEDULE = (
    "--lr_scheduler_kwargs takes: decay_type min_lr_ratio num_cycles num_decay_steps num_stable_steps warmup_type"
)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--optim", "galore_adamw"], "--optim galore_adamw: You need to install `galore_torch`"),
        (["--optim", "adamw_torch_npu_fused"], "pip install torch_npu"),
        (["--optim", "sgd", "--optim_args", "garbage"], "garbage: must be key=value,key=value"),
        (["--optim", "sgd", "--optim_args", "momentum=x"], "--optim sgd --optim_args momentum=x: could not convert"),
        (["--optim", "sgd", "--optim_args", "foo=1"], "--optim_args foo: has no effect with --optim sgd"),
        (["--optim_args", "weight_decay=0.1"], "--optim_args weight_decay: has no effect"),
        (["--optim_target_modules", "all-linear"], "--optim_target_modules: has no effect with --optim adamw"),
        (["--adam_beta1", "1.5"], "Invalid beta parameter at index 0: 1.5"),
        (["--lr_scheduler_type", "warmup_stable_decay"], SCHEDULE),
        (["--lr_scheduler_kwargs", '{"foo": 1}'], "got an unexpected keyword argument 'foo'"),
        (["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", '{"foo": 1}'], "this schedule takes none"),
        (["--lr_scheduler_kwargs", "{foo"], "--lr_scheduler_kwargs {foo: not a JSON object"),
        (["--dataloader_persistent_workers"], "Give --dataloader_num_workers above 0"),
        (["--torch_compile_mode", "zigzag"], "--torch_compile_mode zigzag: Unrecognized mode=zigzag"),
        (
            ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"foo": 1}'],
            "got an unexpected keyword argument 'foo'",
        ),
        (["--activation_offload"], "--activation_offload: has no effect without --gradient_checkpointing"),
        (["--activation_offload", "--gradient_checkpointing"], "--activation_offload: without a GPU"),
        (["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"offload": true}'], "without a GPU"),
        (["--use_liger_kernel"], "--use_liger_kernel: its kernels need a GPU"),
        (["--fsdp_config", '{"xla": true}'], "--fsdp_config: has no effect without --fsdp"),
        (["--liger_kernel_config", '{"rope": true}'], "--liger_kernel_config: has no effect without --use_liger"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "no effect without --gradient_checkpointing"),
        (["--fsdp", "full_shard"], "--fsdp: needs several processes with a GPU each"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_with_the_flag(flags, says):
    with pytest.raises(Refused) as refusal:
        parse_arguments([*BASE, *flags])
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optim", "sgd", "--optim_args", "momentum=0.9, nesterov=true"],
        ["--optim", "rmsprop", "--optim_args", "alpha=0.5,centered=false"],
        ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 2}'],
        ["--lr_scheduler_type", "polynomial", "--min_lr", "1e-6"],
        ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
        ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'],
        ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "--dataloader_prefetch_factor", "2"],
    ],
    ids=" ".join,
)
def test_what_works_passes(flags):
    parse_arguments([*BASE, *flags])


@pytest.mark.parametrize("what", ["even_batches", "split_batches", "dispatch_batches"])
def test_batches_that_would_hang_several_ranks(what, monkeypatch):
    """T9."""
    value = str(what != "even_batches").lower()
    args = parse_arguments([*BASE, "--accelerator_config", f'{{"{what}": {value}}}'])[2]
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(Refused, match=f"--accelerator_config: .*{what}"):
        try_out.try_devices(args)


def test_a_hub_that_is_not_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda *_, **__: 1 / 0)
    with pytest.raises(Refused, match="--push_to_hub: division by zero. Log in with"):
        parse_arguments([*BASE, "--push_to_hub"])


def test_a_warmup_that_does_not_do_what_it_should_is_said(capsys):
    flags = ["--warmup_steps", "5", "--lr_scheduler_type"]
    rates.report_warmup(parse_arguments([*BASE, *flags, "linear"])[2], 4)
    rates.report_warmup(parse_arguments([*BASE, *flags, "constant"])[2], 100)
    rates.report_warmup(parse_arguments([*BASE, *flags, "linear"])[2], 100)
    said = [line for line in capsys.readouterr().out.splitlines() if "warmup" in line]
    assert said == [
        "warmup: 5 steps of 4: the run ends before it reaches --learning_rate",
        "warmup has no effect with --lr_scheduler_type constant",
    ]


def test_variables_of_accelerate_do_not_win_over_flags(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert parse_arguments([*BASE, "--fp16"])[2].mixed_precision == "fp16"
    out = capsys.readouterr().out
    assert "ACCELERATE_MIXED_PRECISION has no effect" in out and "USE_FSDP" not in out
    assert "--fp16: a CPU computes in fp32" in out


# ------------------------------------------------------------------------------------------------- the DeepSpeed file


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """`checked(file, given={}, **zero)`: the configuration after all checks, and what was said. DeepSpeed is not
    started."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def check(given=None, use_lora=False, stage=2, top=None, **zero):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage} | zero} | (top or {})))
        config = deepspeed_file.read_deepspeed_file(str(path))
        deepspeed_file.check_deepspeed(config, given or {}, use_lora)
        return config, capsys.readouterr().out

    return check


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ({"stage": 4}, "zero_optimization.stage: expected 0, 1, 2 or 3, found 4"),
        ({"stage": "3"}, 'zero_optimization.stage: expected 0, 1, 2 or 3, found "3"'),
        ({"overlap_com": True}, "zero_optimization.overlap_com: unknown key: did you mean overlap_comm?"),
        ({"stage3_max_live_paramters": 1}, "unknown key: did you mean stage3_max_live_parameters?"),
        ({"reduce_bucket_size": "big"}, "zero_optimization.reduce_bucket_size: expected a valid integer"),
        ({"offload_optimizer": "cpu"}, 'offload_optimizer: expected an object, e.g. {"device": "cpu"}, found "cpu"'),
        ({"offload_optimizer": {"device": "gpu"}}, "offload_optimizer.device: expected 'none', 'cpu' or 'nvme'"),
        ({"offload_optimizer": {"devise": "cpu"}}, "offload_optimizer.devise: unknown key: did you mean device?"),
        ({"top": {"gradient_cliping": 1}}, "gradient_cliping: unknown key: did you mean gradient_clipping?"),
        ({"leaf_module": {"clazzes": []}}, "leaf_module.clazzes: unknown key: did you mean classes?"),
        ({"compile": {}}, "zero_optimization.compile: unknown key"),
        ({"top": {"compile": {"foo": 1}}}, "CompileConfig.foo: unknown key"),
        ({"top": {"fp16": []}}, "fp16: expected an object, found []"),
        ({"top": {"zero_optimization": None}}, "zero_optimization is missing"),
        ({"top": {"bf16": {"foo": 1}}}, "bf16.foo: unknown key"),
        ({"top": {"fp16": {"min_loss_scale": "x"}}}, 'fp16.min_loss_scale: must be an integer, found "x"'),
        ({"top": {"tensor_parallel": {}}}, "tensor_parallel: not supported here"),
        ({"top": {"amp": {"enabled": True}}}, "Apex AMP integration has been removed"),
        ({"top": {"optimizer": {"type": "Zigzag"}}}, "optimizer.type: expected one of"),
        ({"top": {"scheduler": {}}}, "scheduler.type: expected one of"),
        (
            {"top": {"scheduler": {"type": "WarmupLR"}}, "given": {"min_lr": 1, "lr_scheduler_type": "cosine"}},
            "its section `scheduler` and --lr_scheduler_type --min_lr: one would be ignored",
        ),
        (
            {"top": {"optimizer": {"type": "AdamW"}}, "given": {"optim": "sgd"}},
            "its section `optimizer` and --optim: one would be ignored",
        ),
    ],
    ids=str,
)
def test_a_deepspeed_file_that_is_wrong(file, says, checked):
    pytest.importorskip("deepspeed")
    with pytest.raises(Refused) as refusal:
        checked(**file)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_published_files_work_as_they_stand(checked):
    """What today's DeepSpeed would not take is put right, and said."""
    pytest.importorskip("deepspeed")
    old = {"stage3_max_reuse_distance": "auto", "cpu_offload": True, deepspeed_file.GATHER: False}
    config, said = checked(stage=3, top={"fp16": {"enabled": "auto", "min_loss_scale": 1e-10}}, **old)
    zero = config["zero_optimization"]
    assert config["fp16"]["min_loss_scale"] == 1 and zero["stage3_max_reuse_distance"] == 10**9
    assert zero[deepspeed_file.GATHER] is True and zero["offload_optimizer"] == {"device": "cpu"}
    assert len(said.splitlines()) == 4, said
    config, said = checked(stage=3, use_lora=True, offload_optimizer=None)
    assert "offload_optimizer" not in config["zero_optimization"]
    assert deepspeed_file.GATHER not in config["zero_optimization"] and not said
    ours = deepspeed_file.read_deepspeed_file("ds_zero3_offload.json")
    assert deepspeed_file.read_deepspeed_file("/x/ds_zero3_offload_no_auto.json") == ours
    assert deepspeed_file.read_deepspeed_file(json.dumps(ours)) == ours


def test_each_key_of_deepspeeds_is_known_and_none_is_known_twice():
    """A release of DeepSpeed that reads another key fails here."""
    config = pytest.importorskip("deepspeed.runtime.config")
    seen = set()

    class Reading(dict):
        def get(self, key, default=None):
            seen.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            seen.add(key)
            return super().__contains__(key)

        def __copy__(self):
            return self

    config.DeepSpeedConfig(Reading(train_micro_batch_size_per_gpu=1))
    lists = [*deepspeed_file.OBJECTS, *deepspeed_file.VALUES, *deepspeed_file.REMOVED, *deepspeed_file.NOT_HERE]
    assert len(seen) > 40 and seen <= {*lists} and len(lists) == len({*lists})


@pytest.mark.parametrize(("optim", "runs"), [("adamw_torch", True), ("sgd", False), ("adagrad", False)])
def test_under_offload_only_what_runs_there(optim, runs, monkeypatch):
    """T1."""
    pytest.importorskip("deepspeed")
    args = parse_arguments([*BASE, "--optim", optim])[2]
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    args.hf_deepspeed_config = type("Config", (), {"config": offload})
    optimizer = try_out.try_optimizer(args)
    if runs:
        return try_out.check_offload(args, optimizer)
    with pytest.raises(Refused, match=f"--optim {optim}: under offload_optimizer DeepSpeed runs AdamW"):
        try_out.check_offload(args, optimizer)
