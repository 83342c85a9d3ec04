"""Promise: a loss or gradient that is not finite, or a loss that explodes, stops the run; the last good step stays."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import easy_lines
from scripts_at_work import adapters, finished

from conversation.errors import UserError
from conversation.runs.folder import RunFolder
from conversation.training.checkpoints import CheckpointKeeper, newest_intact_checkpoint
from conversation.training.watch import EXPLOSION

TRAIN = "train_conversation.py"
QUESTIONS = {example.prompt.question for example in easy_lines()}


@pytest.mark.parametrize(("call", "what"), [(8, "loss"), (8, "gradient"), (1, "loss")])
def test_numbers_that_are_not_finite_stop_the_run_at_that_step_by_name(tmp_path, flags, untouched, call, what):
    run = RunFolder(tmp_path / "run")
    faults = (("bad_numbers_at", call, what),)
    status, output = finished(TRAIN, "--run_dir", run.path, *flags, output=tmp_path / "out", faults=faults)
    reported = re.search(
        rf"error: the {what} of step {call} is not finite; the examples of this step ask: (.*)", output
    )
    assert status == 1 and reported, output
    asked = re.findall(r"""(?:'([^']*)'|"([^"]*)")""", reported[1])
    assert 1 <= len(asked) <= 8 and {a or b for a, b in asked} <= QUESTIONS
    assert not run.final_lora.exists() and reported[0] in run.console_log.read_text()
    good, problems = newest_intact_checkpoint(run.checkpoints)
    if call == 1:
        assert good is None and "hint: a new run with a lower --learning_rate may help" in output
        return
    assert good.name == "checkpoint-6" and not problems and "the last good checkpoint is checkpoint-6" in output
    if what == "loss":  # the fault gone, the run is finished from there
        status, output = finished(TRAIN, "--run_dir", run.path, "--resume", output=tmp_path / "again")
        assert status == 0 and "Resuming from checkpoint-6" in output and adapters(run.path) == adapters(untouched)


@pytest.mark.parametrize("held_out", ["0", "0.2"])
def test_a_loss_that_explodes_stops_the_run_by_the_rule(tmp_path, flags, held_out):
    run = RunFolder(tmp_path / "run")
    more = ["--learning_rate", "1e-5", "--held_out_share", held_out]
    faults = (("losses_twice_as_large_from", 7),)
    status, output = finished(TRAIN, "--run_dir", run.path, *flags, *more, output=tmp_path / "out", faults=faults)
    reported = re.search(
        r"the loss explodes: ([\d.]+) in the window up to step 8, more than 1.5 times the ([\d.]+)", output
    )
    assert status == 1 and reported and EXPLOSION == 1.5, output
    assert float(reported[1]) > 1.5 * float(reported[2]) and "the examples of this step ask: " in output
    logged = run.read_metrics()
    start = next(e["eval_loss"] for e in logged if "eval_loss" in e) if held_out != "0" else logged[0]["loss"]
    assert start == pytest.approx(float(reported[2]), abs=0.01)
    assert "the last good checkpoint is checkpoint-6" in output and not run.final_lora.exists()


def test_a_checkpoint_with_adapters_that_are_not_finite_does_not_stay(tmp_path):
    model = torch.nn.Linear(2, 2)
    (tmp_path / "checkpoint-5").mkdir()
    state = SimpleNamespace(is_world_process_zero=True, global_step=5)
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    saving = CheckpointKeeper()
    saving.trainer = SimpleNamespace(
        bad_numbers=lambda problem: UserError(f"{problem}; the examples"),
        save_progress=lambda checkpoint: None,
    )
    saving.on_save(arguments, state, None, model)
    assert (tmp_path / "checkpoint-5" / "hashes.json").exists()
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match="the adapters after step 5 are not finite; the examples"):
        saving.on_save(arguments, state, None, model)
    assert not (tmp_path / "checkpoint-5").exists()
