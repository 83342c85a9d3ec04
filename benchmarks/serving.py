#!/usr/bin/env python3
"""What a reader of the served model waits for: one reader alone, then several at once, through the server's API.

    benchmarks/serving.py MODEL                        a .gguf file, a merged folder or a run; 200 answers, 10 minutes
    benchmarks/serving.py MODEL --answers 20 --minutes 1
    benchmarks/serving.py MODEL --readers 16 --json    one JSON object; the table is for people

It starts `serve_conversation_model.py` twice and times the second start, whose files are in memory. One reader asks the
root questions of the evaluation (50, again and again; the server has read all of such a prompt but the question),
follows one of the three follow-ups of each answer, and one of the next, until there are `--answers`. Then `--readers`
do so at once for `--minutes`, each in an order of its own. An answer counts as whole when the project's own type
accepts it and no fragment, follow-up or target of it occurs twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from conversation.answering.answer_queue import MAX_WAITING_OF_ONE  # noqa: E402
from conversation.errors import TRIED_AND_FAILED, CommandLine, UserError, run_main  # noqa: E402
from conversation.format.calls import Answer, FollowUp, repeated  # noqa: E402
from conversation.runs.files import real_path  # noqa: E402
from conversation.runs.machine import environment  # noqa: E402
from conversation.runs.record import now  # noqa: E402
from conversation_config import EVALUATION_QUESTIONS  # noqa: E402
from serve_conversation_model import KEY_VARIABLE  # noqa: E402

FOLLOWED = 2  # follow-ups that a reader takes before the next root
LONGEST_WAIT = 120  # seconds without a word from the server


@dataclass(frozen=True)
class Asked:
    """One answer as a reader met it; seconds from the request on. `problem`: why it is not whole, or none."""

    root: bool
    first_fragment: float
    whole: float
    problem: str | None


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("model", type=Path, help="a .gguf file, a merged folder or a run folder")
    parser.add_argument("--answers", type=int, default=200, help="of the one reader (default: %(default)s)")
    parser.add_argument("--readers", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="that they read (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.answers < 1 or not 1 <= args.readers <= MAX_WAITING_OF_ONE:
        raise UserError(
            f"--answers must be at least 1, --readers from 1 to {MAX_WAITING_OF_ONE}: the server refuses more"
        )
    model = real_path(args.model)
    if not model.exists():
        raise UserError(f"there is no model at {model}", "name a .gguf file, a merged folder or a run folder")
    with served(model):
        pass  # its files are in memory now
    with served(model) as (url, process, seconds):
        alone = read_alone(url, args.answers)
        together = read_together(url, args.readers, args.minutes)
        if process.poll() is not None:
            raise UserError("the server ended while it was asked", "", TRIED_AND_FAILED)
        memory = memory_of(process)
    report = {
        **{"date": now(), **dataclasses.asdict(environment()), "model": model.name, "start_seconds": seconds},
        **{"readers": args.readers, "minutes": args.minutes, "memory": memory},
        **{"alone": [dataclasses.asdict(each) for each in alone]},
        **{"together": [dataclasses.asdict(each) for each in together]},
    }
    print(json.dumps(report) if args.json else table(report))
    return TRIED_AND_FAILED if any(each.problem for each in [*alone, *together]) else 0


@contextmanager
def served(model: Path) -> Iterator[tuple[str, subprocess.Popen[str], float]]:
    """The server at work: its address, its process, the seconds until it was ready. Raises UserError if it fails."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, str(PROJECT / "serve_conversation_model.py"), "--model", str(model), "--no_browser"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--port", "0", "--data_dir", folder],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, KEY_VARIABLE: ""},
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("Ready: "):
                    yield line.split()[1], process, time.perf_counter() - started
                    break
            else:
                errors.seek(0)
                raise UserError(f"the server did not start:\n{errors.read()[-2000:]}", "", TRIED_AND_FAILED)
        finally:
            process.terminate()
            process.communicate(timeout=60)


def roots(seed: int) -> Iterator[str]:
    """The evaluation's root questions in an order of this seed, again and again."""
    from conversation.data.questions import read_held_out

    questions = [case.prompt.question for path in EVALUATION_QUESTIONS for case in read_held_out(path) if case.is_root]
    random.Random(seed).shuffle(questions)
    while True:
        yield from questions


def conversation(url: str, seed: int) -> Iterator[Asked]:
    """What one reader asks, without end: a root, then a follow-up of its answer, then one of that answer."""
    choose = random.Random(seed)
    for root in roots(seed):
        history: list[Any] = []
        question = root
        for _ in range(1 + FOLLOWED):
            asked, answer = ask(url, question, history)
            yield asked
            if answer is None:
                break
            lines = [("User", question), *(("AI", fragment) for fragment in answer.fragments)]
            history += [{"speaker": speaker, "text": text} for speaker, text in lines]
            question = choose.choice(answer.follow_ups).text


