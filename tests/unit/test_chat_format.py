"""What is supervised, for every chat format, against what the model has to say: written down here without rendering.

`says_…` are the oracles: for each sequence that a row becomes, the text of its supervised tokens.
"""

import functools
import json
from collections import Counter
from datetime import datetime

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from sft.data.chat_format import ChatFormat
from sft.data.examples import IGNORE_INDEX, Options, encode_rows
from sft.data.rows import BadRow
from sft.data.tokens import TextEncoder
from tiny import FORMATS

ALL = ("hy", "example", *FORMATS)


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def call(*names, content="", **more):
    calls = [{"type": "function", "function": {"name": name, "arguments": {"x": name}}} for name in names]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def pattern(thinking, answer):
    return f"<think>\n{thinking}\n</think>\n<answer>\n{answer}\n</answer>"


TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "string"}}}]}
HIGH, NO_THINK = {"reasoning_effort": "high"}, {"reasoning_effort": "no_think"}
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
SPECIAL = " ".join(
    ["<|eos|>", "<|extra_0|>", "<|startoftext|>", "<|im_end|>"] + [x for f in FORMATS.values() for x in f[:2]]
)
CODE = "def f(x):\n\treturn {\"a\": [x, 'b']}  # 1 < 2\n\n\n    "
RTL = "שלום עולם، مرحبا"

