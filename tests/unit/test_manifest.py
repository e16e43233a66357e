"""The manifest of a checkpoint: what makes one whole, each fault by its word, what a rotation deletes."""

import json
import os
import shutil
import threading
from types import SimpleNamespace

import pytest

from sft.training import manifest
from sft.training.manifest import MANIFEST, RUN, checkpoints_in, find_fault, is_whole, remove, rotate, write_manifest


def arguments(**more):
    values = {"process_index": 0, "local_process_index": 0, "world_size": 1, "should_save": True}
    return SimpleNamespace(**values | {"save_on_each_node": False, "verify_checkpoints": False} | more)


def make(output, step, whole=True, **more):
    """checkpoint-N with a file of each kind; its bytes say the step."""
    path = output / f"checkpoint-{step}"
    (path / f"global_step{step}").mkdir(parents=True)
    for name in (RUN, "trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"):
        (path / name).write_bytes(f"{step} {name} ".encode() * 100)
    for rank in (0, 1):
        (path / f"global_step{step}" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"s" * 100)
    (path / f"global_step{step}" / "mp_rank_00_model_states.pt").write_bytes(b"m" * 100)
    if whole:
        gathered(path, [arguments(process_index=rank, world_size=2, should_save=not rank, **more) for rank in (0, 1)])
    return path


def gathered(path, ranks):
    """write_manifest of each rank, the saving one last, in this process."""
    owns = []

    def gather(own):
        owns.append(own)
        return [*reversed(owns), *[{}] * (len(ranks) - len(owns))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "from_all_ranks", gather)
        for args in reversed(ranks):
            write_manifest(path, args)


def names(output):
    return [path.name for path in checkpoints_in(output)]


def test_a_whole_one(tmp_path):
    path = make(tmp_path, 3)
    content = json.loads((path / MANIFEST).read_text())
    assert {key: content[key] for key in ("step", "world_size", "save_on_each_node")} == {
        "step": 3, "world_size": 2, "save_on_each_node": False
    }  # fmt: skip
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert set(content["files"]) == there - {MANIFEST} and f"{MANIFEST}.tmp" not in there
    assert is_whole(path)
    for world_size in (1, 2, 3):
        assert [find_fault(path, rank, world_size, rank == 0) for rank in range(world_size)] == [None] * world_size


