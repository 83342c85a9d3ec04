"""The grammar in GBNF: read by an independent reader, it accepts our answers, and nothing that the parser refuses."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversation.format.calls import Answer, FollowUp
from conversation.format.control_tokens import CONTROL_TOKENS, END_OF_TURN, FORMAT_TOKENS
from conversation.format.gbnf import gbnf
from conversation.format.grammar import CONFIDENCES, is_one_line
from conversation.format.parser import FormatError, parse_answer

IDS = {token: number for number, token in enumerate(FORMAT_TOKENS, 46)}
TOKENS = {number: token for token, number in IDS.items()}


def as_regular_expression(grammar: str) -> re.Pattern:
    """Reads the GBNF of a grammar without recursion, rule by rule, as a regular expression over the text."""
    rules = dict(line.split(" ::= ") for line in grammar.splitlines())

    def translate(rule: str) -> str:
        found, place = "", 0
        part = re.compile(
            r'"(?P<text>(?:\\.|[^"\\])*)"|(?P<class>\[(?:\\.|[^\]])*\])|<\[(?P<id>\d+)\]>|(?P<name>[a-z]+)'
            r"|(?P<mark>[(){}|?*+0-9,])|(?P<space> +)"
        )
        while place < len(rule):
            match = part.match(rule, place)
            assert match, rule[place:]
            place = match.end()
            if match["text"] is not None:
                found += re.escape(match["text"].encode().decode("unicode_escape"))
            elif match["class"]:
                found += match["class"]
            elif match["id"]:
                found += re.escape(TOKENS[int(match["id"])])
            elif match["name"]:
                found += f"(?:{translate(rules[match['name']])})"
            else:
                found += (match["mark"] or "").replace("(", "(?:")
        return found

    return re.compile(translate(rules["root"]))


GRAMMAR = as_regular_expression(gbnf(IDS))


def accepts(text: str) -> bool:
    """Whether the grammar writes a text; the end of the turn comes after it."""
    assert text.endswith(END_OF_TURN)
    return GRAMMAR.fullmatch(text.removesuffix(END_OF_TURN)) is not None


def test_it_writes_the_answers_that_were_trained(own_examples):
    refused = [example.answer.text for example in own_examples if not accepts(example.answer.text)]
    assert not [text for text in refused if not re.search(r"<[a-z<]", re.sub("|".join(CONTROL_TOKENS), "", text))]
    assert len(refused) < len(own_examples) / 100  # those with a "<" before a letter in a text


CHARACTERS = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from('<>_-\n\r\u2028 a1{}:,"'))
TEXTS = st.one_of(st.text(CHARACTERS, max_size=90), st.sampled_from(CONTROL_TOKENS), st.sampled_from(["", " ", "<e"]))


def raw_answer(fragments, choices):
    opening, closing = "<start_function_call>\ncall:add_", "}\n<end_function_call>\n"
    calls = [f"{opening}text{{content:<escape>{fragment}<escape>{closing}" for fragment in fragments]
    for text, confidence, target in choices:
        values = f"text:<escape>{text}<escape>,confidence:<escape>{confidence}<escape>,target:<escape>{target}<escape>"
        calls.append(f"{opening}choice{{{values}{closing}")
    return "".join(calls) + END_OF_TURN


CHOICES = st.tuples(
    TEXTS,
    st.one_of(st.sampled_from(sorted(CONFIDENCES)), st.sampled_from(["", "1.01", "0.5", "-0.1", "2.00", "nan"])),
    st.one_of(st.from_regex(r"[a-z0-9_]{1,20}", fullmatch=True), TEXTS),
)


@settings(max_examples=600, deadline=None)
@given(st.lists(TEXTS, max_size=5), st.lists(CHOICES, max_size=4))
def test_what_it_writes_the_parser_accepts(fragments, choices):
    text = raw_answer(fragments, choices)
    if accepts(text):
        answer = parse_answer(text)
        assert all(map(is_one_line, answer.fragments))


PLAIN = st.characters(exclude_characters="<", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(PLAIN, min_size=1, max_size=80), min_size=1, max_size=4),
    st.sampled_from(sorted(CONFIDENCES)),
    st.from_regex(r"[a-z0-9]{1,4}(_[a-z0-9]{1,4}){0,5}", fullmatch=True),
)
def test_it_writes_every_plain_answer(fragments, confidence, target):
    try:
        answer = Answer(tuple(fragments), (FollowUp("Why?", confidence, target),) * 3)
    except ValueError:
        return  # blank in a way that only Python knows
    assert accepts(answer.text)


@pytest.mark.parametrize("confidence", sorted(CONFIDENCES))
def test_it_writes_every_confidence(confidence):
    assert accepts(Answer(("x",), (FollowUp("Why?", confidence, "why"),) * 3).text)


@pytest.mark.parametrize(
    "text", ["", " ", "\u3000", "a\nb", "a\u2028b", "<escape>", "a <end_of_turn> b", "<<pad>", "x" * 161]
)
def test_it_does_not_write_what_is_no_text(text):
    assert accepts(raw_answer(["fine", "a < b, a<3"], [("Why?", "0.50", "why")] * 3))
    assert not accepts(raw_answer(["fine", text], [("Why?", "0.50", "why")] * 3))
    assert not accepts(raw_answer(["fine"], [(text, "0.50", "why")] * 3))
    with pytest.raises(FormatError):
        parse_answer(raw_answer([], []))


def test_it_writes_between_one_and_four_fragments_and_three_follow_ups():
    for fragments in range(7):
        for choices in range(6):
            text = raw_answer(["x"] * fragments, [("Why?", "0.50", "why")] * choices)
            assert accepts(text) == (1 <= fragments <= 4 and choices == 3)
