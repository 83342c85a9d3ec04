"""Promise: after a kill at any moment, --resume finishes the work, with the bytes of a run never killed."""

import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
from conftest import LEARNS
from scripts_at_work import (
    adapters,
    finished,
    home_with_base,
    leftovers,
    new_retrain,
    published,
    resumed_retrain,
    start,
    until,
)

from conversation.runs.folder import RunFolder

TRAIN, MERGE, TEST = "train_conversation.py", "merge_conversation_model.py", "test_conversation_model.py"

# Where a process waits, so that a kill or a signal comes in time, however late this one gets its turn.
STEP = ("held_before", "conversation.training.conversation_trainer", "backward_in_micro_batches")
HASHES = ("held_before", "conversation.training.checkpoints", "write_json")
MERGED = ("held_before", "conversation.models.merging", "replace_folder", 1)
SECOND_CASES = ("held_before", "conversation.answering.structural_tests", "run_cases", 2)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_training_killed_at_a_random_moment_and_resumed_gives_the_same_bytes(tmp_path, flags, untouched, seed):
    run = tmp_path / "run"
    first = start(TRAIN, "--run_dir", run, *flags, output=tmp_path / "first")
    until((run / "run.json").exists, first)
    time.sleep(random.Random(seed).uniform(0, 4))
    first.kill()
    status, output = finished(TRAIN, "--run_dir", run, "--resume", *flags, output=tmp_path / "out")
    assert status == 0, output
    assert "Resuming from checkpoint-" in output or "starting from the first step" in output or "done already" in output
    assert adapters(run) == adapters(untouched)
    assert RunFolder(run).read_metrics()[-1]["eval_loss"] == RunFolder(untouched).read_metrics()[-1]["eval_loss"]


def test_training_killed_before_its_first_step_has_a_record_and_goes_on_from_there(tmp_path, flags, untouched):
    run, held = tmp_path / "run", (*STEP, 1, tmp_path / "never")
    first = start(TRAIN, "--run_dir", run, *flags, output=tmp_path / "first", faults=(held,))
    assert until(run.exists, first)
    first.kill()
    assert RunFolder(run).read().config.max_steps == 12  # the record is born with the folder
    status, output = finished(TRAIN, "--run_dir", run, "--resume", output=tmp_path / "out")
    assert status == 0 and "starting from the first step" in output, output
    assert adapters(run) == adapters(untouched)


def test_training_killed_after_its_last_checkpoint_takes_no_step_more(tmp_path, flags):
    """Ten steps end in the middle of an epoch, with a learning rate that has not fallen to zero."""
    run = RunFolder(tmp_path / "run")
    more = ["--max_steps", "10", "--lr_scheduler_type", "constant"]
    status, output = finished(TRAIN, "--run_dir", run.path, *flags, *more, output=tmp_path / "first")
    assert status == 0, output
    before, record = adapters(run.path), run.read().training
    began = run.read()
    run.write(replace(began, starts=(replace(began.starts[0], git_commit="of-the-beginning"),)))
    shutil.rmtree(run.final_lora)
    status, output = finished(TRAIN, "--run_dir", run.path, "--resume", output=tmp_path / "out")
    assert status == 0 and "Resuming from checkpoint-10." in output, output
    starts = run.read().starts
    assert [start.after_step for start in starts] == [0, 10]
    report = run.report.read_text()
    assert f"| git commit | of-the-beginning, then {run.read().environment.git_commit} |" in report
    assert f"; resumed {starts[1].time} after step 10 |" in report
    again = run.read().training
    assert adapters(run.path) == before and again.steps == 10
    assert (again.last_window_loss, again.held_out_loss) == (record.last_window_loss, record.held_out_loss)


def test_a_report_that_a_kill_prevented_is_written_by_the_next_resume(trained, tmp_path):
    for script in (TRAIN, MERGE):
        RunFolder(trained).report.unlink()
        status, output = finished(script, "--run_dir", trained, "--resume", output=tmp_path / "out")
        assert status == 0 and "already" in output and RunFolder(trained).report.exists(), output


