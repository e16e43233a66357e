"""--load_in_4bit: bit for bit the model whose weights are the unpacked ones, and in all else an adapter's run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install -r requirements-4bit.txt")

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from transformers import AutoModelForCausalLM

from conftest import run_script
from sft import checks
from sft.arguments import ModelArguments
from sft.messages import Refused
from sft.model.directory import ModelDirectory
from sft.model.four_bits import in_4_bits, pack, unpack
from sft.model.lora import add_adapter
from sft.model.moe import route_in_fp32
from sft.model.pretrained import load_pretrained

KINDS = ("dense", "moe", "hy_v3", "hy_v4")
TARGETS = {"moe": ["q_proj", "o_proj"], "hy_v4": None}  # of the others all linear layers
CPU = torch.device("cpu")


def load(directory: Path, targets: list[str] | None, packed: bool) -> nn.Module:
    options = in_4_bits(targets, CPU) if packed else {}
    return load_pretrained(ModelDirectory(directory), dtype="auto", **options)


def unpack_into(plain: nn.Module, packed: nn.Module) -> dict[str, torch.Tensor]:
    """Give a plain model the weights that a packed one computes with; returns {name: what it had} of those."""
    before = {}
    for name, weight in packed.named_parameters():
        place = plain.get_parameter(name)
        if isinstance(weight, Params4bit):
            before[name] = place.detach().clone()
            place.data = unpack(weight)
        else:
            assert torch.equal(weight, place) and weight.dtype == place.dtype, name
    return before


def adapted(model: nn.Module, directory: Path, targets: list[str] | None, **more) -> nn.Module:
    """The model with an adapter of values that depend on nothing else."""
    route_in_fp32(model)
    args = ModelArguments(str(directory), use_lora=True, lora_rank=4, lora_target_modules=targets, **more)
    model = add_adapter(model, args, None)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def one_step(model: nn.Module, autocast: bool) -> list[torch.Tensor]:
    """Logits, loss, the adapter's gradients, and the logits of one token alone without gradient."""
    ids = torch.randint(5, 300, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.train()(input_ids=ids, labels=ids, use_cache=False)
        with torch.no_grad():
            alone = model.eval()(input_ids=ids[:1, :1], use_cache=False).logits
    out.loss.backward()
    return [out.logits, out.loss, alone, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_as_with_the_unpacked_weights(kind, dtype, model_dir, example_tokenizer_dir):
    """With bf16 under autocast and with recomputation."""
    directory, targets = model_dir(kind, example_tokenizer_dir, dtype=dtype), TARGETS.get(kind, ["all-linear"])
    packed, plain = load(directory, targets, packed=True), load(directory, targets, packed=False)
    before = unpack_into(plain, packed)
    for name, buffer in plain.named_buffers():  # the router's correction among them
        assert torch.equal(buffer, packed.get_buffer(name)) and buffer.dtype == packed.get_buffer(name).dtype
    models = [adapted(model, directory, targets) for model in (packed, plain)]
    if dtype == "bfloat16":
        for model in models:
            model.gradient_checkpointing_enable()
    ours, theirs = (one_step(model, dtype == "bfloat16") for model in models)
    for number, (one, other) in enumerate(zip(ours, theirs)):
        assert one.dtype == other.dtype and torch.equal(one, other), number
    for name, weight in before.items():  # NF4's error on normally distributed values is about a tenth of their spread
        error = (models[1].get_base_model().get_parameter(base_name(models[1], name)) - weight).float()
        assert 0.05 < error.std() / weight.float().std() < 0.15, name


def base_name(model: nn.Module, name: str) -> str:
    """A parameter's name once there is an adapter."""
    place, _, last = name.rpartition(".")
    own = f"{place}.base_layer.{last}"
    return own if own in dict(model.get_base_model().named_parameters()) else name


@pytest.mark.parametrize("shape", [(64, 64), (3, 40, 56), (3, 700, 1000), (5, 7)])
def test_pieces_are_packed_as_the_whole(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, (values, state) = pack(weight), quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(ours, values) and torch.equal(unpack(ours), dequantize_4bit(values, state))
    assert unpack(ours).shape == shape and not ours.requires_grad


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("dense", {"self_attn": 8, "mlp": 6}),
        ("moe", {"self_attn": 8, "mlp.shared_mlp": 6, "mlp.experts": 4}),
        ("hy_v3", {"self_attn": 8, "mlp": 3, "mlp.shared_experts": 3, "mlp.experts": 2}),
    ],
)
def test_what_is_packed(kind, parts, model_dir, example_tokenizer_dir):
    """Of two layers, hy_v3's first without experts. Neither router, norms, embeddings nor the head, tied or not."""
    for tie in (True, False):
        model = load(model_dir(kind, example_tokenizer_dir, tie=tie), None, packed=True)
        names = [name.split(".", 3)[3] for name, p in model.named_parameters() if isinstance(p, Params4bit)]
        found = {}
        for name in names:
            part = name.removesuffix(".weight").rpartition(".")[0]
            found[part] = found.get(part, 0) + 1
        assert found == parts
        assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)


