"""Our LoRA layer against peft's: the same numbers and files. Gradients in a whole model: test_shared_prefix.py."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file

from conversation.models.adapters import FusedLoraLinear, add_adapters, lora_config
from conversation.models.weights import load_model
from conversation.training.trainer import build_trainable_model
from conversation_config import LORA_TARGETS, TrainingConfig


class OneLayer(torch.nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.q_proj = torch.nn.Linear(6, 5, bias=bias)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.q_proj(x)


def make_pair(bias, dropout=0.0):
    """(our layer, peft's), in float64 with equal random weights."""
    config = TrainingConfig(lora_r=2, lora_alpha=3, lora_dropout=dropout)
    base = OneLayer(bias)
    lora = lora_config(config)
    lora.task_type = None
    lora.target_modules = {"q_proj"}
    stock = get_peft_model(copy.deepcopy(base), lora).base_model.model
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter)
    ours = copy.deepcopy(stock)
    ours.q_proj.__class__ = FusedLoraLinear
    return ours.double(), stock.double()


def outcome(model, x):
    """Output, gradient of the input and of both factors, with fixed dropout masks."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    output = model(x)
    (output * torch.arange(output.numel()).view_as(output)).sum().backward()
    return [output, x.grad, *(p.grad for name, p in model.named_parameters() if "lora" in name)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_output_and_gradients_are_those_of_peft(bias, dropout, shape):
    ours, stock = make_pair(bias, dropout)
    x = torch.randn(shape, dtype=torch.float64)
    for got, expected in zip(outcome(ours, x), outcome(stock, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_right_numerically():
    ours, _ = make_pair(bias=True)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x,))


def test_dropout_keeps_one_byte_for_each_number_of_the_input():
    ours, _ = make_pair(bias=True, dropout=0.4)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *ours.parameters())}
    sizes = []

    def count(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        ours(x)
    assert sorted(sizes) == [4 * 6, 4 * 2 * 8]  # the mask; the product of the input and A


def test_disabled_and_merged_adapters_are_left_to_peft():
    ours, stock = make_pair(bias=True)
    x = torch.randn(4, 6, dtype=torch.float64)
    for prepare in (lambda layer: layer.enable_adapters(False), lambda layer: layer.merge()):
        for model in (ours, stock):
            model.q_proj.enable_adapters(True)
            prepare(model.q_proj)
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-12, atol=1e-12)


def test_training_uses_our_layer_on_every_projection(tiny_folder):
    model = build_trainable_model(tiny_folder, TrainingConfig())
    adapted = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(adapted) == len(LORA_TARGETS) * model.config.num_hidden_layers
    assert {type(module) for module in adapted} == {FusedLoraLinear}


def test_the_saved_adapters_are_ordinary_ones(tiny_folder, tmp_path):
    torch.manual_seed(5)
    model = add_adapters(load_model(tiny_folder), TrainingConfig())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(load_model(tiny_folder), tmp_path / "ours").eval()
    assert not any(isinstance(module, FusedLoraLinear) for module in loaded.modules())
    loaded.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    ours, peft = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == peft.keys()
    assert all(torch.equal(ours[name], peft[name]) for name in ours)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model.eval()(ids).logits, loaded(ids).logits, rtol=1e-5, atol=1e-5)


def test_saved_adapters_are_adapters_alone_and_no_hub_is_asked_for_the_base(tmp_path, tiny_folder, monkeypatch):
    """Each checkpoint is saved like this: without a network, and where the copy of a base has a larger vocabulary."""

    def asked(*arguments):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    config = json.loads((tiny_folder / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 9}))
    for name in ("some/model", str(smaller)):
        model = add_adapters(load_model(tiny_folder), TrainingConfig(base_model=name))
        model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict(), is_main_process=True)
        assert all("lora_" in tensor for tensor in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
