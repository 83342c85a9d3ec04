"""Frozen weights in bfloat16: half the memory, and bit for bit what FP32 copies of them compute."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_any_base import llama_2, save_model

from conversation.errors import UserError
from conversation.models import frozen_weights
from conversation.models.adapters import add_adapters
from conversation.models.frozen_weights import load_in_bfloat16, loses_bits
from conversation.models.weights import load_model
from conversation.training import memory_plan
from conversation.training.micro_batches import TokenBudget
from conversation.training.prefix_tree import TokenSequence, build_prefix_tree
from conversation.training.shared_prefix import shared_prefix_loss, use_shared_prefix_attention
from conversation_config import TrainingConfig


def rounded(folder, target):
    """A copy of a model folder, its weights rounded to what bfloat16 can hold, but stored in FP32."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16().float() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(params=["gemma3", "qwen2", "llama"])
def base(request, tmp_path, tiny_folder):
    if request.param == "gemma3":
        return rounded(tiny_folder, tmp_path / "gemma3")
    if request.param == "qwen2":
        return save_model(tmp_path / "qwen2", 300, "Qwen2")
    return rounded(save_model(tmp_path / "made", 300, tie_word_embeddings=False), tmp_path / "llama")


def one_pass(model, dropout=0.1):
    """Loss and gradients of a pass in which the adapters do something, and the logits of an ordinary one."""
    torch.manual_seed(3)
    model = add_adapters(model, TrainingConfig(lora_dropout=dropout))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    use_shared_prefix_attention(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    ids = [tuple(range(1, 40)), (*range(1, 20), *range(60, 90)), tuple(range(1, 12))]
    tree = build_prefix_tree([TokenSequence(i, tuple(place > 5 for place in range(len(i)))) for i in ids])
    model.train()
    loss = shared_prefix_loss(model, tree)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids[1]])).logits
        with model.disable_adapter():
            without = model(torch.tensor([ids[1]])).logits
    return {
        "loss": loss.detach(),
        "logits": logits,
        "without": without,
        **start,
        **{f"d {n}": g for n, g in gradients.items()},
    }


def test_a_forward_and_backward_pass_is_bit_for_bit_that_of_fp32_copies(base):
    assert loses_bits(base) is None
    wide, narrow = one_pass(load_model(base)), one_pass(load_in_bfloat16(base))
    assert wide.keys() == narrow.keys() and len(wide) > 30
    for name, tensor in wide.items():
        assert narrow[name].dtype == tensor.dtype == torch.float32 and torch.equal(narrow[name], tensor), name


def test_a_head_widened_in_blocks_gives_the_same_logits(base, monkeypatch):
    wide = one_pass(load_model(base))
    monkeypatch.setattr(frozen_weights, "WIDENED_AT_A_TIME", 1000)
    torch.testing.assert_close(one_pass(load_in_bfloat16(base))["logits"], wide["logits"])


def test_the_matrices_take_half_the_memory_and_embeddings_stay_tied(base):
    wide, narrow = load_model(base), load_in_bfloat16(base)
    tied = wide.get_output_embeddings().weight is wide.get_input_embeddings().weight
    assert (narrow.get_output_embeddings().weight is narrow.get_input_embeddings().weight) == tied
    for (name, one), other in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert other.nbytes == one.nbytes // (2 if one.dim() == 2 else 1), name
    for (name, one), other in zip(wide.named_buffers(), narrow.buffers(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


def test_weights_that_bfloat16_would_change_are_kept_or_refused(tmp_path, monkeypatch, capsys):
    base = llama_2(tmp_path / "fp32")
    assert loses_bits(base)
    with pytest.raises(UserError, match=r"do not fit into bfloat16: .*weight would lose bits") as caught:
        memory_plan.load_frozen(base, TrainingConfig(frozen_weights="bfloat16"))
    assert caught.value.exit_status == 2 and "float32" in caught.value.hint
    assert memory_plan.load_frozen(base, TrainingConfig()).dtype == torch.float32
    monkeypatch.setattr(memory_plan, "free_bytes", lambda device: memory_plan.LEAST_LEFT)
    with pytest.raises(UserError, match=r"too little memory: weights held in float32, as .* would lose bits"):
        memory_plan.load_frozen(base, TrainingConfig())


def test_auto_holds_bfloat16_only_where_fp32_would_not_fit_and_says_so(tmp_path, monkeypatch, capsys):
    base = save_model(tmp_path / "qwen2", 4000, "Qwen2")
    held = lambda: memory_plan.load_frozen(base, TrainingConfig(lora_r=1)).get_input_embeddings().weight.dtype  # noqa: E731
    assert held() == torch.float32 and not capsys.readouterr().out
    full = memory_plan.fp32_bytes(base)
    adapters = 4 * memory_plan.adapter_bytes(base, 1)
    for left, wanted in ((full, torch.float32), (full - 1, torch.bfloat16), (full // 2, torch.bfloat16)):
        monkeypatch.setattr(
            memory_plan, "free_bytes", lambda device, left=left: left + adapters + memory_plan.LEAST_LEFT
        )
        assert held() == wanted
    assert "held in bfloat16, which changes none of them" in capsys.readouterr().out
    monkeypatch.setattr(memory_plan, "free_bytes", lambda device: full // 2)
    with pytest.raises(UserError, match="too little memory: weights held in bfloat16") as caught:
        held()
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_the_plan_counts_weights_adapters_and_the_largest_pass(tmp_path, held):
    base = save_model(tmp_path / "qwen2", 300, "Qwen2")
    model = add_adapters(load_model(base) if held == "float32" else load_in_bfloat16(base), TrainingConfig())
    use_shared_prefix_attention(model)
    short, long = ((TokenSequence(tuple(range(n)), (False,) + (True,) * (n - 1))) for n in (10, 50))
    budget = TokenBudget(1000, bytes_per_token=100.0)
    plan = memory_plan.plan_memory(model, [short, long], [[0], [0, 1], [0, 0]], budget)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (plan.frozen_weights, plan.weights) == (held, frozen)
    assert plan.adapters_and_optimizer == 4 * trained and plan.tokens == 49 and plan.activations == 4900
    assert plan.total > frozen + 4 * trained + 4900 and "Memory plan" in str(plan)
    cut = memory_plan.plan_memory(model, [short, long], [[0, 1]], TokenBudget(20, bytes_per_token=100.0))
    assert cut.activations == 2000
