"""What a model has read, kept, so that a prompt which begins like an earlier one is read from where they part.

In a conversation tree the prompts of siblings are alike up to their questions, and a child's begins like its parent's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from conversation.answering.constrained import Scores
from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.models.tokenizer import common_prefix_length

KEPT = 8
"""Prompts of which keys and values are kept; with Gemma 3 270M in FP32, 37 kB a token."""
CHUNK = 256
"""Tokens that are read at a time: between two chunks the work can be stopped."""


class Memory(Protocol):
    """Keys and values of a sequence of tokens that a model has read."""

    def extend(self, ids: Sequence[int]) -> Scores:
        """Read further tokens, at least one. Returns the logits [vocabulary] after the last, in float32. Raises
        `Full`."""

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def copy(self, length: int) -> Memory:
        """Another memory, of the first `length` tokens."""

    def free(self) -> None:
        """Forget all. The memory is not used again."""


class Stopped(Exception):
    """The caller no longer wants the answer."""


class Full(Exception):
    """`Memory.extend` has no room for more tokens: those of another sequence have to go. Nothing was read."""


@dataclass
class _Read:
    """A sequence that was read.

    `drop_one`: makes room for more tokens, and says whether it could. `is_broken`: a pass through the model broke off
    (a GPU without memory), and some layers may know more tokens than others.
    """

    memory: Memory
    drop_one: Callable[[], bool]
    ids: list[int] = field(default_factory=list)
    is_broken: bool = False

    def logits(self, ids: list[int], stopped: Callable[[], bool]) -> Scores:
        """The logits [vocabulary] after a non-empty sequence; what is known of it is not read again.

        Raises `Stopped` between two chunks when `stopped` says so, and UserError when there is no room for it.
        """
        known = min(common_prefix_length(self.ids, ids), len(ids) - 1)
        if known < len(self.ids):
            self.memory.cut(known)
            del self.ids[known:]
        while True:
            if stopped():
                raise Stopped
            chunk = ids[len(self.ids) : len(self.ids) + CHUNK]
            try:
                logits = self.memory.extend(chunk)
            except Full:
                if self.drop_one():
                    continue
                raise UserError("there is no memory for a text of this length", "", TRIED_AND_FAILED) from None
            except BaseException:
                self.is_broken = True
                raise
            self.ids += chunk
            if len(self.ids) == len(ids):
                return logits


class PrefixCache:
    """The last KEPT prompts that a model has read. `empty` makes a memory of nothing."""

    def __init__(self, empty: Callable[[], Memory]):
        self._empty = empty
        self._kept: list[_Read] = []  # the one used last is the last

    @contextlib.contextmanager
    def reader(self, contexts: Sequence[list[int]], stopped: Callable[[], bool]) -> Iterator[CachedReader]:
        """A reader of answers after each context. What it read of the contexts is kept, and the answers are not."""
        reads: list[_Read] = []
        try:
            for context in contexts:
                reads.append(self._begin(context))
            yield CachedReader(reads, contexts, stopped)
        finally:
            for read, context in zip(reads, contexts, strict=False):
                if not read.is_broken and len(read.ids) > len(context):
                    read.memory.cut(len(context))
                    del read.ids[len(context) :]
                self._keep(read)

    def _begin(self, context: list[int]) -> _Read:
        """A sequence that begins with as much of a context as is known."""
        best = max(self._kept, key=lambda read: common_prefix_length(read.ids, context), default=None)
        known = common_prefix_length(best.ids, context) if best else 0
        if best is None or known == 0:
            self._make_room()
            return _Read(self._empty(), self._drop_one)
        self._kept.remove(best)
        if known == len(best.ids):
            return best  # all of it is a part of the new one
        self._kept.append(best)
        self._make_room()
        return _Read(best.memory.copy(known), self._drop_one, best.ids[:known])

    def _make_room(self) -> None:
        while len(self._kept) >= KEPT:
            self._drop_one()

    def _drop_one(self) -> bool:
        """Forget the prompt that was not used for longest; says whether there was one."""
        if self._kept:
            self._kept.pop(0).memory.free()
            return True
        return False

    def _keep(self, read: _Read) -> None:
        if read.is_broken or not read.ids:
            read.memory.free()
            return
        self._make_room()
        self._kept.append(read)


@dataclass(frozen=True)
class CachedReader:
    """Reads an answer after each of some contexts, through a prefix cache (see `constrained.Reader`)."""

    reads: Sequence[_Read]
    contexts: Sequence[list[int]]
    stopped: Callable[[], bool]

    def read_contexts(self) -> None:
        """Read the contexts, without an answer."""
        for read, context in zip(self.reads, self.contexts, strict=True):
            read.logits(context, self.stopped)

    def logits(self, answer: list[int]) -> Scores:
        return np.stack(
            [
                read.logits(context + answer, self.stopped)
                for read, context in zip(self.reads, self.contexts, strict=True)
            ]
        )
