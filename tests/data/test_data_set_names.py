"""What a name of training data means, and what is said when it cannot be had."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT
from test_rows import READ

from conversation.data.examples import read_training_data
from conversation.data.rows import DataSet, named_data_set
from conversation.errors import UserError
from conversation_config import folder_and_rest


def test_a_colon_with_no_folder_before_it_does_not_mean_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_and_rest(":train") is None and folder_and_rest(f"{tmp_path}:train") == (str(tmp_path), "train")


def test_a_data_set_that_cannot_be_had_is_refused_in_one_sentence():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="no file or folder nobody/nothing, and no data set of that name") as caught:
        read_training_data(Path("nobody/nothing:train"))
    assert "HF_HUB_OFFLINE=1" in str(caught.value) and "auth login" in caught.value.hint
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, value", [("ALL_PROXY", "socks://127.0.0.1:1080"), ("HF_ENDPOINT", "nonsense")])
def test_whatever_keeps_a_data_set_from_being_had_is_named(tmp_path, name, value):
    plain = {each: text for each, text in os.environ.items() if not each.startswith("HF_")}
    settings = {**plain, "HF_HOME": str(tmp_path / "home"), name: value}
    command = [sys.executable, "-c", READ, "some/thing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=settings)
    assert done.stdout.startswith('"there is no file or folder some/thing, and no data set of that name'), done.stderr
    assert f"{name}={value}" in done.stdout and "network and what is set" in done.stdout


def test_a_name_is_a_data_set_a_path_or_neither(tmp_path):
    for name, expected in {
        "owner/name": DataSet("owner/name"),
        "owner/name:test": DataSet("owner/name", "test"),
        "owner/name:train[10:20%]+test": DataSet("owner/name", "train[10:20%]+test"),
        "owner/name:all:test": DataSet("owner/name", "test", "all"),
        "owner/name@refs/pr/1": DataSet("owner/name", revision="refs/pr/1"),
        f"{tmp_path}:test": DataSet(str(tmp_path), "test"),
        f"{tmp_path}:all:train[:1]": DataSet(str(tmp_path), "train[:1]", "all"),
    }.items():
        assert named_data_set(name) == expected, name
    paths = ["data/lines.jsonl", "name", "/a/b", "a/b/c", "../a", "data/x.parquet", "data/trees.zip"]
    for path in (*paths, "owner/name:", "owner/name:a:b:c", "owner/name:train[", f"{tmp_path}:", f"{tmp_path}:a b"):
        assert named_data_set(path) is None, path
