"""The reader of conversation trees: what it refuses, with file and place, and how trees become examples."""

import copy
import json

import pytest
from documents import DELETE, put
from hypothesis import example as explicit
from hypothesis import given, settings
from hypothesis import strategies as st

from conversation.data.trees import SCHEMA_FILE, Tree, TreeError, parse_tree
from conversation.format.calls import Utterance
from conversation.format.control_tokens import CONTROL_TOKENS
from conversation.format.parser import parse_example


def choices(*names, confidences=(0.52, 0.27, 0.1)):
    return [
        {"text": f"And {name}?", "confidence": value, "target": name}
        for name, value in zip(names, confidences, strict=True)
    ]


def dns() -> dict:
    """A tree of four nodes; the root's first and third choices are followed, and the first of its first."""
    return {
        "question": "What happens in a DNS lookup?",
        "root": "dns",
        "nodes": {
            "dns": {"texts": ["A name becomes an address.", "A → B"], "choices": choices("cache", "cost", "root_zone")},
            "root_zone": {"texts": ["13 names, many machines."], "choices": choices("anycast", "who", "attack")},
            "cache": {
                "texts": ['The "TTL" says how long.', "Then it asks again."],
                "choices": choices("ttl", "b", "c"),
            },
            "ttl": {"texts": ["300 s is usual."], "choices": choices("d", "e", "f")},
        },
    }


def parse(value, name="dns", domain="systems") -> Tree:
    return parse_tree(json.dumps(value).encode(), name, domain)


def problems(value, name="dns") -> list[str]:
    with pytest.raises(TreeError) as caught:
        parse(value, name)
    return caught.value.problems


FIRST = ("nodes", "dns", "choices", 0)


def test_a_tree_becomes_one_example_per_node_with_the_history_of_its_path():
    walked = [(name, prompt.question, prompt.history) for name, prompt, _ in parse(dns()).walk()]
    at_root = (
        Utterance("User", "What happens in a DNS lookup?"),
        Utterance("AI", "A name becomes an address."),
        Utterance("AI", "A → B"),
    )
    at_cache = (
        *at_root,
        Utterance("User", "And cache?"),
        Utterance("AI", 'The "TTL" says how long.'),
        Utterance("AI", "Then it asks again."),
    )
    assert walked == [
        ("dns", "What happens in a DNS lookup?", ()),
        ("cache", "And cache?", at_root),
        ("ttl", "And ttl?", at_cache),
        ("root_zone", "And root_zone?", at_root),
    ]


def test_the_answer_is_the_nodes_own():
    example = parse(dns()).examples()[1]
    assert example.answer.fragments == ('The "TTL" says how long.', "Then it asks again.")
    assert [choice.text for choice in example.answer.follow_ups] == ["And ttl?", "And b?", "And c?"]
    assert [choice.confidence for choice in example.answer.follow_ups] == ["0.52", "0.27", "0.10"]


@pytest.mark.parametrize(
    ("path", "new", "place", "said"),
    [
        (("nodes", "dns", "texts"), [], "nodes.dns.texts", "non-empty"),
        (("nodes", "dns", "texts"), list("abcde"), "nodes.dns.texts", "too long"),
        (("nodes", "dns", "choices", 2), DELETE, "nodes.dns.choices", "too short"),
        (("nodes", "dns", "choices"), [*choices("cache", "cost", "root_zone")] * 2, "nodes.dns.choices", "too long"),
        (("nodes", "dns", "texts", 1), "", "nodes.dns.texts[1]", "non-empty"),
        (("nodes", "dns", "texts", 1), "A" * 81, "nodes.dns.texts[1]", "too long"),
        (("nodes", "dns", "texts", 1), "two\nlines", "nodes.dns.texts[1]", "does not match"),
        (("nodes", "dns", "texts", 1), "two\u2028lines", "nodes.dns.texts[1]", "does not match"),
        (("nodes", "dns", "texts", 1), " A", "nodes.dns.texts[1]", "does not match"),
        (("nodes", "dns", "texts", 1), "A\0", "nodes.dns.texts[1]", "does not match"),
        (("nodes", "dns", "texts", 1), 3, "nodes.dns.texts[1]", "not of type 'string'"),
        ((*FIRST, "text"), "B" * 41, "nodes.dns.choices[0].text", "too long"),
        ((*FIRST, "confidence"), 1.01, "nodes.dns.choices[0].confidence", "greater than the maximum"),
        ((*FIRST, "confidence"), -0.01, "nodes.dns.choices[0].confidence", "less than the minimum"),
        ((*FIRST, "confidence"), "0.5", "nodes.dns.choices[0].confidence", "not of type 'number'"),
        ((*FIRST, "confidence"), 0.125, "nodes.dns.choices[0].confidence", "more than two decimals"),
        ((*FIRST, "confidence"), DELETE, "nodes.dns.choices[0]", "'confidence' is a required property"),
        ((*FIRST, "target"), "Not snake", "nodes.dns.choices[0].target", "does not match"),
        ((*FIRST, "target"), "no_such_node", "nodes.cache", "an orphan"),
        ((*FIRST, "target"), "cost", "nodes.dns.choices[1].target", "is the target of nodes.dns.choices[0] too"),
        ((*FIRST, "note"), "x", "nodes.dns.choices[0]", "'note' was unexpected"),
        (("nodes", "ttl", "choices", 0, "target"), "root_zone", "nodes.ttl.choices[0].target", "is the target of"),
        (("nodes", "ttl", "choices", 0, "target"), "dns", "nodes.ttl.choices[0].target", "leads back to the root"),
        (("nodes", "lost"), {"texts": ["A."], "choices": choices("g", "h", "i")}, "nodes.lost", "an orphan"),
        (("nodes", "Bad Name"), {"texts": ["A."], "choices": choices("g", "h", "i")}, "nodes", "does not match"),
        (("nodes",), {}, "nodes", "non-empty"),
        (("question",), DELETE, "the tree", "'question' is a required property"),
        (("question",), "Q" * 61, "question", "too long"),
        (("root",), "nowhere", "root", "there is no node 'nowhere'"),
        (("root",), "cache", "root", "does not match the file's name"),
        (("author",), "me", "the tree", "'author' was unexpected"),
    ],
)
def test_a_defect_is_refused_with_its_place(path, new, place, said):
    value = dns()
    put(value, path, new)
    found = problems(value)
    assert any(problem.startswith(f"{place}: ") and said in problem for problem in found), found


