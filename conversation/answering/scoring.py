"""How likely an answer is, and how much likelier a question makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from conversation.format.calls import Prompt
from conversation.models.tokenizer import encode_prompt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEUTRAL_QUESTION = "Tell me something."
NEUTRAL_PROMPT = Prompt(NEUTRAL_QUESTION)
"""Asks for an answer about nothing in particular: what is likely here is likely after any question."""
ANSWERS_AT_A_TIME = 16
HEAD_ROWS = 64
"""Rows of logits that are held at a time: 67 MB for 262,144 tokens in float32."""


def log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Prompt, Sequence[int]]]
) -> list[float]:
    """log p(answer | prompt) in nats for each pair of a prompt and an answer's token ids: the sum over its tokens.

    Answers to the same prompt go through the model together, at most 16 at a time, and the prompt is read once for
    them. log p of a token is computed in float32, the sum in float64. Raises ValueError for an answer without tokens.
    """
    if not all(len(answer) for _, answer in pairs):
        raise ValueError("an answer without tokens has no probability")
    places: dict[Prompt, list[int]] = {}
    for place, (prompt, _) in enumerate(pairs):
        places.setdefault(prompt, []).append(place)
    sums = [0.0] * len(pairs)
    for prompt, group in places.items():
        group.sort(key=lambda place: len(pairs[place][1]))  # so that little is padded
        prompt_ids = encode_prompt(tokenizer, prompt)
        for start in range(0, len(group), ANSWERS_AT_A_TIME):
            batch = group[start : start + ANSWERS_AT_A_TIME]
            answers = [list(pairs[place][1]) for place in batch]
            for place, found in zip(batch, _answers_to_one_prompt(model, prompt_ids, answers), strict=True):
                sums[place] = found
    return sums


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


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer_ids: Sequence[int]
) -> float:
    """The score of one answer: see `scores`."""
    return scores(model, tokenizer, [(prompt, answer_ids)])[0]


def _answers_to_one_prompt(model: PreTrainedModel, prompt_ids: list[int], answers: list[list[int]]) -> list[float]:
    import torch
    from transformers import DynamicCache

    decoder, cache = model.get_decoder(), DynamicCache()
    width = max(map(len, answers))
    # The prompt's last token predicts the first of the answer; nothing is predicted from the answer's last.
    rows = [[prompt_ids[-1], *answer[:-1]] + [0] * (width - len(answer)) for answer in answers]
    with torch.inference_mode():
        decoder(input_ids=torch.tensor([prompt_ids[:-1]], device=model.device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(answers))
        # No mask: padding stands after every token that counts, so attention never looks at it.
        hidden = decoder(input_ids=torch.tensor(rows, device=model.device), past_key_values=cache, use_cache=True)
        states = torch.cat([row[: len(answer)] for row, answer in zip(hidden[0], answers, strict=True)])
        labels = torch.tensor([token for answer in answers for token in answer], device=model.device)
        found = torch.cat(
            [
                _log_softmax_at(model, states[start : start + HEAD_ROWS], labels[start : start + HEAD_ROWS])
                for start in range(0, len(labels), HEAD_ROWS)
            ]
        )
    return [each.double().sum().item() for each in found.split([len(answer) for answer in answers])]


def _log_softmax_at(model: PreTrainedModel, states: Tensor, labels: Tensor) -> Tensor:
    """log p of `labels` [R] from the decoder's last states [R, width] -> [R] in float32."""
    logits = model.get_output_embeddings()(states).float()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(1)