@pytest.mark.parametrize("kind", ["moe", "hy_v3"])
def test_between_forward_and_backward_only_packed_weights_are_kept(kind, model_dir, example_tokenizer_dir):
    directory = model_dir(kind, example_tokenizer_dir)
    shapes = {}
    for packed in (True, False):
        model = adapted(load(directory, None, packed), directory, None)
        weights = [p for name, p in model.named_parameters() if "experts.gate_up_proj" in name]
        whole = {tuple(w.quant_state.shape if packed else w.shape) for w in weights}
        saved: set[tuple[int, ...]] = set()

        def see(tensor: torch.Tensor, saved=saved) -> torch.Tensor:
            saved.add(tuple(sorted(tensor.shape)))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            model(input_ids=torch.arange(5, 50)[None], use_cache=False)
        shapes[packed] = {tuple(sorted(shape)) for shape in whole} & saved
    assert shapes[False] and not shapes[True]


def test_shared_experts_that_peft_adapts_by_their_weight_stay_whole(model_dir, example_tokenizer_dir, capfd):
    """On hunyuan_v1_moe; the same where an adapter's configuration names them."""
    directory = model_dir("moe", example_tokenizer_dir, dtype="bfloat16")
    named = ["q_proj", "model.layers.0.mlp.shared_mlp.up_proj.weight"]
    for targets, layers in ((["all-linear"], 6), (["shared_mlp", "q_proj"], 6), (named, 1), (None, 0)):
        model = load(directory, targets, packed=True)
        whole = [n for n, p in model.named_parameters() if ".shared_mlp." in n and not isinstance(p, Params4bit)]
        assert len(whole) == layers, targets
        assert (f"not in 4 bits = {layers} layers of the shared experts" in capfd.readouterr().out) == bool(layers)
    plain, packed = load(directory, None, packed=False), load(directory, ["all-linear"], packed=True)
    unpack_into(plain, packed)
    ours, theirs = (one_step(adapted(model, directory, ["all-linear"]), True) for model in (packed, plain))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs))


@pytest.mark.parametrize("more", [{"use_dora": True}, {"use_rslora": True}])
def test_dora_and_rslora(more, model_dir, example_tokenizer_dir):
    directory = model_dir("moe", example_tokenizer_dir)
    plain, packed = load(directory, None, packed=False), load(directory, None, packed=True)
    unpack_into(plain, packed)
    ours, theirs = (one_step(adapted(model, directory, None, **more), False) for model in (packed, plain))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs))


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def flags(model_dir, example_tokenizer_dir, train_and_eval_rows):
    """`flags(kind, out)`: those of four steps with evaluation."""

    def make(kind: str, out: Path, model: Path | None = None) -> list:
        model = model or model_dir(kind, example_tokenizer_dir, dtype="bfloat16")
        args = ["--model_name_or_path", model, "--train_data_file", train_and_eval_rows[0], "--output_dir", out]
        args += ["--eval_data_file", train_and_eval_rows[1], "--eval_strategy", "steps", "--eval_steps", 2]
        args += ["--use_lora", "--lora_rank", 4, "--learning_rate", 1e-2, "--max_steps", 4, "--save_steps", 2]
        return [*args, "--logging_steps", 1, "--report_to", "none"]

    return make


def history(out: Path) -> list:
    """Each loss of training and evaluation."""
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(e["step"], key, e[key]) for e in entries for key in ("loss", "eval_loss") if key in e]


@pytest.fixture(scope="module")
def run_of_moe(flags, run_train, example_rows, tmp_path_factory):
    """(output directory, flags) of a run with a probe."""
    folder = tmp_path_factory.mktemp("moe")
    probe = folder / "probe.jsonl"
    probe.write_bytes(b"".join(example_rows.read_bytes().splitlines(True)[:2]))
    args = [*flags("moe", folder / "out"), "--load_in_4bit", "--bf16", "--lora_target_modules", "all-linear"]
    run = run_train([*args, "--probe_file", probe])
    assert run.returncode == 0, run.stderr[-3000:]
    assert "4 bits = 12 weights" in run.stdout and "example_prompts" in (folder / "out/train_results.json").read_text()
    return folder / "out", args


