"""Rows from Parquet files and data sets: the same examples as from JSONL, and every bad row named."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, easy_lines

from conversation.data.examples import read_data, read_jsonl, read_training_data
from conversation.data.rows import named_data_set
from conversation.errors import UserError
from conversation.format.messages import to_row


@pytest.fixture(scope="module")
def rows():
    return [to_row(example) for example in easy_lines()[:6]]


def write_parquet(path, rows):
    """As a table with columns of their own types: a call has the other function's arguments, too, empty."""
    from datasets import Dataset

    path.parent.mkdir(exist_ok=True)
    Dataset.from_list(rows).to_parquet(path)
    return path


def spoiled(rows):
    """The rows with three defects, of different kinds."""
    bad = json.loads(json.dumps(rows))
    bad[1]["messages"][-1]["tool_calls"] += bad[1]["messages"][-1]["tool_calls"][-2:]
    bad[3]["messages"][-1]["tool_calls"][0]["function"]["name"] = "say"
    bad[4]["messages"].insert(0, {"role": "system", "content": "Be terse."})
    return bad


def test_lines_of_messages_and_lines_of_text_are_read_from_one_file(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(row) for row in rows[:5]] + [json.dumps({"text": easy_lines()[5].text})]
    path.write_text("\n".join(lines))
    assert read_jsonl(path) == easy_lines()[:6]


def test_every_bad_line_of_messages_is_listed_with_field_and_reason(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in spoiled(rows)))
    with pytest.raises(UserError) as caught:
        read_training_data(path)
    problems = str(caught.value).splitlines()
    assert problems[0] == "3 of 6 lines cannot be used:"
    assert problems[1].strip() == f"{path}:2: messages[1].tool_calls: 5 follow-ups, expected 3"
    assert problems[2].strip().startswith(f"{path}:4: messages[1].tool_calls[0].function.name: 'say' is neither")
    assert problems[3].strip().startswith(f"{path}:5: messages[0].content: a system message has no place")


def test_parquet_gives_the_examples_that_jsonl_gives(tmp_path, rows):
    path = write_parquet(tmp_path / "data.parquet", rows)
    assert read_training_data(path) == easy_lines()[:6]
    text = write_parquet(tmp_path / "text.parquet", [{"text": example.text} for example in easy_lines()])
    assert read_training_data([path, text]) == easy_lines()[:6] + easy_lines()


def test_every_bad_row_of_a_table_is_listed(tmp_path, rows):
    path = write_parquet(tmp_path / "data.parquet", spoiled(rows))
    with pytest.raises(UserError) as caught:
        read_training_data(path)
    problems = str(caught.value).splitlines()
    assert problems[0] == "3 of 6 rows cannot be used:" and caught.value.exit_status == 2
    assert problems[1].strip() == f"{path}, row 2: messages[1].tool_calls: 5 follow-ups, expected 3"
    assert len(problems) == 4 and "data/README.md" in caught.value.hint


def test_bad_rows_lines_and_nodes_are_listed_together_and_the_good_ones_keep_their_places(tmp_path, rows):
    table = write_parquet(tmp_path / "data.parquet", spoiled(rows))
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in spoiled(rows)))
    data = read_data([table, lines])
    assert data.places == [f"{table}, row {n}" for n in (1, 3, 6)] + [f"{lines}:{n}" for n in (1, 3, 6)]
    assert data.examples == [easy_lines()[i] for i in (0, 2, 5)] * 2
    assert [len(error.problems) for error in data.unusable] == [3, 3]
    with pytest.raises(UserError) as caught:
        data.check()
    assert all(f"{table}, row {n}: " in str(caught.value) and f"{lines}:{n}: " in str(caught.value) for n in (2, 4, 5))


def test_a_table_with_other_columns_is_refused_in_one_sentence(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [{"instruction": "a", "output": "b"}] * 30)
    with pytest.raises(UserError, match=r"data\.parquet has other columns: instruction, output") as caught:
        read_training_data(path)
    assert "`messages`" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1 but no more PAR1"])
def test_a_broken_parquet_file_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "data.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.parquet"):
        read_training_data(path)


def test_parquet_by_another_name_is_recognised(tmp_path, rows):
    path = write_parquet(tmp_path / "data.parquet", rows).rename(tmp_path / "data.jsonl")
    with pytest.raises(UserError, match=r"its name must end in \.parquet"):
        read_training_data(path)


def test_a_split_of_a_data_set_is_named_after_a_colon(tmp_path, rows, monkeypatch):
    """The folder of a data set, as `hf download --local-dir` leaves it: `datasets` reads it as one of the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    write_parquet(folder / "train-00000-of-00001.parquet", rows)
    write_parquet(folder / "test-00000-of-00001.parquet", rows[:2])
    flags = [sys.executable, "-c", READ_AND_COUNT]
    for name, count in ((f"{folder}:train", 6), (f"{folder}:test", 2)):
        done = subprocess.run([*flags, name], capture_output=True, text=True, cwd=PROJECT)
        assert done.stdout.strip() == str(count), done.stderr
    done = subprocess.run([*flags, f"{folder}:dev"], capture_output=True, text=True, cwd=PROJECT)
    assert 'Unknown split "dev"' in done.stdout and "after a colon" in done.stdout, done.stderr


READ_AND_COUNT = """
import sys
from pathlib import Path
from pathlib import Path
from conversation.data.examples import read_training_data
from conversation.errors import UserError
try:
    print(len(read_training_data(Path(sys.argv[1]))))
except UserError as error:
    print(error, error.hint)
"""


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
    command = [sys.executable, "-c", READ_AND_COUNT, "some/thing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=settings)
    assert done.stdout.startswith("there is no file or folder some/thing, and no data set of that name"), done.stderr
    assert f"{name}={value}" in done.stdout and "network and what is set" in done.stdout


def test_a_name_is_a_data_set_a_path_or_neither(tmp_path):
    assert named_data_set("owner/name") == ("owner/name", "train")
    assert named_data_set("owner/name:test") == ("owner/name", "test")
    assert named_data_set(f"{tmp_path}:test") == (str(tmp_path), "test")
    for path in ("data/lines.jsonl", "name", "/a/b", "a/b/c", "../a", "data/x.parquet", "data/trees.zip"):
        assert named_data_set(path) is None, path


def test_without_a_place_for_the_cache_nothing_is_made_in_the_working_folder(tmp_path, rows, monkeypatch):
    path = write_parquet(tmp_path / "data.parquet", rows)
    for variable in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no place for the model cache"):
        read_training_data(path)
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_missing_data_set_is_looked_for_outside(tmp_path, monkeypatch, rows):
    """A folder of the working folder is never taken for a data set of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(UserError, match="no conversation tree in owner/name"):
        read_training_data(Path("owner/name"))


def test_the_row_in_the_documentation_is_one_that_is_read(tmp_path):
    text = (PROJECT / "data" / "README.md").read_text(encoding="utf-8")
    (block,) = (part for part in re.findall(r"```json\n(.*?)```", text, re.S) if '"messages"' in part)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(json.loads(block)))
    assert read_training_data(path)[0].answer.follow_ups[2].target == "mutex_vs_semaphore"
