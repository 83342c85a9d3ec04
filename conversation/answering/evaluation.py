"""What a model's answers are worth: the figures of evaluation.json, from held-out questions.

Two sets of questions (data/evaluation): known topics in unseen wording, and topics that no training text treats. The
figures of what the model says are defined in `data.figures`, those that need its probabilities in `knowledge`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from conversation.answering import relevance
from conversation.answering.decoding import GREEDY, SAMPLED, Decoding, generate_with_each
from conversation.answering.knowledge import (
    Scorer,
    follow_up_ranks,
    parts_of_five,
    parts_of_follow_ups,
    right_of_five,
)
from conversation.answering.verdicts import Verdict, judge
from conversation.data import figures
from conversation.data.questions import Case, HeldOutCase
from conversation.format.calls import Example, Prompt
from conversation.runs.evaluation_record import EvaluatedAnswer, Evaluation, SetFigures
from conversation.runs.record import now

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    cases: Sequence[HeldOutCase],
    training: Sequence[Example],
    decoding: Decoding = GREEDY,
    short: bool = False,
) -> Evaluation:
    """Put the held-out cases to a model, and take every figure.

    `training`: the examples that the model was trained on; losses are compared on as many of them, evenly spread. It
    may be empty. `short`: no sampled answers, no embeddings.
    """
    started = time.monotonic()
    scorer = Scorer(model, tokenizer)
    prompts = [case.prompt for case in cases]
    asked = _ask(model, tokenizer, cases, [decoding] if short else [decoding, SAMPLED])
    verdicts, sampled = asked[decoding], [None] * len(cases) if short else asked[SAMPLED]
    held_out = [Example(case.prompt, case.answer) for case in cases]
    trained = training[:: max(1, len(training) // len(cases))][: len(cases)]
    parts = [*parts_of_five(cases), *(part for of_case in parts_of_follow_ups(cases) for part in of_case)]
    scorer.read_ahead(parts, [*held_out, *trained])
    right = right_of_five(scorer, cases)
    ranks = follow_up_ranks(scorer, cases)
    expected = scorer.expected_confidences(cases)
    answers = [
        _evaluated(case, verdict, sample, is_right, rank, confidences)
        for case, verdict, sample, is_right, rank, confidences in zip(
            cases, verdicts, sampled, right, ranks, expected, strict=True
        )
    ]
    near = Relevance(short)
    of_answers = near.similarities(prompts, [v.answer.fragments if v.answer else None for v in verdicts])
    of_follow_ups = near.similarities(
        prompts, [tuple(each.text for each in v.answer.follow_ups) if v.answer else None for v in verdicts]
    )
    sets = {}
    for set_name in (*dict.fromkeys(case.set_name for case in cases), "all"):
        chosen = [i for i, case in enumerate(cases) if set_name in (case.set_name, "all")]
        sets[set_name] = _set_figures(
            [cases[i] for i in chosen],
            [verdicts[i] for i in chosen],
            [answers[i] for i in chosen],
            [of_answers[i] for i in chosen],
            [of_follow_ups[i] for i in chosen],
        )
    return Evaluation(
        model=name,
        decoding=decoding.method,
        short=short,
        finished=now(),
        seconds=round(time.monotonic() - started, 1),
        sets=sets,
        question_losses=scorer.losses_by_kind(held_out),
        training_losses=scorer.losses_by_kind(trained) if training else None,
        notes=(*_untrained(cases, training), *near.notes),
        answers=tuple(answers),
    )


def _untrained(cases: Sequence[HeldOutCase], training: Sequence[Example]) -> tuple[str, ...]:
    """A note when known topics are not in the data that the model was trained on: for it they are unseen, too."""
    if not training:
        return ("The training data is not at hand: losses on it are left out.",)
    targets = [each.target for example in training for each in example.answer.follow_ups]
    known = {case.topic for case in cases if case.set_name == "known"}
    missing = sorted(topic for topic in known if not any(target.startswith(f"{topic}_") for target in targets))
    if not missing:
        return ()
    return (f"{len(missing)} of {len(known)} known topics are not in this run's training data: {', '.join(missing)}.",)


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[HeldOutCase],
    decodings: Sequence[Decoding],
) -> dict[Decoding, list[Verdict]]:
    outputs = generate_with_each(model, tokenizer, [case.prompt for case in cases], decodings)
    return {
        decoding: [judge(Case(case.topic, case.prompt), tokenizer, ids) for case, ids in zip(cases, found, strict=True)]
        for decoding, found in outputs.items()
    }


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass
class Relevance:
    """Cosines of questions and answers; None where the embeddings are not installed, or not asked for."""

    short: bool

    def __post_init__(self) -> None:
        self.notes: tuple[str, ...] = ()
        self._embeddings = None
        if not self.short and relevance.is_installed():
            self._embeddings = relevance.SentenceEmbeddings()
        elif not self.short:
            self.notes = (relevance.MISSING,)

    def similarities(self, prompts: Sequence[Prompt], texts: Sequence[tuple[str, ...] | None]) -> list[float | None]:
        """The cosine of each question, with the questions before it, and some texts of its answer."""
        if self._embeddings is None:
            return [None] * len(prompts)
        questions = [
            " ".join([*(line.text for line in prompt.history if line.speaker == "User"), prompt.question])
            for prompt in prompts
        ]
        chosen = [i for i, text in enumerate(texts) if text]
        found = (
            self._embeddings.similarities([(questions[i], " ".join(texts[i] or ())) for i in chosen]) if chosen else []
        )
        similar = dict(zip(chosen, found, strict=True))
        return [similar.get(i) for i in range(len(prompts))]


def _evaluated(
    case: HeldOutCase,
    verdict: Verdict,
    sample: Verdict | None,
    is_right: bool,
    rank: int,
    confidences: tuple[float, ...],
) -> EvaluatedAnswer:
    recorded = verdict.for_record()
    theirs = [each.probability for each in case.answer.follow_ups]
    return EvaluatedAnswer(
        set_name=case.set_name,
        domain=case.domain,
        topic=case.topic,
        question=recorded.question,
        history=recorded.history,
        output=recorded.output,
        problem=recorded.problem,
        break_kind=verdict.kind,
        texts=recorded.texts,
        choices=recorded.choices,
        sampled_problem=sample.problem if sample else None,
        sampled=sample is not None,
        right_of_five=is_right,
        follow_up_rank=rank,
        expected_confidences=confidences,
        rank_agreement=figures.kendall_tau(confidences, theirs),
        brier_score=round(figures.brier_score(confidences, case.followed), 4),
    )


def _set_figures(
    cases: Sequence[HeldOutCase],
    verdicts: Sequence[Verdict],
    answers: Sequence[EvaluatedAnswer],
    of_answers: Sequence[float | None],
    of_follow_ups: Sequence[float | None],
) -> SetFigures:
    valid = [verdict.answer for verdict in verdicts if verdict.answer]
    sampled = [answer for answer in answers if answer.sampled]

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    def mean(values: Sequence[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return round(fmean(present), 4) if present else None

    return SetFigures(
        questions=len(cases),
        valid=rounded(figures.share(verdict.passed for verdict in verdicts)),
        valid_sampled=rounded(figures.share(answer.sampled_problem is None for answer in sampled)),
        breaks=dict(Counter(answer.break_kind for answer in answers if answer.break_kind)),
        equal_fragments=rounded(figures.equal_fragments(valid)),
        fragments_without_news=rounded(figures.fragments_without_news(valid)),
        distinct_follow_ups=rounded(figures.share(verdict.has_distinct_follow_ups for verdict in verdicts)),
        distinct_2=rounded(figures.distinct_2(valid)),
        stock_only=rounded(figures.stock_only(valid)),
        commonest_confidences=rounded(figures.commonest_confidences(valid)),
        confidence_spread=rounded(figures.confidence_spread(valid)),
        right_of_five=rounded(figures.share(answer.right_of_five for answer in answers)),
        right_of_five_roots=rounded(
            figures.share(a.right_of_five for a, case in zip(answers, cases, strict=True) if case.is_root)
        ),
        right_of_five_follow_ups=rounded(
            figures.share(a.right_of_five for a, case in zip(answers, cases, strict=True) if not case.is_root)
        ),
        follow_up_recall_at_1=rounded(figures.share(answer.follow_up_rank == 1 for answer in answers)),
        follow_up_reciprocal_rank=mean([1 / answer.follow_up_rank for answer in answers]),
        confidence_rank_agreement=mean([answer.rank_agreement for answer in answers]),
        brier_score=mean([answer.brier_score for answer in answers]),
        answer_relevance=mean(of_answers),
        follow_up_relevance=mean(of_follow_ups),
    )
