"""Attention along the prefix tree: each token sees its ancestors within the layer's window, and itself.

Written as matrix products: flex_attention has no backward pass on a CPU (torch 2.13).
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from conversation.training.prefix_tree import AttentionTile, PrefixTree

ATTENTION_NAME = "shared_prefix"


class KeyStore(Protocol):
    """Keeps what a layer's attention computes, and says what its queries see. For reading without gradients."""

    def update(
        self, layer: int, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take the keys and values of new tokens, [rows, key heads, tokens, dim].

        Returns the keys and values to attend to, in the same form, and what sdpa adds to the scores,
        [rows, 1, tokens, keys]. A tree's queries need no such mask. `window`: as in `PrefixTree.tiles`.
        """


class _TreeAttention(torch.autograd.Function):
    """softmax(q kᵀ) v of each token over its ancestors and itself, tile by tile.

    Nothing of size queries x keys is saved for the backward pass. As in flash attention (Dao et al. 2022, section 3.1
    and appendix B), it recomputes the probabilities from the logarithm of their normaliser. Query heads with the same
    key head are rows of one matrix product, so keys and values are never repeated.
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
    """[key heads, queries x group, keys]: minus infinity where a key is hidden from a query."""
    scores = _by_head(query) @ key.transpose(1, 2)
    by_query = scores.view(scores.shape[0], *query.shape[0:3:2], scores.shape[2])
    by_query.masked_fill_(hidden[:, None, :], float("-inf"))
    return scores


def _by_head(tokens: Tensor) -> Tensor:
    """[tokens, key heads, group, dim] -> [key heads, tokens x group, dim]; no copy for a single key head."""
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
    key_store: KeyStore | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function for transformers' AttentionInterface. Without a tree it is plain sdpa.

    query [rows, heads, T, dim], key and value [rows, key heads, T, dim] -> [rows, T, heads, dim]; with a tree one row.
    """
    if key_store is not None:
        key, value, attention_mask = key_store.update(cast(int, module.layer_idx), key, value, sliding_window)
    if prefix_tree is None:
        kwargs.update(scaling=scaling, dropout=dropout, sliding_window=sliding_window)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if dropout or unknown or not getattr(module, "is_causal", True):
        reason = "attention dropout" if dropout else ", ".join(unknown) or "attention to later tokens"
        raise ValueError(f"the shared-prefix step does not support {reason} ({type(module).__name__})")
    _, heads, tokens, dim = query.shape
    scaled = query * (dim**-0.5 if scaling is None else scaling)
    grouped = scaled[0].transpose(0, 1).unflatten(1, (key.shape[1], heads // key.shape[1]))
    output = _TreeAttention.apply(grouped, key[0], value[0], prefix_tree.tiles(sliding_window, query.device))
    return output.reshape(1, tokens, heads, -1), None


AttentionInterface.register(ATTENTION_NAME, _shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
