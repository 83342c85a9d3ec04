"""Promise: publishing is atomic; published runs stay; no reader sees half a folder under a final name."""

import errno
import functools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import LEARNS, PROJECT
from faults import die_at
from records import finished_attempt, some_record
from scripts_at_work import Retrain, finished, home_with_base, published

from conversation.errors import UserError
from conversation.runs import files, lock, publishing, report
from conversation.runs.folder import RunFolder, newest_run

CALLS = ("rename", "replace", "unlink", "symlink", "fsync", "rmtree", "mkdir")


def killed_at(number: int, work) -> bool:
    """Whether `work`, in a process of its own, was killed before its `number`-th change on disk (else it finished)."""

    def child():
        die_at(number, *CALLS)
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


@pytest.fixture(autouse=True)
def quick_reports(monkeypatch):
    """The report's text and curve are tested elsewhere."""
    monkeypatch.setattr(report, "draw_loss_curve", lambda *arguments: files.write_atomically(arguments[2], b"png"))


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_run_is_published_where_the_file_system_has_no_links(tmp_path, monkeypatch, capsys, number):
    attempt = finished_attempt(tmp_path)

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "symlink", refuse)
    run = publishing.publish(attempt, tmp_path)
    assert is_whole(run.path) and newest_run(tmp_path).path == run.path
    assert f"warning: no link latest: the file system of {tmp_path} has none" in capsys.readouterr().err
    assert not (tmp_path / "attempts" / publishing.PUBLISHING).exists()
    assert publishing.attempt_to_resume(tmp_path) is None
    assert f"the last published run is {tmp_path}/{run.path.name}" in capsys.readouterr().out


def is_whole(path) -> bool:
    return RunFolder(path).read().published is not None and RunFolder(path).report.exists()


def test_publishing_killed_before_any_change_on_disk_shows_the_old_run_or_the_new_one_and_is_finished(tmp_path):
    number, kills = 1, 0
    while True:
        root = tmp_path / str(number)
        old = publishing.publish(finished_attempt(root), root).path
        attempt = finished_attempt(root)
        killed = killed_at(number, lambda attempt=attempt, root=root: publishing.publish(attempt, root))
        latest = (root / "latest").resolve()
        assert is_whole(latest) and is_whole(old)
        new = root / f"{old.name}-2"
        assert not new.exists() or is_whole(new)
        publishing.finish_publishing(root)  # what the next retrain does first
        if left := publishing.newest_attempt(root):
            left.read_unpublished()  # its stages can go on
            assert (root / "latest").resolve() == old.resolve()
            publishing.publish(left, root)
        assert (root / "latest").resolve() == new.resolve() and is_whole(new)
        assert not [path for path in new.rglob("*.part")] and not (root / "attempts" / publishing.PUBLISHING).exists()
        if not killed:
            break
        number, kills = number + 1, kills + 1
    assert kills >= 10


def test_beginning_an_attempt_killed_at_any_change_leaves_whole_attempts_and_is_begun_again(tmp_path):
    number = 1
    while True:
        root = tmp_path / str(number)
        finished_attempt(root, passed=False)
        killed = killed_at(number, lambda root=root: publishing.begin_attempt(root, some_record()))
        if left := publishing.newest_attempt(root):
            left.read()  # raises unless the record is whole
        fresh = publishing.begin_attempt(root, some_record())
        assert [path.name for path in (root / "attempts").iterdir() if path.is_dir()] == [fresh.path.name]
        if not killed:
            break
        number += 1
    assert number > 5


def test_a_new_attempt_cleans_attempts_and_nothing_else(tmp_path):
    finished_attempt(tmp_path, passed=False)
    mine = [tmp_path / "attempts" / "notes", tmp_path / "2026-01-01", tmp_path / "my experiment"]
    for folder in mine:
        folder.mkdir()
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    link = tmp_path / "attempts" / "2026-01-01_00-00-00"
    link.symlink_to(outside)
    fresh = publishing.begin_attempt(tmp_path, some_record())
    assert all(folder.exists() for folder in [*mine, outside, link])
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir()) == [link.name, fresh.path.name, "notes"]


