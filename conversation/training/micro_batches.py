"""An optimizer step in micro-batches that fit into memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conversation.models.tokenizer import common_prefix_length
from conversation.runs.machine import available_memory_bytes
from conversation.training.prefix_tree import TokenSequence, build_prefix_tree
from conversation.training.shared_prefix import find_causal_lm, shared_prefix_loss

# The share of the free memory for tensors saved for the backward pass; the rest is for temporary ones.
MEMORY_SHARE = 0.6


@dataclass
class TokenBudget:
    """The packed tokens allowed in one forward and backward pass. It shrinks when memory runs out all the same.

    `bytes_per_token`: what autograd saves for one. `free_bytes`: the memory that was free when it was measured.
    """

    tokens: int
    bytes_per_token: float = 0.0
    free_bytes: int = 0

    def halve(self, tried: int) -> None:
        """Shrink after a step of `tried` packed tokens ran out of memory. A budget above `tried` did not bind."""
        self.tokens = min(self.tokens, tried) // 2


def backward_in_micro_batches(
    model: nn.Module, sequences: Sequence[TokenSequence], scale: float, budget: TokenBudget
) -> Tensor:
    """Add the gradients of `scale` x (the sum of all label losses) to those of the adapters; return that sum in nats.

    `scale` is 1 / (labels of the whole effective batch); times the number of processes under DDP, which averages.
    The examples pass in groups of neighbours in the prefix tree, each as large as `budget` allows. A single example
    longer than the budget passes with activation checkpointing. When memory runs out, the budget is halved and the step
    starts again from the gradients and random states it found. (A GPU reports that. On a CPU, Linux kills the process
    instead, and only the budget protects it.) Under DDP the gradients are synchronised once, at the end; a process may
    have no examples. Raises the error of the last attempt when a single example does not fit.
    """
    sequences = [sequence for sequence in sequences if any(sequence.is_label)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    device = parameters[0].device
    random_states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    while True:
        try:
            with _without_synchronisation(model):
                loss_sum = _backward_once(model, sequences, scale, budget.tokens)
            break
        except RuntimeError as error:
            shortest = min(len(sequence.inputs) for sequence in sequences)
            if not should_reduce_batch_size(error) or budget.tokens < shortest:
                raise  # every example passes alone and checkpointed already
        # Outside the handler nothing refers to the failed pass, so its memory is free.
        budget.halve(tried=build_prefix_tree(sequences).num_tokens)
        clear_device_cache(garbage_collection=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        torch.set_rng_state(random_states[0])
        if random_states[1] is not None:
            torch.cuda.set_rng_state(random_states[1], device)
    _synchronise_gradients(model)
    return loss_sum


def split_into_micro_batches(sequences: Sequence[TokenSequence], max_tokens: int) -> list[list[TokenSequence]]:
    """Groups of neighbours in the prefix tree with at most `max_tokens` packed tokens each, or one longer example."""
    groups: list[list[TokenSequence]] = []
    tokens = 0
    for sequence in sorted(sequences, key=lambda sequence: sequence.inputs):
        inputs = sequence.inputs
        if groups:
            tokens += len(inputs) - common_prefix_length(groups[-1][-1].inputs, inputs)
        if not groups or tokens > max_tokens:
            groups.append([])
            tokens = len(inputs)
        groups[-1].append(sequence)
    return groups


def measure_token_budget(model: nn.Module) -> TokenBudget:
    """The packed tokens that fit into the free memory, by the bytes per token that autograd saves for a short probe."""
    probe_tokens = 64
    ids = tuple(i % find_causal_lm(model).config.vocab_size for i in range(1, probe_tokens + 2))
    tree = build_prefix_tree([TokenSequence(ids, (False,) + (True,) * probe_tokens)])
    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved_bytes = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved_bytes
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved_bytes += storage.nbytes()
        return tensor

    devices = [parameter.device for parameter in model.parameters()][:1]
    was_training = model.training
    model.train()  # dropout saves masks and copies of its own
    with (
        torch.random.fork_rng([device.index for device in devices if device.type == "cuda"]),
        _without_synchronisation(model),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        shared_prefix_loss(model, tree)
    model.train(was_training)
    free, bytes_per_token = free_bytes(devices[0]), saved_bytes / probe_tokens
    return TokenBudget(max(1, int(MEMORY_SHARE * free / bytes_per_token)), bytes_per_token, free)


def free_bytes(device: torch.device) -> int:
    """The memory that this process may still take on a device."""
    if device.type != "cuda":
        return available_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    cap = int(total * torch.cuda.get_per_process_memory_fraction(device)) - torch.cuda.memory_allocated(device)
    return min(free + unused, cap)


def _backward_once(model: nn.Module, sequences: Sequence[TokenSequence], scale: float, max_tokens: int) -> Tensor:
    trees = [build_prefix_tree(group) for group in split_into_micro_batches(sequences, max_tokens)]
    loss_sum = torch.zeros((), device=find_causal_lm(model).device)
    for tree in trees:
        with _activation_checkpointing(model, tree.num_tokens > max_tokens):
            loss = shared_prefix_loss(model, tree)
            (loss * scale).backward()
        loss_sum = loss_sum + loss.detach()
    return loss_sum


@contextlib.contextmanager
def _activation_checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Save only each layer's input for the backward pass and recompute the rest (about a third more work)."""
    causal_lm: Any = find_causal_lm(model)
    kind = "activation" if hasattr(causal_lm, "is_activation_checkpointing") else "gradient"  # transformers 5.17
    if not wanted or getattr(causal_lm, f"is_{kind}_checkpointing"):
        yield
        return
    getattr(causal_lm, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    causal_lm.disable_input_require_grads()  # its hook, for reentrant checkpoints, would stay and cost a gradient
    try:
        yield
    finally:
        getattr(causal_lm, f"{kind}_checkpointing_disable")()


def _without_synchronisation(model: nn.Module) -> contextlib.AbstractContextManager:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def _synchronise_gradients(model: nn.Module) -> None:
    """Let DDP average the gradients so far, by a pass of one token that adds nothing to them.

    DDP averages during a backward pass. In the last micro-batch, a process that runs out of memory could not start
    again: the others would already have its gradients. One token always fits.
    """
    if isinstance(model, DistributedDataParallel):
        tree = build_prefix_tree([TokenSequence((0, 0), (False, True))])
        (shared_prefix_loss(model, tree) * 0.0).backward()
