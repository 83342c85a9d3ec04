"""Trackers: TensorBoard for real, with its file read back; what fails does no harm."""

import pytest
from conftest import easy_lines
from test_training import train
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from conversation.data.examples import to_jsonl
from conversation.errors import UserError
from conversation.runs.folder import RunFolder
from conversation.training.trackers import GuardedTracker, check_trackers


@pytest.fixture(scope="module")
def easy_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    path.write_bytes(to_jsonl(easy_lines()))
    return path


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path, tiny_folder, easy_data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path / "run")
    done = train(run.path, tiny_folder, easy_data, "--report_to", "tensorboard", "--max_steps", "4")
    assert done.returncode == 0, done.stderr
    assert run.read().config.report_to == "tensorboard"
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/learning_rate", "learning_rate")):
        logged = {entry["step"]: entry[name] for entry in run.read_metrics() if name in entry}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(logged), tag


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_and_nothing_is_left(tmp_path, tiny_folder, easy_data):
    done = train(tmp_path / "run", tiny_folder, easy_data, "--report_to", "tensorbord")
    assert done.returncode == 2 and "there is no tracker tensorbord" in done.stderr, done.stderr
    assert "tensorboard" in done.stderr and not (tmp_path / "run").exists()
    missing = next(name for name in ("wandb", "comet_ml", "clearml") if name not in available())
    with pytest.raises(UserError, match=f"--report_to {missing} cannot be used: .*install") as caught:
        check_trackers([missing])
    assert caught.value.exit_status == 2 and "pip install" in caught.value.hint


def available():
    return integration_utils.get_available_reporting_integrations()


class Failing(TrainerCallback):
    def __init__(self, event):
        self.event, self.calls = event, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.note("on_train_begin")

    def on_log(self, args, state, control, **kwargs):
        self.note("on_log")

    def note(self, event):
        self.calls.append(event)
        if event == self.event:
            raise ConnectionError("the server is gone\nsecond line")


def test_a_tracker_that_cannot_begin_stops_before_the_first_step():
    with pytest.raises(UserError, match=r"Failing cannot begin: the server is gone$") as caught:
        GuardedTracker(Failing("on_train_begin")).on_train_begin(None, None, None)
    assert caught.value.exit_status == 2


def test_a_tracker_that_fails_later_is_left_out_and_the_training_goes_on(capsys):
    tracker = Failing("on_log")
    guarded = GuardedTracker(tracker)
    for _ in range(3):
        guarded.on_train_begin(None, None, None)
        guarded.on_log(None, None, None, logs={})
    assert tracker.calls == ["on_train_begin", "on_log"]
    assert capsys.readouterr().out.count("Failing failed, the training goes on without it") == 1
