"""report.md: a run for people, made only from the files of its folder."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable
from typing import TypeVar

from conversation.errors import UserError
from conversation.runs.comparison import draw_evaluation, figures_table
from conversation.runs.evaluation_record import read_evaluation
from conversation.runs.export_record import read_export
from conversation.runs.files import write_atomically
from conversation.runs.folder import RUN_NAME, RunFolder
from conversation.runs.loss_curve import draw_loss_curve
from conversation.runs.model_card import write_model_cards
from conversation.runs.record import AnswersReport, RunRecord
from conversation_config import flags_of

T = TypeVar("T")
_MARKS = re.compile(r"[\\`*|~\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # inside a word, as in run_dir, _ marks nothing
STOPS_HERE = "⟦stops being valid here⟧"


def write_report(run: RunFolder) -> None:
    """Draw loss_curve.png, write report.md and the models' cards from the current files of the run folder."""
    record = run.read()
    draw_loss_curve(run.read_metrics(), record.config.loss_on, run.loss_curve)
    tests = _or_reason(run.read_tests) if record.structural_tests else None
    parts = [
        f"# Training run of {record.started[:10]}",
        _overview(record),
        "![Training and held-out loss over epochs](loss_curve.png)",
        "## Figures",
        _figures(record, previous_run(run, record)),
        "## The three structural tests",
        _tests(tests),
        "## Held-out questions",
        _held_out(tests),
        *_evaluation(run, record),
        *_export(run, record),
        "## What it was trained with",
        _settings(record),
        "## Repeat it",
        _verbatim(command_that_repeats(record)),
    ]
    write_atomically(run.report, ("\n\n".join(parts) + "\n").encode())
    write_model_cards(run)


def _or_reason(read: Callable[[], T]) -> T | str:
    """What is read from a stage's file; for one that is broken, which must not prevent the report, a sentence on it."""
    try:
        return read()
    except UserError as error:
        return f"Not shown: {_plain(str(error))}."


def _evaluation(run: RunFolder, record: RunRecord) -> list[str]:
    """The section on evaluation.json, with its plot drawn; empty where the run's present model is not evaluated."""
    evaluation = _or_reason(lambda: read_evaluation(run.evaluation)) if record.merge else None
    if evaluation is None:
        return []
    if isinstance(evaluation, str):
        return ["## What the answers are worth", evaluation]
    draw_evaluation(evaluation, run.evaluation_plot)
    asked = f"{len(evaluation.answers)} questions of the evaluation, {evaluation.decoding} decoding"
    return [
        "## What the answers are worth",
        f"{asked}, in {evaluation.seconds / 60:.1f} minutes. The answers are in `evaluation.json`.",
        "![Figures of the evaluation](evaluation.png)",
        figures_table({"this run": evaluation}),
        *evaluation.notes,
    ]


def _export(run: RunFolder, record: RunRecord) -> list[str]:
    """The section on export.json; empty where nothing is exported, or where it was of an earlier merged model."""
    export = _or_reason(lambda: read_export(run.export_json)) if record.merge else None
    if isinstance(export, str):
        return ["## Exported for llama.cpp and Ollama", export]
    if export is None or not record.merge or export.model_files != record.merge.files:
        return []
    head = (
        "type",
        "size",
        "change that survived",
        "structural tests",
        "held-out answers valid",
        "equal answers",
        "equal tokens",
        "largest gap",
    )
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in export.files:
        cells = (
            f"[{each.type}](gguf/{each.file})",
            f"{each.bytes / 1e6:.0f} MB",
            "not measured" if each.survived is None else f"{each.survived:.1%}",
            f"{each.passed_tests} of 3",
            f"{each.held_out_valid} of {each.held_out_questions}",
            f"{each.equal_answers} of {each.answers}",
            f"{each.equal_tokens / max(1, each.tokens):.2%}",
            f"{each.largest_gap:.4f} nats",
        )
        rows.append(f"| {' | '.join(cells)} |")
    forced = [f"`{each.type}` was forced: {reason}." for each in export.files for reason in each.forced]
    return [
        "## Exported for llama.cpp and Ollama",
        "\n".join(rows),
        "Survived: how much of what the adapters changed is left in the rounded weights. Equal: what llama.cpp said is "
        "what the merged model likes best at its place; the gap is how much more it likes its own.",
        *forced,
    ]


