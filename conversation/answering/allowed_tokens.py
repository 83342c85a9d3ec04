"""Which tokens may go on with a value: `grammar.may_go_on`, for the whole vocabulary at once."""

from __future__ import annotations

import bisect
import functools
import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from conversation.answering.vocabulary import TransformersVocabulary, Vocabulary
from conversation.format.control_tokens import pattern_of
from conversation.format.grammar import MAX_CHARACTERS, Value, is_one_line, may_end, may_go_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TARGET_TOKEN = re.compile(r"_?[a-z0-9]+(?:_[a-z0-9]+)*_?|_")
_NUMBER_TOKEN = re.compile(r"[0-9.]+")


class AllowedTokens:
    """The tokens of a vocabulary by what they write, and masks over them.

    A value is made of tokens that write whole characters. Control tokens are out, and so are the tokens of single
    bytes, which Gemma's tokenizer needs for characters outside its 262,144 entries (1 answer of 1,511 in the project's
    own data): half a character would be no text.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.texts, self.escape = vocabulary.texts, vocabulary.escape
        texts = self.texts
        self._lengths = np.array([len(text) for text in texts])
        control_tokens = pattern_of(vocabulary.special)
        line = [token for token in vocabulary.plain if texts[token] and is_one_line(texts[token])]
        line = [token for token in line if not control_tokens.search(texts[token])]
        line = [token for token in line if "\ufffd" not in texts[token]]  # half a character of a byte-level BPE
        self._line = self._mask(line)
        self._not_blank = self._mask([token for token in line if texts[token].strip()])
        self._line_by_text = sorted(line, key=texts.__getitem__)
        target = [token for token in line if _TARGET_TOKEN.fullmatch(texts[token])]
        self._target = self._mask(target)
        self._target_start = self._mask([token for token in target if texts[token][0] != "_"])
        self._underscore_last = self._mask([token for token in target if texts[token][-1] == "_"])
        self._number = [token for token in line if _NUMBER_TOKEN.fullmatch(texts[token])]

    def text(self, ids: list[int]) -> str:
        """What the tokens of a value write."""
        return "".join(self.texts[token] for token in ids)

    def after(self, kind: Value, text: str) -> NDArray[np.bool_]:
        """Mask [vocabulary] of the tokens that may follow `text` in a value: those that go on with it, and `<escape>`
        where it may end."""
        left = MAX_CHARACTERS[kind] - len(text)
        if kind is Value.CONFIDENCE:
            allowed = self._mask([token for token in self._number if may_go_on(kind, text + self.texts[token])])
        elif kind is Value.TARGET:
            allowed = self._target if text and text[-1] != "_" else self._target_start
            allowed = allowed & (self._lengths + self._underscore_last <= left)
        else:
            allowed = (self._line if text else self._not_blank) & (self._lengths <= left)
            for name in self.vocabulary.special:  # no control token may be spelled out, either
                for begun in range(1, len(name)):
                    if text.endswith(name[:begun]):
                        allowed[self._line_beginning_with(name[begun:])] = False
        if text and may_end(kind, text):
            allowed[self.escape] = True
        return allowed

    def _line_beginning_with(self, start: str) -> list[int]:
        """The tokens of one line that begin with a text. They lie side by side: two binary searches find them."""
        tokens, texts = self._line_by_text, self.texts
        first = bisect.bisect_left(tokens, start, key=texts.__getitem__)
        end = bisect.bisect_left(tokens, True, first, key=lambda token: not texts[token].startswith(start))
        return tokens[first:end]

    def _mask(self, tokens: list[int]) -> NDArray[np.bool_]:
        mask = np.zeros(len(self.texts), dtype=np.bool_)
        mask[tokens] = True
        return mask


@functools.lru_cache(maxsize=2)
def allowed_tokens(tokenizer: PreTrainedTokenizerBase) -> AllowedTokens:
    """The masks of a tokenizer, made once (Gemma's vocabulary: two to four seconds)."""
    return AllowedTokens(TransformersVocabulary(tokenizer))
