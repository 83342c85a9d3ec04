"""How llama.cpp reads a GGUF file for the writer: its vocabulary, and sequences that share what they begin with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conversation.answering.constrained import Scores
from conversation.answering.prefix_cache import KEPT, Full
from conversation.answering.vocabulary import RESTATES_KEY
from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.format.calls import Example, Prompt
from conversation.format.control_tokens import (
    CONTROL_TOKENS,
    ESCAPE,
    FORMAT_TOKENS,
    Control,
    cut,
    names_to_cut,
    pattern_of,
)
from conversation.models.llama_cpp import CONTROL, NORMAL, USER_DEFINED, LlamaModel
from conversation.runs.files import shown

SEQUENCES = KEPT + 4
"""Those that are kept, and those of an answer under way."""


class GgufVocabulary:
    """The vocabulary of a GGUF file (see `vocabulary.Vocabulary`).

    Raises UserError when a control token of the format is missing: then it is another model.
    """

    def __init__(self, model: LlamaModel, path: Path):
        self._model = model
        names = model.token_names()
        self._ids = {name: token for token, name in enumerate(names)}
        if missing := [token for token in FORMAT_TOKENS if token not in self._ids]:
            raise UserError(
                f"{shown(path)} is another model: its vocabulary has no {missing[0]}",
                "name a file that export_conversation_model.py made",
            )
        self.escape = self._ids[ESCAPE]
        self.restates = model.metadata(RESTATES_KEY) == "true"
        self.texts = [name.replace("▁", " ") for name in names]
        kinds = model.token_attributes()
        control = {self._ids[token] for token in CONTROL_TOKENS if token in self._ids}
        self.special = names_to_cut(name for name, kind in zip(names, kinds, strict=True) if kind & CONTROL)
        added = names_to_cut(name for name, kind in zip(names, kinds, strict=True) if kind & (CONTROL | USER_DEFINED))
        self._added = pattern_of(added)
        self.plain = [
            token for token, kind in enumerate(kinds) if kind & (NORMAL | USER_DEFINED) and token not in control
        ]

    def encode(self, pieces: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for is_control, run in itertools.groupby(pieces, lambda piece: isinstance(piece, Control)):
            if is_control:
                ids += [self._ids[piece] for piece in run]
            else:
                ids += self._encode_text("".join(run))
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """As `models.tokenizer.encode`: the name of an added token is encoded in two parts."""
        return [token for part in cut(text, self._added) for token in self._model.tokenize(part)]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return self._exactly(replace(prompt, restates=self.restates))

    def encode_example(self, example: Example) -> list[int]:
        return [*self._exactly(example.prompt), *self.encode(example.answer.pieces())]

    def _exactly(self, prompt: Prompt) -> list[int]:
        return [self._model.bos, *self.encode(prompt.pieces())]


class LlamaMemories:
    """The sequences of a model: numbers, of which each is in use or free."""

    def __init__(self, model: LlamaModel):
        self.model = model
        self.free = list(range(SEQUENCES))

    def empty(self) -> LlamaMemory:
        if not self.free:
            raise UserError("too many answers are under way at once", "", TRIED_AND_FAILED)
        return LlamaMemory(self, self.free.pop())


class LlamaMemory:
    """One sequence of a model (see `prefix_cache.Memory`)."""

    def __init__(self, owner: LlamaMemories, number: int):
        self._owner, self._number, self._length = owner, number, 0

    def extend(self, ids: Sequence[int]) -> Scores:
        logits = self._owner.model.decode(self._number, self._length, ids)
        if logits is None:
            raise Full
        self._length += len(ids)
        return logits

    def cut(self, length: int) -> None:
        self._owner.model.cut(self._number, length)
        self._length = length

    def copy(self, length: int) -> LlamaMemory:
        other = self._owner.empty()
        self._owner.model.copy(self._number, other._number, length)
        other._length = length
        return other

    def free(self) -> None:
        self.cut(0)
        self._owner.free.append(self._number)
