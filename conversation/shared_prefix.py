"""The loss of one training step, each shared token computed once.

The examples of a step repeat each other: every one opens with the same developer turn, and those of one conversation
tree also share their history. This module lays a step's examples into one prefix tree (a trie of token ids), sends each
distinct token-in-its-context through the model once, as a single unpadded sequence, and counts every label as often as
examples have it:

    tree = build_prefix_tree(sequences)          # structure only, no model
    loss = shared_prefix_loss(model, tree)       # the sum of all label losses, in nats
    (loss / num_labels).backward()               # the gradients of the plain computation

Shared: everything a token's computation consists of in a decoder (embedding, projections, norms, MLP, keys, values, its
attention output, its logits) for tokens with equal ids all the way from the start of their examples.
Not shared: anything after the first difference. No token is computed only because a longer example stands beside it
(there is no padding), and none after an example's last label, since it could change no loss.

Why the gradients are the same: in a causal decoder a token's hidden state is a function of the token ids from the start
up to it. Two examples with an equal prefix therefore compute the same numbers there, and the sum of the losses is the
same function of the adapters, whether such a number is computed twice or once and used twice; so its gradient is the
same too (by the chain rule the gradients of all uses are added, just as the gradients of the copies would be). Two
places need care, as everything else acts on single tokens: attention, which here sees for each token exactly its
ancestors in the tree within the layer's sliding window; and rotary positions, which are the depth in the tree.

LoRA dropout: its masks are drawn per computed token, so a shared token has one mask, where the plain computation would
draw one for each example that contains it. The expected gradient is that of the plain computation; within a step the
noise of a shared prefix is the same for all examples that share it. Other micro-batches, or other processes, draw other
masks: "the same result" is meant up to that.

The head is the other half of the work (Gemma's vocabulary has 262,144 entries). It runs only on tokens that predict a
label, over blocks of the vocabulary with a running softmax (as flash attention does over keys: Milakov & Gimelshein
2018, Dao et al. 2022), and forms the gradient of the hidden states in the same pass. No logits are kept, none are
computed twice, and a block of them has a fixed size. The normaliser is summed block by block, so it is also more exact
than torch's: on a CPU, torch 2.13's FP32 cross entropy sums the 262,144 exponentials one after the other and loses up
to 7e-5 of them, which shows as 1e-4 to 5e-4 in the gradients (benchmarks/README.md).
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "shared_prefix"

# Queries per attention tile. Small tiles skip more of the masked triangle, large ones feed the matrix units better.
TILE_TOKENS = 256
# The head's block of logits [label tokens, vocabulary entries]: small, for a CPU's caches; larger, to fill a GPU.
CPU_HEAD_BLOCK_BYTES, GPU_HEAD_BLOCK_BYTES = 8 * 2**20, 64 * 2**20
HEAD_BLOCK_ROWS = 4096
# A row takes no part in the gradient of a block of the vocabulary that holds less of its probability than this, in
# units of the type's rounding error.
NEGLIGIBLE_ROUNDINGS = 1 / 64
# Above this share of rows that take part, all do: gathering them would cost more than it saves.
MOST_ROWS = 0.8
# Exponentials are taken of logits minus a shift that is raised when one would exceed e^this: well within FP32's range.
LARGEST_EXPONENT = 30
# The share of the free memory that the tensors kept for the backward pass may take; the rest is for passing ones.
MEMORY_SHARE = 0.6


# ----------------------------------------------------------------------------------------------------------------------
# The prefix tree
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenSequence:
    """One training example. `is_label[i]`: predicting token i from those before it counts in the loss."""

    ids: tuple[int, ...]
    is_label: tuple[bool, ...]

    def __post_init__(self):
        if len(self.ids) != len(self.is_label):
            raise ValueError(f"{len(self.ids)} token ids, but {len(self.is_label)} label marks")
        if self.is_label and self.is_label[0]:
            raise ValueError("the first token cannot be a label: nothing precedes it")

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that must be computed: all before the last label, which itself is only predicted."""
        last_label = max((i for i, label in enumerate(self.is_label) if label), default=0)
        return self.ids[:last_label]


