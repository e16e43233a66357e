"""What is supervised, for every chat format, against what the model has to say (conversations.py)."""

import functools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer

from conversations import (
    CONVERSATIONS,
    HIGH,
    NO_THINK,
    OFF,
    ON,
    SPECIAL,
    TOOLS,
    assistant,
    call,
    pattern,
    system,
    tool,
    user,
)
from oracles import expected
from sft.data.chat_format import ChatFormat
from sft.data.examples import IGNORE_INDEX, Options, encode_rows
from sft.data.lines import BadRow
from sft.data.tokens import TextEncoder
from tiny import FORMATS, chat_template

ALL = ("hy", "example", *FORMATS)


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


CELLS = [
    (name, conversation)
    for name in ALL
    for conversation, (_, more) in CONVERSATIONS.items()
    if name != "example" or "tools" not in more  # its template has none
]


@pytest.mark.parametrize(("name", "conversation"), CELLS)
def test_supervised_is_what_the_model_has_to_say(name, conversation, format_tokenizer):
    tokenizer, (messages, more) = format_tokenizer(name), CONVERSATIONS[conversation]
    row = {"messages": messages, **more}
    sequences, report = encode(tokenizer, row)
    oracle = expected(name, row)
    assert report.counts["bad"] == (oracle is None)
    if oracle is None:
        return
    assert [supervised(tokenizer, s) for s in sequences] == ["".join(said) for _, said in oracle]
    for (ids, _), (text, _) in zip(sequences, oracle):
        assert tokenizer.decode(ids).startswith(text)


@pytest.mark.parametrize("name", ("hy", *FORMATS))
def test_history_of_answers_alone(name, format_tokenizer):
    """Each turn is said as before, after earlier ones without thinking and tags."""
    tokenizer = format_tokenizer(name)
    for conversation, (messages, more) in CONVERSATIONS.items():
        row = {"messages": messages, **more}
        sequences, report = encode(tokenizer, row, history="answers")
        oracle = expected(name, row, history="answers") or []
        assert [supervised(tokenizer, s) for s in sequences] == ["".join(said) for _, said in oracle], conversation
        assert all(tokenizer.decode(ids).startswith(text) for (ids, _), (text, _) in zip(sequences, oracle))
        assert not report.counts["history_as_written"]


def test_how_many_turns_stay_in_the_history_as_written(format_tokenizer):
    turns = [user("a"), assistant(pattern("because", "b")), user("c"), assistant("d", thinking="therefore")]
    row, kept = {"messages": turns}, {"hy": 1, "dense": 0, "hy3": 0, "mt": 1}
    found = {name: encode(format_tokenizer(name), row)[1].counts["history_as_written"] for name in kept}
    assert found == kept
    tools = encode(format_tokenizer("hy"), row | TOOLS)[1].counts
    assert tools["history_as_written"] == 0 and tools["split"] == 1


@pytest.mark.parametrize("name", ("hy", *FORMATS))
def test_the_shortcuts_are_what_they_shorten(name, format_tokenizer):
    """Rendering and tokenizing less their checks, token boundaries from byte lengths: the long way gives the same."""
    tokenizer = format_tokenizer(name)

    class LongWay(TextEncoder):
        token_bytes = np.array([b""] * len(tokenizer), object)

        def encode(self, texts):
            return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    short, long = ChatFormat(tokenizer), ChatFormat(tokenizer)
    long.own_rendering, long.encoder = True, LongWay(tokenizer)
    for conversation, (messages, more) in CONVERSATIONS.items():
        if name != "hy" or "tools" not in more:  # that prints the time
            row = {"messages": messages, **more}
            assert encode(tokenizer, row, short) == encode(tokenizer, row, long), conversation


def test_a_tokenizer_that_normalises_without_changing_the_length(format_tokenizer):
    """Two characters that lose a byte in the question, one that gains two in the answer."""
    tokenizer = AutoTokenizer.from_pretrained(format_tokenizer("mt").name_or_path)
    tokenizer.backend_tokenizer.normalizer = NFC()
    sequences, _ = encode(tokenizer, {"messages": [user("\u2126\u2126"), assistant("1\u0344")]})
    assert supervised(tokenizer, sequences[0]) == "1\u0308\u0301" + FORMATS["mt"][1]


