"""Ways to ask a model. Under the grammar its answers are valid and repeat nothing, whatever the model prefers."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conversation.answering import constrained, decoding, reading, scoring
from conversation.answering.allowed_tokens import AllowedTokens, allowed_tokens
from conversation.answering.decoding import (
    CONSTRAINED,
    GREEDY,
    Decoding,
    generate_answer,
    generate_answers,
)
from conversation.answering.scoring import scores
from conversation.answering.verdicts import judge
from conversation.data.questions import THREE_CASES, Case
from conversation.format.calls import Prompt
from conversation.format.control_tokens import CONTROL_TOKENS
from conversation.format.grammar import MAX_CHARACTERS, Value, may_end, may_go_on
from conversation.models.tokenizer import encode, encode_example, encode_prompt, load_tokenizer
from conversation.models.weights import load_model

PROMPT = Prompt("Why?")
CONTRAST = Decoding("contrast")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder).eval()


class Stub:
    """A model that says what `logits(position, kind)` [vocabulary] prefers; `position` counts the tokens of a value.

    In a batch of contexts, every row gets the same logits, unless `logits` returns one row for each.
    """

    device = torch.device("cpu")

    def __init__(self, tokenizer, logits):
        self.tokenizer, self.of = tokenizer, logits
        self.kind, self.start = None, 0

    def __call__(self, input_ids, attention_mask, **_):
        chunk = self.tokenizer.decode(input_ids[0])
        for name in ("content", "text", "confidence", "target"):
            if chunk.endswith(f"{name}:<escape>"):
                self.kind, self.start = name, attention_mask.shape[1]
        if "<start_function_call>" in chunk and not chunk.endswith(":<escape>"):  # which call is next?
            self.kind = None
        logits = self.of(attention_mask.shape[1] - self.start, self.kind)
        return SimpleNamespace(logits=logits.expand(len(input_ids), -1)[:, None])


def verdict_of(tokenizer, ids):
    verdict = judge(Case("case", PROMPT), tokenizer, ids)
    assert verdict.passed and not verdict.warnings, (verdict.problem, verdict.warnings, verdict.marked_output)
    assert all(len(each) <= MAX_CHARACTERS[Value.FRAGMENT] for each in verdict.answer.fragments)
    return verdict


# --- free ------------------------------------------------------------------------------------------------------------


def test_answers_in_batches_are_those_of_each_prompt_alone(model, tokenizer, monkeypatch):
    monkeypatch.setattr(decoding, "PROMPTS_AT_A_TIME", 2)
    prompts = [case.prompt for case in THREE_CASES]
    together = generate_answers(model, tokenizer, prompts)
    assert together == [generate_answer(model, tokenizer, prompt, GREEDY) for prompt in prompts]
    assert all(len(ids) <= 300 for ids in together)
    assert generate_answers(model, tokenizer, []) == []


def test_sampled_answers_depend_on_the_seed_and_leave_the_callers_random_numbers_alone(model, tokenizer, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_NEW_TOKENS", 12)
    state = torch.get_rng_state()
    one, other = Decoding("sampled", temperature=9.0), Decoding("sampled", temperature=9.0, seed=1)
    first, again, else_ = (generate_answer(model, tokenizer, PROMPT, each) for each in (one, one, other))
    assert first == again != else_ and first != generate_answer(model, tokenizer, PROMPT)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "option", [{"method": "beam"}, {"temperature": 0}, {"top_p": 1.5}, {"seed": -1}, {"strength": 0}, {"n": 0}]
)
def test_an_option_that_cannot_be_right_is_refused(option):
    with pytest.raises(ValueError):
        Decoding(**{"method": "sampled", **option})


# --- constrained -----------------------------------------------------------------------------------------------------


def test_a_valid_greedy_answer_without_repeats_is_the_constrained_one(tiny_folder, tokenizer, own_examples):
    """On a model that has learnt three answers by heart, with caches longer than its sliding window."""
    model = load_model(tiny_folder)
    model.config.sliding_window = 24
    for layer in model.model.layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and 24
    examples = [encode_example(tokenizer, example) for example in own_examples[:9:4]]
    assert min(map(len, examples)) > 3 * model.config.sliding_window
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        for example in examples:
            start = example.num_prompt_tokens
            ids = torch.tensor([example.ids])
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
            torch.nn.functional.cross_entropy(logits, ids[0, start:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    prompts = [example.prompt for example in own_examples[:9:4]]
    free = generate_answers(model, tokenizer, prompts)
    assert free == [list(example.ids[example.num_prompt_tokens :]) for example in examples]
    assert generate_answers(model, tokenizer, prompts, CONSTRAINED) == free


def test_every_constrained_answer_is_valid_and_distinct_whatever_the_logits_are(tokenizer):
    escape = tokenizer.convert_tokens_to_ids("<escape>")
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        ends_often = [0.0, 4.0, 30.0][seed % 3]

        def logits(position, kind, generator=generator, ends_often=ends_often):
            random = 3 * torch.randn(1, len(tokenizer), generator=generator)
            random[0, escape] += ends_often
            return random

        verdict_of(tokenizer, generate_answer(Stub(tokenizer, logits), tokenizer, PROMPT, CONSTRAINED))


def test_logits_after_going_back_are_those_of_reading_anew(tiny_folder, tokenizer):
    model = load_model(tiny_folder).eval()
    model.config.sliding_window = 8
    contexts = [encode_prompt(tokenizer, prompt) for prompt in (PROMPT, THREE_CASES[1].prompt)]
    reader = reading.BatchReader(model, contexts, tokenizer.pad_token_id)
    for answer in ([20, 21, 22, 23, 24], [20, 21, 30], [20, 21, 30, 31], [20, 21, 30, 31], [40] * 12, [20]):
        for found, context in zip(reader.logits(answer), contexts, strict=True):
            with torch.inference_mode():
                expected = model(input_ids=torch.tensor([context + answer]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [CONSTRAINED, CONTRAST], ids=lambda how: how.method)
def test_a_random_model_says_valid_answers(model, tokenizer, how):
    for ids in generate_answers(model, tokenizer, [case.prompt for case in THREE_CASES], how):
        verdict_of(tokenizer, ids)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 0.0])
def test_logits_that_say_nothing_still_make_a_valid_answer(tokenizer, bad):
    stub = Stub(tokenizer, lambda *_: torch.full((1, len(tokenizer)), bad))
    verdict_of(tokenizer, generate_answer(stub, tokenizer, PROMPT, CONSTRAINED))


def test_likely_control_tokens_get_into_no_content_not_even_spelled_out(tokenizer):
    spelled = tokenizer("<end_of_turn>"[:1], add_special_tokens=False)["input_ids"]
    spelled += tokenizer("<end_of_turn>"[1:], add_special_tokens=False)["input_ids"]

    def logits(position, kind):
        row = torch.zeros(1, len(tokenizer))
        row[0, tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))] = 50.0
        row[0, tokenizer.convert_tokens_to_ids("<escape>")] = -50.0
        row[0, tokenizer.convert_tokens_to_ids("<0x0A>")] = 49.0
        row[0, spelled[position % len(spelled)]] = 40.0
        return row

    answer = verdict_of(tokenizer, generate_answer(Stub(tokenizer, logits), tokenizer, PROMPT, CONSTRAINED)).answer
    assert answer.fragments[0].startswith("<end_of_turn") and not answer.fragments[0].startswith("<end_of_turn>")


def test_endless_digits_end(tokenizer):
    def logits(position, kind):
        row = torch.zeros(1, len(tokenizer))
        row[0, [t for t, text in enumerate(allowed_tokens(tokenizer).texts) if text.isdecimal()]] = 50.0
        row[0, tokenizer.convert_tokens_to_ids("<escape>")] = -50.0
        return row

    answer = verdict_of(tokenizer, generate_answer(Stub(tokenizer, logits), tokenizer, PROMPT, CONSTRAINED)).answer
    assert [len(each.confidence) for each in answer.follow_ups] == [4, 4, 4]
    assert all(len(each.target) <= MAX_CHARACTERS[Value.TARGET] for each in answer.follow_ups)


SCRIPT = {"content": "abc", "text": "abc", "confidence": "0.50", "target": "abc"}


def scripted(tokenizer, other):
    """Says SCRIPT's values again and again, a character a token, and four fragments. `other(position)` is a character
    that is next best in a value, by 1 instead of by 20."""
    escape = tokenizer.convert_tokens_to_ids("<escape>")

    def logits(position, kind):
        row = torch.zeros(1, len(tokenizer))
        text = SCRIPT.get(kind, "")
        row[0, tokenizer.convert_tokens_to_ids(text[position]) if position < len(text) else escape] = 20.0
        if kind and kind != "confidence" and other(position):
            row[0, tokenizer.convert_tokens_to_ids(other(position))] = 19.0
        row[0, call_tokens(tokenizer)[0]] += 30.0 * (kind is None)
        return row

    return Stub(tokenizer, logits)


def call_tokens(tokenizer):
    """The tokens in which the openings of the two calls differ."""
    text, choice = (encode(tokenizer, [f"\ncall:add_{name}"]) for name in ("text{content:", "choice{text:"))
    return next((a, b) for a, b in zip(text, choice, strict=False) if a != b)


def test_a_repeated_value_is_changed_at_its_closest_call(tokenizer):
    stub = scripted(tokenizer, lambda position: {1: "x"}.get(position))
    answer = verdict_of(tokenizer, generate_answer(stub, tokenizer, PROMPT, CONSTRAINED)).answer
    assert len(answer.fragments) == 4 and answer.fragments[:2] == ("abc", "axc")
    assert [each.text for each in answer.follow_ups[:2]] == ["abc", "axc"]
    assert [each.target for each in answer.follow_ups[:2]] == ["abc", "axc"]
    assert [each.confidence for each in answer.follow_ups] == ["0.50", "0.50", "0.50"]


@pytest.mark.parametrize("refusals", [1, 3])
def test_a_value_that_stays_repeated_ends_in_a_short_one(tokenizer, monkeypatch, refusals):
    monkeypatch.setattr(constrained, "MAX_REFUSALS", refusals)
    stub = scripted(tokenizer, lambda position: None)
    answer = verdict_of(tokenizer, generate_answer(stub, tokenizer, PROMPT, CONSTRAINED)).answer
    assert len(answer.fragments) == 4 and answer.fragments[0] == "abc"


# --- contrast and best of n ------------------------------------------------------------------------------------------


def test_contrast_takes_what_the_question_makes_likely_among_plausible_tokens_in_texts_only(tokenizer):
    a, b, c, zero, point, five, six = tokenizer.convert_tokens_to_ids(list("abc0.56"))
    escape = tokenizer.convert_tokens_to_ids("<escape>")

    def logits(position, kind):
        rows = torch.full((2, len(tokenizer)), -20.0)
        if kind is None:
            rows[:, call_tokens(tokenizer)[1]] = 9.0
        elif kind == "confidence":
            rows[:, [zero, point, five, five][position] if position < 4 else escape] = 2.0
            rows[0, six], rows[1, five] = 1.5, 3.0
        elif position == 0:
            rows[0, [a, b, c]] = torch.tensor([2.0, 1.5, -2.0])  # c is less likely than a tenth of a
            rows[1, [a, b, c]] = torch.tensor([3.0, -1.0, -19.0])
        else:
            rows[:, escape] = 9.0
        return rows

    answer = verdict_of(tokenizer, generate_answer(Stub(tokenizer, logits), tokenizer, PROMPT, CONTRAST)).answer
    assert answer.fragments == ("b",)
    first = answer.follow_ups[0]
    assert (first.text, first.confidence, first.target) == ("b", "0.55", "a")
    assert [each.text for each in answer.follow_ups] == ["b", "a", "c"]


def test_best_of_n_is_the_answer_that_the_question_speaks_for_most(model, tokenizer, monkeypatch):
    seen = []

    def listening(model, tokenizer, pairs):
        seen.extend(answer for _, answer in pairs)
        return [scores(model, tokenizer, [(prompt, answer)])[0] for prompt, answer in pairs]

    monkeypatch.setattr(scoring, "scores", listening)
    best = generate_answer(model, tokenizer, PROMPT, Decoding("best_of_n", temperature=2.0, n=3))
    assert len({tuple(each) for each in seen}) == 3
    assert seen[0] == generate_answer(model, tokenizer, PROMPT, CONSTRAINED)
    assert best == max(seen, key=lambda answer: scores(model, tokenizer, [(PROMPT, answer)])[0])
    for answer in seen:
        verdict_of(tokenizer, answer)


def test_a_draw_has_the_probabilities_of_the_softmax_within_top_p():
    scores = np.array([1.0, 0.0, 2.0, -1.0], dtype=np.float32)
    draw = constrained.Draw(0.5, 0.9, np.random.default_rng(0))
    drawn = torch.tensor([draw.perturb(scores).argmax() for _ in range(4000)])
    expected = torch.tensor([1.0, 0.0, 2.0, -1.0]).div(0.5).softmax(0) * torch.tensor([1, 0, 1, 0])
    found = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.02)


# --- the masks -------------------------------------------------------------------------------------------------------

SPELLED = (
    "<",
    "<<escap",
    "x<unuse",
    "<unus",
    "<start_function_<start_of_tur",
    "<end_of_tur",
    "<end_function_cal",
    "<e<e",
)
SO_FAR = {
    Value.RESTATED: ("", "What's a lock?", "x" * 159, "x" * 160),
    Value.FRAGMENT: ("", "It", "a " * 39, "x" * 80, "a < b", "<escape", "<end_of_turn", *SPELLED),
    Value.FOLLOW_UP: ("", "Why", "x" * 38),
    Value.CONFIDENCE: ("", "0", "0.", "0.5", "0.57", "1", "1.0", "1.00"),
    Value.TARGET: ("", "why", "why_", "x" * 37, "x" * 38 + "_", "x" * 40),
}


@pytest.mark.parametrize("kind", Value)
def test_a_mask_is_the_grammar_asked_for_each_token(tokenizer, kind):
    tokens = allowed_tokens(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    barred = {name for name in names if name.startswith("<0x")} | set(CONTROL_TOKENS)
    for text in SO_FAR[kind]:
        expected = {
            token
            for token, name in enumerate(names)
            if name not in barred and tokens.texts[token] and may_go_on(kind, text + tokens.texts[token])
        }
        if text and may_end(kind, text):
            expected.add(tokens.escape)
        found = set(np.flatnonzero(tokens.after(kind, text)).tolist())
        assert found == expected and found, (text, [tokens.texts[token] for token in found ^ expected])


def test_a_mask_after_a_less_than_sign_costs_no_more_than_another():
    """It once tried each token that has a letter in which the name of a control token ends: with Gemma's vocabulary
    0.46 s for every token that followed in a text like "a < b", where the model takes a tenth of that."""
    texts = ["<escape>", *(f"{number}d>" for number in range(30_000))]
    vocabulary = SimpleNamespace(texts=texts, plain=range(1, len(texts)), escape=0, special=("<unused", "<escape>"))
    masks = AllowedTokens(vocabulary)

    def seconds(text):
        started = time.perf_counter()
        masks.after(Value.FRAGMENT, text)
        return time.perf_counter() - started

    pairs = [(seconds("a < b"), seconds("a + b")) for _ in range(20)]
    with_sign, without = (min(each) for each in zip(*pairs, strict=True))
    assert with_sign < 10 * without