CONVERSATIONS = {
    "one turn": ([user("1+1=?"), said("2")], {}),
    "system": ([system("be brief"), user("1+1=?"), said("2")], {}),
    "empty system": ([system(""), user("1+1=?"), said("2")], {}),
    "two turns": ([user("a"), said("b"), user("c"), said("d")], {}),
    "system, three turns": ([system("s"), user("a"), said("b"), user("c"), said("d"), user("e"), said("f")], {}),
    "ends with the user": ([user("a"), said("b"), user("c")], {}),
    "users twice": ([user("a"), user("b"), said("c")], {}),
    "users three times, later": ([user("a"), said("b"), user("c"), user("d"), user("e"), said("f")], {}),
    "slow": ([user("1+1=?"), said(pattern("one and one", "2"))], {}),
    "slow, effort high": ([user("1+1=?"), said(pattern("one and one", "2"))], HIGH),
    "slow, thinking enabled": ([user("1+1=?"), said(pattern("one and one", "2"))], ON),
    "fast": ([user("/no_think1+1=?"), said(pattern("", "2"))], {}),
    "fast, thinking disabled": ([user("/no_think1+1=?"), said(pattern("", "2"))], OFF),
    "fast, no_think": ([user("1+1=?"), said(pattern("", "2"))], NO_THINK),
    "no pattern, thinking disabled": ([user("1+1=?"), said("2")], OFF),
    "fast, two turns, thinking disabled": (
        [user("a"), said(pattern("", "b")), user("c"), said(pattern("", "d"))], OFF
    ),
    "empty thinking in both": ([user("q"), said(pattern("t", "so"), reasoning_content="")], HIGH),
    "nulls": ([user("q"), said("so")], {"enable_thinking": None, "reasoning_effort": None, "tools": None}),
    "documentation's own": ([user("1+1=?"), said("<think>\nIt is 2.</think>\n<answer>\n1+1=2\n</answer>")], {}),
    "think without answer block": ([user("q"), said("<think>\nhm\n</think>\n\nso")], {}),
    "thinking beside": ([user("q"), said("so", reasoning_content="hm")], HIGH),
    "thinking beside, of lines": ([user("q"), said("so\n", reasoning_content="h\n\nm")], HIGH),
    "empty thinking beside": ([user("q"), said("so", reasoning_content="")], {}),
    "null thinking beside": ([user("q"), said("so", reasoning_content=None)], {}),
    "thinking in both": ([user("q"), said(pattern("hm", "so"), reasoning_content="hm")], HIGH),
    "slow, two turns": ([user("a"), said(pattern("t", "b")), user("c"), said(pattern("u", "d"))], HIGH),
    "slow, then fast": ([user("a"), said(pattern("t", "b")), user("/no_thinkc"), said(pattern("", "d"))], {}),
    "plain, then slow": ([user("a"), said("b"), user("c"), said(pattern("u", "d"))], HIGH),
    "beside, three turns": (
        [user("a"), said("b", thinking="t"), user("c"), said("d"), user("e"), said("f", thinking="v")],
        HIGH,
    ),
    "think quotes its end": ([user("q"), said(pattern("a </think> b", "so"))], HIGH),
    "answer quotes thinking": ([user("q"), said(pattern("t", "write <think> and </answer> here"))], HIGH),
    "user quotes thinking": ([user("<think>\nx\n</think>"), said("ok")], {}),
    "quoted special tokens, user": ([user(SPECIAL), said("ok"), user(SPECIAL), said("ok")], {}),
    "quoted special tokens, assistant": ([user("q"), said(f"a {SPECIAL} b"), user("r"), said(f"c {SPECIAL}")], {}),
    "quoted special tokens, system": ([system(SPECIAL), user("q"), said("ok")], {}),
    "emoji": ([user("🙂👩‍👩‍👧 q"), said("🎉🏳️‍🌈")], {}),
    "right to left": ([user(RTL), said(RTL)], {}),
    "code": ([user(CODE), said(f"```py\n{CODE}\n```")], {}),
    "white space": ([user("  a \n"), said("\tb \n\n "), user("\n"), said(" ")], {}),
    "empty answer": ([user("a"), said(""), user("c"), said("d")], {}),
    "empty answer last": ([user("a"), said("b"), user("c"), said("")], {}),
    "empty user": ([user(""), said("b")], {}),
    "combining and rare": ([user("e\u0301 ǅ ﷽ \u200b\u2028"), said("a\u0301\u0302 𓀀 \ufffd")], {}),
    "long": ([user("很长 " * 400), said("long " * 700)], {}),
    "weight 0 first": ([user("a"), said("b", weight=0), user("c"), said("d", weight=1)], {}),
    "weight 0 last": ([user("a"), said("b"), user("c"), said("d", weight=0)], {}),
    "tools, one call": ([user("q"), call("f"), tool("1"), said("so")], TOOLS),
    "tools, not used": ([user("q"), said("no need")], TOOLS),
    "tools, system": ([system("s"), user("q"), call("f"), tool("1"), said("so")], TOOLS),
    "tools, parallel answers": ([user("q"), call("f", "g"), tool("1"), tool("2"), said("so")], TOOLS),
    "tools, calls in a row": ([user("q"), call("f"), tool("1"), call("g"), tool("2"), said("so")], TOOLS),
    "tools, null content": ([user("q"), call("f", content=None), tool("1"), said("so")], TOOLS),
    "tools, thinking": (
        [user("q"), call("f", reasoning_content="t"), tool("1"), said("so", reasoning_content="u")], TOOLS | HIGH
    ),
    "tools, two rounds": (
        [user("q"), call("f"), tool("1"), said("so"), user("r"), call("g"), tool("2"), said("ok")], TOOLS
    ),
    "tools, quoted special tokens": ([user(SPECIAL), call("f"), tool(SPECIAL), said("so")], TOOLS),
    "tools, ends with a call": ([user("q"), call("f")], TOOLS),
    "tools, the row's time": ([user("q"), said("so")], TOOLS | {"time": "2024-02-29T12:00:00"}),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- oracles


def apart(message):
    """(thinking or None, answer) of the table's messages: thinking beside, in the pattern, or none."""
    content = message["content"] or ""
    if content.startswith("<think>\n"):
        cut = content.rindex("</think>\n<answer>") if "</think>\n<answer>" in content else content.index("</think>")
        answer = content[cut + len("</think>") :].lstrip("\n")
        if answer.startswith("<answer>\n"):
            answer = answer[len("<answer>\n") : -len("\n</answer>")]
        return content[len("<think>\n") : cut].removesuffix("\n"), answer
    return message.get("reasoning_content", message.get("thinking")), content


def in_content(message):
    """Content with the thinking in it, as the 2025 models have it."""
    thinking, answer = apart(message)
    if thinking is None or (message["content"] or "").startswith("<think>"):
        return message["content"] or ""
    block = f"<think>\n{thinking}\n</think>\n"
    return block if message.get("tool_calls") and not answer else f"{block}<answer>\n{answer}\n</answer>"


def grouped(row, turns, looks):
    """Texts of turns, joined where a later turn's context still holds the earlier one as it was trained.

    Args:
        turns: place → text.
        looks: (place, last user's place at some moment) → how an assistant's message is rendered then.
    """
    messages = row["messages"]
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]

    def last_user(upto):
        return max(k for k in range(upto) if messages[k]["role"] == "user")

    end = places[-1] + 1 if places[-1] == len(messages) - 1 else len(messages)
    groups, moment = [], last_user(end)
    for i in reversed([i for i in places if messages[i].get("weight") != 0]):
        then = last_user(i + 1)
        if not groups or any(looks(k, then) != looks(k, moment) for k in places if k <= i):
            if any(looks(k, then) != looks(k, moment) for k in places if k <= i):
                moment = then
            groups.insert(0, [])
        groups[0].insert(0, turns[i])
    return ["".join(group) for group in groups]