def test_more_variables_of_the_template_are_switches_too(format_tokenizer):
    row = {"messages": CONVERSATIONS["thinking beside"][0]}
    for name, switches in (("hy3", HIGH), ("dense", ON)):
        tokenizer = format_tokenizer(name)
        sequences, report = encode(tokenizer, row | {"chat_template_kwargs": {"documents": [], **switches}})
        assert sequences == encode(tokenizer, row | switches)[0] and not report.counts["against_prompt"], name
    rows = [row | {"chat_template_kwargs": switch} for switch in (OFF, NO_THINK)]
    assert all("says no_think" in encode(tokenizer, row)[1].lines["bad"][0][1] for row in rows)


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
        ({"messages": [user("q"), assistant(pattern("t", "a"))], **NO_THINK}, "says no_think, but messages[1]"),
        ({"messages": [user("q"), assistant("a", reasoning_content="t")], **OFF}, "says no_think, but messages[1]"),
        ({"messages": [user("q"), assistant(pattern("t", "a"), reasoning_content="u")]}, "both"),
        ({"messages": [user("q"), assistant("a")], "reasoning_effort": "medium"}, "accepts: no_think, low, high"),
    ],
)
def test_rows_that_contradict_themselves(row, says, format_tokenizer):
    sequences, report = encode(format_tokenizer("hy3"), row)
    assert not sequences and says in report.lines["bad"][0][1]


def test_warnings_are_counted(format_tokenizer, shared):
    so = call("f", content="Let me look.")
    for name, row, kind in (
        ("dense", {"messages": [user("/no_think q"), assistant(pattern("t", "a"))]}, "no_think_with_thinking"),
        ("dense", {"messages": [user("q"), assistant("a")]}, "without_thinking"),
        ("hy3", {"messages": [user("q"), assistant("a", reasoning_content="t")]}, "against_prompt"),
        ("hy", {"messages": [user("q"), call("f"), tool("result"), assistant("b")]}, "text_left_out"),
        ("hy", {"messages": [user("q"), so, tool("r")], **TOOLS}, "text_left_out"),
        ("mt", {"messages": [user("q"), assistant("b")], **TOOLS}, "tools_left_out"),
        ("hy", {"messages": [user("q"), call("get_f"), tool("r")]}, "tools_left_out"),
        ("mt", {"messages": [user("q"), assistant("")]}, "empty_answer"),
        ("mt", {"messages": [user("q"), assistant("b")], "enable_thinking": False}, "switches_left_out"),
        ("dense", {"messages": [user("q"), assistant("b")], **HIGH}, "switches_left_out"),
        ("hy3", {"messages": [user("q"), assistant("b")], "chat_template_kwargs": {"x": 1}}, "switches_left_out"),
    ):
        counts = encode(format_tokenizer(name), row)[1].counts
        assert counts[kind] == 1, (name, kind, counts)
    assert encode(format_tokenizer("mt"), {"messages": [user("q"), assistant("a")]})[1].counts["without_thinking"] == 0
    for name, switch in (("dense", {"enable_thinking": True}), ("hy3", HIGH)):
        counts = encode(format_tokenizer(name), {"messages": [user("q"), assistant("a")], **switch})[1].counts
        assert counts["switches_left_out"] == 0, name


def with_template(tokenizer, template):
    return AutoTokenizer.from_pretrained(tokenizer.name_or_path, chat_template=template)


def test_of_a_turn_that_the_template_leaves_out_nothing_is_supervised(format_tokenizer):
    """Not the token that ends it either; an answer that is empty in the row is one."""
    kept_with_tools = chat_template("hy3").replace("(tools or loop.index0 > ns.last_user)", "tools")
    hidden = chat_template("mt").replace("m.content + '<｜hy_pl", "m.content.replace('a', '') + '<｜hy_pl")
    for name, template, message, kind in (
        ("hy3", kept_with_tools, assistant("", thinking="t"), "thinking_left_out"),
        ("mt", hidden, assistant("a"), "text_left_out"),
        ("mt", chat_template("mt"), call("f"), "tools_left_out"),
    ):
        tokenizer = with_template(format_tokenizer(name), template)
        row = {"messages": [user("q"), message, user("r"), assistant("")], **HIGH}
        (sequence,), report = encode(tokenizer, row)
        last = supervised(tokenizer, sequence)
        assert last.endswith(FORMATS[name][1]) and last.count(FORMATS[name][1]) == 1, name
        assert report.counts[kind] == 1 and not encode(tokenizer, row | {"messages": row["messages"][:2]})[0], name


