"""The memory that a training will need, by what it is for, before its first step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversation.errors import UserError
from conversation.models.device import training_device
from conversation.models.frozen_weights import load_in_bfloat16, loses_bits
from conversation.models.weights import adapter_bytes, fp32_bytes, load_model
from conversation.runs.files import size
from conversation.runs.machine import resident_memory_bytes
from conversation.runs.memory_plan import MemoryPlan
from conversation.training.micro_batches import TokenBudget, free_bytes, split_into_micro_batches
from conversation.training.prefix_tree import TokenSequence, build_prefix_tree
from conversation.training.processes import all_true
from conversation.training.shared_prefix import find_causal_lm
from conversation.training.vocabulary_loss import CPU_HEAD_BLOCK_BYTES, GPU_HEAD_BLOCK_BYTES, HEAD_BLOCK_ROWS
from conversation_config import TrainingConfig

LEAST_LEFT = 256 * 2**20  # for one example at a time, its layers computed twice, and the head
STEPS_LOOKED_AT = 200  # to find the largest pass of a step
WIDE_TENSORS = 5  # of the widest layer's output, at the same time in the backward pass


def load_frozen(folder: Path, config: TrainingConfig) -> Any:
    """The base model of a training, its weights held as `--frozen_weights` says.

    `auto` holds them in FP32 where that leaves memory for a step (with several processes: in all of them), else in
    bfloat16 if that changes none of them. Raises UserError when bfloat16 is asked for and would lose bits, and when
    memory is too small either way.
    """
    wanted = config.frozen_weights
    full, adapters = fp32_bytes(folder), 4 * adapter_bytes(folder, config.lora_r)
    free = free_bytes(torch.device(training_device()))
    needed = {"float32": full + adapters + LEAST_LEFT, "bfloat16": full // 2 + adapters + LEAST_LEFT}
    if wanted == "float32" or (wanted == "auto" and all_true(needed["float32"] <= free)):
        _check_fits(needed["float32"], free, "float32")
        return load_model(folder)
    if lossy := loses_bits(folder):
        if wanted == "bfloat16":
            raise UserError(
                f"the weights in {folder} do not fit into bfloat16: {lossy} would lose bits",
                "--frozen_weights float32 keeps them as they are",
            )
        _check_fits(needed["float32"], free, f"float32, as {lossy} would lose bits in bfloat16,")
        return load_model(folder)
    _check_fits(needed["bfloat16"], free, "bfloat16")
    if wanted == "auto":
        print(
            f"The base's weights are held in bfloat16, which changes none of them: {size(needed['float32'])} for FP32 "
            f"copies is more than the {size(free)} that are free. Arithmetic stays FP32."
        )
    return load_in_bfloat16(folder)


def _check_fits(needed: int, free: int, held: str) -> None:
    if needed > free:
        raise UserError(
            f"too little memory: weights held in {held}, adapters and one short example take {size(needed)}, "
            f"{size(free)} are free",
            "end other programs (on a card nvidia-smi lists them), lower --lora_r, or train a smaller base",
        )


def plan_memory(
    model: nn.Module, sequences: list[TokenSequence], steps: Iterable[list[int]], budget: TokenBudget
) -> MemoryPlan:
    """The plan for a model with its adapters, the examples of a training, and the examples of each step by index."""
    causal_lm = find_causal_lm(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    weights = sum(p.nbytes for p in frozen)
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    on_card = causal_lm.device.type == "cuda"
    tokens, rows = _largest_pass(sequences, steps, budget.tokens)
    head: Any = causal_lm.get_output_embeddings()
    vocabulary, width = head.weight.shape
    matrices = [
        p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "lm_head" not in name
    ]
    widest = max((max(p.shape) for p in matrices), default=width)
    widened = max((4 * p.numel() for p in matrices if p.dtype != torch.float32), default=0)
    block = min(GPU_HEAD_BLOCK_BYTES if on_card else CPU_HEAD_BLOCK_BYTES, 4 * min(rows, HEAD_BLOCK_ROWS) * vocabulary)
    return MemoryPlan(
        frozen_weights="bfloat16" if any(p.dtype == torch.bfloat16 for p in frozen) else "float32",
        weights=weights,
        adapters_and_optimizer=4 * adapters,
        activations=int(budget.bytes_per_token * min(tokens, budget.tokens)),
        work=WIDE_TENSORS * 4 * min(tokens, budget.tokens) * widest + widened + 3 * block + 4 * 4 * rows * width,
        program=0 if on_card else max(0, resident_memory_bytes() - weights - adapters),
        left=max(0, free_bytes(causal_lm.device)),
        tokens=min(tokens, budget.tokens),
    )


def _largest_pass(sequences: list[TokenSequence], steps: Iterable[list[int]], most: int) -> tuple[int, int]:
    """Packed tokens of the largest pass of the first steps, and the label tokens in it."""
    tokens, rows = 0, 0
    for _, step in zip(range(STEPS_LOOKED_AT), steps, strict=False):
        for group in split_into_micro_batches([sequences[i] for i in step], most):
            tree = build_prefix_tree(group)
            if tree.num_tokens > tokens:
                tokens, rows = tree.num_tokens, len(tree.predicting)
    return tokens, rows