def says_a13b(row):
    text = ""
    for message in row["messages"]:
        if message["role"] == "assistant" and message.get("weight") != 0:
            content = in_content(message)
            if row.get("enable_thinking") is False:
                content = content.removeprefix("<think>\n\n</think>\n")
            if row.get("tools") and message.get("tool_calls"):
                functions = [c["function"] for c in message["tool_calls"]]
                calls = [f'{{"name": "{f["name"]}", "arguments": {json.dumps(f["arguments"])}}}' for f in functions]
                text += f"<tool_calls>[{', '.join(calls)}]</tool_calls><|eos|>"
            else:
                text += ("助手：" if row.get("tools") else "") + content + "<|eos|>"
    return [text]


def says_dense(row):
    turns, contents = {}, {}
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            contents[i] = content = in_content(message)
            if row.get("enable_thinking") is False:
                content = content.removeprefix("<think>\n\n</think>\n")
            calls = [json.dumps(c["function"], ensure_ascii=False) for c in message.get("tool_calls") or []]
            calls = "".join(f"<tool_call>{c}</tool_call>" for c in calls)
            turns[i] = content + calls + FORMATS["dense"][1]
    return grouped(row, turns, lambda i, last: "<answer>" in contents[i] and i < last)


def says_hy3(row):
    turns, thoughts = {}, {}
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            thinking, answer = apart(message)
            thoughts[i] = thinking
            closed = (row.get("reasoning_effort") or "no_think") == "no_think" and not thinking
            calls = [c["function"] for c in message.get("tool_calls") or []]
            calls = "".join(f"<tool_call:test>{c['name']}{json.dumps(c['arguments'])}\n" for c in calls)
            calls = f"<tool_calls:test>\n{calls}</tool_calls:test>" if calls else ""
            turns[i] = (thinking or "") + ("" if closed else "</think:test>") + answer + calls + FORMATS["hy3"][1]
    return grouped(row, turns, lambda i, last: bool(thoughts[i]) and not row.get("tools") and i < last)


def says_mt(row):
    spoken = [m for m in row["messages"] if m["role"] == "assistant" and m.get("weight") != 0]
    # these models do not think: an empty field is none
    return ["".join((in_content(m) if apart(m)[0] else m["content"] or "") + FORMATS["mt"][1] for m in spoken)]


def says_opens_think(row):
    turns = {}
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            thinking, answer = apart(message)
            calls = "".join(f"\n<call>{json.dumps(c)}</call>" for c in message.get("tool_calls") or [])
            turns[i] = f"{thinking or ''}</think>\n{answer}{calls}<|im_end|>"
    return grouped(row, turns, lambda i, last: i < last)


ORACLES = {"hy": says_a13b, "example": says_a13b, "dense": says_dense, "hy3": says_hy3, "mt": says_mt}
ORACLES["opens_think"] = says_opens_think


def prepared(name, row):
    """The messages as the template gets them: thinking where it reads it, no empty system message."""
    messages = []
    for message in row["messages"]:
        if message == system(""):
            continue
        if name == "mt" and message["content"] is None:
            message = message | {"content": ""}  # this template fails on calls without content
        if message["role"] == "assistant":
            thinking, answer = apart(message)
            inside = (message["content"] or "").startswith("<think>\n")
            if name in ("hy3", "opens_think") and inside:
                message = message | {"content": answer, "reasoning_content": thinking}
            elif name == "mt" and not thinking:
                pass
            elif name not in ("hy3", "opens_think") and not inside and thinking is not None:
                message = {k: v for k, v in message.items() if k not in ("reasoning_content", "thinking")} | {
                    "content": in_content(message)
                }
        messages.append(message)
    return messages


chat_format = functools.cache(ChatFormat)


def encode(tokenizer, row, chat=None, **options):
    """The row's sequences as (input_ids, labels), and the report."""
    options = Options(**{"max_seq_length": 20_000} | options)
    table, report = encode_rows([(1, json.dumps(row).encode())], chat or chat_format(tokenizer), options)
    sequences = []
    for ids, spans in zip(table["input_ids"].to_pylist(), table["spans"].to_pylist()):
        labels = np.full(len(ids), IGNORE_INDEX)
        for a, b in zip(spans[::2], spans[1::2]):
            labels[a:b] = ids[a:b]
        sequences.append((ids, labels.tolist()))
    return sequences, report


