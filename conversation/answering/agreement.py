"""Whether another program says what the merged model says: its answers, read by the merged model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from conversation.format.calls import Prompt
from conversation.models.tokenizer import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Agreement:
    """`answers` were compared, and `equal_answers` of them are the merged model's own, token by token. Of all tokens,
    `equal_tokens` are those that the merged model likes best at their place; the others are by at most
    `largest_gap` nats less likely to it than the one it likes best."""

    answers: int
    equal_answers: int
    tokens: int
    equal_tokens: int
    largest_gap: float


@torch.inference_mode()
def compare_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[Prompt, Sequence[int]]],
) -> Agreement:
    """How the greedy answers of another program, as token ids, agree with the merged model."""
    equal_answers = equal_tokens = tokens = 0
    largest = 0.0
    for prompt, answer in asked:
        ids = torch.tensor([[*encode_prompt(tokenizer, prompt), *answer]], device=model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=len(answer)).logits[0].float()
        said = logits.gather(1, ids[0, -len(answer) :, None])[:, 0]
        gaps = logits.max(-1).values - said  # of logits as of log probabilities
        tokens += len(answer)
        equal_tokens += int((gaps == 0).sum())
        equal_answers += bool((gaps == 0).all())
        largest = max(largest, gaps.max().item())
    return Agreement(len(asked), equal_answers, tokens, equal_tokens, largest)
