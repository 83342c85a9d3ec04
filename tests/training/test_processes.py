"""Several processes that train one run: together they do what one does, and the first decides for all."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import PROJECT, make_home
from records import some_record
from safetensors.torch import load_file
from test_training import FLAGS, ONE_THREAD, train

from conversation.errors import UserError
from conversation.runs.files import file_hashes, write_json
from conversation.runs.folder import RunFolder
from conversation.training import preparation, processes, rendezvous, trainer
from conversation.training.batches import OptimizerStepBatches
from conversation.training.checkpoints import CHECKPOINT_HASHES, newest_intact_checkpoint
from conversation.training.rendezvous import OPEN_PORTS
from train_conversation import begin


@contextlib.contextmanager
def two_processes(base, data, run_dir, *flags, project=PROJECT):
    """What accelerate launch does for several devices; for several CPU processes it would want MPI."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", project / "train_conversation.py"]
    launch += ["--base_model", base, "--training_data", data, *FLAGS, *(["--run_dir", run_dir] if run_dir else [])]
    launch += flags
    launcher = subprocess.Popen(
        [sys.executable, *map(str, launch)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD, "ACCELERATE_USE_CPU": "true"},
    )
    try:
        yield launcher
    finally:  # processes that wait for each other would be waited for
        for process in (*psutil.Process(launcher.pid).children(), launcher) if launcher.poll() is None else ():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended since it was listed
                process.kill()
        launcher.communicate()


def test_two_processes_train_what_one_trains(tmp_path, tiny_folder, easy_data):
    plain = ["--lora_dropout", "0", "--logging_steps", "1"]
    whole = train(tmp_path / "one", tiny_folder, easy_data, *plain)
    halves = ["--gradient_accumulation_steps", "4", *plain]
    with two_processes(tiny_folder, easy_data, tmp_path / "run", *halves) as launcher:
        _, errors = launcher.communicate(timeout=900)
    assert whole.returncode == 0 and launcher.returncode == 0, errors

    one = load_file(tmp_path / "one" / "checkpoints" / "final_lora" / "adapter_model.safetensors")
    two = load_file(tmp_path / "run" / "checkpoints" / "final_lora" / "adapter_model.safetensors")
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-3, atol=2e-5), name
    losses = [RunFolder(tmp_path / name).read().training.held_out_loss for name in ("one", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    steps = [[e for e in RunFolder(tmp_path / name).read_metrics() if "loss" in e] for name in ("one", "run")]
    for figure in ("loss", "grad_norm"):  # AdamW would forgive a gradient that is twice as long
        one, two = ([entry[figure] for entry in entries] for entries in steps)
        assert len(one) == 8 and one == pytest.approx(two, rel=1e-3), figure


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path, tiny_folder, easy_data):
    run = RunFolder(tmp_path / "run")
    more = ["--max_steps", "2000", "--save_steps", "1000", "--gradient_accumulation_steps", "4"]
    with two_processes(tiny_folder, easy_data, run.path, *more) as launcher:
        deadline = time.monotonic() + 600
        while not any("loss" in entry for entry in (run.read_metrics() if run.metrics.exists() else [])):
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        workers = psutil.Process(launcher.pid).children()
        (second,) = (worker for worker in workers if worker.environ().get("RANK") == "1")
        second.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=600)
    assert launcher.returncode != 0 and "stopped by SIGTERM after step" in errors, errors
    checkpoint, problems = newest_intact_checkpoint(run.checkpoints)
    assert checkpoint and not problems and f"after step {checkpoint.name.removeprefix('checkpoint-')} of" in errors


def test_a_step_holds_the_same_examples_however_many_processes_share_it():
    one = OptimizerStepBatches(21, per_process=8, seed=1)
    parts = [OptimizerStepBatches(21, per_process=4, seed=1, process=i, processes=2) for i in range(2)]
    for epoch in range(3):
        for batches in (one, *parts):
            batches.set_epoch(epoch)
        shared = [sorted(a + b) for a, b in zip(*parts, strict=True)]
        assert [sorted(batch) for batch in one] == shared
        assert sorted(i for step in shared for i in step) == list(range(21))
    one.set_epoch(0)
    first = list(one)
    one.set_epoch(1)
    assert list(one) != first and len(one) == 3


def test_the_first_of_several_processes_chooses_the_run_folder_for_all(tmp_path, tiny_folder, own_examples):
    """Midnight passes between the two: each would choose a folder of its own."""
    home = make_home(tmp_path / "home", own_examples)
    folder = home / "conversation" / "runs" / "folder.py"
    today, shifted = "datetime.date.today()", "(datetime.date(2026, 1, 1 + int(os.environ['RANK'])))"
    assert folder.read_text().count(today) == 1
    folder.write_text(folder.read_text().replace(today, shifted))
    with two_processes(tiny_folder, home / "easy.jsonl", None, "--max_steps", "2", project=home) as launcher:
        _, errors = launcher.communicate(timeout=900)
    assert launcher.returncode == 0, errors
    (run,) = (home / "training-runs" / "conversation").glob("20*")
    assert run.name == "2026-01-01" and RunFolder(run).read().training.steps == 2


