#!/usr/bin/env python3
"""What made the second version of the original system work: the tokenizer's flag, or more epochs?

    .venv/bin/python benchmarks/what_made_it_work.py                   120 examples (about half an hour on 2 cores)
    .venv/bin/python benchmarks/what_made_it_work.py --examples 600    near the original: 609 lines (2.5 hours)

The system that this project implements is described with two trainings: 3 epochs without `fix_mistral_regex`, reported
loss 1.77, and 7 epochs with it, reported loss 0.75. Two things changed at once. This comparison changes one at a time:
the ids of every example with the flag and without it, then 3 and 7 epochs of the original recipe (loss on all tokens)
on the stand-in. Where the flag changes no id, a training with it and one without it compute the same numbers, so each
number of epochs is trained once. Two losses are given of each: the mean over the whole run, which transformers prints
as `train_loss`, and the mean over the last window of 5 steps.

The warm-up is shortened with the data: 50 of the original's 533 steps are 9 percent. A stopped comparison goes on with
the same command; the runs are in training-runs/trials.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from conversation.data.examples import read_training_data, to_jsonl  # noqa: E402
from conversation.errors import CommandLine, UserError, run_main  # noqa: E402
from conversation.runs.files import make_folder, write_atomically  # noqa: E402
from conversation.runs.folder import RunFolder  # noqa: E402
from conversation_config import DATA_SETS, STAND_IN, TrainingConfig, set_up_libraries  # noqa: E402

TRIALS = PROJECT / "training-runs" / "trials"
EPOCHS = (3, 7)
WARM_UP = 50 / 533


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--examples", type=int, default=120, help="how many examples of the core set (default: 120)")
    args: argparse.Namespace = parser.parse_args()
    examples = read_training_data(DATA_SETS["core"])
    if not 8 <= args.examples <= len(examples):
        raise UserError(f"--examples must be 8 to {len(examples)}, not {args.examples}")
    chosen = examples[:: len(examples) // args.examples][: args.examples]
    set_up_libraries()
    from conversation.models.audit import audit
    from conversation.models.base_models import find_base_model

    changed = audit(find_base_model(STAND_IN), examples)[2].changed_by_flag
    print(f"fix_mistral_regex changes the ids of {changed} of {len(examples)} examples.")
    data = TRIALS / f"what_made_it_work-{args.examples}.jsonl"
    make_folder(data.parent)
    write_atomically(data, to_jsonl(chosen))
    rows = [(epochs, *losses(train(data, len(chosen), epochs))) for epochs in EPOCHS]
    flag = "with the flag or without" if changed == 0 else "with the flag"
    print(f"\n| epochs, {flag} | mean over the run | last window |\n| --- | --- | --- |")
    for epochs, mean, last in rows:
        print(f"| {epochs} | {mean:.2f} | {last:.2f} |")
    return 0


def train(data: Path, examples: int, epochs: int) -> RunFolder:
    """Train the original recipe for some epochs, with the loss on all tokens, or go on with such a training."""
    run = RunFolder(TRIALS / f"{data.stem}-{epochs}-epochs")
    config = TrainingConfig()
    flags = {
        "base_model": STAND_IN,
        "training_data": data,
        "held_out_share": 0,
        "loss_on": "all",
        "num_train_epochs": epochs,
        "warmup_steps": round(WARM_UP * max(EPOCHS) * examples / config.examples_per_step),
        "run_dir": run.path,
    }
    command = [sys.executable, str(PROJECT / "train_conversation.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    if status := subprocess.run(command + ["--resume"] * run.run_json.exists()).returncode:
        raise UserError(f"the training of {epochs} epochs ended with status {status}", exit_status=1)
    return run


def losses(run: RunFolder) -> tuple[float, float]:
    """The mean loss over the whole run and over its last window, in nats per token."""
    windows = [entry["loss"] for entry in run.read_metrics() if "loss" in entry]
    return fmean(windows), windows[-1]


if __name__ == "__main__":
    run_main(main)
