"""What one checkpoint takes, how many come, and what the system says in the exceptions of each library."""

import errno
import resource
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sft.messages import Refused, in_units
from sft.training import disk
from sft.training.disk import TORCH_FAILED, Reporter, check_space, checkpoint_bytes, error_number, number_to_write


def arguments(stage=None, **more):
    config = SimpleNamespace(get_value=lambda name, default: stage)
    values = {
        "deepspeed": None if stage is None else {"zero_optimization": {}},
        "hf_deepspeed_config": config,
        "save_only_model": False,
    }
    values |= {"optim": "adamw_torch_fused", "save_on_each_node": False, "world_size": 2, "bf16": False, "fp16": False}
    values |= {"process_index": 0, "local_process_index": 0, "should_save": True, "resume_from_checkpoint": None}
    values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 100, "save_steps": 10}
    values |= {"save_strategy": "steps", "save_total_limit": None, "num_train_epochs": 3.0, "output_dir": "/tmp"}
    return SimpleNamespace(**values | more)


MODEL = torch.nn.Linear(1000, 1000, bias=False)  # a million
FROZEN = torch.nn.Sequential(torch.nn.Linear(1000, 900, bias=False), torch.nn.Linear(1000, 100, bias=False))
FROZEN[0].requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "args", "megabytes"),
    [
        (MODEL, {}, 4 + 8),
        (MODEL, {"bf16": True}, 4 + 8),
        (MODEL, {"save_only_model": True}, 4),
        (MODEL, {"optim": "adafactor"}, 4),
        (MODEL, {"optim": "adamw_8bit"}, 4 + 2),
        (FROZEN, {}, 4 + 0.8),
        (MODEL, {"stage": 2}, 4 + 12 + 4),
        (MODEL, {"stage": 2, "bf16": True}, 2 + 12 + 2),
        (MODEL, {"stage": 3, "bf16": True}, 2 + 12),
        (MODEL, {"stage": 3, "bf16": True, "save_only_model": True}, 2),
        (FROZEN, {"stage": 3}, 4 + 1.2),
    ],
    ids=str,
)
def test_bytes_of_a_checkpoint(model, args, megabytes):
    assert checkpoint_bytes(model, arguments(**args)) == pytest.approx(megabytes * 1e6)


@pytest.mark.parametrize(
    ("args", "number"),
    [({}, 10), ({"save_total_limit": 2}, 3), ({"save_total_limit": 20}, 10), ({"max_steps": -1}, 30),
     ({"save_steps": 0.5}, 2), ({"save_strategy": "epoch", "max_steps": -1}, 3), ({"save_steps": 500}, 1)],
    ids=str,
)  # fmt: skip
def test_checkpoints_to_come(args, number):
    assert number_to_write(arguments(**args), num_examples=400) == number


@pytest.mark.parametrize(("free", "says"), [(11e6, "refused"), (13e6, "warning"), (200e6, "")])
def test_space(free, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    args = arguments(output_dir=str(tmp_path / "not" / "there"), save_total_limit=2)
    if says == "refused":
        with pytest.raises(Refused, match=r"a checkpoint takes 12 MB, and 11 MB are free"):
            check_space(MODEL, args, 400)
    else:
        check_space(MODEL, args, 400)
    printed = capsys.readouterr().out
    assert ("3 checkpoints of 12 MB take 36 MB, and 13 MB are free" in printed) == (says == "warning")
    check_space(MODEL, arguments(output_dir=args.output_dir, save_strategy="no"), 400)


def raised(call, *args):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(*args)
    return caught.value


def test_what_the_system_said(tmp_path):
    tensors = {"a": torch.zeros(100_000)}
    gone = tmp_path / "gone" / "file"
    assert error_number(raised(save_file, tensors, gone)) == errno.ENOENT
    assert error_number(raised(gone.write_text, "")) == errno.ENOENT
    assert error_number(raised(torch.save, tensors, gone)) == TORCH_FAILED
    assert error_number(raised(torch.save, tensors, "/dev/full")) == TORCH_FAILED
    chained = RuntimeError("unexpected pos 64 vs 0")
    chained.__context__ = OSError(errno.EROFS, "Read-only file system")
    assert error_number(chained) == errno.EROFS
    for other in (ValueError("no"), RuntimeError("CUDA out of memory"), torch.distributed.DistBackendError("NCCL")):
        assert error_number(other) is None


def test_torch_save_wherever_the_disk_fills(tmp_path):
    """In its header, between two records, and at the last flush, for which it has another text."""
    limits, texts = resource.getrlimit(resource.RLIMIT_FSIZE), set()
    try:
        for size in range(0, 40_000, 200):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                torch.save([torch.zeros(1000) for _ in range(9)], tmp_path / "file")
            except RuntimeError as error:
                texts.add(str(error).split(":")[0])
                assert error_number(error) == TORCH_FAILED, error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(texts) == 2


def test_a_reporter_that_fails_is_left_out(capsys):
    calls = []

    class Curves:
        tb_writer = "theirs"

        def on_train_begin(self, args, state, control, **kwargs):
            raise ValueError("no API key")

        def on_log(self, args, state, control, **kwargs):
            calls.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")

    reporter = Reporter(Curves())
    with pytest.raises(ValueError, match="no API key"):  # not set up: said before the first step
        reporter.on_train_begin(None, None, None)
    assert reporter.on_log(None, None, None, logs={}) is None and reporter.on_log(None, None, None) is None
    assert calls == [1] and reporter.tb_writer == "theirs"
    assert capsys.readouterr().out.count("warning: Curves has failed and reports no more: [Errno 28]") == 1


def test_units():
    sizes = (0, 999, 1500, 2_000_000, 7.04e10, 3e15)
    assert [in_units(size) for size in sizes] == ["0 bytes", "999 bytes", "1.5 kB", "2 MB", "70.4 GB", "3e+03 TB"]
