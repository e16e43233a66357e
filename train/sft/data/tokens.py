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
        ends = np.cumsum(self.token_bytes[ids])
        if len(ends) and ends[-1] == len(text.encode()):
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
        """Bytes of text that each token of a byte-level vocabulary stands for (vocabulary,)."""
        byte_level = {chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
        byte_level |= {chr(256 + i) for i in range(68)}  # the characters that byte-level BPE writes other bytes as
        added = self.tokenizer.added_tokens_decoder
        lengths: np.ndarray = np.zeros(len(self.tokenizer), np.int64)
        for i, token in enumerate(self.tokenizer.convert_ids_to_tokens(range(len(lengths)))):
            if i not in added and isinstance(token, str) and byte_level.issuperset(token):
                lengths[i] = len(token)
            elif token is not None:
                lengths[i] = len(token.encode() if isinstance(token, str) else token)
        return lengths


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
