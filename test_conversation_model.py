#!/usr/bin/env python3
"""Test a merged model with the three structural tests.

    test_conversation_model.py                                 the newest run
    test_conversation_model.py --run_dir RUN                   that run
    test_conversation_model.py --model FOLDER                  a merged model folder alone; writes nothing

A test passes when the whole answer, decoded greedily, is valid: 1 to 4 add_text calls, then exactly 3 add_choice calls,
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
from conversation.runs.files import find_damage, shown
from conversation.runs.folder import RunFolder, named_run
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
        return status_of(ask(args.model.resolve(), args.questions, args.device))
    run = named_run(args.run_dir)
    record = run.read()
    if run.is_published(record):
        print(f"{shown(run.path)} is published: the test changes nothing in it.")
        return status_of(ask_run(run, record, args.questions, args.device))
    with run.at_work() as record:
        if args.resume and has_passed(run, record):
            write_report(run)  # an earlier process may have ended between record and report
            return 0
        tests = ask_run(run, record, args.questions, args.device)
        run.write(replace(record, structural_tests=run.write_tests(tests)))
        write_report(run)
        return status_of(tests)


def has_passed(run: RunFolder, record: RunRecord) -> bool:
    """Whether this model has passed its tests and their file is intact."""
    if not record.structural_tests or not record.structural_tests.passed:
        return False
    damage = find_damage(run.path, record.structural_tests.files)
    print(f"The model is tested again: {damage}" if damage else "The model has passed its tests already.")
    return damage is None


def ask_run(run: RunFolder, record: RunRecord, questions_file: Path, device: str | None) -> AnswersReport:
    """Ask the merged model of a run. Raises UserError unless it is the model that the merge verified."""
    if not record.merge:
        raise UserError(f"there is no merged model in {shown(run.path)}", "merge it: merge_conversation_model.py")
    if damage := find_damage(run.merged_model, record.merge.files):
        raise UserError(f"the merged model is not the one that was verified: {damage}", "merge it again")
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


def status_of(report: AnswersReport) -> int:
    """0 when all structural tests passed. Raises UserError that names the failed ones."""
    if failed := [test.name for test in report.tests if not test.passed]:
        raise UserError(
            f"{len(failed)} of {len(report.tests)} structural tests failed: {', '.join(failed)}",
            "the first error is marked above and in the report; train longer, or anew with a higher --learning_rate",
            TRIED_AND_FAILED,
        )
    return 0


if __name__ == "__main__":
    run_main(main)
