"""An adapter that is given as --model_name_or_path: its base is the model, what it was made with is the run's.

Refused (exit code 2): an adapter of another kind than LoRA, one that names no base, flags that differ from it.
"""

from pathlib import Path
from typing import Any

from sft.messages import Refused, read_json
from sft.model.files import is_adapter, tokenizer_beside

SETTINGS = {  # flag: key of adapter_config.json
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def split_adapter(given: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """(the adapter that is given as the model, the flags that it means); (None, {}) where there is none. Its base
    takes its place in `given`."""
    adapter = Path(given.get("model_name_or_path") or "")
    if not given.get("model_name_or_path") or not is_adapter(adapter):
        return None, {}
    settings = read_json(adapter / "adapter_config.json")
    base = settings.get("base_model_name_or_path")
    if settings.get("peft_type") != "LORA" or not base:
        why = "is no LoRA adapter" if base else "names no base: write its path to base_model_name_or_path there"
        raise Refused(f"--model_name_or_path {adapter}: its adapter_config.json {why}")
    means = {flag: settings[key] for flag, key in SETTINGS.items() if settings.get(key) is not None}
    means["use_lora"] = True
    if differ := {flag: value for flag, value in means.items() if given.get(flag, value) != value}:
        what = ", ".join(f"--{flag} {given[flag]} (the adapter: {value})" for flag, value in differ.items())
        raise Refused(
            f"--model_name_or_path {adapter}: is an adapter, and these differ from it: {what}. Leave them out"
        )
    given["model_name_or_path"] = base
    means["lora_target_modules"] = targets(settings)  # given ones are compared where the model is
    if tokenizer := tokenizer_beside(adapter):
        means["tokenizer_name_or_path"] = str(tokenizer)
    return adapter, means


def targets(settings: dict[str, Any]) -> list[str]:
    """What an adapter is on, as one list."""
    modules = settings.get("target_modules") or []
    return [*([modules] if isinstance(modules, str) else sorted(modules)), *(settings.get("target_parameters") or [])]
