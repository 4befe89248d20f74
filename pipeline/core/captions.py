"""Captions to tokens, as open_clip's tokenizer of the model makes them, many at a time.

CLIP's own tokenizer is Python: some 60 us a caption in which no other thread of the process runs, most of it for
repairing text that needs no repair and for looking up each word in parts. Here words are looked up whole, and
plain text is not repaired: some 10 us, the same tokens. Other tokenizers (of Hugging Face) do their own work.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

WORDS_KEPT = 300_000  # some 80 MB; then the table of words starts anew


class CaptionTokenizer:
    """A callable: captions -> [B, T] tokens, T being the model's context, padded with 0. For any number of threads.

    Args:
        tokenizer: open_clip's, as get_tokenizer returns it.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._looks_up = type(tokenizer) is SimpleTokenizer and tokenizer.reduction_fn is None
        if not self._looks_up:
            return
        self._only_lowers = tokenizer.clean_fn("A, B.") == "a, b."  # not so: canonical text, or text as it is
        self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        self._forget_words()

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """[B, T] tokens of these captions, uint16 where all ids fit."""
        if not self._looks_up:
            return self._tokenizer(captions).numpy().astype(np.int32)
        length, end = self._tokenizer.context_length, self._tokenizer.eot_token_id
        tokens = np.zeros((len(captions), length), self._dtype)
        for row, caption in enumerate(captions):
            found = [self._tokenizer.sot_token_id]
            for word in self._clean(caption).split():
                found += self._words.get(word) or self._look_up(word)
                if len(found) >= length:
                    break
            found = [*found[: length - 1], end]
            tokens[row, : len(found)] = found
        return tokens

    def _clean(self, caption: str) -> str:
        """What the tokenizer's cleaning makes of a caption, but for the length of its white space."""
        if self._only_lowers and caption.isascii() and caption.isprintable() and "&" not in caption:
            return caption.lower()  # there is nothing to repair, and no HTML entity
        return self._tokenizer.clean_fn(caption)

    def _look_up(self, word: str) -> list[int]:
        """The tokens of a cleaned word: no token crosses white space."""
        if len(self._words) >= WORDS_KEPT:
            self._forget_words()
        found = self._words[word] = self._of_word.encode(word)
        return found

    def _forget_words(self) -> None:
        self._words: dict[str, list[int]] = {}
        self._of_word = copy.copy(self._tokenizer)
        self._of_word.clean_fn = str
        special = self._tokenizer.all_special_ids
        self._of_word.cache = {token: token for token in map(self._tokenizer.decoder.get, special)}
