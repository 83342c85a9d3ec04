"""Which tokens may go on with a value: `grammar.may_go_on`, for the whole vocabulary at once."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conversation.format.control_tokens import CONTROL_TOKENS, ESCAPE
from conversation.format.grammar import MAX_CHARACTERS, Value, is_one_line, may_end, may_go_on
from conversation.models.tokenizer import answer_pattern, special_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_TARGET_TOKEN = re.compile(r"_?[a-z0-9]+(?:_[a-z0-9]+)*_?|_")
_NUMBER_TOKEN = re.compile(r"[0-9.]+")


class AllowedTokens:
    """The tokens of a tokenizer by what they write, and masks over them.

    A value is made of tokens that write whole characters. Control tokens are out, and so are the tokens of single
    bytes, which Gemma's tokenizer needs for characters outside its 262,144 entries (1 answer of 1,511 in the project's
    own data): half a character would be no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        size = len(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.escape: int = vocabulary[ESCAPE]
        self.texts: list[str] = tokenizer.batch_decode(
            [[token] for token in range(size)], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= {vocabulary[token] for token in CONTROL_TOKENS if token in vocabulary}
        names = tokenizer.convert_ids_to_tokens(list(range(size)))
        plain = [token for token in range(size) if token not in special and not _BYTE.fullmatch(names[token])]
        self._lengths = torch.tensor([len(text) for text in self.texts])
        line = [token for token in plain if self.texts[token] and is_one_line(self.texts[token])]
        self._control_tokens = answer_pattern(tokenizer)
        line = [token for token in line if not self._control_tokens.search(self.texts[token])]
        line = [token for token in line if "\ufffd" not in self.texts[token]]  # half a character of a byte-level BPE
        self._line = self._mask(line)
        self._not_blank = self._mask([token for token in line if self.texts[token].strip()])
        special_tokens = special_names(tokenizer)
        self._openings = {name[0] for name in special_tokens}
        ends = {name[-1] for name in special_tokens}  # what may end the name of a control token
        self._closing = [token for token in line if ends.intersection(self.texts[token])]
        target = [token for token in line if _TARGET_TOKEN.fullmatch(self.texts[token])]
        self._target = self._mask(target)
        self._target_start = self._mask([token for token in target if self.texts[token][0] != "_"])
        self._underscore_last = self._mask([token for token in target if self.texts[token][-1] == "_"])
        self._number = [token for token in line if _NUMBER_TOKEN.fullmatch(self.texts[token])]

    def text(self, ids: list[int]) -> str:
        """What the tokens of a value write."""
        return "".join(self.texts[token] for token in ids)

    def after(self, kind: Value, text: str) -> Tensor:
        """Mask [vocabulary] of the tokens that may follow `text` in a value: those that go on with it, and `<escape>`
        where it may end."""
        left = MAX_CHARACTERS[kind] - len(text)
        if kind is Value.CONFIDENCE:
            allowed = self._mask([token for token in self._number if may_go_on(kind, text + self.texts[token])])
        elif kind is Value.TARGET:
            allowed = self._target if text and text[-1] != "_" else self._target_start
            allowed = allowed & (self._lengths + self._underscore_last.int() <= left)
        else:
            allowed = (self._line if text else self._not_blank) & (self._lengths <= left)
            spelling = self._openings.intersection(text)  # no control token may be spelled out, either
            for token in self._closing if spelling else ():
                if not may_go_on(kind, text + self.texts[token], self._control_tokens):
                    allowed[token] = False
        if text and may_end(kind, text):
            allowed[self.escape] = True
        return allowed

    def _mask(self, tokens: list[int]) -> Tensor:
        mask = torch.zeros(len(self.texts), dtype=torch.bool)
        mask[tokens] = True
        return mask


@functools.lru_cache(maxsize=2)
def allowed_tokens(tokenizer: PreTrainedTokenizerBase) -> AllowedTokens:
    """The masks of a tokenizer, made once (Gemma's vocabulary: two to four seconds)."""
    return AllowedTokens(tokenizer)
