"""What bench_gpu.py trains: models in the shapes of the released ones, a tokenizer and rows, all made on the spot.

    python tests/benchmarks/gpu_models.py FOLDER [--small]

Weights are cut from one pool of normal values (deviation 0.02): products of zeros take less power and run faster.
Norms are ones, corrections of routers zeros. Each layer has a file of its own, so that a model of fewer layers is made
of links to the files of one with more.

Routing is as uneven as real text makes it: nothing balances the routers, whose logits have a deviation of about 1, and
each token of the rows is a Chinese character, drawn by Zipf's law: the most frequent ones are 5 % of the text, and go
to the same experts wherever they stand. bench_gpu.py prints the load of the busiest expert.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "train"), str(REPO / "tests")]
EXAMPLE = REPO / "train" / "example" / "tokenizer"

POSITIONS = 2**15
ATTENTION = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, tuple[str, dict]] = {
    "7B": ("HunYuanDenseV1", ATTENTION | {
        "hidden_size": 4096, "intermediate_size": 14_336, "vocab_size": 128_167, "tie_word_embeddings": True,
    }),
    "A13B": ("HunYuanMoEV1", ATTENTION | {
        "hidden_size": 4096, "intermediate_size": 3072, "num_experts": 64, "moe_topk": 8, "vocab_size": 128_167,
        "tie_word_embeddings": True,
    }),
    # Hy-MT2-30B-A3B. Its heads and the width of its dense layer are assumed: those of other models of this width.
    "Hy-MT2": ("HYV3", ATTENTION | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_key_value_heads": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 120_832, "tie_word_embeddings": False,
        "enable_lm_head_fp32": True,
    }),
}  # fmt: skip
LAYERS = {"7B": 32, "A13B": 32, "Hy-MT2": 48}  # of the released model
MADE = {"7B": (32, 8), "A13B": (3, 1), "Hy-MT2": (8, 4)}  # here: the largest first, then those that share its files
SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 8, "moe_topk": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 21_500,
}  # fmt: skip
MADE_SMALL = {"7B": (4, 2), "A13B": (2, 1), "Hy-MT2": (3, 2)}
IN_FP32 = (".gate.wg.weight", "e_score_correction_bias")
BYTES = 50 * 10**9  # of all of MADE, and of what a run saves
POOL = 2**26  # values
CHARACTERS = [chr(number) for number in range(0x4E00, 0xA000)]  # of the rows: a token each
ROWS = {"4k": (250_000, 64, 4000), "32k": (200_000, 32_400, 32_401)}  # tokens in all, and of a row from … to
ROWS_SMALL = {"4k": (20_000, 8, 250), "32k": (10_000, 1900, 1901)}
TURN = 250  # characters


# --------------------------------------------------------------------------------------------------------- models


def make_small_models(folder: Path) -> None:
    """Write `folder/dense` and `folder/moe`, which a CPU trains in fp32 in seconds."""
    from tiny import make_model_dir

    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    for kind in ("dense", "moe"):
        make_model_dir(kind, folder / "tokenizer", folder / kind, **shape)


def make_models(folder: Path, small: bool) -> None:
    """Write `folder/SHAPE-LAYERS` for each of MADE, or of MADE_SMALL."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    values = torch.randn(2**20 if small else POOL, generator=torch.Generator().manual_seed(0)) * 0.02
    pools = {"BF16": values.bfloat16().view(torch.int16).numpy(), "F32": values.numpy()}
    for shape, numbers in (MADE_SMALL if small else MADE).items():
        name, keys = SHAPES[shape]
        if small:
            keys = keys | {key: value for key, value in SMALL.items() if key in keys}
        tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        largest = None
        for number in numbers:
            config = getattr(transformers, f"{name}Config")(
                num_hidden_layers=number, max_position_embeddings=POSITIONS, **keys, **tokens
            )
            out = folder / f"{shape}-{number}"
            shutil.copytree(folder / "tokenizer", out)
            write_model(out, getattr(transformers, f"{name}ForCausalLM"), config, pools, largest)
            largest = largest or out


def write_model(out: Path, cls: type, config, pools: dict, larger: Path | None) -> None:
    """The files of a model of this class; where there is a larger one of the same shape, links to its files."""
    from sft.model.weight_files import build_on_meta

    model = build_on_meta(cls, config)
    files: dict[str, dict[str, tuple]] = {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            file = f"layer-{int(layer[1]):02}.safetensors" if layer else "rest.safetensors"
            files.setdefault(file, {})[name] = tuple(tensor.shape)
    if larger:
        for file in files:
            os.link(larger / file, out / file)
    else:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda file: write_tensors(out / file, files[file], pools), files))
    places = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": sum((out / file).stat().st_size for file in files)}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = [cls.__name__], "bfloat16"
    config.save_pretrained(out)


def write_tensors(file: Path, shapes: dict[str, tuple], pools: dict) -> None:
    """A safetensors file of tensors of these shapes: bf16, but fp32 where a router wants it."""
    kinds = {name: "F32" if name.endswith(IN_FP32) else "BF16" for name in shapes}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * pools[kinds[name]].itemsize
        header[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if len(shape) == 1:
                out.write((b"\0\0\0\0" if kinds[name] == "F32" else b"\x80\x3f") * shape[0])  # zeros, or ones in bf16
                continue
            pool, left = pools[kinds[name]], math.prod(shape)
            place = zlib.crc32(name.encode()) % len(pool)
            while left:
                part = pool[place : place + left]
                out.write(part.data)
                left, place = left - len(part), 0


# ----------------------------------------------------------------------------------------------- tokenizer and rows


def make_tokenizer(out: Path) -> None:
    """The example's tokenizer, with a token for each of CHARACTERS."""
    shutil.copytree(EXAMPLE, out)
    content = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    known = {token for token, _ in content["model"]["vocab"]}
    content["model"]["vocab"] += [[character, -12.0] for character in CHARACTERS if character not in known]
    (out / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def make_rows(file: Path, tokens: int, shortest: int, longest: int) -> None:
    """Conversations of so many tokens in all. Half of them are answers; the lengths of rows are spread as those of
    real ones (log-normal, median 600)."""
    import numpy as np

    draw = np.random.default_rng(0)
    odds = 1 / (np.arange(len(CHARACTERS)) + 2)
    text = "".join(np.array(CHARACTERS)[draw.choice(len(CHARACTERS), 2 * tokens, p=odds / odds.sum())])
    place = 0
    with file.open("w", encoding="utf-8") as out:
        while place < tokens:
            length = int(np.clip(draw.lognormal(math.log(600), 0.9), shortest, longest - 1))
            turn = min(TURN, length // 2)
            turns = [text[place + i : place + i + turn] for i in range(0, length // (2 * turn) * 2 * turn, turn)]
            messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            place += length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="tiny models in the same classes, to try it out")
    args = parser.parse_args()
    began = time.perf_counter()
    make_tokenizer(args.folder / "tokenizer")
    for name, (tokens, shortest, longest) in (ROWS_SMALL if args.small else ROWS).items():
        make_rows(args.folder / f"{name}.jsonl", tokens, shortest, longest)
    make_small_models(args.folder)
    make_models(args.folder, args.small)
    found = [file.stat() for file in args.folder.glob("*/*.safetensors")]
    size = sum({stat.st_ino: stat.st_size for stat in found}.values())  # links are no copies
    print(f"models of {size / 1e9:.1f} GB, made in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
