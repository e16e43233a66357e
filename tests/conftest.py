"""Fixtures of all tests, and what decides which of them run.

The helpers are plain functions (runs.py, tiny.py) and fixtures of the same name: a test asks for `run_train`, a script
imports it.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from runs import launch_command, losses, run_command, run_here, run_script, run_train
from tiny import EXAMPLE_TOKENIZER, REPO, SHARED, TESTS, make_format_tokenizer, make_hy_tokenizer, make_model_dir

__all__ = ["REPO", "TESTS", "TRAIN", "launch_command", "run_command", "run_here", "run_script"]  # for tests to import
TRAIN = REPO / "train"

MARKERS = {
    "campaign": "long tables, deselected by default: pytest -m campaign",
    "needs_gxx": "compiles a DeepSpeed extension: needs g++ and ninja",
    "needs_gpu": "needs an NVIDIA GPU that torch can use",
    "needs_hosts": "several hosts on this machine: needs root, network namespaces, sshd and ip",
}


# ------------------------------------------------------------------------------------------------------------- markers


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    sys.addaudithook(refuse_processes)
    if "PYTEST_XDIST_WORKER" in os.environ:  # a core each
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "HYTEST_CACHE" not in os.environ:  # tokenized rows of tests are kept for this run of pytest only
        folder = tempfile.mkdtemp(prefix="rows-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["HYTEST_CACHE"] = os.environ["HF_DATASETS_CACHE"] = folder
    # as in the background of a shell; processes would inherit it
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers; none where something is to be seen (`pytest -s`), which they would swallow."""
    return 0 if config.option.capture == "no" else 2


STARTS_A_PROCESS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
running: list[pytest.Item] = []  # the unit test that runs now


def refuse_processes(event: str, args: tuple) -> None:
    """An audit hook: a unit test starts no process."""
    if event in STARTS_A_PROCESS and running:
        raise RuntimeError(f"{running[0].nodeid} starts a process ({event}): it belongs into tests/integration")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    if item.path.parent == TESTS / "unit":
        running.append(item)
    try:
        return (yield)
    finally:
        running.clear()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips by name, with what to install."""
    if item.get_closest_marker("needs_gxx"):
        missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
        if missing:
            pytest.skip(f"no {' and no '.join(missing)}: install g++ and ninja (apt install g++ ninja-build)")
    if item.get_closest_marker("needs_gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU that torch can use: run on a machine with an NVIDIA GPU and its driver")
    if item.get_closest_marker("needs_hosts"):
        from hosts import why_not

        if reason := why_not():
            pytest.skip(reason)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory):
    """Two hosts (hosts.py) that trust each other; with the marker needs_hosts."""
    from hosts import Hosts

    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    yield hosts
    hosts.close()


# ------------------------------------------------------------------------------------------- real input and tokenizers


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real rows (`data/car_train.jsonl`) and the real vocabulary (`data/hy.tiktoken`)."""
    if not (SHARED / "data" / "hy.tiktoken").is_file():
        pytest.skip("no ../shared: put the folder (data/hy.tiktoken, data/car_train.jsonl) beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def hy_tokenizer_dir(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of `assets/hy_tokenizer` with the real vocabulary. Do not write into it."""
    return make_hy_tokenizer(tmp_path_factory.mktemp("tokenizer") / "hy_tokenizer")


@pytest.fixture(scope="session")
def example_tokenizer_dir() -> Path:
    """The embedded example's own tokenizer: one token a character, the same chat format, no code of its own."""
    return EXAMPLE_TOKENIZER


@pytest.fixture(scope="session")
def example_rows() -> Path:
    """The embedded example's rows."""
    return TRAIN / "example" / "rows.jsonl"


@pytest.fixture(scope="session")
def train_and_eval_rows(example_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(training rows, 13 rows to evaluate on): not a multiple of any batch."""
    folder = tmp_path_factory.mktemp("rows")
    lines = example_rows.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:100]), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(lines[100:113]), encoding="utf-8")
    return folder / "train.jsonl", folder / "eval.jsonl"


@pytest.fixture(scope="session")
def format_tokenizer(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """`format_tokenizer(name)`: the tokenizer of a format of FORMATS, or A13B's: `hy` (real vocabulary), `example`."""
    from transformers import AutoTokenizer

    made: dict[str, object] = {}

    def get(name: str):
        if name not in made:
            if name == "hy":
                folder = request.getfixturevalue("hy_tokenizer_dir")
            elif name == "example":
                folder = EXAMPLE_TOKENIZER
            else:
                folder = make_format_tokenizer(name, tmp_path_factory.mktemp("formats") / name)
            made[name] = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        return made[name]

    return get


# --------------------------------------------------------------------------------------------------- model directories


@pytest.fixture(scope="session", name="make_model_dir")
def _make_model_dir():
    return make_model_dir


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory):
    """`model_dir(kind, tokenizer_dir, **options)`: like make_model_dir, made once a session. Do not write into it."""
    made: dict[tuple, Path] = {}

    def get(kind: str, tokenizer_dir: Path, **options) -> Path:
        key = (kind, str(tokenizer_dir), *sorted(options.items()))
        if key not in made:
            made[key] = make_model_dir(kind, tokenizer_dir, tmp_path_factory.mktemp("models") / kind, **options)
        return made[key]

    return get


# ------------------------------------------------------------------------------------------------ runs of train.py


@pytest.fixture(scope="session", name="run_train")
def _run_train():
    return run_train


@pytest.fixture(scope="session", name="losses")
def _losses():
    return losses


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.fixture(scope="module")
def one_thread():
    """Tiny matrices are slower on several threads, most of all beside other work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def merge(run_here):
    """`merge(*args)`: merge_lora_weight.py in this process; returns (exit code, stdout, stderr)."""

    def run(*args) -> tuple[int, str, str]:
        done = run_here("merge_lora_weight.py", args)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(base in shards, adapter) that fit each other; copy before changing."""
    from adapters import make_adapter, make_base

    folder = tmp_path_factory.mktemp("pair")
    base = make_base(folder / "base", "hunyuan_v1_moe", dtype="bfloat16", max_shard_size="30KB")
    return base, make_adapter(folder / "adapter", base)


# -------------------------------------------------------------------------------------------------------- cached rows


@pytest.fixture
def rows_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of tokenized rows, empty and of this test alone."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hunyuan"
