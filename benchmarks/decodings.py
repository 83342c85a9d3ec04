#!/usr/bin/env python3
"""The ways to answer side by side, on both sets of held-out questions: form, repetition, relevance, seconds.

    benchmarks/decodings.py MERGED_MODEL                       all methods, 100 questions
    benchmarks/decodings.py MERGED_MODEL --every 4             every fourth pair of a root question and a follow-up
    benchmarks/decodings.py MERGED_MODEL --methods greedy constrained --out answers.json

The figures are those of evaluate_conversation_model.py (conversation/data/figures.py; relevance needs
requirements-data.txt). Seconds are for all answers of a set; free answers to many questions are made in one batch, the
others one by one, as the server makes them, so the seconds of the two kinds do not compare. `--out` keeps every answer:
whether it is right, people have to read.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from conversation.answering.decoding import METHODS  # noqa: E402
from conversation.data import figures  # noqa: E402
from conversation.errors import CommandLine, run_main  # noqa: E402
from conversation_config import EVALUATION_QUESTIONS, set_up_libraries  # noqa: E402

if TYPE_CHECKING:
    from conversation.answering.verdicts import Verdict
    from conversation.data.questions import HeldOutCase

COLUMNS = {
    "valid": "valid",
    "equal_fragments": "fragments equal to an earlier one",
    "fragments_without_news": "fragments without news",
    "distinct_follow_ups": "three distinct follow-ups",
    "distinct_2": "distinct-2",
    "stock_only": "stock follow-ups only",
    "answer_relevance": "relevance of answers",
    "follow_up_relevance": "relevance of follow-ups",
    "seconds": "seconds",
}


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("model", type=Path, help="a merged folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th pair of questions")
    parser.add_argument("--out", type=Path, help="write figures and answers there, as JSON")
    args = parser.parse_args()
    set_up_libraries()
    from conversation.answering.decoding import Decoding
    from conversation.data.questions import read_held_out
    from conversation.models.merged_model import load_verified

    model, tokenizer = load_verified(args.model)
    found = []
    for path in EVALUATION_QUESTIONS:
        cases = [case for number, case in enumerate(read_held_out(path)) if number // 2 % max(1, args.every) == 0]
        for method in args.methods:
            row = measure(model, tokenizer, cases, Decoding(method))
            print(f"{path.stem}, {method}: {row['seconds']} s for {len(cases)} answers", file=sys.stderr, flush=True)
            found.append({"set": path.stem, "method": method, **row})
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def measure(model: Any, tokenizer: Any, cases: Sequence[HeldOutCase], decoding: Any) -> dict[str, Any]:
    """The figures of one way to answer some questions, and the answers."""
    from conversation.answering.decoding import generate_answers
    from conversation.answering.verdicts import judge
    from conversation.data.questions import Case

    started = time.monotonic()
    outputs = generate_answers(model, tokenizer, [case.prompt for case in cases], decoding)
    seconds = time.monotonic() - started
    verdicts = [judge(Case(c.topic, c.prompt), tokenizer, ids) for c, ids in zip(cases, outputs, strict=True)]
    answers = [verdict.answer for verdict in verdicts if verdict.answer]
    return {
        "valid": figures.share(verdict.passed for verdict in verdicts),
        "equal_fragments": figures.equal_fragments(answers),
        "fragments_without_news": figures.fragments_without_news(answers),
        "distinct_follow_ups": figures.share(verdict.has_distinct_follow_ups for verdict in verdicts),
        "distinct_2": figures.distinct_2(answers),
        "stock_only": figures.stock_only(answers),
        **relevance_of(verdicts),
        "seconds": round(seconds, 1),
        "answers": [
            {
                "topic": case.topic,
                "history": [f"{line.speaker}: {line.text}" for line in case.prompt.history],
                "question": case.prompt.question,
                "output": verdict.output,
            }
            for case, verdict in zip(cases, verdicts, strict=True)
        ],
    }


def relevance_of(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """The mean cosine of the questions of a conversation so far with the answer's fragments, and its follow-ups."""
    from conversation.answering.evaluation import Relevance

    near = Relevance(short=False)
    found = {"answer_relevance": near.of_answers(verdicts), "follow_up_relevance": near.of_follow_ups(verdicts)}
    measured = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: fmean(values) if values else None for name, values in measured.items()}


def table(found: list[dict[str, Any]]) -> str:
    """For people: shares in per cent, relevance as a cosine."""
    lines = ["| questions | method | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for row in found:
        cells = []
        for name in COLUMNS:
            share = name not in ("seconds", "answer_relevance", "follow_up_relevance", "distinct_2")
            value = row[name]
            form = "%.0f %%" if share else "%.0f" if name == "seconds" else "%.2f"
            cells.append("-" if value is None else form % (value * 100 if share else value))
        lines.append(f"| {row['set']} | {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