def supervised(tokenizer, sequence):
    ids = [label for token, label in zip(*sequence) if label != IGNORE_INDEX]
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(*sequence))
    return tokenizer.decode(ids)


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture
def noon(monkeypatch):
    """transformers' own clock stands at the time that a row without one gets, or at the row's."""

    def set_to(row):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.fromisoformat(row.get("time", "2025-01-01T00:00:00"))

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_to


CELLS = [
    (name, conversation)
    for name in ALL
    for conversation, (_, more) in CONVERSATIONS.items()
    if name != "example" or not {"tools", "enable_thinking"} & set(more)  # its template has neither
]


@pytest.mark.parametrize(("name", "conversation"), CELLS)
def test_supervised_is_what_the_model_has_to_say(name, conversation, format_tokenizer, noon):
    tokenizer, (messages, more) = format_tokenizer(name), CONVERSATIONS[conversation]
    row = {"messages": messages, **more}
    sequences, report = encode(tokenizer, row)
    assert report.counts["bad"] == 0
    assert [supervised(tokenizer, s) for s in sequences] == ORACLES[name](row)

    noon(row)
    options = {k: row[k] for k in ("reasoning_effort", "enable_thinking", "tools") if row.get(k) is not None}
    given = prepared(name, row)
    ends = {i + 1 for i, m in enumerate(given) if m["role"] == "assistant"} | {len(given)}
    rendered = []
    for end in ends:
        options["is_training"] = given[end - 1]["role"] == "assistant"  # Hy3 ends the last answer only then
        rendered.append(tokenizer.apply_chat_template(given[:end], return_dict=False, **options))
    assert rendered[-1] == sequences[-1][0] or given[-1].get("weight") == 0 or given[-1]["role"] != "assistant"
    assert all(ids in rendered for ids, _ in sequences)


@pytest.mark.parametrize("name", ("hy", *FORMATS))
def test_the_shortcuts_are_what_they_shorten(name, format_tokenizer):
    """Rendering and tokenizing less their checks, token boundaries from byte lengths: the long way gives the same."""
    tokenizer = format_tokenizer(name)

    class LongWay(TextEncoder):
        token_bytes = np.zeros(len(tokenizer), np.int64)

        def encode(self, texts):
            return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    short, long = ChatFormat(tokenizer), ChatFormat(tokenizer)
    long.own_rendering, long.encoder = True, LongWay(tokenizer)
    for conversation, (messages, more) in CONVERSATIONS.items():
        if name != "hy" or "tools" not in more:  # that prints the time
            row = {"messages": messages, **more}
            assert encode(tokenizer, row, short) == encode(tokenizer, row, long), conversation


def test_train_on_last_is_all_after_the_last_user_message(format_tokenizer):
    tokenizer = format_tokenizer("hy3")
    row = {"messages": CONVERSATIONS["tools, two rounds"][0], **TOOLS}
    (sequence,), report = encode(tokenizer, row, train_on="last")
    text = supervised(tokenizer, sequence)
    assert text.count("<｜hy_eos:test｜>") == 2 and text.endswith("ok<｜hy_eos:test｜>") and "so<" not in text
    assert (report.counts["turns"], report.counts["turns_not_trained_on"]) == (4, 2)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [user("q"), said(pattern("t", "a"))], **NO_THINK}, "says no_think, but messages[1]"),
        ({"messages": [user("q"), said("a", reasoning_content="t")], **OFF}, "says no_think, but messages[1]"),
        ({"messages": [user("q"), said(pattern("t", "a"), reasoning_content="u")]}, "both"),
        ({"messages": [user("q"), said("a")], "reasoning_effort": "much"}, "does not render it (TemplateError)"),
    ],
)
def test_rows_that_contradict_themselves(row, says, format_tokenizer):
    sequences, report = encode(format_tokenizer("hy3"), row)
    assert not sequences and says in report.lines["bad"][0][1]


def test_warnings_are_counted(format_tokenizer, shared):
    so = call("f", content="Let me look.")
    for name, row, kind in (
        ("dense", {"messages": [user("/no_think q"), said(pattern("t", "a"))]}, "no_think_with_thinking"),
        ("dense", {"messages": [user("q"), said("a")]}, "without_thinking"),
        ("hy3", {"messages": [user("q"), said("a", reasoning_content="t")]}, "against_prompt"),
        ("hy", {"messages": [user("q"), call("f", reasoning_content="hm"), tool("r")], **TOOLS}, "thinking_left_out"),
        ("hy", {"messages": [user("q"), call("f"), tool("result"), said("b")]}, "text_left_out"),
        ("hy", {"messages": [user("q"), so, tool("r")], **TOOLS}, "text_left_out"),
        ("mt", {"messages": [user("q"), said("b")], **TOOLS}, "tools_left_out"),
        ("hy", {"messages": [user("q"), call("get_f"), tool("r")]}, "tools_left_out"),
    ):
        counts = encode(format_tokenizer(name), row)[1].counts
        assert counts[kind] == 1, (name, kind, counts)
    assert encode(format_tokenizer("mt"), {"messages": [user("q"), said("a")]})[1].counts["without_thinking"] == 0


