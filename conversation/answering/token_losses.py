"""The log probability of each token of some answers, over the prefix tree of the training step.

Answers to one prompt share it, and all prompts share the developer turn: each distinct token-in-its-context is computed
once (`training.shared_prefix`), so that scoring a hundred answers costs what their own tokens cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conversation.training.micro_batches import split_into_micro_batches
from conversation.training.prefix_tree import PrefixTree, TokenSequence, build_prefix_tree
from conversation.training.shared_prefix import _hidden_states, find_causal_lm, use_shared_prefix_attention
from conversation.training.tree_attention import ATTENTION_NAME

PACKED_TOKENS = 4096  # per forward pass
ROWS = 256  # rows of logits at a time: 0.27 GB with Gemma's vocabulary


@torch.inference_mode()
def label_log_probabilities(
    model: torch.nn.Module, sequences: Sequence[TokenSequence], candidates: Sequence[int] = ()
) -> list[Tensor]:
    """For each sequence, the natural log of the probability of its labels, and of other tokens in their places.

    Returns a tensor [labels, 1 + candidates] per sequence, float64 on the CPU: column 0 is the label itself, the others
    are the tokens `candidates`. The model is one that the shared-prefix step can train; raises ValueError otherwise.
    """
    causal_lm = find_causal_lm(model)
    if causal_lm.config._attn_implementation != ATTENTION_NAME:
        causal_lm.requires_grad_(False)
        use_shared_prefix_attention(causal_lm)
    found: dict[TokenSequence, Tensor] = {}
    for group in split_into_micro_batches(list(dict.fromkeys(sequences)), PACKED_TOKENS):
        found.update(zip(group, _of_group(model, group, candidates), strict=True))
    return [found[sequence] for sequence in sequences]


def _of_group(model: torch.nn.Module, group: list[TokenSequence], candidates: Sequence[int]) -> list[Tensor]:
    tree = build_prefix_tree(group)
    causal_lm = find_causal_lm(model)
    head = causal_lm.get_output_embeddings().weight
    softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
    states = _hidden_states(model, tree)
    predicting, labels = [], []
    for sequence, positions in zip(group, _positions(tree, group), strict=True):
        marked = [i for i, is_label in enumerate(sequence.is_label) if is_label]
        predicting += [positions[i - 1] for i in marked]
        labels += [sequence.ids[i] for i in marked]
    columns = torch.tensor([[label, *candidates] for label in labels], device=head.device)
    rows = torch.tensor(predicting, device=states.device)
    parts = []
    for start in range(0, len(rows), ROWS):
        logits = states[rows[start : start + ROWS]] @ head.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        normaliser = torch.logsumexp(logits, -1, keepdim=True)
        parts.append((logits.gather(1, columns[start : start + ROWS]) - normaliser).double().cpu())
    return list(torch.cat(parts).split([sum(sequence.is_label) for sequence in group]))


def _positions(tree: PrefixTree, group: Sequence[TokenSequence]) -> list[list[int]]:
    """The packed position of each input token of each sequence."""
    ids = tree.input_ids[0].tolist()
    child: dict[tuple[int, int], int] = {}
    for branch in tree.branches:
        parent = branch.ancestors[-1][1] - 1 if branch.ancestors else -1
        for position in range(branch.start, branch.stop):
            child[parent, ids[position]] = position
            parent = position
    found = []
    for sequence in group:
        path, parent = [], -1
        for token in sequence.inputs:
            parent = child[parent, token]
            path.append(parent)
        found.append(path)
    return found
