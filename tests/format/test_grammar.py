"""The grammar of an answer lets through what the data says, and nothing that the parser refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversation.format.calls import Answer, FollowUp
from conversation.format.grammar import ADD_CHOICE, ADD_TEXT, MAX_CHARACTERS, Value, may_end, may_go_on
from conversation.format.parser import parse_answer

TEXT = st.text(st.sampled_from("aZ09 _.<>?\n\u2028é😀") | st.characters(), max_size=170) | st.just("<escape>")


def test_every_value_of_the_data_can_be_written_a_character_at_a_time(own_examples):
    for example in own_examples:
        answer = example.answer
        values = [(Value.FRAGMENT, text) for text in answer.fragments]
        for each in answer.follow_ups:
            values += [
                (Value.FOLLOW_UP, each.text),
                (Value.CONFIDENCE, each.confidence),
                (Value.TARGET, each.target),
            ]
        for kind, text in values:
            assert may_end(kind, text) and all(may_go_on(kind, text[:end]) for end in range(1, len(text) + 1))


@given(st.sampled_from(Value), TEXT | st.from_regex(r"[a-z0-9_]{1,42}|[0-9.]{1,5}", fullmatch=True))
def test_what_may_be_written_is_valid(kind, text):
    if may_go_on(kind, text) and may_end(kind, text):
        restated, fragment, follow_up, number, name = (
            text if each is kind else ok for each, ok in zip(Value, OK, strict=True)
        )
        answer = Answer((fragment,), 3 * (FollowUp(follow_up, number, name),), restated)
        assert (
            parse_answer(answer.text, restates=True) == answer
            and len(text) <= MAX_CHARACTERS[kind]
            and "\n" not in text
        )


OK = ("What's a lock?", "It depends.", "Why?", "0.50", "why")


@pytest.mark.parametrize(
    "kind, texts",
    [
        (Value.RESTATED, ["a" * 161, "a\nb", " ", "a<escape>"]),
        (Value.FRAGMENT, ["a" * 81, "a\nb", "a\rb", "a\u2028b", " ", "a<escape>", "<end_of_turn>"]),
        (Value.FOLLOW_UP, ["a" * 41]),
        (Value.CONFIDENCE, ["1.01", "0.500", "00", ".5", "-", "1e", "2"]),
        (Value.TARGET, ["_a", "a__b", "A", "a-b", "é", "a" * 41, "a" * 39 + "_"]),
    ],
)
def test_what_may_not_be_written(kind, texts):
    assert [text for text in texts if may_go_on(kind, text)] == []


@pytest.mark.parametrize("kind, text", [(Value.CONFIDENCE, "0.5"), (Value.CONFIDENCE, "1"), (Value.TARGET, "a_")])
def test_where_a_value_may_go_on_but_not_end(kind, text):
    assert may_go_on(kind, text) and not may_end(kind, text)


def test_forced_pieces_and_values_make_the_rendered_calls():
    values = iter(("A.", "Why?", "0.50", "why"))
    runs = [run for call in (ADD_TEXT, *[ADD_CHOICE]) for run in call.forced_pieces()]
    text = ""
    for i, run in enumerate(runs):
        text += "".join(run)
        if i not in (1, len(runs) - 1):  # the last run of a call is followed by no value
            text += next(values)
    assert text + text[text.index("<start_function_call>\ncall:add_choice") :] * 2 + "<end_of_turn>" == (
        Answer(("A.",), 3 * (FollowUp("Why?", "0.50", "why"),)).text
    )
