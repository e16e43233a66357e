"""Remakes the embedded example: a small tokenizer of the Hunyuan chat format, training rows and held-out prompts.

    python tests/make_example.py                 # rewrites train/example
    python tests/make_example.py --output_dir D  # writes the same files to D

The same files come out byte by byte, every time. They are

    tokenizer/       `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`: one token a character or English
                     word of the rows, bytes for all others, the special tokens and the chat format of A13B
    rows.jsonl       900 rows to train on
    prompts.jsonl    48 held-out rows of the same shape: neither their prompt nor their number is among the rows

What the rows teach is to read a number below 10,000 in Chinese: 1005 is 一千零五, 10 is 十, 110 is 一百一十. Three in
five think slowly (the thinking lists the places), the others carry `/no_think` and an empty think block. Questions
come in Chinese and in English, with and without a system message. They end with the number: its places are then always
equally far from the reply, which a small model learns within a minute on a CPU.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import Unigram
from transformers import AutoTokenizer

EXAMPLE = Path(__file__).resolve().parents[1] / "train" / "example"
SEED = 12
NUM_ROWS = 900
NUM_PROMPTS = 48

SPECIAL_TOKENS = ["<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"]
SPECIAL_TOKENS += [f"<|extra_{i}|>" for i in range(10)]
# Single tokens too, but ordinary text: decoding shows them, also with skip_special_tokens=True.
PATTERN_TOKENS = ["<think>", "</think>", "<answer>", "</answer>", "/no_think"]
SLOW_REPLY = "<think>\n{think}\n</think>\n<answer>\n{answer}\n</answer>"
FAST_REPLY = "<think>\n\n</think>\n<answer>\n{answer}\n</answer>"
NO_THINK = "/no_think"

CHAT_TEMPLATE = """\
{#- The format of Hunyuan-Large, A13B and 7B: <|startoftext|>{system}<|extra_4|>{user}<|extra_0|>{assistant}<|eos|>,
    later user turns open with <|startoftext|> too. A user turn ends with the token that asks for the reply, so a
    generation prompt adds nothing, unless enable_thinking is given and false: then it adds an empty think block. An
    empty system message is none. -#}
{%- set turn = namespace(open=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- if message['content'] -%}
            {{- '<|startoftext|>' + message['content'] + '<|extra_4|>' -}}
            {%- set turn.open = true -%}
        {%- endif -%}
    {%- elif message['role'] == 'user' -%}
        {{- ('' if turn.open else '<|startoftext|>') + message['content'] + '<|extra_0|>' -}}
        {%- set turn.open = false -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- message['content'] + '<|eos|>' -}}
        {%- set turn.open = false -%}
    {%- else -%}
        {{- raise_exception('roles are system (first message only), user and assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}
    {{- '<think>\\n\\n</think>\\n' -}}
{%- endif -%}
"""

CHINESE_DIGITS = "零一二三四五六七八九"
CHINESE_UNITS = ["", "十", "百", "千"]
PLACES = {"zh": ["个位", "十位", "百位", "千位"], "en": ["ones", "tens", "hundreds", "thousands"]}
SYSTEM_MESSAGES = {"zh": "你是一个乐于助人的助手。", "en": "You are a helpful assistant."}
QUESTIONS = {
    "zh": ["请把下面的数字写成中文：{n}", "这个数字用中文怎么读：{n}", "请转换成中文数字：{n}"],
    "en": ["Write this number in Chinese: {n}", "How is this number read in Chinese: {n}", "Convert to Chinese: {n}"],
}


def chinese_numeral(number: int) -> str:
    """The standard reading of `number`, 0 to 9999: zeros between digits are one 零, 10 to 19 begin with 十."""
    digits = str(number)
    if number == 0:
        return CHINESE_DIGITS[0]
    reading = ""
    for digit, unit in zip(digits, reversed(CHINESE_UNITS[: len(digits)]), strict=True):
        if digit == "0":
            reading += "零" if not reading.endswith("零") else ""
        else:
            reading += CHINESE_DIGITS[int(digit)] + unit
    reading = reading.rstrip("零")
    return reading.removeprefix("一") if 10 <= number < 20 else reading


def thinking(number: int, language: str) -> str:
    """The places of `number`, highest first, in `language` (zh or en)."""
    digits = str(number)
    places = [
        f"{name}{digit}" if language == "zh" else f"{name} {digit}"
        for name, digit in zip(reversed(PLACES[language][: len(digits)]), digits, strict=True)
    ]
    return f"{number}：{'，'.join(places)}。" if language == "zh" else f"{number}: {', '.join(places)}."


def exchange(number: int, language: str, slow: bool, question: str) -> list[dict[str, str]]:
    """One question about `number` and its reply, as two messages."""
    answer = chinese_numeral(number)
    prompt = question.format(n=number)
    if slow:
        reply = SLOW_REPLY.format(think=thinking(number, language), answer=answer)
    else:
        prompt, reply = NO_THINK + prompt, FAST_REPLY.format(answer=answer)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def draw_numbers(rng: random.Random) -> tuple[Iterator[int], list[int]]:
    """Every number below 10,000 once, favouring short ones, zeros and repeated digits, and `NUM_PROMPTS` kept apart.

    Returns (numbers to train on, held-out numbers). One-digit numbers are never held out.
    """

    def shuffled(numbers: list[int]) -> list[int]:
        return sorted(
            numbers, key=lambda _: rng.random()
        )  # random() alone is promised to stay the same in every Python

    def favoured(numbers: list[int]) -> list[int]:
        # A repeated digit is what "whatever followed this digit" gets wrong: it forces looking at the place.
        return sorted(
            numbers, key=lambda n: -("0" in str(n)) - 1.5 * (len(set(str(n))) < len(str(n))) - 2 * rng.random()
        )

    two, three, four = (shuffled(list(range(low, 10 * low))) for low in (10, 100, 1000))
    held_out = two[:6] + three[:14] + four[: NUM_PROMPTS - 20]
    four = favoured(four[NUM_PROMPTS - 20 :])[:650]
    three = favoured(three[14:])[:250]
    train = list(range(10)) + two[6:] + three + four
    return iter(shuffled(train)), shuffled(held_out)


def make_rows() -> tuple[list[dict], list[dict]]:
    """The rows to train on and the held-out prompts with their expected replies, both as `{"messages": [...]}`."""
    rng = random.Random(SEED)
    numbers, held_out = draw_numbers(rng)

    def one_row(index: int, numbers: Iterator[int], turns: int) -> dict:
        language = ("zh", "en")[index % 2]
        messages = []
        if rng.random() < 0.25:
            messages.append({"role": "system", "content": SYSTEM_MESSAGES[language]})
        for _ in range(turns):
            slow = index // 2 % 5 in (0, 2, 4) if turns == 1 else rng.random() < 0.6
            question = QUESTIONS[language][int(rng.random() * len(QUESTIONS[language]))]
            messages += exchange(next(numbers), language, slow, question)
        return {"messages": messages}

    rows = [one_row(index, numbers, turns=1) for index in range(NUM_ROWS)]
    prompts = [one_row(index, iter([number]), turns=1) for index, number in enumerate(held_out)]
    return rows, prompts


def make_tokenizer(characters: set[str]) -> Tokenizer:
    """The fewest pieces: the rows' English words, each of `characters` and of printable ASCII, bytes for all others.

    Encoding adds nothing and changes nothing; decoding gives back the text as it was.
    """
    ascii_characters = {chr(code) for code in range(0x20, 0x7F)} | {"\n", "\t"}
    words = {word for text in [*QUESTIONS["en"], SYSTEM_MESSAGES["en"]] for word in re.findall(r" ?[A-Za-z]+", text)}
    words = {word for word in words if len(word.strip()) > 1} | {
        f"{space}{p}" for space in ("", " ") for p in PLACES["en"]
    }
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = SPECIAL_TOKENS + PATTERN_TOKENS + byte_tokens + sorted(ascii_characters | characters) + sorted(words)
    # Equal scores, so that the fewest pieces win; a text that spells "<0x0A>" must not become that byte.
    vocab = [(token, -1000.0 if token in byte_tokens else -10.0) for token in tokens]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PATTERN_TOKENS])
    return tokenizer


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with plain newlines, whatever the platform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{path} ({path.stat().st_size:,} bytes)")


def main() -> None:
    """Make every file of the example, then read the tokenizer back and check that no text is changed by it."""
    parser = argparse.ArgumentParser(description="Remakes the files of the embedded example.")
    parser.add_argument("--output_dir", type=Path, default=EXAMPLE, help="default: train/example")
    folder = parser.parse_args().output_dir

    rows, prompts = make_rows()
    for name, some in (("rows.jsonl", rows), ("prompts.jsonl", prompts)):
        write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))

    texts = [message["content"] for row in rows for message in row["messages"]]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    tokenizer = make_tokenizer(set("".join(texts)))
    write_text(folder / "tokenizer" / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text(folder / "tokenizer" / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "tokenizer" / "chat_template.jinja", CHAT_TEMPLATE)

    reloaded = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for text in [*texts, "", " ", "  two  spaces , and .\n\n", "\ttab\r\n", "龘 🀄👩‍👩‍👧 é \x00", "<0x0A> <think>"]:
        if reloaded.decode(reloaded.encode(text)) != text:
            raise SystemExit(f"the tokenizer does not give back {text!r}")


if __name__ == "__main__":
    main()