@dataclass(frozen=True)
class Branch:
    """A run of tokens in which each is the child of the one before it.

    `ancestors` are the packed positions [start, stop) of the tokens above it, from the root down, as few runs as
    possible; together they are as many tokens as the branch is deep.
    """

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]

    @property
    def depth(self) -> int:
        return sum(stop - start for start, stop in self.ancestors)


@dataclass(frozen=True)
class AttentionTile:
    """Some consecutive queries and all keys that any of them may see; `hidden` [queries, keys] marks the exceptions."""

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
        """Which keys each query sees, if it sees itself and the `window` - 1 (None: all) tokens above it."""
        if (window, device) not in self._tiles:
            self._tiles[window, device] = list(_attention_tiles(self.branches, window, device))
        return self._tiles[window, device]


def build_prefix_tree(sequences: Sequence[TokenSequence]) -> PrefixTree:
    """Lays the examples into one tree; their order does not matter. Raises ValueError if none has a label."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    branches: list[Branch] = []
    labels: Counter[tuple[int, int]] = Counter()  # (packed position of the predicting token, label token)

    previous: tuple[int, ...] = ()
    path: list[int] = []  # packed positions of the tokens of `previous`
    for sequence in sorted(sequences, key=lambda sequence: sequence.inputs):
        # In sorted order no earlier example shares more with this one than its neighbour does.
        inputs = sequence.inputs
        shared = _common_prefix_length(previous, inputs)
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


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _runs(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Rising positions as runs [start, stop)."""
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
    """What is left of the runs without their first `tokens` tokens; neighbouring runs become one."""
    positions = [position for start, stop in runs for position in range(start, stop)][tokens:]
    return tuple(slice(start, stop) for start, stop in _runs(positions))


# ----------------------------------------------------------------------------------------------------------------------
# Attention along the tree
# ----------------------------------------------------------------------------------------------------------------------


class _TreeAttention(torch.autograd.Function):
    """softmax(q kᵀ) v of each token over its ancestors and itself, tile by tile.

    Nothing of the size queries x keys is kept for the backward pass: as in flash attention (Dao et al. 2022, section
    3.1 and appendix B) the probabilities are formed again from the logarithm of their normaliser. Query heads that
    share a key head are rows of one matrix product, so that keys and values are never repeated.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, tiles: list[AttentionTile]) -> Tensor:
        """query [T, key heads, group, dim], scaled; key and value [key heads, T, dim] -> [T, key heads, group, dim]."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_normaliser = query.new_empty(query.shape[:-1])
        for tile in tiles:
            scores = _tile_scores(query[tile.queries], _gather(key, tile.keys), tile.hidden)
            maximum = scores.amax(-1, keepdim=True)
            exponentials = scores.sub_(maximum).exp_()
            normaliser = exponentials.sum(-1, keepdim=True)
            averages = (exponentials @ _gather(value, tile.keys)).div_(normaliser)
            log_normaliser[tile.queries] = _by_token(normaliser.log_().add_(maximum), query.shape[2]).squeeze(-1)
            output[tile.queries] = _by_token(averages, query.shape[2])
        ctx.save_for_backward(query, key, value, output, log_normaliser)
        ctx.tiles = tiles
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        query, key, value, output, log_normaliser = ctx.saved_tensors
        group = query.shape[2]
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        dot = (grad_output * output).sum(-1, keepdim=True)
        for tile in ctx.tiles:
            tile_key, tile_value = _gather(key, tile.keys), _gather(value, tile.keys)
            tile_query, tile_grad = _by_head(query[tile.queries]), _by_head(grad_output[tile.queries])
            probabilities = _tile_scores(query[tile.queries], tile_key, tile.hidden)
            probabilities.sub_(_by_head(log_normaliser[tile.queries].unsqueeze(-1))).exp_()
            _scatter_add(grad_value, tile.keys, probabilities.transpose(1, 2) @ tile_grad)
            grad_scores = tile_grad @ tile_value.transpose(1, 2)
            grad_scores.sub_(_by_head(dot[tile.queries])).mul_(probabilities)
            grad_query[tile.queries] = _by_token(grad_scores @ tile_key, group)
            _scatter_add(grad_key, tile.keys, grad_scores.transpose(1, 2) @ tile_query)
        return grad_query, grad_key, grad_value, None


