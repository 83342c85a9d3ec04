#!/usr/bin/env python3
"""A GPU's figures in one command: what a step costs there, what fits into 6 GB, whether the memory plan holds.

    benchmarks/gpu.sh                              all of it, within 9 minutes, into training-runs/gpu/<date>
    benchmarks/gpu.sh --out FOLDER                 into that folder
    benchmarks/gpu.sh --device cpu --tiny          try it out without a GPU, on a tiny model (under two minutes)

It needs no network and no weights: it makes a Gemma 3 of the shape of 270M with random weights, and examples of random
tokens with the lengths of ours. It runs the tests of the step on the card, then measures: the table of
benchmarks/training_step.py with 6 GB of memory, with all of it, and with examples of 2048 tokens in 6 GB; the memory
plan beside the peak, four times. What cannot run is said, and the rest runs: a package that is missing, a variant that
is out of memory, a stage without time. Leaves report.md, report.json and log.txt.
Exit status: 0 all stages ran; 1 one failed or had no time; 2 not started.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks import memory_plan, training_step  # noqa: E402
from conversation.errors import TRIED_AND_FAILED, CommandLine, UserError, run_main  # noqa: E402
from conversation.runs.files import real_path, write_atomically, write_json  # noqa: E402
from conversation.runs.record import now  # noqa: E402

NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "psutil", "filelock")
FOR_TRL = ("trl", "datasets")
FOR_TESTS = ("pytest", "hypothesis")
TESTS = PROJECT / "tests" / "training" / "test_step_on_a_card.py"
OURS_TOKENS, LONG_TOKENS = 485, 2048  # an example of ours on average, and the longest that the training takes
CAP_GB = 6
LOOK = """import json, torch
there = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda if there else None,
    "card": torch.cuda.get_device_name() if there else None,
    "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if there else None}))"""


@dataclass(frozen=True)
class Stage:
    """A part of the measurement: a command that prints a JSON object, or text. `share` of the minutes, at most."""

    name: str
    command: list[str | Path]
    share: float


@dataclass
class Result:
    """What a stage came to. `problem`: why there is no `found`, or not all of it; else empty."""

    name: str
    seconds: float = 0.0
    problem: str = ""
    found: Any = None


@dataclass
class Report:
    date: str
    device: str
    machine: dict[str, Any]
    missing: list[str]
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0


def main() -> int:
    args = parse_flags()
    started = time.monotonic()
    missing = check_packages()
    out = real_path(args.out or PROJECT / "training-runs" / "gpu" / now()[:10])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "w", encoding="utf-8") as log, tempfile.TemporaryDirectory() as work:
        machine = look(args.device, log)
        report = Report(now(), args.device, machine, missing)
        print(f"{machine['card'] or 'the CPU'}; torch {machine['torch']}; results go to {out}", flush=True)
        deadline = started + 60 * args.minutes
        for stage in stages(Path(work), args.tiny, missing):
            seconds = min(60 * args.minutes * stage.share, deadline - time.monotonic())
            result = run(stage, seconds, args.device, log)
            report.results.append(result)
            report.seconds = time.monotonic() - started
            print(f"{stage.name}: {result.problem or 'done'} ({result.seconds:.0f} s)", flush=True)
            write_json(out / "report.json", dataclasses.asdict(report))  # what is there stays, whatever comes
            write_atomically(out / "report.md", to_markdown(report).encode())
    print(f"{out / 'report.md'}: {report.seconds:.0f} s in all")
    return TRIED_AND_FAILED if any(result.problem for result in report.results) else 0


def parse_flags() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--out", type=Path, help="the folder for the results (default: training-runs/gpu/<date>)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, short examples, one step: to try it out")
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole takes no longer (default: %(default)s)")
    args = parser.parse_args()
    if not args.minutes > 0:
        raise UserError("--minutes must be greater than 0")
    return args


def check_packages() -> list[str]:
    """The packages without which something is left out. Raises UserError for those without which nothing runs."""
    if absent := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(
            f"this Python ({sys.executable}) lacks {', '.join(absent)}",
            "install them; without a network: carry wheels, pip install --no-index --target SITE, PYTHONPATH=SITE",
        )
    return [name for name in (*FOR_TRL, *FOR_TESTS) if find_spec(name) is None]


def look(device: str, log: IO[str]) -> dict[str, Any]:
    """What torch says of the card. Raises UserError when --device cuda has none."""
    result = run(Stage("look", ["-c", LOOK], 1), 120, device, log)
    if result.problem:
        raise UserError(f"torch does not load: {result.problem}")
    if device == "cuda" and not result.found["card"]:
        raise UserError(
            f"torch {result.found['torch']} finds no card that CUDA can use",
            "see with nvidia-smi whether there is one; to try this out without: --device cpu --tiny",
        )
    return result.found


