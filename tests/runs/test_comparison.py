"""Evaluations in tables, plots and cards: none is shown as comparable with another that was made otherwise."""

import dataclasses
import shutil

import pytest
from conftest import PROJECT
from records import some_record

from conversation.data import figures
from conversation.data.questions import read_held_out
from conversation.runs import comparison, model_card
from conversation.runs.evaluation_record import read_evaluation, write_evaluation
from conversation.runs.folder import RunFolder
from conversation.runs.record import MergeResult
from conversation_config import EVALUATION_QUESTIONS

EXAMPLE = PROJECT / "training-runs" / "conversation" / "example-2026-11-27-demo"
MERGED = MergeResult(3, 1e-6, 10.0, 10**9, 2 * 10**9, {"model.safetensors": "x"}, {}, "2026-01-02")


def evaluated(folder, **changes) -> RunFolder:
    """A run with the evaluation of the example, changed."""
    folder.mkdir()
    run = RunFolder(folder)
    run.write(some_record(merge=MERGED))
    write_evaluation(dataclasses.replace(read_evaluation(EXAMPLE / "evaluation.json"), **changes), run.evaluation)
    return run


def test_the_evaluation_in_the_repository_is_read_compared_and_drawn(tmp_path):
    found = read_evaluation(EXAMPLE / "evaluation.json")
    assert len(found.answers) == 100 and found.how == "greedy"
    run = RunFolder(shutil.copytree(EXAMPLE, tmp_path / "run"))
    assert "| decoding " in comparison.comparison_table([run])
    comparison.draw_comparison([run], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def bars_drawn(monkeypatch) -> list:
    """What the plots to come show: (name of the bars, their labels)."""
    shown = []
    plain = comparison._grouped_bars

    def noted(axes, labels, bars, form):
        plain(axes, labels, bars, form)
        texts = [text.get_text() for text in axes.texts]
        shown.extend((name, texts[i * len(labels) : (i + 1) * len(labels)]) for i, name in enumerate(bars))

    monkeypatch.setattr(comparison, "_grouped_bars", noted)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *given, **named: None)  # it takes a second
    return shown


def test_tables_and_plots_tell_how_each_evaluation_was_made(tmp_path, monkeypatch):
    shown = bars_drawn(monkeypatch)
    runs = [evaluated(tmp_path / "a"), evaluated(tmp_path / "b", decoding="constrained", short=True)]
    (row,) = (line for line in comparison.comparison_table(runs).splitlines() if line.startswith("| decoding "))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "decoding", "greedy", "greedy", "constrained, short", "constrained, short",
    ]  # fmt: skip
    comparison.draw_comparison(runs, tmp_path / "plot.png")
    names = [name for name, _ in shown]
    assert any("b (constrained, short) known" in name for name in names) and any("a (greedy)" in n for n in names)
    shown.clear()
    comparison.draw_comparison(runs[:1], tmp_path / "plot.png")
    comparison.draw_evaluation(read_evaluation(runs[0].evaluation), tmp_path / "plot.png")
    assert shown and not any("greedy" in name for name, _ in shown)
    shown.clear()
    comparison.draw_evaluation(read_evaluation(runs[1].evaluation), tmp_path / "plot.png")
    assert shown[0][0] == "constrained, short: known"


def test_a_figure_that_is_missing_is_drawn_as_missing_and_none_as_0(tmp_path, monkeypatch):
    shown = bars_drawn(monkeypatch)
    found = read_evaluation(EXAMPLE / "evaluation.json")
    known = dataclasses.replace(found.sets["known"], stock_only=None, equal_fragments=0.0)
    evaluation = dataclasses.replace(found, sets={**found.sets, "known": known})
    comparison.draw_evaluation(evaluation, tmp_path / "plot.png")
    labels = dict(zip(comparison.SHARES, dict(shown)["known"], strict=True))
    assert labels["stock_only"] == "-" and labels["equal_fragments"] == "0%"


def test_the_rows_on_confidences_tell_what_is_had_for_nothing():
    """Three equal confidences give the figures in the rows' names; all held-out cases fall, as the row says."""
    cases = [case for path in EVALUATION_QUESTIONS for case in read_held_out(path)]
    thirds = {round(figures.brier_score((1, 1, 1), case.followed), 3) for case in cases}
    assert thirds == {0.667} and "thirds: 0.667" in comparison.NAMES["brier_score"]
    data = [[each.probability for each in case.answer.follow_ups] for case in cases]
    assert {figures.kendall_tau((1, 1, 1), theirs) for theirs in data} == {0}
    assert {figures.kendall_tau((3, 2, 1), theirs) for theirs in data} == {1}
    name = comparison.NAMES["confidence_rank_agreement"]
    assert "thirds: 0" in name and "all here do: 1" in name


@pytest.mark.parametrize(
    ("changes", "where"),
    [({}, "known"), ({"decoding": "constrained"}, "known (constrained)"), ({"short": True}, "known (greedy, short)")],
)
def test_a_card_tells_what_a_figure_is_and_how_it_was_asked_for(tmp_path, changes, where):
    run = evaluated(tmp_path / "run", **changes)
    found = {(on, metric): kind for on, kind, metric, _ in model_card._metrics(run, run.read())}
    assert found[f"evaluation questions, {where}", "valid"] == "accuracy"
    assert found[f"evaluation questions, {where}", "answer relevance"] == "cosine_similarity"
