"""What toolkits and servers write → the conversation that the guide describes: `messages` and `tools`.

Nothing that changes the meaning is ignored: it is used, or the row is bad. A known key with an empty value (null, "",
[], {}) counts as absent; missing content is the empty text.

Bad rows: another shape than the file's first row, or one that is not known; what cannot be said in `messages`.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from sft.data.convert import REFUSED, SWITCHES, Message, Row, convert, is_empty, joined, spelled
from sft.data.lines import BadRow
from sft.data.rows import THINKING, read_row

OF_MESSAGES = {"role", "content", "tool_calls", "tool_call_id", "name", "weight", *THINKING}
OF_ROWS = {"tools", "functions", "system", "enable_thinking", "reasoning_effort", "chat_template_kwargs", "time"}
NOT_OF_ROWS = {  # variables of the template that a row may not set
    "messages", "tools", "documents", "tokenize", "return_dict", "add_generation_prompt", "chat_template",
    "continue_final_message", "conversation", "is_training",
}  # fmt: skip
OTHERS = {  # shapes that are refused by name
    ("chosen", "rejected"): "preference pairs (chosen, rejected)",
    ("text",): 'pretraining text ("text")',
    ("input_ids",): "token ids (input_ids)",
}


def parse_row(line: bytes, shape: str | None = None, unused: Counter[str] | None = None) -> Row:
    """The conversation that a row's text holds, see to_conversation. Raises BadRow."""
    return to_conversation(read_row(line), shape, Counter() if unused is None else unused)


def shape_of(row: Any) -> str | None:
    """The name of the shape that a row is in; None where it is none of them."""
    if not isinstance(row, dict):
        return None
    for name, (keys, _, _) in SHAPES.items():
        if all(key in row for key in keys) and not all(is_empty(row[key]) for key in keys):
            return name
    return None


def shape_in(line: bytes) -> str | None:
    """The shape of the row that a text holds; None for a bad one."""
    try:
        return shape_of(read_row(line))
    except BadRow:
        return None


def to_conversation(row: Any, shape: str | None, unused: Counter[str]) -> Row:
    """The row as `messages`, and beside it, where it has them, `tools`, `enable_thinking`, `reasoning_effort`,
    `chat_template_kwargs` (further variables for the template) and `time`. Raises BadRow.

    A message has a role of ROLES and a text as content; `weight` is 0 where it is not trained on; `tool_calls` are
    objects of type, function, name and an object of arguments.

    Args:
        shape: of the file; None where it is not known.
        unused: keys that change nothing are counted here.
    """
    found = shape_of(row)
    if found is None:
        raise BadRow(what_it_is(row))
    if shape not in (None, found):
        raise BadRow(f"in the shape {found}, and the file's first row in the shape {shape}: one shape a file")
    keys, optional, read = SHAPES[found]
    row = {key: value for key, value in row.items() if key in keys or not is_empty(value)}
    messages = read(row)
    system = row.get("system")
    if system is not None:
        messages = with_system(system, messages)
    conversation = {"messages": joined(messages)}
    conversation |= tools_of(row) | switches(row)
    check_order(conversation["messages"])
    count_unused(row, {*keys, *optional}, conversation["messages"], unused)
    return conversation


def what_it_is(row: Any) -> str:
    """What a row is that has no shape that is read, and what to do."""
    if isinstance(row, list) and row and isinstance(row[0], dict) and "role" in row[0]:
        return 'a bare list of messages: put it in an object, as "messages"'
    if not isinstance(row, dict):
        return f"a JSON object is expected, not {type(row).__name__}"
    if "role" in row:
        return 'a single message: put all of a conversation in one object, as "messages"'
    if "messages" in row:
        return '"messages" is empty'
    for keys, name in OTHERS.items():
        if all(key in row for key in keys):
            return f'{name}: not a conversation, which "messages" would hold'
    return 'no "messages", nor the keys of another shape that is read'


def check_order(messages: list[Message]) -> None:
    """Raise BadRow for a conversation in which nothing can be learnt."""
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if "assistant" not in roles:
        raise BadRow("no message of the assistant: nothing to learn")
    if roles[0] == "assistant":
        raise BadRow("begins with the assistant: there is nothing to answer. Put the user's message before it")


# ------------------------------------------------------------------------------------------------------------- shapes


def read_messages(row: Row) -> list[Message]:
    key = "messages" if "messages" in row else "conversations"
    if not isinstance(row[key], list):
        raise BadRow(f'"{key}" is not a list')
    return [convert(message, f"{key}[{i}]") for i, message in enumerate(row[key])]


def read_alpaca(row: Row) -> list[Message]:
    question = text_of(row, "instruction")
    if added := text_of(row, "input"):
        question = f"{question}\n{added}" if question else added
    return [*earlier_turns(row), *turn(question, text_of(row, "output"))]


