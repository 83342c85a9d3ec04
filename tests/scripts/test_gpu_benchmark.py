"""A GPU's figures in one command: on a CPU and a tiny model here, without what a bare machine lacks."""

import json

import pytest
from conftest import run_script

from benchmarks import gpu, random_base
from benchmarks.training_step import ANSWER_TOKENS, EXAMPLES, SHARED_TOKENS, random_token_batches
from conversation.models.stand_in import STAND_IN_PARAMETERS
from conversation.training.prefix_tree import build_prefix_tree

ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in NAMES:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in NAMES else real(name, package)
"""
BARE = ("trl", "datasets", "gguf", "jsonschema", "pydantic", "playwright", "starlette", "uvicorn", "xllamacpp")


@pytest.fixture
def without(tmp_path):
    """The environment of a Python that lacks some packages."""

    def make(*names: str) -> dict[str, str]:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(f"NAMES = {names!r}\n{ABSENT}")
        return {"PYTHONPATH": str(folder)}

    return make


def run_gpu(*flags, **options):
    return run_script("benchmarks/gpu.py", *flags, **options)


@pytest.mark.slow
def test_the_whole_runs_on_a_bare_machine_and_leaves_a_table_and_json(tmp_path, without):
    out = tmp_path / "out"
    done = run_gpu("--device", "cpu", "--tiny", "--out", out, env=without(*BARE))
    log = (out / "log.txt").read_text() if (out / "log.txt").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    report, shown = json.loads((out / "report.json").read_text()), (out / "report.md").read_text()
    assert report["missing"] == ["trl", "datasets"] and "Not installed: trl, datasets" in shown
    found = {result["name"]: result["found"] for result in report["results"]}
    steps = [found[name] for name in found if name.startswith("step")]
    assert len(steps) == 3 and all(each["variants"]["ours"]["gradient_difference"] < 1e-4 for each in steps)
    assert shown.count("| ours: each shared token once | ") == 3
    plans = {name: each for name, each in found.items() if name.startswith("memory plan")}
    assert len(plans) == 4 and all(
        each["plan_gb"] / each["peak_gb"] == pytest.approx(1, abs=0.3) for each in plans.values()
    )
    assert [each["plan"]["frozen_weights"] for each in plans.values()].count("bfloat16") == 1
    assert "passed" in found["tests of the step"] and "no figure here is one of a GPU" in shown


def test_what_it_cannot_do_without_is_named_before_anything_is_made(tmp_path, without):
    done = run_gpu("--device", "cpu", "--out", tmp_path / "out", env=without("peft", "accelerate"))
    assert done.returncode == 2 and "lacks peft, accelerate" in done.stderr and "hint: install" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_card_it_says_so(tmp_path):
    done = run_gpu("--out", tmp_path / "out", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "no card that CUDA can use" in done.stderr and "--device cpu --tiny" in done.stderr


def test_a_stage_that_fails_or_takes_too_long_is_said_and_ends_with_its_processes(tmp_path):
    with open(tmp_path / "log", "w+") as log:
        failed = gpu.run(gpu.Stage("one", ["-c", "print('half'); raise SystemExit(3)"], 1), 60, "cpu", log)
        child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
        late = gpu.run(gpu.Stage("two", ["-c", child], 1), 2, "cpu", log)
        never = gpu.run(gpu.Stage("three", ["-c", ""], 1), 0.5, "cpu", log)
    assert (failed.problem, failed.found) == ("ended with status 3: see log.txt", "half")
    assert late.problem == "stopped after 2 s: its time was over" and late.seconds < 30
    assert never.problem == "no time was left"
    machine = {"card": "a card", "memory_gb": 6.0, "torch": "2"}
    shown = gpu.to_markdown(gpu.Report("today", "cuda", machine, [], [failed, late, never]))
    assert "one: ended with status 3" in shown and "three: no time was left." in shown


def test_the_random_base_has_the_shape_of_gemma_3_270m():
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    with torch.device("meta"):
        model = Gemma3ForCausalLM(Gemma3TextConfig(**random_base.GEMMA_3_270M, tie_word_embeddings=True))
    assert model.num_parameters() == STAND_IN_PARAMETERS
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}


def test_batches_of_random_tokens_are_as_large_as_ours(tiny_folder):
    batches = random_token_batches(tiny_folder, gpu.OURS_TOKENS, 2, seed=0)
    assert batches != random_token_batches(tiny_folder, gpu.OURS_TOKENS, 2, seed=1)
    tree = build_prefix_tree(batches[1])
    counts = (tree.num_sequence_tokens, tree.num_tokens, tree.num_labels)
    assert counts == pytest.approx((3881, 2722, 1671), rel=0.01)  # of the table in benchmarks/README.md
    assert len(batches[0]) == EXAMPLES and SHARED_TOKENS + ANSWER_TOKENS < gpu.OURS_TOKENS
    short = random_token_batches(tiny_folder, 48, 1, seed=0)[0]
    assert all(len(each.ids) == 48 and sum(each.is_label) == 24 for each in short)