def summary(record: RunRecord) -> str:
    """A finished run in three lines."""
    training, tests = record.training, record.structural_tests
    if not training or not tests:
        return "The run is not finished."
    held_out = f", held out {training.held_out_loss:.3f}" if training.held_out_loss is not None else ""
    return (
        f"\nLoss:      {training.first_window_loss:.3f} to {training.last_window_loss:.3f}{held_out}; "
        f"{training.steps} steps in {training.seconds / 60:.1f} minutes\n"
        f"Tests:     {tests.passed_tests} of 3 structural tests passed\n"
        f"Held out:  {tests.held_out_valid} of {tests.held_out_questions} questions answered in valid form, "
        f"{tests.held_out_distinct} with three distinct follow-ups"
    )


def command_that_repeats(record: RunRecord) -> str:
    """The command for a run with the same settings: RETRAIN.sh for a published run, else the training alone."""
    flags = flags_of(record.config)
    if record.published:
        return shlex.join(["./RETRAIN.sh", *flags])
    launcher = [".venv/bin/python"]
    if record.processes > 1:
        launcher = [".venv/bin/torchrun", "--nproc_per_node", str(record.processes)]
    return shlex.join([*launcher, "train_conversation.py", *flags])


def previous_run(run: RunFolder, record: RunRecord) -> tuple[str, RunRecord] | None:
    """Name and record of the published run before this one; None if there is none."""
    root = run.path.parent.parent if run.is_attempt else run.path.parent
    found: list[tuple[str, RunRecord]] = []
    for path in root.glob(f"{RUN_NAME}/run.json"):
        try:
            other = RunFolder(path.parent).read()
        except UserError:
            continue  # another run's broken record must not prevent this report
        if other.published and other.started_at < record.started_at:
            found.append((path.parent.name, other))
    return max(found, key=lambda named: named[1].started_at, default=None)


def _overview(record: RunRecord) -> str:
    training = record.training
    if not training:
        return f"Training of `{record.config.base_model}` is unfinished: no final figures yet."
    text = (
        f"`{record.config.base_model}`, LoRA-trained for {training.steps} steps on "
        f"{record.data.statistics.training_examples} examples: the training loss went from "
        f"{training.first_window_loss:.3f} in the first window to {training.last_window_loss:.3f} in the last"
    )
    if training.held_out_loss is not None:
        text += f", the loss on held-out trees is {training.held_out_loss:.3f}"
    if record.structural_tests:
        return f"{text}. **{record.structural_tests.passed_tests} of 3 structural tests passed.**"
    return f"{text}. The model is merged and verified, not tested yet." if record.merge else f"{text}. Not merged yet."


def _figures(record: RunRecord, before: tuple[str, RunRecord] | None) -> str:
    """A table of the figures of this run and of the previous one."""
    earlier = _figure_values(before[1]) if before else {}
    head = f"| | this run | {before[0]} |\n|---|---|---|" if before else "| | this run |\n|---|---|"
    rows = [
        f"| {name} | {value} | {earlier.get(name, '')} |" if before else f"| {name} | {value} |"
        for name, value in _figure_values(record).items()
    ]
    return "\n".join([head, *rows])