def read_query(row: Row) -> list[Message]:
    return [*earlier_turns(row), *turn(text_of(row, "query"), text_of(row, "response"))]


def read_completion(row: Row) -> list[Message]:
    """The prompt's own answers are not trained on."""
    found: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[key]
        if not isinstance(value, list | dict):
            value = {"role": role, "content": text_of(row, key)}
        given = value if isinstance(value, list) else [value]
        messages = [convert(message, f"{key}[{i}]") for i, message in enumerate(given)]
        if key == "prompt":
            if asked := [name for m in given if isinstance(m, dict) for name in SWITCHES if m.get(name)]:
                raise BadRow(f'"prompt" has "{asked[0]}": its answers are not trained on')
            messages = [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages]
        found += messages
    return found


def earlier_turns(row: Row) -> list[Message]:
    """`history`: pairs of question and answer."""
    pairs = row.get("history", [])
    if not isinstance(pairs, list) or not all(is_pair(pair) for pair in pairs):
        raise BadRow('"history" is not a list of pairs of texts')
    return [message for question, answer in pairs for message in turn(question, answer)]


def is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def text_of(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str | None):
        raise BadRow(f'"{key}" is not a text')
    return value or ""


# {name: (keys that it needs, keys that it may have, what reads them)}
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Row], list[Message]]]] = {
    "messages": (("messages",), (), read_messages),
    "ShareGPT": (("conversations",), (), read_messages),
    "Alpaca": (("instruction", "output"), ("input", "history"), read_alpaca),
    "prompt and completion": (("prompt", "completion"), (), read_completion),
    "query and response": (("query", "response"), ("history",), read_query),
}
OF_SHAPES = {key for keys, optional, _ in SHAPES.values() for key in (*keys, *optional)}


# ------------------------------------------------------------------------------------------------------------- columns


def with_system(system: Any, messages: list[Message]) -> list[Message]:
    """The messages behind the system text that stands in a column."""
    if not isinstance(system, str):
        raise BadRow('"system" is not a text')
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] not in ("", system):
            raise BadRow('"system" and the first message say different things')
        messages = messages[1:]
    return [{"role": "system", "content": system}, *messages]


def tools_of(row: Row) -> Row:
    """`tools`, each as {"type": "function", "function": …}; nothing where there are none."""
    found = []
    for key in ("tools", "functions"):
        if key in row:
            tools = spelled(row[key], f'"{key}" is a text that is not JSON')
            if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
                raise BadRow(f'"{key}" is not a list of objects')
            found.append([as_tool(tool) for tool in tools])
    if len(found) == 2 and found[0] != found[1]:
        raise BadRow('"tools" and "functions" say different things')
    return {"tools": found[0]} if found and found[0] else {}


def as_tool(tool: Row) -> Row:
    if "function" in tool or "name" not in tool:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def switches(row: Row) -> Row:
    """What a row says to the template beside messages and tools."""
    given = row.get("chat_template_kwargs", {})
    further = {key: given[key] for key in given if not is_empty(given[key])} if isinstance(given, dict) else given
    if not isinstance(further, dict) or NOT_OF_ROWS & further.keys():
        raise BadRow('"chat_template_kwargs" is not an object of variables for the template')
    found: Row = {}
    kinds = (("enable_thinking", bool, "neither true nor false"), ("reasoning_effort", str, "not a text"))
    for name, kind, what in kinds:
        values = [values[name] for values in (row, further) if values.get(name) is not None]
        if not all(isinstance(value, kind) for value in values):
            raise BadRow(f'"{name}" is {what}')
        if len(set(values)) > 1:
            raise BadRow(f'"{name}" and "chat_template_kwargs" say different things')
        if values:
            found[name] = values[0]
    further = {key: value for key, value in further.items() if key not in found}
    found |= {"chat_template_kwargs": further} if further else {}
    return found | ({"time": row["time"]} if "time" in row else {})


def count_unused(row: Row, of_shape: set[str], messages: list[Message], unused: Counter[str]) -> None:
    """Count the keys that change nothing; raise BadRow for one that would."""
    for key in row.keys() - of_shape - OF_ROWS:
        if key in THINKING and not is_empty(row[key]) or key == "label" and isinstance(row[key], bool):
            raise BadRow(f'"{key}" beside {min(of_shape)} would change what is learnt, and cannot be used')
        repeats = isinstance(row[key], str) and any(message["content"] == row[key] for message in messages)
        if (key in REFUSED or key in OF_SHAPES) and row[key] is not False and not repeats:
            raise BadRow(f'"{key}" would change what is learnt, and cannot be used beside {min(of_shape)}')
        unused[f'"{key}"'] += 1
    for key in {key for message in messages for key in message if key not in OF_MESSAGES}:
        unused[f'"{key}" of messages'] += 1
