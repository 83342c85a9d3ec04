"""The head and its loss: cross entropy over the vocabulary in blocks, with the gradient in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from conversation.training.prefix_tree import PrefixTree

# A block of logits [label tokens, vocabulary entries]: small for a CPU's caches, larger to fill a GPU.
CPU_HEAD_BLOCK_BYTES, GPU_HEAD_BLOCK_BYTES = 8 * 2**20, 64 * 2**20
HEAD_BLOCK_ROWS = 4096
# A row skips the gradient of a block of the vocabulary with less of its probability than this, in units of the type's
# rounding error.
NEGLIGIBLE_ROUNDINGS = 1 / 64
# Above this share of rows that take part, all do: to gather them would cost more than it saves.
MOST_ROWS = 0.8
# Exponentials are of logits minus a shift. It rises when one would exceed e^this, which is well within FP32's range.
LARGEST_EXPONENT = 30


class SummedCrossEntropy(torch.autograd.Function):
    """sum of weight x (logsumexp of the row's logits - the label's logit), with the gradient of the hidden states.

    Its gradient for a row is (the row's weights summed) x softmax(logits) @ head - sum of weight x head[label]. The
    first term is an attention over the vocabulary, with the head as keys and values, and is computed like one: block by
    block, with the sums rescaled when a logit is much larger than those before.

    A model that has learnt the form is sure of most tokens: almost all of its probability is in few blocks. A row skips
    the product with a block, half of the head's work, when no more than NEGLIGIBLE_ROUNDINGS roundings of its
    probability are there; the normaliser always counts all. With B blocks a row's gradient, a difference of head rows,
    is off by at most B * NEGLIGIBLE_ROUNDINGS roundings of the largest head row: in FP32 with 200 blocks by about
    three. (A row surer than that has almost no gradient, and may lose it.)
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, tree: PrefixTree, softcap: float | None) -> Tensor:
        """hidden [R, width], head [vocabulary, width] -> scalar"""
        rows, labels, weights = (
            tensor.to(hidden.device) for tensor in (tree.label_rows, tree.label_ids, tree.label_weights)
        )
        weights = weights.to(hidden.dtype)
        label_heads = head[labels].to(hidden.dtype)  # the head may be held in bfloat16
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
            if mean_head is not None and mean is not None:
                mean_head[block] = mean
        loss = (weights * (log_normaliser[rows] - label_logits)).sum()

        if mean_head is not None:
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
    """logsumexp of each row's logits [rows] and, if `with_mean`, its gradient [rows, width].

    `label_logits` [rows]: one of each row's logits. With it as the first shift, a sum of exponentials is at least 1.
    """
    block_bytes = CPU_HEAD_BLOCK_BYTES if hidden.device.type == "cpu" else GPU_HEAD_BLOCK_BYTES
    block_size = min(len(head), max(1, block_bytes // (len(hidden) * hidden.element_size())))
    negligible = NEGLIGIBLE_ROUNDINGS * torch.finfo(hidden.dtype).eps
    shift = label_logits[:, None].clone()
    least, total = torch.ones_like(shift), torch.zeros_like(shift)  # lower bound of the sum; the sum so far
    mean = torch.zeros_like(hidden) if with_mean else None
    buffer = hidden.new_empty(block_size * len(hidden))  # one for all blocks: new memory would have to be mapped
    for held_block in head.split(block_size):
        head_block = held_block.to(hidden.dtype)
        logits = buffer[: len(head_block) * len(hidden)].view(len(hidden), len(head_block))
        torch.mm(hidden, head_block.T, out=logits)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        maximum = logits.amax(-1, keepdim=True)
        if (maximum - shift).max() > LARGEST_EXPONENT:
            higher = torch.maximum(maximum, shift)
            shrink = (shift - higher).exp_()
            shift, least, total = higher, least * shrink, total * shrink
            if mean is not None:
                mean.mul_(shrink)
        slopes = None if softcap is None or mean is None else 1 - (logits / softcap) ** 2
        exponentials = logits.sub_(shift).exp_()
        sums = exponentials.sum(-1, keepdim=True)
        total.add_(sums)
        if mean is not None:
            counted = (sums > negligible * torch.maximum(least, total)).squeeze(-1).nonzero().squeeze(-1)
            weights = exponentials if slopes is None else exponentials.mul_(slopes)
            if len(counted) > MOST_ROWS * len(hidden):
                mean.addmm_(weights, head_block)
            elif len(counted):
                mean.index_add_(0, counted, weights[counted] @ head_block)
    return (shift + total.log()).squeeze(-1), None if mean is None else mean.div_(total)
