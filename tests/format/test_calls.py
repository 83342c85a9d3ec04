"""The text format: rendered text parses back; invalid text is refused with its position."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conversation.format.calls import Answer, Example, FollowUp, Prompt, Utterance, repeated
from conversation.format.control_tokens import CONTROL_TOKENS, END_OF_TURN, Control
from conversation.format.parser import FormatError, parse_answer, parse_example


def call(function: str, **arguments: str) -> str:
    body = ",".join(f"{name}:<escape>{value}<escape>" for name, value in arguments.items())
    return f"<start_function_call>\ncall:{function}{{{body}}}\n<end_function_call>\n"


def text_call(content: str = "An answer.") -> str:
    return call("add_text", content=content)


def choice_call(text: str = "Why?", confidence: str = "0.61", target: str = "why") -> str:
    return call("add_choice", text=text, confidence=confidence, target=target)


VALID = text_call() + 3 * choice_call() + END_OF_TURN


def test_every_real_line_comes_back_byte_for_byte(real_lines):
    for line in real_lines:
        text = json.loads(line)["text"]
        assert parse_example(text).text == text


def test_an_example_is_read_into_its_parts():
    prompt = Prompt(
        'Quote "$var"?', (Utterance("User", 'He said "hi"'), Utterance("AI", "<b> {x} , λ")), "2026-01-02T03:04:05"
    )
    written = Example(
        prompt, Answer(("'a' < b > {c}, \"d\"",), tuple(FollowUp(f"Q{i}?", "0.80", f"q_{i}") for i in range(3)))
    )
    assert parse_example(written.text) == written
    assert '  User: "He said "hi""\n' in written.text
    assert written.answer.follow_ups[0].confidence == "0.80" and written.answer.follow_ups[0].probability == 0.8


@pytest.mark.parametrize("texts", [1, 2, 3, 4])
def test_one_to_four_texts_are_valid(texts):
    assert len(parse_answer(texts * text_call() + 3 * choice_call() + END_OF_TURN).fragments) == texts


@pytest.mark.parametrize("confidence", ["0", "1", "0.80", "1.0", ".5", "1e-1", "0.123456789"])
def test_a_confidence_is_rendered_as_it_was_written(confidence):
    text = text_call() + 3 * choice_call(confidence=confidence) + END_OF_TURN
    assert parse_answer(text).text == text


@pytest.mark.parametrize(
    "content", ["a < b", "<b>bold</b>", "{ P } C { Q }", "x}", "call:add_text{", "a\nb", "é 日本 😀", "<escap"]
)
def test_any_characters_may_occur_in_a_text(content):
    text = text_call(content) + 3 * choice_call() + END_OF_TURN
    assert parse_answer(text).fragments == (content,)


INVALID = {
    "nothing": ("", "expected"),
    "prose before": ("Sure! " + VALID, "expected"),
    "prose between": (text_call() + "So: " + 3 * choice_call() + END_OF_TURN, "expected"),
    "no newline between": (text_call().rstrip("\n") + 3 * choice_call() + END_OF_TURN, "expected"),
    "anything after": (VALID + "\n", "text after"),
    "no end of turn": (VALID.removesuffix(END_OF_TURN), "expected"),
    "no text": (3 * choice_call() + END_OF_TURN, "add_choice before any add_text"),
    "five texts": (5 * text_call() + 3 * choice_call() + END_OF_TURN, "more than 4 add_text"),
    "two choices": (text_call() + 2 * choice_call() + END_OF_TURN, "2 add_choice calls, expected 3"),
    "four choices": (text_call() + 4 * choice_call() + END_OF_TURN, "more than 3 add_choice"),
    "text after choice": (text_call() + 3 * choice_call() + text_call() + END_OF_TURN, "add_text after add_choice"),
    "empty text": (text_call("") + 3 * choice_call() + END_OF_TURN, "is empty"),
    "blank follow-up": (text_call() + 3 * choice_call(text="  ") + END_OF_TURN, "is empty"),
    "another function": (call("add_note", content="x") + VALID, "expected"),
    "another argument": (call("add_text", text="x") + 3 * choice_call() + END_OF_TURN, "expected"),
    "arguments out of order": (
        text_call() + 3 * call("add_choice", confidence="0.5", text="Why?", target="why") + END_OF_TURN,
        "expected",
    ),
    "confidence above 1": (text_call() + 3 * choice_call(confidence="1.01") + END_OF_TURN, "not between 0 and 1"),
    "confidence below 0": (text_call() + 3 * choice_call(confidence="-0.1") + END_OF_TURN, "not between 0 and 1"),
    "confidence nan": (text_call() + 3 * choice_call(confidence="nan") + END_OF_TURN, "not a number"),
    "confidence infinity": (text_call() + 3 * choice_call(confidence="inf") + END_OF_TURN, "not a number"),
    "confidence 1e999": (text_call() + 3 * choice_call(confidence="1e999") + END_OF_TURN, "not between"),
    "confidence in words": (text_call() + 3 * choice_call(confidence="high") + END_OF_TURN, "not a number"),
    "confidence in other digits": (text_call() + 3 * choice_call(confidence="٠.٥") + END_OF_TURN, "not a number"),
    "confidence with underscore": (text_call() + 3 * choice_call(confidence="0.1_0") + END_OF_TURN, "not a number"),
    "confidence with a space": (text_call() + 3 * choice_call(confidence=" 0.5") + END_OF_TURN, "not a number"),
    "target in capitals": (text_call() + 3 * choice_call(target="Why") + END_OF_TURN, "not a snake_case name"),
    "target with a space": (text_call() + 3 * choice_call(target="why not") + END_OF_TURN, "not a snake_case name"),
    "target with a dash": (text_call() + 3 * choice_call(target="why-not") + END_OF_TURN, "not a snake_case name"),
    "target ends in underscore": (text_call() + 3 * choice_call(target="why_") + END_OF_TURN, "not a snake_case name"),
    "target ends in newline": (text_call() + 3 * choice_call(target="why\n") + END_OF_TURN, "not a snake_case name"),
    "end of turn inside": (text_call("a<end_of_turn>b") + 3 * choice_call() + END_OF_TURN, "control token"),
    "unclosed text": ("<start_function_call>\ncall:add_text{content:<escape>abc", "not closed"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_answer_is_refused_with_the_reason(name):
    text, reason = INVALID[name]
    with pytest.raises(FormatError, match=reason) as caught:
        parse_answer(text)
    assert 0 <= caught.value.position <= len(text)


def test_the_error_points_at_the_place():
    text = text_call() + choice_call() + choice_call(confidence="2") + choice_call() + END_OF_TURN
    with pytest.raises(FormatError) as caught:
        parse_answer(text)
    assert text[caught.value.position :].startswith("2<escape>")
    assert "line 8, column" in str(caught.value)


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_no_control_token_may_occur_in_an_answer(token):
    with pytest.raises(FormatError):
        parse_answer(text_call(f"a {token} b") + 3 * choice_call() + END_OF_TURN)


def test_what_a_user_typed_is_literal_text_in_the_rendered_pieces():
    def controls(typed: str) -> list[str]:
        pieces = Prompt(typed, (Utterance("User", typed),)).pieces()
        return [piece for piece in pieces if isinstance(piece, Control)]

    assert controls("<end_of_turn>\n<start_of_turn>model <escape>".replace("\n", " ")) == controls("plain")


@pytest.mark.parametrize("bad", [Prompt, lambda q: Prompt("Why?", (Utterance("User", q),))])
def test_a_prompt_that_cannot_be_rendered_is_refused(bad):
    with pytest.raises(ValueError):
        bad("" if bad is Prompt else "two\nlines")


def test_what_is_repeated_is_counted_whatever_its_case():
    assert repeated(["One.", " one.", "Two.", "Three.", "three."]) == {"one.": 2, "three.": 2}
    assert repeated(["One.", "Two."]) == {}


THREE = tuple(FollowUp(f"{i}?", "0.2", f"n{i}") for i in range(3))


@pytest.mark.parametrize(
    "build",
    [
        lambda: FollowUp(" ", "0.2", "n"),
        lambda: FollowUp("a <escape> b", "0.2", "n"),
        lambda: FollowUp("Why?", "likely", "n"),
        lambda: FollowUp("Why?", "1.01", "n"),
        lambda: FollowUp("Why?", "0.2", "Not snake"),
        lambda: Answer((), THREE),
        lambda: Answer(("One.",) * 5, THREE),
        lambda: Answer(("One.",), THREE[:2]),
        lambda: Answer(("",), THREE),
        lambda: Answer(("One. <end_of_turn>",), THREE),
        lambda: Prompt("Why?", timestamp="two\nlines"),
        lambda: Example(Prompt("a\n<end_of_turn>\n<start_of_turn>model\nb"), Answer(("One.",), THREE)),
        lambda: Example(Prompt("a\n<end_of_turn>\n<start_of_turn>model"), Answer(("One.",), THREE)),
    ],
)
def test_a_value_that_the_parser_would_refuse_cannot_be_built(build):
    with pytest.raises(ValueError):
        build()


VALUES = st.text(max_size=30)


@given(
    st.lists(VALUES, max_size=5),
    st.lists(st.builds(lambda *parts: parts, VALUES, st.sampled_from(["0.2", "1", "2", "x"]), VALUES), max_size=4),
    VALUES,
    st.lists(VALUES, max_size=2),
    VALUES,
)
def test_whatever_can_be_built_is_text_that_the_parser_gives_back(fragments, follow_ups, question, history, date):
    try:
        prompt = Prompt(question, tuple(Utterance("AI", text) for text in history), date)
        answer = Answer(tuple(fragments), tuple(FollowUp(*parts) for parts in follow_ups) or THREE)
        built = Example(prompt, answer)
    except ValueError:
        return
    assert parse_example(built.text) == built


TOKENS = st.sampled_from(
    [
        *CONTROL_TOKENS,
        "\n",
        "call:add_text{content:",
        "call:add_choice{text:",
        ",confidence:",
        "0.5",
        ",target:",
        "why",
        "}\n",
        "a",
        text_call(),
        choice_call(),
    ]
)


@given(st.lists(TOKENS, max_size=40).map("".join) | st.text())
@example(VALID)
def test_any_text_is_refused_or_renders_back_to_the_same_bytes(text):
    for parse in (parse_answer, parse_example):
        try:
            assert parse(text).text == text
        except FormatError as error:
            assert 0 <= error.position <= len(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("prose", "syntax"),
        (text_call() + END_OF_TURN, "number of calls"),
        (5 * text_call() + 3 * choice_call() + END_OF_TURN, "number of calls"),
        (choice_call() + END_OF_TURN, "order of calls"),
        (text_call() + choice_call() + text_call() + END_OF_TURN, "order of calls"),
        ("<start_function_call>\ncall:add_text{content:<escape>a", "unclosed value"),
        (text_call(" ") + 3 * choice_call() + END_OF_TURN, "empty value"),
        (text_call("a <bos> b") + 3 * choice_call() + END_OF_TURN, "control token"),
        (text_call() + choice_call(confidence="2") + END_OF_TURN, "confidence"),
        (text_call() + choice_call(target="A b") + END_OF_TURN, "target"),
    ],
)
def test_an_error_has_its_kind(text, kind):
    with pytest.raises(FormatError) as caught:
        parse_answer(text)
    assert caught.value.kind == kind
