"""Rows from Parquet files and data sets: the same examples as from JSONL, and every bad row named."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT, easy_lines
from records import some_record

from conversation.data.exact_json import UnusableJson
from conversation.data.examples import read_data, read_jsonl, read_training_data
from conversation.data.rows import DataSet, read_data_set
from conversation.errors import UserError
from conversation.format.calls import Answer, Example
from conversation.format.messages import to_row
from conversation_config import TrainingConfig, path_from_anywhere
from scripts.messages import as_jsonl, as_parquet


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


def test_the_check_of_a_data_sets_folder_prints_its_statistics_though_it_has_no_trees(tmp_path, rows, capsys):
    from conversation.training.preparation import print_statistics

    write_parquet(tmp_path / "train.parquet", rows)
    config, statistics = TrainingConfig(training_data=str(tmp_path)), some_record().data.statistics
    prepared = SimpleNamespace(config=config, trees=[], statistics=statistics, audit=SimpleNamespace(fingerprint="f"))
    for as_json in (False, True):
        print_statistics(prepared, as_json)
    said = capsys.readouterr().out
    assert "fit for training" in said and json.loads(said.splitlines()[-1])["quality"] is None


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
    assert problems[2].strip().startswith(f"{path}:4: messages[1].tool_calls[0].function.name: 'say' is none of")
    assert problems[3].strip().startswith(f"{path}:5: messages[0].content: a system message has no place")


def test_answers_that_are_only_history_are_told_of(tmp_path, rows, capsys):
    """TRL would train on each answer of a row. Here the follow-ups of an earlier one are left out."""
    question, answer = rows[0]["messages"][-2:]
    longer = [{"messages": [question, answer, question, answer]}, rows[0], rows[2]]
    table = write_parquet(tmp_path / "data.parquet", longer)
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(map(json.dumps, longer)))
    for path in (table, lines):
        assert [len(example.prompt.history) for example in read_training_data(path)] == [2, 0, 3]
        assert f"{path}: answers that are only history: 1; a row is one example" in capsys.readouterr().err


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


def test_texts_beside_messages_are_refused_and_an_empty_column_of_texts_is_none(tmp_path, rows):
    path = write_parquet(tmp_path / "data.parquet", [{**row, "text": None} for row in rows[:1]])
    assert read_training_data(path) == easy_lines()[:1]
    lines = tmp_path / "data.jsonl"
    lines.write_text(json.dumps({"text": easy_lines()[0].text, "prompt": "another column"}))
    assert read_training_data(lines) == easy_lines()[:1]
    lines.write_text(json.dumps({"text": easy_lines()[0].text, "prompt": "[INST] another column [/INST]"}))
    assert read_training_data(lines) == easy_lines()[:1]
    for messages in (rows[0]["messages"], json.dumps(rows[0]["messages"], indent=1)):
        lines.write_text(json.dumps({"messages": messages, "text": easy_lines()[0].text}))
        with pytest.raises(UserError, match="1: `text` beside `messages`: a row has one or the other"):
            read_training_data(lines)


def test_a_name_that_looks_like_a_pattern_is_of_one_file(tmp_path, rows):
    write_parquet(tmp_path / "ab.parquet", rows)
    for number, name in enumerate(("a?.parquet", "[a]b.parquet", "*.PARQUET"), 1):
        assert read_training_data(write_parquet(tmp_path / name, rows[:number])) == easy_lines()[:number]


def test_a_table_with_other_columns_is_refused_in_one_sentence(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [{"instruction": "a", "output": "b"}] * 30)
    with pytest.raises(UserError, match=r"data\.parquet has other columns: instruction, output") as caught:
        read_training_data(path)
    assert "`messages`" in caught.value.hint


def test_a_file_with_other_columns_in_all_lines_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"query": "a", "answers": "[]"}) + "\n" + json.dumps({"query": "b", "tools": "[]"}))
    with pytest.raises(UserError, match=r"data\.jsonl has other columns: answers, query, tools$"):
        read_training_data(path)


def test_a_table_without_rows_is_refused_in_one_sentence(tmp_path, rows):
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(write_parquet(tmp_path / "data.parquet", rows))
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=r"data\.parquet contains no training example"):
        read_training_data(tmp_path / "data.parquet")


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1 but no more PAR1"])
def test_a_broken_parquet_file_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "data.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.parquet"):
        read_training_data(tmp_path / "data.parquet")


def test_a_defect_of_ours_is_not_taken_for_a_mistake_in_the_table(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("conversation.data.rows.parse_row", None)
    with pytest.raises(TypeError, match="not callable"):
        read_training_data(write_parquet(tmp_path / "data.parquet", rows[:1]))


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (UnusableJson("the key 'split' occurs twice in one object"), "rows have `text`"),
        (RuntimeError("no reader for train_split.bin"), "rows have `text`"),
        (ValueError('Unknown split "dev". Should be one of [train].'), "a split comes after a colon"),
    ],
)
def test_only_a_split_that_is_not_there_is_answered_with_how_to_name_one(error, hint, tmp_path, monkeypatch):
    def load(source, **options):
        raise RuntimeError(f"cannot be generated: {error}") from error

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError, match=f"cannot be read: {re.escape(str(error).rstrip('.'))}") as caught:
        read_data_set(DataSet(str(tmp_path)))
    assert caught.value.hint.startswith(hint)


def test_parquet_by_another_name_is_recognised(tmp_path, rows):
    path = write_parquet(tmp_path / "data.parquet", rows).rename(tmp_path / "data.jsonl")
    with pytest.raises(UserError, match=r"its name must end in \.parquet"):
        read_training_data(path)


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory):
    """A function that reads training data in a process with a cache of its own: how many examples, or the error."""

    def read(*names):
        environment = {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("home"))}
        flags = [sys.executable, "-c", READ, *map(str, names)]
        done = subprocess.run(flags, capture_output=True, text=True, cwd=PROJECT, env=environment)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return read


READ = """
import json, sys
from pathlib import Path
from conversation.data.examples import read_training_data
from conversation.errors import UserError
for name in sys.argv[1:]:
    try:
        print(json.dumps([example.text for example in read_training_data(Path(name))]))
    except UserError as error:
        print(json.dumps(f"{error} | {error.hint}"))