def test_a_turn_that_ends_where_the_next_begins_is_warned_of(format_tokenizer):
    """No token of the next turn is taken for the end of this one."""
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    template += "{{ '<|assistant|>' if add_generation_prompt }}"
    tokenizer = AutoTokenizer.from_pretrained(format_tokenizer("mt").name_or_path, chat_template=template)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    (sequence,), report = encode(tokenizer, {"messages": [user("a"), said("b"), user("c"), said("d")]})
    assert supervised(tokenizer, sequence) == "bd" and report.counts["without_end"] == 2


def test_a_template_that_rewrites_what_the_answer_goes_on_from_is_refused(format_tokenizer):
    """Inference would see `(last)`, training would not: no honest way to train on it."""
    tokenizer = format_tokenizer("mt")
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{{ '(last)' if loop.last and m.role == 'user' }}"
        "{{ '<｜hy_place▁holder▁no▁2｜>' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    chat = ChatFormat(AutoTokenizer.from_pretrained(tokenizer.name_or_path, chat_template=template))
    with pytest.raises(BadRow, match="changes what stands before messages"):
        chat.sequences({"messages": [user("q"), said("a")]}, "all", Counter())


def test_the_time_is_the_rows_own_or_a_constant(format_tokenizer):
    tokenizer = format_tokenizer("hy")
    row = {"messages": [user("q"), said("a")], **TOOLS}
    texts = [tokenizer.decode(encode(tokenizer, row | more)[0][0][0]) for more in ({}, {"time": 1_709_208_000}, {})]
    assert texts[0] == texts[2] and "当前时间：2025-01-01 00:00:00 星期三" in texts[0]
    assert "当前时间：2024-02-29 12:00:00 星期四" in texts[1]
    assert "ISO 8601" in encode(tokenizer, row | {"time": "noon"})[1].lines["bad"][0][1]


# ---------------------------------------------------------------------------------------------------------- properties

TEXT = st.lists(
    st.sampled_from(["a", "三千", " ", "\n", "🙂", "שלום", "b\n\nc", "1", "\\", '"', "<answer>", *SPECIAL.split()])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    max_size=5,
).map("".join)


@st.composite
def rows(draw):
    """Any conversation of system, user and assistant, with thinking in either place or none."""
    messages = [system(draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [user(draw(TEXT)) for _ in range(draw(st.integers(1, 2)))]
        answer = draw(TEXT.filter(lambda text: "think>" not in text and "answer>" not in text))
        thinking = draw(st.none() | TEXT.filter(lambda text: "think>" not in text and "answer>" not in text))
        if thinking is None:
            messages.append(said(answer))
        elif draw(st.booleans()):
            messages.append(said(answer, reasoning_content=thinking))
        else:
            messages.append(said(pattern(thinking, answer)))
        if draw(st.integers(0, 4)) == 0:
            messages[-1]["weight"] = 0
    return {"messages": messages, "reasoning_effort": "high"}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=rows(), limit=st.integers(2, 60))
def test_any_conversation(name, format_tokenizer, row, limit):
    tokenizer = format_tokenizer(name)
    sequences, report = encode(tokenizer, row)
    assert not report.counts["bad"]
    trained = any(m.get("weight") != 0 for m in row["messages"] if m["role"] == "assistant")
    expected = ORACLES[name](row) if trained else []
    # a space of text may be one token with the newline that the prompt ends with: the token is then supervised whole
    got = [supervised(tokenizer, s) for s in sequences]
    if name == "opens_think":
        got, expected = [text.lstrip("\n") for text in got], [text.lstrip("\n") for text in expected]
    assert got == expected
    cut, report = encode(tokenizer, row, max_seq_length=limit)
    whole = [(ids[:limit], labels[:limit]) for ids, labels in sequences]
    assert cut == [s for s in whole if any(label != IGNORE_INDEX for label in s[1][1:])]
    assert report.counts["unsupervised"] == (not cut)
