#!/usr/bin/env python3
"""How long the scripts take before they do anything: checking data, loading a model to ask, reaching the first step.

    benchmarks/start_up.py                            on the embedded stand-in, each three times (about 2 minutes)
    benchmarks/start_up.py --merged FOLDER            also test_conversation_model.py, until its first question
    benchmarks/start_up.py --rounds 1 --json

Seconds on the clock and of all cores, medians; the latter vary less on a busy machine. Each runs once before, so that
its files are in memory. Where they go: python -X importtime, python -m cProfile -s cumtime.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from conversation.errors import TRIED_AND_FAILED, CommandLine, UserError, run_main  # noqa: E402
from conversation.runs.files import real_path  # noqa: E402
from conversation.runs.machine import environment  # noqa: E402
from conversation.runs.record import now  # noqa: E402
from conversation_config import STAND_IN  # noqa: E402

UNTIL_TRAINING = """import sys, train_conversation
from conversation_config import set_up_libraries
set_up_libraries()
from conversation.training import trainer
trainer.train_adapters = lambda *_: sys.exit(0)
train_conversation.main()"""
UNTIL_QUESTION = """import sys, test_conversation_model as script
from pathlib import Path
from conversation_config import HELD_OUT_QUESTIONS, set_up_libraries
set_up_libraries()
from conversation.answering import structural_tests
structural_tests.run_tests = lambda *_: sys.exit(0)
script.ask(Path(sys.argv[1]), HELD_OUT_QUESTIONS, None)"""


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--base_model", default=STAND_IN, help="hub name or local folder (default: %(default)s)")
    parser.add_argument("--training_data", default="expert", help="default: %(default)s")
    parser.add_argument("--merged", type=Path, help="a merged model folder")
    parser.add_argument("--rounds", type=int, default=3, help="times that each runs (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    report: dict[str, Any] = {"date": now(), **dataclasses.asdict(environment()), "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(args, Path(folder)).items():
            run(command)
            report["seconds"][name] = [run(command) for _ in range(args.rounds)]
    print(json.dumps(report) if args.json else table(report))
    return 0


def commands(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """What is measured: the script's own code, up to the work itself."""
    data = ["--base_model", args.base_model, "--training_data", args.training_data]
    found = {
        "train_conversation.py --help": ["train_conversation.py", "--help"],
        "train_conversation.py --check_data": ["train_conversation.py", "--check_data", *data],
        "train_conversation.py, until the trainer": ["-c", UNTIL_TRAINING, *data, "--run_dir", str(folder / "run")],
        "RETRAIN.sh's bookkeeping": ["-m", "conversation.runs.publishing", "newest"],
    }
    if args.merged:
        found["test_conversation_model.py, until a question"] = ["-c", UNTIL_QUESTION, str(real_path(args.merged))]
    return found


def run(command: list[str]) -> dict[str, float]:
    """Its seconds on the clock and of all cores. Raises UserError when it fails."""
    if "--run_dir" in command:
        shutil.rmtree(command[-1], ignore_errors=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}", "", TRIED_AND_FAILED)
    cores = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"clock": seconds, "cores": cores}


def table(report: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{report['date']}, {report['machine']['processor']}, {report['machine']['cores']} cores", ""]
    lines += ["| | seconds | seconds of all cores |", "|---|---|---|"]
    for name, taken in report["seconds"].items():
        clock, cores = (statistics.median(each[kind] for each in taken) for kind in ("clock", "cores"))
        lines.append(f"| {name} | {clock:.1f} | {cores:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
