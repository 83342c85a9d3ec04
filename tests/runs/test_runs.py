"""The run folder: whole files, names that do not collide, publishing, locks, the logged console."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT
from records import finished_attempt, some_record

from conversation.errors import UserError
from conversation.runs import console, files, folder, lock, machine, publishing
from conversation.runs.folder import RunFolder
from conversation.runs.loss_curve import draw_loss_curve
from conversation.runs.record import RunRecord, _hash

LOCK = "import sys; from pathlib import Path; from conversation.runs.lock import locked_folder\n"
LOCK += "with locked_folder(Path(sys.argv[1])): "


def test_a_plot_has_the_settings_of_matplotlib_whatever_the_user_has(tmp_path):
    import matplotlib

    metrics = [{"epoch": 0.0, "eval_loss": 2.0}, {"epoch": 1.0, "loss": 1.5}, {"epoch": 1.0, "eval_loss": 1.0}]
    for settings in ({}, {"text.usetex": True, "font.family": "nonsense", "savefig.transparent": True}):
        with matplotlib.rc_context(settings):
            draw_loss_curve(metrics, "completion", tmp_path / f"{len(settings)}.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "3.png").read_bytes()


def test_a_failed_write_leaves_the_old_content_and_no_leftover(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left") as caught:
        files.write_atomically(path, b"new")
    assert caught.value.exit_status == 1 and "free there" in caught.value.hint
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


# --- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff", b'{"a": NaN}', b"{}"])
def test_a_broken_record_is_named(tmp_path, content):
    run = RunFolder(tmp_path)
    run.run_json.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json is broken"):
        run.read()


def test_a_record_comes_back_from_its_file_and_names_a_key_that_does_not_fit(tmp_path):
    run, record = RunFolder(tmp_path), some_record()
    run.write(record)
    assert run.read() == record
    value = files.read_json(run.run_json)
    del value["base_model"]["name"], value["sha256"]
    with pytest.raises(ValueError, match="SHA-256"):
        RunRecord.from_json(value)
    with pytest.raises(ValueError, match=r"base_model\.name"):
        RunRecord.from_json({**value, "sha256": _hash(value)})


def test_a_folder_and_its_record_are_born_together(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(os, "rename", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.create(some_record())
    assert not run.path.exists()
    monkeypatch.undo()
    run.create(some_record())
    assert run.read() == some_record()
    with pytest.raises(UserError, match="already contains a run"):
        run.create(some_record())


def test_a_new_run_that_is_refused_leaves_no_folder_and_any_other_stays(tmp_path):
    for name, new, status, stays in (("a", True, 2, False), ("b", True, 1, True), ("c", False, 2, True)):
        run = RunFolder(tmp_path / name)
        run.create(some_record())
        with pytest.raises(UserError), run.at_work(new=new):
            raise UserError("no", exit_status=status)
        assert run.path.exists() == stays


def test_of_a_refused_run_in_a_folder_of_the_users_the_folder_stays(tmp_path):
    run = RunFolder(tmp_path / "mine")
    run.path.mkdir()
    run.create(some_record())
    with pytest.raises(UserError), run.at_work(new=True):
        (run.path / "checkpoints").mkdir()
        raise UserError("no")
    assert list(run.path.iterdir()) == []


def test_what_cannot_be_removed_of_a_refused_run_does_not_hide_why_it_was_refused(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    run.create(some_record())
    remove = shutil.rmtree

    def on_nfs(path, ignore_errors=False):  # where a file that is removed while it is open leaves another
        assert not [link for link in Path("/proc/self/fd").iterdir() if str(path) in os.path.realpath(link)]
        remove(path)
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", on_nfs)
    with pytest.raises(UserError, match="the reason"), run.at_work(new=True):
        raise UserError("the reason")
    assert not run.path.exists()


def test_a_run_in_use_is_not_removed_by_a_second_one_that_is_refused(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(some_record())
    with run.at_work(), pytest.raises(UserError, match="in use"), run.at_work(new=True):
        pass
    assert run.run_json.exists()


def test_a_changed_missing_or_truncated_file_is_found(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 1000)
    (tmp_path / "b").write_bytes(b"b")
    recorded = files.file_hashes(tmp_path)
    assert files.find_damage(tmp_path, recorded) is None
    (tmp_path / "a").write_bytes(b"a" * 999 + b"b")
    assert "a is broken" in files.find_damage(tmp_path, recorded)
    (tmp_path / "a").unlink()
    assert "a is missing" in files.find_damage(tmp_path, recorded)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_folder_has_the_modes_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        part = tmp_path / ".model.part"
        (part / "inner").mkdir(parents=True, mode=0o700)
        for name, mode in (("weights", 0o600), ("inner/copy", 0o444)):
            (part / name).write_bytes(b"x")
            (part / name).chmod(mode)
        files.replace_folder(part, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model", *tmp_path.rglob("model/**/*"))}
    file, directory = 0o666 & ~umask, 0o777 & ~umask
    assert modes == {"model": directory, "inner": directory, "weights": file, "copy": file}


def git(folder, *arguments):
    names = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_the_projects_own_or_none(tmp_path, monkeypatch):
    outer, project = tmp_path / "outer", tmp_path / "outer" / "project"
    project.mkdir(parents=True)
    git(outer, "init", "-q")
    git(outer, "commit", "-q", "--allow-empty", "-m", "of the outer one")
    monkeypatch.setattr(machine, "PROJECT", project)
    assert machine._git_commit() is None  # unpacked without .git inside another repository
    git(project, "init", "-q")
    git(project, "commit", "-q", "--allow-empty", "-m", "of the project")
    own = git(project, "rev-parse", "HEAD")
    assert machine._git_commit() == own != git(outer, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(outer))
    assert machine._git_commit() == own


# --- names, publishing -----------------------------------------------------------------------------------------------


def test_a_second_run_of_a_day_gets_its_own_folder(tmp_path):
    first = folder.new_run_folder(tmp_path)
    first.path.mkdir()
    assert folder.new_run_folder(tmp_path).path.name == f"{first.path.name}-2"


def test_publishing_names_the_run_and_points_latest_at_it(tmp_path):
    first = publishing.publish(finished_attempt(tmp_path), tmp_path)
    second = publishing.publish(finished_attempt(tmp_path), tmp_path)
    assert (first.path.name, second.path.name) == ("2026-01-02", "2026-01-02-2")
    assert (tmp_path / "latest").resolve() == second.path.resolve()
    assert "```\n./RETRAIN.sh\n```" in second.report.read_text()


def test_a_run_that_failed_its_tests_is_not_published(tmp_path):
    published = publishing.publish(finished_attempt(tmp_path), tmp_path)
    attempt = finished_attempt(tmp_path, passed=False)
    with pytest.raises(UserError, match="has not passed its tests"):
        publishing.publish(attempt, tmp_path)
    assert (tmp_path / "latest").resolve() == published.path.resolve()
    assert attempt.run_json.exists()


def test_latest_is_corrected_after_a_stop_between_naming_and_pointing_and_only_then(tmp_path):
    publishing.publish(finished_attempt(tmp_path), tmp_path)
    second = publishing.publish(finished_attempt(tmp_path), tmp_path)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("2026-01-02")
    publishing.finish_publishing(tmp_path)
    assert (tmp_path / "latest").resolve().name == "2026-01-02"  # somebody's choice
    (tmp_path / "attempts" / publishing.PUBLISHING).write_text(second.path.name)
    publishing.finish_publishing(tmp_path)
    assert (tmp_path / "latest").resolve() == second.path.resolve()


# --- locks -----------------------------------------------------------------------------------------------------------


def test_the_second_in_a_folder_is_told_who_works_there(tmp_path):
    with lock.locked_folder(tmp_path):
        second = subprocess.run([sys.executable, "-c", LOCK + "pass", str(tmp_path)], capture_output=True, text=True)
    assert f"in use by process {os.getpid()} since 20" in second.stderr
    assert subprocess.run([sys.executable, "-c", LOCK + "pass", str(tmp_path)]).returncode == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch, number):
    def without_locks(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.raises(UserError, match="cannot be locked") as caught, lock.locked_folder(tmp_path):
        pass
    assert "local disk" in caught.value.hint and "in use" not in str(caught.value)


# --- console, disk space ---------------------------------------------------------------------------------------------


def test_the_console_is_logged_with_times_and_the_error(tmp_path, capsys):
    path = tmp_path / "console.log"
    with pytest.raises(UserError), console.logged_console(path):
        print("a line")
        print("\r10 %\r50 %\r100 %")
        raise UserError("it broke", "repair it")
    log = path.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log[1:]] == ["a line", "100 %", "error: it broke", "hint: repair it"]
    assert "a line" in capsys.readouterr().out


def test_too_little_disk_space_is_reported_with_how_much_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"needs 1000000\.00 GB") as caught:
        files.check_disk_space(tmp_path / "not" / "made", 10**15, "training")
    assert caught.value.hint.startswith("free ")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    with pytest.raises(UserError, match=r"needs 5\.0 MB") as caught:
        files.check_disk_space(tmp_path, 5_000_000, "training")
    assert caught.value.hint == "free 5.0 MB there"


@pytest.mark.parametrize("example", sorted((PROJECT / "training-runs" / "conversation").glob("example-*")))
def test_the_examples_in_the_repository_are_records_that_can_be_read(example):
    run = RunFolder(example)
    assert run.read().training.steps > 200 and len(run.read_tests().tests) == 3


# --- the machine -----------------------------------------------------------------------------------------------------


def a_group(folder, names, limit, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\nslab 3\n")


@pytest.mark.parametrize(
    ("line", "place", "names"),
    [
        ("0::/", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "9:cpu,memory:/",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_memory_of_a_container_is_what_its_control_groups_leave(tmp_path, monkeypatch, line, place, names):
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text(f"1:name=systemd:/other\n{line}docker/abc\n")
    a_group(root / place / "docker" / "abc", names, 2_000_000_000, 900_000_000, 400_000_000)
    a_group(root / place / "docker", names, 1_000_000_000, 950_000_000, 450_000_000)
    a_group(root / place, names, "max", 1, 1)
    limits = machine._memory_limits(root, own)
    assert limits == [(2_000_000_000, 500_000_000), (1_000_000_000, 500_000_000)]
    monkeypatch.setattr(machine, "_memory_limits", lambda: limits)
    assert machine.available_memory_bytes() == 500_000_000
    assert machine.machine()["memory_gb"] == 1.0
    monkeypatch.setattr(machine, "_memory_limits", lambda: [(1000, 2000)])
    assert machine.available_memory_bytes() == 0


def test_a_machine_without_control_groups_has_the_memory_that_is_free(tmp_path):
    assert machine._memory_limits(tmp_path / "none", tmp_path / "none") == []
    (tmp_path / "own").write_text("0::/somewhere\nnonsense\n")
    assert machine._memory_limits(tmp_path / "none", tmp_path / "own") == []
    assert machine.available_memory_bytes() > 0


def test_a_limit_of_the_shell_counts():
    code = "import sys, resource, psutil; sys.path.insert(0, sys.argv[1]); from conversation.runs.machine import *; "
    code += "resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9,) * 2); print(available_memory_bytes())"
    shown = subprocess.run([sys.executable, "-c", code, str(PROJECT)], capture_output=True, text=True)
    assert 0 < int(shown.stdout) < 2 * 10**9, shown.stderr
