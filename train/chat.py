"""Try what was trained: chat with a model directory or a LoRA adapter.

    python chat.py                            # the newest model under train/output
    python chat.py MODEL_DIR --no_think       # fast thinking
    python chat.py BASE_DIR --adapter DIR     # an adapter on this base instead of the one that it names
    python chat.py --prompt "你好"             # one reply, and nothing else, on stdout

In the conversation /reset forgets what was said, /quit or end of file leaves, and Ctrl-C stops a reply. Runs the code
that a model directory brings with it, unless --trust_remote_code false is given. Refused (exit code 2): a directory
without model or chat template, weights that are missing, an adapter whose base is not there, that does not fit it
whole or that was trained on another base.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import sft  # noqa: F401  first: it says what is missing

# isort: split
import torch
from jinja2 import TemplateError

from sft.messages import OUTPUT_ROOT, Parser, Refused, newest, run_script
from sft.model.adapter_base import check_base, named_base
from sft.model.directory import ModelDirectory
from sft.model.files import ADAPTER_FILE, is_adapter, tokenizer_beside
from sft.model.generations import report_code
from sft.model.weight_files import BIN_INDEX, INDEX

MODEL_FILES = ("model.safetensors", INDEX, "pytorch_model.bin", BIN_INDEX)


def note(message: str) -> None:
    """Print one line on stderr: stdout is for the replies."""
    print(message, file=sys.stderr, flush=True)


def choose(model_dir: str | None, adapter_dir: str | None) -> tuple[Path, Path | None]:
    """(model directory, adapter directory or None) from what was given; refuses what is neither."""
    model, adapter, why = model_dir and Path(model_dir), adapter_dir and Path(adapter_dir), "given"
    if not model and not adapter:
        model, why = newest(OUTPUT_ROOT, (ADAPTER_FILE, *MODEL_FILES)), "newest under train/output"
        if not model:
            raise Refused("no model under train/output; train one with train.sh, or give a model directory")
    if model and is_adapter(model) and not adapter:
        model, adapter = None, model
    if adapter:
        if not is_adapter(adapter):
            raise Refused(f"{adapter}: no adapter here")
        note(f"adapter = {adapter} ({why})")
        if not model:
            model, why = named_base(adapter, None, f"BASE_DIR --adapter {adapter}"), "named by adapter_config.json"
    note(f"model = {model} ({why})")
    return model, adapter


def load(model_dir: Path, adapter: Path | None, any_base: bool, trusted: bool) -> tuple[Any, Any]:
    """(tokenizer, model) ready to generate: on the GPUs if there are any, in the dtype that config.json says."""
    from sft.model import pretrained  # takes seconds: only once the paths are right

    gpu = torch.cuda.is_available()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers
        directory = ModelDirectory(model_dir, adapter and tokenizer_beside(adapter), trusted, trusted)
        directory.check()
        if adapter:
            check_base(adapter, directory, any_base)
        report_code(directory)
        tokenizer = pretrained.load_tokenizer(directory.tokenizer_path, trusted)
        model = pretrained.load_pretrained(directory, dtype="auto", device_map="auto" if gpu else None)
        if adapter:
            model = pretrained.load_adapter(model, adapter)
    note(f"device = {model.device} ({'GPU' if gpu else 'no GPU'})\ndtype = {str(model.dtype)[6:]} (config.json)")
    return tokenizer, model.eval()


def thinking_off(tokenizer: Any) -> tuple[dict[str, Any], str]:
    """(arguments for the chat template, text before the user's): what makes this model answer without thinking."""
    template = tokenizer.get_chat_template()
    if "enable_thinking" in template:
        return {"enable_thinking": False}, ""
    if "reasoning_effort" in template:
        return {"reasoning_effort": "no_think"}, ""
    return {}, "/no_think"


def reply(tokenizer: Any, model: Any, messages: list[dict[str, str]], template: dict[str, Any], **options: Any) -> str:
    """Generate the next assistant message, printing it on stdout as it comes; returns it without special tokens."""
    from transformers import TextStreamer

    template = template | {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    try:
        inputs = tokenizer.apply_chat_template(messages, **template).to(model.device)
    except TemplateError as error:
        raise Refused(f"{tokenizer.name_or_path}: the chat template fails: {error}") from None
    inputs.pop("token_type_ids", None)  # generate() refuses what the model does not take
    own = model.generation_config.eos_token_id
    ends = sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        output = model.generate(**inputs, **options, eos_token_id=ends or None, pad_token_id=pad, streamer=streamer)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> None:
    """Choose and load, then one reply or a conversation."""
    # 1. What is asked for
    parser = Parser(description="Chat with a model directory or a LoRA adapter.", allow_abbrev=False)
    parser.add_argument("model_dir", nargs="?", help="model or adapter directory (default: newest under train/output)")
    parser.add_argument("--adapter", help="LoRA adapter directory, for MODEL_DIR or for the base that it names")
    parser.add_argument("--prompt", help="answer this and end, with nothing but the reply on stdout")
    parser.add_argument("--no_think", action="store_true", help="fast thinking: answer at once")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="tokens a reply at most (default: 1024)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (default)")
    parser.add_argument("--any_base", action="store_true", help="use an adapter on another base than its own")
    parser.add_trust()
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise Refused(f"--max_new_tokens {args.max_new_tokens}: must be 1 or more")
    if not 0 <= args.temperature < float("inf"):
        raise Refused(f"--temperature {args.temperature}: must be 0 or more")

    # 2. Which model, and how it generates
    tokenizer, model = load(*choose(args.model_dir, args.adapter), args.any_base, args.trust_remote_code)
    template, before = thinking_off(tokenizer) if args.no_think else ({}, "")
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    options |= {"temperature": args.temperature or None}

    # 3. One reply
    if args.prompt is not None:
        reply(tokenizer, model, [{"role": "user", "content": before + args.prompt}], template, **options)
        return

    # 4. A conversation
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit a line)
    note("/reset forgets the conversation, /quit leaves")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/quit":
            return
        if text == "/reset":
            messages = []
        elif text:
            messages.append({"role": "user", "content": before + text})
            try:
                content = reply(tokenizer, model, messages, template, **options)
                messages.append({"role": "assistant", "content": content})
            except KeyboardInterrupt:
                messages.pop()
                note("\nstopped; this question is forgotten")


if __name__ == "__main__":
    run_script(main)
