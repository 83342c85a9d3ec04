"""Answers of another program as the merged model sees them; a model that computes no numbers agrees with nothing."""

from types import SimpleNamespace

import pytest
import torch

from conversation.answering import agreement
from conversation.errors import UserError
from conversation.format.calls import Prompt

PROMPT = Prompt("Why?")


class LikesTheNext:
    """After token n it likes n + 1 best, by one nat."""

    device = torch.device("cpu")

    def __init__(self, bad: float | None = None):
        self.bad = bad

    def __call__(self, input_ids, use_cache, logits_to_keep):
        logits = torch.zeros(1, input_ids.shape[1], 9)
        logits.scatter_(2, (input_ids + 1).unsqueeze(-1), 1.0)
        if self.bad is not None:
            logits[0, -1, 0] = self.bad
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.fixture(autouse=True)
def prompt_of_two(monkeypatch):
    monkeypatch.setattr(agreement, "encode_prompt", lambda tokenizer, prompt: [1, 2])


def compare(*answers, model=None):
    return agreement.compare_answers(model or LikesTheNext(), None, [(PROMPT, answer) for answer in answers])


def test_answers_and_tokens_that_the_model_likes_best_are_counted():
    assert compare([3, 4, 5], [3, 5, 6]) == agreement.Agreement(2, 1, 6, 5, 1.0)
    assert compare([3, 4]) == agreement.Agreement(1, 1, 2, 2, 0.0)


def test_an_answer_without_tokens_is_none_of_the_models():
    assert compare([], [3]) == agreement.Agreement(2, 1, 1, 1, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_without_numbers_is_named_whichever_answer_shows_it(bad):
    with pytest.raises(UserError, match="not finite"):
        compare([3, 4], [3], model=LikesTheNext(bad))
