"""The command line: help at once, every flag with its default, one clear error for what a user can cause."""

import importlib
import json
import resource
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
from conftest import PROJECT, easy_lines, run_script
from records import some_record

from conversation.data.examples import to_jsonl
from conversation.errors import CommandLine, UserError
from conversation.runs.report import command_that_repeats
from conversation_config import RECIPES, TrainingConfig, add_training_flags, resolve_settings

SCRIPTS = (
    "train_conversation.py",
    *(f"{name}_conversation_model.py" for name in ("merge", "test", "evaluate", "export", "serve")),
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_within_two_seconds_from_any_folder(script, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = run_script(script, "--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # seconds of the processor: the same however busy the machine is
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert shown.returncode == 0 and "usage" in shown.stdout


STOPPED = """
import runpy, sys
def stop(*given):
    raise KeyboardInterrupt
import conversation_config, conversation.runs.folder
conversation_config.set_up_libraries = conversation.runs.folder.chosen_run = stop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "flags", "can_go_on"),
    [
        ("train_conversation.py", [], True),
        ("merge_conversation_model.py", [], True),
        ("export_conversation_model.py", ["--type", "f32"], True),
        ("test_conversation_model.py", [], False),
        ("evaluate_conversation_model.py", [], False),
    ],
)
def test_only_a_script_that_keeps_finished_work_says_so_when_it_is_stopped(script, flags, can_go_on):
    command = [sys.executable, "-c", STOPPED, script, *flags]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 130 and "error: stopped by SIGINT" in done.stderr, done.stderr
    assert ("hint: finished work is saved; go on with the same command and --resume" in done.stderr) == can_go_on


def test_every_setting_is_a_flag_with_its_default():
    shown = run_script("train_conversation.py", "--help").stdout
    for name, value in asdict(TrainingConfig()).items():
        assert f"--{name}" in shown
        assert value == "" or f"(default: {value})" in " ".join(shown.split())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_real_settings(recipe):
    TrainingConfig(**RECIPES[recipe])


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
        (["--resume", "--check_data"], "--check_data reads no run"),
        (["--attempt", "--check_data"], "RETRAIN.sh names the run folder"),
        (["--fp16"], "fp16 is refused"),
        (["--bf16"], "bf16 is refused"),
        (["--training_data", "absent.jsonl"], "no training data at"),
        (["--domains", "cooking"], "unknown domain: cooking"),
        (["--base_model", "no such model"], "unknown base model"),
        (["--base_model", "./nowhere"], "unknown base model"),
        (["--resume", "--run_dir", "nowhere"], "is not a run folder"),
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
    assert done.returncode == 2 and f"{precision} is refused" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS[1:3])
def test_a_folder_that_is_no_run_is_refused(script, tmp_path):
    done = run_script(script, "--run_dir", tmp_path)
    assert done.returncode == 2 and "is not a run folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_is_of_one_process():
    """Each of several would remove the attempt of another, and begin one."""
    several = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    done = run_script("train_conversation.py", "--attempt", env={**several, "MASTER_ADDR": "::1", "MASTER_PORT": "9"})
    assert done.returncode == 2 and "error: an attempt of RETRAIN.sh has one process" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "train --run_dir",
        "train --resume --run_dir",
        "merge --run_dir",
        "test --model",
        "evaluate --model",
        "evaluate --compare",
        "export --type q8_0 --model",
        "serve --model",
    ],
)
def test_a_link_that_leads_to_itself_is_refused_without_a_traceback(command, tmp_path, tiny_folder, easy_data):
    (tmp_path / "loop").symlink_to("loop")
    name, *flags = command.split()
    script = next(each for each in SCRIPTS if each.startswith(name))
    inputs = ["--base_model", tiny_folder, "--training_data", easy_data, "--device", "cpu"] if name == "train" else []
    done = run_script(script, *inputs, *flags, tmp_path / "loop")
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "loop" in done.stderr and [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("name", ["relevance", "spelling"])
def test_a_bad_flag_of_a_script_for_the_data_is_one_error_too(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--nonsense"])
    with pytest.raises(UserError, match="unrecognized arguments: --nonsense"):
        importlib.import_module(f"scripts.{name}").main()


def test_the_relevance_of_one_example_has_nothing_to_be_compared_with(tmp_path, monkeypatch):
    (tmp_path / "one.jsonl").write_bytes(to_jsonl(easy_lines()[:1]))
    monkeypatch.setattr(sys, "argv", ["relevance", "--training_data", str(tmp_path / "one.jsonl")])
    with pytest.raises(UserError, match=r"one\.jsonl has one example"):
        importlib.import_module("scripts.relevance").main()


def test_paths_are_meant_from_the_folder_one_is_in(tmp_path, tiny_folder):
    (tmp_path / "mine.jsonl").write_bytes(to_jsonl(easy_lines()[:12]))
    (tmp_path / "base").symlink_to(tiny_folder)
    here = ["--training_data", "mine.jsonl", "--base_model", "base"]
    done = run_script("train_conversation.py", "--check_data", "--json", *here, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 12
    trained = run_script(
        "train_conversation.py", *here, "--max_steps", "1", "--warmup_steps", "0", "--run_dir", "run", cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    merged = run_script("merge_conversation_model.py", "--run_dir", tmp_path / "run", cwd="/")
    assert merged.returncode == 0, merged.stderr  # from elsewhere, where "base" means nothing


def test_help_needs_no_environment(tmp_path):
    copy = shutil.copytree(
        PROJECT, tmp_path / "project", ignore=shutil.ignore_patterns(".venv", ".git", "training-runs")
    )
    shown = subprocess.run(["./run_conversation_training.sh", "--help"], cwd=copy, capture_output=True, text=True)
    assert shown.returncode == 0 and "--learning_rate" in shown.stdout and not (copy / ".venv").exists()


EVERY_SETTING_CHANGED = TrainingConfig(
    base_model="some/model",
    training_data="a folder/with spaces",
    domains="programming,systems",
    reasoning="restate",
    loss_on="all",
    held_out_share=0.25,
    num_train_epochs=1.5,
    max_steps=17,
    learning_rate=3.3e-5,
    lr_scheduler_type="polynomial",
    warmup_steps=3,
    weight_decay=0.01,
    max_grad_norm=0.5,
    step="plain",
    answers="first",
    frozen_weights="float32",
    report_to="tensorboard",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=3,
    max_length=999,
    lora_r=4,
    lora_alpha=7,
    lora_dropout=0.125,
    logging_steps=2,
    save_steps=9,
    seed=7,
)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TrainingConfig(), "train_conversation.py"),
        (TrainingConfig(**RECIPES["demo"]), "train_conversation.py --demo"),
        (TrainingConfig(**{**RECIPES["demo"], "max_steps": -1}), "train_conversation.py --demo --max_steps -1"),
        (EVERY_SETTING_CHANGED, "train_conversation.py --demo --base_model some/model"),
        (replace(EVERY_SETTING_CHANGED, training_data="-odd name"), "--training_data=-odd name"),
    ],
)
def test_the_command_that_repeats_a_run_gives_its_settings_back(config, words):
    defaults = TrainingConfig()
    if config is EVERY_SETTING_CHANGED:
        assert all(getattr(config, spec.name) != getattr(defaults, spec.name) for spec in fields(config))
    command = shlex.split(command_that_repeats(some_record(config=config)))
    parser = CommandLine()
    add_training_flags(parser)
    assert words in " ".join(command)
    assert resolve_settings(parser.parse_args(command[command.index("train_conversation.py") + 1 :])) == config
    published = shlex.split(command_that_repeats(some_record(config=config, published="now")))
    assert published[0] == "./RETRAIN.sh"
    assert resolve_settings(parser.parse_args(published[1:])) == config


def test_a_recipe_given_to_a_resumed_run_is_compared_like_any_other_setting():
    parser = CommandLine()
    add_training_flags(parser)
    demo = TrainingConfig(**RECIPES["demo"])
    assert resolve_settings(parser.parse_args(["--demo"]), demo) == demo
    assert resolve_settings(parser.parse_args([]), demo) == demo
    changed = resolve_settings(parser.parse_args(["--demo"]), TrainingConfig(learning_rate=2e-5, seed=7))
    assert changed == replace(demo, seed=7)
    assert resolve_settings(parser.parse_args(["--recipe", "original"]), demo) == TrainingConfig()


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_train_epochs", "1e308"],
        ["--lr_scheduler_type", "polynomial", "--learning_rate", "1e-7"],
    ],
)
def test_a_setting_that_the_training_would_choke_on_is_refused_before_anything_is_made(tmp_path, flags):
    done = run_script("train_conversation.py", *flags, "--run_dir", tmp_path / "run")
    assert done.returncode == 2 and flags[0] in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
