"""What a model holds likely is what its plain forward pass says; the figures find the right answer when it is there."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import easy_lines
from tokenizers import pre_tokenizers

from conversation.answering import knowledge, scoring, token_losses
from conversation.answering.token_losses import label_log_probabilities
from conversation.data.questions import HeldOutCase, read_held_out
from conversation.format.calls import Answer, Example, FollowUp, Prompt
from conversation.format.control_tokens import ESCAPE
from conversation.models.tokenizer import decode, encode, encode_example, encode_prompt, load_tokenizer
from conversation.models.weights import load_model
from conversation.training.prefix_tree import TokenSequence
from conversation_config import EVALUATION_QUESTIONS


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(tiny_folder).eval(), load_tokenizer(tiny_folder)


def test_log_probabilities_are_those_of_the_plain_forward_pass(loaded, tiny_folder):
    model, tokenizer = loaded
    plain = load_model(tiny_folder).eval()
    sequences = []
    for example in easy_lines()[:5]:
        encoded = encode_example(tokenizer, example)
        is_label = tuple(i >= encoded.num_prompt_tokens for i in range(len(encoded.ids)))
        sequences.append(TokenSequence(encoded.ids, is_label))
    found = label_log_probabilities(model, [*sequences, sequences[0]], candidates=[7, 9])
    for sequence, ours in zip([*sequences, sequences[0]], found, strict=True):
        with torch.no_grad():
            expected = plain(torch.tensor([sequence.ids])).logits[0].double().log_softmax(-1)
        rows = [i for i, is_label in enumerate(sequence.is_label) if is_label]
        for row, values in zip(rows, ours, strict=True):
            wanted = expected[row - 1][[sequence.ids[row], 7, 9]]
            torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-4)


def test_a_base_that_the_shared_step_does_not_know_is_read_answer_by_answer(tiny_folder, loaded):
    """One whose logits are scaled: the check of the step refuses it, and its probabilities are its own."""
    model, tokenizer = load_model(tiny_folder).eval(), loaded[1]
    plain = model.forward

    def scaled(*given, **named):
        output = plain(*given, **named)
        output.logits = output.logits / 3
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="shared-prefix loss"):
        token_losses.read_prefix_trees(model)
    answers = [encode(tokenizer, [text]) for text in ("Yes.", "It depends on the weather.")]
    found = scoring.log_probabilities(model, tokenizer, [(Prompt("Why?"), answer) for answer in answers])
    before = encode_prompt(tokenizer, Prompt("Why?"))
    for ours, answer in zip(found, answers, strict=True):
        with torch.no_grad():
            logits = load_model(tiny_folder).eval()(torch.tensor([[*before, *answer]])).logits[0] / 3
        rows = logits.double().log_softmax(-1)[len(before) - 1 : -1]
        assert ours == pytest.approx(sum(row[token].item() for row, token in zip(rows, answer, strict=True)), abs=1e-3)


def test_every_token_of_an_answer_has_its_kind(loaded):
    model, tokenizer = loaded
    answer = Answer(("One, two.", "Three."), tuple(FollowUp(f"Why {n}?", f"0.{n}1", f"why_{n}") for n in (5, 3, 1)))
    ids = encode(tokenizer, answer.pieces())
    kinds = knowledge.Scorer(model, tokenizer)._kinds(ids, 2)
    values = {
        kind: decode(tokenizer, [token for token, k in zip(ids, kinds, strict=True) if k == kind])
        for kind in set(kinds)
    }
    assert values["fragments"] == "One, two.Three." and values["follow_ups"] == "Why 5?Why 3?Why 1?"
    assert values["confidence"] == "0.510.310.11" and values["targets"] == "why_5why_3why_1"
    assert "call:add_text" in values["syntax"] and len(kinds) == len(ids)


def test_losses_by_kind_weigh_to_the_loss_of_all(loaded):
    model, tokenizer = loaded
    scorer = knowledge.Scorer(model, tokenizer)
    examples = easy_lines()[:4]
    losses = scorer.losses_by_kind(examples)
    _, kinds = scorer._answers(examples)
    counts = {kind: sum(names.count(kind) for names in kinds) for kind in {each for names in kinds for each in names}}
    total = -sum(found[:, 0].sum().item() for found in label_log_probabilities(model, scorer._answers(examples)[0]))
    assert sum(getattr(losses, kind) * count for kind, count in counts.items()) == pytest.approx(total, rel=1e-3)


def cases(number: int) -> list[HeldOutCase]:
    found = []
    for i, word in enumerate(
        [*("red", "blue", "green", "dark", "warm", "cold", "long", "thin"), *map(str, range(8, 99))]
    ):
        if i == number:
            break
        follow_ups = tuple(FollowUp(f"{word} {n}?", f"0.{n}", f"{word}_{n}") for n in (5, 3, 1))
        found.append(HeldOutCase("known", "d", word, Prompt(f"What's {word}?"), Answer((word,), follow_ups), i % 3))
    return found


class Oracle:
    """A scorer that finds a text likely when it names the word of the question, and all alike when it is neutral."""

    def log_probabilities(self, pairs):
        return [
            0.0 if prompt == knowledge.NEUTRAL_PROMPT else float(prompt.question[7:-1] in "".join([*pieces]))
            for prompt, _, pieces in pairs
        ]


def test_the_right_answer_and_follow_up_are_found_by_who_knows_and_not_by_who_does_not():
    eight = cases(8)
    assert knowledge.right_of_five(Oracle(), eight) == [True] * 8
    assert knowledge.follow_up_ranks(Oracle(), eight) == [1] * 8
    oracle = Oracle()
    oracle.log_probabilities = lambda pairs: [0.0] * len(pairs)
    assert knowledge.right_of_five(oracle, eight) == [False] * 8  # a tie is not an answer
    assert knowledge.follow_up_ranks(oracle, eight) == [8] * 8


@pytest.mark.parametrize("size", range(5, 26))
def test_the_five_candidates_are_five_answers_whatever_the_size_of_the_set(size):
    group = cases(size)
    for case in group:
        five = knowledge._five(case, group)
        assert five[0] is case and len({other.topic for other in five}) == knowledge.CANDIDATES


def test_no_follow_up_that_the_case_offers_is_among_the_wrong_ones_and_they_are_spread_over_the_file():
    held_out = [case for path in EVALUATION_QUESTIONS for case in read_held_out(path)]
    used = Counter()
    for case, parts in zip(held_out, knowledge.parts_of_follow_ups(held_out), strict=True):
        texts = [pieces[-2] for _, _, pieces in parts[::2]]
        assert len({text.casefold() for text in texts}) == len(texts) == 1 + knowledge.CONFOUNDERS
        assert texts[0] == case.answer.follow_ups[case.followed].text
        assert not {each.text.casefold() for each in case.answer.follow_ups} & {text.casefold() for text in texts[1:]}
        used.update(texts[1:])
    followed = {case.answer.follow_ups[case.followed].text for case in held_out}
    assert len(used) > 0.9 * len(followed) and used.most_common(1)[0][1] <= 50


def test_parts_of_answers_are_their_pieces_whatever_the_words(loaded):
    texts = ("Use add_choice, then add_text.", "x", "call:add_choice{text:", "add_text")
    answer = Answer(texts, tuple(FollowUp(text, "0.5", "a") for text in ("x", "add_choice?", "text:")))
    before, (first, *_) = knowledge._add_texts(texts), answer.follow_ups
    opened = knowledge._opened_choice(first.text)
    pieces = answer.pieces()
    assert pieces[: len(before) + len(opened)] == before + opened and opened[-2:] == ["x", ESCAPE]
    assert "".join(pieces[len(before) + len(opened) :]).startswith(",confidence:")


def with_digits_apart(folder):
    """The folder's tokenizer, but as in Gemma's each digit becomes a token of its own."""
    tokenizer = load_tokenizer(folder)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [tokenizer.backend_tokenizer.pre_tokenizer, digits]
    )
    return tokenizer


def test_expected_confidences_are_read_at_the_digit_of_the_tenths(tiny_folder, monkeypatch):
    tokenizer = with_digits_apart(tiny_folder)
    zero, point = (encode(tokenizer, [text])[0] for text in "0.")

    def sure_of_seven(model, sequences, digits):
        """Every tenth is a 7; every other token, if it is a digit, is a 2."""
        found = []
        for sequence in sequences:
            labels = [i for i, is_label in enumerate(sequence.is_label) if is_label]
            rows = torch.full((len(labels), 11), -torch.inf)
            for row, i in enumerate(labels):
                rows[row, 1 + (7 if sequence.ids[i - 2 : i] == (zero, point) else 2)] = 0.0
            found.append(rows)
        return found

    monkeypatch.setattr(knowledge, "label_log_probabilities", sure_of_seven)
    assert knowledge.Scorer(None, tokenizer).expected_confidences(cases(3)) == [(0.75, 0.75, 0.75)] * 3
    certain = replace(cases(1)[0].answer.follow_ups[0], confidence="1.00")
    answer = replace(cases(1)[0].answer, follow_ups=(certain, *cases(1)[0].answer.follow_ups[1:]))
    with_one = [replace(cases(1)[0], answer=answer), *cases(2)[1:]]  # "1.00" has no digit behind "0."
    assert knowledge.Scorer(None, tokenizer).expected_confidences(with_one) == [None, (0.75, 0.75, 0.75)]


def test_no_confidence_is_expected_where_a_token_holds_several_digits(loaded):
    """As the tests' own tokenizer, and that of Llama 3: what stands behind "0." is not the digit of the tenths."""
    model, tokenizer = loaded
    assert len(encode(tokenizer, ["0.55"])) < 4
    assert knowledge.Scorer(model, tokenizer).expected_confidences(cases(3)) == [None] * 3