def test_an_attempt_in_use_is_not_cleaned(tmp_path):
    attempt = finished_attempt(tmp_path, passed=False)
    with lock.locked_folder(attempt.path), pytest.raises(UserError, match="in use by process"):
        publishing.begin_attempt(tmp_path, some_record())
    assert attempt.run_json.exists()


@pytest.mark.parametrize("broken", ["structural_tests.json", "metrics.jsonl"])
def test_a_run_with_a_broken_result_is_not_published(tmp_path, broken):
    old = publishing.publish(finished_attempt(tmp_path), tmp_path).path
    attempt = finished_attempt(tmp_path)
    attempt.metrics.write_text("")
    hashes = {path.name: files.sha256_file(path) for path in (attempt.structural_tests, attempt.metrics)}
    record = attempt.read()
    attempt.write(replace(record, structural_tests=replace(record.structural_tests, files=hashes)))
    (attempt.path / broken).write_bytes(b"{}")
    with pytest.raises(UserError, match=rf"not published: .*{broken} is broken") as caught:
        publishing.publish(attempt, tmp_path)
    assert caught.value.exit_status == 1 and "--resume" in caught.value.hint
    assert (tmp_path / "latest").resolve() == old.resolve() and attempt.path.exists()


def test_a_reader_never_finds_half_a_model_while_it_is_replaced(tmp_path):
    final, part, count = tmp_path / "model", tmp_path / ".model.part", 10
    stop, halves, seen = threading.Event(), [], 0

    def read():
        nonlocal seen
        while not stop.is_set():
            time.sleep(0.0002)
            try:
                descriptor = os.open(final, os.O_RDONLY | os.O_DIRECTORY)  # a reader that has entered the folder
            except FileNotFoundError:
                continue
            names = os.listdir(descriptor)
            try:
                same = os.path.samestat(os.fstat(descriptor), os.stat(final))
            except FileNotFoundError:  # replaced at this moment
                same = False
            os.close(descriptor)
            seen += 1
            if same and len(names) != count:
                halves.append(names)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        rounds, deadline = 0, time.monotonic() + 60
        while rounds < 40 or (seen <= 10 and time.monotonic() < deadline):  # the reader may seldom get its turn
            rounds += 1
            part.mkdir()
            for i in range(count):
                (part / str(i)).write_bytes(b"x")
            files.replace_folder(part, final)
    finally:
        stop.set()
        reader.join()
    assert seen > 10 and not halves and os.listdir(tmp_path) == ["model"]


# --- RETRAIN.sh ----------------------------------------------------------------------------------------------------


def spoil(home, file: str, line: str) -> None:
    """Let a stage of this home fail after this line."""
    path = home / file
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, line + "    FAULT\n"))


@pytest.mark.slow
def test_a_retrain_that_fails_at_any_stage_leaves_what_was_published_and_keeps_the_attempt_with_the_reason(
    tmp_path, tiny_folder, own_examples
):
    home = home_with_base(tmp_path / "home", tiny_folder, own_examples)
    root = home / "training-runs" / "conversation"
    data = ["--base_model", "base", "--training_data", "easy.jsonl"]
    assert Retrain(home, *data, *LEARNS).finish() == 0
    (run,) = published(home)
    before = files.file_hashes(run), os.readlink(root / "latest")
    spoiled = ("conversation/training/trainer.py", "merge_conversation_model.py")
    scripts = {name: (home / name).read_text() for name in spoiled}
    faults = {
        "Train": lambda: spoil(home, spoiled[0], "    torch.backends.cuda.matmul.allow_tf32 = False\n") or [],
        "Merge": lambda: spoil(home, spoiled[1], "\ndef main() -> int:\n") or [],
        "Structural tests": lambda: ["--learning_rate", "1e-9"],
    }
    for stage in ("Train", "Merge", "Structural tests"):
        retrain = Retrain(home, *data, "--max_steps", "6", "--logging_steps", "1", *faults[stage]())
        status = retrain.finish()
        assert status == 1, retrain.output
        for name, text in scripts.items():
            (home / name).write_text(text)
        assert (files.file_hashes(run), os.readlink(root / "latest")) == before
        (attempt,) = (root / "attempts").glob("20*")  # the one before was cleaned
        log = (attempt / "console.log").read_text().splitlines()
        assert stage in log[-1] and "ended with status 1" in log[-1] and len(log) > 3
        assert "Earlier published runs are untouched" in retrain.output


