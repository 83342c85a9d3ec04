#!/usr/bin/env python3
"""Put the three structural tests to a merged model.

    test_conversation_model.py                                 the newest run
    test_conversation_model.py --run_dir RUN                   that run
    test_conversation_model.py --model FOLDER                  a merged model folder by itself, writes nothing

Each test passes when the whole answer, decoded greedily, is valid: 1 to 4 add_text calls, then exactly 3 add_choice
calls, then the end of the turn. Twenty held-out questions are asked besides and counted; they do not gate.
Leaves structural_tests.json and report.md in the run folder.
Exit status: 0 all three passed; 1 one failed; 2 not started.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversation.console import console_kept
from conversation.errors import TRIED_AND_FAILED, CommandLine, UserError, run_main
from conversation.files import differing_file, read_json, sha256_file, shown, write_json
from conversation.runs import RunFolder, hold, is_published, newest_run, now
from conversation.structural_tests import THREE_CASES, Verdict, read_questions, run_cases
from conversation_config import HELD_OUT_QUESTIONS, quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def main() -> int:
    parser = CommandLine(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run_dir", type=Path, help="the run folder (default: the newest)")
    which.add_argument("--model", type=Path, help="a merged model folder")
    parser.add_argument("--questions", type=Path, default=HELD_OUT_QUESTIONS, help="held-out questions, JSONL")
    parser.add_argument("--resume", action="store_true", help="do nothing when this model has passed already")
    args = parser.parse_args()
    quiet_libraries()
    if args.model:
        three, _ = test_model(args.model.resolve(), args.questions)
        return conclude(three)
    run = RunFolder((args.run_dir or newest_run().path).resolve())
    if not run.run_json.exists():
        raise UserError(f"{shown(run.path)} is not a run folder: it has no run.json")
    record = run.read()
    if is_published(run, record):
        print(f"{shown(run.path)} is published: it is tested, and nothing in it is changed.")
        check_merged(run, record)
        three, _ = test_model(run.merged_model, args.questions, record["tokenizer"]["fingerprint"])
        return conclude(three)
    with hold(run.path), console_kept(run):
        return test_run(run, args.questions, args.resume)


def test_run(run: RunFolder, questions_file: Path, resume: bool) -> int:
    """Test the model of a run folder that this process holds."""
    from conversation import reporting

    record = run.read()
    if not record.get("merge"):
        raise UserError(f"there is no merged model in {shown(run.path)}", "merge it: merge_conversation_model.py")
    done = record.get("structural_tests") or {}
    if resume and done.get("passed"):
        problem = differing_file(run.path, done.get("files", {}))
        if problem is None:
            print("The model has passed its tests already.")
            reporting.write_report(run)  # it may have been stopped between record and report
            return 0
        print(f"The model is tested again: {problem}")
    check_merged(run, record)
    three, questions = test_model(run.merged_model, questions_file, record["tokenizer"]["fingerprint"])
    passed = all(verdict.passed for verdict in three)
    summary = {
        "passed": passed,
        "passed_tests": sum(verdict.passed for verdict in three),
        "held_out_questions": len(questions),
        "held_out_valid": sum(verdict.passed for verdict in questions),
        "held_out_distinct": sum(verdict.has_distinct_choices for verdict in questions),
        "finished": now(),
    }
    tests = [verdict.as_dict() for verdict in three]
    write_json(
        run.structural_tests, {**summary, "tests": tests, "held_out": [verdict.as_dict() for verdict in questions]}
    )
    run.update(structural_tests={**summary, "files": {run.structural_tests.name: sha256_file(run.structural_tests)}})
    reporting.write_report(run)
    return conclude(three)


def check_merged(run: RunFolder, record: dict[str, Any]) -> None:
    """Raises UserError unless the merged model is the one that the run's merge has verified."""
    if problem := differing_file(run.merged_model, record["merge"]["files"]):
        raise UserError(f"the merged model is not the one that was verified: {problem}", "merge it again")


def conclude(three: list[Verdict]) -> int:
    """Status 0 when all passed. Raises UserError that names the tests that failed."""
    if failed := [verdict.case.name for verdict in three if not verdict.passed]:
        raise UserError(
            f"{len(failed)} of {len(three)} structural tests failed: {', '.join(failed)}",
            "the place is marked above and in the report; train longer, or anew with a higher --learning_rate",
            TRIED_AND_FAILED,
        )
    return 0


def test_model(
    folder: Path, questions_file: Path, expected_fingerprint: str | None = None
) -> tuple[list[Verdict], list[Verdict]]:
    """Check the tokenizer, ask the three cases and the held-out questions, print the verdicts."""
    questions = read_questions(questions_file)
    model, tokenizer = load_verified(folder, expected_fingerprint)
    started = time.monotonic()
    three = run_cases(model, tokenizer, THREE_CASES)
    print_table(three)
    print(f"{sum(verdict.passed for verdict in three)} of {len(three)} structural tests passed.", flush=True)
    asked = run_cases(model, tokenizer, questions)
    valid, distinct = sum(v.passed for v in asked), sum(v.has_distinct_choices for v in asked)
    print(
        f"Of {len(asked)} held-out questions, {valid} have a valid answer, {distinct} with three distinct follow-ups."
    )
    print(f"{len(three) + len(asked)} answers in {time.monotonic() - started:.0f} s.")
    return three, asked


def load_verified(folder: Path, expected_fingerprint: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a merged folder. Raises UserError unless the tokenizer is the one of the training."""
    from conversation import base_models, tokenizer
    from conversation.merging import MANIFEST

    if not folder.is_dir():
        raise UserError(f"there is no merged model at {folder}", "merge_conversation_model.py makes one")
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"{folder} is not a merged model: it has no {MANIFEST}", "merge_conversation_model.py makes one"
        )
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{folder / MANIFEST} is broken: it does not list the model's files", "merge it again")
    if problem := differing_file(folder, files):
        raise UserError(f"the merged model is broken: {problem}", "merge it again")
    expected = expected_fingerprint or manifest.get("tokenizer_fingerprint")
    loaded, _, found = tokenizer.audit(folder, [], expected)
    print(f"{shown(folder)}: {found}")
    return base_models.load_model(folder).eval(), loaded


def print_table(verdicts: Sequence[Verdict]) -> None:
    print(f"\n{'test':16} {'question':18} {'verdict':8} {'texts':>5} {'choices':>7}  remarks")
    for verdict in verdicts:
        texts, choices = (len(verdict.answer.texts), len(verdict.answer.choices)) if verdict.answer else ("-", "-")
        remarks = "; ".join(verdict.warnings) or (verdict.problem or "")
        word = "passed" if verdict.passed else "FAILED"
        print(f"{verdict.case.name:16} {verdict.case.prompt.question:18} {word:8} {texts:>5} {choices:>7}  {remarks}")
    for verdict in verdicts:
        print(f"\n--- {verdict.case.name}: {verdict.case.prompt.question}")
        if verdict.answer:
            for text in verdict.answer.texts:
                print(f"    {text}")
            for choice in verdict.answer.choices:
                print(f"    > {choice.confidence}  {choice.text}  ({choice.target})")
        else:
            print(verdict.marked_output)
    print()


if __name__ == "__main__":
    run_main(main)