def test_an_example_given_twice_is_computed_once(loaded, monkeypatch):
    model, tokenizer = loaded
    plain, computed = token_losses._of_group, []

    def counting(model, group, candidates):
        computed.extend(group)
        return plain(model, group, candidates)

    monkeypatch.setattr(token_losses, "_of_group", counting)
    example = Example(Prompt("Why?"), easy_lines()[0].answer)
    scorer = knowledge.Scorer(model, tokenizer)
    once, twice = scorer.losses_by_kind([example]), scorer.losses_by_kind([example, example])
    assert len(computed) == 1 and twice == replace(once, examples=2)


def test_what_is_read_ahead_in_one_pass_is_read_no_more_and_is_the_same(loaded, tiny_folder, monkeypatch):
    loaded = loaded[0], with_digits_apart(tiny_folder)
    eight, examples = cases(8), easy_lines()[:3]

    def figures(scorer):
        losses = vars(scorer.losses_by_kind(examples))
        confidences = [value for three in scorer.expected_confidences(eight) for value in three]
        return knowledge.right_of_five(scorer, eight), knowledge.follow_up_ranks(scorer, eight), losses, confidences

    right, ranks, losses, confidences = figures(knowledge.Scorer(*loaded))
    calls = []
    plain = knowledge.label_log_probabilities
    monkeypatch.setattr(
        knowledge, "label_log_probabilities", lambda *given: (given[1] and calls.append(1)) or plain(*given)
    )
    scorer = knowledge.Scorer(*loaded)
    parts = [part for of_case in knowledge.parts_of_follow_ups(eight) for part in of_case]
    held_out = [Example(case.prompt, case.answer) for case in eight]
    scorer.read_ahead([*knowledge.parts_of_five(eight), *parts], [*held_out, *examples])
    found = figures(scorer)
    assert calls == [1] and found[:2] == (right, ranks)
    assert found[2] == pytest.approx(losses, abs=1e-3) and found[3] == pytest.approx(confidences, abs=1e-3)
