"""The loss of one training step, each shared token computed once.

The examples of a step repeat each other: all begin with the same developer turn, and those of one conversation tree
also share their history. This module puts a step's examples into one prefix tree (a trie of token ids). Each distinct
token-in-its-context passes through the model once, in a single unpadded sequence. Every label counts as often as
examples have it:

    tree = build_prefix_tree(sequences)          # structure only, no model
    loss = shared_prefix_loss(model, tree)       # the sum of all label losses, in nats
    (loss / num_labels).backward()               # the gradients of the plain computation

Shared: the whole computation of a token in a decoder (embedding, projections, norms, MLP, keys, values, attention
output, logits), for tokens with equal ids from the start of their examples.
Not shared: anything after the first difference. There is no padding, and no token after an example's last label is
computed, since it could change no loss.

Why the gradients are the same: in a causal decoder, a token's hidden state is a function of the token ids up to it. Two
examples with an equal prefix therefore compute the same numbers there. Computed twice, or once and used twice, they
give the same sum of losses as a function of the adapters, and so the same gradient (the chain rule adds the gradients
of all uses, as it would those of the copies). Everything acts on single tokens, except in two places: attention, which
sees for each token exactly its ancestors in the tree within the layer's sliding window; and rotary positions, which are
the depth in the tree.

LoRA dropout draws its masks per computed token. A shared token has one mask; the plain computation would draw one for
each example with that token. The expected gradient is the same; within a step, examples that share a prefix share its
noise. Other micro-batches and other processes draw other masks: "the same result" means up to that.

The head is the other half of the work (Gemma's vocabulary has 262,144 entries). It runs only on tokens that predict a
label, over blocks of the vocabulary with a running softmax (as flash attention does over keys: Milakov & Gimelshein
2018, Dao et al. 2022), and forms the gradient of the hidden states in the same pass. No logits are saved or computed
twice, and a block of them has a fixed size. The normaliser is summed block by block, so it is also more exact than
torch's: on a CPU, torch 2.13's FP32 cross entropy sums the 262,144 exponentials one after the other and loses up to
7e-5 of them, which shows as 1e-4 to 5e-4 in the gradients (benchmarks/README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conversation.models.frozen_weights import WidenedLinear
from conversation.training.prefix_tree import PrefixTree, TokenSequence, build_prefix_tree
from conversation.training.tree_attention import ATTENTION_NAME, KeyStore
from conversation.training.vocabulary_loss import SummedCrossEntropy


def use_shared_prefix_attention(model: nn.Module) -> None:
    """Prepare a causal language model for `shared_prefix_loss`. Call it once, before the model is wrapped for DDP.

    Generation and every other use of the model work as with sdpa. Raises ValueError for a model whose loss this module
    would not compute correctly: by its configuration, or by a comparison on two short examples. It is then as it was.
    """
    causal_lm = find_causal_lm(model)
    name, head = type(causal_lm).__name__, causal_lm.get_output_embeddings()
    if type(head) not in (nn.Linear, WidenedLinear) or head.bias is not None or head.weight.requires_grad:
        raise ValueError(f"{name}: the head must be a frozen linear layer without bias and without an adapter")
    unknown = set(getattr(causal_lm.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"{name}: layers of type {', '.join(sorted(unknown))} are unknown to the shared-prefix step")
    before = causal_lm.config._attn_implementation
    try:
        causal_lm.set_attn_implementation(ATTENTION_NAME)
        if not uses_shared_prefix_attention(model):
            raise ValueError(f"{name} does not let its attention be replaced")
        _check_against_plain_forward(model, name)
    except ValueError:
        causal_lm.set_attn_implementation(before)
        raise


def uses_shared_prefix_attention(model: nn.Module) -> bool:
    """Whether a model is ready for `shared_prefix_loss`."""
    return find_causal_lm(model).config._attn_implementation == ATTENTION_NAME


def shared_prefix_loss(model: nn.Module, tree: PrefixTree) -> Tensor:
    """The sum, in nats, of the cross entropy of every label of every example: a differentiable scalar.

    `model`: the outermost module (PeftModel, DistributedDataParallel, ...), whose own forward runs. Divide by the label
    count of the whole effective batch before the backward pass. Under `torch.no_grad()` the head skips the gradient.
    """
    causal_lm = find_causal_lm(model)
    if not uses_shared_prefix_attention(model):
        raise ValueError("call use_shared_prefix_attention(model) before shared_prefix_loss")
    head = causal_lm.get_output_embeddings()
    hidden = hidden_states(model, tree).index_select(0, tree.predicting.to(head.weight.device))
    softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
    return SummedCrossEntropy.apply(hidden, head.weight, tree, softcap)


def find_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside its wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def hidden_states(model: nn.Module, tree: PrefixTree, key_store: KeyStore | None = None) -> Tensor:
    """The decoder's output for each packed token, [T, width].

    The forward of the outermost module runs, so that wrappers do their work. It computes the logits of no token.
    `key_store`: takes the keys and values of every layer.
    """
    causal_lm = find_causal_lm(model)
    device = next(causal_lm.get_input_embeddings().parameters()).device
    captured: list[Tensor] = []
    hook = causal_lm.get_decoder().register_forward_hook(lambda module, args, output: captured.append(output[0]))
    try:
        model(
            input_ids=tree.input_ids.to(device),
            position_ids=tree.position_ids.to(device),
            # A mask with four dimensions is passed on as it is, and no T x T mask is built. The tree is the mask.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            prefix_tree=tree,
            key_store=key_store,
            logits_to_keep=torch.empty(0, dtype=torch.long, device=device),
            use_cache=False,
        )
    finally:
        hook.remove()
    return captured[0][0]


@torch.no_grad()
def _check_against_plain_forward(model: nn.Module, name: str) -> None:
    """Compare two short examples, computed as a tree, with the model's ordinary forward on each.

    One pass in training mode comes first: it raises ValueError for attention dropout, which eval() turns off.
    """
    causal_lm = find_causal_lm(model)
    ids = torch.arange(1, 25) % causal_lm.config.vocab_size
    examples = [ids[:12], torch.cat([ids[:6], ids[12:]])]
    tree = build_prefix_tree([TokenSequence(tuple(e.tolist()), (False,) + (True,) * (len(e) - 1)) for e in examples])
    was_training = model.training
    try:
        with torch.random.fork_rng([causal_lm.device] if causal_lm.device.type == "cuda" else []):
            shared_prefix_loss(model.train(), tree)
        model.eval()
        ours = shared_prefix_loss(model, tree)
        plain = torch.zeros_like(ours)
        for example in examples:
            example = example.to(ours.device)
            logits = model(input_ids=example[None], use_cache=False).logits[0, :-1]
            plain += nn.functional.cross_entropy(logits, example[1:], reduction="sum")
    finally:
        model.train(was_training)
    if not torch.isclose(ours, plain, rtol=1e-3):
        raise ValueError(f"{name}: the shared-prefix loss of a test batch is {ours:.4f}, the plain loss {plain:.4f}")
