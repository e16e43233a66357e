"""What from_pretrained loads, of every generation, whole or not at all.

Refused (exit code 2): a tokenizer that does not load or has no chat template; a model or an adapter that does not load
whole; code that may not run.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sft.messages import Refused, choice, first_few, in_one_line
from sft.model.directory import ModelDirectory
from sft.model.files import ADAPTER_FILE, OF_A_TOKENIZER
from sft.model.generations import native_class, why_not_native
from sft.model.head import put_head
from sft.model.weight_files import open_tensors


def load_tokenizer(path: Path, trusted: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. Refuses one that is not there, does not load or has no chat template."""
    if not any(OF_A_TOKENIZER.fullmatch(file.name) for file in path.glob("*")):
        how = "Copy it there, or train with --tokenizer_name_or_path DIR (TOKENIZER_PATH of train.sh)"
        raise Refused(f"{path}: holds no tokenizer. {how}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
    except Exception as error:  # the directory's own code may raise anything
        raise Refused(f"the tokenizer in {path} does not load: {reason(error, trusted)}") from error
    if not tokenizer.chat_template:
        raise Refused(f"the tokenizer in {path} has no chat template: rows cannot be rendered")
    return tokenizer


def reason(error: Exception, trusted: bool) -> str:
    """What an error of from_pretrained says; where code may not run that is needed, how to allow it."""
    if not trusted and "trust_remote" in str(error):
        return "it needs code that the directory brings: allow that (--trust_remote_code)"
    return f"{type(error).__name__}: {in_one_line(error)}"


def load_pretrained(directory: ModelDirectory, **options: Any) -> PreTrainedModel:
    """The model of a directory of any generation, by the code that computes it; options as from_pretrained takes them.
    Refuses one that does not load, or not whole."""
    directory.check()
    path = str(directory.path)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # these are refused, with their names
    try:
        if directory.runs_own_code and directory.brings_old_code:
            from sft.model.remote_code_441 import load_with_own_code

            choice("model code", "the directory's own", why_not_native(directory.config) or "--model_code remote")
            model, info = load_with_own_code(directory, **options)
        elif directory.runs_own_code:
            model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
        else:
            cls, config = native_class(directory)
            if directory.brings_old_code:
                name = cls.__name__.removesuffix("ForCausalLM")
                choice("model code", f"transformers' {name}", "it computes the same model, faster")
            directory.check_tensors(cls, config)
            model, info = cls.from_pretrained(path, config=config, **options)
    except (Refused, torch.cuda.OutOfMemoryError):
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise Refused(f"{directory.name}: does not load: {reason(error, directory.trusted)}") from error
    # What check_tensors does not know: weights of other code, or in other files.
    mismatched = sorted(name for name, *_ in info["mismatched_keys"])
    directory.refuse_weights(missing=sorted(info["missing_keys"]), mismatched=mismatched)
    put_head(model)
    return model


def load_adapter(model: PreTrainedModel, adapter: Path, is_trainable: bool = False) -> PreTrainedModel:
    """The model with the adapter on it. Refuses one that does not apply whole: PEFT would leave parts of it out, or
    begin them afresh, with a warning at most."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
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
