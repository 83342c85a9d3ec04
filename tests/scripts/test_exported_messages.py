"""The way out: chat messages with tools that stock TRL trains on, and that are read back as they were."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import PROJECT, easy_lines

from conversation.data.examples import read_training_data, to_jsonl
from conversation.format.calls import Answer, Example
from conversation.format.messages import to_sharegpt_row
from conversation_config import DATA_SETS
from scripts.messages import as_parquet


def export(source, output, home="/nonexistent", *flags):
    command = [sys.executable, "-m", "scripts.messages", str(source), str(output), *flags]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=PROJECT, env={**os.environ, "HF_HOME": str(home)}
    )


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    (folder / "easy.jsonl").write_bytes(to_jsonl(easy_lines()))
    output = folder / f"messages.{request.param}"
    done = export(folder / "easy.jsonl", output, folder / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"36 rows in {output}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["easy.jsonl", output.name]
    return output


def test_what_was_written_is_read_back_to_the_same_examples(exported):
    assert read_training_data(exported) == easy_lines()


def test_the_first_answers_alone_are_written_as_a_training_takes_them(tmp_path):
    done = export(DATA_SETS["starter"][0], tmp_path / "first.jsonl", tmp_path / "home", "--answers", "first")
    assert done.returncode == 0, done.stderr
    expected = read_training_data(DATA_SETS["starter"], answers="first")
    assert read_training_data(tmp_path / "first.jsonl") == expected != read_training_data(DATA_SETS["starter"])


def test_stock_trl_trains_two_steps_on_it(exported, tmp_path, tiny_folder):
    """With the chat template of another model family, as a user of another base has it."""
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    kind = {".jsonl": "json", ".parquet": "parquet"}[exported.suffix]
    rows = load_dataset(kind, data_files=str(exported), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    text = tokenizer.apply_chat_template(rows[2]["messages"], tools=rows[2]["tools"], tokenize=False)
    assert '{"name": "add_text", "arguments": {"content": "It is red."}}' in text
    assert '"arguments": {"text": "Why?", "confidence": 0.61, "target": "why"}}' in text and "null" not in text
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, logging_steps=1, per_device_train_batch_size=2,
        bf16=False, use_cpu=True, report_to=[], save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(model=str(tiny_folder), args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


def test_stock_datasets_reads_the_numbers_of_the_parquet_as_they_are(tmp_path):
    """Its reader makes 0.57, as JSON has it, 0.5700000000000001."""
    from datasets import load_dataset

    base = easy_lines()[0]
    numbers = [f"{number / 100:.2f}" for number in range(101)]
    texts = '"confidence": 0.57 and \\'
    answers = [
        Answer((texts,), tuple(replace(each, confidence=number) for each in base.answer.follow_ups))
        for number in numbers
    ]
    (tmp_path / "data.parquet").write_bytes(as_parquet([Example(base.prompt, answer) for answer in answers]))
    source = str(tmp_path / "data.parquet")
    rows = load_dataset("parquet", data_files=source, split="train", cache_dir=str(tmp_path / "cache"))
    calls = [[call["function"]["arguments"] for call in row["messages"][-1]["tool_calls"]] for row in rows]
    assert [call[-1]["confidence"] for call in calls] == [float(number) for number in numbers]
    assert all(call[0] == {"content": texts} for call in calls)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_the_form_of_llama_factory_is_texts_alone_and_is_read_back(tmp_path, name):
    (tmp_path / "easy.jsonl").write_bytes(to_jsonl([*easy_lines(), dated()]))
    done = export(tmp_path / "easy.jsonl", tmp_path / name, tmp_path / "home", "--form", "sharegpt")
    assert done.returncode == 0, done.stderr
    assert read_training_data(tmp_path / name) == [*easy_lines(), dated()]


def dated():
    """An example of another day: its date goes into a system message."""
    return replace(easy_lines()[0], prompt=replace(easy_lines()[0].prompt, timestamp="2026-11-27T00:00:00"))


def test_the_turns_of_llama_factory_take_turns():
    """It skips a row, with a warning, whose turns do not alternate between reader and model."""
    row = to_sharegpt_row(easy_lines()[2])
    assert [turn["from"] for turn in row["conversations"]] == ["human", "function_call"] * 2
    assert json.loads(row["conversations"][1]["value"])[0] == {
        "name": "add_text",
        "arguments": {"content": "It is red."},
    }
    assert [tool["name"] for tool in json.loads(row["tools"])] == ["add_text", "add_choice"]


def test_a_name_that_is_no_format_is_refused_and_nothing_is_written(tmp_path):
    done = export("starter", tmp_path / "out.csv")
    assert done.returncode == 2 and "neither .jsonl nor .parquet" in done.stderr and not list(tmp_path.iterdir())


def test_its_help_loads_nothing_heavy():
    code = "import sys; sys.argv = ['messages', '--help']; import runpy\n"
    code += "try: runpy.run_module('scripts.messages', run_name='__main__')\n"
    code += "except SystemExit: print(json.dumps(sorted({'torch', 'datasets', 'pyarrow'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", "import json; " + code], capture_output=True, text=True, cwd=PROJECT)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr
