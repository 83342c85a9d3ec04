"""What decoding needs of a tokenizer, whichever program it comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from conversation.format.calls import Example, Prompt
from conversation.format.control_tokens import CONTROL_TOKENS, ESCAPE
from conversation.models.tokenizer import (
    PROBES,
    encode,
    encode_example,
    encode_prompt,
    hash_of_ids,
    id_of,
    restates,
    special_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINGERPRINT_KEY = "conversation.tokenizer_fingerprint"
"""In the metadata of an exported file: the fingerprint of the training's tokenizer."""
RESTATES_KEY = "conversation.restates_questions"
"""There: "true" where the model begins its answers with the question in full."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Vocabulary(Protocol):
    """The tokens of a model.

    `texts`: what each token writes, by id. `plain`: the ids of the tokens that write whole characters. Control tokens
    are no such tokens, nor are those of single bytes. `escape`: the id of `<escape>`. `special`: the names of control
    tokens, of which no value may contain one, the longest first. `restates`: the model begins its answers with the
    question in full.
    """

    texts: list[str]
    plain: list[int]
    escape: int
    special: tuple[str, ...]
    restates: bool

    def encode(self, pieces: Sequence[str]) -> list[int]:
        """Ids of rendered pieces, without `<bos>`. Only a Control piece becomes a control token."""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, in the form that the model was trained on; `<bos>` first if it has one."""

    def encode_example(self, example: Example) -> list[int]:
        """Ids of an example as it is, `<bos>` first if the model has one."""


class TransformersVocabulary:
    """The vocabulary of a tokenizer of transformers (Gemma's: one to two seconds)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        size = len(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.escape: int = vocabulary[ESCAPE]
        self.special = special_names(tokenizer)
        self.restates = restates(tokenizer)
        self.texts: list[str] = tokenizer.batch_decode(
            [[token] for token in range(size)], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= {id_of(tokenizer, token) for token in CONTROL_TOKENS if token in vocabulary}
        names = tokenizer.convert_ids_to_tokens(list(range(size)))
        self.plain = [token for token in range(size) if token not in special and not _BYTE.fullmatch(names[token])]

    def encode(self, pieces: Sequence[str]) -> list[int]:
        return encode(self._tokenizer, pieces)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return encode_prompt(self._tokenizer, prompt)

    def encode_example(self, example: Example) -> list[int]:
        return list(encode_example(self._tokenizer, example).ids)


def fingerprint(vocabulary: Vocabulary) -> str:
    """What `models.tokenizer.fingerprint` is for a tokenizer that encodes alike."""
    return hash_of_ids([vocabulary.encode_example(probe) for probe in PROBES])
