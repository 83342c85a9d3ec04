"""The device: named with its reason; a card that torch cannot use is a sentence with both versions and the remedy."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT

from conversation.errors import UserError
from conversation.models import device

GTX = "NVIDIA GeForce GTX 1660 SUPER, 535.54.03, 7.5"
PASCAL = "NVIDIA GeForce GTX 1060, 580.65.06, 6.1"
BLACKWELL = "NVIDIA GeForce RTX 5090, 570.10, 12.0"
HEADER = "| NVIDIA-SMI {driver}      Driver Version: {driver}      CUDA Version: {cuda}  |\n"
ALL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets what torch and nvidia-smi say of a machine's cards."""
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(device, "_trace_of_a_card", lambda: "")

    def pretend(smi="", cuda="", version="2.13.0+cu130", build="13.0", available=False, archs=ALL):
        program = tmp_path / "bin" / "nvidia-smi"
        header = HEADER.format(driver=smi.split(", ")[1], cuda=cuda) if smi else ""
        answer = f'case "$*" in *query*) echo "{smi}" ;; *) echo "{header}" ;; esac' if smi else "exit 9"
        program.write_text(f"#!/bin/sh\n{answer}\n")
        program.chmod(0o755)
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)

    return pretend


def refusal(wanted=None) -> tuple[str, str]:
    with pytest.raises(UserError) as refused:
        device.choose_device(wanted)
    assert refused.value.exit_status == 2 and "\n" not in str(refused.value)
    return str(refused.value), refused.value.hint


CU126 = ".venv/bin/pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126"
CU130 = CU126.replace("cu126", "cu130")


@pytest.mark.parametrize(
    ("said", "problem", "remedy"),
    [
        (
            {"smi": GTX, "cuda": "12.2"},
            "its driver 535.54.03 supports CUDA 12.2, torch 2.13.0+cu130 needs CUDA 13.0",
            CU126,
        ),
        (
            {"smi": GTX.replace("535.54.03", "470.1"), "cuda": "11.4"},
            "its driver 470.1 supports CUDA 11.4, torch 2.13.0+cu130 needs CUDA 13.0",
            "install a newer driver for the card: this one supports CUDA 11.4, 12 is needed",
        ),
        (
            {"smi": BLACKWELL, "cuda": "12.8"},
            "its driver 570.10 supports CUDA 12.8, torch 2.13.0+cu130 needs CUDA 13.0",
            "install a newer driver for the card, which supports CUDA 13",
        ),
        ({"smi": GTX, "cuda": "13.0", "version": "2.13.0+cpu", "build": None}, "is built without CUDA", CU130),
        ({"smi": GTX, "cuda": "12.2", "version": "2.13.0+cpu", "build": None}, "is built without CUDA", CU126),
        ({"smi": PASCAL, "cuda": "13.0", "version": "2.13.0+cpu", "build": None}, "is built without CUDA", CU126),
        (
            {"smi": PASCAL, "cuda": "13.0"},
            "it has compute capability 6.1, torch 2.13.0+cu130 (CUDA 13.0) is built for 7.5, 8.0, 8.6, 9.0, 10.0, 12.0",
            CU126,
        ),
        ({"smi": GTX, "cuda": "13.0"}, "torch 2.13.0+cu130 (CUDA 13.0) gives no reason; ", "restart the machine"),
    ],
)
def test_a_card_that_torch_cannot_use_is_named_with_both_versions_and_the_remedy(machine, said, problem, remedy):
    machine(**said)
    for wanted in (None, "cuda"):
        message, hint = refusal(wanted)
        assert message.startswith(f"the card {said['smi'].split(',')[0]} cannot be used: ") and problem in message
        assert hint.startswith(remedy) and hint.endswith("--device cpu")
    assert str(device.choose_device("cpu")) == "cpu (as --device says)"


def a_card(monkeypatch, name="NVIDIA H100", error=None, count=1, capability=(9, 0)):
    """Let torch have cards. `error`: what the first computation there raises."""

    def zeros(*shape, device):
        if error:
            raise RuntimeError(error)
        return torch.ones(*shape)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
    monkeypatch.setattr(torch, "zeros", zeros)


def test_a_card_that_computes_is_taken_and_named(machine, monkeypatch):
    machine(available=True)
    a_card(monkeypatch)
    for wanted in (None, "cuda"):
        assert str(device.choose_device(wanted)) == "cuda (NVIDIA H100, torch 2.13.0+cu130)"
    assert device.choose_device("cpu").kind == "cpu"
    a_card(monkeypatch, count=4)
    assert str(device.choose_device(None)) == "cuda (NVIDIA H100, card 0 of 4, torch 2.13.0+cu130)"


def test_a_card_whose_architecture_the_wheel_left_out_is_found_by_trying_it(machine, monkeypatch):
    machine(smi=PASCAL, cuda="12.4", available=True)
    no_kernel = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might"
    a_card(monkeypatch, "NVIDIA GeForce GTX 1060", no_kernel, capability=(6, 1))
    message, hint = refusal()
    assert "compute capability 6.1, torch 2.13.0+cu130 (CUDA 13.0) is built for 7.5" in message
    assert hint.startswith(CU126) and hint.endswith("--device cpu")


@pytest.mark.parametrize("error", ["CUDA out of memory. Tried", "CUDA error: all CUDA-capable devices are busy\nmore"])
def test_a_card_that_fails_otherwise_is_said_with_what_torch_says(machine, monkeypatch, error):
    machine(available=True)
    a_card(monkeypatch, error=error)
    message, hint = refusal()
    assert message == f"the card NVIDIA H100 cannot be used: {error.splitlines()[0]}" and "nvidia-smi" in hint


