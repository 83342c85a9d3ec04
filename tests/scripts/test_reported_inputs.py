"""Whole commands on inputs that users of comparable tools reported: what they ask for, and what they are told.

The parts have their tests on their floors. Here the command line is tried, and that nothing is left behind.
"""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import INPUTS, PROJECT, easy_lines
from scripts_at_work import finished

from conversation.data.examples import to_jsonl
from conversation_config import DATA_SETS

TRAIN = "train_conversation.py"


@pytest.fixture
def train(tmp_path, tiny_folder):
    """Runs the training in a folder of its own, which it must leave as it was; returns status and output."""
    (tmp_path / "here").mkdir()
    shutil.copy(INPUTS / "good_six.jsonl", tmp_path / "good_six.jsonl")

    def run(*flags, base=tiny_folder, data=tmp_path / "good_six.jsonl"):
        given = ["--base_model", base, *(["--training_data", data] if data else []), *flags]
        before = sorted((tmp_path / "here").rglob("*"))
        status, output = finished(TRAIN, *given, cwd=tmp_path / "here", output=tmp_path / "out")
        assert sorted((tmp_path / "here").rglob("*")) == before
        return status, output

    return run


def test_a_base_folder_that_holds_adapters_is_refused_before_the_training(train, tmp_path, tiny_folder):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (base / name).write_text("{}")
    status, output = train("--run_dir", "run", base=base)
    assert status == 2, output
    assert f"error: {base} contains adapters: adapter_config.json, adapter_model.safetensors\n" in output
    assert "hint: merge them into their base first, or move them away" in output


@pytest.mark.parametrize("case", ["one step", "one example"])
def test_a_training_whose_only_rate_is_zero_is_refused(train, tmp_path, case):
    (tmp_path / "one.jsonl").write_bytes(to_jsonl(easy_lines()[:1]))
    if case == "one step":
        status, output = train("--max_steps", "1", "--run_dir", "run")
    else:
        status, output = train("--num_train_epochs", "1", "--run_dir", "run", data=tmp_path / "one.jsonl")
    assert status == 2, output
    assert "error: a training of 1 steps would change nothing: every learning rate of it is 0" in output
    assert "hint: give --warmup_steps 0, or train longer" in output


def test_without_training_data_the_projects_is_meant_whatever_lies_in_the_working_folder(train, tmp_path):
    decoy = tmp_path / "here" / "data" / "conversation_trees" / "programming"
    decoy.mkdir(parents=True)
    shutil.copy(INPUTS / "trees_beside" / "programming" / "algebraic_types.json", decoy)
    (tmp_path / "here" / "expert").mkdir()
    status, output = train("--check_data", "--json", data=None)
    assert status == 0, output
    from conversation.data.examples import read_training_data

    counted = json.loads(output[output.index("{") :])
    assert counted["examples"] == len(read_training_data(DATA_SETS["expert"])) > 1000
    assert "this is the project's set expert; for the one here write ./expert" in output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("utf16.jsonl", "this is UTF-16"),
        ("six.jsonl.gz", "this is gzip"),
        ("array.json", "this is one JSON array of 6"),
        ("trees_beside", "3 problems"),
    ],
)
def test_data_of_another_kind_is_named_as_what_it_is(train, name, words):
    status, output = train("--check_data", data=INPUTS / name)
    assert status == 2 and words in output and str(INPUTS / name) in output, output


def test_the_helper_that_writes_lines_refuses_trees_beside_their_places_and_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "scripts.examples", str(INPUTS / "trees_beside"), str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and "await_mechanism.json" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
