"""Which flags of RETRAIN.sh reach which stage, and what a stage that refuses does to the run."""

import re

import pytest
from conftest import run_script
from test_shell import FAKE_PYTHON, Checkout


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "checkout")


def test_a_refused_export_is_published_all_the_same_and_a_wrong_type_stops_before_the_training(checkout):
    python = checkout.folder / ".venv" / "bin" / "python"
    refusal = 'case "$*" in *--check) ;; *export_conv*) exit 1 ;; esac\n'
    python.write_text(FAKE_PYTHON.replace('case "$*"', f'{refusal}case "$*"', 1))
    done = checkout.run("./RETRAIN.sh", "--export", "q4_k_m")
    assert done.returncode == 1 and "publish" in checkout.calls.read_text().splitlines()[-1], done.stderr
    python.write_text(FAKE_PYTHON.replace('case "$*"', 'case "$*" in *--check) exit 2 ;; esac\ncase "$*"', 1))
    checkout.calls.unlink()
    done = checkout.run("./RETRAIN.sh", "--export", "q3")
    assert done.returncode == 2 and "train_conversation" not in checkout.calls.read_text()


def test_the_device_is_handed_to_every_stage_and_each_takes_it(checkout):
    done = checkout.run("./RETRAIN.sh", "--device", "cpu", "--export", "q8_0")
    assert done.returncode == 0, done.stderr
    calls = [line for line in checkout.calls.read_text().splitlines() if "--check" not in line]
    scripts = [match[1] for line in calls if (match := re.match(r".*/(\w+\.py) .*--device=cpu", line))]
    assert len(scripts) == 5 and scripts[-1] == "export_conversation_model.py"
    for script in scripts:
        assert "--device {cpu,cuda}" in run_script(script, "--help").stdout, script