def test_more_processes_than_cards_are_refused(machine, monkeypatch):
    machine(available=True)
    a_card(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    message, hint = refusal()
    assert message == "2 processes on this machine, but 1 card for them" and "start at most 1 here" in hint


@pytest.mark.parametrize("hidden", ["", "-1", "none"])
def test_a_card_that_is_hidden_on_purpose_is_named_and_the_cpu_works(machine, monkeypatch, hidden):
    machine(smi=GTX, cuda="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    expected = f"cpu (CUDA_VISIBLE_DEVICES={hidden} hides the card NVIDIA GeForce GTX 1660 SUPER)"
    assert str(device.choose_device(None)) == expected
    message, hint = refusal("cuda")
    assert f"CUDA_VISIBLE_DEVICES={hidden} hides it" in message and hint.startswith("unset CUDA_VISIBLE_DEVICES")


def test_a_variable_that_names_no_card_of_this_machine_is_refused(machine, monkeypatch):
    machine(smi=GTX, cuda="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    message, _ = refusal()
    assert message.endswith("GTX 1660 SUPER cannot be used: CUDA_VISIBLE_DEVICES=7 hides it")


@pytest.mark.parametrize("variable", ["0", "0,7", "GPU-8d2a7c1e"])
def test_a_variable_that_hides_no_card_is_not_blamed_for_what_the_driver_lacks(machine, monkeypatch, variable):
    machine(smi=GTX, cuda="12.2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    message, hint = refusal()
    assert "supports CUDA 12.2, torch 2.13.0+cu130 needs CUDA 13.0" in message and hint.startswith(CU126)


def test_accelerates_word_for_the_cpu_counts_and_does_not_go_with_the_other(machine, monkeypatch):
    machine(available=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert str(device.choose_device(None)) == "cpu (as ACCELERATE_USE_CPU says)"
    assert "ACCELERATE_USE_CPU asks for the CPU" in refusal("cuda")[0]


def test_without_a_card_the_cpu_is_taken_and_cuda_refused(machine):
    machine()
    assert str(device.choose_device(None)) == "cpu (no card that CUDA can use)"
    assert refusal("cuda")[0] == "--device cuda, but there is no card that CUDA can use"


def test_a_card_without_a_driver_is_said(machine, monkeypatch, tmp_path):
    monkeypatch.undo()
    driver, pci = tmp_path / "driver", tmp_path / "pci"
    for name, vendor, kind in (("0000:00:02.0", "0x8086", "0x030000"), ("0000:01:00.0", "0x10de", "0x030200")):
        (pci / name).mkdir(parents=True)
        (pci / name / "vendor").write_text(vendor + "\n")
        (pci / name / "class").write_text(kind + "\n")
    trace = device._trace_of_a_card(driver, pci)
    assert trace == "there is an NVIDIA card at 0000:01:00.0, but no driver for it here"
    (pci / "0000:01:00.0" / "class").write_text("0x040300\n")  # its sound device
    assert device._trace_of_a_card(driver, pci) == ""
    (driver / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert "nvidia-smi, of its driver, fails" in device._trace_of_a_card(driver, pci)


@pytest.mark.parametrize("answer", ["exit 1", "sleep 60", "echo nonsense", "printf '\\377\\n'", "echo 'a, b'"])
def test_whatever_nvidia_smi_does_there_is_no_traceback(machine, monkeypatch, tmp_path, answer):
    machine()
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nexec {answer}\n")
    plain = subprocess.run
    monkeypatch.setattr(device.subprocess, "run", lambda *a, **o: plain(*a, **{**o, "timeout": 0.2}))
    assert device.choose_device(None).kind == "cpu"


PRETEND = "import sys; sys.path.insert(0, {project!r}); import torch; torch.__version__ = '2.13.0+cu130'; "
PRETEND += "torch.cuda.is_available = lambda: False; "
PRETEND += "torch.version.cuda = '13.0'; sys.argv = ['{script}', *sys.argv[1:]]; import runpy; "
PRETEND += "runpy.run_path({project!r} + '/{script}', run_name='__main__')"


def test_training_refuses_before_it_reads_anything_and_device_decides(tmp_path, tiny_folder, easy_data):
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$*" in *query*) echo "{GTX}" ;; *) echo "CUDA Version: 12.2" ;; esac\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    flags = ["--base_model", tiny_folder, "--training_data", easy_data, "--max_steps", "1", "--warmup_steps", "0"]

    def run(script, *more):
        code = PRETEND.format(project=str(PROJECT), script=f"{script}_conversation{'_model' * (script != 'train')}.py")
        command = [sys.executable, "-c", code, "--run_dir", str(tmp_path / "run"), *map(str, more)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    refused = run("train", *flags)
    assert refused.returncode == 2 and refused.stderr.startswith("error: the card NVIDIA GeForce GTX 1660"), refused
    assert "supports CUDA 12.2, torch 2.13.0+cu130 needs CUDA 13.0" in refused.stderr
    assert not (tmp_path / "run").exists()
    trained = run("train", *flags, "--device", "cpu")
    assert trained.returncode == 0, trained.stderr
    assert "Device: cpu (as --device says)" in trained.stdout
    assert "Device: cpu (as --device says)" in (tmp_path / "run" / "console.log").read_text()
    assert "device: cpu (as --device says)" in (tmp_path / "run" / "report.md").read_text()
    merged = run("merge", "--device", "cpu")
    assert merged.returncode == 0 and "Device: cpu (as --device says)" in merged.stdout, merged.stderr
    for script in ("test", "evaluate"):
        for more in ([], ["--device", "cuda"]):
            refused = run(script, *more)
            assert refused.returncode == 2 and "error: the card NVIDIA GeForce GTX 1660" in refused.stderr, refused
    assert {path.name for path in (tmp_path / "run").glob("*.json")} == {"run.json"}
