"""Micro-batches: they fit into memory and change nothing."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    adapter_gradients,
    fails_in_the_backward_pass_once,
    largest_difference,
    make_pair,
    plain_loss_and_gradients,
    sequence,
    sequences_of_a_tree,
    shared_loss_and_gradients,
)

from conversation.training import micro_batches
from conversation.training.micro_batches import (
    TokenBudget,
    backward_in_micro_batches,
    measure_token_budget,
    split_into_micro_batches,
)
from conversation.training.prefix_tree import build_prefix_tree
from conversation.training.shared_prefix import shared_prefix_loss

pytest_plugins = ["small_models"]
pytestmark = pytest.mark.usefixtures("small_blocks")


@settings(max_examples=30, deadline=None)
@given(sequences=sequences_of_a_tree(), tokens=st.integers(1, 60))
def test_micro_batches_and_checkpointing_change_nothing(gemma_pair, sequences, tokens):
    shared, plain = gemma_pair
    shared.train()
    ours = shared_loss_and_gradients(shared, sequences, tokens)
    assert largest_difference(ours, plain_loss_and_gradients(plain, sequences)) < 1e-10
    assert not shared.get_base_model().is_activation_checkpointing


def test_an_example_longer_than_the_budget_keeps_only_its_layers_inputs_and_the_same_masks():
    shared, _ = make_pair(dropout=0.3)
    shared.train()
    example = sequence([1, *range(5, 25)], 4)
    embedding = shared.get_base_model().get_input_embeddings()
    layer_runs, first_layer_gradients = [], []
    for layer in shared.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: layer_runs.append(module))
    embedding.register_forward_hook(lambda module, args, output: first_layer_gradients.append(output.requires_grad))
    gradients = []
    for tokens in (100, 19, 100):  # the example has 20 inputs
        torch.manual_seed(3)
        gradients.append(shared_loss_and_gradients(shared, [example], tokens)[1])
    assert len(layer_runs) == 3 + 2 * 3 + 3  # forwards only; forwards and again on the way back; forwards only
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=0)
    assert first_layer_gradients == [False] * 3 and len(embedding._forward_hooks) == 1  # the one of this test


@given(sequences=sequences_of_a_tree(), tokens=st.integers(1, 80))
def test_micro_batches_hold_every_example_and_fit(sequences, tokens):
    groups = split_into_micro_batches(sequences, tokens)
    assert sorted(s.ids for group in groups for s in group) == sorted(s.ids for s in sequences)
    for group in groups:
        assert build_prefix_tree(group).num_tokens <= max(tokens, max(len(s.inputs) for s in group))
        assert len({s.inputs for s in group}) == 1 or build_prefix_tree(group).num_tokens <= tokens


def test_a_step_that_runs_out_of_memory_starts_again_in_smaller_parts(monkeypatch):
    shared, _ = make_pair(dropout=0.3)
    shared.train()
    sequences = [sequence([1, *range(start, start + 20)], 4) for start in (5, 15, 25, 35)]

    torch.manual_seed(5)
    shared.zero_grad()
    backward_in_micro_batches(shared, sequences[:1], 1.0, TokenBudget(100))  # gradients the step must not lose
    backward_in_micro_batches(shared, sequences, 0.1, TokenBudget(25))
    expected = adapter_gradients(shared)

    calls, last_losses = [], []

    def fails_twice(model, tree):
        calls.append(tree.num_tokens)
        assert all(loss() is None for loss in last_losses)  # nothing refers to what failed
        loss = shared_prefix_loss(model, tree)
        if len(calls) in (2, 4):  # at the first micro-batch of the second step, and at a later one
            last_losses.append(weakref.ref(loss))
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return loss

    monkeypatch.setattr(micro_batches, "shared_prefix_loss", fails_twice)
    torch.manual_seed(5)
    shared.zero_grad()
    budget = TokenBudget(100)
    backward_in_micro_batches(shared, sequences[:1], 1.0, budget)
    backward_in_micro_batches(shared, sequences, 0.1, budget)
    assert calls == [20, 77, 20, 20, 20, 20, 20, 20]  # the first step; all together; two alone; each alone
    assert budget.tokens == 77 // 2 // 2 and len(split_into_micro_batches(sequences, budget.tokens)) == 4
    for name, gradient in adapter_gradients(shared).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def test_memory_that_runs_out_in_the_backward_pass_leaves_no_half_of_it():
    shared, _ = make_pair()
    sequences = [sequence([1, *range(start, start + 20)], 4) for start in (5, 15, 25, 35)]
    _, expected = shared_loss_and_gradients(shared, sequences)
    failures = fails_in_the_backward_pass_once(shared)
    _, gradients = shared_loss_and_gradients(shared, sequences)
    assert failures
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_the_free_memory_of_a_gpu_counts_its_cache_and_stops_at_the_cap(monkeypatch):
    fraction = []
    for name, value in {"mem_get_info": (3000, 10_000), "memory_reserved": 2000, "memory_allocated": 500}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction[-1])
    for fraction[:], free in (([1.0], 3000 + 1500), ([0.4], 4000 - 500)):
        assert micro_batches.free_bytes(torch.device("cuda", 0)) == free


def test_memory_that_never_suffices_is_an_error(gemma_pair, monkeypatch):
    def fails(model, tree):
        raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(micro_batches, "shared_prefix_loss", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        backward_in_micro_batches(gemma_pair[0], [sequence(range(1, 20), 3)], 1.0, TokenBudget(100))


def test_the_budget_follows_the_free_memory(gemma_pair, monkeypatch):
    budgets = []
    for free in (2**26, 2**27):
        monkeypatch.setattr(micro_batches, "free_bytes", lambda device, free=free: free)
        state = torch.get_rng_state()
        budgets.append(measure_token_budget(gemma_pair[0]).tokens)
        assert torch.equal(torch.get_rng_state(), state)
    assert budgets[1] == pytest.approx(2 * budgets[0], abs=1)
    # per token and layer at least the inputs of seven projections, in float64
    saved = micro_batches.MEMORY_SHARE * 2**26 / budgets[0]
    assert saved > 3 * 8 * (4 * 24 + 2 * 32 + 40)


def test_the_budget_counts_what_dropout_keeps_whatever_mode_the_model_is_in(monkeypatch):
    monkeypatch.setattr(micro_batches, "free_bytes", lambda device: 2**26)
    shared, _ = make_pair(dropout=0.3)
    measured = [measure_token_budget(shared.train(mode)).tokens for mode in (True, False)]
    assert measured[0] == measured[1] < measure_token_budget(make_pair()[0]).tokens
    assert not shared.training
