#!/usr/bin/env python3
"""How OpenMP's threads should wait for each other: generation and a training step, quiet and beside busy programs.

    benchmarks/busy_machine.py                              all settings, on the embedded stand-in (about 50 minutes)
    benchmarks/busy_machine.py --tasks generation           one of the two
    benchmarks/busy_machine.py --settings unset,passive,spin-10k --loads 0,2
    benchmarks/busy_machine.py --json > busy.json           one JSON object; the table goes to standard error

torch's Linux wheel brings GNU's libgomp. There a thread that waits for the others spins GOMP_SPINCOUNT times, then
sleeps: 300,000 times (about 3 ms) if nothing is set, never with OMP_WAIT_POLICY=passive. (KMP_BLOCKTIME is Intel's and
LLVM's.) Each setting has its own process, since libgomp reads it when it is loaded. All are loaded at once and take
turns, in an order drawn anew each round, so that a spell of the machine meets all of them; the ratios are of one round.
The load is processes that do nothing but count, at the usual priority. Needs as many GB of memory as settings times 4
(training) or 2 (generation), and a machine that is otherwise quiet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.training_step import say  # noqa: E402
from conversation.errors import CommandLine, UserError, run_main  # noqa: E402
from conversation.runs.machine import environment  # noqa: E402
from conversation.runs.record import now  # noqa: E402
from conversation_config import STAND_IN, set_up_libraries  # noqa: E402

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
SETTINGS: dict[str, dict[str, str]] = {
    "unset": {},  # libgomp's own: 300,000 spins
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin-1k": {"GOMP_SPINCOUNT": "1000"},
    "spin-10k": {"GOMP_SPINCOUNT": "10000"},
    "spin-50k": {"GOMP_SPINCOUNT": "50000"},
    "one-thread": {"OMP_NUM_THREADS": "1"},
}
TASKS = ("generation", "training")
LOAD = "while True: pass"


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--base_model", default=STAND_IN, help="hub name or local folder (default: %(default)s)")
    parser.add_argument("--training_data", type=Path, default=PROJECT / "data" / "conversation_trees")
    parser.add_argument(
        "--settings", default=",".join(SETTINGS), help="some of %(default)s; the first is compared with"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of %(default)s")
    parser.add_argument("--loads", default="0,1,2", help="busy processes beside it (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each setting (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens to generate a turn (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=4, help="examples of a training step (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    settings, tasks = args.settings.split(","), args.tasks.split(",")
    if unknown := ({*settings} - {*SETTINGS}) | ({*tasks} - {*TASKS}):
        raise UserError(f"unknown: {', '.join(sorted(unknown))}", f"{', '.join(SETTINGS)}; {', '.join(TASKS)}")
    if not all(map(str.isdecimal, args.loads.split(","))) or min(args.rounds, args.tokens, args.examples) < 1:
        raise UserError("--loads takes numbers with commas; --rounds, --tokens and --examples must be at least 1")
    report: dict[str, Any] = {"date": now(), **dataclasses.asdict(environment()), "reference": settings[0]}
    loads = [int(load) for load in args.loads.split(",")]
    report["seconds"] = {task: measure(task, settings, loads, args) for task in tasks}
    print(table(report), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report))
    return 0


def measure(task: str, settings: list[str], loads: list[int], args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Load -> setting -> the seconds of each turn; progress on standard error."""
    workers = [Worker(task, name, args) for name in settings]
    order, found = random.Random(0), {}
    try:
        for load in loads:
            found[load] = {name: [] for name in settings}
            with busy(load):
                for number in range(args.rounds):
                    for worker in order.sample(workers, len(workers)):
                        seconds = worker.turn()
                        found[load][worker.name].append(seconds)
                        say(f"{task}, {load} busy, round {number + 1}, {worker.name}: {seconds:.2f} s")
    finally:
        for worker in workers:
            worker.end()
    return found


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that take all of a core each, if they get it."""
    started = [subprocess.Popen([sys.executable, "-c", LOAD]) for _ in range(processes)]
    time.sleep(1.0 if started else 0.0)
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


class Worker:
    """A task in a process of its own, under a setting. It has warmed up when it exists."""

    def __init__(self, task: str, name: str, args: argparse.Namespace):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(task, name, args, other), daemon=True)
        self.process.start()
        other.close()
        self._receive()

    def turn(self) -> float:
        self.connection.send("go")
        return self._receive()

    def end(self) -> None:
        self.process.kill()
        self.process.join()

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise UserError(f"{self.name} ended with status {self.process.exitcode}", "", 1) from None


def work(task: str, name: str, args: argparse.Namespace, connection: Connection) -> None:
    """The whole life of a worker process."""
    os.dup2(2, 1)  # what libraries print must not mix with our output
    set_up_libraries()
    for variable in VARIABLES:  # libgomp is not loaded yet
        os.environ.pop(variable, None)
    os.environ.update(SETTINGS[name])
    step = {"generation": generation, "training": training}[task](args)
    step()
    connection.send("ready")
    while True:
        connection.recv()
        started = time.perf_counter()
        step()
        connection.send(time.perf_counter() - started)


def generation(args: argparse.Namespace) -> Callable[[], object]:
    """`--tokens` tokens after a prompt of the structural tests, greedily, one answer at a time as a user asks."""
    import torch

    from conversation.format.calls import Prompt
    from conversation.models.base_models import find_base_model
    from conversation.models.tokenizer import encode_prompt, load_tokenizer
    from conversation.models.weights import load_model

    folder = find_base_model(args.base_model)
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(folder).eval()
    ids = torch.tensor([encode_prompt(tokenizer, Prompt("What's a monad?"))])
    length = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}

    def step() -> object:
        with torch.inference_mode():
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length)

    return step


def training(args: argparse.Namespace) -> Callable[[], object]:
    """A step of our training on `--examples` examples, always the same."""
    import torch

    from benchmarks.training_step import adapted_model, random_batches, sharing
    from conversation.models.base_models import find_base_model

    folder = find_base_model(args.base_model)
    batch = random_batches(folder, args.training_data, 1, seed=0)[0][: args.examples]
    model = adapted_model(folder, None, fused=True)
    gradients = sharing(model, max_tokens=2**40)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        gradients(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def table(report: dict[str, Any]) -> str:
    """For people: median seconds and, in brackets, the median of the ratios to the first setting, round by round."""
    lines = [f"{report['date']}, {report['machine']['processor']}, {report['machine']['cores']} cores"]
    for task, by_load in report["seconds"].items():
        names = list(next(iter(by_load.values())))
        lines += ["", f"| {task}: busy processes | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        for load, by_setting in by_load.items():
            reference = by_setting[report["reference"]]
            cells = [
                f"{statistics.median(taken):.2f} ({statistics.median(map(float.__truediv__, taken, reference)):.2f})"
                for taken in by_setting.values()
            ]
            lines.append(f"| {load} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