@pytest.mark.parametrize("token", CONTROL_TOKENS)
@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("question",), "question"),
        (("nodes", "ttl", "texts", 0), "nodes.ttl.texts[0]"),
        (("nodes", "ttl", "choices", 2, "text"), "nodes.ttl.choices[2].text"),
    ],
)
def test_control_tokens_in_a_text_are_refused(path, place, token):
    value = dns()
    put(value, path, f"Say {token}?"[:40])
    assert problems(value) == [f"{place}: control token {token} at character 4"]


def test_a_cycle_away_from_the_root_is_refused():
    value = dns()
    value["nodes"]["one"] = {"texts": ["A."], "choices": choices("two", "g", "h")}
    value["nodes"]["two"] = {"texts": ["B."], "choices": choices("one", "i", "j")}
    cycle = "part of a cycle that the root does not reach"
    assert problems(value) == [f"nodes.one: {cycle}", f"nodes.two: {cycle}"]


def test_every_problem_of_a_tree_is_told_at_once():
    value = dns()
    put(value, ("nodes", "dns", "texts", 0), "A" * 81)
    put(value, (*FIRST, "confidence"), 7)
    assert len(problems(value)) == 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not of type 'object'"),
        (b"null", "not of type 'object'"),
        (b'{"question": "\xff"}', "not UTF-8"),
        (b'{"question": "A?", "question": "B?"}', "occurs twice"),
        (b'{"question": NaN}', "not JSON"),
        (b'{"question": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "not readable"),
    ],
)
def test_what_is_not_json_is_refused(data, said):
    with pytest.raises(TreeError, match=said):
        parse_tree(data, "dns", "systems")


def test_the_schema_is_valid_json_schema():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


LINES = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ['"', "<end_of_turn>", "<escape>}", "a\u0085b", "\u2029", "A → {B}", "\ufeff", "a\u200b", 'User: "x"', "\u00a0x"]
)


NAMES = st.sampled_from(["dns", "cache", "cost", "root_zone", "ttl", "a1", "A", "", "x_"])


def accepted_or_refused(data: bytes) -> Tree | None:
    """Parse; nothing but TreeError may come out, and what is accepted must be usable to its last node."""
    try:
        tree = parse_tree(data, "dns", "systems")
    except TreeError as error:
        assert error.problems
        return None
    walked = [name for name, _, _ in tree.walk()]
    assert sorted(walked) == sorted(tree.nodes)
    for example in tree.examples():
        assert parse_example(example.text) == example
        assert parse_example(example.text).text == example.text
    return tree


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_tree_or_a_tree_error(data):
    accepted_or_refused(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_tree_with_anything_anywhere_is_usable_or_refused(data):
    """Change one to three places of a good tree: texts, names, numbers, or any JSON in place of a part."""
    value = dns()
    for _ in range(data.draw(st.integers(1, 3))):
        put(value, data.draw(st.sampled_from(list(places(value)))), data.draw(LINES | NAMES | JSON | st.floats(0, 1)))
        if not isinstance(value, dict) or not list(places(value)):
            break
    accepted_or_refused(json.dumps(value).encode())


@settings(max_examples=100, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=4), LINES, st.integers(0, 100))
@explicit(["0\n"], "0", 0)  # a pattern's $ lets a last line break pass
@explicit(["0"], "0\n", 0)
def test_texts_that_are_accepted_come_back_from_the_text_format(texts, follow_up, hundredths):
    value = dns()
    value["nodes"]["cache"]["texts"] = texts
    value["nodes"]["dns"]["choices"][0]["text"] = follow_up
    value["nodes"]["dns"]["choices"][0]["confidence"] = hundredths / 100
    tree = accepted_or_refused(json.dumps(value, ensure_ascii=False).encode())
    if tree:
        assert tree.nodes["cache"].fragments == tuple(texts)
        assert tree.nodes["dns"].follow_ups[0].probability == hundredths / 100


def places(value, path=()):
    """The path of every part of a JSON value, but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def test_parsing_does_not_change_with_the_order_of_the_nodes():
    value = dns()
    turned = copy.deepcopy(value)
    turned["nodes"] = dict(reversed(turned["nodes"].items()))
    assert parse(turned).examples() == parse(value).examples()
