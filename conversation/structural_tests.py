"""The three structural tests: ask the merged model, judge whole answers, repair nothing.

Beside the three, held-out questions are asked and counted; they inform and do not gate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conversation import strict_json
from conversation.errors import UserError, list_problems
from conversation.function_calls import (
    END_OF_TURN,
    Answer,
    FormatError,
    Prompt,
    Utterance,
    parse_answer,
    repetitions,
)
from conversation.tokenizer import decode, encode_prompt, spelled_out_token
from conversation_config import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOPS_HERE = "⟦stops being valid here⟧"


@dataclass(frozen=True)
class Case:
    """A question put to the model."""

    name: str
    prompt: Prompt


THREE_CASES = (
    Case("fresh topic", Prompt("What's a monad?")),
    Case(
        "follow-up",
        Prompt(
            "Example?",
            (
                Utterance("User", "What's a monad?"),
                Utterance("AI", "Pattern for chaining operations with context."),
                Utterance("AI", "Like a box with rules for combining boxes."),
            ),
        ),
    ),
    Case("another domain", Prompt("CAP theorem?")),
)


@dataclass(frozen=True)
class Verdict:
    """What the model said to a case, and what the strict parser makes of it."""

    case: Case
    output: str
    answer: Answer | None
    problem: str | None
    position: int | None
    warnings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.answer is not None

    @property
    def has_distinct_choices(self) -> bool:
        """Whether the answer is valid and its three follow-ups differ in text and in target."""
        return self.passed and not any(not warning.startswith("fragment") for warning in self.warnings)

    @property
    def marked_output(self) -> str:
        """The output with the place marked at which it stops being valid."""
        if self.position is None:
            return self.output
        return self.output[: self.position] + STOPS_HERE + self.output[self.position :]

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.case.name,
            "question": self.case.prompt.question,
            "history": [{"speaker": u.speaker, "text": u.text} for u in self.case.prompt.history],
            "passed": self.passed,
            "problem": self.problem,
            "position": self.position,
            "warnings": list(self.warnings),
            "distinct_choices": self.has_distinct_choices,
            "texts": list(self.answer.texts) if self.answer else None,
            "choices": [{"text": c.text, "confidence": c.probability, "target": c.target} for c in self.answer.choices]
            if self.answer
            else None,
            "output": self.output,
        }


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], batch_size: int = 23
) -> list[list[int]]:
    """Greedy answers to prompts, as token ids up to and including `<end_of_turn>`, at most MAX_NEW_TOKENS each."""
    import torch
    from transformers import GenerationConfig

    end_of_turn, pad = tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.pad_token_id
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end_of_turn, pad_token_id=pad
    )
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        width = max(map(len, encoded))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
        with torch.inference_mode():
            said = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
        answers += [row[: row.index(end_of_turn) + 1] if end_of_turn in row else row for row in said]
    return answers


def judge(case: Case, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Verdict:
    """The verdict on what a model said, from its token ids."""
    output = decode(tokenizer, ids)
    try:
        answer = parse_answer(output)
    except FormatError as error:
        return Verdict(case, output, None, str(error), error.position, ())
    if spelled_out := spelled_out_token(tokenizer, ids):
        token, position = spelled_out
        problem = f"{token} is spelled out in ordinary tokens instead of being the control token"
        return Verdict(case, output, None, problem, position, ())
    return Verdict(case, output, answer, None, None, tuple(repetitions(answer)))


def run_cases(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case]) -> list[Verdict]:
    """Ask and judge; the cases go through the model in one batch."""
    answers = ask(model, tokenizer, [case.prompt for case in cases])
    return [judge(case, tokenizer, ids) for case, ids in zip(cases, answers, strict=True)]


def read_questions(path: Path) -> list[Case]:
    """Questions from a JSONL file: objects with `question` and, if it is a follow-up, `history` (speaker, text).

    Raises UserError with the lines.
    """
    cases = []
    try:
        content = strict_json.decode_utf8(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except strict_json.JsonError as error:
        raise UserError(f"{path}: {error}") from None
    problems = []
    for number, line in enumerate(content.removesuffix("\n").split("\n"), 1):
        try:
            value = strict_json.loads(line)
            history = [(u["speaker"], u["text"]) for u in value.get("history", ())]
            if not all(isinstance(text, str) for text in (value["question"], *itertools.chain(*history))):
                raise ValueError("question, speaker and text must be strings")
            prompt = Prompt(value["question"], tuple(Utterance(*said) for said in history))
            cases.append(Case(f"question {number}", prompt))
        except (KeyError, TypeError, AttributeError):
            wanted = '{"question": ..., "history": [{"speaker": ..., "text": ...}]}'
            problems.append(f"{path}:{number}: not a question: expected {wanted}")
        except ValueError as error:
            problems.append(f"{path}:{number}: not a question: {error}")
    if problems:
        raise UserError(f"{len(problems)} lines are no questions:\n{list_problems(problems)}")
    if not cases:
        raise UserError(f"{path} holds no question")
    return cases
