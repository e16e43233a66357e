"""Templates with one fault each: what is trained then is not what the oracle says, in some conversation."""

import copy
from collections import Counter

import pytest

from conversations import CONVERSATIONS
from oracles import expected
from sft.data.chat_format import ChatFormat
from sft.data.lines import BadRow
from sft.data.shapes import to_conversation
from tiny import chat_template

SMALL = {
    "the header is not on the user's turn": ("m.content + reply -}}", "m.content -}}"),
    "the end comes before the answer": ("{{- m.content + eos_token -}}", "{{- eos_token + m.content -}}"),
    "no end": ("{{- m.content + eos_token -}}", "{{- m.content -}}"),
    "the system does not end": ("{{- system_end -}}", ""),
    "thinking stays": ("not loop.last", "false"),
    "thinking goes in the last turn": ("and not loop.last", ""),
    "calls without content": ("('' if m.content is none else m.content) + '<tool_calls>'", "'<tool_calls>'"),
    "calls as text": ("call.function.arguments | tojson)", "call.function.arguments | string)"),
    "calls do not end": ("{{- '</tool_calls>' + eos_token -}}", "{{- '</tool_calls>' -}}"),
    "the block always": ("enable_thinking is defined and not enable_thinking", "not enable_thinking"),
    "no block": ("{{- '<think>\\n\\n</think>\\n' -}}", ""),
    "no header after a tool": ("{{- '</tool_responses>' + reply if after_tool else '' -}}", ""),
    "answers trimmed": ("{{- m.content + eos_token -}}", "{{- m.content | trim + eos_token -}}"),
}
MUTATIONS = {
    "dense": SMALL,
    "7b": SMALL | {"the first question opens again": ("user == bos_token and not ns.users", "false")},
    "hy": {
        "no end": ("{{- message['content'] + '<|eos|>' -}}", "{{- message['content'] -}}"),
        "later questions do not open": ("('' if turn.open else '<|startoftext|>')", "''"),
        "the system opens every question": ("{%- set turn.open = false -%}\n        {%- elif", "{%- elif"),
        "questions do not end": ("+ message['content'] + '<|extra_0|>' -}}\n            {%- set", "-}}{%- set"),
        "with tools no 助手": ("'助手：' + message", "message"),
        "with tools no 用户": ("'用户：' + message", "message"),
        "with tools no end": ("'助手：' + message['content'] + '<|eos|>'", "'助手：' + message['content']"),
        "calls do not end": ("{{- ']</tool_calls><|eos|>' -}}", "{{- ']</tool_calls>' -}}"),
        "calls without a space between": ("{{- '' if loop.last else ', ' -}}", "{{- '' if loop.last else ',' -}}"),
        "one call": ("for call in message['tool_calls']", "for call in message['tool_calls'][:1]"),
        "the block always": ("enable_thinking is defined and not enable_thinking", "not enable_thinking"),
        "no block": ("{{- '<think>\\n\\n</think>\\n' -}}", ""),
        "another time": ("%H:%M:%S", "%H:%M"),
        "answers of tools left out": ("message['content'] + '</tool_response>", "'</tool_response>"),
    },
    "hy3": {
        "no end of a turn before others": ("not loop.last or is_training", "is_training and loop.last"),
        "no content": ("'</think:test>' + (m.content or '')", "'</think:test>'"),
        "thinking is always kept": ("(tools or loop.index0 > ns.last_user)", "true"),
        "thinking is not kept with tools": ("(tools or loop.index0 > ns.last_user)", "loop.index0 > ns.last_user"),
        "thinking left out": ("{{- m.reasoning_content -}}", ""),
        "the prompt never closes": ("('</think:test>' if effort == 'no_think' else '')", "''"),
        "the prompt always closes": ("('</think:test>' if effort == 'no_think' else '')", "'</think:test>'"),
        "high by default": ("else 'no_think' -%}", "else 'high' -%}"),
        "the effort is not written": ("+ effort -}}", "-}}"),
        "calls do not end": ("'</tool_calls:test><｜hy_eos:test｜>'", "'</tool_calls:test>'"),
        "one call": ("for call in m.tool_calls", "for call in m.tool_calls[:1]"),
        "each answer of a tool opens": ("'' if ns.after_tool else '<tool_responses:test>", "'<tool_responses:test>"),
        "no low effort": ("'no_think', 'low', 'high'", "'no_think', 'low'"),
    },
    "mt": {
        "no end": ("m.content + '<｜hy_place▁holder▁no▁2｜>'", "m.content"),
        "two ends": ("m.content + '<｜hy_place▁holder▁no▁2｜>'", "m.content + '<｜hy_place▁holder▁no▁2｜>' * 2"),
        "another end": ("m.content + '<｜hy_place▁holder▁no▁2｜>'", "m.content + '<｜hy_place▁holder▁no▁3｜>'"),
        "no answers": ("m.content + \'<｜hy_place▁holder▁no▁2｜>\'", "\'<｜hy_place▁holder▁no▁2｜>\'"),
        "no header": ("'<｜hy_Assistant｜>' + m.content", "m.content"),
        "no header in the prompt": ("{{- '<｜hy_Assistant｜>' if add_gen", "{{- '' if add_gen"),
        "a newline after the header": ("'<｜hy_Assistant｜>' + m.content", "'<｜hy_Assistant｜>\\n' + m.content"),
        "questions without a header": ("'<｜hy_User｜>' + m.content", "m.content"),
        "the system does not end": ("m.content + '<｜hy_place▁holder▁no▁3｜>'", "m.content"),
        "no beginning": ("{{- '<｜hy_begin▁of▁sentence｜>' -}}", ""),
    },
}  # fmt: skip


def trained(chat, row):
    """As oracles.expected, by way of the template."""
    try:
        sequences = chat.sequences(row, "all", Counter())
    except BadRow:
        return None
    return [(text[: spans[-1][1]], [text[a:b] for a, b in spans]) for text, spans in sequences if spans]


@pytest.fixture
def first_disagreement(format_tokenizer):
    def find(name, template):
        tokenizer = copy.copy(format_tokenizer(name))
        tokenizer.chat_template = template
        chat = ChatFormat(tokenizer)
        for conversation, (messages, more) in CONVERSATIONS.items():
            row = {"messages": messages, **more}
            if trained(chat, to_conversation(row, None, Counter())) != expected(name, row):
                return conversation
        return None

    return find


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_template_as_it_is_agrees(name, first_disagreement):
    assert first_disagreement(name, chat_template(name)) is None and len(MUTATIONS[name]) >= 10


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in MUTATIONS.items() for fault in faults])
def test_a_fault_of_the_template_is_seen(name, fault, first_disagreement):
    template, (old, new) = chat_template(name), MUTATIONS[name][fault]
    assert old in template
    assert first_disagreement(name, template.replace(old, new)) is not None
