"""A training of several processes ends as a whole: soon, with a sentence in each, and with its checkpoints."""

import functools
import shutil
import signal
import socket

import pytest
import torch
from conftest import easy_lines
from ports import port_for_later
from safetensors.torch import load_file, save_file
from scripts_at_work import adapters, start

from conversation.data.examples import to_jsonl
from conversation.runs.folder import RunFolder
from conversation.training.checkpoints import newest_intact_checkpoint
from conversation.training.peer_monitor import KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, PATIENCE

SECONDS_UNTIL_GONE = KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_PROBES
FEW = ["--gradient_accumulation_steps", "4"]


def run_both(folder, *flags, first=(), second=(), faults=((), ()), only=(0, 1)):
    """Run the processes of a training, each with its own run folder, as on machines without a common disk.

    Returns exit status and output of each. `first`, `second`: more flags for one; `only`: those that are started.
    """
    port, running = port_for_later(), []
    for rank in only:
        own = [*flags, *FEW, "--run_dir", folder / ("run" if rank == 0 else "not_used"), *((first, second)[rank])]
        several = (("process_of_several", rank, 2, port), *faults[rank])
        running.append(start("train_conversation.py", *own, output=folder / f"out{rank}", faults=several))
    ended = [(each.finish(), each.output) for each in running]
    assert not any("Traceback" in output for _, output in ended), ended
    assert not (folder / "not_used").exists()  # only the first works in the run folder
    return ended


@pytest.fixture
def two(tmp_path, flags):
    """Runs both processes of a tiny training in `tmp_path`."""
    return functools.partial(run_both, tmp_path, *flags)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, flags):
    """The run of two processes, both of which came through."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run_both(folder, *flags)
    assert [status for status, _ in ended] == [0, 0], ended
    return folder / "run"


@pytest.mark.parametrize("killed", [1, 0])
def test_a_process_killed_in_a_step_ends_the_other_by_name_and_the_run_goes_on_from_its_checkpoint(
    killed, two, undisturbed, tmp_path
):
    kill = (("a_signal_in_step", 8, signal.SIGKILL),)
    ended = two(faults=(kill, ()) if killed == 0 else ((), kill))
    left = ended[1 - killed]
    assert ended[killed][0] == -signal.SIGKILL and left[0] == 1, left[1]
    sentence = f"error: process {killed} of 2 (host {socket.gethostname()}) is lost: its process has ended\nhint: "
    assert sentence in left[1]
    run = RunFolder(tmp_path / "run")
    assert killed == 0 or sentence.splitlines()[0] in run.console_log.read_text()
    checkpoint, problems = newest_intact_checkpoint(run.checkpoints)
    assert checkpoint.name == "checkpoint-6" and problems == []

    assert [status for status, _ in two("--resume")] == [0, 0]
    assert adapters(run.path) == adapters(undisturbed)
    steps = [entry["step"] for entry in run.read_metrics() if "loss" in entry]
    assert steps == [2, 4, 6, 8, 10, 12] and run.read().training.steps == 12
    assert [status for status, _ in two("--resume")] == [0, 0]  # and nothing is left to do


def other_data(folder, base):
    (folder / "other.jsonl").write_bytes(to_jsonl(easy_lines()[:-1]))
    return ["--training_data", folder / "other.jsonl"]


def other_base(folder, base):
    shutil.copytree(base, folder / "other_base")
    weights = load_file(base / "model.safetensors")
    name = next(name for name, tensor in weights.items() if "norm" in name)
    save_file({**weights, name: weights[name] + torch.tensor(1e-3)}, folder / "other_base" / "model.safetensors")
    return ["--base_model", folder / "other_base"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda folder, base: ["--learning_rate", "0.5"], ["--learning_rate: the first has 0.003, this one 0.5"]),
        (other_data, ["the training data: the first has "]),
        (other_base, ["the base model's weights: the first has "]),
    ],
    ids=["settings", "data", "base"],
)
def test_a_process_that_would_train_something_else_is_named_by_both_and_nothing_is_made(
    other, words, two, tiny_folder, tmp_path
):
    for status, output in two(second=other(tmp_path, tiny_folder)):
        assert status == 2 and "error: the processes do not train the same, compared with process 0 of 2" in output
        assert all(f"  process 1 of 2 (host {socket.gethostname()}): {text}" in output for text in words), output
    assert not (tmp_path / "run").exists()


def test_other_code_is_refused_before_data_and_base_are_read(two, tmp_path):
    for status, output in two(faults=((), (("code_that_differs",),))):
        assert status == 2 and "error: the machines do not train with the same program:\n  the project's code" in output
        assert output.count("\n  ") == 1 and "hint: bring every machine to the same commit" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("only", [0, 1])
def test_a_process_that_does_not_come_is_not_waited_for_longer_than_a_minute(only, two, tmp_path):
    from conversation.training import rendezvous

    assert rendezvous.RENDEZVOUS_SECONDS < 60 and SECONDS_UNTIL_GONE + PATIENCE < 60
    short = (("rendezvous_within", 2),)
    ((status, output),) = two(only=[only], faults=(short, short))
    assert status == 2 and "error: the 2 processes of this training do not meet at 127.0.0.1:" in output, output
    assert "hint: start accelerate launch on every machine" in output and not (tmp_path / "run").exists()


def test_what_a_process_says_that_fails_alone_reaches_the_others(two, tmp_path):
    (status, output), (other, alone) = two(second=["--training_data", tmp_path / "missing.jsonl"])
    assert other == 2 and "missing.jsonl" in alone
    assert status == 1 and f"error: process 1 of 2 (host {socket.gethostname()}) has failed: " in output, output
    assert "missing.jsonl" in output and not (tmp_path / "run").exists()


def test_a_process_with_too_little_memory_for_the_base_leaves_no_run_folder(two, tmp_path):
    (status, output), (other, alone) = two(faults=((), (("too_little_memory",),)))
    assert other == 2 and "error: too little memory: weights held in" in alone, alone
    assert status == 1 and "has failed: too little memory" in output, output
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_resumed_is_refused_by_both(two, tmp_path):
    """Only the first process can see the run folder."""
    (status, output), (other, told) = two("--resume")
    assert status == 2 and "is not a run folder" in output
    assert other == 1 and "process 0 of 2" in told and "is not a run folder" in told, told