def test_training_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(tmp_path, flags, untouched):
    run, held = tmp_path / "run", (*HASHES, 2, tmp_path / "never")
    first = start(TRAIN, "--run_dir", run, *flags, output=tmp_path / "first", faults=(held,))
    assert until((run / "checkpoints" / "checkpoint-6").exists, first)
    first.kill()
    assert not (run / "checkpoints" / "checkpoint-6" / "hashes.json").exists(), "the kill came too late"
    status, output = finished(TRAIN, "--run_dir", run, "--resume", output=tmp_path / "out")
    assert status == 0 and "Resuming from checkpoint-3." in output and "checkpoint-6" in output
    assert adapters(run) == adapters(untouched)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_a_checkpoint_says_how_to_go_on_and_loses_nothing(tmp_path, flags, untouched, number, status):
    run, go = tmp_path / "run", tmp_path / "go"
    more = ["--save_steps", "50"]  # no checkpoint would come by itself
    first = start(TRAIN, "--run_dir", run, *flags, *more, output=tmp_path / "first", faults=((*STEP, 6, go),))
    until(lambda: (run / "metrics.jsonl").exists() and '"step": 4' in (run / "metrics.jsonl").read_text(), first)
    os.kill(first.pid, number)
    go.touch()
    assert first.finish() == status, first.output
    (saved,) = (run / "checkpoints").glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert f"error: stopped by {number.name} after step {step} of 12" in first.output
    assert "hint: " in first.output and "--resume" in first.output and "Traceback" not in first.output
    assert f"held-out loss after step {step}:" not in first.output, "whoever stops it had to wait"
    assert f"stopped by {number.name}" in (run / "console.log").read_text()
    done, output = finished(TRAIN, "--run_dir", run, "--resume", output=tmp_path / "out")
    assert done == 0 and f"Resuming from checkpoint-{step}." in output
    assert adapters(run) == adapters(untouched)


@pytest.mark.parametrize("step", [3, 4])
def test_a_resume_leaves_no_trace_in_the_metrics(tmp_path, flags, untouched, step):
    """Step 3 is the first of a window of two; step 4 is the last of an epoch, after which the held-out loss is due."""
    run, fault = RunFolder(tmp_path / "run"), (("a_signal_in_step", step),)
    status, output = finished(TRAIN, "--run_dir", run.path, *flags, output=tmp_path / "first", faults=fault)
    assert status == 143 and f"stopped by SIGTERM after step {step} of 12" in output
    status, output = finished(TRAIN, "--run_dir", run.path, "--resume", output=tmp_path / "out")
    assert status == 0, output

    def metrics(folder):
        return [{k: v for k, v in e.items() if "seconds" not in k} for e in RunFolder(folder).read_metrics()]

    assert [e["step"] for e in metrics(untouched) if "eval_loss" in e] == [0, 4, 8, 12]
    assert metrics(run.path) == metrics(untouched)


def test_a_closed_terminal_saves_a_checkpoint_too(tmp_path, flags):
    run, go = tmp_path / "run", tmp_path / "go"
    more = ["--save_steps", "50"]
    first = start(TRAIN, "--run_dir", run, *flags, *more, output=tmp_path / "first", faults=((*STEP, 4, go),))
    until(lambda: (run / "metrics.jsonl").exists() and '"step": 2' in (run / "metrics.jsonl").read_text(), first)
    os.kill(first.pid, signal.SIGHUP)
    go.touch()
    assert first.finish() == 129 and list((run / "checkpoints").glob("checkpoint-*/hashes.json"))


# --- merging and testing -------------------------------------------------------------------------------------------


def test_a_merge_that_is_killed_leaves_nothing_under_the_final_name_and_is_done_again(trained, tmp_path):
    run = RunFolder(trained)
    before = run.read().merge.files
    for path in run.merged_model.iterdir():
        path.unlink()
    run.merged_model.rmdir()
    part, held = run.path / f".{run.merged_model.name}.part", (*MERGED, tmp_path / "never")
    first = start(MERGE, "--run_dir", run.path, output=tmp_path / "first", faults=(held,))
    assert until((part / "config.json").exists, first)
    first.kill()
    assert part.exists() and not run.merged_model.exists()
    status, output = finished(MERGE, "--run_dir", run.path, "--resume", output=tmp_path / "out")
    assert status == 0 and "Merging, as " in output and not leftovers(run.path)
    after = run.read().merge.files
    assert after["model.safetensors"] == before["model.safetensors"]


def test_a_merge_stopped_by_sigterm_cleans_up_and_ends_with_143(trained, tmp_path):
    run = RunFolder(trained)
    part, held = run.path / f".{run.merged_model.name}.part", (*MERGED, tmp_path / "never")
    first = start(MERGE, "--run_dir", run.path, output=tmp_path / "first", faults=(held,))
    assert until((part / "config.json").exists, first)
    os.kill(first.pid, signal.SIGTERM)
    assert first.finish() == 143 and "error: stopped by SIGTERM" in first.output and "--resume" in first.output
    assert not leftovers(run.path) and run.merged_model.exists()


