"""Free answers to many prompts at once, each distinct token of the prompts read once.

transformers' `generate` pads the prompts to the longest, reads for each of them what all have in common, goes on with
all rows until the slowest has ended, and copies every layer's keys and values for each token. Here

- the prompts pass through the model as a prefix tree (`training.shared_prefix`): the developer turn is read once;
- an answer is a row of one store of keys and values. Row by row they begin at column 0 and have no gaps: the distance
  of two columns is the distance of their tokens, as a layer with a sliding window needs it. Right of a row's newest
  token nothing is seen;
- a row that has ended makes place for the next answer; when none waits, for the last row, and the batch shrinks.

The model's layers do not know of it: their attention function (`training.tree_attention`) takes keys and values to the
store, and gets back what the rows see. The likeliest tokens are those of `generate`, up to ties in FP32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from conversation.answering.constrained import Draw
from conversation.answering.token_losses import PACKED_TOKENS, packed_positions, read_prefix_trees
from conversation.models.tokenizer import common_prefix_length
from conversation.training.prefix_tree import TokenSequence, build_prefix_tree
from conversation.training.shared_prefix import find_causal_lm, hidden_states

CELLS = 40_000
"""Tokens that all rows together have room for: with Gemma 3 270M in FP32, 37 kB each (resident only once written)."""
CANDIDATES = 256
"""Tokens that are sorted for a draw. To sort Gemma's 262,144 takes 29 ms a row, to find these 1.2 (one core)."""


class Asked(NamedTuple):
    """A prompt, at least two tokens, and how the tokens of its answer are drawn (None: the likeliest is taken)."""

    prompt: tuple[int, ...]
    draw: Draw | None = None


