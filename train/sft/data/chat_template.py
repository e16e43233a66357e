"""What a tokenizer's chat template does, found by rendering small conversations with it.

No marker and no special token is known here, so a template that does not exist yet is treated like those that do.

Bad rows: a reasoning_effort that the template refuses, and a time that it prints and cannot read.
"""

import functools
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from sft.data.lines import BadRow
from sft.data.thinking import as_templates_read
from sft.data.tokens import common_prefix

SOME_TIME = datetime(2025, 1, 1, tzinfo=UTC)  # for a template that prints the time, where a row has none

# a conversation to try a template with; the words occur in no template
QUESTION = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "zxq9"}
THOUGHT = {"reasoning_content": "vwk8"}
TOOLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": "y"}, "parameters": {}}}]
CALL = {"role": "assistant", "content": "u", "tool_calls": TOOLS}

EFFORTS = ("no_think", "none", "minimal", "low", "medium", "high", "xhigh", "max")  # to try, where one is refused

Render = Callable[..., str]


class Ending(NamedTuple):
    """How a template ends the last turn.

    `text` is what ends it, empty where that was not found. `is_missing`: a plain render leaves it out. `is_training`:
    the option of that name makes the template write it (Hy3 has it). `after` is what the template writes after the
    end, which no model has to say.
    """

    text: str = ""
    is_missing: bool = False
    is_training: bool = False
    after: str = ""


class Opening(NamedTuple):
    """How a template opens a turn.

    `written` is what it writes for generation. `unsaid` is the end of that which the turn itself is rendered without:
    in most templates nothing, else the empty think block that enable_thinking false hands over, or what closes the
    block where the turn thinks and the prompt says that it does not. `nothing` is what a turn without any text leaves.
    """

    written: str
    unsaid: str
    nothing: str