def ask(url: str, question: str, history: list[Any]) -> tuple[Asked, Answer | None]:
    """One question, and its answer as it streams in; no answer if it is not whole."""
    import requests

    started = time.perf_counter()
    fragments: list[str] = []
    follow_ups: list[FollowUp] = []
    first, problem, done = 0.0, None, False
    try:
        body = {"question": question, "history": history}
        with requests.post(f"{url}api/answer", json=body, stream=True, timeout=LONGEST_WAIT) as response:
            response.raise_for_status()
            for name, data in events(response.iter_lines(chunk_size=1)):
                if name == "fragment":
                    first = first or time.perf_counter() - started
                    fragments.append(data["text"])
                elif name == "choice":
                    follow_ups.append(FollowUp(data["text"], str(data["confidence"]), data["target"]))
                elif name == "error":
                    raise ValueError(data["error"]["message"])
                done = done or name == "done"
        answer = Answer(tuple(fragments), tuple(follow_ups))
        texts = fragments, [each.text for each in follow_ups], [each.target for each in follow_ups]
        if not done:
            raise ValueError("the answer broke off")
        if any(map(repeated, texts)):
            raise ValueError("something is said twice")
    except (requests.RequestException, ValueError) as error:
        answer, problem = None, f"{question}: {error}"
    return Asked(not history, first, time.perf_counter() - started, problem), answer


def events(lines: Iterator[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(event, data) of the server's event stream: each event is a line of its name and a line of JSON."""
    name = ""
    for line in lines:
        field, _, value = line.decode().partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def read_alone(url: str, answers: int) -> list[Asked]:
    """The one reader's answers."""
    reader = conversation(url, seed=0)
    return [next(reader) for _ in range(answers)]


def read_together(url: str, readers: int, minutes: float) -> list[Asked]:
    """The answers that all readers got who read at once for so many minutes."""
    ends = time.monotonic() + 60 * minutes
    found: list[Asked] = []

    def read(seed: int) -> None:
        for asked in conversation(url, seed):
            found.append(asked)
            if time.monotonic() > ends:
                return
            if asked.problem:
                time.sleep(1)  # a refusal comes at once

    threads = [threading.Thread(target=read, args=(1 + number,), daemon=True) for number in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def memory_of(process: subprocess.Popen[str]) -> dict[str, float]:
    """Megabytes of the server's process: resident, and those of them that are mapped files (Linux only, else 0)."""
    import psutil

    memory = psutil.Process(process.pid).memory_info()
    return {"resident_mb": memory.rss / 1e6, "files_mb": getattr(memory, "shared", 0) / 1e6}


def table(report: dict[str, Any]) -> str:
    """For people."""
    machine, memory = report["machine"], report["memory"]
    lines = [
        f"{report['model']}, {report['date']}, {machine['processor']}, {machine['cores']} cores",
        f"Second start: {report['start_seconds']:.1f} s. Memory: {memory['resident_mb']:.0f} MB, of which "
        f"{memory['files_mb']:.0f} are files that several servers share.",
        "",
        "| | answers | not whole | first fragment, s: median, 90 % | whole answer, s: median, 90 % |",
        "|---|---|---|---|---|",
    ]
    together = f"{report['readers']} readers, {report['minutes']:g} minutes"
    for name, asked in [
        ("one reader, root", [each for each in report["alone"] if each["root"]]),
        ("one reader, follow-up", [each for each in report["alone"] if not each["root"]]),
        (together, report["together"]),
    ]:
        broken = sum(each["problem"] is not None for each in asked)
        whole = [each for each in asked if each["problem"] is None]  # a refusal comes at once
        waits = (middle_and_tenth([each[kind] for each in whole]) for kind in ("first_fragment", "whole"))
        lines.append(f"| {name} | {len(asked)} | {broken} | {' | '.join(waits)} |")
    problems = [each["problem"] for each in [*report["alone"], *report["together"]] if each["problem"]]
    return "\n".join([*lines, *(f"Not whole: {each}" for each in problems[:10])])


def middle_and_tenth(seconds: list[float]) -> str:
    """The median, and what nine in ten do not exceed; "-" of fewer than two."""
    if len(seconds) < 2:
        return "-"
    return f"{statistics.median(seconds):.2f}, {statistics.quantiles(seconds, n=10, method='inclusive')[-1]:.2f}"


if __name__ == "__main__":
    run_main(main)
