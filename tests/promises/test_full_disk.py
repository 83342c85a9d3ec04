"""Promise: a full disk, a read-only folder, no permission: a clear error, nothing half-written under a final name."""

import errno
import os
import shutil
import subprocess

import pytest
from faults import small_disk, without_the_right_to_write_anywhere
from records import some_record
from scripts_at_work import adapters, finished, leftovers

from conversation.errors import UserError
from conversation.models.weights import adapter_bytes
from conversation.runs import files, lock, publishing
from conversation.runs.folder import RunFolder
from conversation.training.checkpoints import newest_intact_checkpoint

TRAIN, MERGE = "train_conversation.py", "merge_conversation_model.py"
NO_RIGHTS = (("without_the_right_to_write_anywhere",),)


def only_whole_checkpoints(run) -> bool:
    folders = [path for path in RunFolder(run).checkpoints.iterdir() if path.is_dir()]
    return all((path / "hashes.json").exists() for path in folders) and not leftovers(run)


@pytest.mark.parametrize("free", [0, 60_000, 300_000, 900_000])
def test_a_disk_that_fills_up_in_the_training_costs_nothing_but_the_time_since_the_last_checkpoint(
    tmp_path, flags, untouched, free
):
    with small_disk(tmp_path / "disk", 40_000_000) as disk:
        run = tmp_path / "disk" / "run"
        shutil.copytree(untouched, run)
        for name in ("checkpoint-9", "checkpoint-12", "final_lora"):  # as if stopped after step 6 of 12
            shutil.rmtree(RunFolder(run).checkpoints / name)
        if disk:
            disk.leave(free)
            faults = ()
        else:
            faults = (("no_file_larger_than", 20_000 + free // 4),)
        status, output = finished(TRAIN, "--run_dir", run, "--resume", output=tmp_path / "full", faults=faults)
        assert status == 1 and "error: cannot write " in output and "hint: " in output, output
        if disk:
            assert "No space left on device" in output and "free there" in output
            assert "more are needed: free disk space, then go on with --resume" in output or free == 60_000
        assert only_whole_checkpoints(run) and not RunFolder(run).final_lora.exists()
        assert newest_intact_checkpoint(RunFolder(run).checkpoints)[0] is not None
        if disk:
            disk.empty()
        status, output = finished(TRAIN, "--run_dir", run, "--resume", output=tmp_path / "again")
        assert status == 0 and adapters(run) == adapters(untouched), output


@pytest.mark.parametrize("share", [0.05, 0.6, 0.97])
def test_a_disk_that_fills_up_in_the_merge_leaves_the_old_model_or_none(trained, tmp_path, share):
    run = RunFolder(trained)
    before = files.file_hashes(run.merged_model)
    size = (run.merged_model / "model.safetensors").stat().st_size
    faults = (("no_file_larger_than", int(share * size)),)
    status, output = finished(MERGE, "--run_dir", run.path, output=tmp_path / "out", faults=faults)
    assert status == 1 and "error: cannot write " in output, output
    assert files.file_hashes(run.merged_model) == before and not leftovers(run.path)


def test_the_disk_space_that_is_asked_for_is_what_a_run_takes(untouched, tiny_folder):
    run = RunFolder(untouched)
    size = (run.final_lora / "adapter_model.safetensors").stat().st_size
    assert size * 0.9 < adapter_bytes(tiny_folder, 16) < size
    for checkpoint in run.checkpoints.glob("checkpoint-*"):
        taken = sum(path.stat().st_size for path in checkpoint.iterdir())
        assert taken < 3 * adapter_bytes(tiny_folder, 16) + 200_000


@pytest.mark.parametrize("what", ["an atomic write", "run.json", "the lock", "an attempt"])
def test_a_read_only_folder_is_reported_plainly(tmp_path, what):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write(some_record())
    work = {
        "an atomic write": lambda: files.write_atomically(run.path / "file", b"x"),
        "run.json": lambda: run.write(some_record(started="2027")),
        "the lock": lambda: lock.locked_folder(run.path).__enter__(),
        "an attempt": lambda: publishing.begin_attempt(run.path, some_record()),
    }[what]
    run.path.chmod(0o555)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        without_the_right_to_write_anywhere()
        try:
            work()
            os.write(writer, b"no error")
        except UserError as error:
            os.write(writer, f"{error} / {error.hint}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    reported = os.read(reader, 10_000).decode()
    run.path.chmod(0o755)
    assert "cannot" in reported and str(run.path) in reported and "Permission denied" in reported, reported
    assert run.read() == some_record() and os.listdir(run.path) == ["run.json"]


def test_training_into_a_folder_without_permission_is_refused_before_it_begins(tmp_path, flags):
    (tmp_path / "closed").mkdir(mode=0o555)
    status, output = finished(
        TRAIN, "--run_dir", tmp_path / "closed" / "run", *flags, output=tmp_path / "out", faults=NO_RIGHTS
    )
    assert status == 2 and "Permission denied" in output and "name another with --run_dir" in output
    assert os.listdir(tmp_path / "closed") == []


def test_a_read_only_disk_is_reported_plainly(tmp_path, flags):
    with small_disk(tmp_path / "disk", 40_000_000) as disk:
        if disk is None:
            (tmp_path / "disk").chmod(0o555)
            faults, words = NO_RIGHTS, "Permission denied"
        else:
            subprocess.run(["mount", "-o", "remount,ro", disk.folder], check=True)
            faults, words = (), os.strerror(errno.EROFS)
        status, output = finished(
            TRAIN, "--run_dir", tmp_path / "disk" / "run", *flags, output=tmp_path / "out", faults=faults
        )
        assert status == 2 and words in output and "--run_dir" in output


def test_a_run_is_not_begun_when_the_disk_has_no_space_for_it(tmp_path, flags):
    full = (("no_space_on_any_disk",),)
    run = tmp_path / "run"
    status, output = finished(TRAIN, *flags, "--run_dir", run, output=tmp_path / "out", faults=full)
    assert status == 2 and "training and the merged model after it needs" in output and "hint: free " in output
    assert not run.exists()


def test_what_the_next_retrain_removes_counts_as_free_disk_space(tmp_path):
    attempt = publishing.begin_attempt(tmp_path, some_record()).path
    before = publishing.bytes_of_attempts(tmp_path)
    (attempt / "weights").write_bytes(bytes(1000))
    (tmp_path / "2026-11-22").mkdir()
    (tmp_path / "2026-11-22" / "weights").write_bytes(bytes(1000))  # published: it stays
    assert publishing.bytes_of_attempts(tmp_path) == before + 1000
