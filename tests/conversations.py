"""Conversations of every kind, and what the model has to say in each: written down here without rendering.

`says_…` are the oracles of the chat formats: for each sequence that a row becomes, the text of its supervised tokens.
"""

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
    return message.get("reasoning_content") or message.get("thinking") or None, content


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


def write_rows(file, number=50):
    """Rows of one turn, `q0` and `a0` and so on, into a jsonl file or a .gz."""
    lines = [json.dumps({"messages": [user(f"q{i}"), assistant(f"a{i}")]}) + "\n" for i in range(number)]
    data = "".join(lines).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file
