"""An answer written under the grammar of the format: whatever the model prefers, it is valid and repeats nothing.

Most of an answer is forced text. It is fed to the model in chunks, and only the tokens of values, and whether another
fragment follows, are chosen (jump-forward decoding). A value that was written before is refused: the writer goes back
to its closest call between two tokens and takes the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from conversation.answering.allowed_tokens import AllowedTokens
from conversation.format.calls import MAX_FRAGMENTS, NUM_FOLLOW_UPS, FollowUp, repeated
from conversation.format.control_tokens import END_OF_TURN, Control
from conversation.format.grammar import ADD_CHOICE, ADD_TEXT, RESTATE, Call, Value, may_end
from conversation.models.tokenizer import common_prefix_length

Scores = NDArray[np.float32]

CONTRASTED = (Value.FRAGMENT, Value.FOLLOW_UP)
"""The values that are about the question. Names and numbers are not, and syntax is forced."""
DISTINCT = (Value.FRAGMENT, Value.FOLLOW_UP, Value.TARGET)
"""The values of which an answer contains no two equal ones."""
PLAUSIBLE = 0.1
"""Contrast chooses among tokens of at least this share of the likeliest one's probability: the contrast of two tiny
probabilities says nothing (the plausibility constraint of Li et al. 2023, "Contrastive decoding")."""
MAX_REFUSALS = 50
CANDIDATES = 64
LAST_RESORT = 1e4
"""Taken from the score of a token that is allowed, but to be chosen only when a value has to change."""


class Reader(Protocol):
    """A model that has read one or several contexts, and reads an answer after each of them."""

    def logits(self, answer: list[int]) -> Scores:
        """The logits [contexts, vocabulary] after a non-empty answer. Only what is new is computed."""


@dataclass(frozen=True)
class Draw:
    """Chooses at random instead of the likeliest: softmax(logits / temperature), within the likeliest tokens that
    together have the probability `top_p`."""

    temperature: float
    top_p: float
    generator: np.random.Generator

    def perturb(self, scores: Scores) -> Scores:
        """Scores [R] whose order is a draw without replacement (Gumbel-top-k, Kool et al. 2019)."""
        scores = scores / self.temperature
        order = np.argsort(-scores, kind="stable")
        probabilities = np.exp((scores[order] - scores[order[0]]).astype(np.float64))
        probabilities /= probabilities.sum()
        outside = np.empty(len(scores), dtype=np.bool_)
        outside[order] = probabilities.cumsum() - probabilities >= self.top_p
        return (scores + self.generator.gumbel(size=len(scores)) - LAST_RESORT * outside).astype(np.float32)


@dataclass(frozen=True)
class Written:
    """A call of an answer that is whole: its ids, and its values in order."""

    call: Call
    values: tuple[str, ...]
    ids: list[int]

    @property
    def content(self) -> str | FollowUp:
        """The restated question or the fragment, or the follow-up."""
        return FollowUp(*self.values) if self.call is ADD_CHOICE else self.values[0]


@dataclass
class _Choice:
    """A choice among candidates, best first: the tokens and their scores, and which of them is taken."""

    tokens: list[int]
    scores: list[float]
    taken: int = 0

    @property
    def token(self) -> int:
        return self.tokens[self.taken]

    @property
    def gap(self) -> float:
        """How much better the taken token is than the next one, in nats."""
        return self.scores[self.taken] - self.scores[self.taken + 1]

    @property
    def has_other(self) -> bool:
        return self.taken + 1 < len(self.tokens)


class Writer:
    """Writes answers to one prompt, each from the model's best choices or from drawn ones.

    `strength` is the a of contrast: in fragments and follow-ups a token is scored by
    (1 + a) log p(token | question) - a log p(token | neutral question), where the reader's second context is the
    neutral question (`decoding.Decoding` names the source). With 0 there need be none.
    """

    def __init__(self, reader: Reader, tokens: AllowedTokens, strength: float = 0.0):
        self._reader, self._tokens, self._strength = reader, tokens, strength
        self._restate, self._text, self._choice = (
            [tokens.vocabulary.encode(run) for run in call.forced_pieces()] for call in (RESTATE, ADD_TEXT, ADD_CHOICE)
        )
        self._draw: Draw | None = None

    def write(self, draw: Draw | None = None) -> list[int]:
        """The ids of an answer, up to and including `<end_of_turn>`."""
        ids = [token for written in self.calls(draw) for token in written.ids]
        return ids + self._tokens.vocabulary.encode([Control(END_OF_TURN)])

    def calls(self, draw: Draw | None = None) -> Iterator[Written]:
        """The calls of an answer, each as soon as it is whole."""
        self._draw = draw
        self._said: dict[Value, list[str]] = {kind: [] for kind in Value}
        ids: list[int] = []
        if self._tokens.vocabulary.restates:
            self._draw = None  # another answer, not an answer to another question
            yield self._write_call(ids, RESTATE, self._restate)
            self._draw = draw
        while self._another_fragment(ids):
            yield self._write_call(ids, ADD_TEXT, self._text)
        for _ in range(NUM_FOLLOW_UPS):
            yield self._write_call(ids, ADD_CHOICE, self._choice)

    def _another_fragment(self, ids: list[int]) -> bool:
        """Whether add_text is called next, by the first token in which the two calls differ."""
        if not 1 <= len(self._said[Value.FRAGMENT]) < MAX_FRAGMENTS:
            return not self._said[Value.FRAGMENT]
        text, choice = self._text[0], self._choice[0]
        same = common_prefix_length(text, choice)
        scores = self._reader.logits(ids + text[:same])[0][[text[same], choice[same]]]
        return bool((self._draw.perturb(scores) if self._draw else scores).argmax() == 0)

    def _write_call(self, ids: list[int], call: Call, forced: list[list[int]]) -> Written:
        """Write a call after `ids`, and append its own to them."""
        start, values = len(ids), []
        for before, kind in zip(forced, call.values, strict=False):
            ids += before
            value = self._value(ids, kind)
            values.append(self._tokens.text(value))
            self._said[kind].append(values[-1])
            ids += value
        ids += forced[-1]
        return Written(call, tuple(values), ids[start:])

    def _value(self, before: list[int], kind: Value) -> list[int]:
        """The ids of a value, without the `<escape>` that ends it.

        Of two tries no two are the same, as a choice only ever moves on to its next candidate.
        """
        choices: list[_Choice] = []
        for _ in range(MAX_REFUSALS):
            while not choices or choices[-1].token != self._tokens.escape:
                choices.append(self._choose(before, kind, [choice.token for choice in choices]))
            value = [choice.token for choice in choices[:-1]]
            if not self._is_repeated(kind, value):
                return value
            open_places = [place for place, choice in enumerate(choices) if choice.has_other]
            if not open_places:
                break
            closest = min(open_places, key=lambda place: choices[place].gap)
            del choices[closest + 1 :]
            choices[closest].taken += 1
        return self._shortest_value(before, kind)

    def _shortest_value(self, before: list[int], kind: Value) -> list[int]:
        """The best value of one token that was not written yet. There always is one: at most three were written."""
        tokens, scores = self._scores(before, kind, [])
        best_first = ([token] for token in tokens[np.argsort(-scores, kind="stable")].tolist())
        return next(
            value
            for value in best_first
            if may_end(kind, self._tokens.text(value)) and not self._is_repeated(kind, value)
        )

    def _is_repeated(self, kind: Value, value: list[int]) -> bool:
        return kind in DISTINCT and bool(repeated([*self._said[kind], self._tokens.text(value)]))

    def _choose(self, before: list[int], kind: Value, value: list[int]) -> _Choice:
        tokens, scores = self._scores(before, kind, value)
        best = np.arange(len(scores))
        if len(scores) > CANDIDATES:  # to sort the whole vocabulary takes longer than to read a token
            best = np.sort(np.argpartition(-scores, CANDIDATES)[:CANDIDATES])
        best = best[np.argsort(-scores[best], kind="stable")]
        return _Choice(tokens[best].tolist(), scores[best].tolist())

    def _scores(self, before: list[int], kind: Value, value: list[int]) -> tuple[NDArray[np.int64], Scores]:
        """The tokens [R] that the grammar allows after `value`, and their scores [R].

        Logits serve as log probabilities: they differ by a constant, which no comparison here depends on.
        """
        logits = self._reader.logits(before + value)
        allowed = self._tokens.after(kind, self._tokens.text(value))[: logits.shape[1]]
        tokens = np.flatnonzero(allowed)
        scores = logits[0, tokens]
        if self._strength and kind in CONTRASTED:
            plausible = scores >= scores.max() + math.log(PLAUSIBLE)
            contrasted = (1 + self._strength) * scores - self._strength * logits[1, tokens]
            scores = np.where(plausible, contrasted, scores - LAST_RESORT)
        return tokens, self._draw.perturb(scores) if self._draw else scores
