"""Training on a tiny Gemma 3: what it learns, logs, saves and refuses."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import PROJECT, current_umask, easy_lines, make_home, run_script
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from conversation.data.examples import to_jsonl
from conversation.errors import UserError
from conversation.format.calls import Example, Prompt
from conversation.models import tokenizer
from conversation.models.tokenizer import EncodedExample
from conversation.runs.files import sha256_file
from conversation.runs.folder import RunFolder
from conversation.training.checkpoints import newest_intact_checkpoint
from conversation.training.prefix_tree import TokenSequence
from conversation.training.preparation import prepare
from conversation.training.training_set import token_sequence
from conversation_config import TrainingConfig

FLAGS = (
    "--learning_rate 3e-3 --warmup_steps 2 --logging_steps 2 --save_steps 3 --max_steps 8 --held_out_share 0.2".split()
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # so that two runs add in the same order


def train(run_dir, base, data, *flags, **options):
    done = run_script(
        *("train_conversation.py", "--base_model", base, "--training_data", data, "--run_dir", run_dir, *FLAGS, *flags),
        env=ONE_THREAD,
        **options,
    )
    return done


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory, tiny_folder, easy_data):
    run = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    done = train(run.path, tiny_folder, easy_data)
    assert done.returncode == 0, done.stderr
    return run


def test_training_lowers_the_training_and_the_held_out_loss(eight_steps):
    result = eight_steps.read().training
    assert result.last_window_loss < 0.8 * result.first_window_loss
    assert result.held_out_loss < 0.9 * result.held_out_loss_before


def test_the_logged_loss_is_that_of_its_window_and_the_final_one_that_of_the_last(eight_steps):
    windows = [entry for entry in eight_steps.read_metrics() if "loss" in entry]
    assert [entry["step"] for entry in windows] == [2, 4, 6, 8]
    assert eight_steps.read().training.last_window_loss == windows[-1]["loss"]
    assert all(entry["loss"] > 0 and math.isfinite(entry["grad_norm"]) for entry in windows)


def test_a_windows_loss_is_the_mean_of_its_steps_and_of_no_others(eight_steps, tmp_path, tiny_folder, easy_data):
    done = train(tmp_path / "run", tiny_folder, easy_data, "--logging_steps", "1")
    assert done.returncode == 0, done.stderr
    steps = [entry["loss"] for entry in RunFolder(tmp_path / "run").read_metrics() if "loss" in entry]
    windows = [entry["loss"] for entry in eight_steps.read_metrics() if "loss" in entry]
    assert windows == pytest.approx([(a + b) / 2 for a, b in zip(steps[::2], steps[1::2], strict=True)], rel=1e-4)
    assert len(set(steps)) == 8


def test_the_run_folder_holds_what_the_run_was(eight_steps, easy_data):
    record = eight_steps.read()
    lines = eight_steps.training_data.read_bytes() + eight_steps.held_out_data.read_bytes()
    assert sorted(lines.splitlines()) == sorted(easy_data.read_bytes().splitlines())
    assert record.data.training_sha256 == sha256_file(eight_steps.training_data)
    assert record.config.learning_rate == 3e-3 and record.config.max_steps == 8
    assert record.environment.versions["torch"] and record.environment.machine["cores"]
    assert len(record.base_model.tokenizer_fingerprint) == 64
    assert (
        eight_steps.loss_curve.read_bytes().startswith(b"\x89PNG")
        and "# Training run" in eight_steps.report.read_text()
    )
    assert "held-out loss after step 8" in eight_steps.console_log.read_text()


def test_the_memory_plan_is_printed_kept_and_near_the_peak(eight_steps):
    result = eight_steps.read().training
    plan, log = result.memory_plan, eight_steps.console_log.read_text()
    assert str(plan) in log and log.index("Memory plan") < log.index("Trained 8 steps") and "the plan was" in log
    assert plan.frozen_weights == "float32" and plan.total / 1e9 == pytest.approx(result.peak_memory_gb, rel=0.15)


def test_at_most_three_checkpoints_remain_each_with_its_hashes(tmp_path, tiny_folder, easy_data):
    assert train(tmp_path / "run", tiny_folder, easy_data, "--save_steps", "1").returncode == 0
    found = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert [path.name for path in found] == ["checkpoint-6", "checkpoint-7", "checkpoint-8"]
    assert newest_intact_checkpoint(tmp_path / "run" / "checkpoints") == (found[-1], [])


def test_the_adapters_are_fp32_on_every_projection(eight_steps):

    adapters = load_file(eight_steps.final_lora / "adapter_model.safetensors")
    assert len(adapters) == 4 * 7 * 2  # layers, projections, two factors
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}


def test_a_second_run_does_not_eat_the_first(eight_steps, tiny_folder, easy_data):
    before = sha256_file(eight_steps.run_json)
    done = train(eight_steps.path, tiny_folder, easy_data)
    assert done.returncode == 2 and "already contains a run" in done.stderr
    assert sha256_file(eight_steps.run_json) == before


def test_the_loss_counts_the_answer_or_everything_but_the_first_token():
    encoded = EncodedExample((1, 5, 6, 7, 8), num_prompt_tokens=3)
    assert token_sequence(encoded, "completion") == TokenSequence(encoded.ids, (False, False, False, True, True))
    assert token_sequence(encoded, "all") == TokenSequence(encoded.ids, (False, True, True, True, True))


def test_a_training_that_can_change_nothing_is_refused_and_one_that_only_warms_up_says_so(
    tmp_path, tiny_folder, easy_data
):
    done = train(tmp_path / "run", tiny_folder, easy_data, "--max_steps", "1")
    assert done.returncode == 2 and "a training of 1 steps would change nothing" in done.stderr, done.stderr
    assert "--warmup_steps 0" in done.stderr and not (tmp_path / "run").exists()
    done = train(tmp_path / "run", tiny_folder, easy_data, "--max_steps", "2", "--learning_rate", "1e-300")
    assert "the warm-up of 2 steps fills the run of 2" in done.stderr
    assert done.returncode == 1 and "error: the training changed nothing" in done.stderr, done.stderr


def test_what_a_training_writes_others_may_read_as_the_umask_says(eight_steps):
    files = [path for path in eight_steps.path.rglob("*") if path.is_file()]
    wrong = [path.name for path in files if path.stat().st_mode & 0o777 != 0o666 & ~current_umask()]
    assert any(path.name == "adapter_model.safetensors" for path in files) and wrong == []


def test_an_example_that_is_too_long_is_named_and_nothing_is_written(tmp_path, tiny_folder, easy_data):
    done = train(tmp_path / "run", tiny_folder, easy_data, "--max_length", "50")
    assert done.returncode == 2 and "the training data has 36 problems" in done.stderr
    assert f'{easy_data}:1, which asks "What\'s red?": ' in done.stderr and " tokens, more than 50\n" in done.stderr
    assert "and 16 more" in done.stderr and "raise --max_length" in done.stderr
    assert not (tmp_path / "run").exists()


def test_whatever_is_wrong_with_the_data_is_listed_at_once_by_line_and_by_node(tmp_path, tiny_folder):
    """A line that is no example, one that the tokenizer does not give back, and one that is too long."""
    long, plain = easy_lines()[2], easy_lines()[0]
    limit = len(tokenizer.encode_example(tokenizer.load_tokenizer(tiny_folder), long)) - 1
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, content["normalizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    data = tmp_path / "mine.jsonl"
    apart = Example(Prompt("Cafe\u0301?"), plain.answer)
    data.write_bytes(to_jsonl([plain]) + b"{}\n" + to_jsonl([long, apart]))
    config = TrainingConfig(base_model=str(folder), training_data=str(data), max_length=limit)
    with pytest.raises(UserError) as refused:
        prepare(config)
    head, *problems = str(refused.value).splitlines()
    assert head == "the training data has 3 problems:"
    assert problems[0] == f"  {data}:2: the object has no `text`, and no `messages` or `prompt`"
    assert problems[1] == f"  {data}:3, which asks {long.prompt.question!r}: {limit + 1} tokens, more than {limit}"
    assert problems[2].startswith(f"  {data}:4, which asks ") and "the text is not in NFC" in problems[2]
    assert "data/README.md" in refused.value.hint and "--max_length" in refused.value.hint
    trees = PROJECT / "data" / "conversation_trees"
    with pytest.raises(UserError, match=r"the training data has \d+ problems") as refused:
        prepare(replace(config, training_data=str(trees), domains="philosophy", max_length=300))
    assert re.match(
        rf"  {re.escape(str(trees))}/philosophy/\w+\.json, node \w+, which asks", str(refused.value).splitlines()[1]
    )
    with pytest.raises(UserError, match=r"1 of 4 lines cannot be used"):  # nothing else is wrong with the rest
        data.write_bytes(to_jsonl([plain]) + b"{}\n" + to_jsonl(easy_lines()[3:5]))
        prepare(replace(config, max_length=2048))
    with pytest.raises(UserError, match=r"1 of 4 lines cannot be used"):  # the nearer problem of two
        prepare(replace(config, base_model="./nowhere"))


def test_check_data_prints_the_statistics_and_trains_nothing(tmp_path, tiny_folder, easy_data):
    flags = ["--check_data", "--base_model", tiny_folder, "--training_data", easy_data, "--run_dir", tmp_path / "run"]
    shown = run_script("train_conversation.py", *flags)
    assert shown.returncode == 0 and "fix mistral regex" in shown.stdout
    counted = json.loads(run_script("train_conversation.py", *flags, "--json").stdout)
    assert counted["examples"] == 36 and counted["add_choice_calls"] == 108 and counted["duplicates"] == 0
    assert counted["token_lengths"]["min"] <= counted["token_lengths"]["p95"] <= counted["token_lengths"]["max"]
    assert 0 < counted["label_token_share"] < 1 and counted["examples_changed_by_fix_mistral_regex"] == 0
    assert not (tmp_path / "run").exists()


def gpt2(tiny_folder, folder):
    """A model folder of an architecture that the step cannot train."""
    shutil.copytree(tiny_folder, folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=vocabulary)
    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_an_architecture_that_cannot_be_trained_is_refused_before_earlier_attempts_are_cleaned(
    tmp_path, tiny_folder, own_examples
):
    home = make_home(tmp_path / "home", own_examples)
    earlier = home / "training-runs" / "conversation" / "attempts" / "2026-01-01_00-00-00"
    earlier.mkdir(parents=True)
    (earlier / "console.log").write_text("why it failed")
    flags = ["--attempt", "--base_model", gpt2(tiny_folder, tmp_path / "gpt2"), "--training_data", home / "easy.jsonl"]
    done = subprocess.run(
        [sys.executable, home / "train_conversation.py", *flags], capture_output=True, text=True, cwd=home
    )
    assert done.returncode == 2 and "a GPT2LMHeadModel cannot be trained here" in done.stderr, done.stderr
    assert (earlier / "console.log").read_text() == "why it failed"
    assert [path.name for path in earlier.parent.iterdir()] == [earlier.name]


def test_an_architecture_that_cannot_be_trained_is_refused_and_nothing_stays_on_disk(tmp_path, tiny_folder):
    folder = gpt2(tiny_folder, tmp_path / "gpt2")
    (tmp_path / "data.jsonl").write_bytes(to_jsonl(easy_lines()[:12]))
    flags = ["--base_model", folder, "--training_data", tmp_path / "data.jsonl", "--run_dir", tmp_path / "run"]
    done = run_script("train_conversation.py", *flags)
    assert done.returncode == 2 and "a GPT2LMHeadModel cannot be trained here" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
