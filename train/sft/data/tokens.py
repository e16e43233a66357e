"""Rendered text → token ids, and how many tokens lie before a place in the text.

Places are found by counting bytes. A tokenizer's own offsets would halve the rows per second, and A13B's tokenizer,
which is Python code, has none.
"""

import functools

import numpy as np
from transformers import PreTrainedTokenizerBase, PythonBackend, TokenizersBackend


class TextEncoder:
    """A tokenizer's encoding of text that a chat template rendered: no token is added."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.id_of = functools.cache(lambda token: tokenizer.convert_tokens_to_ids([token])[0])
        tokenizer("", add_special_tokens=False)  # a fast tokenizer forgets truncation and padding that its file sets

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids that apply_chat_template gives each text: the tokenizer's own call, less its checks.

        The checks would cost 23 % of all rows per second with A13B's tokenizer, up to 35 % with a fast one.
        """
        tokenizer, cls = self.tokenizer, type(self.tokenizer)
        if tokenizer.is_fast and cls._encode_plus is TokenizersBackend._encode_plus:
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        if not tokenizer.is_fast and cls._encode_plus is PythonBackend._encode_plus:
            return [list(map(self.id_of, tokenizer.tokenize(text))) for text in texts]
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def encode_each(self, texts: list[str]) -> list[list[int] | None]:
        """The same; None for a text at which the tokenizer raises an error."""
        if not texts:
            return []
        try:
            return list(self.encode(texts))
        except Exception:  # one text fails all: halve them until it is alone
            if len(texts) == 1:
                return [None]
            half = len(texts) // 2
            return self.encode_each(texts[:half]) + self.encode_each(texts[half:])

    def tokens_before(self, text: str, ids: np.ndarray, places: list[int]) -> list[int]:
        """For each place (in characters) the number of tokens that lie wholly before it."""
        if b"".join(self.token_bytes[ids].tolist()) == text.encode():
            ends = self.token_lengths[ids].cumsum()
            cuts = [len(text[:place].encode()) for place in places]
            return ends.searchsorted(cuts, side="right").tolist()
        # not a byte-level vocabulary, or text that the tokenizer normalises: where the tokens stop agreeing
        whole = ids.tolist()
        return [
            len(whole) if place == len(text) else common_prefix(self.encode([text[:place]])[0], whole)
            for place in places
        ]

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """What each token of a byte-level vocabulary stands for, as bytes (vocabulary,)."""
        # the characters that byte-level BPE writes bytes as: those that can be printed, and others from 256 on
        printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
        byte_of = {chr(b): b for b in printed}
        byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printed)}
        added = self.tokenizer.added_tokens_decoder
        pieces = []
        for i, token in enumerate(self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))):
            if isinstance(token, str) and i not in added and byte_of.keys() >= set(token):
                token = bytes(byte_of[character] for character in token)
            pieces.append(token.encode() if isinstance(token, str) else token or b"")
        return np.array(pieces, object)

    @functools.cached_property
    def token_lengths(self) -> np.ndarray:
        """Bytes of each token (vocabulary,)."""
        return np.array(list(map(len, self.token_bytes)))


def common_prefix(a: str | list[int], b: str | list[int]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # a[:low] agrees, a[: high + 1] does not
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
