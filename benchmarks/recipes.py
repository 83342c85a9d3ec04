#!/usr/bin/env python3
"""Try recipes: train, take the figures that need no generated answer, add a line to benchmarks/recipes.jsonl.

    .venv/bin/python benchmarks/recipes.py --name rate-4e-4 -- --demo --learning_rate 4e-4     one trial
    .venv/bin/python benchmarks/recipes.py --table      all trials, as a Markdown table

What follows `--` are flags of train_conversation.py. The run folder is training-runs/trials/NAME; a trial that was
stopped goes on with the same command. The figures are the losses by kind of token of evaluate_conversation_model.py: on
50 training examples, on known topics in unseen wording and on unseen topics. A question counts as known when the
training data of the trial has its topic.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from conversation.data.examples import evenly_spread, read_jsonl  # noqa: E402
from conversation.data.questions import HeldOutCase, read_held_out  # noqa: E402
from conversation.errors import CommandLine, UserError, run_main  # noqa: E402
from conversation.format.calls import Example  # noqa: E402
from conversation.runs.folder import RunFolder  # noqa: E402
from conversation_config import EVALUATION_QUESTIONS, set_up_libraries  # noqa: E402

TRIALS = PROJECT / "training-runs" / "trials"
RESULTS = Path(__file__).with_suffix(".jsonl")


def main() -> int:
    args = parse_flags()
    if args.table:
        print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))
        return 0
    run = RunFolder(TRIALS / args.name)
    resume = ["--resume"] if run.run_json.exists() else []
    command = [sys.executable, str(PROJECT / "train_conversation.py"), "--run_dir", str(run.path)]
    if status := subprocess.run([*command, *args.flags, *resume]).returncode:
        return status
    line = json.dumps({"name": args.name, **figures(run)})
    with RESULTS.open("a") as results:
        results.write(line + "\n")
    print(line)
    return 0


def parse_flags() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--name", help="the name of the trial")
    parser.add_argument("--table", action="store_true", help="print the trials so far")
    parser.add_argument("flags", nargs="*", help="after --: flags of train_conversation.py")
    args = parser.parse_args()
    if bool(args.name) == args.table:
        raise UserError("name a trial, or ask for the table")
    return args


def figures(run: RunFolder) -> dict[str, Any]:
    """The settings of a trained run, its losses and time, and what its adapters know."""
    set_up_libraries()
    from peft import PeftModel

    from conversation.answering.knowledge import Scorer
    from conversation.models.base_models import find_base_model
    from conversation.models.tokenizer import load_tokenizer
    from conversation.models.weights import load_model

    record = run.read()
    assert record.training
    folder = find_base_model(record.config.base_model)
    model = PeftModel.from_pretrained(load_model(folder), str(run.final_lora)).merge_and_unload()
    scorer = Scorer(model, load_tokenizer(folder))
    training = read_jsonl(run.training_data)
    sets = held_out_sets([example.answer.follow_ups[0].target for example in training])
    result: dict[str, Any] = {
        "flags": [f"--{name}={value}" for name, value in vars(record.config).items()],  # a recipe may change
        "steps": record.training.steps,
        "examples": len(training),
        "minutes": round(record.training.seconds / 60, 1),
        "last_window_loss": record.training.last_window_loss,
        "held_out_loss": record.training.held_out_loss,
        "losses": {"training": vars(scorer.losses_by_kind(evenly_spread(training, 50)))},
    }
    for name, cases in sets.items():
        if cases:
            result["losses"][name] = vars(scorer.losses_by_kind([Example(case.prompt, case.answer) for case in cases]))
    return result


def held_out_sets(targets: list[str]) -> dict[str, list[HeldOutCase]]:
    """The held-out questions on topics that the training data has, and those on topics that no data has."""
    known, unseen = (read_held_out(path) for path in EVALUATION_QUESTIONS)
    return {
        "known": [case for case in known if any(target.startswith(f"{case.topic}_") for target in targets)],
        "unseen": list(unseen),
    }


def table(trials: list[dict[str, Any]]) -> str:
    """A Markdown table, a row per trial."""
    names = ("training", "known", "unseen")
    header = ["trial", "steps", "examples", "minutes", "last window"]
    header += [f"fragments, {name}" for name in names] + [f"targets, {name}" for name in names]
    rows = []
    for trial in trials:
        losses = trial["losses"]
        row = [trial["name"], trial["steps"], trial["examples"], trial["minutes"], f"{trial['last_window_loss']:.3f}"]
        row += [
            f"{losses[name][kind]:.2f}" if name in losses else "-"
            for kind in ("fragments", "targets")
            for name in names
        ]
        rows.append(row)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    run_main(main)
