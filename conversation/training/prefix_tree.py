"""The prefix tree: the examples of a step, each distinct token-in-its-context once.

Structure only, no model. `shared_prefix` explains why the tree gives the gradients of the plain computation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conversation.models.tokenizer import common_prefix_length

# Queries per attention tile. Small tiles skip more of the masked triangle; large ones use the matrix units better.
TILE_TOKENS = 256


@dataclass(frozen=True)
class TokenSequence:
    """One training example. `is_label[i]`: the loss counts the prediction of token i from those before it."""

    ids: tuple[int, ...]
    is_label: tuple[bool, ...]

    def __post_init__(self):
        if len(self.ids) != len(self.is_label):
            raise ValueError(f"{len(self.ids)} token ids, but {len(self.is_label)} label marks")
        if self.is_label and self.is_label[0]:
            raise ValueError("the first token cannot be a label: nothing precedes it")

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens to compute: all before the last label, which is only predicted."""
        last_label = max((i for i, label in enumerate(self.is_label) if label), default=0)
        return self.ids[:last_label]


@dataclass(frozen=True)
class Branch:
    """A run of packed positions [start, stop) in which each token is the child of the one before it.

    `ancestors`: the positions of all tokens above it, from the root down, in as few runs [start, stop) as possible.
    """

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]

    @property
    def depth(self) -> int:
        return sum(stop - start for start, stop in self.ancestors)


@dataclass(frozen=True)
class AttentionTile:
    """Consecutive queries, and all keys that any of them may see. `hidden` [queries, keys] marks the exceptions."""

    queries: slice
    keys: tuple[slice, ...]
    hidden: Tensor


@dataclass(frozen=True)
class PrefixTree:
    """A step's examples, each distinct token-in-its-context once, parents before children.

    T packed tokens, of which R predict labels; L distinct (predicting token, label token) pairs.
    """

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], depth in the tree
    branches: tuple[Branch, ...]
    predicting: Tensor  # [R], packed positions
    label_rows: Tensor  # [L], indices into `predicting`
    label_ids: Tensor  # [L]
    label_weights: Tensor  # [L], the number of examples that have this label here
    num_sequence_tokens: int  # tokens of all examples, nothing shared
    num_labels: int  # labels of all examples, nothing shared
    _tiles: dict[tuple[int | None, torch.device], list[AttentionTile]] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def tiles(self, window: int | None, device: torch.device) -> list[AttentionTile]:
        """The keys of each query, when it sees itself and the `window` - 1 (None: all) tokens above it."""
        if (window, device) not in self._tiles:
            self._tiles[window, device] = list(_attention_tiles(self.branches, window, device))
        return self._tiles[window, device]


def build_prefix_tree(sequences: Sequence[TokenSequence]) -> PrefixTree:
    """Build the tree of the examples, whose order does not matter. Raises ValueError if none has a label."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    branches: list[Branch] = []
    labels: Counter[tuple[int, int]] = Counter()  # (packed position of the predicting token, label token)

    previous: tuple[int, ...] = ()
    path: list[int] = []  # packed positions of the tokens of `previous`
    for sequence in sorted(sequences, key=lambda sequence: sequence.inputs):
        # In sorted order, no earlier example shares a longer prefix with this one than its neighbour.
        inputs = sequence.inputs
        shared = common_prefix_length(previous, inputs)
        start, stop = len(input_ids), len(input_ids) + len(inputs) - shared
        if stop > start:
            branches.append(Branch(start, stop, _runs(path[:shared])))
        path = path[:shared] + list(range(start, stop))
        input_ids += inputs[shared:]
        position_ids += range(shared, len(inputs))
        previous = inputs
        labels.update((path[i - 1], sequence.ids[i]) for i, label in enumerate(sequence.is_label) if label)
    if not labels:
        raise ValueError("none of the examples has a label, so there is nothing to learn from them")

    predicting = sorted({position for position, _ in labels})
    row_of = {position: row for row, position in enumerate(predicting)}
    return PrefixTree(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        branches=tuple(branches),
        predicting=torch.tensor(predicting),
        label_rows=torch.tensor([row_of[position] for position, _ in labels]),
        label_ids=torch.tensor([token for _, token in labels]),
        label_weights=torch.tensor(list(labels.values())),
        num_sequence_tokens=sum(len(sequence.ids) for sequence in sequences),
        num_labels=labels.total(),
    )


def _runs(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending positions as runs [start, stop)."""
    starts = [i for i in range(len(positions)) if i == 0 or positions[i] != positions[i - 1] + 1]
    stops = [*starts[1:], len(positions)] if starts else []
    return tuple((positions[start], positions[stop - 1] + 1) for start, stop in zip(starts, stops, strict=True))


def _attention_tiles(branches: Sequence[Branch], window: int | None, device: torch.device) -> Iterator[AttentionTile]:
    for branch in branches:
        for start in range(branch.start, branch.stop, TILE_TOKENS):
            stop = min(start + TILE_TOKENS, branch.stop)
            first_query = branch.depth + start - branch.start  # depths of the queries, first_query..last_query
            last_query = first_query + stop - start - 1
            first_key = 0 if window is None else max(0, first_query - window + 1)
            keys = _skip((*branch.ancestors, (branch.start, stop)), first_key)
            query = torch.arange(first_query, last_query + 1, device=device)[:, None]
            key = torch.arange(first_key, last_query + 1, device=device)[None, :]
            hidden = key > query
            if window is not None:
                hidden |= key <= query - window
            yield AttentionTile(slice(start, stop), keys, hidden)


def _skip(runs: Sequence[tuple[int, int]], tokens: int) -> tuple[slice, ...]:
    """The runs without their first `tokens` tokens; adjacent runs become one."""
    positions = [position for start, stop in runs for position in range(start, stop)][tokens:]
    return tuple(slice(start, stop) for start, stop in _runs(positions))
