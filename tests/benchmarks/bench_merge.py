"""Merging into a generated 2 GB mixture of experts in 8 shards: peak memory and time, against PEFT's merge_and_unload.

    python tests/benchmarks/bench_merge.py [--repeats 3] [--targets attention experts]     # about ten minutes

Each merge is a process of its own; its peak is sampled from /proc: what it has allocated (anonymous memory), and all
that is resident (mapped pages of files among it, which the system takes back when it needs them). Both ways alternate.
Then ours merges to fp32, and its logits are compared with those of base + adapter.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

REPO = Path(__file__).resolve().parents[2]
HIDDEN, WIDTH, EXPERTS, LAYERS, VOCABULARY, HEADS, SHARDS, RANK = 1024, 1280, 16, 14, 32000, 16, 8, 16
DIM = HIDDEN // HEADS
PEFT_WAY = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
LOGITS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
if len(sys.argv) > 3:
    model = PeftModel.from_pretrained(model, sys.argv[3])
with torch.no_grad():
    torch.save(model.eval()(torch.arange(5, 133)[None] * 7, use_cache=False).logits, sys.argv[1])
"""


def make_base(directory: Path) -> int:
    """Write the base, shard by shard; returns its bytes."""
    from transformers import HunYuanMoEV1Config

    config = HunYuanMoEV1Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=DIM, num_experts=EXPERTS, moe_topk=2,
        tie_word_embeddings=True, dtype="bfloat16", architectures=["HunYuanMoEV1ForCausalLM"], pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(directory)
    mlp = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        layer = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        layer |= {
            "self_attn.query_layernorm": (DIM,),
            "self_attn.key_layernorm": (DIM,),
            "mlp.gate.wg": (EXPERTS, HIDDEN),
        }
        layer |= {"mlp.gate.wg": (EXPERTS, HIDDEN)}
        layer |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
        layer |= {f"mlp.shared_mlp.{k}": s for k, s in mlp.items()}
        layer |= {f"mlp.experts.{x}.{k}": s for x in range(EXPERTS) for k, s in mlp.items()}
        shapes |= {f"model.layers.{i}.{k}": s for k, s in layer.items()}
    generator, weight_map, names, total = torch.Generator().manual_seed(0), {}, list(shapes), 0
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        state = {}
        for name in names[len(names) * number // SHARDS : len(names) * (number + 1) // SHARDS]:
            shape = shapes[name]
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            state[f"{name}.weight"] = tensor.bfloat16()
        save_file(state, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
        total += sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def make_adapter(directory: Path, base: Path, targets: list[str]) -> None:
    """Write an adapter on attention, routed experts or both, as PEFT lays it out."""
    from peft import LoraConfig

    generator, state = torch.Generator().manual_seed(1), {}

    def pair(prefix: str, rows: int, columns: int, experts: int = 1) -> None:
        for part, shape in (("lora_A", (RANK * experts, columns)), ("lora_B", (rows, RANK * experts))):
            state[f"base_model.model.{prefix}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.01

    for i in range(LAYERS):
        if "attention" in targets:
            for name in "qkvo":
                pair(f"model.layers.{i}.self_attn.{name}_proj", HIDDEN, HIDDEN)
        if "experts" in targets:
            pair(f"model.layers.{i}.mlp.experts.base_layer", 2 * WIDTH, HIDDEN, EXPERTS)
            pair(f"model.layers.{i}.mlp.experts", HIDDEN, WIDTH, EXPERTS)
    directory.mkdir()
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    parameters = ["experts.gate_up_proj", "experts.down_proj"] if "experts" in targets else None
    modules = [f"{name}_proj" for name in "qkvo"] if "attention" in targets else []
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=modules, target_parameters=parameters, task_type="CAUSAL_LM"
    )
    config.base_model_name_or_path = str(base)
    config.save_pretrained(directory)


def watched(command: list[str]) -> dict[str, float]:
    """Run to the end; seconds, and the peaks of allocated and of resident memory in bytes."""
    began, allocated, resident = time.perf_counter(), 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
                status = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            except (OSError, ProcessLookupError):
                break
            if "VmHWM" in status:
                allocated = max(allocated, int(status["RssAnon"].split()[0]) * 1024)
                resident = max(resident, int(status["VmHWM"].split()[0]) * 1024)
            time.sleep(0.02)
        error = process.communicate()[1]
    if process.returncode:
        sys.exit(error[-2000:])
    return {"seconds": time.perf_counter() - began, "allocated": allocated, "resident": resident}


def tensors_of(directory: Path) -> dict[str, tuple]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as held:
            found |= {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--targets", nargs="+", choices=["attention", "experts"], default=["attention", "experts"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder, "base"), Path(folder, "adapter")
        base.mkdir()
        size = make_base(base)
        make_adapter(adapter, base, args.targets)
        script = str(REPO / "train" / "merge_lora_weight.py")

        def command(way: str, out: Path, dtype: str = "bfloat16") -> list[str]:
            if way == "PEFT":
                return [sys.executable, "-c", PEFT_WAY, str(base), str(adapter), str(out), dtype]
            short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
            flags = ["--adapter_model_path", str(adapter), "--output_path", str(out), "--save_dtype", short]
            return [sys.executable, script, *flags]

        found: dict[str, list[dict[str, float]]] = {"ours": [], "PEFT": []}
        for number in range(args.repeats):
            for way, runs in found.items():
                out = Path(folder, f"{way}-{number}")
                runs.append(watched(command(way, out)))
                if way == "ours":
                    assert tensors_of(out) == tensors_of(base)
                subprocess.run(["rm", "-r", str(out)], check=True)

        out, files = Path(folder, "fp32"), [Path(folder, "expected.pt"), Path(folder, "found.pt")]
        watched(command("ours", out, "float32"))
        for arguments in ([files[0], base, adapter], [files[1], out]):
            subprocess.run([sys.executable, "-c", LOGITS, *map(str, arguments)], check=True, stderr=subprocess.DEVNULL)
        expected, merged = (torch.load(file) for file in files)
    print(f"\nbase {size / 1e9:.2f} GB in {SHARDS} shards, adapter on {' and '.join(args.targets)}, rank {RANK}")
    print("| way | seconds (median) | allocated at the peak | resident at the peak |\n|---|---|---|---|")
    for way, runs in found.items():
        seconds, allocated, resident = (
            statistics.median(run[key] for run in runs) for key in ("seconds", "allocated", "resident")
        )
        print(f"| {way} | {seconds:.1f} | {allocated / 1e9:.2f} GB | {resident / 1e9:.2f} GB |")
    difference, most = (expected - merged).abs().max(), expected.abs().max()
    print(f"fp32 logits, merged against base + adapter: largest difference {difference:.1e}, largest logit {most:.1f}")


if __name__ == "__main__":
    main()
