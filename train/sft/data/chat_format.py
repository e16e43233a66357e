"""A conversation → the text that is trained on, and which of its characters the model has to say.

All is found by rendering with the tokenizer's own chat template: no marker is known here, no special token searched
for, and a template that does not exist yet is treated like those that do.

Bad rows: one that says no_think and carries thinking, whose thinking stands in two places and differs, or whose
history the template changes once the answer is there.
"""

import functools
import re
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase, PythonBackend, TokenizersBackend
from transformers.utils.chat_template_utils import _compile_jinja_template

from sft.data.rows import THINKING, BadRow

SOME_TIME = datetime(2025, 1, 1, tzinfo=UTC)  # what a template that prints the time gets where a row has none


# Counted while rows are rendered, and said after them, because they are easily wrong and never an error.
WARNINGS = {
    "no_think_with_thinking": "/no_think in the user's text, but the answer's think block is not empty",
    "without_thinking": "assistant turns without a think block: the model learns to answer without thinking",
    "against_prompt": "assistant turns that begin otherwise than the generation prompt that inference hands the model "
    "(thinking under enable_thinking false, no_think or a template that closes the block: set it in the row)",
    "thinking_left_out": "assistant turns whose thinking the template leaves out",
    "text_left_out": "messages whose text the template leaves out",
    "without_end": "assistant turns that the template ends with no token of its own: the model does not learn to stop",
    "tools_left_out": "times tools or tool calls are left out by the template (some render calls only beside tools)",
}


# ---------------------------------------------------------------------------------------------------------- thinking


USER_ASKS, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "zxq9"}  # to try a template


class Ending(NamedTuple):
    """How a template ends the last turn.

    `left_out` is the text that ends it where the plain render leaves it out; `is_training` gives it (Hy3), or it is
    known from turns before others. `after` is what the template writes after it, which no model has to say.
    """

    left_out: str
    rendered: bool
    in_training: bool
    after: str


class Said(NamedTuple):
    """An assistant's message: its thinking (None: it has none), the answer, and where the thinking stands."""

    thinking: str | None
    answer: str
    inside: bool


def what_is_said(message: dict) -> Said:
    """Take thinking and answer apart: thinking in a field of its own, or in the think/answer pattern in `content`.

    The pattern's own newlines go, one at each side; the one before `</think>` may be missing.
    """
    content = message.get("content") or ""
    own = next((message[name] for name in THINKING if message.get(name) is not None), None)
    head, closed, rest = content.partition("</think>")
    if closed and head.lstrip().startswith("<think>"):
        if not rest.lstrip().startswith("<answer>"):
            # a think block that quotes its own end is closed where the answer opens
            before, again, after = content.partition("</think>\n<answer>")
            head, rest = (before, "\n<answer>" + after) if again else (head, rest)
        thinking = head.lstrip().removeprefix("<think>").removeprefix("\n").removesuffix("\n")
        answer = rest.lstrip("\n")
        if answer.startswith("<answer>") and answer.rstrip().endswith("</answer>"):
            answer = answer.removeprefix("<answer>").rstrip().removesuffix("</answer>")
            answer = answer.removeprefix("\n").removesuffix("\n")
        if own and own.strip() and own.strip() != thinking.strip():
            raise BadRow("thinking stands both in a field of its own and in the content, and differs")
        return Said(thinking, answer, inside=True)
    return Said(own, content, inside=False)


# ------------------------------------------------------------------------------------------------------------ template


