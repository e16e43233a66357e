"""What each chat format makes of a row, by string rules: neither sft/ nor jinja is used here.

`expected(name, row)` is the oracle: for each sequence that the row becomes its text, up to the end of the last turn
that the model says, and what the model says in it.
"""

import json
from datetime import UTC, datetime

from tiny import FORMATS

EMPTY = "<think>\n\n</think>\n"  # the block that enable_thinking false hands over
DAYS = "一二三四五六日"


def apart(message):
    """(thinking or None, answer) of the table's messages: thinking beside, in the pattern, or none."""
    content = message.get("content") or ""
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
    if thinking is None or (message.get("content") or "").startswith("<think>"):
        return message.get("content") or ""
    block = f"<think>\n{thinking}\n</think>\n"
    return block if message.get("tool_calls") and not answer else f"{block}<answer>\n{answer}\n</answer>"


def functions(message):
    return [(c["function"]["name"], dumps(c["function"]["arguments"])) for c in message.get("tool_calls") or []]


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def own(block, text):
    """What the model says where inference hands the block over: a block of the row's own is that one."""
    return text.removeprefix(block) if block else text


# Each format: the prompt that inference sees before turn i, with `past` before it, and what the model says then.


def small(name, row, past, i):
    """0.5B, 1.8B, 4B, 7B: headers on the user's turn, <answer> taken apart in every turn that is not the last."""
    (begin, end, (system_end, user, reply)), tools = FORMATS[name], row.get("tools")
    systems = "\n\n".join(m["content"] for m in past if m["role"] == "system")
    text = begin + systems
    if tools:
        text += ("\n\n" if systems else "") + "# Tools\n<tools>\n" + "\n".join(map(dumps, tools)) + "\n</tools>\n\n"
    text += system_end if systems or tools else ""

    def turn(message, later):
        content = in_content(message)
        if message.get("tool_calls"):
            calls = "\n".join(f"<tool_call>{f}\n```json\n{x}\n```</tool_call>" for f, x in functions(message))
            return f"{content}<tool_calls>{calls}</tool_calls>{end}"
        if later and "<answer>" in content:
            content = content.split("<answer>")[-1].strip("</answer>").strip()
        return content + end

    if past[i - 1]["role"] == "assistant":
        return None  # the prompt would hold a header that the turn has not
    asked = user == begin  # the first question goes on from the token that begins the text
    for k, message in enumerate(past[:i]):
        if message["role"] == "user":
            text += ("" if asked else user) + message["content"] + reply
            asked = False
        elif message["role"] == "assistant":
            text += turn(message, later=True)
        elif message["role"] == "tool":
            text += "\n" if past[k - 1]["role"] == "tool" else f"{user}<tool_responses>"
            text += f"<tool_response>{message['content']}</tool_response>"
            text += "" if past[k + 1]["role"] == "tool" else f"</tool_responses>{reply}"
    block = EMPTY if row.get("enable_thinking") is False else ""
    return text + block, own(block, turn(past[i], later=False))


def a13b(name, row, past, i):
    """A13B; with tools its template writes text of the model itself, and thinking stands in front of that."""
    tools, text, system = row.get("tools"), "", past[0]["content"] if past[0]["role"] == "system" else ""
    if tools:
        time = datetime.fromisoformat(row["time"]) if "time" in row else datetime(2025, 1, 1, tzinfo=UTC)
        text = "<|startoftext|>你可以调用下列函数（JSON）。不调用函数时，回复以助手：开头；"
        text += f"调用时只输出<tool_calls>[…]</tool_calls>。\n\n{dumps(tools)}"
        text += f"\n\n额外要求：\n{system}" if system else ""
        text += f"\n\n当前时间：{time:%Y-%m-%d %H:%M:%S} 星期{DAYS[time.weekday()]}<|extra_4|>"
    elif system:
        text = f"<|startoftext|>{system}<|extra_4|>"

    def turn(message, last):
        thinking, answer = apart(message)
        calls = ", ".join(f'{{"name": "{f}", "arguments": {x}}}' for f, x in functions(message))
        if not tools:
            return in_content(message) + "<|eos|>"
        said = f"<tool_calls>[{calls}]</tool_calls>" if calls else f"助手：{answer}"
        if last and thinking is not None:
            said = f"<think>\n{thinking}\n</think>\n<answer>{said}</answer>"
        return said + "<|eos|>"

    opened = bool(system) and not tools
    for message in past[:i]:
        if message["role"] == "user":
            text += ("用户：" if tools else "" if opened else "<|startoftext|>") + message["content"] + "<|extra_0|>"
            opened = False
        elif message["role"] == "tool" and tools:
            text += f"<tool_response>{message['content']}</tool_response><|extra_0|>"
        elif message["role"] == "assistant":
            text += turn(message, last=False)
    block = EMPTY if row.get("enable_thinking") is False else ""
    return text + block, own(block, turn(past[i], last=True))


