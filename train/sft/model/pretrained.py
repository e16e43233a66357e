"""What from_pretrained loads, of every generation, whole or not at all.

Refused (exit code 2): a tokenizer that does not load or has no chat template; a model or an adapter that does not load
whole; code that may not run.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sft.messages import Refused, choice, first_few, in_one_line
from sft.model.directory import ModelDirectory
from sft.model.files import ADAPTER_FILE, OF_A_TOKENIZER
from sft.model.generations import why_not_native
from sft.model.weight_files import open_tensors

ALLOW = "it needs code that the directory brings: allow that (--trust_remote_code)"
GIVE_IT = "train with --tokenizer_name_or_path DIR (TOKENIZER_PATH of train.sh)"


def load_tokenizer(path: Path, trusted: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. Refuses one that is not there, does not load or has no chat template."""
    if not any(OF_A_TOKENIZER.fullmatch(file.name) for file in path.glob("*")):
        raise Refused(f"{path}: holds no tokenizer. Copy it there, or {GIVE_IT}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
    except Exception as error:  # the directory's own code may raise anything
        why = f"{type(error).__name__}: {in_one_line(error)}" if trusted or "trust_remote" not in str(error) else ALLOW
        raise Refused(f"the tokenizer in {path} does not load: {why}") from error
    if not tokenizer.chat_template:
        raise Refused(f"the tokenizer in {path} has no chat template: rows cannot be rendered")
    return tokenizer


def load_pretrained(directory: ModelDirectory, **options: Any) -> PreTrainedModel:
    """The model of a directory of any generation, by the code that computes it; options as from_pretrained takes them.
    Refuses one that does not load, or not whole."""
    directory.check()
    options |= {"ignore_mismatched_sizes": True}  # they are refused, with their names
    try:
        if directory.brings_old_code:
            model, info = load_old_code(directory, **options)
        else:
            config = AutoConfig.from_pretrained(str(directory.path), trust_remote_code=directory.may_run_code)
            if type(config) in AutoModelForCausalLM._model_mapping:
                directory.check_tensors(AutoModelForCausalLM._model_mapping[type(config)], config)
            options |= {"trust_remote_code": directory.may_run_code, "output_loading_info": True}
            model, info = AutoModelForCausalLM.from_pretrained(str(directory.path), **options)
    except (Refused, torch.cuda.OutOfMemoryError):
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        why = in_one_line(error) if directory.trusted or "trust_remote" not in str(error) else ALLOW
        raise Refused(f"{directory.name}: does not load: {why}") from error
    odd = {}
    for kind in ("missing", "mismatched"):  # of what check_tensors does not know: other code, other files
        odd[kind] = sorted(name if isinstance(name, str) else name[0] for name in info[f"{kind}_keys"])
    directory.refuse_weights(**odd)
    return model


def load_adapter(model: PreTrainedModel, adapter: Path, is_trainable: bool = False) -> PreTrainedModel:
    """The model with the adapter on it. Refuses one that does not apply whole: PEFT would leave parts of it out, or
    begin them afresh, with a warning at most."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=is_trainable)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise Refused(f"{adapter}: the adapter does not load: {in_one_line(error)}") from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    stored = set(open_tensors(adapter / ADAPTER_FILE).keys())
    unplaced = stored - wanted - adapted.state_dict().keys()  # weights of the base, like its head, may be there too
    for names, why in ((wanted - stored, "are missing"), (unplaced, "have no place in the model")):
        if names:
            raise Refused(f"{adapter}: {len(names)} tensors of {ADAPTER_FILE} {why}: {first_few(sorted(names))}")
    return adapted


def load_old_code(directory: ModelDirectory, **options: Any) -> tuple[PreTrainedModel, dict]:
    """The model of a directory with code of transformers 4.41, and what from_pretrained says of it."""
    if directory.runs_own_code:
        from sft.model.remote_code_441 import load_with_own_code

        choice("model code", "the directory's own", why_not_native(directory.config) or "--model_code remote")
        return load_with_own_code(directory, **options)
    cls, config = directory.native_class()
    choice(
        "model code", f"transformers' {cls.__name__.removesuffix('ForCausalLM')}", "it computes the same model, faster"
    )
    directory.check_tensors(cls, config)
    return cls.from_pretrained(str(directory.path), config=config, **options, output_loading_info=True)
