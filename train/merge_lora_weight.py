"""Merge a LoRA adapter into its base, offline: adapter + base -> one model directory.

    python merge_lora_weight.py                  # newest adapter under train/output, its own base, <adapter>-merged
    python merge_lora_weight.py --base_model_path BASE --adapter_model_path ADAPTER --output_path OUT --save_dtype bf16
    python merge_lora_weight.py --verify logits  # and compare the result with base + adapter as PEFT computes them

Works on the safetensors files shard by shard and never builds the model: it needs memory for about one shard. A weight
is merged in fp32 and rounded once; names, shards, index and the other files of a model are the base's, config.json but
for its dtype. It is written beside the output and renamed at the end. Refused (exit code 2, nothing at the output): an
adapter that is empty, of another base or more than LoRA or DoRA on linear layers and routed experts; a base that is
quantised, not whole or not safetensors; an output that is not empty; values that do not fit the dtype; a full disk.
"""

import functools
import json
import math
import shutil
import sys
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from sft.merging import (
    DTYPES,
    byte_size,
    choose_dtype,
    logits,
    merged,
    plan_files,
    plan_updates,
    read_base,
    written_aside,
)
from sft.messages import OUTPUT_ROOT, Parser, Refused, choice, newest, read_json
from sft.model.weight_files import (
    INDEX,
    STORED,
    apply_umask,
    check_base,
    model_files,
    open_tensors,
    some,
)


def main(argv: list[str] | None = None) -> None:
    """The job, step by step."""
    # 1. What is asked for
    parser = Parser(description="Merge a LoRA adapter into its base model.", allow_abbrev=False)
    parser.add_argument("--base_model_path", help="model directory (default: the one that adapter_config.json names)")
    parser.add_argument("--adapter_model_path", help="adapter directory (default: the newest under train/output)")
    parser.add_argument("--output_path", help="directory to write (default: <adapter>-merged)")
    parser.add_argument("--save_dtype", choices=DTYPES, help="dtype of the result (default: the base's)")
    parser.add_argument("--max_shard_size", type=byte_size, default="5GB", help="split larger files (default: 5GB)")
    parser.add_argument("--verify", choices=("keys", "logits"), help="check the result's tensors, or what it computes")
    parser.add_argument("--any_base", action="store_true", help="merge into another base than the adapter's own")
    args = parser.parse_args(argv)

    # 2. Which adapter, base and output
    given, held = args.adapter_model_path, "adapter_model.safetensors"
    adapter = Path(given) if given else newest(OUTPUT_ROOT, (held,))
    if adapter is None:
        raise Refused(f"no adapter under {OUTPUT_ROOT}; train one with --use_lora, or give --adapter_model_path")
    adapter = adapter.resolve()
    if not (adapter / held).is_file():
        raise Refused(f"{adapter}: holds no {held}; give the directory of an adapter")
    base_path = args.base_model_path or read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    if not base_path or not Path(base_path).is_dir():
        raise Refused(f"base {base_path!r}: not a directory here; give --base_model_path")
    base, output = Path(base_path).resolve(), Path(args.output_path or f"{adapter}-merged").resolve()
    choice("adapter_model_path", adapter, "given" if given else "newest under train/output")
    choice("base_model_path", base, "given" if args.base_model_path else "named by adapter_config.json")
    choice("output_path", output, "given" if args.output_path else "<adapter>-merged")
    if output in (base, adapter):
        itself = "base" if output == base else "adapter"
        raise Refused(f"--output_path {output}: is the {itself} itself; give another directory")
    occupied = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if occupied and args.output_path:
        raise Refused(f"--output_path {output}: is there and not empty; remove it or give another directory")

    # 3. What the base holds, and what of it the adapter changes
    config, index, tensors = read_base(base)
    adapter_file, updates = plan_updates(adapter, tensors, config.get("tie_word_embeddings", False))
    model_code = check_base(adapter, base, args.any_base)

    # 4. In which dtype, in which files, and whether there is space for it
    saved, keep = choose_dtype(args.save_dtype, config, tensors)
    dtypes = {name: tensor.dtype if name in keep else saved for name, tensor in tensors.items()}
    sizes = {
        name: tensor.nbytes if name in keep else STORED[saved].itemsize * math.prod(tensor.shape)
        for name, tensor in tensors.items()
    }
    parts, copied = plan_files(tensors, sizes, args.max_shard_size), model_files(base)
    needed = sum(sizes.values())
    free = shutil.disk_usage(next(parent for parent in output.parents if parent.exists())).free
    if free < needed:
        raise Refused(f"--output_path {output}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room")

    # 5. Write: shard by shard, the index, config.json, all else
    try:
        # the experts of a layer share a factor
        factor = functools.lru_cache(maxsize=4)(lambda key: adapter_file.get_tensor(key).float())
        with written_aside(output) as temporary:
            for file, names in tqdm(parts, desc="merging", unit="shard"):
                source, shard = open_tensors(base / tensors[names[0]].file), {}
                for name in names:
                    tensor = source.get_tensor(name)
                    dtype = STORED.get(dtypes[name], tensor.dtype)
                    update = updates.get(name)
                    shard[name] = merged(tensor, update, factor, dtype) if update else tensor.to(dtype)
                    if (name in updates or saved == "F16") and not shard[name].isfinite().all():
                        raise Refused(
                            f"{name}: not finite in {shard[name].dtype}: the adapter is damaged, or the "
                            "dtype's range too small (then give --save_dtype bf16 or fp32)"
                        )
                save_file(shard, temporary / file, source.metadata() or {"format": "pt"})
            if index or len(parts) > 1:
                places = {name: file for file, names in parts for name in names}
                index["metadata"] = {**index.get("metadata", {}), "total_size": needed}
                index["weight_map"] = {name: places[name] for name in index.get("weight_map", places)}
                (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
            config |= {key: str(STORED[saved])[6:] for key in ("dtype", "torch_dtype") if key in config}
            (temporary / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            for name, file in copied.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, temporary / name)
            apply_umask(temporary)
            if args.verify:
                wanted = {(name, tensor.shape, dtypes[name]) for name, tensor in tensors.items()}
                found = {(name, tensor.shape, tensor.dtype) for name, tensor in read_base(temporary)[2].items()}
                if wanted != found:
                    raise Refused(f"{output}: not the base's tensors: {some(sorted(map(str, wanted ^ found)))}")
                choice("verify keys", f"{len(wanted)} tensors", "names and shapes are the base's, dtypes as asked for")
            if occupied:  # the default place holds an earlier merge
                earlier = output.with_name(f"{output.name}-previous-{time.strftime('%Y%m%d-%H%M%S')}")
                output.rename(earlier)
                choice("earlier merge", earlier, "moved aside")
    except (OSError, SafetensorError) as error:  # a full disk among them
        raise Refused(f"--output_path {output}: could not be written, nothing is left there: {error}") from None
    print(f"merged {len(updates)} of {len(tensors)} tensors into {output} ({needed / 1e9:.3f} GB)")

    # 6. What it computes
    if args.verify == "logits":
        expected, found = logits(base, model_code, adapter), logits(output, model_code)
        choice(
            "verify logits",
            f"{(expected - found).abs().max():.3g}",
            "largest difference from base + adapter with "
            f"PEFT on 32 fixed tokens, fp32; largest logit {expected.abs().max():.3g}",
        )


if __name__ == "__main__":
    try:
        main()
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        sys.exit(2)
