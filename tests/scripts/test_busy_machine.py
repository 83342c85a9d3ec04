"""The benchmark of waiting threads: every setting has a process of its own with its variables; loads end."""

import json
import statistics

import psutil
import pytest
from conftest import run_script

from benchmarks import busy_machine


@pytest.mark.slow
def test_settings_take_turns_and_ratios_are_of_one_round(tiny_folder, small_data):
    flags = ["--base_model", tiny_folder, "--training_data", small_data, "--settings", "unset,passive,one-thread"]
    flags += ["--loads", "0,1", "--rounds", 2, "--tokens", 3, "--json"]
    done = run_script("benchmarks/busy_machine.py", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for task in ("generation", "training"):
        for load in ("0", "1"):
            found = report["seconds"][task][load]
            assert list(found) == ["unset", "passive", "one-thread"] and all(len(each) == 2 for each in found.values())
            ratio = statistics.median(a / b for a, b in zip(found["passive"], found["unset"], strict=True))
            assert f"{statistics.median(found['passive']):.2f} ({ratio:.2f})" in done.stderr


def test_the_variables_of_a_setting_are_all_that_its_process_has(monkeypatch):
    seen = []
    monkeypatch.setattr(busy_machine.os, "dup2", lambda *_: None)
    monkeypatch.setattr(busy_machine, "generation", lambda args: lambda: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)

    class Connection:
        def send(self, message):
            seen.append({name: busy_machine.os.environ.get(name) for name in busy_machine.VARIABLES})

        def recv(self):
            raise EOFError

    for name in ("unset", "spin-10k"):
        with pytest.raises(EOFError):
            busy_machine.work("generation", name, None, Connection())
    assert seen[0] == dict.fromkeys(busy_machine.VARIABLES)
    assert seen[1] == {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": None}


def test_the_load_is_there_and_ends_with_the_block():
    before = set(psutil.Process().children())
    with busy_machine.busy(2):
        during = set(psutil.Process().children()) - before
        assert [process.cmdline()[-1] for process in during] == [busy_machine.LOAD] * 2
    assert set(psutil.Process().children()) == before