def stages(work: Path, tiny: bool, missing: list[str]) -> list[Stage]:
    """All stages, the most important first."""
    base = work / "base"
    step, plan = Path(training_step.__file__), Path(memory_plan.__file__)
    ours, long = (48, 160) if tiny else (OURS_TOKENS, LONG_TOKENS)
    rounds = ["--rounds", "1" if tiny else "9", "--trl_rounds", "1" if tiny else "3"]
    variants = ["original", *([] if tiny else ["completion"]), "ours"]
    with_trl = [*variants[:-1], *([] if tiny or set(FOR_TRL) & set(missing) else ["trl-1x8", "trl-8x1"]), "ours"]
    common = ["--base_model", str(base), "--json"]

    def table(name: str, tokens: int, names: list[str], *more: str) -> Stage:
        flags = [*common, "--tokens", str(tokens), "--variants", ",".join(names), *rounds, *more]
        return Stage(name, [step, *flags], 0.35)

    def planned(name: str, tokens: int, *more: str) -> Stage:
        return Stage(f"memory plan: {name}", [plan, *common, "--tokens", str(tokens), *more], 0.15)

    capped = ["--cuda_memory_gb", str(CAP_GB)]
    found = [Stage("weights", [PROJECT / "benchmarks" / "random_base.py", base, *["--tiny"] * tiny], 0.2)]
    if not set(FOR_TESTS) & set(missing):
        alone = ["--noconftest", "-p", "no:cacheprovider", "--durations=0"]  # conftest needs what only tests need
        found.append(Stage("tests of the step", ["-m", "pytest", TESTS, *alone], 0.25))
    return [
        *found,
        table(f"step, {CAP_GB} GB", ours, with_trl, *capped),
        table("step, all memory", ours, with_trl),
        table(f"step, examples of {long} tokens, {CAP_GB} GB", long, variants, *capped),
        planned(f"{CAP_GB} GB", ours, *capped),
        planned(f"examples of {long} tokens, {CAP_GB} GB", long, *capped),
        planned(f"the same, weights in bfloat16, {CAP_GB} GB", long, "--frozen_weights", "bfloat16", *capped),
        planned("all memory", ours),
    ]


def run(stage: Stage, seconds: float, device: str, log: IO[str]) -> Result:
    """Run a stage in a session of its own, whose processes all end with it. What it writes goes into the log."""
    if seconds < 1:
        return Result(stage.name, problem="no time was left")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "STEP_DEVICE": device}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    print(f"\n--- {stage.name}", file=log, flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, stage.command)],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        problem = f"ended with status {process.returncode}: see log.txt" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        problem = f"stopped after {seconds:.0f} s: its time was over"
    except BaseException:  # Ctrl-C reaches this process alone
        os.killpg(process.pid, signal.SIGKILL)
        raise
    print(output, file=log, flush=True)
    return Result(stage.name, time.monotonic() - started, problem, _value(output))


def _value(output: str) -> Any:
    """The JSON object on the last line, or the line."""
    last = (output.strip().splitlines() or [""])[-1]
    try:
        return json.loads(last, parse_constant=lambda _: None)  # NaN is no number of JSON
    except ValueError:
        return last


def to_markdown(report: Report) -> str:
    """For people."""
    card = report.machine["card"] or "the CPU, to try this out: no figure here is one of a GPU"
    memory = f", {report.machine['memory_gb']} GB" if report.machine["memory_gb"] else ""
    lines = [f"# A step on {card}", ""]
    lines += [f"{report.date}, {card}{memory}, torch {report.machine['torch']}, {report.seconds:.0f} s in all."]
    if report.missing:
        lines += ["", f"Not installed: {', '.join(report.missing)}; what needs them was left out."]
    plans = []
    for result in report.results:
        found = result.found if isinstance(result.found, dict) else None
        if found and "plan" in found:
            plans.append((result.name.partition(": ")[2], found))
        elif found and "variants" in found:
            lines += ["", f"## {result.name}", "", training_step.table({**found, "base_model": "Random weights"})]
        else:
            lines += ["", f"{result.name}: {result.problem or result.found or 'done'}."]
        if result.problem and found is not None:
            lines += ["", f"{result.name}: {result.problem}."]
    if plans:
        lines += ["", "## Memory plan", "", "| | plan, GB | peak, GB | off by | weights in | tokens a pass |"]
        lines += ["|---|---|---|---|---|---|"]
    for name, found in plans:
        plan, peak, halved = found["plan_gb"], found["peak_gb"], ", halved" if found["budget_halved"] else ""
        lines.append(
            f"| {name} | {plan:.2f} | {peak:.2f} | {plan / peak - 1:+.0%} | {found['plan']['frozen_weights']} "
            f"| {found['budget_tokens']}{halved} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
