"""The run folder: files whole or old, names that do not collide, publishing, locks, the kept console."""

import os
import subprocess
import sys

import pytest

from conversation import console, files, publishing, runs
from conversation.errors import UserError
from conversation.runs import RunFolder


def finished_attempt(root, passed=True) -> RunFolder:
    run = RunFolder(publishing.begin_attempt(root))
    config = {"base_model": "m", "loss_on": "completion"}
    run.update(
        started="2026-01-02T03:04:05+00:00",
        command=["train_conversation.py"],
        config=config,
        structural_tests={"passed": passed, "passed_tests": 3 if passed else 2, "held_out_valid": 1}
        | {"held_out_questions": 1, "held_out_distinct": 1},
        data={"training_sha256": "d", "source": "s"}
        | {
            "statistics": {"training_examples": 1, "held_out_examples": 0, "token_lengths": {"median": 1, "max": 1}}
            | {"label_token_share": 0.4}
        },
        base_model={"weights_sha256": "w"},
        tokenizer={"fingerprint": "f"},
        git_commit="c",
        machine={},
        versions={},
    )
    files.write_json(run.structural_tests, {"passed": passed, "passed_tests": 3, "tests": [], "held_out": []})
    return run


def test_a_failed_write_leaves_the_old_content_and_no_leftover(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def no_room(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(UserError, match="No space left") as caught:
        files.write_atomically(path, b"new")
    assert caught.value.exit_status == 1 and "free there" in caught.value.hint
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff", b'{"a": NaN}'])
def test_a_broken_record_is_named(tmp_path, content):
    run = RunFolder(tmp_path)
    run.run_json.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json is broken"):
        run.read()


def test_a_changed_missing_or_truncated_file_is_found(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 1000)
    (tmp_path / "b").write_bytes(b"b")
    recorded = files.file_hashes(tmp_path)
    assert files.differing_file(tmp_path, recorded) is None
    (tmp_path / "a").write_bytes(b"a" * 999 + b"b")
    assert "a is broken" in files.differing_file(tmp_path, recorded)
    (tmp_path / "a").unlink()
    assert "a is missing" in files.differing_file(tmp_path, recorded)


def test_a_second_run_of_a_day_gets_its_own_folder(tmp_path):
    first = runs.new_run_folder(tmp_path)
    first.path.mkdir()
    assert runs.new_run_folder(tmp_path).path.name == f"{first.path.name}-2"


def test_publishing_names_the_run_and_points_latest_at_it(tmp_path):
    first = publishing.publish(finished_attempt(tmp_path), tmp_path, "./RETRAIN.sh")
    second = publishing.publish(finished_attempt(tmp_path), tmp_path, "./RETRAIN.sh --demo")
    assert (first.name, second.name) == ("2026-01-02", "2026-01-02-2")
    assert (tmp_path / "latest").resolve() == second.resolve()
    assert "./RETRAIN.sh --demo" in (second / "report.md").read_text()


def test_a_run_that_failed_its_tests_is_not_published(tmp_path):
    published = publishing.publish(finished_attempt(tmp_path), tmp_path, "")
    attempt = finished_attempt(tmp_path, passed=False)
    with pytest.raises(UserError, match="has not passed its tests"):
        publishing.publish(attempt, tmp_path, "")
    assert (tmp_path / "latest").resolve() == published.resolve()
    assert attempt.run_json.exists()


def test_latest_is_mended_after_a_stop_between_naming_and_pointing_and_only_then(tmp_path):
    publishing.publish(finished_attempt(tmp_path), tmp_path, "")
    second = publishing.publish(finished_attempt(tmp_path), tmp_path, "")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("2026-01-02")
    publishing.finish_publishing(tmp_path)
    assert (tmp_path / "latest").resolve().name == "2026-01-02"  # somebody's choice
    (tmp_path / "attempts" / publishing.PUBLISHING).write_text(second.name)
    publishing.finish_publishing(tmp_path)
    assert (tmp_path / "latest").resolve() == second.resolve()


def test_a_new_attempt_cleans_earlier_attempts_and_nothing_else(tmp_path):
    published = publishing.publish(finished_attempt(tmp_path), tmp_path, "")
    (tmp_path / "by_hand").mkdir()
    leftover = finished_attempt(tmp_path, passed=False)
    os.rename(leftover.path, leftover.path.with_name("2020-01-01_00-00-00"))
    attempt = publishing.begin_attempt(tmp_path)
    assert [path.name for path in (tmp_path / "attempts").iterdir() if path.is_dir()] == [attempt.name]
    assert published.exists() and (tmp_path / "by_hand").exists()


def test_the_second_in_a_folder_is_told_who_holds_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from conversation.runs import hold\nwith hold(Path(sys.argv[1])): pass"
    )
    with runs.hold(tmp_path):
        second = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert f"in use by process {os.getpid()} since 20" in second.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_a_dead_holders_lock_is_taken_over(tmp_path):
    code = "import os, sys; from pathlib import Path; from conversation.runs import hold\n"
    code += "with hold(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    with runs.hold(tmp_path):
        pass


def test_the_console_is_kept_with_times_and_the_error(tmp_path, capsys):
    run = RunFolder(tmp_path)
    with pytest.raises(UserError), console.console_kept(run):
        print("a line")
        print("\r10 %\r50 %\r100 %")
        raise UserError("it broke", "mend it")
    log = run.console_log.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log[1:]] == ["a line", "100 %", "error: it broke", "hint: mend it"]
    assert "a line" in capsys.readouterr().out


def test_too_little_room_is_said_with_how_much_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"needs 1000000\.00 GB") as caught:
        files.check_room(tmp_path / "not" / "made", 10**15, "training")
    assert caught.value.hint.startswith("free ")
