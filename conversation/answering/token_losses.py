"""The log probability of each token of some answers, over the prefix tree of the training step.

Answers to one prompt share it, and all prompts share the developer turn: each distinct token-in-its-context is computed
once (`training.shared_prefix`), so that scoring a hundred answers costs what their own tokens cost. With a base that
the shared-prefix step does not know, each answer is read by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conversation.training.micro_batches import split_into_micro_batches
from conversation.training.prefix_tree import PrefixTree, TokenSequence, build_prefix_tree
from conversation.training.shared_prefix import (
    find_causal_lm,
    hidden_states,
    use_shared_prefix_attention,
    uses_shared_prefix_attention,
)

PACKED_TOKENS = 4096  # per forward pass
ROWS = 256  # rows of logits at a time: 0.27 GB with Gemma's vocabulary


def read_prefix_trees(model: torch.nn.Module) -> None:
    """Prepare a model for reading prefix trees. Raises ValueError for one that the shared-prefix step cannot train.

    Every other use of it works as before; which of its weights are trained stays as it is.
    """
    if uses_shared_prefix_attention(model):
        return
    head = find_causal_lm(model).get_output_embeddings()
    trained = [weight for weight in head.parameters() if weight.requires_grad] if head is not None else []
    try:
        for weight in trained:
            weight.requires_grad_(False)  # the step gives the head no gradient; here nothing needs one
        use_shared_prefix_attention(model)
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@torch.inference_mode()
def label_log_probabilities(
    model: torch.nn.Module, sequences: Sequence[TokenSequence], candidates: Sequence[int] = ()
) -> list[Tensor]:
    """For each sequence, the natural log of the probability of its labels, and of other tokens in their places.

    Returns a tensor [labels, 1 + candidates] per sequence, float64 on the CPU: column 0 is the label itself, the others
    are the tokens `candidates`.
    """
    try:
        read_prefix_trees(model)
    except ValueError:  # a base whose answers cannot be read as a tree
        return [_alone(model, sequence, candidates) for sequence in sequences]
    found: dict[TokenSequence, Tensor] = {}
    for group in split_into_micro_batches(list(dict.fromkeys(sequences)), PACKED_TOKENS):
        found.update(zip(group, _of_group(model, group, candidates), strict=True))
    return [found[sequence] for sequence in sequences]


def _alone(model: torch.nn.Module, sequence: TokenSequence, candidates: Sequence[int]) -> Tensor:
    """The log probabilities [labels, 1 + candidates] of one sequence, by the model's ordinary forward pass."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([sequence.ids], device=device), use_cache=False).logits[0]
    labels = [place for place, is_label in enumerate(sequence.is_label) if is_label]
    predicting = torch.tensor(labels, device=device) - 1
    columns = torch.tensor([[sequence.ids[place], *candidates] for place in labels], device=device)
    return logits[predicting].log_softmax(-1).gather(1, columns).double().cpu()


def packed_positions(tree: PrefixTree, sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """The packed position of each input token of each sequence of a tree."""
    ids = tree.input_ids[0].tolist()
    child: dict[tuple[int, int], int] = {}
    for branch in tree.branches:
        parent = branch.ancestors[-1][1] - 1 if branch.ancestors else -1
        for position in range(branch.start, branch.stop):
            child[parent, ids[position]] = position
            parent = position
    found = []
    for sequence in sequences:
        path, parent = [], -1
        for token in sequence.inputs:
            parent = child[parent, token]
            path.append(parent)
        found.append(path)
    return found


def _of_group(model: torch.nn.Module, group: list[TokenSequence], candidates: Sequence[int]) -> list[Tensor]:
    tree = build_prefix_tree(group)
    causal_lm = find_causal_lm(model)
    head = causal_lm.get_output_embeddings().weight
    softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
    states = hidden_states(model, tree)
    asked: dict[tuple[int, int], int] = {}  # each distinct (predicting position, label) once, as a row of the answer
    rows_of: list[list[int]] = []
    for sequence, positions in zip(group, packed_positions(tree, group), strict=True):
        marked = [i for i, is_label in enumerate(sequence.is_label) if is_label]
        pairs = [(positions[i - 1], sequence.ids[i]) for i in marked]
        rows_of.append([asked.setdefault(pair, len(asked)) for pair in pairs])
    row_of = {position: row for row, position in enumerate(tree.predicting.tolist())}
    predicting = torch.tensor([row_of[position] for position, _ in asked])
    columns = torch.tensor([[label, *candidates] for _, label in asked])
    found = torch.empty(columns.shape, dtype=torch.float64)
    for start in range(0, len(tree.predicting), ROWS):
        rows = tree.predicting[start : start + ROWS].to(states.device)
        logits = states[rows] @ head.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        normaliser = torch.logsumexp(logits, -1, keepdim=True)
        here = ((predicting >= start) & (predicting < start + ROWS)).nonzero()[:, 0]
        chosen = (predicting[here] - start).to(head.device)
        found[here] = (logits[chosen[:, None], columns[here].to(head.device)] - normaliser[chosen]).double().cpu()
    return [found[rows] for rows in rows_of]
