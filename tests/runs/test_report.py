"""The report of a run: what a model or a broken file says stands in it as text."""

from dataclasses import replace

import pytest
from records import finished_attempt

from conversation.runs import comparison, publishing, report
from conversation.runs.loss_curve import new_figure
from conversation.runs.record import AnswersReport, AskedQuestion, MergeResult


def test_the_run_before_is_found_by_time_whatever_the_offset_of_its_clock(tmp_path):
    """Clocks went back: 02:30+02:00 is before 02:10+01:00, though the text is greater."""
    for started in ("2026-10-25T02:30:00+02:00", "2026-10-25T01:00:00+02:00"):
        attempt = finished_attempt(tmp_path)
        attempt.write(replace(attempt.read(), started=started))
        publishing.publish(attempt, tmp_path)
    attempt = finished_attempt(tmp_path)
    record = replace(attempt.read(), started="2026-10-25T02:10:00+01:00")
    name, before = report.previous_run(attempt, record)
    assert name == "2026-10-25" and before.started == "2026-10-25T02:30:00+02:00"


@pytest.mark.parametrize("broken", ["gguf/export.json", "evaluation.json", "structural_tests.json"])
def test_a_broken_file_of_one_stage_is_named_in_the_report_and_does_not_prevent_it(tmp_path, broken):
    run = finished_attempt(tmp_path)
    run.write(replace(run.read(), merge=MergeResult(3, 0.0, 1.0, 1, 1, {}, {}, "2026-01-02T04:00:00+00:00")))
    run.exported.mkdir()
    (run.path / broken).write_text('{"*model*": 1')
    report.write_report(run)
    assert f"Not shown: {report._plain(str(run.path / broken))} is broken" in run.report.read_text()


def test_no_text_of_a_model_becomes_a_link_an_image_or_emphasis_in_the_report():
    said = report._plain("a|b <i>\r\n2*3*4 ![x](http://y) `c` ~~d~~ _e_ &lt; run_dir \\[1]")
    assert said == (
        "a\\|b &lt;i> 2\\*3\\*4 !\\[x\\](http://y) \\`c\\` \\~\\~d\\~\\~ \\_e\\_ &amp;lt; run_dir \\\\\\[1\\]"
    )


def test_a_figure_that_was_not_measured_has_no_share_in_the_plot():
    axes = new_figure(4, 4).add_subplot()
    comparison._grouped_bars(axes, ["valid", "equal"], {"a": [0.5, None]}, "{:.0%}")
    assert [text.get_text() for text in axes.texts] == ["50%", "-"]


def test_a_bar_in_a_name_is_no_border_of_a_table():
    assert comparison._markdown(["", "a|b"], [["x", "c|d"]]).splitlines()[0] == "|   | a\\|b |"


def test_an_answer_with_backticks_stays_inside_its_fence(tmp_path):
    attempt = finished_attempt(tmp_path)
    output = "call:add_text{content:<escape>Write ```python\n# Heading\n``` in it.<escape>}"
    asked = AskedQuestion("fresh topic", "What's a monad?", (), False, "no", 5, (), False, None, None, output)
    attempt.write_tests(AnswersReport((asked,), ()))
    report.write_report(attempt)
    text = attempt.report.read_text()
    fenced = text.split("````\n")
    assert len(fenced) == 3 and "# Heading\n``` in it." in fenced[1]


def test_the_problem_of_a_failed_test_is_shown_as_it_is(tmp_path):
    attempt = finished_attempt(tmp_path)
    problem, warning = "expected '<escape>', found 'x'", "repeated follow-up: '<b>'"
    asked = AskedQuestion("fresh topic", "Why?", (), False, problem, 0, (warning,), False, None, None, "x")
    attempt.write_tests(AnswersReport((asked,), ()))
    report.write_report(attempt)
    text = attempt.report.read_text()
    assert "FAILED: expected '&lt;escape>', found 'x'" in text and "- warning: repeated follow-up: '&lt;b>'" in text
