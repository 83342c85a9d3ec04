"""An answer written under the grammar of the format: whatever the model prefers, it is valid and repeats nothing.

Most of an answer is forced text. It is fed to the model in chunks, and only the tokens of values, and whether another
fragment follows, are chosen (jump-forward decoding). A value that was written before is refused: the writer goes back
to its closest call between two tokens and takes the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from conversation.answering.allowed_tokens import allowed_tokens
from conversation.answering.scoring import NEUTRAL_PROMPT
from conversation.format.calls import MAX_FRAGMENTS, NUM_FOLLOW_UPS, Prompt, repeated
from conversation.format.control_tokens import END_OF_TURN, Control
from conversation.format.grammar import ADD_CHOICE, ADD_TEXT, Call, Value, may_end
from conversation.models.tokenizer import encode, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTRASTED = (Value.FRAGMENT, Value.FOLLOW_UP)
"""The values that are about the question. Names and numbers are not, and syntax is forced."""
DISTINCT = (Value.FRAGMENT, Value.FOLLOW_UP, Value.TARGET)
"""The values of which an answer contains no two equal ones."""
PLAUSIBLE = 0.1
"""Contrast chooses among tokens of at least this share of the likeliest one's probability: the contrast of two tiny
probabilities says nothing (Li et al. 2023, "Contrastive decoding")."""
MAX_REFUSALS = 50
CANDIDATES = 64
LAST_RESORT = 1e4
"""Taken from the score of a token that is allowed, but to be chosen only when a value has to change."""


@dataclass(frozen=True)
class Draw:
    """Chooses at random instead of the likeliest: softmax(logits / temperature), within the likeliest tokens that
    together have the probability `top_p`."""

    temperature: float
    top_p: float
    generator: torch.Generator

    def perturb(self, scores: Tensor) -> Tensor:
        """Scores [R] whose order is a draw without replacement (Gumbel-top-k, Kool et al. 2019)."""
        scores = scores / self.temperature
        probabilities, order = scores.softmax(0).sort(descending=True)
        outside = torch.empty_like(scores, dtype=torch.bool)
        outside[order] = probabilities.cumsum(0) - probabilities >= self.top_p
        noise = -torch.log(torch.empty_like(scores).exponential_(generator=self.generator))
        return scores + noise - LAST_RESORT * outside


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
    (1 + a) log p(token | question) - a log p(token | neutral question). With 0 the neutral question is not asked.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, strength: float = 0.0
    ):
        self._tokenizer = tokenizer
        self._tokens = allowed_tokens(tokenizer)
        self._strength = strength
        prompts = [prompt, NEUTRAL_PROMPT] if strength else [prompt]
        contexts = [encode_prompt(tokenizer, each) for each in prompts]
        self._reader = _Reader(model, contexts, tokenizer.pad_token_id or 0)
        self._text, self._choice = (
            [encode(tokenizer, run) for run in call.forced_pieces()] for call in (ADD_TEXT, ADD_CHOICE)
        )
        self._draw: Draw | None = None

    def write(self, draw: Draw | None = None) -> list[int]:
        """The ids of an answer, up to and including `<end_of_turn>`."""
        self._draw = draw
        self._said: dict[Value, list[str]] = {kind: [] for kind in Value}
        ids: list[int] = []
        while self._another_fragment(ids):
            self._write_call(ids, ADD_TEXT, self._text)
        for _ in range(NUM_FOLLOW_UPS):
            self._write_call(ids, ADD_CHOICE, self._choice)
        return ids + encode(self._tokenizer, [Control(END_OF_TURN)])

    def _another_fragment(self, ids: list[int]) -> bool:
        """Whether add_text is called next, by the first token in which the two calls differ."""
        if not 1 <= len(self._said[Value.FRAGMENT]) < MAX_FRAGMENTS:
            return not self._said[Value.FRAGMENT]
        text, choice = self._text[0], self._choice[0]
        same = _common(text, choice)
        options = torch.tensor([text[same], choice[same]])
        scores = self._reader.logits(ids + text[:same])[0][options]
        return bool((self._draw.perturb(scores) if self._draw else scores).argmax() == 0)

    def _write_call(self, ids: list[int], call: Call, forced: list[list[int]]) -> None:
        for before, kind in zip(forced, call.values, strict=False):
            ids += before
            value = self._value(ids, kind)
            self._said[kind].append(self._tokens.text(value))
            ids += value
        ids += forced[-1]

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
        best_first = ([token] for token in tokens[scores.argsort(descending=True)].tolist())
        return next(
            value
            for value in best_first
            if may_end(kind, self._tokens.text(value)) and not self._is_repeated(kind, value)
        )

    def _is_repeated(self, kind: Value, value: list[int]) -> bool:
        return kind in DISTINCT and bool(repeated([*self._said[kind], self._tokens.text(value)]))

    def _choose(self, before: list[int], kind: Value, value: list[int]) -> _Choice:
        tokens, scores = self._scores(before, kind, value)
        best = scores.topk(min(CANDIDATES, len(scores)))
        return _Choice(tokens[best.indices].tolist(), best.values.tolist())

    def _scores(self, before: list[int], kind: Value, value: list[int]) -> tuple[Tensor, Tensor]:
        """The tokens [R] that the grammar allows after `value`, and their scores [R].

        Logits serve as log probabilities: they differ by a constant, which no comparison here depends on.
        """
        logits = self._reader.logits(before + value)
        allowed = self._tokens.after(kind, self._tokens.text(value))[: logits.shape[1]]
        tokens = allowed.nonzero()[:, 0]
        scores = logits[0, tokens]
        if self._strength and kind in CONTRASTED:
            plausible = scores >= scores.max() + math.log(PLAUSIBLE)
            contrasted = (1 + self._strength) * scores - self._strength * logits[1, tokens]
            scores = torch.where(plausible, contrasted, scores - LAST_RESORT)
        return tokens, self._draw.perturb(scores) if self._draw else scores


class _Reader:
    """A model that has read one or several contexts, padded on the left, and the same answer after each of them."""

    def __init__(self, model: PreTrainedModel, contexts: Sequence[list[int]], pad: int):
        width = max(map(len, contexts))
        self._model = model
        self._contexts = torch.tensor([[pad] * (width - len(each)) + each for each in contexts])
        self._mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in contexts])
        self._cache = DynamicCache()  # without a config: sliding layers, too, keep all, so that it can be cut anywhere
        self._read: list[int] = []

    def logits(self, answer: list[int]) -> Tensor:
        """The logits [contexts, vocabulary] after a non-empty answer, in float32 on the CPU.

        Keys and values of what was read before are kept: only what is new is computed.
        """
        known = min(_common(self._read, answer), len(answer) - 1)
        if self._read:
            self._cache.crop(known - len(self._read))
        new = torch.tensor([answer[known:]]).expand(len(self._contexts), -1)
        if not self._read:
            new = torch.cat([self._contexts, new], 1)
        mask = torch.nn.functional.pad(self._mask, (0, len(answer)), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(
                input_ids=new.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        self._read = list(answer)
        return logits[:, -1].float().cpu()


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