def test_a_resumed_run_has_the_same_losses(run_of_moe, run_train, tmp_path):
    """The flag comes from the checkpoint; one that is given otherwise is refused."""
    out, args = run_of_moe
    run = run_train(["--resume_from_checkpoint", out / "checkpoint-2", "--output_dir", tmp_path / "out"])
    assert run.returncode == 0, run.stderr[-3000:]
    assert "4 bits = 12 weights" in run.stdout
    assert history(tmp_path / "out") == history(out)
    adapters = [(place / "adapter_model.safetensors").read_bytes() for place in (out, tmp_path / "out")]
    assert adapters[0] == adapters[1]


def test_an_adapter_is_like_any_other(run_of_moe, run_train, tmp_path):
    """Its files are those of a run without the flag, base.json and configuration the same; it is merged into the bf16
    base, talks, and can be trained further."""
    out, args = run_of_moe
    args = [str(tmp_path / "plain") if arg == out else arg for arg in args if arg != "--load_in_4bit"]
    run = run_train(args)
    assert run.returncode == 0, run.stderr[-3000:]
    names = [{path.name for path in place.iterdir()} for place in (out, tmp_path / "plain")]
    assert names[0] == names[1]
    for file in ("base.json", "adapter_config.json", "README.md"):
        assert (out / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    figures = [json.loads((place / "train_results.json").read_text()) for place in (out, tmp_path / "plain")]
    for key in ("total_params", "trainable_params", "flops"):
        assert figures[0][key] == figures[1][key] > 0
    merged = tmp_path / "merged"
    run = run_script(
        "merge_lora_weight.py", ["--adapter_model_path", out, "--output_path", merged, "--verify", "logits"]
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
    run = run_script("chat.py", ["--adapter", out, "--prompt", "3", "--max_new_tokens", 2])
    assert run.returncode == 0, run.stderr[-3000:]
    args[args.index("--model_name_or_path") + 1] = out
    run = run_train([*args, "--load_in_4bit", "--overwrite_output_dir"])
    assert run.returncode == 0 and "4 bits = 12 weights" in run.stdout, run.stderr[-3000:]


def test_a_run_on_the_unpacked_weights_has_the_same_losses(flags, run_train, model_dir, make_model_dir, tmp_path,
                                                           example_tokenizer_dir):  # fmt: skip
    """All in fp32: the adapter then begins with the same values."""
    directory = make_model_dir("hy_v3", example_tokenizer_dir, tmp_path / "unpacked")
    plain, packed = load(directory, None, packed=False), load(directory, None, packed=True)
    run = run_train([*flags("hy_v3", tmp_path / "4", directory), "--load_in_4bit"])
    assert run.returncode == 0, run.stderr[-3000:]
    unpack_into(plain, packed)
    plain.save_pretrained(directory)
    run = run_train(flags("hy_v3", tmp_path / "plain", directory))
    assert run.returncode == 0, run.stderr[-3000:]
    assert history(tmp_path / "4") == history(tmp_path / "plain")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "moe" else pytest.mark.campaign) for k in ("dense", "moe", "hy_v3")]
)
def test_two_ranks_equal_one_process(kind, flags, run_train, tmp_path):
    """Data-parallel, with the same rows a step."""
    for ranks in (1, 2):
        args = [*flags(kind, tmp_path / str(ranks)), "--load_in_4bit", "--gradient_accumulation_steps", 2 // ranks]
        args += ["--per_device_train_batch_size", 1, "--gradient_checkpointing"]
        run = run_train(args, launcher="torchrun" if ranks > 1 else "python", nproc=ranks)
        assert run.returncode == 0, run.stderr[-3000:]
    one, two = history(tmp_path / "1"), history(tmp_path / "2")
    assert [value for *_, value in two] == pytest.approx([value for *_, value in one], abs=2e-6)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("moe", ["--use_lora", "--lora_target_modules", "experts"], "experts: not with --load_in_4bit"),
        ("moe", ["--use_lora", "--lora_target_modules", "q_proj", "experts"], "experts: not with --load_in_4bit"),
        ("remote", ["--use_lora", "--model_code", "remote"], "HunYuanMoEV1ForCausalLM may not compute the same"),
        ("moe", [], "--load_in_4bit: weights in 4 bits cannot be trained: add --use_lora"),
        ("moe", ["--use_lora", "--deepspeed", "ds_zero2_no_offload.json"], "--load_in_4bit with --deepspeed"),
    ],
)
def test_refused(kind, more, says, model_dir, example_tokenizer_dir, example_rows, run_here, tmp_path):
    args = ["--model_name_or_path", model_dir(kind, example_tokenizer_dir), "--train_data_file", example_rows]
    run = run_here("train.py", [*args, "--output_dir", tmp_path / "out", "--load_in_4bit", *more])
    assert run.returncode == 2 and says in run.stderr, run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()


def test_refused_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    values = {"use_lora": True, "deepspeed": None, "fsdp": None}
    with pytest.raises(Refused, match=r"bitsandbytes is not installed: pip install -r requirements-4bit\.txt"):
        checks.check_4_bits(values)
