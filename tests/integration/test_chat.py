"""chat.py answers as the model does by itself: from a directory, an adapter, the newest run; one reply or several."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import chat
from conftest import run_script
from sft.messages import Refused

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '<s>' + message.content + '<a>' }}"
    "{% else %}{{ message.content + '</s>' }}{% endif %}{% endfor %}"
)

pytestmark = pytest.mark.usefixtures("one_thread")


def make_tokenizer(path: Path, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer with four special tokens and one token a character."""
    tokens = ["<pad>", "<s>", "</s>", "<a>", *map(chr, range(33, 127)), *"你好海水"]
    inner = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", additional_special_tokens=["<a>"]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return tokenizer


def make_model(path: Path, kind: str = "hunyuan_v1_dense", template: str | None = TEMPLATE, **config) -> Path:
    """A tiny random model with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(path, template)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "initializer_range": 0.3,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | config))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    return path


def make_adapter(path: Path, base: Path) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(path)
    return path


def expected(text: str, path: Path, adapter: Path | None = None, tokens: int = 8, ends: tuple[int, ...] = (2,)) -> str:
    """What the model says after `text`, found without generate(): the likeliest token, again and again."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    said = ids[:, :0]
    with torch.no_grad():
        while said.shape[1] < tokens and not (said.shape[1] and int(said[0, -1]) in ends):
            following = model(input_ids=torch.cat([ids, said], 1)).logits[:, -1].argmax(-1, keepdim=True)
            said = torch.cat([said, following], 1)
    return tokenizer.decode(said[0], skip_special_tokens=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model directory; do not write into it."""
    return make_model(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter of `base`; do not write into it."""
    return make_adapter(tmp_path_factory.mktemp("chat") / "adapter", base)


@pytest.fixture
def say(capsys):
    """chat.py in this process: (stdout, stderr) of `python chat.py *args --max_new_tokens 8`."""

    def run(*args) -> tuple[str, str]:
        capsys.readouterr()
        chat.main([*map(str, args), "--max_new_tokens", "8"])
        return tuple(capsys.readouterr())

    return run


def run_chat(*args, stdin: str = "", cold: bool = False) -> subprocess.CompletedProcess:
    return run_script("chat.py", args, env={"OMP_NUM_THREADS": "1"}, stdin=stdin, cold=cold)


# --- one reply -----------------------------------------------------------------------------------------------------


def test_a_prompt_gives_the_reply_and_nothing_else_on_stdout(base):
    run = run_chat(base, "--prompt", "你好", "--max_new_tokens", "8", cold=True)
    assert run.returncode == 0, run.stderr
    reply = expected("<s>你好<a>", base)
    assert len(reply) >= 1
    assert run.stdout == reply + "\n"
    assert f"model = {base} (given)" in run.stderr
    assert "device = " in run.stderr


def test_a_mixture_of_experts(say, tmp_path):
    path = make_model(tmp_path / "moe", "hunyuan_v1_moe", num_experts=4, moe_topk=2)
    assert say(path, "--prompt", "Hi")[0] == expected("<s>Hi<a>", path) + "\n"


@pytest.mark.parametrize("how", ["directory", "flag", "both"])
def test_an_adapter(how, say, base, adapter):
    args = {"directory": [adapter], "flag": ["--adapter", adapter], "both": [base, "--adapter", adapter]}[how]
    out, err = say(*args, "--prompt", "Hi")
    assert out == expected("<s>Hi<a>", base, adapter) + "\n" != expected("<s>Hi<a>", base) + "\n"
    assert f"adapter = {adapter} (given)" in err
    assert f"model = {base} ({'given' if how == 'both' else 'named by adapter_config.json'})" in err


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (TEMPLATE, "<s>/no_thinkHi<a>"),
        (TEMPLATE + "{% if enable_thinking is false %}{{ 'off' }}{% endif %}", "<s>Hi<a>off"),
        (TEMPLATE + "{{ reasoning_effort | default('high') }}", "<s>Hi<a>no_think"),
    ],
    ids=["text", "enable_thinking", "reasoning_effort"],
)
def test_no_think_uses_what_the_template_offers(template, prompt, say, tmp_path):
    path = make_model(tmp_path / "model", template=template)
    assert say(path, "--prompt", "Hi", "--no_think")[0] == expected(prompt, path) + "\n"


@pytest.mark.parametrize("where", ["generation_config", "tokenizer"])
def test_it_stops_at_both_ends(where, say, tmp_path):
    path = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    says = expected("<s>Hi<a>", path)
    end = tokenizer.convert_tokens_to_ids(says[0])
    if where == "generation_config":
        settings = json.loads((path / "generation_config.json").read_text())
        (path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, end]}))
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        tokenizer.save_pretrained(path)
    out, _ = say(path, "--prompt", "Hi")
    # The end is not shown where it is one of the tokenizer's special tokens.
    assert out == (says[0] if where == "generation_config" else "") + "\n"


