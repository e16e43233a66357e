"""A conversation → the text that is trained on, and which of its characters the model has to say.

Everything is found by rendering with the tokenizer's own chat template.

Bad rows: one that says no_think and carries thinking, and one where the template does not put a turn behind the prompt
that inference would see.
"""

import json
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sft.data.chat_template import ChatTemplate, Ending, Render, ended, switches_of
from sft.data.lines import BadRow
from sft.data.thinking import (
    Turn,
    as_templates_read,
    in_tags,
    is_empty_block,
    move_thinking,
    split_thinking,
    without_thinking,
)
from sft.data.tokens import TextEncoder

Rendered = tuple[str, list[tuple[int, int]]]  # text, (first character, end) of each stretch that the model has to say


class Chat(NamedTuple):
    """A conversation as the template gets it, and what is known of it.

    Attributes:
        messages: each as it is where it is the last one.
        past: the same as they are once a later one is there.
        places: where each stands in the row.
        turns: the assistant's turns by their place among these.
        wraps: thinking stands in front of what the template writes of a turn.
        key: the row's switches, as JSON; has_tools: it has tools. Both decide how a template opens and ends turns.
    """

    messages: list[dict]
    past: list[dict]
    places: list[int]
    turns: dict[int, Turn]
    wraps: bool
    key: str
    has_tools: bool


