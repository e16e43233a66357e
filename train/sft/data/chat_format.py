"""A conversation → the text that is trained on, and which of its characters the model has to say.

Everything is found by rendering with the tokenizer's own chat template. No marker and no special token is known here,
so a template that does not exist yet is treated like those that do.

Bad rows: one that says no_think and carries thinking, and one whose history the template changes once the answer is
there.
"""

import functools
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from sft.data.lines import BadRow
from sft.data.thinking import Turn, as_templates_read, move_thinking, split_thinking
from sft.data.tokens import TextEncoder, common_prefix

SOME_TIME = datetime(2025, 1, 1, tzinfo=UTC)  # for a template that prints the time, where a row has none

# a conversation to try a template with; the words occur in no template
QUESTION = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "zxq9"}
THOUGHT = {"reasoning_content": "vwk8"}
TOOLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": "y"}, "parameters": {}}}]
CALL = {"role": "assistant", "content": "u", "tool_calls": TOOLS}

Sequence = tuple[str, list[tuple[int, int]]]  # text, (first character, end) of each stretch that the model has to say


class Ending(NamedTuple):
    """How a template ends the last turn.

    `missing` is the text that ends the turn where a plain render leaves it out, else empty. `is_training` is an option
    that makes the template write it (Hy3 has it). `known` is False where the end was not found. `after` is what the
    template writes after the end, which no model has to say.
    """

    missing: str
    known: bool
    is_training: bool
    after: str


class ChatFormat:
    """What a tokenizer's chat template does, found by rendering small conversations with it.

    Attributes:
        reads_thinking: it renders a message's `reasoning_content`; otherwise thinking goes into the content.
        thinks: the models of this template think.
        needs_text: it fails on tool calls without content; they get an empty one.
        own_rendering: the tokenizer's code has an apply_chat_template of its own, which is then used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        template = tokenizer.chat_template
        texts = [template] if isinstance(template, str) else template.values()
        code = re.sub(r"\{#.*?#\}", "", "\n".join(texts), flags=re.DOTALL)  # without its comments
        self.prints_time = "strftime_now" in code
        self.takes_tools = "tools" in code or not isinstance(template, str)
        self.special_tokens_map = tokenizer.special_tokens_map
        self.own_rendering = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        self.reads_thinking = any(
            THOUGHT["reasoning_content"] in self.try_render([QUESTION, answer | THOUGHT], tools=tools, **switch)
            for answer, tools in ((ANSWER, None), (CALL, TOOLS))
            for switch in ({}, {"reasoning_effort": "high"}, {"enable_thinking": True})
        )
        self.thinks = self.reads_thinking or "think" in code
        self.needs_text = not self.try_render([QUESTION, CALL | {"content": None}], tools=TOOLS)

    # --- the template --------------------------------------------------------------------------------------------

    def try_render(self, messages: list[dict], **options) -> str:
        """The rendered text; empty where the template fails."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception:  # a template may raise anything
            return ""

    @functools.cache  # noqa: B019 (one object a run)
    def ending(self, **switches) -> Ending:
        """How the template ends the last turn, with a row's switches."""
        end, after = self.split_at_end_token([QUESTION, ANSWER], **switches)
        if end:
            return Ending("", known=True, is_training=False, after=after)
        end, after = self.split_at_end_token([QUESTION, ANSWER], is_training=True, **switches)
        if end:
            return Ending(end, known=True, is_training=True, after=after)
        # what ends a turn before others; a token other than eos_token may as well begin the next turn
        end, _ = self.split_at_end_token([QUESTION, ANSWER, QUESTION], **switches)
        if end == self.tokenizer.eos_token:
            return Ending(end, known=True, is_training=False, after="")
        return Ending("", known=False, is_training=False, after="")

    def split_at_end_token(self, messages: list[dict], **options) -> tuple[str, str]:
        """What is rendered after ANSWER, split behind the token that ends the turn.

        That token is `eos_token`, else the first special token. Both parts are empty where there is none.
        """
        tail = self.try_render(messages, **options).partition(ANSWER["content"])[2]
        eos = {self.tokenizer.eos_token} - {None}
        others = {*self.tokenizer.all_special_tokens, *self.tokenizer.added_tokens_encoder} - eos
        for tokens in (eos, others):
            found = [(tail.index(token), token) for token in tokens if token in tail]
            if found:
                start, token = min(found)
                end = start + len(token)
                return tail[:end], tail[end:]
        return "", ""

    def renderer(self, row: dict, messages: list[dict]) -> Callable[..., str]:
        """A function of (number of messages, further options) that renders the row's first messages.

        It does what apply_chat_template does, less checks and copies that cost up to 14 % of all rows per second. And
        it sets the time for a template that prints it, so that tokens are the same on every rank and run;
        apply_chat_template lets no function through.
        """
        tools, options = row.get("tools"), switches_of(row)
        render: Callable[..., str]
        if self.own_rendering:
            render = functools.partial(self.tokenizer.apply_chat_template, tools=tools, tokenize=False, **options)
        else:
            variables = {"tools": tools, "documents": None, "add_generation_prompt": False}
            variables = self.special_tokens_map | variables | options
            if self.prints_time:
                variables["strftime_now"] = lambda form: time_of(row).strftime(form)
            template = _compile_jinja_template(self.tokenizer.get_chat_template(None, tools))
            render = lambda messages, **more: template.render(messages=messages, **variables | more)

        # kept, as neighbouring turns need the same renders
        return functools.lru_cache(maxsize=8)(lambda upto, **more: render(messages[:upto], **more))

    # --- a row -------------------------------------------------------------------------------------------------------

    def prepare(self, row: dict, counts: dict[str, int]) -> tuple[list[dict], dict[int, Turn]]:
        """The row's messages as the template gets them, and the assistant's turns by their place among these.

        An empty system message is left out (the released A13B template refuses it); thinking is moved to where the
        template reads it. All else stays as it is.
        """
        no_think = row.get("reasoning_effort") == "no_think" or row.get("enable_thinking") is False
        asked_not_to_think = False
        messages: list[dict] = []
        turns: dict[int, Turn] = {}
        for i, message in enumerate(row["messages"]):
            if message["role"] == "system" and not message["content"]:
                continue
            if message["role"] == "user":
                asked_not_to_think = message["content"].lstrip().startswith("/no_think")
            if message["role"] == "assistant":
                turn = turns[len(messages)] = split_thinking(message)
                if turn.thinking and turn.thinking.strip():
                    if no_think:
                        where = f"messages[{i}]"
                        raise BadRow(f"the row says no_think, but {where} carries thinking: one of them is wrong")
                    counts["no_think_with_thinking"] += asked_not_to_think
                counts["without_thinking"] += self.thinks and not no_think and turn.thinking is None
                if self.is_misplaced(turn):
                    message = move_thinking(message, turn, to_field=self.reads_thinking)
                if message.get("content") is None and self.needs_text:
                    message = message | {"content": ""}
            messages.append(as_templates_read(message))
        return messages, turns

    def is_misplaced(self, turn: Turn) -> bool:
        """Whether a turn has thinking, and where the template does not read it."""
        if turn.thinking is None or turn.in_content != self.reads_thinking:
            return False
        # an empty field is no thinking where models do not think
        return bool(turn.thinking) or turn.in_content or self.thinks

    def sequences(self, row: dict, train_on: str, counts: dict[str, int]) -> list[Sequence]:
        """Render a conversation, and find what the model has to say in it.

        Returns one sequence, or several where the template rewrites earlier turns once a later one is there: one for
        each state that inference would see. Only the first of a row may have nothing to say. Counts the warnings of
        report.py.
        """
        messages, turns = self.prepare(row, counts)
        render, ending = self.renderer(row, messages), self.ending(**switches_of(row))
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        trained = [i for i in turns if messages[i].get("weight") != 0 and (train_on == "all" or i > last_user)]
        counts["turns"] += len(turns)
        counts["turns_not_trained_on"] += len(turns) - len(trained)
        last = len(messages) - 1
        whole = render_turn(render, ending, last) if last in turns else render(len(messages))
        # from the last turn back: a turn joins the sequence that holds its text as it was then, else it begins its own
        text = whole
        spans: list[tuple[int, int]] = []
        sequences = [(text, spans)]
        for i in reversed(trained):
            rendered = render_turn(render, ending, i)
            start = self.turn_start(render, ending, i, rendered, counts)
            turn_text = rendered.removesuffix(ending.after)
            if not text.startswith(turn_text):
                text, spans = rendered, []
                sequences.insert(0, (text, spans))
            spans.insert(0, (start, len(turn_text)))
            counts["without_end"] += not ending.known
            count_left_out(messages[i], turns[i], rendered[start:], counts)
        for message in messages:
            if message["role"] != "assistant":
                counts["text_left_out"] += message["content"].strip() not in whole
        counts["tools_left_out"] += bool(row.get("tools")) and not self.takes_tools
        return [sequence for sequence in sequences if sequence[1]] or sequences[:1]

    def turn_start(self, render, ending: Ending, i: int, rendered: str, counts: dict[str, int]) -> int:
        """The place where the model begins to write turn i: where the rendered turn leaves the prompt of inference.

        Raises BadRow where it leaves the history before the generation prompt: the template rewrites it then.
        """
        prompt = render(i, add_generation_prompt=True)
        start = common_prefix(prompt, rendered)
        if start < len(prompt):
            history = render(i).removesuffix(ending.after)
            if start < common_prefix(prompt, history):
                raise BadRow(f"the template changes what stands before messages[{i}] once its answer is there")
            counts["against_prompt"] += 1
        return start