def _figure_values(record: RunRecord) -> dict[str, str]:
    values: dict[str, str] = {}
    if training := record.training:
        values["loss of the first window"] = f"{training.first_window_loss:.4f}"
        values["loss of the last window"] = f"{training.last_window_loss:.4f}"
        if training.held_out_loss_before is not None:
            values["held-out loss before training"] = f"{training.held_out_loss_before:.4f}"
        if training.held_out_loss is not None:
            values["held-out loss after training"] = f"{training.held_out_loss:.4f}"
        values["optimizer steps"] = str(training.steps)
        values["training time"] = f"{training.seconds / 60:.1f} min"
        values["peak memory, training"] = f"{training.peak_memory_gb:.2f} GB"
        if plan := training.memory_plan:
            values["memory plan"] = f"{plan.total / 1e9:.2f} GB, frozen weights in {plan.frozen_weights}"
    if merge := record.merge:
        difference = f"{merge.largest_logit_difference:.1e} of {merge.largest_logit:.1f}"
        values["largest logit difference, merged and read back"] = difference
        ratio = merge.peak_memory_bytes / merge.model_bytes
        values["peak memory, merging"] = f"{merge.peak_memory_bytes / 1e9:.2f} GB, {ratio:.2f} x the model"
    if tests := record.structural_tests:
        asked = tests.held_out_questions
        values["structural tests passed"] = f"{tests.passed_tests} of 3"
        values["held-out questions: valid answers"] = f"{tests.held_out_valid} of {asked}"
        values["held-out questions: three distinct follow-ups"] = f"{tests.held_out_distinct} of {asked}"
    return values


def _tests(report: AnswersReport | str | None) -> str:
    if not isinstance(report, AnswersReport):
        return report or "Not tested."
    parts = []
    for test in report.tests:
        verdict = "passed" if test.passed else f"FAILED: {_plain(test.problem or '')}"
        parts.append(f"### {test.name}: {test.question}\n\n{verdict}")
        parts += [f"- warning: {_plain(warning)}" for warning in test.warnings]
        parts.append(_verbatim(mark(test.output, test.position)))
    return "\n\n".join(parts)


def mark(output: str, position: int | None) -> str:
    """A model's output with a mark before its first invalid character."""
    return output if position is None else f"{output[:position]}{STOPS_HERE}{output[position:]}"


def _held_out(report: AnswersReport | str | None) -> str:
    if not isinstance(report, AnswersReport):
        return report or "Not asked."
    rows = ["| question | valid | answer | follow-ups |", "|---|---|---|---|"]
    for asked in report.held_out:
        answer = " / ".join(asked.texts or ())
        follow_ups = " / ".join(str(choice["text"]) for choice in asked.choices or ())
        valid = "yes" if asked.passed else asked.problem or "no"
        rows.append("| " + " | ".join(map(_plain, (asked.question, valid, answer, follow_ups))) + " |")
    return "\n".join(rows)


def _settings(record: RunRecord) -> str:
    statistics, environment = record.data.statistics, record.environment
    later = [f"{start.time} after step {start.after_step}" for start in record.starts[1:]]
    rows = {
        **{name: value for name, value in dataclasses.asdict(record.config).items() if value != ""},
        "examples (training, held out)": f"{statistics.training_examples}, {statistics.held_out_examples}",
        "tokens per example (median, max)": f"{statistics.token_lengths.median:g}, {statistics.token_lengths.max}",
        "share of label tokens": statistics.label_token_share,
        "SHA-256 of the training data": record.data.training_sha256,
        "SHA-256 of the base weights": record.base_model.weights_sha256,
        "tokenizer fingerprint": record.base_model.tokenizer_fingerprint,
        "git commit": ", then ".join(record.commits),
        "machine": ", ".join(f"{name}: {value}" for name, value in environment.machine.items()),
        "versions": ", ".join(f"{name} {value}" for name, value in environment.versions.items()),
        "started": "; resumed ".join([record.started, *later]),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_plain(str(value))} |" for name, value in rows.items())])


def _plain(text: str) -> str:
    """Text on one line that Markdown shows as it is, also in the cell of a table: no emphasis, link, image or HTML."""
    one_line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKS.sub(r"\\\g<0>", one_line)


def _verbatim(text: str) -> str:
    """Text in a code fence longer than any row of backticks in it."""
    longest = max((len(row) for row in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
