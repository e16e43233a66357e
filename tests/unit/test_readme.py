"""The two READMEs say the same, and name what there is."""

import dataclasses
import re

import pytest

from conftest import REPO
from sft.arguments import DataArguments, ModelArguments, TrainingArguments
from sft.parser import NO_EFFECT

TEXTS = {name: (REPO / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md")}
OURS = {f.name for cls in (ModelArguments, DataArguments) for f in dataclasses.fields(cls)} | NO_EFFECT.keys()
ALL = OURS | {f.name for f in dataclasses.fields(TrainingArguments)}
MERGE_AND_CHAT = {"base_model_path", "adapter_model_path", "output_path", "save_dtype", "max_shard_size", "verify"}
MERGE_AND_CHAT |= {"adapter", "prompt", "no_think"}
DATA_PY = {"model", "file", "row", "warnings"}
OTHERS = {"help", "logdir", "nproc_per_node", "no-build-isolation", "nnodes", "node_rank", "master_addr"}
OTHERS |= {"ntasks-per-node", "gpus-per-node", "network", "shm-size"}  # of tensorboard, torchrun, pip, srun, docker
OTHERS |= {"parts", "index-url", "system-site-packages", "no-index", "find-links"}  # of bench_gpu.py, pip and venv


def commands(text):
    """The code blocks, comments left out."""
    blocks = re.findall(r"```(?:sh|json)\n(.*?)```", text, re.S)
    return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]


def test_both_have_the_same_sections_commands_and_table_rows():
    english, chinese = TEXTS.values()
    assert commands(english) == commands(chinese)
    for pattern in (r"^#+ ", r"^\|", r"^- "):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, chinese, re.M)), pattern


@pytest.mark.parametrize("name", TEXTS)
def test_flags_that_are_named_exist_and_ours_are_named(name):
    named = set(re.findall(r"--([a-z][a-z0-9_-]+)", TEXTS[name]))
    assert named - ALL - MERGE_AND_CHAT - DATA_PY - OTHERS == set()
    assert OURS - named == set()
    for file in re.findall(r"\b((?:train|tests)/[\w/]+\.(?:sh|py))", TEXTS[name]):
        assert (REPO / file).is_file(), file