def render_turn(render: Callable[..., str], ending: Ending, i: int) -> str:
    """The conversation up to turn i, the assistant's, ended as the model has to end it."""
    if ending.is_training:
        trained = render(i + 1, is_training=True)
        # unless the option changes what stands before the turn, too
        if trained.startswith(render(i, add_generation_prompt=True)) or trained.startswith(render(i + 1)):
            return trained
    text = render(i + 1)
    return text if text.endswith(ending.missing + ending.after) else text + ending.missing


def count_left_out(message: dict, turn: Turn, rendered: str, counts: dict[str, int]) -> None:
    """Count thinking, text and tool calls of a turn that its rendered text does not show."""
    counts["thinking_left_out"] += (turn.thinking or "").strip() not in rendered
    counts["text_left_out"] += turn.answer.strip() not in rendered
    functions = [call.get("function") for call in message.get("tool_calls") or []]
    names = [str(function.get("name", "")) for function in functions if isinstance(function, dict)]
    counts["tools_left_out"] += any(name not in rendered for name in names)


def switches_of(row: dict) -> dict[str, object]:
    """What a row says to the template beside its messages."""
    return {name: row[name] for name in ("reasoning_effort", "enable_thinking") if row.get(name) is not None}


def time_of(row: dict) -> datetime:
    """A row's `time`: an ISO 8601 text or seconds since 1970 (UTC)."""
    time = row.get("time")
    try:
        if isinstance(time, str):
            return datetime.fromisoformat(time)
        return SOME_TIME if time is None else datetime.fromtimestamp(time, UTC)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise BadRow('"time", which the template prints, is neither ISO 8601 nor seconds since 1970') from error
