"""Log probabilities of answers, against the plain formula over whole sequences."""

import pytest
import torch

from conversation.answering import token_losses
from conversation.answering.decoding import NEUTRAL_PROMPT
from conversation.answering.scoring import log_probabilities, scores
from conversation.format.calls import Prompt
from conversation.models.tokenizer import encode, encode_prompt, load_tokenizer
from conversation.models.weights import load_model


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(tiny_folder).eval(), load_tokenizer(tiny_folder)


def plain(model, tokenizer, prompt, answer):
    """The sum of log softmax at the answer's tokens, one sequence at a time, nothing cached."""
    before = encode_prompt(tokenizer, prompt)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*before, *answer]]), use_cache=False).logits[0].double()
    found = logits.log_softmax(-1)[len(before) - 1 : -1]
    return found[torch.arange(len(answer)), torch.tensor(answer)].sum().item()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_log_probabilities_are_those_of_the_plain_formula(loaded, own_examples, monkeypatch, softcap):
    model, tokenizer = loaded
    monkeypatch.setattr(token_losses, "PACKED_TOKENS", 300)
    monkeypatch.setattr(token_losses, "ROWS", 7)
    monkeypatch.setattr(model.config, "final_logit_softcapping", softcap)
    first, second, third = own_examples[:3]
    answers = [encode(tokenizer, each.answer.pieces()) for each in (first, second, third)]
    one_token = [tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    pairs = [
        (first.prompt, answers[0]),
        (second.prompt, answers[1]),
        (first.prompt, answers[2]),
        (first.prompt, one_token),
    ]
    expected = [plain(model, tokenizer, *pair) for pair in pairs]
    assert log_probabilities(model, tokenizer, pairs) == pytest.approx(expected, rel=1e-5)


def test_the_score_is_what_the_question_adds(loaded, own_examples):
    model, tokenizer = loaded
    prompt, answer = own_examples[5].prompt, encode(tokenizer, own_examples[5].answer.pieces())
    expected = plain(model, tokenizer, prompt, answer) - plain(model, tokenizer, NEUTRAL_PROMPT, answer)
    assert scores(model, tokenizer, [(prompt, answer)])[0] == pytest.approx(expected, abs=0.01)
    assert scores(model, tokenizer, [(Prompt("Tell me something."), answer)])[0] == 0


def test_an_empty_answer_is_refused_and_no_pairs_are_no_scores(loaded):
    with pytest.raises(ValueError, match="without tokens"):
        log_probabilities(*loaded, [(Prompt("Why?"), [])])
    assert scores(*loaded, []) == []
