"""What a model knows without saying it: the probabilities that it gives to answers, follow-ups and confidences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from conversation.answering.decoding import NEUTRAL_PROMPT
from conversation.answering.token_losses import label_log_probabilities
from conversation.data.questions import HeldOutCase
from conversation.format.calls import Example, Prompt, call_pieces
from conversation.format.control_tokens import ESCAPE
from conversation.models.tokenizer import encode, encode_prompt
from conversation.runs.evaluation_record import KindLosses
from conversation.training.prefix_tree import TokenSequence

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Part = tuple[Prompt, Sequence[str], Sequence[str]]
"""A prompt, the pieces of an answer that are given, and the pieces after them whose probability is asked for."""

NEUTRAL_FRAGMENT = "It depends."
CANDIDATES = 5  # answers to choose the right one from
CONFOUNDERS = 9  # follow-ups beside the true one
_TENTHS = re.compile(r"0\.\d", re.ASCII)


class Scorer:
    """Log probabilities of parts of answers, each distinct sequence computed once.

    Sequences that are read together share what they begin with: `read_ahead` reads what several figures will ask for.
    `restated`: the questions in full as the model itself wrote them, by prompt. They stand before what is asked for,
    and have no part in the figures.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        restated: Mapping[Prompt, str] | None = None,
    ):
        self._model, self._tokenizer, self._restated = model, tokenizer, restated or {}
        self._escape = tokenizer.convert_tokens_to_ids(ESCAPE)
        self._digits = [encode(tokenizer, [str(digit)])[0] for digit in range(10)]
        self._known: dict[TokenSequence, Tensor] = {}
        self._prompts: dict[Prompt, list[int]] = {}

    def read_ahead(self, parts: Sequence[Part], examples: Sequence[Example]) -> None:
        """Read parts of answers and the answers of examples in one pass."""
        self._read([*map(self._sequence, parts), *self._answers(examples)[0]])

    def log_probabilities(self, parts: Sequence[Part]) -> list[float]:
        """log p(pieces | prompt, pieces before), in nats."""
        return [found[:, 0].sum().item() for found in self._read([*map(self._sequence, parts)])]

    def losses_by_kind(self, examples: Sequence[Example]) -> KindLosses:
        """Cross entropy per token of the examples' answers: of each kind of value, and of the syntax around them."""
        sequences, kinds = self._answers(examples)
        sums: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for found, names in zip(self._read(sequences), kinds, strict=True):
            for value, kind in zip(found[:, 0].tolist(), names, strict=True):
                sums[kind] -= value
                counts[kind] += 1
        means = {kind: round(sums[kind] / counts[kind], 4) for kind in counts}
        return KindLosses(examples=len(examples), **means)

    def expected_confidences(self, cases: Sequence[HeldOutCase]) -> list[tuple[float, ...] | None]:
        """The confidence that the model expects for each follow-up of the true answer, given all that precedes it.

        The expectation is over the digit of the tenths, plus half a tenth: 0.05 to 0.95. "0." is given, so that how
        likely 1.00 is does not count. None for an answer with a confidence that does not begin so, and for all answers
        where the tokenizer makes a token of several digits or of "0.": the tenths are then no token of their own.
        """
        sequences, kinds = self._answers([Example(case.prompt, case.answer) for case in cases])
        results: list[tuple[float, ...] | None] = []
        for case, found, names in zip(cases, self._read(sequences), kinds, strict=True):
            if not self._reads_digits or not all(_TENTHS.match(each.confidence) for each in case.answer.follow_ups):
                results.append(None)
                continue
            starts = [i for i, kind in enumerate(names) if kind == "confidence" and names[i - 1] != "confidence"]
            expected = []
            for start in starts:
                p = found[start + 2, 1:].exp()  # the value is "0", ".", tenths, hundredths
                expected.append(round((p * (0.1 * p.new_tensor(range(10)) + 0.05)).sum().item() / p.sum().item(), 4))
            results.append(tuple(expected))
        return results

    @cached_property
    def _reads_digits(self) -> bool:
        """Whether the tokenizer makes a token of each character of a confidence."""
        zero, point = self._digits[0], encode(self._tokenizer, ["."])
        return all(
            encode(self._tokenizer, [f"0.{tenths}{hundredths}"]) == [zero, *point, first, second]
            for tenths, first in enumerate(self._digits)
            for hundredths, second in enumerate(self._digits)
        )

    def _read(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """For each sequence the log probabilities [labels, 11] of its labels, and of the ten digits in their places."""
        new = [sequence for sequence in dict.fromkeys(sequences) if sequence not in self._known]
        self._known.update(zip(new, label_log_probabilities(self._model, new, self._digits), strict=True))
        return [self._known[sequence] for sequence in sequences]

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        if prompt not in self._prompts:
            self._prompts[prompt] = encode_prompt(self._tokenizer, prompt)
        return self._prompts[prompt]

    def _context(self, prompt: Prompt, restated: str | None) -> list[int]:
        """The ids of a prompt, and of the question in full behind it."""
        pieces = [] if restated is None else call_pieces("restate", question=restated)
        return self._encode_prompt(prompt) + encode(self._tokenizer, pieces)

    def _sequence(self, part: Part) -> TokenSequence:
        prompt, before, pieces = part
        context = self._context(prompt, self._restated.get(prompt)) + encode(self._tokenizer, [*before])
        ids = context + encode(self._tokenizer, [*pieces])
        return TokenSequence(tuple(ids), tuple(i >= len(context) for i in range(len(ids))))

    def _answers(self, examples: Sequence[Example]) -> tuple[list[TokenSequence], list[list[str]]]:
        """The examples with their answers marked as labels, and the kind of each label."""
        sequences, kinds = [], []
        for example in examples:
            context = self._context(example.prompt, example.answer.restated or self._restated.get(example.prompt))
            answer = encode(self._tokenizer, replace(example.answer, restated=None).pieces())
            is_label = (False,) * len(context) + (True,) * len(answer)
            sequences.append(TokenSequence((*context, *answer), is_label))
            kinds.append(self._kinds(answer, len(example.answer.fragments)))
        return sequences, kinds

    def _kinds(self, ids: Sequence[int], fragments: int) -> list[str]:
        """The kind of each token of an answer: values are what is between two escapes, in the order of the calls."""
        values = ["fragments"] * fragments + ["follow_ups", "confidence", "targets"] * 3
        kinds, inside, number = [], False, 0
        for token in ids:
            if token == self._escape:
                kinds.append("syntax")
                number += inside
                inside = not inside
            else:
                kinds.append(values[number] if inside else "syntax")
        return kinds


def _add_texts(fragments: Sequence[str]) -> list[str]:
    """The pieces of the add_text calls of an answer: its follow-ups would name the topic in their targets."""
    return [piece for text in fragments for piece in call_pieces("add_text", content=text)]


def _opened_choice(text: str) -> list[str]:
    """The pieces of an add_choice call up to the end of its text."""
    return call_pieces("add_choice", text=text)[:-3]


def right_of_five(scorer: Scorer, cases: Sequence[HeldOutCase]) -> list[bool]:
    """Whether the right answer is the likeliest of five: log p(answer | question) - log p(answer | neutral question).

    The four others answer other questions of the same set, roots beside roots and follow-ups beside follow-ups; only
    the fragments of an answer count. The score is pointwise mutual information (`scoring.scores`).
    """
    found = scorer.log_probabilities(parts_of_five(cases))
    scores = [found[i] - found[i + 1] for i in range(0, len(found), 2)]
    return [_is_largest(scores[i * CANDIDATES : (i + 1) * CANDIDATES]) for i in range(len(cases))]


def parts_of_five(cases: Sequence[HeldOutCase]) -> list[Part]:
    """What `right_of_five` asks for: five answers for each case, each after its question and the neutral one."""
    parts: list[Part] = []
    for case in cases:
        for other in _five(case, cases):
            fragments = _add_texts(other.answer.fragments)
            parts += [(case.prompt, (), fragments), (NEUTRAL_PROMPT, (), fragments)]
    return parts


def _five(case: HeldOutCase, cases: Sequence[HeldOutCase]) -> list[HeldOutCase]:
    """The case, then four others of its set and kind, spread over the file."""
    group = [other for other in cases if other.set_name == case.set_name and other.is_root == case.is_root]
    place = group.index(case)
    step = 1 if len(group) % 7 == 0 else 7
    return [group[(place + i * step) % len(group)] for i in range(CANDIDATES)]


def follow_up_ranks(scorer: Scorer, cases: Sequence[HeldOutCase]) -> list[int]:
    """The rank, from 1, of the follow-up that the conversation goes on with, among nine of other cases of the set.

    By log p(text | question, answer) - log p(text | neutral question, neutral answer), as the first add_choice. None
    of the nine is a follow-up that the case offers itself, and which nine they are differs from case to case. Up to
    November 2026 they were the first nine of the file, some of them the case's own: such ranks are not comparable.
    """
    parts = parts_of_follow_ups(cases)
    found = iter(scorer.log_probabilities([part for of_case in parts for part in of_case]))
    ranks = []
    for of_case in parts:
        scores = [next(found) - next(found) for _ in range(0, len(of_case), 2)]
        ranks.append(1 + sum(score >= scores[0] for score in scores[1:]))
    return ranks


def parts_of_follow_ups(cases: Sequence[HeldOutCase]) -> list[list[Part]]:
    """What `follow_up_ranks` asks for, by case: the true follow-up first, each after the answer and the neutral one."""
    parts: list[list[Part]] = []
    for number, case in enumerate(cases):
        true = case.answer.follow_ups[case.followed].text
        texts = [true, *_confounders(case, [c for c in cases if c.set_name == case.set_name], number * CONFOUNDERS)]
        before, neutral = _add_texts(case.answer.fragments), _add_texts([NEUTRAL_FRAGMENT])
        opened = [_opened_choice(text) for text in texts]
        parts.append([part for o in opened for part in ((case.prompt, before, o), (NEUTRAL_PROMPT, neutral, o))])
    return parts


def _confounders(case: HeldOutCase, group: Sequence[HeldOutCase], start: int) -> list[str]:
    """Followed follow-ups of a group that the case does not offer, each once: nine in a row, or all if they are fewer.

    `start`: where the row begins, counted in a circle. Letter case and outer white space do not count.
    """
    followed = (other.answer.follow_ups[other.followed].text for other in group)
    others = {text.strip().casefold(): text for text in followed}
    for own in case.answer.follow_ups:
        others.pop(own.text.strip().casefold(), None)
    texts = list(others.values())
    return [texts[(start + i) % len(texts)] for i in range(min(CONFOUNDERS, len(texts)))]


def _is_largest(scores: Sequence[float]) -> bool:
    """Whether the first score is larger than all others."""
    return all(scores[0] > other for other in scores[1:])
