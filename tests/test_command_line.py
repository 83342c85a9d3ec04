"""The command line: help at once, every flag with its default, one clear error for what a user can cause."""

import json
import runpy
import shutil
import subprocess
import sys
import time

import pytest
from conftest import PROJECT, easy_lines, run_script

from conversation.examples import to_jsonl
from conversation_config import DEMO_RECIPE, TrainingConfig

SCRIPTS = ("train_conversation.py", "merge_conversation_model.py", "test_conversation_model.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_within_two_seconds_from_any_folder(script, tmp_path):
    started = time.monotonic()
    shown = run_script(script, "--help", cwd=tmp_path)
    assert time.monotonic() - started < 2
    assert shown.returncode == 0 and "usage" in shown.stdout


def test_every_setting_is_a_flag_with_its_default():
    shown = run_script("train_conversation.py", "--help").stdout
    for name, value in TrainingConfig().as_dict().items():
        assert f"--{name}" in shown
        assert value == "" or f"(default: {value})" in " ".join(shown.split())


def test_the_demo_recipe_names_real_settings():
    TrainingConfig(**DEMO_RECIPE)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", "inf"], "learning_rate must be finite"),
        (["--learning_rate", "-1"], "learning_rate must be greater than 0"),
        (["--learning_rate", "nan", "--lora_r", "0"], "--lora_r must be greater than 0"),
        (["--learning_rate", "abc"], "invalid float value"),
        (["--held_out_share", "1.5"], "--held_out_share must be at least 0"),
        (["--max_steps", "0"], "--max_steps must be at least 1"),
        (["--no_such_flag"], "error: unrecognized arguments: --no_such_flag\nhint: train_conversation.py --help"),
        (["--json"], "--json goes with --check_data"),
        (["--check_room"], "--check_room goes with --check_data"),
        (["--fp16"], "FP16 is refused"),
        (["--bf16"], "BF16 is refused"),
        (["--training_data", "absent.jsonl"], "no training data at"),
        (["--domains", "cooking"], "unknown domain: cooking"),
        (["--base_model", "no such model"], "unknown base model"),
        (["--base_model", "./nowhere"], "unknown base model"),
        (["--resume", "--run_dir", "nowhere"], "run.json is missing"),
    ],
)
def test_a_bad_flag_is_one_error_and_status_2_and_changes_nothing(tmp_path, flags, words):
    done = run_script("train_conversation.py", *flags, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_is_refused_however_it_is_asked_for(tmp_path, precision):
    flags = ["--run_dir", tmp_path / "run"]
    done = run_script("train_conversation.py", *flags, env={"ACCELERATE_MIXED_PRECISION": precision})
    assert done.returncode == 2 and f"mixed precision ({precision}) is refused" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_folder_that_is_no_run_is_refused(script, tmp_path):
    done = run_script(script, "--run_dir", tmp_path)
    assert done.returncode == 2 and "is not a run folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_paths_are_meant_from_the_folder_one_is_in(tmp_path, tiny_folder):
    (tmp_path / "mine.jsonl").write_bytes(to_jsonl(easy_lines()[:12]))
    (tmp_path / "base").symlink_to(tiny_folder)
    here = ["--training_data", "mine.jsonl", "--base_model", "base"]
    done = run_script("train_conversation.py", "--check_data", "--json", *here, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 12
    trained = run_script("train_conversation.py", *here, "--max_steps", "1", "--run_dir", "run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    merged = run_script("merge_conversation_model.py", "--run_dir", tmp_path / "run", cwd="/")
    assert merged.returncode == 0, merged.stderr  # from elsewhere, where "base" means nothing


def test_help_needs_no_environment(tmp_path):
    copy = shutil.copytree(
        PROJECT, tmp_path / "project", ignore=shutil.ignore_patterns(".venv", ".git", "training-runs")
    )
    shown = subprocess.run(["./run_conversation_training.sh", "--help"], cwd=copy, capture_output=True, text=True)
    assert shown.returncode == 0 and "--learning_rate" in shown.stdout and not (copy / ".venv").exists()


def test_the_command_that_repeats_a_run_has_what_it_was_resumed_with(monkeypatch):
    script = runpy.run_path(str(PROJECT / "train_conversation.py"))
    monkeypatch.setattr(sys, "argv", ["train_conversation.py", "--demo", "--run_dir=x", "--max_steps", "10"])
    first = script["command"]([])
    assert first == ["train_conversation.py", "--demo", "--max_steps", "10"]
    monkeypatch.setattr(sys, "argv", ["train_conversation.py", "--resume", "--max_steps", "20"])
    assert script["command"](first) == [*first, "--max_steps", "20"]
    monkeypatch.setattr(sys, "argv", [*first, "--resume", "--run_dir", "x"])
    assert script["command"](first) == first
