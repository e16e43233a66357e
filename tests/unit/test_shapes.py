"""What toolkits and servers write, as conversations: each word of theirs is used, refused or known to be harmless."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.chat_format import ChatFormat
from sft.data.convert import SWITCHES
from sft.data.examples import Options, encode_rows
from sft.data.lines import BadRow
from sft.data.shapes import parse_row, shape_in

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BARE_TOOL = TOOL["function"]


def call(**arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


CALL = {"role": "assistant", "content": "", "tool_calls": [call(x=1)]}
RESULT = {"role": "tool", "content": "r"}


def said(*messages, **more):
    return {"messages": list(messages)} | more


def pairs(*pairs, **more):
    return said(*({"role": role, "content": content, **more} for role, content in pairs))


def parse(row, **more):
    return parse_row(json.dumps(row).encode(), **more)


def like(message, **more):
    return message | more


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        # shapes
        ({"instruction": "q", "output": "a"}, said(USER, ANSWER)),
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, said(SYSTEM, USER, ANSWER)),
        ({"instruction": "q", "input": "i", "output": "a"}, said(like(USER, content="q\ni"), ANSWER)),
        ({"instruction": "", "input": "q", "output": "a"}, said(USER, ANSWER)),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, said(USER, ANSWER, USER, ANSWER)),
        ({"query": "q", "response": "a", "history": [["q", "a"]], "system": "s"}, said(SYSTEM, *[USER, ANSWER] * 2)),
        ({"prompt": "q", "completion": "a"}, said(USER, ANSWER)),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, said(SYSTEM, USER, ANSWER)),
        ({"prompt": [USER, ANSWER, USER], "completion": ANSWER}, said(USER, like(ANSWER, weight=0), USER, ANSWER)),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": [BARE_TOOL]},
            said(USER, ANSWER, tools=[TOOL]),
        ),
        ({"conversations": [USER, ANSWER], "messages": None}, said(USER, ANSWER)),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "r"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            said(SYSTEM, USER, CALL, RESULT, ANSWER),
        ),
        # roles and contents
        (said({"role": "developer", "content": "s"}, USER, ANSWER), said(SYSTEM, USER, ANSWER)),
        (
            said(USER, CALL, {"role": "function", "name": "f", "content": "r"}),
            said(USER, CALL, like(RESULT, name="f")),
        ),
        (said(USER, CALL, {"role": "tool_response", "content": "r"}), said(USER, CALL, RESULT)),
        (
            said(USER, *[{"role": "tool_call", "content": '{"name": "f", "arguments": "{\\"x\\": 1}"}'}] * 2, RESULT),
            said(USER, like(CALL, tool_calls=[call(x=1)] * 2), RESULT),
        ),
        (
            said(USER, ANSWER, {"role": "tool_call", "content": {"name": "f", "arguments": {"x": 1}}}),
            said(USER, like(CALL, content="a")),
        ),
        (
            said(like(USER, content=[{"type": "text", "text": "q"}, {"text": "r"}]), ANSWER),
            said(like(USER, content="qr"), ANSWER),
        ),
        (said(USER, like(ANSWER, content=None)), said(USER, like(ANSWER, content=""))),
        (said(USER, {"role": "assistant"}), said(USER, like(ANSWER, content=""))),
        (said(USER, like(ANSWER, tool_calls=[], reasoning_content="", function_call=None)), said(USER, ANSWER)),
        # calls and tools
        (said(USER, {"role": "assistant", "tool_calls": [call(x=1)]}), said(USER, CALL)),
        (said(USER, {"role": "assistant", "tool_calls": call(x=1)}), said(USER, CALL)),
        (said(USER, like(CALL, tool_calls=[{"name": "f", "arguments": {"x": 1}}])), said(USER, CALL)),
        (said(USER, {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}), said(USER, CALL)),
        (
            said(USER, like(CALL, tool_calls=[{"function": {"name": "f"}}])),
            said(USER, like(CALL, tool_calls=[call()])),
        ),
        (
            said(USER, like(CALL, tool_calls=[{"id": "1", **call(), "function": {"name": "f", "arguments": ""}}])),
            said(USER, like(CALL, tool_calls=[{"id": "1", **call()}])),
        ),
        (said(USER, ANSWER, tools=json.dumps([TOOL])), said(USER, ANSWER, tools=[TOOL])),
        (said(USER, ANSWER, functions=[BARE_TOOL]), said(USER, ANSWER, tools=[TOOL])),
        (said(USER, ANSWER, functions=[BARE_TOOL], tools=[TOOL]), said(USER, ANSWER, tools=[TOOL])),
        (said(USER, ANSWER, tools=[]), said(USER, ANSWER)),
        # switches and columns
        *[
            (said(USER, like(ANSWER, **{name: yes})), said(USER, ANSWER))
            for name in SWITCHES
            for yes in (1, True, None)
        ],
        *[(said(USER, like(ANSWER, **{name: 0})), said(USER, like(ANSWER, weight=0))) for name in SWITCHES],
        (said(like(USER, loss=False), ANSWER), said(like(USER, weight=0), ANSWER)),
        (said(USER, ANSWER, system="s"), said(SYSTEM, USER, ANSWER)),
        (said(SYSTEM, USER, ANSWER, system="s"), said(SYSTEM, USER, ANSWER)),
        (
            said(USER, ANSWER, chat_template_kwargs={"reasoning_effort": "high"}),
            said(USER, ANSWER, reasoning_effort="high"),
        ),
        (said(USER, ANSWER, chat_template_kwargs={"x": 1}), said(USER, ANSWER, chat_template_kwargs={"x": 1})),
        (said(USER, ANSWER, enable_thinking=False, time=5), said(USER, ANSWER, enable_thinking=False, time=5)),
        (said(USER, ANSWER, enable_thinking=None, reasoning_effort="", time=None), said(USER, ANSWER)),
        (
            said({"from": "human", "content": "q"}, {"role": "assistant", "value": "a"}),
            pairs(("user", "q"), ("assistant", "a")),
        ),
        (said({"role": "user", "text": "q"}, {"from": "gpt", "text": "a"}), pairs(("user", "q"), ("assistant", "a"))),
        (
            pairs(("user", [{"type": "text", "text": "q", "cache_control": {}}]), ("assistant", "a")),
            pairs(("user", "q"), ("assistant", "a")),
        ),
    ],
)
def test_what_is_read_as_a_conversation(row, conversation):
    assert parse(row) == conversation


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([], "a JSON object is expected, not list"),
        ([USER], "a bare list of messages"),
        (USER, "a single message: put all of a conversation in one object"),
        (3, "a JSON object is expected, not int"),
        ({}, 'no "messages", nor the keys of another shape that is read'),
        ({"text": "once"}, 'pretraining text ("text"): not a conversation'),
        ({"chosen": [ANSWER], "rejected": [ANSWER]}, "preference pairs (chosen, rejected): not a conversation"),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": "x"}, '"messages" is not a list'),
        (said("x"), "messages[0] is not an object"),
        (pairs(("robot", "x")), "messages[0] has no role of system, user, assistant, tool"),
        (pairs((["user"], "x")), "messages[0] has no role"),
        (pairs(("user", 3)), 'messages[0] has no "content" that is a text'),
        (pairs(("user", ["x"])), 'messages[0] has no "content" that is a text'),
        (pairs(("user", [{"type": "image_url"}])), "messages[0] has content that is not only text: image_url"),
        (pairs(("user", "x")), "no message of the assistant"),
        (said(ANSWER), "begins with the assistant"),
        (said(SYSTEM, ANSWER), "begins with the assistant"),
        (said(USER, like(ANSWER, weight=0.5)), 'messages[1] has a "weight" that is neither 0 nor 1'),
        (said(USER, like(ANSWER, loss="no")), 'messages[1] has a "loss" that is neither 0 nor 1, false nor true'),
        (said(USER, like(ANSWER, loss=True, train=0)), "switches that contradict each other: loss, train"),
        (said(like(USER, train=True), ANSWER), 'messages[0] has "train" true: only the assistant\'s messages'),
        (said(USER, like(ANSWER, thinking=["t"])), '"thinking" that is not a text'),
        (said(USER, like(ANSWER, tool_calls="f()")), "tool calls that are not JSON"),
        (said(USER, like(ANSWER, tool_calls=[3])), '"tool_calls" that are not a list of objects'),
        (said(USER, like(ANSWER, tool_calls=[{"function": {}}])), "a tool call without a name"),
        (
            said(USER, like(CALL, tool_calls=[{"name": "f", "arguments": "x"}])),
            "arguments of a tool call that are not",
        ),
        (said(USER, like(CALL, tool_calls=[{"name": "f", "arguments": "[1]"}])), "arguments of a tool call that are"),
        (said(like(USER, tool_calls=[call()]), ANSWER), "messages[0] has tool calls, and is not the assistant's"),
        (said(USER, like(ANSWER, refusal="no")), 'messages[1] has "refusal", which would change what is learnt'),
        (said(USER, ANSWER, tools="f"), '"tools" is a text that is not JSON'),
        (said(USER, ANSWER, tools=[3]), '"tools" is not a list of objects'),
        (said(USER, ANSWER, tools=[TOOL], functions=[{"name": "g"}]), '"tools" and "functions" say different'),
        (said(USER, ANSWER, enable_thinking="yes"), '"enable_thinking" is neither true nor false'),
        (said(USER, ANSWER, reasoning_effort=1), '"reasoning_effort" is not a text'),
        (said(USER, ANSWER, chat_template_kwargs="x"), '"chat_template_kwargs" is not an object'),
        (
            said(USER, ANSWER, chat_template_kwargs={"tools": [TOOL]}),
            '"chat_template_kwargs" is not an object of variables',
        ),
        (
            said(USER, ANSWER, enable_thinking=True, chat_template_kwargs={"enable_thinking": False}),
            '"enable_thinking" and "chat_template_kwargs" say different things',
        ),
        (said(SYSTEM, USER, ANSWER, system="x"), '"system" and the first message say different things'),
        (said(USER, ANSWER, system=["x"]), '"system" is not a text'),
        (said(USER, ANSWER, rejected_response="x"), '"rejected_response" would change what is learnt'),
        (said(USER, ANSWER, images=["x"]), '"images" would change what is learnt'),
        (said(USER, ANSWER, history=[["x", "y"]]), '"history" would change what is learnt'),
        (said(USER, ANSWER, prompt="x"), '"prompt" would change what is learnt, and cannot be used beside messages'),
        ({"instruction": "q", "output": 3}, '"output" is not a text'),
        ({"query": "q", "response": "a", "history": ["x"]}, '"history" is not a list of pairs of texts'),
        ({"conversations": [{"from": "bing", "value": "q"}]}, "conversations[0] has no role"),
        (said(like(USER, value="other"), ANSWER), 'messages[0] has "content" and "value" that say different things'),
        (pairs(("user", [{"image": "a.png"}, {"text": "x"}])), "content that is not only text: image"),
        (pairs(("user", [{"type": "text", "content": "x"}])), "content that is not only text: content"),
        (pairs(("user", [{"type": {"a": 1}, "text": "x"}])), "content that is not only text"),
        (pairs(("user", [{"type": "text"}])), "content that is not only text: no text"),
        ({"prompt": "q", "completion": "a", "label": False}, '"label" beside completion would change'),
        (
            {"prompt": [USER, like(ANSWER, weight=1), USER], "completion": [ANSWER]},
            '"prompt" has "weight": its answers are not trained on',
        ),
        (said(USER, like(CALL, function_call={"name": "g"})), '"tool_calls" and "function_call" that say different'),
        (
            said(USER, like(CALL, tool_calls=[{"name": "f", "args": {}}])),
            'a tool call with "args": call it "arguments"',
        ),
        (said(USER, like(ANSWER, reasoning="r", reasoning_content="s")), "thinking in two fields, and they differ"),
        (said(USER, ANSWER, reasoning_content="r"), '"reasoning_content" beside messages would change what is learnt'),
        (
            said(USER, like(ANSWER, weight=0), {"role": "function_call", "content": '{"name": "f"}'}),
            'an answer and its call stand in two messages, and differ in "weight"',
        ),
    ],
)
def test_what_is_not_a_conversation(row, says):
    with pytest.raises(BadRow) as bad:
        parse(row)
    assert says in str(bad.value)


def test_calls_keep_the_order_of_their_keys():
    """Templates print them with tojson."""
    given = {"id": "1", "function": {"arguments": {"b": 1, "a": 2}, "name": "f"}, "type": "function"}
    found = parse(said(USER, like(CALL, tool_calls=[given])))["messages"][1]["tool_calls"][0]
    assert json.dumps(found) == json.dumps(given)


def test_one_shape_a_file():
    alpaca = {"instruction": "q", "output": "a"}
    assert shape_in(json.dumps(alpaca).encode()) == "Alpaca" and shape_in(b"{") is None
    assert parse(alpaca, shape="Alpaca") == parse(said(USER, ANSWER), shape="messages")
    with pytest.raises(
        BadRow, match="in the shape Alpaca, and the file's first row in the shape messages: one shape a"
    ):
        parse(alpaca, shape="messages")


def test_keys_that_change_nothing_are_counted():
    unused = Counter()
    parse(said(like(USER, id=3), ANSWER, source="x", prompt="q", score=None), unused=unused)
    assert unused == {'"source"': 1, '"prompt"': 1, '"id" of messages': 1}, "a prompt that repeats the user's text"


# ------------------------------------------------------------------------------------------------- in every shape

TEXTS = st.text(min_size=1, max_size=6)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)
DIALECTS = {
    "messages": lambda system, turns: {
        "messages": [{"role": "system", "content": system}] * bool(system)
        + [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    },
    "OpenAI": lambda system, turns: {
        "messages": [{"role": "developer", "content": [{"type": "text", "text": system}]}] * bool(system)
        + [m for q, a in turns for m in (
            {"role": "user", "content": [{"type": "text", "text": q}]},
            {"role": "assistant", "content": a, "tool_calls": [], "refusal": None, "weight": 1},
        )]
    },
    "ShareGPT": lambda system, turns: {
        "system": system,
        "conversations": [m for q, a in turns for m in ({"from": "human", "value": q}, {"from": "gpt", "value": a})],
    },
    "Alpaca": lambda system, turns: {
        "instruction": turns[-1][0], "input": "", "output": turns[-1][1], "system": system, "history": turns[:-1],
    },
    "query": lambda system, turns: {
        "query": turns[-1][0], "response": turns[-1][1], "system": system or None, "history": turns[:-1],
    },
    "prompt": lambda system, turns: {"prompt": turns[-1][0], "completion": turns[-1][1], "system": system},
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=5), TURNS)
def test_every_shape_gives_the_same_sequences(format_tokenizer, system, turns):
    chat = ChatFormat(format_tokenizer("dense"))

    def sequences(dialect, turns):
        line = json.dumps(DIALECTS[dialect](system, turns)).encode()
        table, report = encode_rows([(1, line)], chat, Options())
        return table.select(["input_ids", "spans"]).to_pydict(), report.lines.get("bad")

    direct = sequences("messages", turns)
    assert all(sequences(name, turns) == direct for name in DIALECTS if name != "prompt")
    assert sequences("prompt", turns[-1:]) == sequences("messages", turns[-1:])


FULL = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b", "reasoning_content": "t", "tool_calls": [{"id": "1", **call(x=1)}]},
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "c", "weight": 0},
        {"role": "user", "content": "w"},
        {"role": "assistant", "content": "a", "thinking": "u"},
    ],
    "system": "s", "tools": [TOOL], "reasoning_effort": "high", "chat_template_kwargs": {"x": 1}, "time": 5,
}  # fmt: skip
HARMLESS = {"id", "type", "tool_call_id", "name"}  # of calls and their results: for the template to use or not


def changes(value, path=()):
    """(path, changed copy) for each key that is renamed, removed, nulled, or whose value is of another type."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for inner, changed in changes(value[key], (*path, key)):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = changed
            yield inner, copy
        if isinstance(value, dict):
            rest = {name: part for name, part in value.items() if name != key}
            yield (*path, key), rest
            yield (*path, key), rest | {f"{key}_": value[key]}
            yield (*path, key), value | {key: None}
            yield (*path, key), value | {key: 7}


def test_no_known_field_is_lost_without_a_word():
    """Renamed, removed, nulled or spoilt: the conversation changes, the row is bad, or the field is harmless."""
    whole, seen = parse(FULL), 0
    for path, changed in changes(FULL):
        unused = Counter()
        try:
            found = parse(changed, unused=unused)
        except BadRow:
            found = None
        seen += 1
        same = found == whole
        assert not same or unused or path[-1] in HARMLESS or path[-2:] == ("chat_template_kwargs", "x"), path
    assert seen > 100