@torch.inference_mode()
def generate_batch(
    model: torch.nn.Module, asked: Sequence[Asked], end: int, max_new_tokens: int, rows: int
) -> list[list[int]]:
    """The answers, up to and including the token `end`, of at most `max_new_tokens` tokens, `rows` of them at a time.

    Raises ValueError for a model that the shared-prefix step cannot train.
    """
    read_prefix_trees(model)
    answers: list[list[int]] = [[] for _ in asked]
    if not asked:
        return answers
    columns = max(len(each.prompt) for each in asked) + max_new_tokens
    store = _Rows(max(1, min(rows, len(asked), CELLS // columns)), columns)
    waiting = _read_prompts(model, asked)

    def start(row: int) -> _Answer | None:
        """Put the next answer that waits into a row."""
        if (found := next(waiting, None)) is None:
            return None
        place, keys, positions = found
        store.fill(row, keys, positions)
        return _Answer(answers[place], asked[place])

    under_way = [begun for row in range(store.rows) if (begun := start(row))]
    while under_way:
        logits = _next_logits(model, store, under_way)
        for answer, token in zip(under_way, _choose(logits, under_way), strict=True):
            answer.ids.append(token)
        for row in reversed(range(len(under_way))):
            ids = under_way[row].ids
            if ids[-1] != end and len(ids) < max_new_tokens:
                continue
            if begun := start(row):
                under_way[row] = begun
                continue
            last = under_way.pop()
            if row < len(under_way):
                store.copy(len(under_way), row, last.read)
                under_way[row] = last
    return answers


@dataclass(frozen=True)
class _Answer:
    """An answer under way: `ids` is what it is so far."""

    ids: list[int]
    asked: Asked

    @property
    def read(self) -> int:
        """The columns of its row that hold keys and values: those of all tokens but the newest."""
        return len(self.asked.prompt) + len(self.ids) - 1

    @property
    def newest(self) -> int:
        return self.ids[-1] if self.ids else self.asked.prompt[-1]


@dataclass
class _TreeKeys:
    """The keys and values of packed tokens by layer, [1, key heads, T, dim] (see `tree_attention.KeyStore`)."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def update(self, layer: int, key: Tensor, value: Tensor, window: int | None) -> tuple[Tensor, Tensor, None]:
        self.layers[layer] = key, value
        return key, value, None


class _Rows:
    """The keys and values of the answers under way by layer, [rows, key heads, columns, dim].

    Zeros at first: what is written nowhere takes no memory on Linux. As a `tree_attention.KeyStore` it takes one token
    for each of the first rows, at the columns `ends`.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._ends = torch.zeros(0, dtype=torch.long)
        self._width = 0
        self._masks: dict[tuple[int | None, torch.device], Tensor] = {}

    def fill(self, row: int, keys: _TreeKeys, positions: Tensor) -> None:
        """Begin a row with the tokens at some packed positions."""
        for layer, packed in keys.layers.items():
            for kept, of_tree in zip(self._layer(layer, packed), packed, strict=True):
                kept[row, :, : len(positions)] = of_tree[0].index_select(1, positions.to(of_tree.device))

    def copy(self, source: int, target: int, columns: int) -> None:
        for kept in self._layers.values():
            for each in kept:
                each[target, :, :columns] = each[source, :, :columns]

    def expect(self, ends: Tensor) -> None:
        """The next tokens are those at the columns `ends` [n], on the CPU, of the first n rows."""
        self._ends, self._width = ends, int(ends.max()) + 1
        self._masks.clear()

    def update(self, layer: int, key: Tensor, value: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        n, kept = len(self._ends), self._layer(layer, (key, value))
        ends, rows = self._ends.to(key.device), torch.arange(n, device=key.device)
        for each, new in zip(kept, (key, value), strict=True):
            each[rows, :, ends] = new[:, :, 0]
        mask = self._mask(window, key)
        return kept[0][:n, :, : self._width], kept[1][:n, :, : self._width], mask

    def _layer(self, layer: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            shapes = [(self.rows, each.shape[1], self.columns, each.shape[3]) for each in like]
            keys, values = (each.new_zeros(shape) for each, shape in zip(like, shapes, strict=True))
            self._layers[layer] = keys, values
        return self._layers[layer]

    def _mask(self, window: int | None, key: Tensor) -> Tensor:
        """[n, 1, 1, width]: minus infinity where a column is not among the newest `window` (None: all) of its row."""
        if (window, key.device) not in self._masks:
            column, newest = torch.arange(self._width)[None], self._ends[:, None]
            hidden = column > newest
            if window is not None:
                hidden |= column <= newest - window
            mask = torch.zeros(hidden.shape, dtype=key.dtype).masked_fill_(hidden, float("-inf"))
            self._masks[window, key.device] = mask[:, None, None].to(key.device)
        return self._masks[window, key.device]


def _read_prompts(model: torch.nn.Module, asked: Sequence[Asked]) -> Iterator[tuple[int, _TreeKeys, Tensor]]:
    """For each one asked its place, and the keys of its prompt: those at the packed positions [prompt tokens - 1].

    The last token is read with the answer. Prompts are read in groups, the longest first, each when it is its turn; a
    prompt that is asked several times is read once.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, each in enumerate(asked):
        places.setdefault(each.prompt, []).append(place)
    for prompts in _groups(sorted(places, key=len, reverse=True)):
        sequences = [TokenSequence(prompt, (False,) * (len(prompt) - 1) + (True,)) for prompt in prompts]
        tree, keys = build_prefix_tree(sequences), _TreeKeys()
        hidden_states(model, tree, keys)
        for prompt, positions in zip(prompts, packed_positions(tree, sequences), strict=True):
            for place in places[prompt]:
                yield place, keys, torch.tensor(positions)
        del keys  # before the next group is read


def _groups(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prompts, in order, in groups of at most PACKED_TOKENS tokens, or one longer prompt.

    What all begin with counts once in a group. A group that shares more is smaller than it could be.
    """
    common = common_prefix_length(min(prompts), max(prompts))
    group: list[tuple[int, ...]] = []
    tokens = common
    for prompt in prompts:
        own = len(prompt) - common
        if group and tokens + own > PACKED_TOKENS:
            yield group
            group, tokens = [], common
        group.append(prompt)
        tokens += own
    yield group


def _next_logits(model: torch.nn.Module, store: _Rows, under_way: Sequence[_Answer]) -> Tensor:
    """The logits [n, vocabulary] after the newest token of each answer, which is read here."""
    device = next(find_causal_lm(model).get_input_embeddings().parameters()).device
    ends = torch.tensor([answer.read for answer in under_way])
    store.expect(ends)
    return model(
        input_ids=torch.tensor([[answer.newest] for answer in under_way], device=device),
        position_ids=ends[:, None].to(device),
        # As in `hidden_states`: a mask with four dimensions is passed on as it is. The store makes those that count.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        key_store=store,
        use_cache=False,
    ).logits[:, -1]


def _choose(logits: Tensor, under_way: Sequence[_Answer]) -> list[int]:
    """The next token of each answer."""
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [(row, draw) for row, answer in enumerate(under_way) if (draw := answer.asked.draw)]
    if drawn:
        rows, draws = zip(*drawn, strict=True)
        found = draw_tokens(logits if len(rows) == len(logits) else logits[list(rows)], draws)
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    return tokens


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token for each row of logits [n, vocabulary], as each `Draw` says; takes one number from its generator.

    The probabilities are those of transformers' `TemperatureLogitsWarper` and `TopPLogitsWarper`, which sort the whole
    vocabulary. Here it is sorted only where the likeliest CANDIDATES have not the probability top_p together.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.float() / column([draw.temperature for draw in draws]).float()
    top_p = column([draw.top_p for draw in draws])
    normaliser = scaled.logsumexp(-1, keepdim=True)
    best, tokens = scaled.topk(min(CANDIDATES, scaled.shape[1]))
    probabilities = (best - normaliser).double().exp()
    if (probabilities.sum(-1, keepdim=True) < top_p).any():
        best, tokens = scaled.sort(descending=True)
        probabilities = (best - normaliser).double().exp()
    total = probabilities.cumsum(-1)
    within = total - probabilities < top_p
    total = total.masked_fill(~within, float("inf"))
    last = within.sum(-1, keepdim=True) - 1
    aim = column([draw.generator.random() for draw in draws]) * total.gather(1, last)
    chosen = torch.searchsorted(total, aim, right=True).minimum(last)
    return tokens.gather(1, chosen)[:, 0].tolist()
