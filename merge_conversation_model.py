#!/usr/bin/env python3
"""Merge a run's adapters into its base, as one verified FP32 model.

    merge_conversation_model.py                         the newest run
    merge_conversation_model.py --run_dir training-runs/conversation/2026-11-22

Writes merged_model_fp32/ into the run folder. The folder gets that name only after the model, read back from disk, has
given the logits of base and adapters. Exit status: 0 merged and verified; 1 tried and failed; 2 not started.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from conversation.data.examples import read_jsonl
from conversation.errors import GO_ON, CommandLine, UserError, run_main
from conversation.runs.files import check_disk_space, find_damage, shown
from conversation.runs.folder import RunFolder, chosen_run
from conversation.runs.record import RunRecord
from conversation.runs.report import write_report
from conversation_config import add_device_flag, set_up_libraries

COMPARED_PROMPTS = 3


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--run_dir", type=Path, help="the run folder (default: the newest)")
    parser.add_argument("--base_model", help="where the base is now (default: what the run was trained on)")
    parser.add_argument("--resume", action="store_true", help="do nothing if the merged model is intact")
    add_device_flag(parser)
    args = parser.parse_args()
    run = chosen_run(args.run_dir)
    with run.at_work() as record:
        reason = why_merge_again(run, record) if args.resume else ""
        if reason is None:
            print("The model is merged and verified already.")
        else:
            if reason:
                print(f"Merging, as {reason}.")
            merge(run, record, args.base_model or record.base_model.name, args.device)
        write_report(run)  # always: an earlier process may have ended between record and report
    return 0


def why_merge_again(run: RunFolder, record: RunRecord) -> str | None:
    """The reason to merge on --resume; None when the merged model is intact and made from the training's adapters."""
    if not record.merge or not record.training:
        return "there is no merged model yet"
    if record.merge.adapter_files != record.training.adapter_files:
        return "the merged model is made from other adapters"
    return find_damage(run.merged_model, record.merge.files)


def merge(run: RunFolder, record: RunRecord, base_model: str, device: str | None) -> None:
    """Check that adapters and base are those of the training. Merge, verify, record."""
    training = record.training
    if not training:
        problem = f"the training in {shown(run.path)} is not finished"
        raise UserError(problem, "finish it: train_conversation.py --resume")
    for folder, files in ((run.final_lora, training.adapter_files), (run.path, training.files)):
        if damage := find_damage(folder, files):
            raise UserError(f"the adapters or data are not those of the training: {damage}", "train with --resume")
    set_up_libraries()
    from conversation.models import base_models, merging, tokenizer, weights
    from conversation.models.device import use_device

    print(f"Device: {use_device(device)}")
    base_folder = base_models.find_base_model(base_model)
    fingerprint = tokenizer.fingerprint(tokenizer.load_tokenizer(base_folder))
    if differences := record.base_model.differences(weights.identify(base_folder, base_model, fingerprint)):
        problems = "\n".join(f"  {difference}" for difference in differences)
        raise UserError(f"{base_model} is not the base of the training:\n{problems}", "bring that base back")
    check_disk_space(run.path, int(1.1 * weights.fp32_bytes(base_folder)), "the merged model")
    print("Merging in FP32, then reading the model back from disk ...", flush=True)
    prompts = [example.prompt for example in read_jsonl(run.training_data)[:COMPARED_PROMPTS]]
    restates = record.config.reasoning == "restate"
    result = merging.merge(base_folder, run.final_lora, run.merged_model, prompts, training.adapter_files, restates)
    run.evaluation.unlink(missing_ok=True)  # it was of another model
    run.write(replace(record, merge=result, structural_tests=None))
    print(f"Merged: {shown(run.merged_model)}, {result}")


if __name__ == "__main__":
    run_main(main, hint=GO_ON)
