"""A merged model as a GGUF file that was verified before it gets its name."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.answering.agreement import Agreement, compare_answers
from conversation.answering.engines import GrammarEngine, open_engine
from conversation.answering.structural_tests import run_tests
from conversation.data.questions import THREE_CASES, Case
from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.format.calls import Example, Prompt
from conversation.models.gguf import ExportType, MergedWeights, write_gguf
from conversation.models.gguf_check import TensorCheck, check_tensors
from conversation.models.tokenizer import PROBES, common_prefix_length, encode_example, encode_prompt
from conversation.runs.export_record import ExportedFile
from conversation.runs.files import cannot_write, sha256_file
from conversation.runs.record import AnswersReport, now

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST_SURVIVED = 0.5
"""Of the adapters' change. Below it the file is nearer to the base than to the trained model."""
LARGEST_GAP = {"f32": 1e-3, "f16": 0.05}
"""In nats: how much better the merged model may like another token than one that this type says."""


class Exporter:
    """Exports one merged model. `examples`: texts of which the ids are compared; `expected_tests`: how many of the
    three structural tests the merged model passed."""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Path | None,
        questions: Sequence[Case],
        examples: Sequence[Example],
        expected_tests: int,
        force: bool,
    ):
        self.weights = MergedWeights(folder)
        self._model, self._tokenizer = model, tokenizer
        self._adapters, self._questions, self._force = adapters, questions, force
        self._examples = (*PROBES, *examples)
        self._expected_tests = expected_tests

    def export(self, export: ExportType, path: Path, metadata: Mapping[str, str]) -> ExportedFile:
        """Write a file, verify it, and give it its name. Raises UserError, and leaves no file, when it is refused."""
        started = time.monotonic()
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            try:
                write_gguf(self.weights, export, part, metadata)
            except OSError as error:
                raise cannot_write(path, error, self.weights.file_bytes(export)) from None
            tensors = check_tensors(part, self.weights, self._adapters)
            print(f"{export.name}: {tensors.tensors} tensors are the merged model's, as near as the type allows.")
            forced = self._judge(_lost(tensors))
            report, agreement = self._ask(part)
            forced += self._judge(self._other(export, report, agreement))
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            size, digest = part.stat().st_size, sha256_file(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return ExportedFile(
            type=export.name,
            file=path.name,
            bytes=size,
            sha256=digest,
            share_of_error=round(tensors.share_of_error, 4),
            survived=None if tensors.survived is None else round(tensors.survived, 4),
            survived_by_type={kind: round(share, 4) for kind, share in tensors.survived_by_type.items()},
            passed_tests=sum(test.passed for test in report.tests),
            held_out_questions=len(report.held_out),
            held_out_valid=sum(asked.passed for asked in report.held_out),
            held_out_distinct=sum(asked.distinct_choices for asked in report.held_out),
            answers=agreement.answers,
            equal_answers=agreement.equal_answers,
            tokens=agreement.tokens,
            equal_tokens=agreement.equal_tokens,
            largest_gap=round(agreement.largest_gap, 6),
            seconds=round(time.monotonic() - started, 1),
            forced=tuple(forced),
            finished=now(),
        )

    def _judge(self, reasons: list[str]) -> list[str]:
        """The reasons against a file, if they are to be overlooked. Raises UserError if there are any, and they are
        not."""
        if reasons and not self._force:
            raise UserError("; ".join(reasons), "take a larger type, or export it all the same with --force", 1)
        for reason in reasons:
            print(f"warning: {reason}")
        return reasons

    def _ask(self, path: Path) -> tuple[AnswersReport, Agreement]:
        """The structural tests and held-out questions through llama.cpp, and what the merged model thinks of them."""
        engine = open_engine(path)
        self._check_ids(engine)
        asked: list[tuple[Prompt, list[int]]] = []

        def answers(prompts: Sequence[Prompt]) -> list[list[int]]:
            found = [engine.greedy(prompt) for prompt in prompts]
            asked.extend(zip(prompts, found, strict=True))
            return found

        report = run_tests(answers, self._tokenizer, self._questions)
        return report, compare_answers(self._model, self._tokenizer, asked)

    def _check_ids(self, engine: GrammarEngine) -> None:
        """Raises UserError unless llama.cpp encodes every text as the training did."""
        prompts = [case.prompt for case in (*THREE_CASES, *self._questions)]
        vocabulary = engine.vocabulary
        pairs = [
            (encode_prompt(self._tokenizer, prompt), vocabulary.encode_prompt(prompt), prompt.question)
            for prompt in prompts
        ]
        pairs += [
            (list(encode_example(self._tokenizer, each).ids), vocabulary.encode_example(each), each.prompt.question)
            for each in self._examples
        ]
        for expected, found, question in pairs:
            if found != expected:
                at = common_prefix_length(found, expected)
                raise UserError(
                    f"llama.cpp encodes {question!r} otherwise than the training, from token {at} on: "
                    f"{found[at : at + 4]}, expected {expected[at : at + 4]}",
                    "",
                    TRIED_AND_FAILED,
                )

    def _other(self, export: ExportType, report: AnswersReport, agreement: Agreement) -> list[str]:
        reasons = []
        passed = sum(test.passed for test in report.tests)
        if passed < self._expected_tests:
            reasons.append(
                f"through llama.cpp {passed} of 3 structural tests passed, and {self._expected_tests} of the merged "
                f"model's, as {export.name}"
            )
        bound = LARGEST_GAP.get(export.name)
        if bound is not None and not agreement.largest_gap <= bound:
            reasons.append(
                f"as {export.name} it says a token that the merged model likes less by {agreement.largest_gap:.3g} "
                f"nats than another; {bound:g} would be rounding"
            )
        return reasons


def _lost(tensors: TensorCheck) -> list[str]:
    if tensors.survived is None or tensors.survived >= LEAST_SURVIVED:
        return []
    by_type = ", ".join(f"{share:.0%} in {kind}" for kind, share in tensors.survived_by_type.items())
    return [
        f"only {tensors.survived:.0%} of what the training changed is left ({by_type}): the base's weights lie where "
        "this type rounds to, as those of a base that was quantized before, and the change is smaller than a step"
    ]
