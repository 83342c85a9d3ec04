"""Promise: resuming with other settings names each difference; a longer run is harmless."""

import json
import shutil
from dataclasses import replace

import pytest
from conftest import easy_lines
from faults import flip_bit
from scripts_at_work import finished

from conversation.data.examples import to_jsonl
from conversation.runs.files import file_hashes
from conversation.runs.folder import RunFolder
from conversation.runs.schedule import learning_rate

TRAIN, MERGE = "train_conversation.py", "merge_conversation_model.py"


def drop_merges(base, stop: int) -> None:
    """Keep only the first `stop` merges of a base model's tokenizer; -1 drops the last."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:stop]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_each_difference_is_named_and_nothing_is_touched(trained, tiny_folder, tmp_path):
    before = file_hashes(trained)
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    flip_bit(base / "model.safetensors", 0.9)
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    drop_merges(base, 100)
    data = tmp_path / "other.jsonl"
    data.write_bytes(to_jsonl(easy_lines()[1:]))
    other = ["--base_model", base, "--training_data", data, "--learning_rate", "1e-3", "--lora_r", "8", "--seed", "1"]
    status, output = finished(TRAIN, "--run_dir", trained, "--resume", *other, output=tmp_path / "out")
    assert status == 2 and "error: the run cannot be resumed with other settings:" in output
    for difference in (
        "--learning_rate: the run has 0.003, now 0.001",
        "--lora_r: the run has 16, now 8",
        "--seed: the run has 42, now 1",
        f"now {base}",
        f"now {data}",
        "the training data: the run has",
        "the base model's weights: the run has",
        "the base model's config.json: the run has",
        "the tokenizer: the run has",
        "the file tokenizer.json: the run has",
    ):
        assert difference in output, difference
    after = file_hashes(trained)
    assert {**after, "console.log": "", ".lock": ""} == {**before, "console.log": "", ".lock": ""}


def test_a_shorter_run_is_refused_and_a_longer_one_goes_on_and_is_merged_anew(trained, tmp_path):
    run = RunFolder(trained)
    status, output = finished(TRAIN, "--run_dir", trained, "--resume", "--max_steps", "6", output=tmp_path / "shorter")
    assert status == 2 and "the run is 12 steps long, now 6" in output
    more = ["--max_steps", "15", "--save_steps", "5"]
    status, output = finished(TRAIN, "--run_dir", trained, "--resume", *more, output=tmp_path / "longer")
    assert status == 0 and "Resuming from checkpoint-12" in output
    assert "The run is now 15 steps long, was 12: it goes on. From here on the learning rate is that of" in output
    rates = [entry["learning_rate"] for entry in run.read_metrics() if entry["step"] > 12 and "loss" in entry]
    assert rates == pytest.approx([learning_rate(run.read().config, step, 15) for step in (14, 15)])
    assert "--save_steps is now 5, was 3: harmless" in output
    assert run.read().merge is None and run.read().structural_tests is None  # those of the shorter run
    assert run.read().training.steps == 15 and run.read().config.max_steps == 15
    status, output = finished(MERGE, "--run_dir", trained, "--resume", output=tmp_path / "merge")
    assert status == 0 and "Merged: " in output and "already" not in output
    assert run.read().merge.adapter_files == run.read().training.adapter_files


@pytest.mark.parametrize("again", [[], ["--max_steps", "12"]])
def test_resuming_a_finished_run_changes_nothing(trained, tmp_path, again):
    before = file_hashes(RunFolder(trained).checkpoints)
    status, output = finished(TRAIN, "--run_dir", trained, "--resume", *again, output=tmp_path / "out")
    assert status == 0 and "The training is done already." in output
    assert file_hashes(RunFolder(trained).checkpoints) == before


def test_a_tokenizer_without_its_last_merge_is_refused_by_training_and_merging(trained, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    drop_merges(base, -1)  # too little for the probes of the fingerprint to show
    status, output = finished(TRAIN, "--run_dir", trained, "--resume", "--base_model", base, output=tmp_path / "train")
    assert status == 2 and "the file tokenizer.json: the run has" in output
    status, output = finished(MERGE, "--run_dir", trained, "--base_model", base, output=tmp_path / "merge")
    assert status == 2 and "the file tokenizer.json: the run has" in output


def test_another_number_of_processes_is_named(trained, tmp_path):
    run = RunFolder(trained)
    run.write(replace(run.read(), processes=2))
    status, output = finished(TRAIN, "--run_dir", trained, "--resume", output=tmp_path / "out")
    assert status == 2 and "processes: the run has 2, now 1" in output
