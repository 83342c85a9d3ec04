"""What a model knows without saying it: the probabilities that it gives to answers, follow-ups and confidences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from conversation.answering.decoding import NEUTRAL_PROMPT
from conversation.answering.token_losses import label_log_probabilities
from conversation.data.questions import HeldOutCase
from conversation.format.calls import Answer, Example, FollowUp, Prompt
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


class Scorer:
    """Log probabilities of parts of answers, each distinct sequence computed once.

    Sequences that are read together share what they begin with: `read_ahead` reads what several figures will ask for.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model, self._tokenizer = model, tokenizer
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

    def expected_confidences(self, cases: Sequence[HeldOutCase]) -> list[tuple[float, ...]]:
        """The confidence that the model expects for each follow-up of the true answer, given all that precedes it.

        The expectation is over the digit of the tenths, plus half a tenth; 0.05 to 0.95.
        """
        sequences, kinds = self._answers([Example(case.prompt, case.answer) for case in cases])
        results = []
        for found, names in zip(self._read(sequences), kinds, strict=True):
            starts = [i for i, kind in enumerate(names) if kind == "confidence" and names[i - 1] != "confidence"]
            expected = []
            for start in starts:
                # the value is "0", ".", tenths, hundredths where digits are tokens of their own
                p = found[start + 2, 1:].exp()
                expected.append(round((p * (0.1 * p.new_tensor(range(10)) + 0.05)).sum().item() / p.sum().item(), 4))
            results.append(tuple(expected))
        return results

    def _read(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """For each sequence the log probabilities [labels, 11] of its labels, and of the ten digits in their places."""
        new = [sequence for sequence in dict.fromkeys(sequences) if sequence not in self._known]
        self._known.update(zip(new, label_log_probabilities(self._model, new, self._digits), strict=True))
        return [self._known[sequence] for sequence in sequences]

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        if prompt not in self._prompts:
            self._prompts[prompt] = encode_prompt(self._tokenizer, prompt)
        return self._prompts[prompt]

    def _sequence(self, part: Part) -> TokenSequence:
        prompt, before, pieces = part
        context = self._encode_prompt(prompt) + encode(self._tokenizer, [*before])
        ids = context + encode(self._tokenizer, [*pieces])
        return TokenSequence(tuple(ids), tuple(i >= len(context) for i in range(len(ids))))

    def _answers(self, examples: Sequence[Example]) -> tuple[list[TokenSequence], list[list[str]]]:
        """The examples with their answers marked as labels, and the kind of each label."""
        sequences, kinds = [], []
        for example in examples:
            prompt = self._encode_prompt(example.prompt)
            answer = encode(self._tokenizer, example.answer.pieces())
            is_label = (False,) * len(prompt) + (True,) * len(answer)
            sequences.append(TokenSequence((*prompt, *answer), is_label))
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


def _fragments_only(answer: Answer) -> list[str]:
    """The pieces of an answer's add_text calls: its follow-ups name the topic in their targets."""
    pieces = answer.pieces()
    first = next(i for i, piece in enumerate(pieces) if "add_choice" in piece)
    return pieces[: first - 1]


def right_of_five(scorer: Scorer, cases: Sequence[HeldOutCase]) -> list[bool]:
    """Whether the right answer is the likeliest of five: log p(answer | question) - log p(answer | neutral question).

    The four others answer other questions of the same set, roots beside roots and follow-ups beside follow-ups; only
    the fragments of an answer count (SENSE: knowledge without generation; the score is pointwise mutual information).
    """
    found = scorer.log_probabilities(parts_of_five(cases))
    scores = [found[i] - found[i + 1] for i in range(0, len(found), 2)]
    return [_is_largest(scores[i * CANDIDATES : (i + 1) * CANDIDATES]) for i in range(len(cases))]


def parts_of_five(cases: Sequence[HeldOutCase]) -> list[Part]:
    """What `right_of_five` asks for: five answers for each case, each after its question and the neutral one."""
    parts: list[Part] = []
    for case in cases:
        for other in _five(case, cases):
            fragments = _fragments_only(other.answer)
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

    By log p(text | question, answer) - log p(text | neutral question, neutral answer), as the first add_choice.
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
    for case in cases:
        true = case.answer.follow_ups[case.followed].text
        others = [c.answer.follow_ups[c.followed].text for c in cases if c.set_name == case.set_name and c is not case]
        texts = [true, *[text for text in dict.fromkeys(others) if text != true][:CONFOUNDERS]]
        before = _fragments_only(case.answer)
        neutral = _fragments_only(Answer((NEUTRAL_FRAGMENT,), case.answer.follow_ups))
        opened = [_opened_choice(text) for text in texts]
        parts.append([part for o in opened for part in ((case.prompt, before, o), (NEUTRAL_PROMPT, neutral, o))])
    return parts


def _opened_choice(text: str) -> list[str]:
    """The pieces of an add_choice call up to the end of its text."""
    answer = Answer(("x",), tuple(FollowUp(text, "0.3", f"n{i}") for i in range(3)))
    pieces = answer.pieces()
    first = next(i for i, piece in enumerate(pieces) if "add_choice" in piece) - 1
    return pieces[first : pieces.index(text) + 2]


def _is_largest(scores: Sequence[float]) -> bool:
    """Whether the first score is larger than all others."""
    return all(scores[0] > other for other in scores[1:])
