"""What a model's answers are worth: the figures of evaluation.json, from held-out questions.

Two sets of questions (data/evaluation): known topics in unseen wording, and topics that no training text treats. The
figures of what the model says are defined in `data.figures`, those that need its probabilities in `knowledge`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from conversation.answering import relevance
from conversation.answering.decoding import (
    GREEDY,
    NEUTRAL_PROMPT,
    SAMPLED,
    Decoding,
    generate_answer,
    generate_with_each,
)
from conversation.answering.knowledge import (
    Scorer,
    follow_up_ranks,
    parts_of_five,
    parts_of_follow_ups,
    right_of_five,
)
from conversation.answering.verdicts import Verdict, judge
from conversation.data import figures
from conversation.data.examples import evenly_spread
from conversation.data.questions import Case, HeldOutCase
from conversation.format.calls import Answer, Example, Prompt
from conversation.format.parser import parse_restated
from conversation.models.tokenizer import decode, restates
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
    near = Relevance(short)  # first: what is broken there costs seconds
    print(f"Asking {len(cases)} questions, {decoding.method}{'' if short else ' and sampled'} ...", flush=True)
    asked = _ask(model, tokenizer, cases, [decoding] if short else [decoding, SAMPLED])
    verdicts, sampled = asked[decoding], [None] * len(cases) if short else asked[SAMPLED]
    print("Reading what the model knows: answers, follow-ups, confidences, losses ...", flush=True)
    scorer = Scorer(model, tokenizer, _restated(model, tokenizer, verdicts))
    held_out = [Example(case.prompt, case.answer) for case in cases]
    trained = evenly_spread(training, len(cases))
    parts = [*parts_of_five(cases), *(part for of_case in parts_of_follow_ups(cases) for part in of_case)]
    scorer.read_ahead(parts, [*held_out, *trained])
    expected = scorer.expected_confidences(cases)
    if near.embeddings:
        print("Comparing questions and answers in meaning ...", flush=True)
    measured = [
        Measured(case, verdict, _evaluated(case, verdict, *more))
        for case, verdict, *more in zip(
            cases,
            verdicts,
            sampled,
            right_of_five(scorer, cases),
            follow_up_ranks(scorer, cases),
            expected,
            near.of_answers(verdicts),
            near.of_follow_ups(verdicts),
            strict=True,
        )
    ]
    sets = dict.fromkeys(case.set_name for case in cases)
    return Evaluation(
        model=name,
        decoding=decoding.method,
        short=short,
        finished=now(),
        seconds=round(time.monotonic() - started, 1),
        sets={
            **{one: _set_figures([each for each in measured if each.case.set_name == one]) for one in sets},
            "all": _set_figures(measured),
        },
        question_losses=scorer.losses_by_kind(held_out),
        training_losses=scorer.losses_by_kind(trained) if training else None,
        notes=(*_untrained(cases, training), *_unread(expected), *near.notes),
        answers=tuple(each.answer for each in measured),
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


def _unread(expected: Sequence[tuple[float, ...] | None]) -> tuple[str, ...]:
    """A note when there are answers whose expected confidences cannot be read."""
    if not (missing := expected.count(None)):
        return ()
    reason = "they are read where each digit is a token of its own, and a confidence begins with 0."
    return (f"The expected confidences of {missing} of {len(expected)} questions are left out: {reason}",)


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


def _restated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, verdicts: Sequence[Verdict]
) -> dict[Prompt, str]:
    """The questions in full, by prompt, with which a model that restates them began; of the neutral question, too."""
    if not restates(tokenizer):
        return {}
    outputs = {verdict.case.prompt: verdict.output for verdict in verdicts}
    outputs[NEUTRAL_PROMPT] = decode(tokenizer, generate_answer(model, tokenizer, NEUTRAL_PROMPT))
    return {prompt: found for prompt, output in outputs.items() if (found := parse_restated(output)) is not None}


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A held-out case, the verdict on what the model said, and both with all that was measured, for the record."""

    case: HeldOutCase
    verdict: Verdict
    answer: EvaluatedAnswer


