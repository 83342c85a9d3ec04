"""Verdicts on a model's answers. The whole answer counts; nothing is repaired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conversation.data.questions import Case
from conversation.format.calls import Answer, Prompt, repeated
from conversation.format.parser import FormatError, parse_answer
from conversation.models.tokenizer import answer_pattern, decode, restates, spelled_out_token
from conversation.runs.record import AskedQuestion
from conversation.runs.report import mark

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Verdict:
    """A model's output for a case, and the result of the strict parser."""

    case: Case
    output: str
    answer: Answer | None
    problem: str | None = None
    position: int | None = None
    kind: str | None = None

    @property
    def passed(self) -> bool:
        return self.answer is not None

    @property
    def has_distinct_follow_ups(self) -> bool:
        """Whether the answer is valid and its follow-ups differ, in text and in target."""
        return self.passed and not self.repeated_follow_ups and not self.repeated_targets

    @property
    def repeated_fragments(self) -> dict[str, int]:
        """The fragments that a valid answer says several times, and how often."""
        return repeated(self.answer.fragments) if self.answer else {}

    @property
    def repeated_follow_ups(self) -> dict[str, int]:
        """The texts that several follow-ups of a valid answer have, and how many."""
        return repeated(each.text for each in self.answer.follow_ups) if self.answer else {}

    @property
    def repeated_targets(self) -> dict[str, int]:
        """The targets that several follow-ups of a valid answer have, and how many."""
        return repeated(each.target for each in self.answer.follow_ups) if self.answer else {}

    @property
    def warnings(self) -> list[str]:
        """One sentence for each repetition in a valid answer."""
        found = {
            "fragment": self.repeated_fragments,
            "follow-up": self.repeated_follow_ups,
            "target": self.repeated_targets,
        }
        return [f"{what} {value!r} occurs {n} times" for what, counts in found.items() for value, n in counts.items()]

    @property
    def marked_output(self) -> str:
        """The output with a mark before its first invalid character."""
        return mark(self.output, self.position)

    def for_record(self) -> AskedQuestion:
        """The verdict for structural_tests.json."""
        answer = self.answer
        return AskedQuestion(
            name=self.case.name,
            question=self.case.prompt.question,
            history=tuple({"speaker": line.speaker, "text": line.text} for line in self.case.prompt.history),
            passed=self.passed,
            problem=self.problem,
            position=self.position,
            warnings=tuple(self.warnings),
            distinct_choices=self.has_distinct_follow_ups,
            texts=answer.fragments if answer else None,
            choices=tuple(
                {"text": each.text, "confidence": each.probability, "target": each.target} for each in answer.follow_ups
            )
            if answer
            else None,
            output=self.output,
        )


def judge(case: Case, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Verdict:
    """The verdict on an answer, from its token ids."""
    output = decode(tokenizer, ids)
    try:
        answer = parse_answer(output, answer_pattern(tokenizer), restates(tokenizer))
    except FormatError as error:
        return Verdict(case, output, None, str(error), error.position, error.kind)
    if spelled_out := spelled_out_token(tokenizer, ids):
        token, position = spelled_out
        problem = f"{token} is spelled out in ordinary tokens, not the control token"
        return Verdict(case, output, None, problem, position, "control token in ordinary letters")
    return Verdict(case, output, answer)


Answers = Callable[[Sequence[Prompt]], list[list[int]]]
"""Gives the greedy answer to each prompt as token ids, whichever program runs the model."""


def run_cases(answers: Answers, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case]) -> list[Verdict]:
    """Ask, greedily, and judge."""
    found = answers([case.prompt for case in cases])
    return [judge(case, tokenizer, ids) for case, ids in zip(cases, found, strict=True)]
