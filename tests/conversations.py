"""Conversations of every kind. What the model has to say in each is in oracles.py."""

import gzip
import json

from tiny import FORMATS


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
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
    "one turn": ([user("1+1=?"), assistant("2")], {}),
    "system": ([system("be brief"), user("1+1=?"), assistant("2")], {}),
    "empty system": ([system(""), user("1+1=?"), assistant("2")], {}),
    "two turns": ([user("a"), assistant("b"), user("c"), assistant("d")], {}),
    "system, three turns": (
        [system("s"), user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")], {}
    ),
    "ends with the user": ([user("a"), assistant("b"), user("c")], {}),
    "users twice": ([user("a"), user("b"), assistant("c")], {}),
    "users three times, later": ([user("a"), assistant("b"), user("c"), user("d"), user("e"), assistant("f")], {}),
    "slow": ([user("1+1=?"), assistant(pattern("one and one", "2"))], {}),
    "slow, effort high": ([user("1+1=?"), assistant(pattern("one and one", "2"))], HIGH),
    "slow, thinking enabled": ([user("1+1=?"), assistant(pattern("one and one", "2"))], ON),
    "fast": ([user("/no_think1+1=?"), assistant(pattern("", "2"))], {}),
    "fast, thinking disabled": ([user("/no_think1+1=?"), assistant(pattern("", "2"))], OFF),
    "fast, no_think": ([user("1+1=?"), assistant(pattern("", "2"))], NO_THINK),
    "no pattern, thinking disabled": ([user("1+1=?"), assistant("2")], OFF),
    "fast, two turns, thinking disabled": (
        [user("a"), assistant(pattern("", "b")), user("c"), assistant(pattern("", "d"))], OFF
    ),
    "empty thinking in both": ([user("q"), assistant(pattern("t", "so"), reasoning_content="")], HIGH),
    "nulls": ([user("q"), assistant("so")], {"enable_thinking": None, "reasoning_effort": None, "tools": None}),
    "documentation's own": ([user("1+1=?"), assistant("<think>\nIt is 2.</think>\n<answer>\n1+1=2\n</answer>")], {}),
    "think without answer block": ([user("q"), assistant("<think>\nhm\n</think>\n\nso")], {}),
    "thinking beside": ([user("q"), assistant("so", reasoning_content="hm")], HIGH),
    "thinking beside, of lines": ([user("q"), assistant("so\n", reasoning_content="h\n\nm")], HIGH),
    "empty thinking beside": ([user("q"), assistant("so", reasoning_content="")], {}),
    "null thinking beside": ([user("q"), assistant("so", reasoning_content=None)], {}),
    "thinking in both": ([user("q"), assistant(pattern("hm", "so"), reasoning_content="hm")], HIGH),
    "slow, two turns": ([user("a"), assistant(pattern("t", "b")), user("c"), assistant(pattern("u", "d"))], HIGH),
    "slow, then fast": (
        [user("a"), assistant(pattern("t", "b")), user("/no_thinkc"), assistant(pattern("", "d"))], {}
    ),
    "plain, then slow": ([user("a"), assistant("b"), user("c"), assistant(pattern("u", "d"))], HIGH),
    "beside, three turns": (
        [user("a"), assistant("b", thinking="t"), user("c"), assistant("d"), user("e"), assistant("f", thinking="v")],
        HIGH,
    ),
    "think quotes its end": ([user("q"), assistant(pattern("a </think> b", "so"))], HIGH),
    "answer quotes thinking": ([user("q"), assistant(pattern("t", "write <think> and </answer> here"))], HIGH),
    "user quotes thinking": ([user("<think>\nx\n</think>"), assistant("ok")], {}),
    "quoted special tokens, user": ([user(SPECIAL), assistant("ok"), user(SPECIAL), assistant("ok")], {}),
    "quoted special tokens, assistant": (
        [user("q"), assistant(f"a {SPECIAL} b"), user("r"), assistant(f"c {SPECIAL}")], {}
    ),
    "quoted special tokens, system": ([system(SPECIAL), user("q"), assistant("ok")], {}),
    "emoji": ([user("🙂👩‍👩‍👧 q"), assistant("🎉🏳️‍🌈")], {}),
    "right to left": ([user(RTL), assistant(RTL)], {}),
    "code": ([user(CODE), assistant(f"```py\n{CODE}\n```")], {}),
    "white space": ([user("  a \n"), assistant("\tb \n\n "), user("\n"), assistant(" ")], {}),
    "empty answer": ([user("a"), assistant(""), user("c"), assistant("d")], {}),
    "empty answer last": ([user("a"), assistant("b"), user("c"), assistant("")], {}),
    "thinking disabled, two turns": ([user("a"), assistant("b"), user("c"), assistant("d")], OFF),
    "thinking disabled, begins like the block": (
        [user("a"), assistant("<t> b"), user("c"), assistant("<answer> d")], OFF
    ),
    "thinking disabled, plain and own block": (
        [user("a"), assistant("b"), user("c"), assistant(pattern("", "d")), user("e"), assistant("f")], OFF
    ),
    "thinking disabled, tools": ([user("q"), call("f"), tool("1"), assistant("so")], TOOLS | OFF),
    "fast, plain": ([user("/no_think 1+1=?"), assistant("2"), user("/no_think q"), assistant(pattern("", "d"))], {}),
    "thinks like the closing tag": ([user("q"), assistant("so", reasoning_content="</thin")], {}),
    "answers end in letters of the tag": (
        [user("q"), assistant(pattern("t", "a newer one")), user("r"), assistant(pattern("u", "<answer> swear"))], HIGH
    ),
    "tools, thinking in the content": (
        [user("q"), call("f", content="<think>\nt\n</think>\n"), tool("1"), assistant(pattern("u", "so"))],
        TOOLS | HIGH,
    ),
    "tools, thinking, two rounds": (
        [user("q"), call("f", thinking="t"), tool("1"), assistant(pattern("u", "so")), user("r"), call("f"), tool("2"),
         assistant("ok", reasoning_content="v")], TOOLS | HIGH
    ),
    "tools, fast thinking": ([user("/no_think q"), assistant(pattern("", "so")), user("r"), assistant("ok")], TOOLS),
    "tools, fast thinking, thinking disabled": (
        [user("q"), assistant(pattern("", "so")), user("r"), assistant("", reasoning_content="")], TOOLS | OFF
    ),
    "two answers in a row": ([user("a"), assistant("One"), assistant("Two")], {}),
    "tools, an answer after the call": ([user("q"), call("f"), assistant("Let us see"), call("g")], TOOLS),
    "tools, text before the call": ([user("q"), call("f", content="Let me"), tool("1"), assistant("so")], TOOLS),
    "empty user": ([user(""), assistant("b")], {}),
    "combining and rare": ([user("e\u0301 ǅ ﷽ \u200b\u2028"), assistant("a\u0301\u0302 𓀀 \ufffd")], {}),
    "long": ([user("很长 " * 400), assistant("long " * 700)], {}),
    "weight 0 first": ([user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)], {}),
    "weight 0 last": ([user("a"), assistant("b"), user("c"), assistant("d", weight=0)], {}),
    "tools, one call": ([user("q"), call("f"), tool("1"), assistant("so")], TOOLS),
    "tools, not used": ([user("q"), assistant("no need")], TOOLS),
    "tools, system": ([system("s"), user("q"), call("f"), tool("1"), assistant("so")], TOOLS),
    "tools, parallel answers": ([user("q"), call("f", "g"), tool("1"), tool("2"), assistant("so")], TOOLS),
    "tools, calls in a row": ([user("q"), call("f"), tool("1"), call("g"), tool("2"), assistant("so")], TOOLS),
    "tools, null content": ([user("q"), call("f", content=None), tool("1"), assistant("so")], TOOLS),
    "tools, thinking": (
        [user("q"), call("f", reasoning_content="t"), tool("1"), assistant("so", reasoning_content="u")], TOOLS | HIGH
    ),
    "tools, two rounds": (
        [user("q"), call("f"), tool("1"), assistant("so"), user("r"), call("g"), tool("2"), assistant("ok")], TOOLS
    ),
    "tools, quoted special tokens": ([user(SPECIAL), call("f"), tool(SPECIAL), assistant("so")], TOOLS),
    "tools, ends with a call": ([user("q"), call("f")], TOOLS),
    "tools, the row's time": ([user("q"), assistant("so")], TOOLS | {"time": "2024-02-29T12:00:00"}),
}  # fmt: skip


def write_rows(file, number=50):
    """Rows of one turn, `q0` and `a0` and so on, into a jsonl file or a .gz."""
    lines = [json.dumps({"messages": [user(f"q{i}"), assistant(f"a{i}")]}) + "\n" for i in range(number)]
    data = "".join(lines).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file
