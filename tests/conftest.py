"""Fixtures and helpers of all tests: tokenizers, tiny model directories, runs of train.py as real processes.

The helpers are plain functions and fixtures of the same name: a test asks for `run_train`, a script imports it.
"""

import atexit
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
TRAIN = REPO / "train"
SHARED = REPO.parent / "shared"
EXAMPLE_TOKENIZER = TRAIN / "example" / "tokenizer"

MARKERS = {
    "campaign": "long tables, deselected by default: pytest -m campaign",
    "needs_gxx": "compiles a DeepSpeed extension: needs g++ and ninja",
    "needs_gpu": "needs an NVIDIA GPU that torch can use",
    "needs_hosts": "several hosts on this machine: needs root, network namespaces, sshd and ip",
}


# --- markers -------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    if "PYTEST_XDIST_WORKER" in os.environ:  # a core each
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "HYTEST_CACHE" not in os.environ:  # tokenized rows of tests are kept for this run of pytest only
        folder = tempfile.mkdtemp(prefix="rows-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["HYTEST_CACHE"] = os.environ["HF_DATASETS_CACHE"] = folder
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # as in the background of a shell; processes would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers; none where something is to be seen (`pytest -s`), which they would swallow."""
    return 0 if config.option.capture == "no" else 2


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


# --- real input and tokenizers -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real rows (`data/car_train.jsonl`) and the real vocabulary (`data/hy.tiktoken`)."""
    if not (SHARED / "data" / "hy.tiktoken").is_file():
        pytest.skip("no ../shared: put the folder (data/hy.tiktoken, data/car_train.jsonl) beside the repository")
    return SHARED


def make_hy_tokenizer(out: Path) -> Path:
    """Writes a tokenizer directory with code of its own and the real vocabulary (128,167 tokens); needs ../shared."""
    out.mkdir(parents=True, exist_ok=True)
    for file in (*(TESTS / "fixtures" / "hy_tokenizer").glob("*.*"), SHARED / "data" / "hy.tiktoken"):
        # Contents only: files of a read-only folder would give a read-only copy.
        shutil.copyfile(file, out / file.name)
    return out


@pytest.fixture(scope="session")
def hy_tokenizer_dir(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of `fixtures/hy_tokenizer` with the real vocabulary. Do not write into it."""
    return make_hy_tokenizer(tmp_path_factory.mktemp("tokenizer") / "hy_tokenizer")


@pytest.fixture(scope="session")
def example_tokenizer_dir() -> Path:
    """The embedded example's own tokenizer: one token a character, the same chat format, no code of its own."""
    return EXAMPLE_TOKENIZER


@pytest.fixture(scope="session")
def example_rows() -> Path:
    """The embedded example's rows."""
    return TRAIN / "example" / "rows.jsonl"


# What the formats of tests/fixtures/chat_templates call their special tokens: (begin, end of a turn, others).
FORMATS = {
    "dense": ("<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>",
              ["<｜hy_place▁holder▁no▁3｜>", "<｜hy_place▁holder▁no▁8｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>"]),
    "hy3": ("<｜hy_begin_of_sentence:test｜>", "<｜hy_eos:test｜>",
            ["<｜hy_User:test｜>", "<｜hy_Assistant:test｜>", "<｜reasoning_mode:test｜>",
             "<think:test>", "</think:test>"]),
    "mt": ("<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>",
           ["<｜hy_place▁holder▁no▁3｜>", "<｜hy_place▁holder▁no▁8｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>"]),
    "opens_think": ("<|im_start|>", "<|im_end|>", ["<think>", "</think>"]),
}  # fmt: skip


def make_format_tokenizer(name: str, out: Path) -> Path:
    """Writes a byte-level BPE tokenizer, learned from the READMEs, with a format's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end, others = FORMATS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[begin, end, "<pad>", *others],
    )  # fmt: skip
    tokenizer.train([str(REPO / "README.md"), str(REPO / "README_CN.md")], trainer)
    template = (TESTS / "fixtures" / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token="<pad>", chat_template=template
    ).save_pretrained(out)
    return Path(out)


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


# --- model directories ---------------------------------------------------------------------------------------------


def make_model_dir(
    kind: str,
    tokenizer_dir: Path,
    out: Path,
    dtype: str = "float32",
    tie: bool = True,
    vocab_size: int | None = None,
    seed: int = 0,
    fused: bool = False,
    **config,
) -> Path:
    """Writes a randomly initialised model with the tokenizer beside it, and returns `out`.

    Args:
        kind: `dense` (HunYuanDenseV1), `moe` (HunYuanMoEV1: 4 experts, top-2, one shared expert), `hy_v3` or `hy_v4`
            (one dense and one MoE layer; Hy4 with a sparse indexer that keeps 8 tokens), `remote` or `remote_cla`
            (fixtures/hunyuan_remote, as the first A13B and as Large).
        tokenizer_dir: its files are copied; its special tokens are the model's.
        dtype: of the weights on disk, by torch's name.
        tie: whether the head is the embedding.
        vocab_size: rows of the embedding; default the tokenizer's length.
        fused: lay the routed experts out as one tensor a layer, as Tencent's converter does for Hy3.
        config: further or other keys of the model's configuration. `head_dim` follows `hidden_size` and
            `num_attention_heads` unless given.
    """
    import torch
    import transformers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=True)
    keys = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "vocab_size": vocab_size or len(tokenizer),
        "tie_word_embeddings": tie,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "eod_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "moe":
        keys |= {"num_experts": 4, "moe_topk": 2}
    elif kind == "hy_v3":
        keys |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    elif kind == "hy_v4":
        keys |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "q_lora_rank": 32}
        keys |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "hc_mult": 2}
        keys |= {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2}
    keys |= config
    keys.setdefault("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    if kind in ("remote", "remote_cla"):
        return make_remote_dir(kind, keys, tokenizer_dir, out, dtype, seed)
    name = {"dense": "HunYuanDenseV1", "moe": "HunYuanMoEV1", "hy_v3": "HYV3", "hy_v4": "HYV4"}[kind]
    config_class, model_class = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**keys))
    model.to(getattr(torch, dtype)).save_pretrained(out)
    if fused:
        fuse_experts(Path(out))
    for file in Path(tokenizer_dir).iterdir():
        if file.is_file() and file.name != "config.json":
            shutil.copyfile(file, Path(out) / file.name)
    return Path(out)


def fuse_experts(directory: Path) -> None:
    """Lay the four routed experts of a one-file directory out as one tensor a layer."""
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(directory / "model.safetensors")
    layers = {name.split(".experts.")[0] for name in state if ".experts." in name}
    for layer in sorted(layers):
        gate, up, down = (
            torch.stack([state.pop(f"{layer}.experts.{expert}.{name}.weight") for expert in range(4)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        state |= {f"{layer}.experts.gate_up_proj": torch.cat([gate, up], dim=1), f"{layer}.experts.down_proj": down}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def make_remote_dir(kind: str, keys: dict, tokenizer_dir: Path, out: Path, dtype: str, seed: int) -> Path:
    """A directory with code of its own (fixtures/hunyuan_remote): A13B's architecture, or Large's (top-1, CLA)."""
    import torch
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True)
    for folder in (tokenizer_dir, TESTS / "fixtures" / "hunyuan_remote"):
        for file in Path(folder).iterdir():
            if file.is_file() and file.name != "config.json":
                shutil.copyfile(file, out / file.name)
    layers = keys["num_hidden_layers"]
    moe = {"moe_topk": [2] * layers, "num_shared_expert": [1] * layers, "use_cla": False, "cla_share_factor": 2}
    if kind == "remote_cla":
        moe = {"moe_topk": 1, "num_shared_expert": 1, "use_cla": True, "cla_share_factor": 2}
    rope = {"rope_theta": 10000.0, "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}}
    keys = (
        {"use_qk_norm": True, "num_experts": 4, "use_mixed_mlp_moe": True, "initializer_range": 0.02}
        | rope
        | moe
        | keys
    )
    code = {"AutoConfig": "configuration_hunyuan.HunYuanConfig"}
    code |= {"AutoModelForCausalLM": "modeling_hunyuan.HunYuanMoEV1ForCausalLM"}
    config = keys | {"model_type": "hunyuan", "architectures": ["HunYuanMoEV1ForCausalLM"], "auto_map": code}
    config |= {"torch_dtype": dtype, "transformers_version": "4.41.2", "rms_norm_eps": 1e-5}
    (out / "config.json").write_text(json.dumps(config, indent=2))

    h, f, e, v = keys["hidden_size"], keys["intermediate_size"], keys["num_experts"], keys["vocab_size"]
    d = h // keys["num_attention_heads"]
    mlp = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
    shapes = {"model.embed_tokens": (v, h), "model.norm": (h,)}
    if not keys["tie_word_embeddings"]:
        shapes["lm_head"] = (v, h)
    for i in range(layers):
        layer = {"input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (h, h)}
        layer |= {"self_attn.o_proj": (h, h), "self_attn.query_layernorm": (d,), "self_attn.key_layernorm": (d,)}
        if not keys["use_cla"] or i % keys["cla_share_factor"] == 0:
            layer |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (d * keys["num_key_value_heads"], h))
        layer |= {"mlp.gate.wg": (e, h)} | {f"mlp.shared_mlp.{k}": s for k, s in mlp.items()}
        layer |= {f"mlp.experts.{x}.{k}": s for x in range(e) for k, s in mlp.items()}
        shapes |= {f"model.layers.{i}.{k}": s for k, s in layer.items()}
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"{k}.weight": torch.ones(s)
        if len(s) == 1
        else torch.randn(s, generator=generator) * keys["initializer_range"]
        for k, s in shapes.items()
    }
    half = {k: t if ".wg." in k else t.to(getattr(torch, dtype)) for k, t in state.items()}  # the router stays fp32
    save_file(half, out / "model.safetensors", metadata={"format": "pt"})
    return out


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


# --- runs of train.py ----------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch_command(script: Path, launcher: str = "python", nproc: int = 1) -> list[str]:
    """The command that starts `nproc` processes of `script` on this machine by `python`, `torchrun` or `deepspeed`."""
    port = str(free_port())
    if launcher == "torchrun":
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(nproc), "--master_port", port]
    elif launcher == "deepspeed":
        launch = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(nproc), "--master_port", port]
    elif launcher == "python" and nproc == 1:
        launch = []
    else:
        raise ValueError(f"launcher {launcher!r} with nproc {nproc}")
    return [sys.executable, *launch, str(script)]


def run_command(command: list[str], env: dict[str, str] | None = None, timeout: float = 600, cwd: Path | None = None):
    """Runs `command` to its end in a session of its own and returns CompletedProcess with text.

    After `timeout` seconds the whole session is killed, children included, and subprocess.TimeoutExpired holds what
    was printed until then. The rendezvous variables of a surrounding job are not passed on, nor is the network used.
    """
    job = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    full_env = {key: value for key, value in os.environ.items() if key not in job}
    full_env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | (env or {})
    process = subprocess.Popen(
        command, env=full_env, cwd=cwd, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr) from None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """`run_here(script, args)`: a script of train/ in this process, for runs that end before a model trains: they need
    not import torch anew. A path elsewhere is run as it is. Returns CompletedProcess with text."""

    def run(script: str | Path, args: Sequence) -> subprocess.CompletedProcess:
        command, code = [str(script), *map(str, args)], 0
        capfd.readouterr()  # what was printed before is not the script's
        with monkeypatch.context() as patch, mock.patch.dict(os.environ):
            patch.setattr(sys, "argv", command)
            try:
                runpy.run_path(str(TRAIN / script), run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
        return subprocess.CompletedProcess(command, code, *capfd.readouterr())

    return run


def run_train(
    args: list[str],
    launcher: str = "python",
    nproc: int = 1,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess:
    """Runs `train/train.py` with `args` as a real process, or `nproc` of them; never raises for an exit code.

    Args:
        launcher: `python`, `torchrun` or `deepspeed`.
        env: variables added to this process's. With more than one process OMP_NUM_THREADS is 1 unless given here.
        timeout: in seconds; see run_command.
        cwd: folder to run in, default the caller's.
    """
    env = ({"OMP_NUM_THREADS": "1"} if nproc > 1 else {}) | (env or {})
    command = launch_command(TRAIN / "train.py", launcher, nproc) + [str(arg) for arg in args]
    return run_command(command, env, timeout, cwd)


def losses(output_dir: Path) -> list[float]:
    """The loss of each logging step, from `trainer_state.json` in `output_dir` (a run's or a checkpoint's)."""
    state = json.loads((Path(output_dir) / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="session", name="run_train")
def _run_train():
    return run_train


@pytest.fixture(scope="session", name="losses")
def _losses():
    return losses