@pytest.mark.parametrize("damage", ["missing", "size", "content"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_file_is_checked_by_one_rank(damage, world_size, tmp_path):
    """After a save by two ranks, whatever the number of ranks that go on."""
    path = make(tmp_path, 3)
    for name in json.loads((path / MANIFEST).read_text())["files"]:
        whole = (path / name).read_bytes()
        if damage == "missing":
            (path / name).unlink()
        else:
            (path / name).write_bytes(whole[:-1] if damage == "size" else bytes([whole[0] ^ 1]) + whole[1:])
        faults = {find_fault(path, rank, world_size, rank == 0) for rank in range(world_size)} - {None}
        assert faults == {(name, damage)}
        assert is_whole(path) == (damage == "content")
        (path / name).write_bytes(whole)


@pytest.mark.parametrize(
    "files",
    [{"../other": 1}, {"/etc/hostname": 1}, {"a/../../b": 1}, {"a\0b": 1}, {"a": None}, [], None],
    ids=str,
)
def test_a_manifest_that_is_damaged_or_leaves_the_directory(files, tmp_path):
    path = make(tmp_path, 3)
    content = json.loads((path / MANIFEST).read_text())
    if isinstance(files, dict):
        files = content["files"] | {name: value and {"size": 0, "xxh3_128": ""} for name, value in files.items()}
    (path / MANIFEST).write_text(json.dumps(content | {"files": files}))
    assert find_fault(path, 0, 1, True) == (MANIFEST, "content") and not is_whole(path)


def test_no_manifest_and_half_of_one(tmp_path):
    path = make(tmp_path, 3)
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text[: len(text) // 2])
    assert find_fault(path, 0, 1, True) == (MANIFEST, "content") and not is_whole(path)
    (path / MANIFEST).unlink()
    assert find_fault(path, 0, 1, True) == (MANIFEST, "missing") and not is_whole(path)


@pytest.mark.parametrize("verify", [False, True])
def test_of_a_large_optimizer_file_a_sample_is_hashed(verify, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(manifest, "SAMPLED_ABOVE", 1000)
    monkeypatch.setattr(manifest, "BLOCK", 4)
    monkeypatch.setattr(manifest, "BLOCKS", 11)
    path = make(tmp_path, 3, verify_checkpoints=verify)
    files = json.loads((path / MANIFEST).read_text())["files"]
    assert {name for name, entry in files.items() if "xxh3_128_sample" in entry} == {"optimizer.pt"}
    assert ("xxh3_128" in files["optimizer.pt"]) == verify
    whole = (path / "optimizer.pt").read_bytes()
    step = (len(whole) - 4) // 10
    for place, seen in ((0, True), (len(whole) - 1, True), (step, True), (step // 2, False)):
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        (path / "optimizer.pt").write_bytes(changed)
        assert (find_fault(path, 0, 1, True) is not None) == seen, place
        assert (find_fault(path, 0, 1, True, verify=True) is not None) == (seen or verify), place
    assert ("only a sample is checked" in capsys.readouterr().out) == (not verify)


def test_each_node_has_a_manifest_of_its_own_files(tmp_path, monkeypatch):
    """Of four ranks on two nodes with disks of their own."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for first in (0, 2):
        path = make(tmp_path / str(first), 3, whole=False)
        for rank in (2, 3) if first else ():
            for kind in ("rng_state_{}.pth", "global_step3/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"):
                (path / kind.format(rank - 2)).rename(path / kind.format(rank))
        nodes = [
            arguments(process_index=r, local_process_index=r - first, world_size=4, should_save=r == first,
                      save_on_each_node=True) for r in (first, first + 1)
        ]  # fmt: skip
        found = []

        def gather(own, first=first, found=found):
            found.append(own)
            return [*[{}] * first, *reversed(found), *[{}] * (4 - first - len(found))]

        monkeypatch.setattr(manifest, "from_all_ranks", gather)
        for args in reversed(nodes):
            write_manifest(path, args)
        there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {MANIFEST}
        assert set(json.loads((path / MANIFEST).read_text())["files"]) == there
        assert [find_fault(path, rank, 4, rank == first) for rank in (first, first + 1)] == [None, None]


def test_a_file_on_another_disk_without_the_flag(tmp_path, monkeypatch):
    path = make(tmp_path, 3, whole=False)
    (path / "rng_state_1.pth").unlink()  # rank 1 has it on its own
    monkeypatch.setattr(manifest, "SEEN_WITHIN", 0.01)
    theirs = {"rng_state_1.pth": {"size": 5, "xxh3_128": "0"}}
    monkeypatch.setattr(manifest, "from_all_ranks", lambda own: [own, theirs])
    with pytest.raises(OSError, match="rng_state_1.pth, which another rank has saved: missing.*--save_on_each_node"):
        write_manifest(path, arguments(world_size=2))
    assert not is_whole(path)
    # a file server that shows it a moment later
    monkeypatch.setattr(manifest, "SEEN_WITHIN", 60)
    monkeypatch.setattr(manifest.time, "sleep", lambda seconds: (path / "rng_state_1.pth").write_bytes(b"00000"))
    write_manifest(path, arguments(world_size=2))
    assert is_whole(path)


def test_training_goes_on_while_a_checkpoint_is_hashed(tmp_path, monkeypatch):
    old, new = make(tmp_path, 3), make(tmp_path, 6, whole=False)
    hashing, go_on = threading.Event(), threading.Event()
    entry_of = manifest.entry_of
    monkeypatch.setattr(manifest, "entry_of", lambda *args: (hashing.set(), go_on.wait(), entry_of(*args))[-1])
    rest = manifest.RestOfSave()
    rest.wait()  # nothing was saved
    rest.begin(new, arguments(), limit=1, best=None)
    assert hashing.wait(60) and old.exists() and not is_whole(new)
    go_on.set()
    rest.wait()
    assert is_whole(new) and not old.exists()
    rest.begin(tmp_path / "checkpoint-9", arguments(), limit=1, best=None)  # gone meanwhile
    with pytest.raises(FileNotFoundError):
        rest.wait()
    assert is_whole(new)


# -------------------------------------------------------------------------------------------------------- rotation


def test_the_newest_by_number_are_kept(tmp_path):
    """Whatever the files' times are; a torn one that is newer is not touched."""
    for place, step in enumerate((100, 20, 9, 1000)):
        os.utime(make(tmp_path, step), (1000 + place, 1000 - place))
    make(tmp_path, 2000, whole=False)
    rotate(tmp_path, 2, None)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-1000", "checkpoint-2000"]
    rotate(tmp_path, None, None)
    rotate(tmp_path, 0, None)
    assert len(names(tmp_path)) == 3
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-1000", "checkpoint-2000"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(1, 2, [2, 5]), (2, 2, [2, 5]), (3, 2, [2, 4, 5]), (2, 5, [4, 5]), (9, 1, [1, 2, 3, 4, 5])],
)
def test_the_best_is_kept_as_one_of_them(limit, best, left, tmp_path):
    for step in (1, 2, 3, 4, 5):
        make(tmp_path, step)
    rotate(tmp_path, limit, str(tmp_path / f"checkpoint-{best}"))
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_of_the_torn_ones_only_our_older_ones_are_deleted(tmp_path):
    torn = make(tmp_path, 1, whole=False)
    empty = tmp_path / "checkpoint-2"
    empty.mkdir()
    foreign = make(tmp_path, 3, whole=False)
    (foreign / RUN).unlink()
    cut = make(tmp_path, 4)
    (cut / "optimizer.pt").write_bytes(b"")
    make(tmp_path, 5)
    make(tmp_path, 6, whole=False)
    assert torn.exists()
    rotate(tmp_path, 2, None)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (3, 4, 5, 6)], "4 was changed: it is the user's"


def test_none_is_deleted_where_none_is_whole(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step, whole=False)
    rotate(tmp_path, 1, None)
    assert len(names(tmp_path)) == 3


def test_no_symlink_is_followed(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", 1)
    output = tmp_path / "out"
    inner = make(output, 2)
    (inner / "link").symlink_to(elsewhere)
    (output / "checkpoint-1").symlink_to(elsewhere)
    make(output, 3)
    rotate(output, 1, None)
    assert names(output) == ["checkpoint-3"] and is_whole(elsewhere)


def test_a_kill_in_mid_deletion_leaves_a_torn_one_of_ours(tmp_path, monkeypatch):
    """Whichever file shutil comes to last."""
    path = make(tmp_path, 1)
    make(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)
    remove(path)
    assert path.is_dir() and not is_whole(path) and (path / RUN).exists()
    monkeypatch.undo()
    rotate(tmp_path, 9, None)
    assert names(tmp_path) == ["checkpoint-2"]
