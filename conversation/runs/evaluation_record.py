"""evaluation.json as a value: what a model's answers are worth, and the answers themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from conversation.runs.files import read_value, write_json
from conversation.runs.record import from_json


@dataclass(frozen=True)
class EvaluatedAnswer:
    """A held-out question, what the model said by the evaluation's decoding, and what the figures were taken of.

    JSON's names for parts. None: not measured, as relevance in a short evaluation.
    """

    set_name: str
    domain: str
    topic: str
    question: str
    history: tuple[dict[str, str], ...]
    output: str
    problem: str | None
    break_kind: str | None
    texts: tuple[str, ...] | None
    choices: tuple[dict[str, str | float], ...] | None
    sampled_problem: str | None
    sampled: bool
    right_of_five: bool
    follow_up_rank: int
    expected_confidences: tuple[float, ...] | None
    rank_agreement: float | None
    brier_score: float | None
    answer_relevance: float | None = None
    follow_up_relevance: float | None = None


@dataclass(frozen=True)
class SetFigures:
    """The figures over one set of held-out questions; each is defined where it is computed."""

    questions: int
    valid: float | None
    valid_sampled: float | None
    breaks: dict[str, int]
    equal_fragments: float | None
    fragments_without_news: float | None
    distinct_follow_ups: float | None  # the share of all answers; an invalid one is not distinct
    distinct_2: float | None
    stock_only: float | None
    commonest_confidences: float | None
    confidence_spread: float | None
    right_of_five: float | None
    right_of_five_roots: float | None
    right_of_five_follow_ups: float | None
    follow_up_recall_at_1: float | None
    follow_up_reciprocal_rank: float | None
    confidence_rank_agreement: float | None
    brier_score: float | None
    answer_relevance: float | None
    follow_up_relevance: float | None


@dataclass(frozen=True)
class KindLosses:
    """Cross entropy in nats per token, by kind of token, over the answers of some examples."""

    examples: int
    syntax: float
    fragments: float
    follow_ups: float
    targets: float
    confidence: float


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json: figures by set ("known", "unseen", "all"), losses by kind of token, answers.

    `training_losses`: of as many training examples as there are questions, evenly spread over them; up to November 2026
    they could be the first ones only.
    """

    model: str
    decoding: str
    short: bool
    finished: str
    seconds: float
    sets: dict[str, SetFigures]
    question_losses: KindLosses
    training_losses: KindLosses | None
    notes: tuple[str, ...]
    answers: tuple[EvaluatedAnswer, ...]

    @property
    def how(self) -> str:
        """How the questions were asked: figures of evaluations that differ in this are not comparable."""
        return f"{self.decoding}, short" if self.short else self.decoding


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write evaluation.json, whole or not at all."""
    write_json(path, dataclasses.asdict(evaluation))


def read_evaluation(path: Path) -> Evaluation | None:
    """evaluation.json, or None where there is none. Raises UserError when it is broken."""
    if not path.exists():
        return None
    return read_value(path, partial(from_json, Evaluation), "evaluate_conversation_model.py writes it again")
