"""Hashes of files: a large one is read once a process, and no change of it goes unseen."""

import hashlib
import os
import time

import pytest

from conversation.runs import files
from conversation.runs.files import sha256_file


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read, where 1,000 bytes are large."""
    names, digest = [], hashlib.file_digest
    monkeypatch.setattr(files, "LARGE", 1000)
    monkeypatch.setattr(files, "_digests", {})
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: names.append(file.name) or digest(file, kind))
    return names


def test_a_large_file_is_read_once_and_a_small_one_each_time(tmp_path, read):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"x" * 2000)
    small.write_bytes(b"y")
    for _ in range(3):
        assert sha256_file(large) == hashlib.sha256(b"x" * 2000).hexdigest()
        assert sha256_file(small) == hashlib.sha256(b"y").hexdigest()
    assert read.count(str(large)) == 1 and read.count(str(small)) == 3


def test_a_bit_that_flips_at_the_same_size_and_time_is_seen(tmp_path, read):
    path = tmp_path / "large"
    path.write_bytes(b"x" * 2000)
    before, first = path.stat(), sha256_file(path)
    time.sleep(0.05)  # the clock of the file system ticks; a file that is really large takes longer to be read
    with open(path, "r+b") as file:
        file.seek(1500)
        file.write(b"z")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest() != first


def test_another_file_under_the_same_name_is_read(tmp_path, read):
    path, other = tmp_path / "large", tmp_path / "other"
    path.write_bytes(b"x" * 2000)
    other.write_bytes(b"z" * 2000)
    times = path.stat()
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    first = sha256_file(path)
    os.replace(other, path)
    assert sha256_file(path) == hashlib.sha256(b"z" * 2000).hexdigest() != first


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, read, monkeypatch):
    path, counted = tmp_path / "large", hashlib.file_digest
    path.write_bytes(b"x" * 2000)

    def meanwhile(file, kind):
        found = counted(file, kind)
        if len(read) == 1:
            time.sleep(0.05)
            path.write_bytes(b"z" * 2000)
        return found

    monkeypatch.setattr(hashlib, "file_digest", meanwhile)
    sha256_file(path)
    assert sha256_file(path) == hashlib.sha256(b"z" * 2000).hexdigest()
