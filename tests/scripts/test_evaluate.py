"""evaluate_conversation_model.py on a tiny run: what it leaves, what it compares, what it refuses."""

import json
import shutil
import sys

import pytest
from conftest import run_script
from scripts_at_work import finished

import evaluate_conversation_model as script
from conversation.errors import UserError
from conversation.runs.evaluation_record import read_evaluation
from conversation.runs.files import check_can_be_written
from conversation.runs.folder import RunFolder
from conversation.runs.report import write_report
from conversation_config import TRAINING_RUNS

EVALUATE = "evaluate_conversation_model.py"


@pytest.fixture(scope="module")
def evaluated(untouched, tmp_path_factory):
    """A copy of a tiny run, evaluated in short."""
    run = RunFolder(shutil.copytree(untouched, tmp_path_factory.mktemp("evaluated") / "run"))
    status, output = finished(EVALUATE, "--run_dir", run.path, "--short", output=run.path.parent / "out")
    assert status == 0, output
    return run


def test_it_leaves_its_figures_and_answers_a_plot_and_a_section_of_the_report(evaluated):
    evaluation = read_evaluation(evaluated.evaluation)
    assert evaluation.model == evaluated.path.name == "run"
    assert evaluation.short and len(evaluation.answers) == 26 and set(evaluation.sets) == {"known", "unseen", "all"}
    assert evaluation.sets["all"].questions == sum(evaluation.sets[name].questions for name in ("known", "unseen"))
    assert evaluation.training_losses.examples == 26 and evaluation.question_losses.fragments > 0
    assert sum(not answer.history for answer in evaluation.answers) == 13
    for answer in evaluation.answers:
        assert answer.output and (answer.texts is None) == (answer.problem is not None) and not answer.sampled
    assert evaluated.evaluation_plot.read_bytes().startswith(b"\x89PNG")
    report = evaluated.report.read_text()
    assert "## What the answers are worth" in report and "right answer likeliest of five" in report


def test_the_figures_are_those_of_the_answers_in_the_file(evaluated):
    value = json.loads(evaluated.evaluation.read_text())
    for name, figures in value["sets"].items():
        answers = [each for each in value["answers"] if name in (each["set_name"], "all")]
        assert figures["valid"] == pytest.approx(
            sum(each["problem"] is None for each in answers) / len(answers), abs=1e-4
        )
        right = sum(each["right_of_five"] for each in answers) / len(answers)
        assert figures["right_of_five"] == pytest.approx(right, abs=1e-4)
        assert sum(figures["breaks"].values()) == sum(each["problem"] is not None for each in answers)


def test_a_resumed_one_is_done_already_and_a_new_merge_makes_it_void(evaluated, tmp_path):
    status, output = finished(EVALUATE, "--run_dir", evaluated.path, "--short", "--resume", output=tmp_path / "again")
    assert status == 0 and "evaluated already" in output
    assert "evaluated already" in evaluated.console_log.read_text()
    copy = RunFolder(shutil.copytree(evaluated.path, tmp_path / "copy"))
    status, output = finished("merge_conversation_model.py", "--run_dir", copy.path, output=tmp_path / "merge")
    assert status == 0 and not copy.evaluation.exists(), output