class Others:
    """A monitor of the other processes that is asked for the reason of an error."""

    def __init__(self, *reasons):
        self.reasons = list(reasons)

    def wait_for_reason(self, seconds):
        return self.reasons.pop(0)


def what_comes_out_of(error, others, monkeypatch):
    """What comes of an error in the blocks of the first process, one inside the other."""
    monkeypatch.setattr(processes, "_group", SimpleNamespace(monitor=others))
    with pytest.raises(BaseException) as caught:
        with processes.peer_loss_as_user_error(), processes.peer_loss_as_user_error():
            raise error
    return caught.value


@pytest.mark.parametrize("number", [(), (signal.SIGINT,), (signal.SIGUSR1,)])
def test_what_a_user_stops_does_not_become_the_failure_of_another_process(number, monkeypatch):
    """Ctrl-C reaches all processes. The others end at once, and say so."""
    others = Others("process 1 of 2 has failed: stopped by SIGINT")
    assert type(what_comes_out_of(KeyboardInterrupt(*number), others, monkeypatch)) is KeyboardInterrupt
    assert len(others.reasons) == 1


def test_an_error_asks_once_for_a_lost_process(monkeypatch):
    """A defect that all have is not told as that of another, which ended while this one asked."""
    others = Others("", "process 1 of 2 has failed: a defect, RuntimeError")
    assert type(what_comes_out_of(RuntimeError("a defect"), others, monkeypatch)) is RuntimeError
    others = Others("process 1 of 2 is lost: its process has ended")
    for error in (RuntimeError("Connection closed by peer"), KeyboardInterrupt(signal.SIGTERM)):
        found = what_comes_out_of(error, Others(*others.reasons), monkeypatch)
        assert isinstance(found, UserError) and str(found) == others.reasons[0] and found.exit_status == 1


def test_a_run_that_another_process_cannot_train_makes_no_folder(tmp_path, monkeypatch):
    def others_fail():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(processes, "barrier", others_fail)
    monkeypatch.setattr(preparation, "check_space_for", lambda prepared, folder, to_be_freed: None)
    monkeypatch.setattr(trainer, "build_trainable_model", lambda folder, config: None)
    prepared = SimpleNamespace(record=some_record, base_folder=None, config=None)
    with pytest.raises(RuntimeError, match="Connection closed"):
        begin(SimpleNamespace(run_dir=tmp_path / "run", attempt=False), prepared)
    assert list(tmp_path.iterdir()) == []


class StoreThatGoes:
    """The store of a first process that ends after all have met."""

    def set(self, name, value):
        pass

    def check(self, names):
        return True

    def add(self, name, number):
        return 2

    def get(self, name):
        if name.startswith("process"):
            return b"{}"
        raise torch.distributed.DistNetworkError("Connection reset by peer\nof the store")


def test_a_first_process_that_ends_while_the_others_connect_to_it_is_told_in_a_sentence(monkeypatch):
    place = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, timeout: iter([(StoreThatGoes(), 1, 2)]))
    with pytest.raises(UserError, match=r"the 2 processes of this training do not meet .*: Connection reset by peer$"):
        rendezvous.rendezvous()


def test_a_process_that_is_lost_while_all_are_joined_is_named_without_a_hint_on_ports(monkeypatch):
    others = Others("process 1 of 2 is lost: its process has ended", "")
    monkeypatch.setattr(processes, "_group", SimpleNamespace(monitor=others, rank=0, names=["process 0 of 2"]))

    class NotJoined:
        _shared_state = None

        def __init__(self, **options):
            raise RuntimeError("Connection closed by peer\nin gloo")

    monkeypatch.setattr("accelerate.PartialState", NotJoined)
    for status, sentence in ((1, others.reasons[0]), (2, "process 0 of 2 is not joined with the others: Connection")):
        with pytest.raises(UserError, match=f"^{sentence}") as caught:
            processes._connect()
        assert caught.value.exit_status == status and (OPEN_PORTS == caught.value.hint) == (status == 2)


CHOOSE = """
import os, pathlib, sys
from conversation.training import checkpoints, processes
folder = pathlib.Path(sys.argv[1], os.environ["RANK"])  # each has its own
with processes.together():
    chosen = checkpoints.choose_checkpoint(folder)
    checkpoints.drop_newer_checkpoints(folder, chosen)
    processes.barrier()  # who leaves early would take its last messages with it
left = {str(path.relative_to(folder)) for path in folder.glob("*/*")}
(folder / "seen").write_text(f"{chosen.name} of {sorted(left)}, {(chosen / 'weights').read_text()}")
"""


def test_the_first_of_several_processes_chooses_the_checkpoint_for_all_and_sends_it_to_them(tmp_path):
    folder = tmp_path / "0"
    (tmp_path / "1").mkdir()
    for step in (3, 6):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "weights").write_bytes(b"x")
    write_json(folder / "checkpoint-3" / CHECKPOINT_HASHES, file_hashes(folder / "checkpoint-3"))
    (tmp_path / "choose.py").write_text(CHOOSE)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "choose.py", tmp_path]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(PROJECT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *map(str, launch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = "checkpoint-3 of ['checkpoint-3/hashes.json', 'checkpoint-3/weights'], x"
    assert [(tmp_path / rank / "seen").read_text() for rank in "01"] == [seen] * 2
