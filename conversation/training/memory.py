"""The memory of a training: what a step takes against what is free, said before the first step; what a resume keeps."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conversation.models.device import decided_device, training_device
from conversation.runs.files import read_json, size, write_json
from conversation.runs.machine import machine, peak_memory_bytes
from conversation.training.micro_batches import MEMORY_SHARE, TokenBudget, split_into_micro_batches
from conversation.training.prefix_tree import TokenSequence, build_prefix_tree

KEPT_SHARE = 0.8
"""A resumed run keeps its token budget while that takes no more than this share of the free memory. Above MEMORY_SHARE,
so that the usual ups and downs of free memory do not divide its steps differently."""


def memory_sentence(budget: TokenBudget, steps: Sequence[Sequence[TokenSequence]]) -> str:
    """What it means for the steps of an epoch that less memory is free than they would take whole; else nothing."""
    tokens = [build_prefix_tree(step).num_tokens for step in steps if step]
    if not tokens or max(tokens) <= budget.tokens or not budget.bytes_per_token:
        return ""
    needed = int(max(tokens) * budget.bytes_per_token / MEMORY_SHARE)
    parts = [len(split_into_micro_batches(step, budget.tokens)) for step in steps if step]
    sentence = (
        f"Memory: {size(budget.free_bytes)} are free, the largest step would take {size(needed)}: a step passes in "
        f"{statistics.median_high(parts)} parts (at most {max(parts)}), which takes longer and changes nothing else"
    )
    longest = max(len(sequence.inputs) for step in steps for sequence in step)
    if longest > budget.tokens:
        sentence += f"; examples above {budget.tokens} tokens are computed twice"
    return f"{sentence}."


def peak_memory_gb() -> float:
    """The peak memory of this process: of the card if it trains there, else resident memory."""
    if training_device() == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_memory_bytes() / 1e9


# --- what a checkpoint keeps beside the Trainer's state -------------------------------------------------------------


def save_progress(checkpoint: Path, process: int, budget: TokenBudget | None, window: Sequence[float]) -> None:
    """Write a process's token budget and the losses of the steps since the last logged window into a checkpoint.

    The plain step has no budget: None.
    """
    checkpoint.mkdir(exist_ok=True)
    tokens = budget.tokens if budget else None
    value = {"window": list(window), "token_budget": tokens, "machine": _this_machine()}
    write_json(_file(checkpoint, process), value)


def load_progress(
    checkpoint: Path, process: int, measured: TokenBudget | None
) -> tuple[TokenBudget | None, list[float]]:
    """The token budget for a resumed run, and the losses of the steps since its last logged window.

    `measured`: the budget by the memory that is free now; None for the plain step, which has none. On the same machine
    the run keeps its own, which divides its steps as before, unless that no longer fits. A checkpoint of an earlier
    version has neither.
    """
    if not _file(checkpoint, process).exists():
        return measured, []
    value: dict[str, Any] = read_json(_file(checkpoint, process))
    window = [float(loss) for loss in value["window"]]
    if measured is None or value["token_budget"] is None or value["machine"] != _this_machine():
        return measured, window
    kept = int(value["token_budget"])
    if kept * measured.bytes_per_token <= KEPT_SHARE * measured.free_bytes:
        return replace(measured, tokens=kept), window
    print(
        f"Less memory is free than before ({size(measured.free_bytes)}): steps of more than {measured.tokens} tokens "
        f"are divided otherwise, and their sums rounded otherwise.",
        file=sys.stderr,
    )
    return measured, window


def _file(checkpoint: Path, process: int) -> Path:
    return checkpoint / f"progress_{process}.json"


def _this_machine() -> str:
    return json.dumps({**machine(), "device": decided_device().reason}, sort_keys=True)
