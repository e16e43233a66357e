"""Which files of a directory belong to a model, and which to a run. Training and merging copy the model's, and an
earlier run's are moved away with its model's."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from sft.messages import note, read_json

ADAPTER_FILE = "adapter_model.safetensors"
# A tokenizer's files, and all of a model's beside weights and config.json. Python files are where an auto_map reaches
# them.
NEITHER = r"(?!\.|.*\.(py|env|key|log|gz|tgz|zip|tar|bak)$)"
OF_A_TOKENIZER = re.compile(
    rf"{NEITHER}((special_tokens_map|added_tokens)\.json|additional_chat_templates/.*\.jinja"
    r"|(tokenizer|vocab|merges|chat_template).*\.(json|jsonl|txt|jinja)|.*\.(tiktoken|model|vocab))"
)
OF_A_MODEL = re.compile(
    rf"{OF_A_TOKENIZER.pattern}|{NEITHER}((generation|preprocessor|processor)_config\.json"
    r"|(?i:(.*[-_ ])?(licen[cs]e|notice)s?([-_. ].*)?))"
)
# What is not named where it is not copied: weights, and what training and merging write.
OF_A_RUN = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf)(\.index\.json)?|.*\.tmp-\d+|.*\.lock|log_.*\.txt|loss\.png|rng_state.*"
    r"|(config|adapter_config|base|kept_in_fp32|trainer_state|manifest|run|.*_results)\.json|zero_to_.*\.py|latest|runs"
    r"|(checkpoint|previous)-.*|global_step.*|additional_chat_templates"
)


def code_files(directory: Path, auto_map: dict | list) -> list[str]:
    """The Python files that an auto_map reaches, their imports included, those that are missing too."""
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    waiting, found = [name.split(".")[0] for name in names if isinstance(name, str) and "--" not in name], []
    if waiting:
        from transformers.dynamic_module_utils import get_relative_imports  # takes seconds to import: only here
    while waiting:
        file = f"{waiting.pop()}.py"
        if file not in found:
            found.append(file)
            with contextlib.suppress(OSError, UnicodeDecodeError):  # a missing one: whoever runs it refuses it
                waiting += get_relative_imports(directory / file)
    return found


def files_of_a_model(directory: Path, quiet: bool = False) -> dict[str, Path]:
    """{name: path} of what belongs to a model in a directory, weights and config.json left out. Prints what else is
    there, unless `quiet`."""
    paths = [*directory.glob("*"), *directory.glob("additional_chat_templates/*")]
    by_name = {path.relative_to(directory).as_posix(): path for path in paths}
    found = {name: path for name, path in by_name.items() if not OF_A_RUN.fullmatch(name)}
    configs = [path for name in ("config.json", "tokenizer_config.json") if (path := directory / name).is_file()]
    code = {file for config in configs for file in code_files(directory, read_json(config).get("auto_map") or {})}
    kept = {n: path for n, path in found.items() if path.is_file() and (n in code or OF_A_MODEL.fullmatch(n))}
    left = sorted(found.keys() - kept.keys())
    if (directory / "adapter_config.json").exists():  # PEFT's README.md, and code that came with the adapter
        left = [name for name in left if not name.endswith((".py", "README.md"))]
    if left and not quiet:
        shown = ", ".join(left[:20] + ["…"] * (len(left) > 20))
        note(f"not copied from {directory}: {shown} (not files of a model)")
    return kept


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter, and not a model."""
    path = Path(directory)
    return (path / "adapter_config.json").is_file() and not any(path.glob("model*.safetensors"))


def tokenizer_beside(adapter: Path) -> Path | None:
    """An adapter's directory, where it holds the tokenizer that the adapter was trained with; else None."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else None


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a json file. It is there whole or not at all: a run is known as finished by one."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.rename(file)


def apply_umask(directory: Path) -> None:
    """Give the safetensors files of a directory the mode that the umask says. safetensors 0.8 writes 0600, which
    another user's server cannot read; goes with the release that does not."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in directory.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # some network disks have no modes
            file.chmod(0o666 & ~umask)
