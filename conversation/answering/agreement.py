"""Whether another program says what the merged model says: its answers, read by the merged model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from conversation.errors import TRIED_AND_FAILED, UserError
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
    """How the greedy answers of another program, as token ids, agree with the merged model.

    An answer without tokens equals none of the merged model's. Raises UserError when the merged model's own logits are
    not finite.
    """
    gaps = []  # of each answer: [tokens], of logits as of log probabilities
    for prompt, answer in asked:
        if not answer:
            gaps.append(torch.empty(0))
            continue
        ids = torch.tensor([[*encode_prompt(tokenizer, prompt), *answer]], device=model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=len(answer)).logits[0].float()
        said = logits.gather(1, ids[0, -len(answer) :, None])[:, 0]
        gaps.append((logits.max(-1).values - said).cpu())
    every = torch.cat([torch.zeros(1), *gaps])
    largest = every.max().item()  # NaN if one of them is
    if not math.isfinite(largest):
        raise UserError("the merged model's logits are not finite", "train and merge it again", TRIED_AND_FAILED)
    return Agreement(
        answers=len(gaps),
        equal_answers=sum(len(each) > 0 and bool((each == 0).all()) for each in gaps),
        tokens=len(every) - 1,
        equal_tokens=int((every == 0).sum()) - 1,
        largest_gap=largest,
    )
