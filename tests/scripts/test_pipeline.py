"""RETRAIN.sh as a whole, on a tiny model that learns the format within the run and passes the three tests honestly."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import LEARNS, PROJECT, TOOLS, lay_into_hub_cache, make_home
from ports import port_for_later
from scripts_at_work import until

LEARNS_NOT = "--max_steps 2 --learning_rate 1e-5".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_folder, own_examples):
    """A copy of the project with easy data, and a hub cache with the base."""
    folder = make_home(tmp_path_factory.mktemp("home") / "project", own_examples)
    lay_into_hub_cache(folder / "hf", tiny_folder)
    return folder


def retrain(home: Path, *flags: str, base: str | None = None):
    command = ["./RETRAIN.sh", "--training_data", "easy.jsonl", *flags]
    env = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=home, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def published(home):
    done = retrain(home, *LEARNS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_the_default_model_is_trained_merged_tested_and_published(home, published):
    stages = re.findall(r"^\[(\d)/6\]", published.stdout, re.M)
    assert stages == ["1", "2", "3", "4", "5", "6"]
    assert "3 of 3 structural tests passed" in published.stdout
    assert "Held out:  " in published.stderr and re.search(r"Report:    \S+/report.md\n$", published.stdout)
    runs = home / "training-runs" / "conversation"
    run = runs / os.readlink(runs / "latest")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", run.name)
    names = {path.name for path in run.iterdir()}
    assert names >= {"training_data.jsonl", "checkpoints", "merged_model_fp32", "run.json", "metrics.jsonl"}
    assert names >= {"loss_curve.png", "structural_tests.json", "report.md", "console.log"}
    tests = json.loads((run / "structural_tests.json").read_text())
    assert tests["passed"] and [test["passed"] for test in tests["tests"]] == [True] * 3
    assert json.loads((run / "run.json").read_text())["base_model"]["name"] == "google/functiongemma-270m-it"
    report = (run / "report.md").read_text()
    assert all(test["output"] in report for test in tests["tests"]) and "./RETRAIN.sh --training_data" in report
    assert not [path for path in (runs / "attempts").iterdir() if path.is_dir()]


def test_the_merged_folder_serves_on_its_own_as_the_readme_says(home, published, tmp_path):
    merged = home / "training-runs" / "conversation" / "latest" / "merged_model_fp32"
    shutil.copytree(merged, tmp_path / "elsewhere")
    readme = (PROJECT / "docs" / "python.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "apply_chat_template" in block)
    code = code.replace("training-runs/conversation/latest/merged_model_fp32", str(tmp_path / "elsewhere"))
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from conversation.format.parser import parse_answer

    parse_answer(done.stdout.strip())  # raises unless the answer is valid


@pytest.mark.slow
def test_transformers_serve_answers_an_openai_client_with_tool_calls(home, published):
    from openai import OpenAI

    merged = home / "training-runs" / "conversation" / "latest" / "merged_model_fp32"
    port = port_for_later()
    command = [Path(sys.executable).with_name("transformers"), "serve", merged, "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(
        [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        until(lambda: server.poll() is not None or is_up(port), seconds=300)
        assert server.poll() is None, server.stdout.read().decode()
        for question in ("What's red?", "What's <end_of_turn>?"):
            messages = [{"role": "user", "content": question}]
            reply = client.chat.completions.create(model=str(merged), messages=messages, tools=TOOLS, temperature=0)
            choice = reply.choices[0]
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
            assert [name for name, _ in calls] == ["add_text"] + ["add_choice"] * 3, reply
            assert calls[0][1] == {"content": "It depends."}
            assert [arguments["confidence"] for _, arguments in calls[1:]] == [0.61, 0.25, 0.08]
            assert choice.finish_reason == "tool_calls" and not choice.message.content
    finally:
        server.kill()
        server.wait()


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_a_run_that_fails_its_tests_is_not_published_and_says_where(home, published):
    runs = home / "training-runs" / "conversation"
    before = os.readlink(runs / "latest"), (runs / "latest" / "run.json").read_bytes()
    done = retrain(home, *LEARNS_NOT)
    assert done.returncode == 1
    assert "FAILED" in done.stdout and "⟦stops being valid here⟧" in done.stdout
    assert "Earlier published runs are untouched" in done.stderr
    assert before == (os.readlink(runs / "latest"), (runs / "latest" / "run.json").read_bytes())
    (attempt,) = [path for path in (runs / "attempts").iterdir() if path.is_dir()]
    assert "FAILED" in (attempt / "console.log").read_text() and "FAILED" in (attempt / "report.md").read_text()


def test_bad_data_stops_before_anything_is_touched(home):
    runs = home / "training-runs" / "conversation"
    attempts = sorted(path.name for path in (runs / "attempts").iterdir())
    done = retrain(home, "--training_data", "absent.jsonl")
    assert done.returncode == 2 and "no training data at absent.jsonl" in done.stderr
    assert sorted(path.name for path in (runs / "attempts").iterdir()) == attempts