"""


def test_a_data_set_in_a_folder_is_named_with_split_slice_and_configuration(tmp_path, rows, read_elsewhere):
    """As `hf download --local-dir` leaves it: `datasets` reads it as one of the hub."""
    shards, configured = tmp_path / "set", tmp_path / "configured"
    for number in range(2):
        write_parquet(shards / f"train-{number:05d}-of-00002.parquet", rows)
    write_parquet(shards / "test-00000-of-00001.parquet", rows[:2])
    for name, some in (("one", rows), ("two", rows[:1])):
        configured.mkdir(exist_ok=True)
        write_parquet(configured / name / "data.parquet", some)
    parts = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("one", "two"))
    (configured / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    sizes = {
        shards: 12,
        f"{shards}:train": 12,
        f"{shards}:test": 2,
        f"{shards}:train[1:3]": 2,
        f"{shards}:train[:50%]+test": 8,
        f"{configured}:two:train": 1,
    }
    refused = [f"{shards}:dev", configured, f"{configured}:three:train"]
    found = read_elsewhere(*sizes, *refused)
    assert [len(texts) for texts in found[: len(sizes)]] == list(sizes.values())
    assert 'Unknown split "dev"' in found[-3] and "after a colon" in found[-3]
    assert "['one', 'two']" in found[-2] and "owner/name:configuration:train" in found[-2]
    assert "BuilderConfig 'three' not found" in found[-1] and "owner/name:configuration:train" in found[-1]


def test_a_data_set_of_json_is_read_strictly_and_its_numbers_are_exact(tmp_path, read_elsewhere):
    """Its own reader makes 0.57 of calls with different arguments 0.5700000000000001, and keeps ten decimals."""
    base = easy_lines()[0]
    texts = [f"{number / 100:.2f}" for number in range(101)] + ["0.5734219551086426", "1e-15"]
    examples = [
        Example(base.prompt, Answer(("x",), tuple(replace(each, confidence=text) for each in base.answer.follow_ups)))
        for text in texts
    ]
    for folder, write in ((tmp_path / "json", as_jsonl), (tmp_path / "parquet", as_parquet)):
        folder.mkdir()
        (folder / f"train.{'jsonl' if write is as_jsonl else 'parquet'}").write_bytes(write(examples))
    expected = [example.text for example in examples]
    (tmp_path / "twice").mkdir()
    twice = as_jsonl(examples[:2]).replace(b'"content": "x"', b'"content": "x", "content": "y"')
    (tmp_path / "twice" / "train.jsonl").write_bytes(twice)
    *read, refused = read_elsewhere(f"{tmp_path / 'json'}:train", tmp_path / "parquet", f"{tmp_path / 'twice'}:train")
    assert read == [expected] * 2
    assert "cannot be read: the key 'content' occurs twice in one object" in refused


def test_a_folder_and_its_split_are_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    assert path_from_anywhere("set:train[:10%]") == f"{tmp_path / 'set'}:train[:10%]"
    assert path_from_anywhere("owner/name:train[:10%]") == "owner/name:train[:10%]"


def test_a_name_of_the_hub_is_handed_to_datasets_with_its_parts(monkeypatch):
    asked = []

    def load(source, **options):
        asked.append((source, options))
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError, match="no data set of that name"):
        read_training_data(Path("owner/name@v1.0:small:train[:10%]"))
    assert asked == [("owner/name", {"name": "small", "split": "train[:10%]", "revision": "v1.0"})]


def test_a_folder_of_save_to_disk_is_refused_in_one_sentence(tmp_path, rows, read_elsewhere):
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (said,) = read_elsewhere(tmp_path / "saved")
    assert said.startswith(f"{tmp_path / 'saved'}:train was written by save_to_disk | ") and "to_parquet" in said


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