class ChatFormat:
    """What a tokenizer's chat template does, found by rendering small conversations with it.

    Attributes:
        reads_thinking: it renders a message's `reasoning_content`; otherwise thinking goes into the content.
        thinks: the models of this template think.
        needs_text: it fails on tool calls without content; they get an empty one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        template_text = template if isinstance(template, str) else "\n".join(template.values())
        self.template = re.sub(r"\{#.*?#\}", "", template_text, flags=re.DOTALL)  # less its comments
        tokenizer("", add_special_tokens=False)  # leaves no truncation or padding set
        self.prints_time = "strftime_now" in self.template
        self.takes_tools = "tools" in self.template or not isinstance(template, str)
        self.special_tokens = tokenizer.special_tokens_map
        self.own_rendering = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        function = {"name": "f", "arguments": {"x": "y"}, "parameters": {}}
        tools = [{"type": "function", "function": function}]
        calls, thinking = USER_ASKS | {"tool_calls": tools, "role": "assistant"}, {"reasoning_content": "vwk8"}
        self.reads_thinking = any(
            "vwk8" in self.try_render([USER_ASKS, answer | thinking], tools=given, **way)
            for answer, given in ((ANSWER, None), (calls, tools))
            for way in ({}, {"reasoning_effort": "high"}, {"enable_thinking": True})
        )
        self.thinks = self.reads_thinking or "think" in self.template
        self.needs_text = not self.try_render([USER_ASKS, calls | {"content": None}], tools=tools)
        self.ids = TokenIds(tokenizer)

    @functools.cache  # noqa: B019 (one object a run)
    def ending(self, **options) -> "Ending":
        """How the last turn ends, under a row's options."""
        tokenizer = self.tokenizer
        special = sorted({*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder} - {tokenizer.eos_token})

        def parted(messages: list[dict], **way) -> tuple[str, str]:
            """What follows the answer, parted after the token that ends the turn: `eos_token`, else a special one."""
            tail = self.try_render(messages, **options, **way).partition(ANSWER["content"])[2]
            for tokens in ([tokenizer.eos_token] if tokenizer.eos_token else []), special:
                places = [(tail.index(t), tail.index(t) + len(t)) for t in tokens if t in tail]
                if places:
                    return tail[: min(places)[1]], tail[min(places)[1] :]
            return "", ""

        found, after = parted([USER_ASKS, ANSWER])
        if found:
            return Ending("", True, False, after)
        found, after = parted([USER_ASKS, ANSWER], is_training=True)
        if found:
            return Ending(found, True, True, after)
        # after an answer that is not the last; any other token there may as well begin the next turn
        found = parted([USER_ASKS, ANSWER, USER_ASKS])[0]
        return Ending(found if found == tokenizer.eos_token else "", False, False, "")

    def try_render(self, messages: list[dict], **options) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception:  # a template may raise anything
            return ""

    def options(self, row: dict) -> dict:
        return {name: row[name] for name in ("reasoning_effort", "enable_thinking") if row.get(name) is not None}

    def renderer(self, row: dict, messages: list[dict]):
        """A function of (number of messages, options) that renders the row's first messages, each once.

        It does what apply_chat_template does, less its checks and copies of every message. And it hands over the time,
        for a template that prints it: tokens are then the same on every rank and run.
        """
        tools, options = row.get("tools"), self.options(row)
        if self.own_rendering:  # the tokenizer's code brings an apply_chat_template of its own

            def render(upto: int, **more) -> str:
                return self.tokenizer.apply_chat_template(
                    messages[:upto], tools=tools, tokenize=False, **options, **more
                )
        else:
            template = _compile_jinja_template(self.tokenizer.get_chat_template(None, tools))
            options |= {"strftime_now": lambda form: time_of(row).strftime(form)} if self.prints_time else {}
            fixed = self.special_tokens | {"tools": tools, "documents": None, "add_generation_prompt": False} | options

            def render(upto: int, **more) -> str:
                return template.render(messages=messages[:upto], **fixed | more)

        return functools.lru_cache(maxsize=8)(render)  # neighbouring turns share renders

    def messages(self, row: dict, counts: dict[str, int]) -> tuple[list[dict], dict[int, Said]]:
        """The row's messages as the template gets them: an empty system message left out (the released A13B template
        refuses it), thinking where the template reads it. All else as it is.

        Returns them, and what is said in each of the assistant's by its place.
        """
        says_no_think = row.get("reasoning_effort") == "no_think" or row.get("enable_thinking") is False
        messages, spoken, asked_not_to = [], {}, False
        for i, message in enumerate(row["messages"]):
            if message["role"] == "system" and not message["content"]:
                continue
            if message["role"] == "user":
                asked_not_to = message["content"].lstrip().startswith("/no_think")
            if message["role"] == "assistant":
                spoken[len(messages)] = said = what_is_said(message)
                if said.thinking and said.thinking.strip():
                    if says_no_think:
                        raise BadRow(
                            f"the row says no_think, but messages[{i}] carries thinking: one of them is wrong"
                        )
                    counts["no_think_with_thinking"] += asked_not_to
                counts["without_thinking"] += self.thinks and not says_no_think and said.thinking is None
                none = said.thinking is None or not (said.thinking or said.inside or self.thinks)
                if not none and said.inside == self.reads_thinking:
                    message = {name: value for name, value in message.items() if name not in THINKING}
                    if self.reads_thinking:
                        message |= {"reasoning_content": said.thinking, "content": said.answer}
                    else:
                        block = f"<think>\n{said.thinking}\n</think>\n"
                        answer = f"<answer>\n{said.answer}\n</answer>"
                        calls_only = message.get("tool_calls") and not said.answer
                        message |= {"content": block if calls_only else block + answer}
            # as apply_chat_template does: templates test for a key, and know thinking by more than one name
            if None in message.values():
                if message.get("content") is None and self.needs_text:
                    message = message | {"content": ""}
                message = {name: value for name, value in message.items() if value is not None}
            if (own := next((message[name] for name in THINKING if name in message), None)) is not None:
                message = {"thinking": own, **message, "reasoning_content": own}
            messages.append(message)
        return messages, spoken

    def sequences(self, row: dict, train_on: str, counts: dict[str, int]) -> list[tuple[str, list[tuple[int, int]]]]:
        """Render a conversation and find what the model has to say in it.

        An assistant's turn begins where the render of what came before, with the generation prompt, stops agreeing
        with the render of the turn itself; it ends with the token that ends the turn.

        Returns one (text, [(first character, end)]), or, where the template rewrites earlier turns once a later one is
        there, one for each state that inference would see. A row's first text may have no span.
        """
        messages, spoken = self.messages(row, counts)
        render, ending = self.renderer(row, messages), self.ending(**self.options(row))
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        wanted = [i for i in spoken if messages[i].get("weight") != 0 and (train_on == "all" or i > last_user)]
        counts["turns"] += len(spoken)
        counts["turns_not_trained_on"] += len(spoken) - len(wanted)
        whole = self.said(render, ending, len(messages)) if len(messages) - 1 in spoken else render(len(messages))
        text, spans = whole, []
        sequences = [(text, spans)]
        for i in reversed(wanted):
            asked, said = render(i, add_generation_prompt=True), self.said(render, ending, i + 1)
            start = agreement(asked, said)
            if start < len(asked):
                if start < agreement(asked, render(i).removesuffix(ending.after)):
                    raise BadRow(f"the template changes what stands before messages[{i}] once its answer is there")
                counts["against_prompt"] += 1
            counts["without_end"] += not (ending.rendered or ending.left_out)
            body = said.removesuffix(ending.after)
            if not text.startswith(body):
                text, spans = said, []
                sequences.insert(0, (text, spans))
            spans.insert(0, (start, len(body)))
            own, answer = spoken[i].thinking, spoken[i].answer.strip()
            counts["thinking_left_out"] += bool(own) and own.strip() not in said[start:]
            counts["text_left_out"] += bool(answer) and answer not in said[start:]
            called = [call.get("function") for call in messages[i].get("tool_calls") or []]
            names = [str(function.get("name", "")) for function in called if isinstance(function, dict)]
            counts["tools_left_out"] += any(name not in said[start:] for name in names)
        for message in messages:
            given = message["role"] != "assistant" and message["content"].strip()
            counts["text_left_out"] += bool(given) and given not in whole
        counts["tools_left_out"] += bool(row.get("tools")) and not self.takes_tools
        return [sequence for sequence in sequences if sequence[1]] or sequences[:1]

    def said(self, render, ending: Ending, upto: int) -> str:
        """The render of a conversation whose last message is the assistant's, ended as the model has to end it."""
        if ending.in_training:  # unless that changes what stands before the turn, too
            trained = render(upto, is_training=True)
            if trained.startswith(render(upto - 1, add_generation_prompt=True)) or trained.startswith(render(upto)):
                return trained
        text = render(upto)
        return text if text.endswith(ending.left_out + ending.after) else text + ending.left_out

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token of a byte-level vocabulary stands for (vocabulary,)."""
        byte_level = {chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
        byte_level |= {chr(256 + i) for i in range(68)}  # the characters that byte-level BPE writes other bytes as
        added = self.tokenizer.added_tokens_decoder
        lengths = np.zeros(len(self.tokenizer), np.int64)
        for i, token in enumerate(self.tokenizer.convert_ids_to_tokens(range(len(lengths)))):
            if i not in added and isinstance(token, str) and byte_level.issuperset(token):
                lengths[i] = len(token)
            elif token is not None:
                lengths[i] = len(token.encode() if isinstance(token, str) else token)
        return lengths

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """What apply_chat_template makes of each rendered text: the tokenizer's own call, less its checks."""
        tokenizer, cls = self.tokenizer, type(self.tokenizer)
        if tokenizer.is_fast and cls._encode_plus is TokenizersBackend._encode_plus:
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        if not tokenizer.is_fast and cls._encode_plus is PythonBackend._encode_plus:
            return [[self.ids[token] for token in tokenizer.tokenize(text)] for text in texts]
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def tokenize_all(self, texts: list[str]) -> list[list[int] | None]:
        """The same; None for a text that the tokenizer does not take."""
        try:
            return self.tokenize(texts) if texts else []
        except Exception:  # one of them fails all: parted until it stands alone
            half = len(texts) // 2
            return self.tokenize_all(texts[:half]) + self.tokenize_all(texts[half:]) if half else [None]

    def tokens_before(self, text: str, ids: np.ndarray, places: list[int]) -> list[int]:
        """For each place (in characters) the number of tokens that lie wholly before it."""
        ends = np.cumsum(self.token_bytes[ids])
        if len(ends) and ends[-1] == len(text.encode()):
            cuts = [len(text[:place].encode()) for place in places]
            return np.searchsorted(ends, cuts, side="right").tolist()
        # not a byte-level vocabulary, or text that the tokenizer normalises: where tokens stop agreeing
        return [
            len(ids) if place == len(text) else agreement(self.tokenize([text[:place]])[0], ids.tolist())
            for place in places
        ]


class TokenIds(dict):
    """Token → id, filled as tokens are met."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __missing__(self, token: str | bytes) -> int:
        self[token] = self.tokenizer.convert_tokens_to_ids([token])[0]
        return self[token]


def agreement(a: str | list[int], b: str | list[int]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def time_of(row: dict) -> datetime:
    """A row's `time`: an ISO 8601 text or seconds since 1970 (UTC)."""
    time = row.get("time")
    try:
        if isinstance(time, str):
            return datetime.fromisoformat(time)
        return SOME_TIME if time is None else datetime.fromtimestamp(time, UTC)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise BadRow('"time", which the template prints, is neither ISO 8601 nor seconds since 1970') from error
