"""The real 270M stand-in: audit, a few steps that lower the loss, a verified merge, one generation."""

import json
import subprocess
import sys

import pytest
from conftest import PROJECT, run_script

from conversation.data.examples import to_jsonl
from conversation.models import audit
from conversation.runs.folder import RunFolder

pytestmark = pytest.mark.standin


@pytest.fixture(scope="module")
def trained(tmp_path_factory, standin_folder, own_examples):
    folder = tmp_path_factory.mktemp("standin")
    (folder / "data.jsonl").write_bytes(to_jsonl(own_examples[:20]))
    flags = "--base_model gemma-3-270m --max_steps 4 --warmup_steps 1 --learning_rate 1e-3 --logging_steps 1".split()
    flags += ["--gradient_accumulation_steps", "4", "--held_out_share", "0.4"]
    flags += ["--training_data", str(folder / "data.jsonl")]
    done = run_script("train_conversation.py", *flags, "--run_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    return RunFolder(folder / "run")


def test_every_training_example_comes_back_from_its_ids(standin_folder, own_examples):
    loaded, encoded, audited = audit.audit(standin_folder, own_examples)
    assert audited.changed_by_flag == 0
    assert {t: loaded.convert_tokens_to_ids(t) for t in audit.FUNCTION_GEMMA_IDS} == audit.FUNCTION_GEMMA_IDS
    assert max(map(len, encoded)) <= 2048


def test_a_few_steps_lower_the_loss_from_where_the_base_starts(trained):
    result = trained.read().training
    assert 2 < result.first_window_loss < 4  # 2.8 with the control tokens' start, 5.7 without
    assert result.last_window_loss < result.first_window_loss - 0.3
    assert result.held_out_loss < result.held_out_loss_before - 0.3


def test_the_merge_is_verified_within_the_memory_promised(trained):
    done = run_script("merge_conversation_model.py", "--run_dir", trained.path)
    assert done.returncode == 0, done.stderr
    merge = trained.read().merge
    assert merge.largest_logit_difference < 2e-4 * merge.largest_logit
    assert merge.peak_memory_bytes - memory_of_the_program() < 2.2 * merge.model_bytes


def memory_of_the_program() -> int:
    """What the libraries take before any model is loaded: 0.4 GB with torch's CPU build, 0.7 with CUDA's."""
    imports = "import torch, peft, transformers.models.gemma3; from conversation.runs.machine import peak_memory_bytes"
    command = [sys.executable, "-c", f"{imports}; print(peak_memory_bytes())"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True)
    return int(done.stdout)


def test_an_untrained_model_fails_its_tests(trained, tmp_path):
    """Four steps do not teach the format: a test that passed here could not fail."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "What's polymorphism?"}) + "\n")
    done = run_script("test_conversation_model.py", "--run_dir", trained.path, "--questions", questions)
    assert done.returncode == 1 and "stops being valid here" in done.stdout
    assert json.loads(trained.structural_tests.read_text())["passed"] is False
