"""Promise: the second process in a run folder is told who locks it and since when; a dead owner locks nothing."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess

import psutil
from scripts_at_work import Retrain, adapters, finished, home_with_base, start, until

from conversation.runs.files import file_hashes
from conversation.runs.lock import locked_folder

SINCE = r"since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"


def test_every_script_is_told_who_works_in_the_folder_and_leaves_it_as_it_is(trained, tmp_path):
    before = file_hashes(trained)
    with locked_folder(trained):
        for script, more in (
            ("train_conversation.py", ["--resume"]),
            ("merge_conversation_model.py", []),
            ("test_conversation_model.py", []),
            ("evaluate_conversation_model.py", []),
            ("export_conversation_model.py", ["--type", "f32"]),
        ):
            status, output = finished(script, "--run_dir", trained, *more, output=tmp_path / "out")
            assert status == 2 and re.search(rf"in use by process {os.getpid()} {SINCE}", output), output
            assert "hint: wait until it has finished, or stop it" in output
    after = file_hashes(trained)
    assert {**after, ".lock": ""} == {**before, ".lock": ""}


def test_two_trainings_that_begin_at_once_in_one_folder_are_one_training(tmp_path, flags, untouched):
    run = tmp_path / "run"
    both = [start("train_conversation.py", "--run_dir", run, *flags, output=tmp_path / f"{i}") for i in range(2)]
    statuses = sorted(one.finish() for one in both)
    assert statuses == [0, 2], [one.output for one in both]
    refused = next(one.output for one in both if "error: " in one.output)
    assert "in use by process" in refused or "already contains a run" in refused
    assert adapters(run) == adapters(untouched)


def test_a_dead_owners_lock_is_taken_over(tmp_path, flags):
    run = tmp_path / "run"
    first = start("train_conversation.py", "--run_dir", run, *flags, output=tmp_path / "first")
    until((run / "checkpoints").exists, first)
    assert f"process {first.pid} since" in (run / ".lock").read_text()
    first.kill()
    with locked_folder(run):
        assert f"process {os.getpid()} since" in (run / ".lock").read_text()


def training(retrain: Retrain) -> bool:
    """Whether the training is the stage at work. A stage may end between its listing and its reading."""
    for child in retrain.process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "train_conversation.py" in " ".join(child.cmdline()):
                return True
    return False


def test_a_second_retrain_is_told_who_locks_the_runs_also_when_only_a_stage_of_it_lives_on(
    tmp_path, tiny_folder, own_examples
):
    home = home_with_base(tmp_path / "home", tiny_folder, own_examples)
    first = Retrain(home, "--base_model", "base", "--training_data", "easy.jsonl", "--max_steps", "100000")
    lock = home / "training-runs" / "conversation" / "attempts" / ".lock"
    assert until(lambda: lock.exists() and f"process {first.process.pid} since" in lock.read_text(), first)
    assert until(lambda: first.process.children(), first)

    def second() -> str:
        done = subprocess.run(["./RETRAIN.sh"], cwd=home, capture_output=True, text=True)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr

    stages = first.process.children(recursive=True)
    try:
        assert re.search(rf"in use by process {first.process.pid} {SINCE}\n", second())
        assert until(lambda: training(first), first)  # this stage goes on until it is killed
        stages = first.process.children(recursive=True)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        refusal = second()
        assert f"process {first.process.pid} since" in refusal and "which has ended" in refusal
        assert any(str(stage.pid) in refusal.split("still at work")[1] for stage in stages)
    finally:
        for stage in stages:
            with contextlib.suppress(psutil.NoSuchProcess):
                stage.kill()
        psutil.wait_procs(stages, 10)
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free: a dead process locks nothing