def test_testing_that_is_killed_is_done_again(trained, tmp_path):
    run = RunFolder(trained)
    held = (*SECOND_CASES, tmp_path / "never")
    first = start(TEST, "--run_dir", run.path, output=tmp_path / "first", faults=(held,))
    until(lambda: "structural tests passed" in first.output or "FAILED" in first.output, first)
    first.kill()
    assert not run.read().structural_tests and not run.structural_tests.exists()
    status, output = finished(TEST, "--run_dir", run.path, "--resume", output=tmp_path / "out")
    assert status == 1 and "0 of 3 structural tests passed" in output and run.structural_tests.exists()


# --- the whole of RETRAIN.sh ---------------------------------------------------------------------------------------


def undisturbed_adapters(home, tmp_path) -> str:
    """The final adapters of the same training, without a kill."""
    data = ["--base_model", home / "base", "--training_data", home / "easy.jsonl"]
    status, output = finished(TRAIN, *data, *LEARNS, "--run_dir", tmp_path / "alone", output=tmp_path / "alone.out")
    assert status == 0, output
    return adapters(tmp_path / "alone")


def kill_in_stage(home, retrain, stage: int, delay: float) -> bool:
    """SIGKILL `delay` seconds after a stage began, or when the next one begins; False when RETRAIN.sh ended before."""
    if not until(lambda: retrain.reached(stage), retrain, 400):
        return False
    deadline = time.monotonic() + delay
    until(lambda: time.monotonic() >= deadline or retrain.reached(stage + 1), retrain, delay + 60)
    killed = retrain.alive
    retrain.kill()
    return killed


@pytest.mark.slow
def test_retrain_stopped_by_sigterm_then_killed_while_merging_and_publishing_publishes_one_whole_run(
    tmp_path, tiny_folder, own_examples
):
    home = home_with_base(tmp_path / "home", tiny_folder, own_examples)
    runs = home / "training-runs" / "conversation"
    retrain = new_retrain(home)
    assert until(lambda: list(runs.glob("attempts/20*/checkpoints/checkpoint-20/hashes.json")), retrain, 300)
    retrain.process.send_signal(signal.SIGTERM)
    assert retrain.finish() == 143, retrain.output
    assert "stopped by SIGTERM after step" in retrain.output and "The attempt stays in" in retrain.output
    assert kill_in_stage(home, resumed_retrain(home), 3, 3)
    assert published(home) == [] and not (runs / "latest").exists()
    kill_in_stage(home, resumed_retrain(home), 6, 0.2)
    last = resumed_retrain(home)
    assert last.finish() == 0, last.output
    (run,) = published(home)
    assert os.readlink(runs / "latest") == run.name and not list((runs / "attempts").glob("20*"))
    assert "--base_model base" in (run / "report.md").read_text().split("Repeat it")[1]
    assert adapters(run) == undisturbed_adapters(home, tmp_path)


STAGES = ((2, 8.0), (2, 20.0), (2, 38.0), (3, 12.0), (4, 12.0), (5, 12.0), (6, 2.0))
"""The stages in which to kill, and how long they take, in seconds."""


@pytest.mark.parametrize("seed", [10, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(11, 17))])
def test_retrain_survives_seven_kills_at_random_moments(tmp_path, tiny_folder, own_examples, seed):
    """For each seed three kills in the training and one in each later stage; publishing may be over before its kill."""
    home = home_with_base(tmp_path / "home", tiny_folder, own_examples)
    runs = home / "training-runs" / "conversation"
    moments, kills = random.Random(seed), 0
    for stage, seconds in STAGES:
        begun = list(runs.glob("attempts/20*"))
        retrain = resumed_retrain(home) if begun else new_retrain(home)
        kills += kill_in_stage(home, retrain, stage, moments.uniform(0, seconds))
        for path in published(home):  # every run with a final name is complete
            assert path.name == os.readlink(runs / "latest") or (runs / "attempts" / ".publishing").exists()
    last = resumed_retrain(home)
    assert last.finish() == 0, last.output
    (run,) = published(home)
    assert os.readlink(runs / "latest") == run.name and not list((runs / "attempts").glob("20*"))
    assert adapters(run) == undisturbed_adapters(home, tmp_path)
    assert kills >= 6  # in the six slow ones 36 in all


def test_the_newest_checkpoints_are_kept_by_step_whatever_the_clock_says(trained, tmp_path):
    checkpoints = RunFolder(trained).checkpoints
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (12, 6, 9)]
    for path in checkpoints.glob("checkpoint-*"):  # as after a clock that was set back
        os.utime(path, (time.time() + 9999, time.time() + 9999))
    status, output = finished(TRAIN, "--run_dir", trained, "--resume", "--max_steps", "15", output=tmp_path / "out")
    assert status == 0, output
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (12, 15, 9)]
