"""Checkpoints of real runs: each gets a manifest, and every damage to every file is found by its name."""

import json
import shutil

import pytest

from sft.training.manifest import MANIFEST, checkpoints_in, find_fault, is_whole

ZERO2, ZERO3 = (["--deepspeed", f"ds_zero{stage}_no_offload.json"] for stage in (2, 3))
KINDS = {
    "one": ([], 1),
    "save_only_model": (["--save_only_model"], 1),
    "lora": (["--use_lora"], 1),
    "ddp": ([], 2),
    "zero2": (ZERO2, 2),
    "zero2_each_node": ([*ZERO2, "--save_on_each_node"], 2),
    "zero2_lora": ([*ZERO2, "--use_lora"], 2),
    "zero3": (ZERO3, 2),
    "zero3_bf16": ([*ZERO3, "--bf16"], 2),
}
ALWAYS = ("one", "zero3")  # the others with the campaign


def faults(checkpoint, ranks):
    """What all ranks find together."""
    return {find_fault(checkpoint, rank, ranks, checks_others=rank == 0) for rank in range(ranks)} - {None}


def damages(checkpoint, other, name):
    """(the word, the file's damaged bytes; None for a file that is gone) of each way to damage it."""
    whole = (checkpoint / name).read_bytes()
    yield "missing", None
    if whole:
        yield "size", whole[: len(whole) // 2]
        place = len(whole) * 2 // 3
        yield "content", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    theirs = other / name.replace(f"global_step{checkpoint.name[-1]}", f"global_step{other.name[-1]}")
    if theirs.is_file() and theirs.read_bytes() != whole:
        found = "content" if theirs.stat().st_size == len(whole) else "size"
        yield found, theirs.read_bytes()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=[pytest.mark.needs_gxx] * ("zero" in kind) + [pytest.mark.campaign] * (kind not in ALWAYS),
        )
        for kind in KINDS
    ],
)
def test_each_damage_to_each_file_is_named(kind, model_dir, example_tokenizer_dir, example_rows, run_train, tmp_path):
    more, ranks = KINDS[kind]
    flags = ["--model_name_or_path", model_dir("moe", example_tokenizer_dir), "--train_data_file", example_rows]
    flags += ["--max_steps", 6, "--save_steps", 2, "--save_total_limit", 2, "--per_device_train_batch_size", 2, *more]
    out = tmp_path / "out"
    run = run_train([*flags, "--output_dir", out], launcher="python" if ranks == 1 else "torchrun", nproc=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-4", "checkpoint-6"]
    other, checkpoint = checkpoints_in(out)
    assert is_whole(other) and is_whole(checkpoint) and not faults(checkpoint, ranks) and not faults(other, ranks)
    content = json.loads((checkpoint / MANIFEST).read_text())
    assert (content["step"], content["world_size"]) == (6, ranks)
    there = {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file()}
    assert set(content["files"]) == there - {MANIFEST}

    number, silent = 0, []
    for name in content["files"]:
        kept = shutil.copyfile(checkpoint / name, tmp_path / "kept")
        for word, bytes_now in damages(checkpoint, other, name):
            (checkpoint / name).unlink()
            if bytes_now is not None:
                (checkpoint / name).write_bytes(bytes_now)
            number += 1
            for world_size in {ranks, 1, 3}:
                if faults(checkpoint, world_size) != {(name, word)}:
                    silent.append((name, word, world_size))
            shutil.copyfile(kept, checkpoint / name)
    print(f"{kind}: {len(there)} files, {number} damages, {len(silent)} not found")
    assert not silent and not faults(checkpoint, ranks)