def test_a_turn_that_ends_where_the_next_begins_is_warned_of(format_tokenizer):
    """No token of the next turn is taken for the end of this one."""
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    template += "{{ '<|assistant|>' if add_generation_prompt }}"
    tokenizer = with_template(format_tokenizer("mt"), template)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    (sequence,), report = encode(tokenizer, {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})
    assert supervised(tokenizer, sequence) == "bd" and report.counts["without_end"] == 2


def test_a_template_that_rewrites_what_the_answer_goes_on_from_is_refused(format_tokenizer):
    """Inference would see `(last)`, training would not: no honest way to train on it."""
    tokenizer = format_tokenizer("mt")
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{{ '(last)' if loop.last and m.role == 'user' }}"
        "{{ '<｜hy_place▁holder▁no▁2｜>' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    chat = ChatFormat(with_template(tokenizer, template))
    with pytest.raises(BadRow, match="changes what stands before messages"):
        chat.sequences({"messages": [user("q"), assistant("a")]}, "all", Counter())


def test_the_time_is_the_rows_own_or_a_constant(format_tokenizer):
    tokenizer = format_tokenizer("hy")
    row = {"messages": [user("q"), assistant("a")], **TOOLS}
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
    """Any conversation, with thinking in either place or none, calls of tools, and each switch."""
    switch, tools = draw(st.sampled_from([HIGH, HIGH, {}, ON, OFF])), draw(st.booleans())
    plain = TEXT.filter(lambda text: "think>" not in text and "answer>" not in text)
    messages = [system(draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [user(draw(TEXT)) for _ in range(draw(st.integers(1, 2)))]
        for _ in range(tools * draw(st.integers(0, 2))):
            messages += [
                call("f", content=draw(plain).lstrip()),
                *(tool(draw(TEXT)) for _ in range(draw(st.integers(1, 2)))),
            ]
        answer, thinking = draw(plain), draw(st.none() | (st.just("") if switch is OFF else plain))
        if thinking is None:  # without white space that would be one token with the end of a block that is handed over
            messages.append(assistant(answer.lstrip() if switch is OFF else answer))
        elif draw(st.booleans()):
            messages.append(assistant(answer.lstrip() if switch is OFF else answer, reasoning_content=thinking))
        else:
            messages.append(assistant(pattern(thinking, answer)))
        if draw(st.integers(0, 4)) == 0:
            messages[-1]["weight"] = 0
    return {"messages": messages, **switch, **(TOOLS if tools else {})}


def any_conversation(number):
    """A decorator that runs a test on so many rows."""
    given_rows = given(row=rows(), limit=st.integers(2, 60))
    often = settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck))
    return lambda test: often(given_rows(test))


@pytest.mark.parametrize("name", ALL)
@any_conversation(60)
def test_any_conversation(name, format_tokenizer, row, limit):
    check_conversation(name, format_tokenizer(name), row, limit)


@pytest.mark.campaign
@pytest.mark.parametrize("name", ALL)
@any_conversation(600)
def test_any_of_many_conversations(name, format_tokenizer, row, limit):
    check_conversation(name, format_tokenizer(name), row, limit)


def check_conversation(name, tokenizer, row, limit):
    assume(name != "example" or "tools" not in row)
    sequences, report = encode(tokenizer, row)
    assert not report.counts["bad"]
    says = ["".join(said) for _, said in expected(name, row)]
    # a space of text may be one token with the newline that the prompt ends with: the token is then supervised whole
    got = [supervised(tokenizer, s) for s in sequences]
    if name == "opens_think":
        got, says = [text.lstrip("\n") for text in got], [text.lstrip("\n") for text in says]
    assert got == says
    cut, report = encode(tokenizer, row, max_seq_length=limit)
    whole = [(ids[:limit], labels[:limit]) for ids, labels in sequences]
    assert cut == [s for s in whole if any(label != IGNORE_INDEX for label in s[1][1:])]
    assert report.counts["unsupervised"] == (not cut)
