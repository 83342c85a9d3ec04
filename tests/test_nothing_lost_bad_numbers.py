"""Promise: a loss or gradient that is not finite, or a loss that explodes, stops the run; the last good step stays."""

import re

import pytest
from conftest import easy_lines
from faults import adapters, easy_data, finished, flags, untouched

from conversation.runs import RunFolder
from conversation.training import EXPLOSION, newest_intact_checkpoint

__all__ = ["easy_data", "flags", "untouched"]  # fixtures
TRAIN = "train_conversation.py"
QUESTIONS = {example.prompt.question for example in easy_lines()}


@pytest.mark.parametrize(("call", "what"), [(8, "loss"), (8, "gradient"), (1, "loss")])
def test_numbers_that_are_not_finite_stop_the_run_at_that_step_by_name(tmp_path, flags, untouched, call, what):
    run = RunFolder(tmp_path / "run")
    faults = (("bad_numbers_at", call, what),)
    status, output = finished(TRAIN, "--run_dir", run.path, *flags, output=tmp_path / "out", faults=faults)
    said = re.search(rf"error: the {what} of step {call} is not finite; the examples of this step ask: (.*)", output)
    assert status == 1 and said, output
    asked = re.findall(r"""(?:'([^']*)'|"([^"]*)")""", said[1])
    assert len(asked) == 8 and {a or b for a, b in asked} <= QUESTIONS
    assert not run.final_lora.exists() and said[0] in run.console_log.read_text()
    good, problems = newest_intact_checkpoint(run.checkpoints)
    if call == 1:
        assert good is None and "hint: a lower --learning_rate may help" in output
        return
    assert good.name == "checkpoint-6" and not problems and "the last good checkpoint is checkpoint-6" in output
    if what == "loss":  # the fault gone, the run is finished from there
        status, output = finished(TRAIN, "--run_dir", run.path, "--resume", output=tmp_path / "again")
        assert status == 0 and "Resuming from checkpoint-6" in output and adapters(run.path) == adapters(untouched)


@pytest.mark.parametrize("held_out", ["0", "0.2"])
def test_a_loss_that_explodes_stops_the_run_by_the_rule(tmp_path, flags, held_out):
    run = RunFolder(tmp_path / "run")
    more = ["--learning_rate", "3", "--warmup_steps", "4", "--held_out_share", held_out, "--save_steps", "1"]
    status, output = finished(TRAIN, "--run_dir", run.path, *flags, *more, output=tmp_path / "out")
    said = re.search(
        r"the loss explodes: ([\d.]+) in the window up to step (\d+), more than 1.5 times the ([\d.]+)", output
    )
    assert status == 1 and said and EXPLOSION == 1.5, output
    assert float(said[1]) > 1.5 * float(said[3]) and "the examples of this step ask: " in output
    logged = run.read_metrics()
    start = next(e["eval_loss"] for e in logged if "eval_loss" in e) if held_out != "0" else logged[0]["loss"]
    assert start == pytest.approx(float(said[3]), abs=0.01)
    assert "the last good checkpoint is checkpoint-" in output and not run.final_lora.exists()


def test_adapters_that_are_not_finite_are_never_a_checkpoint(tmp_path, flags):
    run = RunFolder(tmp_path / "run")
    more = ["--learning_rate", "1e39", "--warmup_steps", "0", "--save_steps", "1"]
    status, output = finished(TRAIN, "--run_dir", run.path, *flags, *more, output=tmp_path / "out")
    assert status == 1 and "not finite" in output and "learning_rate" in output
    assert newest_intact_checkpoint(run.checkpoints)[0] is None