def test_temperature_samples(say, base):
    torch.manual_seed(0)
    assert len({say(base, "--prompt", "Hi", "--temperature", "5")[0] for _ in range(3)}) > 1


# --- a conversation ------------------------------------------------------------------------------------------------


def test_turns_build_on_each_other_until_reset(say, base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\n你好\n/reset\nHi\n/quit\nnever read\n"))
    out, _ = say(base)
    first = expected("<s>Hi<a>", base)
    second = expected(f"<s>Hi<a>{first}</s><s>你好<a>", base)
    assert second != expected("<s>你好<a>", base)
    assert out == f"{first}\n{second}\n{first}\n"


def test_end_of_file_leaves(base):
    run = run_chat(base, "--max_new_tokens", "2", stdin="Hi\n")
    assert (run.returncode, run.stdout) == (0, expected("<s>Hi<a>", base, tokens=2) + "\n")
    assert "Traceback" not in run.stderr


# --- which model ---------------------------------------------------------------------------------------------------


def test_the_newest_under_train_output(base, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "OUTPUT_ROOT", tmp_path)
    with pytest.raises(Refused, match="no model under train/output"):
        chat.choose(None, None)
    for age, (name, source) in enumerate([("merged.tmp-77", base), ("lora", adapter), ("run/checkpoint-5", base)]):
        (tmp_path / name).mkdir(parents=True)
        for file in source.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
            os.utime(tmp_path / name / file.name, (1e9 - age, 1e9 - age))
    assert chat.choose(None, None) == (base, tmp_path / "lora")
    assert f"adapter = {tmp_path}/lora (newest under train/output)" in capsys.readouterr().err
    os.utime(tmp_path / "run" / "checkpoint-5" / "model.safetensors")
    assert chat.choose(None, None) == (tmp_path / "run" / "checkpoint-5", None)
    assert f"model = {tmp_path}/run/checkpoint-5 (newest under train/output)" in capsys.readouterr().err
    assert chat.choose(str(base), None) == (base, None)


# --- what it refuses -----------------------------------------------------------------------------------------------


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def lose(path: Path, part: str) -> Path:
    save_file({name: t for name, t in load_file(path).items() if part not in name}, path, metadata={"format": "pt"})
    return path.parent


def renamed_base(path: Path, base: str) -> Path:
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    return path


def unlink(path: Path) -> Path:
    path.unlink()
    return path.parent


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (lambda b, a: ["--unknown"], "unrecognized arguments: --unknown"),
        (lambda b, a: [b, "--max_new_tokens", "0"], "--max_new_tokens 0: must be 1 or more"),
        (lambda b, a: [b, "--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
        (lambda b, a: [b / "none"], "none: no such directory"),
        (lambda b, a: [unlink(b / "config.json")], "has no config.json"),
        (lambda b, a: [unlink(b / "model.safetensors")], "holds no weights"),
        (lambda b, a: [b, "--adapter", b], "no adapter here"),
        (lambda b, a: [a, "--adapter", a], "is an adapter and not a model"),
        (lambda b, a: [renamed_base(a, "tencent/Hunyuan-0.5B")], "its base 'tencent/Hunyuan-0.5B' is not a directory"),
        (lambda b, a: [lose(b / "model.safetensors", "1.mlp.up")], "weights are missing: model.layers.1.mlp.up_proj"),
        (
            lambda b, a: [lose(a / "adapter_model.safetensors", "1.self_attn.q")],
            "are missing: base_model.model.model.layers.1.",
        ),
        (
            lambda b, a: [make_model(b.parent / "x", num_hidden_layers=1), "--adapter", a],
            "have no place in the model: ",
        ),
        (
            lambda b, a: [make_model(b.parent / "x", hidden_size=64), "--adapter", a],
            "adapter does not load: .* size mismatch",
        ),
        (lambda b, a: [make_model(b.parent / "x", template=None)], "has no chat template"),
        (lambda b, a: [make_model(b.parent / "x", template="{{ raise_exception('no') }}")], "template fails: no"),
    ],
)
def test_refused(args, says, base, adapter, tmp_path):
    args = args(copy(base, tmp_path / "base"), copy(adapter, tmp_path / "adapter"))
    with pytest.raises(Refused, match=says.replace("(", r"\(")) as refusal:
        chat.main([*map(str, args), "--prompt", "Hi"])
    assert "\n" not in str(refusal.value)


def test_a_refusal_is_one_message_and_exit_code_2(tmp_path):
    run = run_chat(tmp_path, "--prompt", "Hi")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.splitlines() == [f"model = {tmp_path} (given)", f"refused: {tmp_path}: has no config.json"]
