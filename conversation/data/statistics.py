"""Counts over training examples: their structure, their lengths, their tokens."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from conversation.data.examples import root_question
from conversation.format.calls import Example


@dataclass(frozen=True)
class LengthSummary:
    """Minimum, median, mean, 95th percentile (nearest rank) and maximum of some lengths."""

    min: int
    median: float
    mean: float
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> LengthSummary:
        """The summary of at least one length."""
        ordered = sorted(lengths)
        return cls(
            min=ordered[0],
            median=statistics.median(ordered),
            mean=round(statistics.fmean(ordered), 1),
            p95=ordered[max(0, -(-95 * len(ordered) // 100) - 1)],
            max=ordered[-1],
        )

    def __str__(self) -> str:
        return f"min: {self.min}, median: {self.median}, mean: {self.mean}, p95: {self.p95}, max: {self.max}"


@dataclass(frozen=True)
class StructureCounts:
    """Counts over the structure of examples. Numbers of texts and turns are keys as text, as in JSON."""

    examples: int
    trees: int
    add_text_calls: int
    add_choice_calls: int
    texts_per_example: dict[str, int]
    examples_by_turn: dict[str, int]
    duplicates: int


@dataclass(frozen=True)
class DataStatistics(StructureCounts):
    """What is in the data of a run: structure, split, lengths in tokens, share of label tokens, tokenizer."""

    training_examples: int
    held_out_examples: int
    token_lengths: LengthSummary
    answer_token_lengths: LengthSummary
    label_token_share: float
    maximum_length: int
    examples_changed_by_fix_mistral_regex: int
    first_change_by_fix_mistral_regex: str | None


def count_structure(examples: Sequence[Example]) -> StructureCounts:
    """Count texts, choices, turns, root questions and duplicates."""
    texts = Counter(len(example.answer.fragments) for example in examples)
    turns = Counter(sum(u.speaker == "User" for u in example.prompt.history) + 1 for example in examples)
    repeated = Counter(example.text for example in examples)
    return StructureCounts(
        examples=len(examples),
        trees=len({root_question(example) for example in examples}),
        add_text_calls=sum(number * count for number, count in texts.items()),
        add_choice_calls=sum(len(example.answer.follow_ups) for example in examples),
        texts_per_example={str(number): count for number, count in sorted(texts.items())},
        examples_by_turn={str(number): count for number, count in sorted(turns.items())},
        duplicates=sum(count - 1 for count in repeated.values()),
    )
