"""The structural tests of a model: three cases that gate, and held-out questions that inform."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from conversation.answering.verdicts import Answers, Verdict, run_cases
from conversation.data.questions import THREE_CASES, Case
from conversation.runs.record import AnswersReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_tests(answers: Answers, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Case]) -> AnswersReport:
    """Ask the three cases and the held-out questions, and print the verdicts. `answers`: who answers, greedily."""
    started = time.monotonic()
    three = run_cases(answers, tokenizer, THREE_CASES)
    _print_table(three)
    print(f"{sum(verdict.passed for verdict in three)} of {len(three)} structural tests passed.", flush=True)
    asked = run_cases(answers, tokenizer, questions)
    valid, distinct = sum(v.passed for v in asked), sum(v.has_distinct_follow_ups for v in asked)
    print(
        f"Of {len(asked)} held-out questions, {valid} have a valid answer, {distinct} with three distinct follow-ups."
    )
    print(f"{len(three) + len(asked)} answers in {time.monotonic() - started:.0f} s.")
    return AnswersReport(
        tuple(verdict.for_record() for verdict in three), tuple(verdict.for_record() for verdict in asked)
    )


def _print_table(verdicts: Sequence[Verdict]) -> None:
    print(f"\n{'test':16} {'question':18} {'verdict':8} {'fragments':>9} {'follow-ups':>10}  remarks")
    for verdict in verdicts:
        answer = verdict.answer
        fragments, follow_ups = (len(answer.fragments), len(answer.follow_ups)) if answer else ("-", "-")
        remarks = "; ".join(verdict.warnings) or (verdict.problem or "")
        word = "passed" if verdict.passed else "FAILED"
        question = verdict.case.prompt.question
        print(f"{verdict.case.name:16} {question:18} {word:8} {fragments:>9} {follow_ups:>10}  {remarks}")
    for verdict in verdicts:
        print(f"\n--- {verdict.case.name}: {verdict.case.prompt.question}")
        if verdict.answer:
            for fragment in verdict.answer.fragments:
                print(f"    {fragment}")
            for follow_up in verdict.answer.follow_ups:
                print(f"    > {follow_up.confidence}  {follow_up.text}  ({follow_up.target})")
        else:
            print(verdict.marked_output)
    print()