class ChatTemplate:
    """What a tokenizer's chat template does, found by rendering small conversations with it.

    Attributes:
        reads_thinking: it renders a message's `reasoning_content`; otherwise thinking goes into the content.
        thinks: the models of this template think.
        own_rendering: the tokenizer's code has an apply_chat_template of its own, which is then used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        texts = [template] if isinstance(template, str) else template.values()
        code = re.sub(r"\{#.*?#\}", "", "\n".join(texts), flags=re.DOTALL)  # without its comments
        self.prints_time = "strftime_now" in code
        self.takes_tools = "tools" in code or not isinstance(template, str)
        self.special_tokens_map = tokenizer.special_tokens_map
        self.own_rendering = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        self.reads_thinking = any(
            THOUGHT["reasoning_content"] in self.try_render([QUESTION, answer | THOUGHT], tools, **switch)
            for answer, tools in ((ANSWER, None), (CALL, TOOLS))
            for switch in ({}, {"reasoning_effort": "high"}, {"enable_thinking": True})
        )
        self.thinks = self.reads_thinking or "think" in code
        self.code = None if self.own_rendering else code

    def reads(self, switch: str) -> bool:
        """Whether the template looks at a variable of this name; the tokenizer's own code may."""
        return self.code is None or re.search(rf"\b{re.escape(switch)}\b", self.code) is not None

    def try_render(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False, **switches
    ) -> str:
        """The rendered text; empty where the template fails."""
        messages = list(map(as_templates_read, messages))
        try:
            render = self.renderer({"tools": tools, "chat_template_kwargs": switches}, messages, messages)
            return render(len(messages), add_generation_prompt=add_generation_prompt)
        except Exception:  # a template may raise anything
            return ""

    @functools.cache  # noqa: B019 (one object a run)
    def ending(self, key: str) -> Ending:
        """How the template ends the last turn, with a row's switches. Raises BadRow for an effort that it refuses."""
        switches = json.loads(key)
        self.check_effort(switches)
        for is_training in (False, True):
            options = switches | {"is_training": True} if is_training else switches
            end, after = self.split_at_end_token([QUESTION, ANSWER], **options)
            if end:
                return Ending(end, is_missing=is_training, is_training=is_training, after=after)
        # what ends a turn before others; a token other than eos_token may as well begin the next turn
        end, _ = self.split_at_end_token([QUESTION, ANSWER, QUESTION], **switches)
        return Ending(end, is_missing=True) if end == self.tokenizer.eos_token else Ending()

    def check_effort(self, switches: dict) -> None:
        """Raise BadRow, which names the values that the template accepts, for a reasoning_effort that it does not."""
        if "reasoning_effort" not in switches or self.try_render([QUESTION], **switches):
            return
        accepted = [e for e in EFFORTS if self.try_render([QUESTION], **switches | {"reasoning_effort": e})]
        if accepted:
            raise BadRow(f'"reasoning_effort" is not one that the chat template accepts: {", ".join(accepted)}')

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

    @functools.cache  # noqa: B019
    def opening(self, key: str, has_tools: bool, thinks: bool = False) -> Opening:
        """How the template opens a turn, with a row's switches, with and without tools, a turn that thinks or not."""
        tools, switches = TOOLS if has_tools else None, json.loads(key)
        ending = self.ending(key)
        history = self.try_render([QUESTION], tools, **switches).removesuffix(ending.after)
        prompt = self.try_render([QUESTION], tools, add_generation_prompt=True, **switches)
        turn = self.try_render([QUESTION, ANSWER | THOUGHT if thinks else ANSWER], tools, **switches)
        empty = self.try_render([QUESTION, ANSWER | {"content": ""}], tools, **switches).removesuffix(ending.after)
        written, unsaid = prompt.removeprefix(history), prompt[common_prefix(prompt, turn) :]
        if not written.endswith(unsaid):
            unsaid = ""  # it reaches into the history, which the template changes once there is an answer
        nothing = empty[len(prompt if empty.startswith(prompt) else prompt.removesuffix(unsaid)) :]
        return Opening(written, unsaid, nothing + ending.text if ending.is_missing else nothing)

    @functools.cache  # noqa: B019
    def speaks_first(self, has_tools: bool) -> bool:
        """Whether the template writes text of the model before a turn's content: thinking in it would come late."""
        tools = TOOLS if has_tools else None
        prompt = self.try_render([QUESTION], tools, add_generation_prompt=True)
        turn = self.try_render([QUESTION, ANSWER], tools)
        return turn[common_prefix(prompt, turn) :].find(ANSWER["content"]) > 0

    def renderer(self, row: dict, messages: list[dict], past: list[dict]) -> Render:
        """A function that renders the row's first `number` messages as they are once later ones are there. With `turn`
        the next message follows, as it is where it is the last one. More options go to the template.

        It does what apply_chat_template does, less checks and copies that cost up to 14 % of all rows per second. And
        it sets the time for a template that prints it, so that tokens are the same on every rank and run;
        apply_chat_template lets no function through.
        """
        tools, options = row.get("tools"), switches_of(row)
        render: Callable[..., str]
        if self.own_rendering:
            render = functools.partial(self.tokenizer.apply_chat_template, tools=tools, tokenize=False, **options)
        else:
            variables = self.special_tokens_map | {"documents": None} | options
            variables |= {"tools": tools, "add_generation_prompt": False}
            if self.prints_time:
                variables["strftime_now"] = lambda form: time_of(row).strftime(form)
            template = _compile_jinja_template(self.tokenizer.get_chat_template(None, tools))
            render = lambda messages, **more: template.render(messages=messages, **variables | more)

        # kept, as neighbouring turns need the same renders
        return functools.lru_cache(maxsize=8)(
            lambda number, turn=False, **more: render(past[:number] + messages[number : number + turn], **more)
        )


def ended(render: Render, ending: Ending, number: int, turn: bool = False) -> str:
    """The conversation of `number` messages, with `turn` of the next as well, ended as the model has to end it."""
    text = render(number, turn)
    if ending.is_training:
        trained = render(number, turn, is_training=True)
        # unless the option changes what stands before the turn, too
        if trained.startswith((render(number, add_generation_prompt=True), text)):
            return trained
    return text if not ending.is_missing or text.endswith(ending.text) else text + ending.text


def switches_of(row: dict) -> dict[str, object]:
    """What a row says to the template beside its messages."""
    own = {name: row[name] for name in ("reasoning_effort", "enable_thinking") if row.get(name) is not None}
    return {**(row.get("chat_template_kwargs") or {}), **own}


def time_of(row: dict) -> datetime:
    """A row's `time`: an ISO 8601 text or seconds since 1970 (UTC)."""
    time = row.get("time")
    try:
        if isinstance(time, str):
            return datetime.fromisoformat(time)
        return SOME_TIME if time is None else datetime.fromtimestamp(time, UTC)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise BadRow('"time", which the template prints, is neither ISO 8601 nor seconds since 1970') from error
