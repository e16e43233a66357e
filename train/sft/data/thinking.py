"""The thinking of an assistant's message: where a row may have it, and how it is put where the template reads it.

Bad rows: thinking in two places that differs.
"""

from typing import NamedTuple

from sft.data.lines import BadRow
from sft.data.rows import THINKING


class Turn(NamedTuple):
    """What an assistant's message holds. `thinking` is None where there is none; `in_content`: it is in `content`."""

    thinking: str | None
    answer: str
    in_content: bool


def split_thinking(message: dict) -> Turn:
    """Split an assistant's message into thinking and answer.

    Thinking is in a field of its own, or in `content` as `<think>…</think>`, with or without `<answer>…</answer>`
    after it. One newline inside each tag belongs to the tag and may be missing.
    """
    content = message.get("content") or ""
    own_field = next((message[name] for name in THINKING if message.get(name) is not None), None)
    opening, closed, rest = content.partition("</think>")
    if not closed or not opening.lstrip().startswith("<think>"):
        return Turn(own_field, content, in_content=False)
    if not rest.lstrip().startswith("<answer>") and "</think>\n<answer>" in content:
        # the thinking quotes its own end: it really ends where the answer opens
        opening, _, rest = content.partition("</think>\n<answer>")
        rest = "<answer>" + rest
    thinking = without_newlines(opening.lstrip().removeprefix("<think>"))
    answer = rest.lstrip("\n")
    if answer.startswith("<answer>") and answer.rstrip().endswith("</answer>"):
        answer = without_newlines(answer.removeprefix("<answer>").rstrip().removesuffix("</answer>"))
    if own_field and own_field.strip() and own_field.strip() != thinking.strip():
        raise BadRow("thinking is both in a field of its own and in the content, and they differ")
    return Turn(thinking, answer, in_content=True)


def without_newlines(text: str) -> str:
    """Less one newline at each side."""
    return text.removeprefix("\n").removesuffix("\n")


def move_thinking(message: dict, turn: Turn, to_field: bool) -> dict:
    """The message with its thinking in `reasoning_content`, or in `content` in the pattern of the 2025 models."""
    others = {name: value for name, value in message.items() if name not in THINKING}
    if to_field:
        return others | {"reasoning_content": turn.thinking, "content": turn.answer}
    block, answer = in_tags(turn.thinking, f"\n{turn.answer}\n")
    return others | {"content": block + answer if turn.answer or not message.get("tool_calls") else block}


def without_thinking(message: dict, turn: Turn) -> dict:
    """The message with nothing but the answer, and its calls."""
    others = {name: value for name, value in message.items() if name not in THINKING}
    return others | {"content": turn.answer} if turn.in_content else others


def in_tags(thinking: str | None, answer: str) -> tuple[str, str]:
    """The think block and the answer block of the 2025 models."""
    return f"<think>\n{thinking}\n</think>\n", f"<answer>{answer}</answer>"


def is_empty_block(text: str) -> bool:
    """Whether it is a think block without thinking, and nothing else."""
    turn = split_thinking({"content": text})
    return turn.in_content and not turn.thinking and not turn.answer.strip()


def as_templates_read(message: dict) -> dict:
    """What apply_chat_template does first: thinking is under each of the names that templates know."""
    own_field = next((message[name] for name in THINKING if name in message), None)
    if own_field is None:
        return message
    return {"thinking": own_field, **message, "reasoning_content": own_field}