def test_runs_are_compared_by_settings_losses_and_figures(evaluated, untouched, tmp_path):
    other = RunFolder(shutil.copytree(untouched, tmp_path / "other"))
    done = run_script(EVALUATE, "--compare", evaluated.path, other.path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout and "Not evaluated yet: other." in done.stdout
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_runs_with_the_same_name_in_different_folders_are_two(evaluated, tmp_path):
    other = RunFolder(shutil.copytree(evaluated.path, tmp_path / "other" / evaluated.path.name))
    done = run_script(EVALUATE, "--compare", evaluated.path, other.path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in (evaluated.path, "other/run"):  # as seen from the working folder
        assert f"| {path} " in done.stdout and f"| {path}, known " in done.stdout, done.stdout


def test_an_evaluation_of_a_model_that_is_trained_on_since_is_shown_nowhere(evaluated, tmp_path):
    copy = RunFolder(shutil.copytree(evaluated.path, tmp_path / "copy"))
    copy.write(copy.read().with_start(after_step=12))  # --resume for more steps
    write_report(copy)
    assert copy.evaluation.exists() and "What the answers are worth" not in copy.report.read_text()
    done = run_script(EVALUATE, "--compare", evaluated.path, copy.path, cwd=tmp_path)
    assert done.returncode == 0 and "Not evaluated yet: copy." in done.stdout, done.stderr


def test_a_broken_evaluation_prevents_no_report_and_is_made_again(evaluated, tmp_path):
    copy = RunFolder(shutil.copytree(evaluated.path, tmp_path / "copy"))
    copy.evaluation.write_text('{"<model>": 1')
    status, output = finished(
        "merge_conversation_model.py", "--run_dir", copy.path, "--resume", output=tmp_path / "out"
    )
    assert status == 0 and "merged and verified already" in output, output
    section = copy.report.read_text().split("## What the answers are worth")[1]
    assert "Not shown: " in section and "evaluation.json" in section
    flags = ["--run_dir", copy.path, "--short", "--resume"]
    status, output = finished(EVALUATE, *flags, output=tmp_path / "again")
    assert status == 0 and f"Evaluating, as {copy.evaluation} is broken" in output, output
    assert read_evaluation(copy.evaluation).short and "Not shown" not in copy.report.read_text()


def refused(monkeypatch, *flags) -> str:
    """Why the script does not begin with these flags. It fails when a model is loaded."""
    monkeypatch.setattr(script, "evaluate", lambda *given: pytest.fail("the work began"))
    monkeypatch.setattr("sys.argv", [EVALUATE, *map(str, flags)])
    with pytest.raises(UserError) as caught:
        script.main()
    assert caught.value.exit_status == 2 and caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("flags", [["--model", "model"], ["--compare", "run"]])
@pytest.mark.parametrize("name", [".", "", "folder", "missing/x.json", "..", "file/x.json", "n" * 250, "/dev/null"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, flags, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert " cannot be written: " in refused(monkeypatch, *flags, "--output", name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--run_dir", "run", "--output", "x.json"], "--output"),
        (["--output", "x.json"], "--output"),
        (["--model", "model", "--resume"], "--resume"),
        (["--compare", "run", "--resume"], "--resume"),
        (["--compare", "run", "--short"], "--short"),
        (["--compare", "run", "--decoding", "greedy"], "--decoding"),
        (["--compare", "run", "--device", "cpu"], "--device"),
    ],
)
def test_a_flag_without_effect_is_refused(monkeypatch, flags, name):
    assert refused(monkeypatch, *flags).startswith(f"{name} does not go with ")


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path):
    path = tmp_path / "x.json"
    check_can_be_written(path)
    assert not list(tmp_path.iterdir())
    path.write_text("old")
    check_can_be_written(path)
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"


def test_the_figures_are_shown_though_their_file_cannot_be_written(tmp_path, monkeypatch, capsys):
    evaluation = read_evaluation(TRAINING_RUNS / "example-2026-11-27-demo" / "evaluation.json")
    monkeypatch.setattr(sys, "argv", [EVALUATE, "--model", str(tmp_path), "--output", str(tmp_path / "x.json")])
    monkeypatch.setattr(script, "evaluate", lambda *_: evaluation)

    def full(*_):
        raise UserError("cannot write x.json: No space left on device")

    monkeypatch.setattr(script, "write_evaluation", full)
    with pytest.raises(UserError, match="No space left"):
        script.main()
    assert "right answer likeliest of five" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_refused_in_one_sentence(untouched, tmp_path):
    copy = RunFolder(shutil.copytree(untouched, tmp_path / "run"))
    (copy.merged_model / "model.safetensors").unlink()
    for flags in (["--run_dir", copy.path], ["--run_dir", tmp_path], ["--model", tmp_path], ["--compare", tmp_path]):
        done = run_script(EVALUATE, *flags, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
    copy.evaluation.write_text("{}")
    done = run_script(EVALUATE, "--compare", copy.path, cwd=tmp_path)
    assert done.returncode == 2 and "evaluation.json is broken" in done.stderr
