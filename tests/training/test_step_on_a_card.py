"""The step on a GPU, against the plain computation there: benchmarks/gpu.sh runs these tests on a card.

Without a card they run on the CPU, except those of a card's memory. They need no stand-in and nothing of conftest.py.
"""

import os

import pytest
import torch
from small_models import (
    ARCHITECTURES,
    fails_in_the_backward_pass_once,
    gemma3,
    largest_difference,
    make_pair,
    plain_loss_and_gradients,
    sequence,
    shared_loss_and_gradients,
    with_adapters,
)

from conversation.training.micro_batches import (
    TokenBudget,
    backward_in_micro_batches,
    free_bytes,
    measure_token_budget,
)
from conversation.training.shared_prefix import use_shared_prefix_attention

pytest_plugins = ["small_models"]

DEVICE = os.environ.get("STEP_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
on_a_card = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: it is about a card's memory")

STEPS = [
    [sequence([1, *range(5, 25)], 3), sequence([1, *range(5, 15), *range(30, 40)], 12)],
    [sequence([1, 7, 7, *range(5, 5 + n), 9, 9], 4) for n in (2, 9, 9, 17)],  # duplicates, prefixes of one another
    [sequence([1, *range(3, 50)], 1), sequence([1, 2], 1)],
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [10**6, 20, 4])  # whole; in parts; in parts that are computed twice
def test_loss_and_every_gradient_are_those_of_the_plain_computation(architecture, tokens):
    shared, plain = (model.to(DEVICE) for model in make_pair(architecture))
    for step in STEPS:
        ours = shared_loss_and_gradients(shared, step, tokens)
        assert all(gradient.device.type == DEVICE for gradient in ours[1].values())
        assert largest_difference(ours, plain_loss_and_gradients(plain, step)) < 1e-10


@pytest.mark.usefixtures("small_blocks")
def test_a_step_that_begins_again_draws_the_same_dropout():
    shared = make_pair(dropout=0.3)[0].to(DEVICE).train()
    torch.manual_seed(1)
    expected = shared_loss_and_gradients(shared, STEPS[0][:1])
    failures = fails_in_the_backward_pass_once(shared)
    torch.manual_seed(1)
    again = shared_loss_and_gradients(shared, STEPS[0][:1])
    assert failures and largest_difference(again, expected) < 1e-10
    torch.manual_seed(2)
    assert largest_difference(shared_loss_and_gradients(shared, STEPS[0][:1]), expected) > 1e-3


def a_large_step():
    """A model and a step that take hundreds of megabytes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "query_pre_attn_scalar": 64}
    model = with_adapters(gemma3(**shape, vocab_size=5000, max_position_embeddings=1024), fused=True).to(DEVICE)
    use_shared_prefix_attention(model)
    ids = torch.randint(5000, (16, 512)).tolist()
    return model, [sequence([1, *row], 300) for row in ids]


def gradients_of(model, step, budget):
    model.zero_grad()
    backward_in_micro_batches(model, step, 1 / 3400, budget)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@on_a_card
def test_a_step_that_does_not_fit_into_the_card_passes_in_parts_with_the_same_gradient():
    model, step = a_large_step()
    expected = gradients_of(model, step, TokenBudget(10**6))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_reserved()
    gradients_of(model, step, TokenBudget(10**6))
    needed = torch.cuda.max_memory_reserved() - resting
    model.zero_grad()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    budget = TokenBudget(10**6)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + needed / 2) / total)
    try:
        found = gradients_of(model, step, budget)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert budget.tokens < 16 * 512
    assert (found - expected).norm() < 1e-5 * expected.norm()


@on_a_card
def test_the_budget_is_of_what_this_process_may_take_of_the_card():
    model, step = a_large_step()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 500e6) / total)
    try:
        assert free_bytes(torch.device("cuda", 0)) <= 501e6
        budget = measure_token_budget(model)
        measured = budget.tokens
        gradients_of(model, step, budget)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < measured < 16 * 512 and budget.tokens == measured  # it bound, and memory did not run out
