"""A message in whatever words toolkits and servers write it → one of ours: role, text, thinking, calls, `weight`.

Bad rows: a role that is not known, content that is not only text, a call without a name, arguments that are no object,
switches that contradict each other, and keys that would change the meaning and cannot be used.
"""

import json
from typing import Any

from sft.data.lines import BadRow
from sft.data.rows import THINKING, parse_json

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {
    "developer": "system", "human": "user", "gpt": "assistant", "model": "assistant", "function": "tool",
    "observation": "tool", "tool_response": "tool", "tool_call": "assistant", "function_call": "assistant",
}  # fmt: skip
IS_CALL = ("tool_call", "function_call")  # roles whose content is one call, or a list of them
SWITCHES = ("weight", "loss", "train", "trainable", "loss_mask")  # of a message: whether it is trained on
OF_PARTS = ("type", "text", "cache_control", "annotations")  # keys of a part of a content that is text
# Keys that would change the meaning, and cannot be used.
REFUSED = {
    "chosen", "rejected", "rejected_response", "rejected_messages", "history", "image", "images", "video", "videos",
    "audio", "audios", "documents", "refusal", "prefix", "partial", "continue_final_message",
}  # fmt: skip


def is_empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def convert(given: Any, where: str) -> Message:
    """A message in whatever words, as one of ours; `is_call` is set where it is calls alone. Raises BadRow."""
    if not isinstance(given, dict):
        raise BadRow(f"{where} is not an object")
    if given.keys() == {"role", "content"} and given["role"] in ROLES and isinstance(given["content"], str):
        return given  # most are so
    message = {key: value for key, value in given.items() if not is_empty(value)}
    role, content = one_of(message, ("role", "from"), where), one_of(message, ("content", "value"), where)
    if content is None:
        content = message.pop("text", None)
    written = role if isinstance(role, str) else ""
    message = {"role": OTHER_ROLES.get(written, written), **message}
    if message["role"] not in ROLES:
        raise BadRow(f"{where} has no role of {', '.join(ROLES)}")
    if refused := [key for key in message if key in REFUSED and message[key] is not False]:
        raise BadRow(f'{where} has "{refused[0]}", which would change what is learnt, and cannot be used')
    if written in IS_CALL:
        message["tool_calls"], content = calls_of(content, where), None
    elif found := [calls_of(message.pop(key), where) for key in ("tool_calls", "function_call") if key in message]:
        if message["role"] != "assistant":
            raise BadRow(f"{where} has tool calls, and is not the assistant's")
        if len({json.dumps([call["function"] for call in calls]) for calls in found}) > 1:
            raise BadRow(f'{where} has "tool_calls" and "function_call" that say different things')
        message["tool_calls"] = found[0]
    message["content"] = joined_parts(content, where)
    for name in THINKING:
        if not isinstance(message.get(name), str | None):
            raise BadRow(f'{where} has "{name}" that is not a text')
    if len({message[name].strip() for name in THINKING if name in message}) > 1:
        raise BadRow(f"{where} has thinking in two fields, and they differ")
    if not is_trained(message, where):
        message["weight"] = 0
    return message | {"is_call": True} if written in IS_CALL else message


def one_of(message: Message, keys: tuple[str, ...], where: str) -> Any:
    """The value of the first of these keys that is there; all are taken out. Raises BadRow where they differ."""
    values = [message.pop(key) for key in keys if key in message]
    if any(value != values[0] for value in values):
        raise BadRow(f'{where} has "{keys[0]}" and "{keys[1]}" that say different things')
    return values[0] if values else None


def joined_parts(content: Any, where: str) -> str:
    """A content as one text; of a list of text parts all, with nothing between."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        for part in content:
            unknown = [key for key in part if key not in OF_PARTS]
            kind = "text" if part.get("type") is None else part["type"]
            if unknown or kind != "text" or "text" not in part:
                what = unknown[0] if unknown else kind if kind != "text" else "no text"
                raise BadRow(f"{where} has content that is not only text: {str(what)[:50]}")
        content = "".join(joined_parts(part["text"], where) for part in content)
    if not isinstance(content, str | None):
        raise BadRow(f'{where} has no "content" that is a text')
    return content or ""


def is_trained(message: Message, where: str) -> bool:
    """Whether a message is trained on, by its switches, which are taken out of it."""
    said = {name: message.pop(name) for name in SWITCHES if name in message}
    for name, value in said.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(f'{where} has a "{name}" that is neither 0 nor 1, false nor true')
        if value and message["role"] != "assistant":
            raise BadRow(f'{where} has "{name}" {json.dumps(value)}: only the assistant\'s messages are trained on')
    if len({bool(value) for value in said.values()}) > 1:
        raise BadRow(f"{where} has switches that contradict each other: {', '.join(said)}")
    return all(said.values())


def calls_of(calls: Any, where: str) -> list[Row]:
    """Tool calls, with their arguments as objects. They may be JSON text, one call, without `function`."""
    calls = spelled(calls, f"{where} has tool calls that are not JSON")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f'{where} has "tool_calls" that are not a list of objects')
    found = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(f"{where} has a tool call without a name")
        if other := next((key for key in ("args", "input") if key in function and "arguments" not in function), None):
            raise BadRow(f'{where} has a tool call with "{other}": call it "arguments"')
        why = f"{where} has arguments of a tool call that are not a JSON object"
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if is_empty(arguments) else spelled(arguments, why)
        if not isinstance(arguments, dict):
            raise BadRow(why)
        outer = call if "function" in call else {key: call[key] for key in ("id", "type") if key in call}
        inner = {key: value for key, value in function.items() if key not in outer and key != "parameters"}
        kind = {} if "type" in outer else {"type": "function"}
        found.append(kind | outer | {"function": inner | {"arguments": arguments}})  # in the order of the row
    return found


def spelled(value: Any, why: str) -> Any:
    """What a JSON text spells; any other value as it is. Raises BadRow with `why`."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value.encode("utf-8"))
    except BadRow as error:
        raise BadRow(why) from error


def joined(messages: list[Message]) -> list[Message]:
    """The messages, calls that stand in messages of their own together with the assistant's text before them."""
    found: list[Message] = []
    for message in messages:
        if message.pop("is_call", False) and found and found[-1]["role"] == "assistant":
            for key in ("weight", *THINKING):
                if (key == "weight" or key in found[-1] and key in message) and found[-1].get(key) != message.get(key):
                    raise BadRow(f'an answer and its call stand in two messages, and differ in "{key}": join them')
            calls = found[-1].get("tool_calls", []) + message["tool_calls"]
            found[-1] = found[-1] | message | {"tool_calls": calls, "content": found[-1]["content"]}
        else:
            found.append(message)
    return found
