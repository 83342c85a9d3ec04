"""Evaluations in tables and plots: of one run, and of several side by side."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from conversation.errors import UserError
from conversation.runs.evaluation_record import Evaluation, SetFigures, read_evaluation
from conversation.runs.files import shown, write_atomically
from conversation.runs.folder import RunFolder
from conversation.runs.loss_curve import new_figure
from conversation.runs.record import TrainingResult

NAMES = {
    "valid": "valid answers",
    "valid_sampled": "valid answers, sampled",
    "equal_fragments": "fragments equal to an earlier one",
    "fragments_without_news": "fragments without a new content word",
    "distinct_follow_ups": "three distinct follow-ups",
    "distinct_2": "distinct pairs of words (distinct-2)",
    "stock_only": "answers with stock follow-ups only",
    "commonest_confidences": "commonest triple of confidences",
    "confidence_spread": "spread of the confidences",
    "right_of_five": "right answer likeliest of five",
    "right_of_five_roots": "  of roots",
    "right_of_five_follow_ups": "  of follow-ups",
    "follow_up_recall_at_1": "true follow-up likeliest of ten",
    "follow_up_reciprocal_rank": "mean reciprocal rank of the true follow-up",
    "confidence_rank_agreement": "confidences: rank agreement (thirds: 0; any that fall, as all here do: 1)",
    "brier_score": "confidences: Brier score (thirds: 0.667; less is better)",
    "answer_relevance": "relevance of the answer (cosine)",
    "follow_up_relevance": "relevance of the follow-ups (cosine)",
}
SHARES = ("valid", "distinct_follow_ups", "right_of_five", "follow_up_recall_at_1", "equal_fragments", "stock_only")
LOSSES = ("syntax", "fragments", "follow_ups", "targets", "confidence")
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e")


def figures_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Every figure of some evaluations as a Markdown table: for each, its known and its unseen questions."""
    columns = [(name, key, each.sets[key]) for name, each in evaluations.items() for key in each.sets if key != "all"]
    head = [f"{name}, {key}" if len(evaluations) > 1 else f"{key} topics" for name, key, _ in columns]
    rows = [["decoding", *(evaluations[name].how for name, _, _ in columns)]]
    rows += [["questions", *(str(figures.questions) for _, _, figures in columns)]]
    rows += [[text, *(_cell(getattr(figures, field)) for *_, figures in columns)] for field, text in NAMES.items()]
    rows.append(["where invalid answers break", *(_breaks(figures) for *_, figures in columns)])
    table = _markdown(["", *head], rows)
    losses = [
        [f"loss of {kind.replace('_', '-')}, nats a token", *(_losses(each, kind) for each in evaluations.values())]
        for kind in LOSSES
    ]
    return f"{table}\n\n{_markdown(['evaluation questions / training examples', *evaluations], losses)}"


def comparison_table(runs: Sequence[RunFolder]) -> str:
    """Runs side by side: the settings that differ, losses, time, and every figure of their evaluations.

    Raises UserError for a folder that is no run.
    """
    records = {shown(run.path): run.read() for run in runs}
    settings = [spec.name for spec in dataclasses.fields(next(iter(records.values())).config)]
    different = [name for name in settings if len({getattr(r.config, name) for r in records.values()}) > 1]
    rows = [[f"--{name}", *(str(getattr(r.config, name)) for r in records.values())] for name in different]
    results = [record.training for record in records.values()]
    rows += [[text, *(form(result) if result else "-" for result in results)] for text, form in RESULTS.items()]
    parts = [_markdown(["", *records], rows)]
    evaluations = _evaluations(runs)
    if evaluations:
        parts.append(figures_table(evaluations))
    if missing := [name for name in records if name not in evaluations]:
        parts.append(f"Not evaluated yet: {', '.join(missing)}.")
    return "\n\n".join(parts)


def _evaluations(runs: Sequence[RunFolder]) -> dict[str, Evaluation]:
    """The evaluations of the runs' present models, by folder. One made before the training went on does not count."""
    merged = [run for run in runs if run.read().merge]
    return {shown(run.path): each for run in merged if (each := read_evaluation(run.evaluation))}


RESULTS: dict[str, Callable[[TrainingResult], str]] = {
    "training loss, last window": lambda result: f"{result.last_window_loss:.4f}",
    "held-out loss": lambda result: "-" if result.held_out_loss is None else f"{result.held_out_loss:.4f}",
    "optimizer steps": lambda result: str(result.steps),
    "minutes": lambda result: f"{result.seconds / 60:.1f}",
}


def draw_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Shares by set of questions, and losses by kind of token on those questions and on training examples, as a PNG."""
    _draw({"" if evaluation.how == "greedy" else f"{evaluation.how}:": evaluation}, path)


def draw_comparison(runs: Sequence[RunFolder], path: Path) -> None:
    """The same for several runs. Raises UserError when none of them is evaluated."""
    evaluations = _evaluations(runs)
    if not evaluations:
        names = ", ".join(shown(run.path) for run in runs)
        raise UserError(f"none of these runs is evaluated: {names}", "evaluate_conversation_model.py --run_dir RUN")
    alike = len({each.how for each in evaluations.values()}) == 1
    _draw({name if alike else f"{name} ({each.how})": each for name, each in evaluations.items()}, path)


def _draw(evaluations: Mapping[str, Evaluation], path: Path) -> None:
    figure = new_figure(11, 4.8)
    shares, losses = figure.subplots(1, 2)
    sets = [(name, key, each.sets[key]) for name, each in evaluations.items() for key in each.sets if key != "all"]
    bars = {f"{name} {key}".strip(): [getattr(figures, field) for field in SHARES] for name, key, figures in sets}
    _grouped_bars(shares, [NAMES[field] for field in SHARES], bars, "{:.0%}")
    shares.set(xlim=(0, 1.12), xlabel="share", title="what the model says and knows")
    values: dict[str, list[float | None]] = {}
    for name, each in evaluations.items():
        values[f"{name} questions".strip()] = [getattr(each.question_losses, kind) for kind in LOSSES]
        if each.training_losses:
            values[f"{name} training".strip()] = [getattr(each.training_losses, kind) for kind in LOSSES]
    _grouped_bars(losses, [kind.replace("_", "-") for kind in LOSSES], values, "{:.2f}")
    losses.set(xlabel="nats a token", title="loss by kind of token")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _grouped_bars(axes, labels: Sequence[str], bars: Mapping[str, Sequence[float | None]], form: str) -> None:
    """Horizontal bars beside each label. What was not measured has no bar, and "-" in its place."""
    height = 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        places = [place + (number - (len(bars) - 1) / 2) * height for place in range(len(labels))]
        drawn = axes.barh(
            places, [value or 0.0 for value in values], height * 0.9, label=name, color=COLOURS[number % len(COLOURS)]
        )
        said = ["-" if value is None else form.format(value) for value in values]
        axes.bar_label(drawn, said, padding=2, fontsize=7)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _breaks(figures: SetFigures) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in figures.breaks.items()) or "-"


def _losses(evaluation: Evaluation, kind: str) -> str:
    losses = (evaluation.question_losses, evaluation.training_losses)
    return " / ".join(f"{getattr(each, kind):.2f}" if each else "-" for each in losses)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (head, *rows))
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, *rows)
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
