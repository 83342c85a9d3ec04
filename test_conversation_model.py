#!/usr/bin/env python3
"""Test a merged model with the three structural tests.

    test_conversation_model.py                                 the newest run
    test_conversation_model.py --run_dir RUN                   that run
    test_conversation_model.py --model FOLDER                  a merged model folder alone; writes nothing

A test passes when the whole answer, decoded greedily, is valid: 1 to 4 add_text calls (after the
restated question, where the model was trained to begin with it), then exactly 3 add_choice calls,
then the end of the turn. Twenty held-out questions are also asked and counted; they do not gate.
Writes structural_tests.json and report.md into the run folder.
Exit status: 0 all three passed; 1 one failed; 2 not started.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from conversation.data.questions import read_questions
from conversation.errors import TRIED_AND_FAILED, CommandLine, UserError, run_main
from conversation.runs.files import find_damage, real_path, shown
from conversation.runs.folder import RunFolder, chosen_run
from conversation.runs.record import AnswersReport, RunRecord
from conversation.runs.report import write_report
from conversation_config import HELD_OUT_QUESTIONS, add_device_flag, set_up_libraries


def main() -> int:
    parser = CommandLine(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run_dir", type=Path, help="the run folder (default: the newest)")
    which.add_argument("--model", type=Path, help="a merged model folder")
    parser.add_argument("--questions", type=Path, default=HELD_OUT_QUESTIONS, help="held-out questions, JSONL")
    parser.add_argument("--resume", action="store_true", help="do nothing if this model has passed already")
    add_device_flag(parser)
    args = parser.parse_args()
    if args.model:
        check_passed(ask(real_path(args.model), args.questions, args.device))
        return 0
    run = chosen_run(args.run_dir)
    record = run.read()
    if run.is_published(record):
        print(f"{shown(run.path)} is published: the test changes nothing in it.")
        check_passed(ask_run(run, record, args.questions, args.device))
        return 0
    with run.at_work() as record:
        reason = why_test_again(run, record) if args.resume else ""
        if reason is None:
            print("The model has passed its tests already.")
            write_report(run)  # an earlier process may have ended between record and report
            return 0
        if reason:
            print(f"Testing, as {reason}.")
        tests = ask_run(run, record, args.questions, args.device)
        run.write(replace(record, structural_tests=run.write_tests(tests)))
        write_report(run)
        check_passed(tests)
    return 0


def why_test_again(run: RunFolder, record: RunRecord) -> str | None:
    """The reason to test on --resume; None when this model has passed its tests and their file is intact."""
    if not record.structural_tests:
        return "the model has not been tested yet"
    if not record.structural_tests.passed:
        return "the model failed a test"
    return find_damage(run.path, record.structural_tests.files)


def ask_run(run: RunFolder, record: RunRecord, questions_file: Path, device: str | None) -> AnswersReport:
    """Ask the merged model of a run. Raises UserError unless it is the model that the merge verified."""
    run.check_merged(record)
    return ask(run.merged_model, questions_file, device, record.base_model.tokenizer_fingerprint)


def ask(
    folder: Path, questions_file: Path, device: str | None, expected_fingerprint: str | None = None
) -> AnswersReport:
    """Check a model and its tokenizer, ask the tests and the held-out questions, print the verdicts."""
    questions = read_questions(questions_file)
    set_up_libraries()
    from conversation.answering.decoding import generate_answers
    from conversation.answering.structural_tests import run_tests
    from conversation.models.device import use_device
    from conversation.models.merged_model import load_verified

    print(f"Device: {use_device(device)}")
    model, tokenizer = load_verified(folder, expected_fingerprint)
    return run_tests(partial(generate_answers, model, tokenizer), tokenizer, questions)


def check_passed(report: AnswersReport) -> None:
    """Raises UserError (status 1) that names the failed structural tests."""
    if failed := [test.name for test in report.tests if not test.passed]:
        raise UserError(
            f"{len(failed)} of {len(report.tests)} structural tests failed: {', '.join(failed)}",
            "the first error is marked above and in the report; train longer, or anew with a higher --learning_rate",
            TRIED_AND_FAILED,
        )


if __name__ == "__main__":
    run_main(main)