def hy3(name, row, past, i):
    """Hy3: thinking in a field of its own, kept after the last user message, or everywhere with tools."""
    begin, end, (user, reply, mode, think, close) = FORMATS["hy3"]
    effort, tools = row.get("reasoning_effort") or "no_think", row.get("tools")
    text = begin + "".join(m["content"] for m in past if m["role"] == "system")
    if tools:
        text += "# Tools\n<tools>\n" + "".join(dumps(tool) + "\n" for tool in tools) + "</tools>"
    text += f"{mode}reasoning_effort:{effort}"
    last_user = max(k for k in range(i) if past[k]["role"] == "user")

    def turn(k):
        thinking, answer = apart(past[k])
        calls = "".join(f"<tool_call:test>{f}{x}\n" for f, x in functions(past[k]))
        calls = f"<tool_calls:test>\n{calls}</tool_calls:test>" if calls else ""
        return (thinking or "" if tools or k > last_user else "") + close + answer + calls + end

    responding = False
    for k, message in enumerate(past[: i + 1]):
        if responding and message["role"] != "tool":
            text += "</tool_responses:test>"
        if k == i:
            break
        if message["role"] == "user":
            text += user + message["content"]
        elif message["role"] == "tool":
            text += ("" if responding else "<tool_responses:test>\n") + f"<tool_response:test>{message['content']}"
            text += "</tool_response:test>\n"
        elif message["role"] == "assistant":
            text += reply + think + turn(k)
        responding = message["role"] == "tool"
    text += reply + think
    closed = effort == "no_think" and not apart(past[i])[0]  # thinking stands before the end that the prompt writes
    return (text + close, turn(i).removeprefix(close)) if closed else (text, turn(i))


def mt(name, row, past, i):
    """Hunyuan-MT, HY-MT: no thinking (an empty field is none), no tools."""
    begin, end, (system_end, _, user, reply) = FORMATS["mt"]
    text = begin

    def turn(message):
        return (in_content(message) if apart(message)[0] else message.get("content") or "") + end

    for message in past[:i]:
        if message["role"] == "system":
            text += message["content"] + system_end
        elif message["role"] == "user":
            text += user + message["content"]
        elif message["role"] == "assistant":
            text += reply + turn(message)
    said = turn(past[i])
    return text + reply, "" if past[i].get("tool_calls") and said == end else said  # left out whole: not even the end


def opens_think(name, row, past, i):
    """A template that does not exist: the generation prompt opens the think block."""
    last_user = max(k for k in range(i) if past[k]["role"] == "user")

    def turn(k):
        thinking, answer = apart(past[k])
        calls = "".join(f"\n<call>{dumps(c)}</call>" for c in past[k].get("tool_calls") or [])
        block = f"<think>\n{thinking or ''}</think>\n" if k > last_user else ""
        return f"{block}{answer}{calls}<|im_end|>"

    text = ""
    for k, message in enumerate(past[:i]):
        body = turn(k) if message["role"] == "assistant" else message["content"] + "<|im_end|>"
        text += f"<|im_start|>{message['role']}\n{body}\n"
    return f"{text}<|im_start|>assistant\n<think>\n", turn(i).removeprefix("<think>\n")


RULES = {"hy": a13b, "example": a13b, "dense": small, "7b": small, "hy3": hy3, "mt": mt, "opens_think": opens_think}


def expected(name, row, history="as_written"):
    """[(text of a sequence up to the end of its last supervised turn, [what the model says in it, …])]; None for a row
    that the format cannot say."""
    messages = [m for m in row["messages"] if m["role"] != "system" or m["content"]]
    found = []
    for i in reversed(range(len(messages))):
        if messages[i]["role"] != "assistant" or messages[i].get("weight") == 0:
            continue
        past = list(messages)
        if history == "answers":
            for k in (k for k in range(i) if messages[k]["role"] == "assistant"):
                past[k] = messages[k] | {"content": apart(messages[k])[1], "reasoning_content": None, "thinking": None}
        turn = RULES[name](name, row, past, i)
        if turn is None:
            return None
        prompt, said = turn
        if not said:
            continue
        if found and found[0][0].startswith(prompt + said):  # the later turn goes on from this one as it was
            found[0][1].insert(0, said)
        else:
            found.insert(0, (prompt + said, [said]))
    return found