class ChatFormat(ChatTemplate):
    """Rows through one tokenizer's chat template. `encoder` makes tokens of what it renders."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        self.encoder = TextEncoder(tokenizer)

    def prepare(self, row: dict, counts: dict[str, int], history: str = "as_written") -> Chat:
        """The row's messages as the template gets them.

        An empty system message is left out (the released A13B template refuses it); thinking is moved to where the
        template reads it, or taken out where the template cannot write it first. All else stays as it is. `history`
        "answers": earlier turns are without thinking and tags.
        """
        switches, has_tools = switches_of(row), bool(row.get("tools"))
        no_think = switches.get("reasoning_effort") == "no_think" or switches.get("enable_thinking") is False
        counts["switches_left_out"] += not all(map(self.reads, switches))
        wraps = not self.reads_thinking and self.speaks_first(has_tools)
        asked_not_to_think = False
        messages: list[dict] = []
        past: list[dict] = []
        places: list[int] = []
        turns: dict[int, Turn] = {}
        for i, message in enumerate(row["messages"]):
            if message["role"] == "system" and not message["content"]:
                continue
            if message["role"] == "user":
                asked_not_to_think = message["content"].lstrip().startswith("/no_think")
            earlier = None
            if message["role"] == "assistant":
                turn = turns[len(messages)] = split_thinking(message)
                if turn.thinking and turn.thinking.strip():
                    if no_think:
                        where = f"messages[{i}]"
                        raise BadRow(f"the row says no_think, but {where} carries thinking: one of them is wrong")
                    counts["no_think_with_thinking"] += asked_not_to_think
                counts["empty_answer"] += not turn.answer.strip() and not message.get("tool_calls")
                counts["without_thinking"] += self.thinks and not no_think and turn.thinking is None
                if turn.thinking is not None and (wraps or history == "answers"):
                    earlier = as_templates_read(without_thinking(message, turn))
                if self.is_misplaced(turn):
                    message = move_thinking(message, turn, to_field=self.reads_thinking)
            message = as_templates_read(message)
            places.append(i)
            past.append(earlier or message)
            messages.append(earlier if wraps and earlier else message)
        return Chat(messages, past, places, turns, wraps, json.dumps(switches), has_tools)

    def is_misplaced(self, turn: Turn) -> bool:
        """Whether a turn has thinking, and where the template does not read it."""
        if turn.thinking is None or turn.in_content != self.reads_thinking:
            return False
        # an empty field is no thinking where models do not think
        return bool(turn.thinking) or turn.in_content or self.thinks

    def sequences(
        self, row: dict, train_on: str, counts: dict[str, int], history: str = "as_written"
    ) -> list[Rendered]:
        """Render a conversation, and find what the model has to say in it.

        Returns one sequence, or several where the template or `history` rewrites earlier turns once a later one is
        there: one for each state that inference would see. Only the first of a row may have nothing to say. Counts the
        warnings of report.py.
        """
        chat = self.prepare(row, counts, history)
        messages, turns, ending = chat.messages, chat.turns, self.ending(chat.key)
        render = self.renderer(row, messages, chat.past)
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        trained = [i for i in turns if messages[i].get("weight") != 0 and (train_on == "all" or i > last_user)]
        counts["turns"] += len(turns)
        counts["turns_not_trained_on"] += len(turns) - len(trained)
        last = len(messages) - 1
        whole = ended(render, ending, last, turn=True) if last in turns else render(len(messages))
        # from the last turn back: a turn joins the sequence that holds its text as it was then, else it begins its own
        text = whole
        spans: list[tuple[int, int]] = []
        sequences = [(text, spans)]
        for i in reversed(trained):
            prompt, said = self.place(chat, render, ending, i, counts)
            counts["without_end"] += not ending.text
            if history == "as_written" and i == trained[-1]:
                counts["history_as_written"] += self.thinking_in(prompt, chat, i)
            count_left_out(messages[i], turns[i], said, counts)
            if not said:
                continue
            if not text.startswith(prompt + said):
                text, spans = prompt + said + ending.after, []
                sequences.insert(0, (text, spans))
            spans.insert(0, (len(prompt), len(prompt) + len(said)))
        for message in messages:
            if message["role"] != "assistant":
                counts["text_left_out"] += message["content"].strip() not in whole
        counts["tools_left_out"] += chat.has_tools and not self.takes_tools
        return [sequence for sequence in sequences if sequence[1]] or sequences[:1]

    def thinking_in(self, prompt: str, chat: Chat, upto: int) -> int:
        """How many of the turns before `upto` stand in its prompt with their thinking, or its tags."""
        name = "reasoning_content" if self.reads_thinking else "content"
        thoughts = [chat.past[i].get(name) for i, turn in chat.turns.items() if i < upto and turn.thinking is not None]
        return 0 if chat.wraps else sum(thought in prompt for thought in thoughts if thought)

    def place(self, chat: Chat, render: Render, ending: Ending, i: int, counts: dict[str, int]) -> tuple[str, str]:
        """The prompt that inference sees before turn i, and what the model says then, the end of the turn included.

        It says nothing where the template leaves out all that the turn has: the end alone would teach it to be silent.
        Raises BadRow where the template has no such prompt: it rewrites the history once the answer is there, or does
        not keep two turns in a row apart.
        """
        turn, in_a_row, where = chat.turns[i], i - 1 in chat.turns, f"messages[{chat.places[i]}]"
        opening = self.opening(chat.key, chat.has_tools, self.reads_thinking and bool(turn.thinking))
        prompt = render(i, add_generation_prompt=True)
        if in_a_row:
            before = ended(render, ending, i).removesuffix(ending.after)
            if prompt == before or not prompt.startswith(before):  # the model would go on with the turn before
                prompt = before + opening.written
        text = ended(render, ending, i, turn=True).removesuffix(ending.after)
        begin = prompt if text.startswith(prompt) else prompt.removesuffix(opening.unsaid)
        if not text.startswith(begin):
            if in_a_row:
                raise BadRow(f"the template runs {where} and the assistant's turn before it together: join them")
            raise BadRow(f"the template changes what stands before {where} once its answer is there")
        said = text[len(begin) :]
        if chat.wraps and turn.thinking is not None:
            body = said.removesuffix(ending.text)
            if body == said:
                raise BadRow(f"the template has no place for the thinking of {where}")
            block, answer = in_tags(turn.thinking, body)
            said = f"{block}{answer}{ending.text}"
        elif said == opening.nothing and ((turn.thinking or "") + turn.answer or chat.messages[i].get("tool_calls")):
            return prompt, ""
        handed_over = prompt[len(begin) :]  # by inference, and not in the rendered turn: in most templates nothing
        if said.startswith(handed_over):
            return prompt, said.removeprefix(handed_over)
        if turn.thinking is None and is_empty_block(handed_over):
            return prompt, said
        counts["against_prompt"] += 1
        return begin, said


def count_left_out(message: dict, turn: Turn, said: str, counts: dict[str, int]) -> None:
    """Count thinking, text and tool calls of a turn that the model does not say."""
    counts["thinking_left_out"] += (turn.thinking or "").strip() not in said
    counts["text_left_out"] += turn.answer.strip() not in said
    functions = [call.get("function") for call in message.get("tool_calls") or []]
    names = [str(function.get("name", "")) for function in functions if isinstance(function, dict)]
    counts["tools_left_out"] += any(name not in said for name in names)
