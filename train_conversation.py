#!/usr/bin/env python3
"""LoRA-train a base model on conversation trees, in FP32.

    train_conversation.py --check_data                  validate data and tokenizer, print statistics, train nothing
    train_conversation.py                               the default recipe on FunctionGemma
    train_conversation.py --demo                        the short recipe on the embedded stand-in
    train_conversation.py --resume                      go on with the newest run

Writes run.json, data, checkpoints/ with final_lora/, metrics.jsonl, loss_curve.png, report.md and console.log.
Exit status: 0 trained; 1 tried and failed; 2 not started; 128 + n stopped by signal n, with a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from conversation.data.examples import to_jsonl
from conversation.errors import GO_ON, CommandLine, UserError, run_main
from conversation.runs.files import find_damage, real_path, shown, write_atomically
from conversation.runs.folder import RunFolder, chosen_run, new_run_folder
from conversation.runs.machine import is_first_process, number_of_processes
from conversation.runs.publishing import attempt_to_resume, begin_attempt, bytes_of_attempts
from conversation.runs.record import RunRecord, changes_on_resume
from conversation.runs.report import write_report
from conversation_config import TRAINING_RUNS, add_device_flag, add_training_flags, resolve_settings, set_up_libraries

if TYPE_CHECKING:
    from peft import PeftModel

    from conversation.training.preparation import Prepared


def main() -> int:
    args = parse_flags()
    set_up_libraries()
    from conversation.models.device import use_device
    from conversation.training.preparation import prepare, print_statistics
    from conversation.training.processes import at_work, together

    if args.check_data:
        print_statistics(prepare(resolve_settings(args)), as_json=args.json)
        return 0
    use_device(args.device)  # before the minutes of work that would be for nothing
    with together():
        if not args.resume:
            begin(args, prepare(resolve_settings(args)))
        elif found := run_to_resume(args):
            with at_work(found) as (run, record):
                resume(run, record, prepare(resolve_settings(args, record.config)))
    return 0


def parse_flags() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add_training_flags(parser)
    parser.add_argument("--run_dir", type=Path, help="the run folder (default: a new one; with --resume: the newest)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest intact checkpoint")
    parser.add_argument("--attempt", action="store_true", help="for RETRAIN.sh: the run is its attempt")
    parser.add_argument("--check_data", action="store_true", help="validate, print statistics, train nothing")
    parser.add_argument("--json", action="store_true", help="with --check_data: print one JSON object")
    add_device_flag(parser)
    refused = {"fp16": "Gemma 3's activations overflow to NaN", "bf16": "Turing cards lack it, and the model is FP32"}
    for half, reason in refused.items():
        parser.add_argument(f"--{half}", dest="half", action="store_const", const=half, help=f"refused: {reason}")
    args = parser.parse_args()
    if args.json and not args.check_data:
        raise UserError("--json goes with --check_data")
    if args.check_data and args.resume:
        raise UserError("--check_data reads no run, so it does not go with --resume", "give the run's flags instead")
    if args.attempt and (args.run_dir or args.check_data):
        raise UserError("RETRAIN.sh names the run folder itself and always trains", "see ./RETRAIN.sh --help")
    if args.attempt and number_of_processes() > 1:
        raise UserError("an attempt of RETRAIN.sh has one process", "leave out --attempt, or unset WORLD_SIZE")
    if args.half:
        raise UserError(f"{args.half} is refused", f"train in FP32: {refused[args.half]}")
    return args


def begin(args: argparse.Namespace, prepared: Prepared) -> None:
    """Train a new run. Its folder and record are made after every check."""
    from conversation.training.preparation import check_space_for
    from conversation.training.processes import at_work, barrier, broadcast_from_first, check_same_training
    from conversation.training.trainer import build_trainable_model

    record = prepared.record()
    check_same_training(record)
    run = RunFolder(Path(broadcast_from_first(str(real_path(args.run_dir or new_run_folder().path)))))
    if is_first_process():
        run.check_unused()
        check_space_for(prepared, run.path, to_be_freed=bytes_of_attempts() if args.attempt else 0)
    model = build_trainable_model(prepared.base_folder, prepared.config)
    barrier()  # every process can train
    if args.attempt:
        run = begin_attempt(TRAINING_RUNS, record)
    elif is_first_process():
        run.create(record)
    with at_work(run, new=True) as (run, record):
        train(run, record, prepared, model, checkpoint=None)


def run_to_resume(args: argparse.Namespace) -> RunFolder | None:
    """The run that `--resume` means; None when RETRAIN.sh has published the last one."""
    from conversation.training.processes import broadcast_from_first

    path = ""
    if is_first_process():
        run = attempt_to_resume() if args.attempt else chosen_run(args.run_dir)
        path = str(run.path) if run else ""
    path = broadcast_from_first(path)
    return RunFolder(Path(path)) if path else None


def resume(run: RunFolder, record: RunRecord, prepared: Prepared) -> None:
    """Resume a run from its newest intact checkpoint, with the same settings or with more steps."""
    from conversation.training.checkpoints import choose_checkpoint, drop_newer_checkpoints
    from conversation.training.processes import broadcast_from_first, check_same_training
    from conversation.training.trainer import build_trainable_model

    current = prepared.record()
    check_same_training(current)
    done = False
    if is_first_process():
        for change in changes_on_resume(record, current):
            print(change)
        done = is_done(run, record, prepared)
    if broadcast_from_first("done" if done else ""):
        return
    checkpoint = choose_checkpoint(run.checkpoints)
    drop_newer_checkpoints(run.checkpoints, checkpoint)
    model = build_trainable_model(prepared.base_folder, prepared.config)
    train(run, replace(current, started=record.started, starts=record.starts), prepared, model, checkpoint)


def is_done(run: RunFolder, record: RunRecord, prepared: Prepared) -> bool:
    """Whether a run has had all its steps, and its results are intact. Its report is then written once more."""
    if done := record.training:
        damage = find_damage(run.final_lora, done.adapter_files) or find_damage(run.path, done.files)
        if damage is None and done.steps >= prepared.steps:
            print("The training is done already.")
            write_report(run)  # an earlier process may have ended between record and report
            return True
        if damage:
            print(f"warning: the training goes on from a checkpoint: {damage}", file=sys.stderr)
    return False


def train(run: RunFolder, record: RunRecord, prepared: Prepared, model: PeftModel, checkpoint: Path | None) -> None:
    """Train in a run folder. Write the data, the result and the report there."""
    from conversation.training.checkpoints import step_of
    from conversation.training.trainer import train_adapters

    record = record.with_start(after_step=step_of(checkpoint))
    if is_first_process():
        write_atomically(run.training_data, to_jsonl(prepared.training))
        write_atomically(run.held_out_data, to_jsonl(prepared.held_out))
        run.write(record)
        print(f"Run folder: {shown(run.path)}\n{prepared}\nDevice: {record.environment.machine['device']}")
    result = train_adapters(model, prepared.tokenizer, prepared.training_set, prepared.config, run, checkpoint)
    if result:  # of the first process
        run.write(replace(record, training=result))
        write_report(run)
        print(result)


if __name__ == "__main__":
    run_main(main, several_processes=True, hint=GO_ON)
