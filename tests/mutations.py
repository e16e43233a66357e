"""Rows changed at random, as files are that went through too many hands."""

import random


def mutated(line: bytes, draw: random.Random) -> bytes:
    """The line with a few bytes flipped, cut, doubled, or a key or value changed for another."""
    for _ in range(draw.randint(1, 2)):
        kind, at = draw.choice([0, 1, 2, 3, 4, 5, 6, 6, 6, 6]), draw.randrange(len(line))
        if kind == 0:
            line = line[:at] + bytes([draw.randrange(256)]) + line[at + 1 :]
        elif kind == 1:
            line = line[:at] or b"{"
        elif kind == 2:
            line = line[:at] + line[at : at + draw.randint(1, 9)] + line[at:]
        elif kind == 3:
            key = draw.choice([b"messages", b"role", b"content", b"user", b"assistant", b"system"])
            line = line.replace(key, draw.choice([b"messages", b"weight", b"tools", b"tool", b"assistant", b"x"]), 1)
        elif kind == 4:
            values = [b"null", b"3", b"[]", b"{}", b"true", b'""', b'"\\ud800"', b'"\\u0000"', b"NaN", b"1e999"]
            line = line.replace(draw.choice([b'"user"', b'"assistant"', b'"content": "']), draw.choice(values), 1)
        elif kind == 6:
            digits = [i for i, byte in enumerate(line) if chr(byte).isdigit()]
            at = draw.choice(digits or [at])
            line = (
                line[:at]
                + draw.choice([b" ", b"\\n", b"x", b"<|eos|>", b"\\u4e00", "三".encode(), b""])
                + line[at + 1 :]
            )
        else:
            line = (
                line[:at] + draw.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"[", b"}", b'"', b"\\", b"\r"]) + line[at:]
            )
    return line.replace(b"\n", b" ")