def _tile_scores(query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
    """[key heads, queries x group, keys], minus infinity where a query must not see a key."""
    scores = _by_head(query) @ key.transpose(1, 2)
    by_query = scores.view(scores.shape[0], *query.shape[0:3:2], scores.shape[2])
    by_query.masked_fill_(hidden[:, None, :], float("-inf"))
    return scores


def _by_head(tokens: Tensor) -> Tensor:
    """[tokens, key heads, group, dim] -> [key heads, tokens x group, dim]; no copy where there is one key head."""
    return tokens.transpose(0, 1).reshape(tokens.shape[1], -1, tokens.shape[3])


def _by_token(heads: Tensor, group: int) -> Tensor:
    return heads.view(heads.shape[0], -1, group, heads.shape[2]).transpose(0, 1)


def _gather(tokens: Tensor, runs: tuple[slice, ...]) -> Tensor:
    return tokens[:, runs[0]] if len(runs) == 1 else torch.cat([tokens[:, run] for run in runs], 1)


def _scatter_add(tokens: Tensor, runs: tuple[slice, ...], addend: Tensor) -> None:
    parts = addend.split([run.stop - run.start for run in runs], 1)
    for run, part in zip(runs, parts, strict=True):
        tokens[:, run] += part


def _shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    prefix_tree: PrefixTree | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function that models call (transformers' AttentionInterface); without a tree, plain sdpa.

    query [1, heads, T, dim], key and value [1, key heads, T, dim] -> [1, T, heads, dim]
    """
    if prefix_tree is None:
        kwargs.update(scaling=scaling, dropout=dropout, sliding_window=sliding_window)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if dropout or unknown or not getattr(module, "is_causal", True):
        reason = "attention dropout" if dropout else ", ".join(unknown) or "attention to later tokens"
        raise ValueError(f"the shared-prefix step does not know {reason} ({type(module).__name__})")
    _, heads, tokens, dim = query.shape
    scaled = query * (dim**-0.5 if scaling is None else scaling)
    grouped = scaled[0].transpose(0, 1).unflatten(1, (key.shape[1], heads // key.shape[1]))
    output = _TreeAttention.apply(grouped, key[0], value[0], prefix_tree.tiles(sliding_window, query.device))
    return output.reshape(1, tokens, heads, -1), None


AttentionInterface.register(ATTENTION_NAME, _shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


# ----------------------------------------------------------------------------------------------------------------------
# The head
# ----------------------------------------------------------------------------------------------------------------------


class _SummedCrossEntropy(torch.autograd.Function):
    """sum of weight x (logsumexp of the row's logits - the label's logit), with the gradient of the hidden states.

    Its gradient for a row is (the row's weights summed) x softmax(logits) @ head - sum of weight x head[label]. The
    first term is an attention over the vocabulary with the head as keys and values, and is computed like one: block by
    block, rescaling what was summed when a logit is much larger than those before.

    A model that has learnt the form is sure of most tokens, and almost all of its probability lies in few blocks. The
    product with the other blocks, half of the head's work, is left out for a row that has no more than
    NEGLIGIBLE_ROUNDINGS roundings of its probability there; the normaliser always counts all. With B blocks a row's
    gradient, a difference of head rows, is off by at most B * NEGLIGIBLE_ROUNDINGS roundings of the largest head row:
    in FP32 with 200 blocks by about three. (A row surer than that has no gradient to speak of, and may lose it.)
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, tree: PrefixTree, softcap: float | None) -> Tensor:
        """hidden [R, width], head [vocabulary, width] -> scalar"""
        rows, labels, weights = (
            tensor.to(hidden.device) for tensor in (tree.label_rows, tree.label_ids, tree.label_weights)
        )
        weights = weights.to(hidden.dtype)
        label_heads = head[labels]
        label_logits = (hidden[rows] * label_heads).sum(-1)
        label_slopes = torch.ones_like(label_logits)
        if softcap is not None:
            label_logits = softcap * torch.tanh(label_logits / softcap)
            label_slopes = 1 - (label_logits / softcap) ** 2

        needs_gradient = ctx.needs_input_grad[0]
        log_normaliser = hidden.new_empty(len(hidden))
        largest_label = log_normaliser.new_full(log_normaliser.shape, float("-inf"))
        largest_label.scatter_reduce_(0, rows, label_logits, "amax")
        mean_head = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(hidden), HEAD_BLOCK_ROWS):
            block = slice(start, start + HEAD_BLOCK_ROWS)
            log_normaliser[block], mean = _softmax_over_vocabulary(
                hidden[block], head, softcap, largest_label[block], needs_gradient
            )
            if needs_gradient:
                mean_head[block] = mean
        loss = (weights * (log_normaliser[rows] - label_logits)).sum()

        if needs_gradient:
            row_weights = torch.zeros_like(log_normaliser).index_add_(0, rows, weights)
            gradient = mean_head.mul_(row_weights[:, None])
            gradient.index_add_(0, rows, label_heads * (weights * label_slopes)[:, None], alpha=-1)
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None


def _softmax_over_vocabulary(
    hidden: Tensor, head: Tensor, softcap: float | None, label_logits: Tensor, with_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """logsumexp of each row's logits [rows] and, if asked for, the gradient of it [rows, width].

    `label_logits` [rows]: one of each row's logits, from which its sum of exponentials is at least known to be 1.
    """
    block_bytes = CPU_HEAD_BLOCK_BYTES if hidden.device.type == "cpu" else GPU_HEAD_BLOCK_BYTES
    block_size = min(len(head), max(1, block_bytes // (len(hidden) * hidden.element_size())))
    negligible = NEGLIGIBLE_ROUNDINGS * torch.finfo(hidden.dtype).eps
    shift = label_logits[:, None].clone()
    least, total = torch.ones_like(shift), torch.zeros_like(shift)  # what the sum comes to at least, and up to here
    mean = torch.zeros_like(hidden) if with_mean else None
    buffer = hidden.new_empty(block_size * len(hidden))  # one for all blocks: fresh memory would have to be mapped
    for head_block in head.split(block_size):
        logits = buffer[: len(head_block) * len(hidden)].view(len(hidden), len(head_block))
        torch.mm(hidden, head_block.T, out=logits)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        maximum = logits.amax(-1, keepdim=True)
        if (maximum - shift).max() > LARGEST_EXPONENT:
            higher = torch.maximum(maximum, shift)
            shrink = (shift - higher).exp_()
            shift, least, total = higher, least * shrink, total * shrink
            if with_mean:
                mean.mul_(shrink)
        slopes = None if softcap is None or not with_mean else 1 - (logits / softcap) ** 2
        exponentials = logits.sub_(shift).exp_()
        sums = exponentials.sum(-1, keepdim=True)
        total.add_(sums)
        if with_mean:
            counted = (sums > negligible * torch.maximum(least, total)).squeeze(-1).nonzero().squeeze(-1)
            weights = exponentials if slopes is None else exponentials.mul_(slopes)
            if len(counted) > MOST_ROWS * len(hidden):
                mean.addmm_(weights, head_block)
            elif len(counted):
                mean.index_add_(0, counted, weights[counted] @ head_block)
    return (shift + total.log()).squeeze(-1), None if mean is None else mean.div_(total)


# ----------------------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------------------


def use_shared_prefix_attention(model: nn.Module) -> None:
    """Prepares a causal language model for `shared_prefix_loss`; call it once, before the model is wrapped for DDP.

    Generation and every other use of the model go on as with sdpa. Raises ValueError for a model whose loss this module
    would not compute rightly: by its configuration, or because two short examples come out otherwise than alone.
    """
    causal_lm = _causal_lm(model)
    name, head = type(causal_lm).__name__, causal_lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        raise ValueError(f"{name}: the head must be a frozen linear layer without bias and without an adapter")
    unknown = set(getattr(causal_lm.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"{name}: layers of type {', '.join(sorted(unknown))} are unknown to the shared-prefix step")
    causal_lm.set_attn_implementation(ATTENTION_NAME)
    if causal_lm.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(f"{name} does not let its attention be replaced")
    _check_against_plain_forward(model, name)


def shared_prefix_loss(model: nn.Module, tree: PrefixTree) -> Tensor:
    """The sum, in nats, of the cross entropy of every label of every example; a scalar that can be differentiated.

    `model`: the outermost module (PeftModel, DistributedDataParallel, ...): its own forward is run. Divide by the label
    count of the whole effective batch before the backward pass. Under `torch.no_grad()` the head skips the gradient.
    """
    causal_lm = _causal_lm(model)
    if causal_lm.config._attn_implementation != ATTENTION_NAME:
        raise ValueError("call use_shared_prefix_attention(model) before shared_prefix_loss")
    head = causal_lm.get_output_embeddings()
    hidden = _hidden_states(model, tree).index_select(0, tree.predicting.to(head.weight.device))
    softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
    return _SummedCrossEntropy.apply(hidden, head.weight, tree, softcap)


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside its wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _hidden_states(model: nn.Module, tree: PrefixTree) -> Tensor:
    """What the decoder hands to the head for each packed token, [T, width].

    The forward of the outermost module runs, so that wrappers do their work; it is asked for the logits of no token.
    """
    causal_lm = _causal_lm(model)
    device = causal_lm.get_input_embeddings().weight.device
    captured: list[Tensor] = []
    hook = causal_lm.get_decoder().register_forward_hook(lambda module, args, output: captured.append(output[0]))
    try:
        model(
            input_ids=tree.input_ids.to(device),
            position_ids=tree.position_ids.to(device),
            # A mask with four dimensions is handed through as it is: no mask of T x T is built. The tree is the mask.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            prefix_tree=tree,
            logits_to_keep=torch.empty(0, dtype=torch.long, device=device),
            use_cache=False,
        )
    finally:
        hook.remove()
    return captured[0][0]


@torch.no_grad()
def _check_against_plain_forward(model: nn.Module, name: str) -> None:
    """Compares two short examples, computed as a tree, with the model's ordinary forward on each of them."""
    causal_lm = _causal_lm(model)
    ids = torch.arange(1, 25) % causal_lm.config.vocab_size
    examples = [ids[:12], torch.cat([ids[:6], ids[12:]])]
    tree = build_prefix_tree([TokenSequence(tuple(e.tolist()), (False,) + (True,) * (len(e) - 1)) for e in examples])
    was_training = model.training
    model.eval()
    try:
        ours = shared_prefix_loss(model, tree)
        plain = 0.0
        for example in examples:
            example = example.to(ours.device)
            logits = model(input_ids=example[None], use_cache=False).logits[0, :-1]
            plain += nn.functional.cross_entropy(logits, example[1:], reduction="sum")
    finally:
        model.train(was_training)
    if not torch.isclose(ours, plain, rtol=1e-3):
        raise ValueError(f"{name}: the shared-prefix loss of a test batch is {ours:.4f}, the plain loss {plain:.4f}")


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches that fit into memory
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class TokenBudget:
    """How many packed tokens one forward and backward pass may hold; shrinks when memory runs out all the same."""

    tokens: int

    def halve(self, tried: int) -> None:
        """After a step of `tried` packed tokens ran out of memory: a budget above that did not bind."""
        self.tokens = min(self.tokens, tried) // 2


@dataclass(frozen=True)
class StepResult:
    """What one effective batch came to on this process."""

    loss_sum: Tensor  # scalar, nats
    num_micro_batches: int


def backward_in_micro_batches(
    model: nn.Module, sequences: Sequence[TokenSequence], scale: float, budget: TokenBudget
) -> StepResult:
    """Adds the gradients of `scale` x (the sum of all label losses) to those of the adapters.

    `scale` is 1 / (labels of the whole effective batch); times the number of processes under DDP, which averages.
    The examples go through in groups of neighbours in the prefix tree, each filled as far as `budget` allows. A single
    example that is longer than the budget goes through with activation checkpointing. When memory runs out, the budget
    is halved and the step starts again from the gradients and random states it found. (A GPU says that it has run out;
    on a CPU Linux rather ends the process, and the budget alone is the protection.) Under DDP the gradients are
    synchronised once, after all this; a process may have no examples. Raises the error of the last attempt when a
    single example does not fit.
    """
    sequences = [sequence for sequence in sequences if any(sequence.is_label)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    device = parameters[0].device
    random_states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    while True:
        try:
            with _without_synchronisation(model):
                result = _backward_once(model, sequences, scale, budget.tokens)
            break
        except RuntimeError as error:
            shortest = min(len(sequence.inputs) for sequence in sequences)
            if not should_reduce_batch_size(error) or budget.tokens < shortest:
                raise  # below the shortest, every example already goes through alone and checkpointed
        # Out of the handler, so that the failed pass is no longer referenced and its memory is free.
        budget.halve(tried=build_prefix_tree(sequences).num_tokens)
        clear_device_cache(garbage_collection=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        torch.set_rng_state(random_states[0])
        if random_states[1] is not None:
            torch.cuda.set_rng_state(random_states[1], device)
    _synchronise_gradients(model)
    return result


def split_into_micro_batches(sequences: Sequence[TokenSequence], max_tokens: int) -> list[list[TokenSequence]]:
    """Groups of neighbours in the prefix tree with at most `max_tokens` packed tokens each, or one longer example."""
    groups: list[list[TokenSequence]] = []
    tokens = 0
    for sequence in sorted(sequences, key=lambda sequence: sequence.inputs):
        inputs = sequence.inputs
        if groups:
            tokens += len(inputs) - _common_prefix_length(groups[-1][-1].inputs, inputs)
        if not groups or tokens > max_tokens:
            groups.append([])
            tokens = len(inputs)
        groups[-1].append(sequence)
    return groups


def measure_token_budget(model: nn.Module) -> TokenBudget:
    """The packed tokens that fit into the free memory, from what a short probe makes autograd keep for each token."""
    probe_tokens = 64
    ids = tuple(i % _causal_lm(model).config.vocab_size for i in range(1, probe_tokens + 2))
    tree = build_prefix_tree([TokenSequence(ids, (False,) + (True,) * probe_tokens)])
    kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept_bytes = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept_bytes
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            kept.add(storage.data_ptr())
            kept_bytes += storage.nbytes()
        return tensor

    devices = [parameter.device for parameter in model.parameters()][:1]
    was_training = model.training
    model.train()  # dropout keeps masks and copies of its own
    with (
        torch.random.fork_rng([device.index for device in devices if device.type == "cuda"]),
        _without_synchronisation(model),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        shared_prefix_loss(model, tree)
    model.train(was_training)
    return TokenBudget(max(1, int(MEMORY_SHARE * _free_bytes(devices[0]) / (kept_bytes / probe_tokens))))


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    cap = int(total * torch.cuda.get_per_process_memory_fraction(device)) - torch.cuda.memory_allocated(device)
    return min(free + unused, cap)


def _backward_once(model: nn.Module, sequences: Sequence[TokenSequence], scale: float, max_tokens: int) -> StepResult:
    trees = [build_prefix_tree(group) for group in split_into_micro_batches(sequences, max_tokens)]
    loss_sum = torch.zeros((), device=_causal_lm(model).device)
    for tree in trees:
        with _activation_checkpointing(model, tree.num_tokens > max_tokens):
            loss = shared_prefix_loss(model, tree)
            (loss * scale).backward()
        loss_sum = loss_sum + loss.detach()
    return StepResult(loss_sum, num_micro_batches=len(trees))


@contextlib.contextmanager
def _activation_checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keeps only each layer's input for the backward pass and computes the rest again (about a third more work)."""
    causal_lm = _causal_lm(model)
    if not wanted or causal_lm.is_activation_checkpointing:
        yield
        return
    causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    causal_lm.disable_input_require_grads()  # for reentrant checkpoints; the hook would stay, and cost a gradient
    try:
        yield
    finally:
        causal_lm.activation_checkpointing_disable()


def _without_synchronisation(model: nn.Module) -> contextlib.AbstractContextManager:
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


def _synchronise_gradients(model: nn.Module) -> None:
    """Lets DDP average the gradients gathered so far, by a pass of one token that adds nothing to them.

    DDP averages during a backward pass. If that were the last micro-batch, a process that runs out of memory in it
    could not start again: the others would already have its gradients. One token always fits.
    """
    if hasattr(model, "no_sync"):
        tree = build_prefix_tree([TokenSequence((0, 0), (False, True))])
        (shared_prefix_loss(model, tree) * 0.0).backward()