@pytest.mark.parametrize("flags", [["--run_dir", "x"], ["--check_data"], ["--attempt"], ["--json"]])
def test_retrain_refuses_flags_that_would_lead_its_stages_elsewhere(tmp_path, flags):
    done = subprocess.run(["./RETRAIN.sh", *flags], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and "is not for RETRAIN.sh" in done.stderr
    short = [sys.executable, "train_conversation.py", flags[0][:-2], *flags[1:]]
    assert "unrecognized arguments" in subprocess.run(short, cwd=PROJECT, capture_output=True, text=True).stderr


def test_a_broken_record_of_a_published_run_does_not_keep_the_next_one_from_being_published(tmp_path):
    old = publishing.publish(finished_attempt(tmp_path), tmp_path).path
    record = RunFolder(old).run_json
    record.write_text(record.read_text().replace('"c"', '"d"'))
    new = publishing.publish(finished_attempt(tmp_path), tmp_path).path
    assert (tmp_path / "latest").resolve() == new.resolve() and is_whole(new)


def test_a_folder_replaced_is_the_old_or_the_new_one_wherever_the_kill_falls(tmp_path):
    number, kills = 1, 0
    while True:
        folder = tmp_path / str(number)
        for name, content in (("model", "old"), (".model.part", "new")):
            (folder / name).mkdir(parents=True)
            (folder / name / "weights").write_text(content)
        work = functools.partial(files.replace_folder, folder / ".model.part", folder / "model")
        killed = killed_at(number, work)
        with lock.locked_folder(folder):  # whoever works here next
            assert (folder / "model" / "weights").read_text() in ("old", "new")
            assert sorted(os.listdir(folder)) == [".lock", "model"]
        kills += killed
        if not killed:
            break
        number += 1
    assert kills >= 4 and (folder / "model" / "weights").read_text() == "new"


def test_what_is_published_is_not_changed_by_a_script_run_by_hand(tmp_path):
    run = publishing.publish(finished_attempt(tmp_path), tmp_path).path
    before = files.file_hashes(run)
    for script, flags in (("train_conversation.py", ["--resume"]), ("merge_conversation_model.py", [])):
        command = [sys.executable, script, "--run_dir", str(run), *flags]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 2 and "is published: it can no longer change" in done.stderr, done.stderr
    after = {name: digest for name, digest in files.file_hashes(run).items() if name not in ("console.log", ".lock")}
    assert after == {name: digest for name, digest in before.items() if name not in ("console.log", ".lock")}


def test_testing_a_published_run_asks_its_model_and_changes_nothing(trained, tmp_path):
    run = RunFolder(trained)
    run.write(replace(run.read(), published="2026-01-02T04:05:06+00:00"))
    before = files.file_hashes(run.path)
    status, output = finished("test_conversation_model.py", "--run_dir", run.path, output=tmp_path / "out")
    assert status == 1 and "the test changes nothing in it" in output and "0 of 3 structural tests passed" in output
    assert files.file_hashes(run.path) == before


def test_the_example_in_the_repository_is_nobodys_newest_run(tmp_path):
    finished_attempt(tmp_path).path.rename(tmp_path / "example-2026-11-22")
    with pytest.raises(UserError, match="there is no run"):
        newest_run(tmp_path)
