"""Promise: every run logs its console with times; a failure's last lines are enough to know what to do."""

import re
import sys
import threading

import pytest
from records import finished_attempt
from scripts_at_work import finished, start

from conversation.errors import UserError, first_cause
from conversation.runs import console, publishing
from conversation.runs.folder import RunFolder

TIME = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d "


def test_each_stage_logs_its_command_and_what_it_printed_with_times(untouched):
    lines = RunFolder(untouched).console_log.read_text().splitlines()
    assert all(re.match(TIME, line) for line in lines)
    logged = [re.sub(f"^{TIME}", "", line) for line in lines]
    for words in ("$ train_conversation.py --run_dir", "held-out loss after step 12", "Trained 12 steps"):
        assert any(line.startswith(words) for line in logged), words
    assert any(line.startswith("$ merge_conversation_model.py") for line in logged)
    assert any(line.startswith("Merged: ") for line in logged)


def test_a_failed_tests_last_lines_say_which_and_what_to_do(trained, tmp_path):
    status, output = finished("test_conversation_model.py", "--run_dir", trained, output=tmp_path / "out")
    last = RunFolder(trained).console_log.read_text().splitlines()[-2:]
    assert status == 1
    assert "error: 3 of 3 structural tests failed: fresh topic, follow-up, another domain" in last[0]
    assert "hint: " in last[1] and "train longer" in last[1]
    assert last[0].split(" ", 2)[2] in output and last[1].split(" ", 2)[2] in output


def test_a_defect_of_ours_leaves_its_traceback_in_the_log(trained, tmp_path):
    fault = ("a_defect_in", "conversation.runs.folder", "find_damage")
    running = start("train_conversation.py", "--resume", "--run_dir", trained, output=tmp_path / "out", faults=(fault,))
    assert running.finish() == 1 and "Traceback" in running.output
    log = RunFolder(trained).console_log.read_text()
    assert "Traceback (most recent call last)" in log and log.splitlines()[-1].endswith("AssertionError: a defect")


@pytest.mark.parametrize(
    "place",
    [
        ("conversation.training.conversation_trainer", "backward_in_micro_batches"),
        ("conversation.training.trainer", "replace_folder"),
    ],
    ids=["step", "end"],
)
def test_an_unknown_error_of_a_library_in_the_training_keeps_its_traceback(place, flags, tmp_path):
    """A RuntimeError can be a full disk or exhausted memory, and is looked at. A driver's failure is neither."""
    fault = ("a_defect_in", *place, RuntimeError)
    run = RunFolder(tmp_path / "run")
    more = ["--run_dir", run.path, "--max_steps", "2"]
    running = start("train_conversation.py", *flags, *more, output=tmp_path / "out", faults=(fault,))
    assert running.finish(120) == 1
    for text in (running.output, run.console_log.read_text()):
        assert "Traceback (most recent call last)" in text and text.splitlines()[-1].endswith("RuntimeError: a defect")


def test_a_chain_of_causes_that_leads_back_into_itself_ends():
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    found = []
    search = threading.Thread(target=lambda: found.append(first_cause(second)), daemon=True)
    search.start()
    search.join(30)
    assert found in ([first], [second])


class Broken:
    """A terminal that was closed, or a disk that is full."""

    def write(self, data=None):
        raise OSError(5, "Input/output error")

    flush = write


def test_a_closed_terminal_does_not_stop_the_work(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    monkeypatch.setattr(sys, "stdout", Broken())
    with console.logged_console(run.console_log):
        print("a line", flush=True)
    assert run.console_log.read_text().endswith("a line\n")


def test_a_log_that_cannot_be_written_does_not_stop_the_work_or_hide_its_error(capsys):
    log = console._Log(Broken())
    log.line("lost")
    console._Tee(sys.stdout, log).write("shown\n")
    assert capsys.readouterr().out == "shown\n"


def test_what_is_no_utf8_is_logged_escaped(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(UserError), console.logged_console(run.console_log):
        raise UserError("bad name \udcff", "x")
    assert "error: bad name \\udcff" in run.console_log.read_text()


def test_an_interruption_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr("conversation.errors._hint_when_stopped", "--resume")  # as `run_main` of the training does
    run = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt), console.logged_console(run.console_log):
        raise KeyboardInterrupt
    last = run.console_log.read_text().splitlines()[-2:]
    assert "error: stopped by SIGINT" in last[0] and "--resume" in last[1]


def test_a_resumed_run_logs_the_error_that_ended_it_before_its_first_step(trained, tmp_path):
    status, output = finished(
        "train_conversation.py", "--resume", "--max_length", "9", "--run_dir", trained, output=tmp_path / "out"
    )
    log = RunFolder(trained).console_log.read_text()
    assert status == 2 and "tokens, more than 9" in output
    assert "tokens, more than 9" in log and "hint: nothing is cut" in log


def test_a_refusal_to_publish_is_in_the_log(tmp_path):
    run = finished_attempt(tmp_path, passed=False)
    with pytest.raises(UserError, match="has not passed its tests"):
        publishing.publish(run, tmp_path)
    assert "has not passed its tests: not published" in run.console_log.read_text()


def test_a_progress_bar_is_logged_now_and_then_so_that_a_killed_runs_log_says_how_far_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "BAR_SECONDS", -1)
    run = RunFolder(tmp_path)
    with console.logged_console(run.console_log):
        for step in (1, 2):
            sys.stdout.write(f"\rtraining: {step} of 9")
        lines = run.console_log.read_text().splitlines()
        print("\ndone")
    assert [re.sub(TIME, "", line) for line in lines[1:]] == ["training: 1 of 9", "training: 2 of 9"]
    assert run.console_log.read_text().endswith("done\n")
