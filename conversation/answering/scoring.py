"""How likely an answer is, and how much likelier a question makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from conversation.answering.decoding import NEUTRAL_PROMPT
from conversation.answering.token_losses import label_log_probabilities
from conversation.format.calls import Prompt
from conversation.models.tokenizer import encode_prompt
from conversation.training.prefix_tree import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Prompt, Sequence[int]]]
) -> list[float]:
    """log p(answer | prompt) in nats for each pair of a prompt and an answer's token ids: the sum over its tokens.

    Raises ValueError for an answer without tokens.
    """
    if not all(len(answer) for _, answer in pairs):
        raise ValueError("an answer without tokens has no probability")
    sequences = []
    for prompt, answer in pairs:
        before = encode_prompt(tokenizer, prompt)
        sequences.append(TokenSequence((*before, *answer), (False,) * len(before) + (True,) * len(answer)))
    return [found[:, 0].sum().item() for found in label_log_probabilities(model, sequences)]


def scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Prompt, Sequence[int]]]
) -> list[float]:
    """log p(answer | prompt) - log p(answer | neutral question) in nats: how much the question speaks for the answer.

    Among five answers the right one is the one with the highest score more often than the likeliest one is: pointwise
    mutual information (Holtzman et al. 2021, "Surface form competition").
    """
    asked = log_probabilities(model, tokenizer, pairs)
    neutral = log_probabilities(model, tokenizer, [(NEUTRAL_PROMPT, answer) for _, answer in pairs])
    return [with_question - without for with_question, without in zip(asked, neutral, strict=True)]
