"""The structural tests judge whole answers and can fail."""

import json

import pytest

from conversation.answering.verdicts import judge
from conversation.data.questions import THREE_CASES, Case, read_questions
from conversation.errors import UserError
from conversation.format.calls import Answer, FollowUp, Prompt, Utterance
from conversation.models import tokenizer
from conversation.runs.report import STOPS_HERE
from conversation_config import HELD_OUT_QUESTIONS

CASE = Case("case", Prompt("Why?"))
GOOD = Answer(("A.", "B."), tuple(FollowUp(f"{i}?", "0.3", f"n{i}") for i in range(3)))


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return tokenizer.load_tokenizer(tiny_folder)


def test_a_valid_answer_passes(loaded):
    verdict = judge(CASE, loaded, tokenizer.encode(loaded, GOOD.pieces()))
    assert verdict.passed and verdict.has_distinct_follow_ups and verdict.marked_output == GOOD.text


def test_three_equal_follow_ups_pass_with_a_warning(loaded):
    answer = Answer(("A.", "a. "), 3 * (FollowUp("Example?", "0.5", "example"),))
    verdict = judge(CASE, loaded, tokenizer.encode(loaded, answer.pieces()))
    assert verdict.passed and not verdict.has_distinct_follow_ups
    assert verdict.warnings == [
        "fragment 'a.' occurs 2 times",
        "follow-up 'example?' occurs 3 times",
        "target 'example' occurs 3 times",
    ]


@pytest.mark.parametrize("texts, targets", [("AAB", "xyz"), ("ABC", "xyx"), ("ABa", "xyz")])
def test_follow_ups_differ_when_their_texts_do_and_their_targets(loaded, texts, targets):
    follow_ups = tuple(FollowUp(f"{text}?", "0.5", target) for text, target in zip(texts, targets, strict=True))
    verdict = judge(CASE, loaded, tokenizer.encode(loaded, Answer(("A.",), follow_ups).pieces()))
    assert verdict.passed and not verdict.has_distinct_follow_ups


def test_an_answer_that_never_ends_fails_and_is_shown_with_the_place(loaded):
    verdict = judge(CASE, loaded, tokenizer.encode(loaded, GOOD.pieces()[:-1]))
    assert not verdict.passed and verdict.marked_output.endswith(STOPS_HERE)


def test_prose_fails_at_its_first_character(loaded):
    verdict = judge(CASE, loaded, tokenizer.encode(loaded, ["A monad is ..."]))
    assert not verdict.passed and verdict.marked_output.startswith(STOPS_HERE)


def test_control_tokens_in_ordinary_letters_fail(loaded):
    verdict = judge(CASE, loaded, tokenizer.encode(loaded, [str(piece) for piece in GOOD.pieces()]))
    assert verdict.output == GOOD.text and not verdict.passed and "spelled out" in verdict.problem


def test_the_three_cases_are_those_of_the_design():
    fresh, follow_up, other = (case.prompt for case in THREE_CASES)
    assert (fresh.question, fresh.history) == ("What's a monad?", ())
    assert (other.question, other.history) == ("CAP theorem?", ())
    assert follow_up.question == "Example?"
    assert follow_up.history == (
        Utterance("User", "What's a monad?"),
        Utterance("AI", "Pattern for chaining operations with context."),
        Utterance("AI", "Like a box with rules for combining boxes."),
    )


def test_the_held_out_questions_are_twenty_and_not_in_the_training_data(own_examples):
    asked = {example.prompt.question.casefold() for example in own_examples}
    offered = {choice.text.casefold() for example in own_examples for choice in example.answer.follow_ups}
    questions = [case.prompt for case in read_questions(HELD_OUT_QUESTIONS)]
    assert len(questions) == 20
    for prompt in questions:
        if not prompt.history:
            assert prompt.question.casefold() not in asked | offered
        else:
            assert prompt.history[0].text.casefold() not in asked


@pytest.mark.parametrize("line", ["", "x", "[]", '{"q": 1}', '{"question": 5}', '{"question": "a", "history": [1]}'])
def test_a_bad_question_file_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "Fine?"}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"1 lines are no questions:\n.*questions\.jsonl:2: \w"):
        read_questions(path)
