#!/usr/bin/env python3
"""Evaluate what a model's answers are worth, on 100 held-out questions; offline, on a CPU or a GPU.

    evaluate_conversation_model.py                             the newest run
    evaluate_conversation_model.py --run_dir RUN               that run
    evaluate_conversation_model.py --model FOLDER              a merged model folder by itself; see --output
    evaluate_conversation_model.py --compare RUN RUN ...       runs side by side, from their records; asks nothing

Half of the questions are on known topics in unseen wording, half on topics that no training text treats. The figures
(form, repetition, knowledge, losses by kind of token, relevance, confidence) are defined in
conversation/data/figures.py and conversation/answering/knowledge.py. They inform; they gate nothing.
Leaves evaluation.json, evaluation.png and a section of report.md in the run folder.
Exit status: 0 evaluated; 1 tried and failed; 2 not started.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from conversation.answering.decoding import METHODS
from conversation.data.examples import read_jsonl
from conversation.data.questions import read_held_out
from conversation.errors import CommandLine, UserError, run_main
from conversation.runs.comparison import comparison_table, draw_comparison, figures_table
from conversation.runs.console import logged_console
from conversation.runs.evaluation_record import Evaluation, read_evaluation, write_evaluation
from conversation.runs.files import shown
from conversation.runs.folder import RunFolder, chosen_run
from conversation.runs.lock import locked_folder
from conversation.runs.report import write_report
from conversation_config import EVALUATION_QUESTIONS, add_device_flag, set_up_libraries

DECODINGS = [method for method in METHODS if method != "sampled"]  # sampled answers are asked for beside it
SHORT = 4  # a short evaluation asks every fourth pair of a root question and a follow-up


def main() -> int:
    args = parse_flags()
    if args.compare or args.model:
        check_output(args.output)
    if args.compare:
        runs = [RunFolder(path.resolve()) for path in args.compare]
        print(comparison_table(runs))
        draw_comparison(runs, args.output.with_suffix(".png"))
        print(f"Plot: {shown(args.output.with_suffix('.png'))}")
        return 0
    if args.model:
        folder = args.model.resolve()
        evaluation = evaluate(args, folder, folder.name)
        print(f"\n{figures_table({folder.name: evaluation})}")  # first: the file may not be written
        write_evaluation(evaluation, args.output)
        print(f"Written: {shown(args.output)}")
        return 0
    run = chosen_run(args.run_dir)
    record = run.read()
    with locked_folder(run.path), logged_console(run.console_log):  # published or not: an evaluation is added
        run.check_merged(record)
        reason = why_evaluate_again(run) if args.resume else ""
        if reason is None:
            print("The model is evaluated already.")
        else:
            if reason:
                print(f"Evaluating, as {reason}.")
            fingerprint = record.base_model.tokenizer_fingerprint
            evaluation = evaluate(args, run.merged_model, run.path.name, fingerprint, run.training_data)
            print(f"\n{figures_table({run.path.name: evaluation})}")
            write_evaluation(evaluation, run.evaluation)
        write_report(run)  # always: an earlier process may have ended between the two
        print(f"Report: {shown(run.report)}")
    return 0


def check_output(path: Path) -> None:
    """Raises UserError when this file cannot be written: before the minutes that its content takes."""
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written", "name a file in a folder of yours with --output")


def parse_flags() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run_dir", type=Path, help="the run folder (default: the newest)")
    which.add_argument("--model", type=Path, help="a merged model folder")
    which.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="run folders to compare")
    parser.add_argument("--resume", action="store_true", help="do nothing when the run is evaluated already")
    parser.add_argument("--short", action="store_true", help="26 questions, no sampled answers, no embeddings")
    parser.add_argument("--decoding", choices=DECODINGS, default="greedy", help="how to answer (default: greedy)")
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation.json"), help="with --model and --compare: where the result goes"
    )
    add_device_flag(parser)
    return parser.parse_args()


def why_evaluate_again(run: RunFolder) -> str | None:
    """The reason to evaluate on --resume; None when there is an evaluation that can be read."""
    try:
        return None if read_evaluation(run.evaluation) else "the model has not been evaluated yet"
    except UserError as error:
        return str(error)


def evaluate(
    args: argparse.Namespace,
    folder: Path,
    name: str,
    fingerprint: str | None = None,
    training_data: Path | None = None,
) -> Evaluation:
    """Ask and measure the model of a merged folder. Raises UserError unless it is intact."""
    cases = [case for path in EVALUATION_QUESTIONS for case in read_held_out(path)]
    if args.short:
        cases = [case for number, case in enumerate(cases) if number // 2 % SHORT == 0]
    training = read_jsonl(training_data) if training_data and training_data.exists() else []
    set_up_libraries()
    from conversation.answering.decoding import Decoding
    from conversation.answering.evaluation import evaluate as evaluate_model
    from conversation.models.device import use_device
    from conversation.models.merged_model import load_verified

    print(f"Device: {use_device(args.device)}")
    model, tokenizer = load_verified(folder, fingerprint)
    return evaluate_model(model, tokenizer, name, cases, training, Decoding(args.decoding), args.short)


if __name__ == "__main__":
    run_main(main)