class Relevance:
    """Cosines of questions and valid answers; None where the embeddings are not installed, or not asked for."""

    def __init__(self, short: bool):
        wanted = not short
        self.embeddings = relevance.SentenceEmbeddings() if wanted and relevance.is_installed() else None
        self.notes = (relevance.MISSING,) if wanted and not self.embeddings else ()

    def of_answers(self, verdicts: Sequence[Verdict]) -> list[float | None]:
        """The cosine of each question, with the questions before it, and the fragments of its answer."""
        return self._similarities(verdicts, lambda answer: answer.fragments)

    def of_follow_ups(self, verdicts: Sequence[Verdict]) -> list[float | None]:
        """The cosine of each question, with the questions before it, and the follow-ups of its answer."""
        return self._similarities(verdicts, lambda answer: [each.text for each in answer.follow_ups])

    def _similarities(
        self, verdicts: Sequence[Verdict], texts: Callable[[Answer], Sequence[str]]
    ) -> list[float | None]:
        pairs = [
            (relevance.questions_so_far(verdict.case.prompt), " ".join(texts(verdict.answer)))
            for verdict in verdicts
            if verdict.answer
        ]
        found = iter(self.embeddings.similarities(pairs) if self.embeddings and pairs else [None] * len(pairs))
        return [next(found) if verdict.answer else None for verdict in verdicts]


def _evaluated(
    case: HeldOutCase,
    verdict: Verdict,
    sample: Verdict | None,
    is_right: bool,
    rank: int,
    confidences: tuple[float, ...] | None,
    of_answer: float | None,
    of_follow_ups: float | None,
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
        rank_agreement=figures.kendall_tau(confidences, theirs) if confidences else None,
        brier_score=_rounded(figures.brier_score(confidences, case.followed)) if confidences else None,
        answer_relevance=_rounded(of_answer),
        follow_up_relevance=_rounded(of_follow_ups),
    )


def _set_figures(measured: Sequence[Measured]) -> SetFigures:
    answers = [each.answer for each in measured]
    valid = [each.verdict.answer for each in measured if each.verdict.answer]
    sampled = [answer for answer in answers if answer.sampled]
    return SetFigures(
        questions=len(measured),
        valid=_rounded(figures.share(each.verdict.passed for each in measured)),
        valid_sampled=_rounded(figures.share(answer.sampled_problem is None for answer in sampled)),
        breaks=dict(Counter(answer.break_kind for answer in answers if answer.break_kind)),
        equal_fragments=_rounded(figures.equal_fragments(valid)),
        fragments_without_news=_rounded(figures.fragments_without_news(valid)),
        distinct_follow_ups=_rounded(figures.share(each.verdict.has_distinct_follow_ups for each in measured)),
        distinct_2=_rounded(figures.distinct_2(valid)),
        stock_only=_rounded(figures.stock_only(valid)),
        commonest_confidences=_rounded(figures.commonest_confidences(valid)),
        confidence_spread=_rounded(figures.confidence_spread(valid)),
        right_of_five=_rounded(figures.share(answer.right_of_five for answer in answers)),
        right_of_five_roots=_rounded(
            figures.share(each.answer.right_of_five for each in measured if each.case.is_root)
        ),
        right_of_five_follow_ups=_rounded(
            figures.share(each.answer.right_of_five for each in measured if not each.case.is_root)
        ),
        follow_up_recall_at_1=_rounded(figures.share(answer.follow_up_rank == 1 for answer in answers)),
        follow_up_reciprocal_rank=_mean([1 / answer.follow_up_rank for answer in answers]),
        confidence_rank_agreement=_mean([answer.rank_agreement for answer in answers]),
        brier_score=_mean([answer.brier_score for answer in answers]),
        answer_relevance=_mean([answer.answer_relevance for answer in answers]),
        follow_up_relevance=_mean([answer.follow_up_relevance for answer in answers]),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return round(fmean(present), 4) if present else None
