"""Two machines train one run, as docs/machines.md says: here two network namespaces with an address each."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROJECT, make_home
from safetensors.torch import load_file
from scripts_at_work import adapters
from test_training import FLAGS, ONE_THREAD, train

from conversation.runs.folder import RunFolder
from conversation.training.checkpoints import newest_intact_checkpoint

pytestmark = pytest.mark.slow

PAGE = (PROJECT / "docs" / "machines.md").read_text(encoding="utf-8")
CONFIGS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"```\n(\.venv/bin/accelerate .*?)\n```", PAGE, re.DOTALL)
(FIRST,) = set(re.findall(r"main_process_ip: (\S+)", PAGE))
ADDRESSES = [FIRST, f"{FIRST.rpartition('.')[0]}.200"]
LONGEST = 900  # seconds, on a machine that has other work


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())


class Machine:
    """A network namespace with an address, a cable to the other one, and a checkout of its own."""

    def __init__(self, number, home):
        self.number, self.home, self.name = number, home, f"machine{number}-{os.getpid()}"
        self.cable = f"cable{number}"
        config = CONFIGS[number]  # word for word on the first machine; on the other as for one without cards
        (home / f"host{number}.yaml").write_text(
            config.replace("use_cpu: false", "use_cpu: true") if number else config
        )
        accelerate = home / ".venv" / "bin" / "accelerate"
        accelerate.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m accelerate.commands.accelerate_cli "$@"\n')
        accelerate.chmod(0o755)

    def launch(self, *flags):
        """Type the command of the page, and more flags."""
        with open(self.home / "output", "w") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, "sh", "-c", f'{COMMANDS[self.number]} "$@"', "sh", *map(str, flags)],
                cwd=self.home,
                env={**os.environ, **ONE_THREAD},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self):
        return (self.home / "output").read_text(errors="replace")

    def cut(self, how="down"):
        ip("-n", self.name, "link", "set", self.cable, how)


@pytest.fixture(scope="module")
def machines(tmp_path_factory, own_examples):
    folder = tmp_path_factory.mktemp("machines")
    found = [Machine(number, make_home(folder / f"{number}" / "project", own_examples)) for number in (0, 1)]
    made = []
    try:
        for machine in found:
            ip("netns", "add", machine.name)
            made.append(machine)
        ends = [["netns", machine.name, "name", machine.cable] for machine in found]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for machine, address in zip(found, ADDRESSES, strict=True):
            ip("-n", machine.name, "addr", "add", f"{address}/24", "dev", machine.cable)
            ip("-n", machine.name, "link", "set", "lo", "up")
            machine.cut("up")
    except OSError as error:
        pytest.skip(f"needs root and iproute2, to make two network namespaces with a cable between them: {error}")
    else:
        yield found
    finally:
        for machine in made:
            ip("netns", "delete", machine.name)


@contextlib.contextmanager
def launched(machines, *flags):
    """The commands at work on the machines. What is left of them at the end is killed."""
    running = [machine.launch(*flags) for machine in machines]
    try:
        yield running
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(running, seconds=LONGEST):
    until = time.monotonic() + seconds
    return [process.wait(max(1, until - time.monotonic())) for process in running]


def run_of(machine):
    (found,) = (machine.home / "training-runs" / "conversation").glob("20*")
    return RunFolder(found)


@pytest.fixture(scope="module")
def flags(tiny_folder, easy_data):
    """What makes the training of the page a tiny one."""
    tiny = ["--base_model", tiny_folder, "--training_data", easy_data, *FLAGS, "--logging_steps", "1"]
    return [*tiny, "--gradient_accumulation_steps", "4", "--lora_dropout", "0"]


@pytest.fixture(scope="module")
def together(machines, flags):
    """The run of both machines, on the first."""
    with launched(machines, *flags) as running:
        assert wait_for(running) == [0, 0], [machine.output[-3000:] for machine in machines]
    return run_of(machines[0])


def test_two_machines_train_what_one_process_trains(machines, together, flags, tiny_folder, easy_data, tmp_path):
    one = train(tmp_path / "one", tiny_folder, easy_data, *flags, "--gradient_accumulation_steps", "8")
    assert one.returncode == 0, one.stderr
    whole, halves = (
        load_file(run.final_lora / "adapter_model.safetensors") for run in (RunFolder(tmp_path / "one"), together)
    )
    for name, tensor in whole.items():
        assert torch.allclose(tensor, halves[name], rtol=1e-3, atol=2e-5), name
    losses = [[e["loss"] for e in run.read_metrics() if "loss" in e] for run in (RunFolder(tmp_path / "one"), together)]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert together.read().processes == 2
    assert not (machines[1].home / "training-runs").exists()  # no common disk, and nothing on the second


def test_a_cable_that_is_cut_ends_both_within_a_minute_and_resumed_they_train_the_same(
    machines, together, flags, tmp_path
):
    run = RunFolder(tmp_path / "run")
    more = [*flags, "--run_dir", run.path]
    try:
        with launched(machines, *more) as running:
            until = time.monotonic() + LONGEST
            while not newest_intact_checkpoint(run.checkpoints)[0]:
                assert time.monotonic() < until and all(each.poll() is None for each in running), machines[0].output
                time.sleep(0.01)
            machines[1].cut()
            cut = time.monotonic()
            assert wait_for(running, 120) == [1, 1]
            assert time.monotonic() - cut < 60 + 15  # the launchers need a while of their own
    finally:
        machines[1].cut("up")
    for number, machine in enumerate(machines):
        sentence = rf"error: process {1 - number} of 2 \(host \S+\) is lost: its host no longer answers"
        assert re.search(sentence, machine.output), machine.output[-3000:]
    assert "is lost: its host no longer answers" in run.console_log.read_text()
    checkpoint, problems = newest_intact_checkpoint(run.checkpoints)
    assert checkpoint and not problems
    with launched(machines, *more, "--resume") as running:
        assert wait_for(running) == [0, 0], [machine.output[-3000:] for machine in machines]
    assert f"Resuming from {checkpoint.name}." in machines[0].output and adapters(run.path) == adapters(together.path)


def test_a_machine_that_does_not_come_is_missed_in_a_minute(machines, flags, tmp_path):
    sentences = (
        r"Timed out after 5\d seconds waiting for clients. 1/2 clients joined",
        rf"timed out after 20000ms while trying to connect to .*{re.escape(FIRST)}",
    )
    for machine, words in zip(machines, sentences, strict=True):
        with launched([machine], *flags, "--run_dir", tmp_path / "run") as running:
            assert wait_for(running) == [1]
        assert re.search(words, machine.output.splitlines()[-1]), machine.output[-3000:]
    assert not (tmp_path / "run").exists()
