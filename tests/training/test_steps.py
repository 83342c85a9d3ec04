"""The two steps: both train the same adapters, and a base that one does not know trains with the other."""

import json
import math
import shutil
from itertools import chain

import pytest
import torch
from conftest import easy_lines
from safetensors.torch import load_file, save_file
from test_processes import two_processes
from test_training import train
from transformers import GraniteConfig, GraniteForCausalLM

from conversation.data.examples import to_jsonl
from conversation.errors import UserError
from conversation.runs.files import write_atomically
from conversation.runs.folder import RunFolder
from conversation.training.batches import MicroBatches, OptimizerStepBatches
from conversation.training.preparation import prepare
from conversation.training.trainer import build_trainable_model, train_adapters
from conversation_config import TrainingConfig

ADAPTERS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def easy_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    path.write_bytes(to_jsonl(easy_lines()))
    return path


@pytest.fixture(scope="module")
def granite(tmp_path_factory, tiny_folder):
    """A base whose logits are scaled: the check of the shared-prefix step refuses it."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("granite") / "base")
    (folder / "model.safetensors").unlink()
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=vocabulary, logits_scaling=0.25, **sizes))
    model.save_pretrained(folder)
    return folder


def train_here(path, base, data, **settings):
    """Train in this process; return the result and the adapters."""
    plain = {"learning_rate": 3e-3, "warmup_steps": 1, "logging_steps": 1, "held_out_share": 0.2, "lora_dropout": 0.0}
    settings = {**plain, "max_steps": 5, **settings}
    config = TrainingConfig(base_model=str(base), training_data=str(data), **settings)
    prepared = prepare(config)
    model = build_trainable_model(prepared.base_folder, config)
    run = RunFolder(path)
    run.create(prepared.record())
    for file in (run.training_data, run.held_out_data):
        write_atomically(file, b"")
    result = train_adapters(model, prepared.tokenizer, prepared.training_set, config, run, None)
    return result, load_file(run.final_lora / ADAPTERS)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_both_steps_train_the_same_adapters_up_to_rounding(tmp_path, tiny_folder, easy_data, loss_on):
    # 29 examples in steps of 8: the epoch ends with a step of 5, and a batch of 3 with one of 2
    shape = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "loss_on": loss_on}
    found = {
        step: train_here(tmp_path / step, tiny_folder, easy_data, step=step, **shape) for step in ("shared", "plain")
    }
    (shared, adapters), (plain, others) = found["shared"], found["plain"]
    assert (shared.step, plain.step) == ("shared", "plain")
    assert adapters.keys() == others.keys() and any(tensor.any() for name, tensor in adapters.items() if "_B" in name)
    for name, tensor in adapters.items():
        assert torch.allclose(tensor, others[name], rtol=1e-3, atol=2e-5), name
    assert plain.held_out_loss == pytest.approx(shared.held_out_loss, rel=1e-4)
    assert plain.held_out_loss_before == pytest.approx(shared.held_out_loss_before, rel=1e-5)
    logs = [[e for e in RunFolder(tmp_path / step).read_metrics() if "loss" in e] for step in ("shared", "plain")]
    for figure in ("loss", "grad_norm", "learning_rate"):  # AdamW would forgive a gradient of another length
        one, other = ([entry[figure] for entry in entries] for entries in logs)
        assert len(one) == 5 and one == pytest.approx(other, rel=1e-3), figure


def test_a_base_that_the_shared_step_does_not_know_trains_with_the_loss_of_trl(tmp_path, granite, easy_data, capsys):
    result, adapters = train_here(tmp_path / "auto", granite, easy_data)
    assert "trains with the loss of TRL" in capsys.readouterr().out
    assert result.step == "plain" and result.last_window_loss < result.first_window_loss
    assert all(tensor.isfinite().all() for tensor in adapters.values())


def test_the_shared_step_asked_for_by_name_is_refused_where_it_would_be_wrong(granite):
    with pytest.raises(UserError, match="the shared-prefix step cannot train a GraniteForCausalLM") as caught:
        build_trainable_model(granite, TrainingConfig(step="shared"))
    assert "leave out --step" in caught.value.hint and caught.value.exit_status == 2


def test_a_model_that_the_shared_step_refuses_is_left_as_it_was(granite):
    before = GraniteForCausalLM.from_pretrained(granite).config._attn_implementation
    model = build_trainable_model(granite, TrainingConfig())
    assert model.get_base_model().config._attn_implementation == before


@pytest.mark.slow
def test_the_plain_step_resumes_where_it_stopped(tmp_path, tiny_folder, easy_data):
    plain = ["--step", "plain", "--save_steps", "3", "--held_out_share", "0"]
    assert train(tmp_path / "whole", tiny_folder, easy_data, *plain, "--max_steps", "5").returncode == 0
    assert train(tmp_path / "run", tiny_folder, easy_data, *plain, "--max_steps", "5").returncode == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "final_lora")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-5")
    done = train(tmp_path / "run", tiny_folder, easy_data, *plain, "--max_steps", "5", "--resume")
    assert done.returncode == 0 and "Resuming from checkpoint-3" in done.stdout, done.stderr
    whole, resumed = (load_file(tmp_path / name / "checkpoints" / "final_lora" / ADAPTERS) for name in ("whole", "run"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_two_processes_train_plainly_what_one_trains(tmp_path, tiny_folder, easy_data):
    # 36 examples in steps of 8: of an epoch's last step, 4 examples, the second process has one micro-batch of 2 only
    plain = "--step plain --lora_dropout 0 --logging_steps 1 --held_out_share 0 --max_steps 6".split()
    one = train(tmp_path / "one", tiny_folder, easy_data, *plain)
    shape = ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2"]
    with two_processes(tiny_folder, easy_data, tmp_path / "two", *plain, *shape) as launcher:
        _, errors = launcher.communicate(timeout=600)
    assert one.returncode == 0 and launcher.returncode == 0, errors
    single, double = (load_file(tmp_path / name / "checkpoints" / "final_lora" / ADAPTERS) for name in ("one", "two"))
    for name, tensor in single.items():
        assert torch.allclose(tensor, double[name], rtol=1e-3, atol=2e-5), name
    logs = [[e for e in RunFolder(tmp_path / name).read_metrics() if "loss" in e] for name in ("one", "two")]
    for figure in ("loss", "grad_norm"):
        first, second = ([entry[figure] for entry in entries] for entries in logs)
        assert first == pytest.approx(second, rel=1e-3), figure


@pytest.mark.parametrize("step", ["shared", "plain"])
def test_a_run_with_weights_held_in_bfloat16_leaves_the_very_adapters_of_fp32(tmp_path, tiny_folder, easy_data, step):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    found = {}
    for held in ("float32", "bfloat16"):
        done = train(tmp_path / held, base, easy_data, "--frozen_weights", held, "--max_steps", "3", "--step", step)
        assert done.returncode == 0, done.stderr
        result = RunFolder(tmp_path / held).read().training
        if step == "shared":
            assert result.memory_plan.frozen_weights == held
        else:
            assert result.memory_plan is None  # its passes are TRL's, and nobody measured them
        found[held] = result.adapter_files[ADAPTERS]
    assert found["float32"] == found["bfloat16"]


def test_bad_numbers_stop_the_plain_step_and_name_the_examples_of_the_whole_step(tmp_path, tiny_folder, easy_data):
    done = train(tmp_path / "run", tiny_folder, easy_data, "--step", "plain", "--learning_rate", "1e30")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "is not finite" in done.stderr or "the loss explodes" in done.stderr
    asked = done.stderr.split("the examples of this step ask: ")[1].splitlines()[0]
    parts = len(asked.split("', ")) + len(asked.split('", '))  # each split gives one more than there are separators
    assert parts >= 9  # of all eight, not of the last micro-batch


@pytest.mark.parametrize("size, processes", [(1, 1), (2, 1), (3, 2), (2, 3), (5, 2)])
def test_micro_batches_hold_the_steps_and_are_equally_many_in_each_process(size, processes):
    steps = [OptimizerStepBatches(41, 6, 1, process, processes) for process in range(processes)]
    batches = [MicroBatches(each, size) for each in steps]
    lists = [list(each) for each in batches]
    assert {len(each) for each in lists} == {len(batches[0])}
    per_step = math.ceil(6 / size)
    for process in range(processes):
        whole = lists[process]
        shares = [list(chain(*whole[i : i + per_step])) for i in range(0, len(whole), per_step)]
        assert shares == list(steps[process]) and all(len(batch) <= size for batch in whole)
    assert sorted(chain(*chain(*lists))) == list(range(41))


@pytest.mark.slow
@pytest.mark.standin
def test_both_steps_train_the_same_adapters_of_the_stand_in(tmp_path, standin_folder):
    """Three steps of two examples. Measured: losses equal to 1e-7, gradient norms to 1e-6, adapters to 1e-5."""
    small = {"gradient_accumulation_steps": 2, "held_out_share": 0.0, "learning_rate": 1e-5, "max_steps": 3}
    found = {}
    for step in ("shared", "plain"):
        result, adapters = train_here(tmp_path / step, standin_folder, "starter", step=step, **small)
        trained = torch.cat([adapters[name].flatten() for name in sorted(adapters) if "lora_B" in name])
        found[step] = result.last_window_loss, trained
    assert found["plain"][0] == pytest.approx(found["shared"][0], rel=1e-5)
    assert (found["plain"][1] - found["shared"][1]).norm() < 1e-3 * found["shared"][1].norm()
