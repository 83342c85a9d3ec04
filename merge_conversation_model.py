#!/usr/bin/env python3
"""Merge a run's adapters and its base into one FP32 model, verified.

    merge_conversation_model.py                         the newest run
    merge_conversation_model.py --run_dir training-runs/conversation/2026-11-22

Leaves merged_model_fp32/ in the run folder: it gets that name only after the model, read back from disk, said what base
and adapters say. Exit status: 0 merged and verified; 1 tried and failed; 2 not started.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from conversation.console import console_kept
from conversation.errors import CommandLine, UserError, run_main
from conversation.examples import read_jsonl
from conversation.files import check_room, differing_file, sha256_file, shown
from conversation.runs import RunFolder, hold, newest_run, now, refuse_published
from conversation_config import quiet_libraries

COMPARED_PROMPTS = 3


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--run_dir", type=Path, help="the run folder (default: the newest)")
    parser.add_argument("--base_model", help="where the base is now (default: what the run was trained on)")
    parser.add_argument("--resume", action="store_true", help="do nothing when the merged model is there and intact")
    args = parser.parse_args()
    run = RunFolder((args.run_dir or newest_run().path).resolve())
    if not run.run_json.exists():
        raise UserError(f"{shown(run.path)} is not a run folder: it has no run.json")
    with hold(run.path), console_kept(run):
        return merge_in(run, args.base_model, args.resume)


def merge_in(run: RunFolder, base_model: str | None, resume: bool) -> int:
    """Merge in a run folder that this process holds."""
    from conversation import reporting

    record = run.read()
    refuse_published(run, record)
    if not record.get("training"):
        raise UserError(
            f"the training in {shown(run.path)} is not finished", "finish it: train_conversation.py --resume"
        )
    adapter_files = record["training"]["adapter_files"]
    if resume and record.get("merge") and merged_is_intact(run, record["merge"], adapter_files):
        print("The model is merged and verified already.")
        reporting.write_report(run)  # it may have been stopped between record and report
        return 0
    for folder, files in ((run.final_lora, adapter_files), (run.path, record["training"].get("files", {}))):
        if problem := differing_file(folder, files):
            raise UserError(f"the adapters or data are not those of the training: {problem}", "train with --resume")

    quiet_libraries()
    from conversation import base_models, merging

    base_folder = base_models.find_base_model(base_model or record["base_model"]["name"])
    recorded_tokenizer = record["tokenizer"].get("file_sha256")
    if recorded_tokenizer and sha256_file(base_folder / "tokenizer.json") != recorded_tokenizer:
        raise UserError(f"{base_folder / 'tokenizer.json'} is not the one of the training", "bring the base model back")
    recorded_config = record["base_model"].get("config_sha256")
    if recorded_config and sha256_file(base_folder / "config.json") != recorded_config:
        raise UserError(f"{base_folder / 'config.json'} is not the one of the training", "bring the base model back")
    if base_models.weights_hash(base_folder) != record["base_model"]["weights_sha256"]:
        raise UserError(
            f"the adapters were trained on other weights than those of {base_model or record['base_model']['name']}",
            f"the run's base is {record['base_model']['name']}, SHA-256 {record['base_model']['weights_sha256'][:12]}",
        )
    check_room(run.path, int(1.1 * base_models.fp32_bytes(base_folder)), "the merged model")
    print("Merging in FP32, then reading the model back from disk ...", flush=True)
    prompts = [example.prompt for example in read_jsonl(run.training_data)[:COMPARED_PROMPTS]]
    result = merging.merge(base_folder, run.final_lora, run.merged_model, prompts)
    merged = {**dataclasses.asdict(result), "adapter_files": adapter_files, "finished": now()}
    run.update(merge=merged, structural_tests=None)
    reporting.write_report(run)
    print(
        f"Merged: {shown(run.merged_model)}, {result.model_bytes / 1e9:.2f} GB. On {result.prompts} prompts the logits "
        f"differ from base + adapters by at most {result.largest_logit_difference:.1e} (largest logit "
        f"{result.largest_logit:.1f}), greedy continuations are equal. Peak memory "
        f"{result.peak_memory_bytes / 1e9:.2f} GB, {result.peak_memory_bytes / result.model_bytes:.2f} times the model."
    )
    return 0


def merged_is_intact(run: RunFolder, merge: dict, adapter_files: dict[str, str]) -> bool:
    problem = differing_file(run.merged_model, merge["files"])
    if merge.get("adapter_files") != adapter_files:
        problem = "it was made with other adapters"
    if problem:
        print(f"The model is merged again: {problem}")
    return problem is None


if __name__ == "__main__":
    run_main(main)
