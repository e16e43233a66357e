"""Hub ids: the files that a model or a tokenizer needs are fetched into the hub's cache.

Refused (exit code 2): an id that does not exist, a hub that cannot be reached.
"""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from sft.arguments import ModelArguments
from sft.messages import Refused, in_one_line

# As fnmatch takes it; and not from folders, but for additional_chat_templates.
FETCHED = ["*.json", "*.jsonl", "*.jinja", "*.txt", "*.py", "*.tiktoken", "*.model", "*.vocab"]
FETCHED += ["*LICEN[CS]E*", "*icen[cs]e*", "*NOTICE*", "*otice*"]
NOT_FETCHED = ["[!a]*/*", "a[!d]*/*"]


def fetch(args: ModelArguments) -> None:
    """Bring the files of a hub id here and go on with their directory, as what is saved is laid out like them."""
    for flag in ("model_name_or_path", "tokenizer_name_or_path"):
        path = getattr(args, flag)
        if path is None or looks_local(path):
            continue
        directory = fetch_files(flag, path, ["*.safetensors"] if flag.startswith("model") else [], args.cache_dir)
        if flag.startswith("model") and not any(Path(directory).glob("*.safetensors")):
            fetch_files(flag, path, ["pytorch_model*.bin"], args.cache_dir)
        setattr(args, flag, directory)
        args.hub_ids[directory] = path


def fetch_files(flag: str, path: str, weights: list[str], cache_dir: str | None) -> str:
    """The directory of the cache with a hub id's files; refuses what is not there, or cannot be reached."""
    patterns = FETCHED + weights
    try:
        return snapshot_download(path, cache_dir=cache_dir, allow_patterns=patterns, ignore_patterns=NOT_FETCHED)
    except (OSError, ValueError) as error:
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise Refused(
            f"--{flag} {path}: no such directory (looked in {Path.cwd()}), and not fetched from {hub}: "
            f"{in_one_line(error)[:200]}. Set HF_ENDPOINT to a mirror that this machine reaches, or fetch it first "
            f"(modelscope download --model {path} --local_dir DIR) and give DIR"
        ) from error


def looks_local(path: str) -> bool:
    """Whether a name is meant as a path on this machine and not as `owner/name` on a hub."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
