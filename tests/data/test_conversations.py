"""Documents of conversations: their form; as training trees; and what readers picked."""

import copy
import json
import uuid

import pytest
from conftest import PROJECT
from documents import CHOICES, DELETE, ID, document, node, put
from hypothesis import given, settings
from hypothesis import strategies as st

from conversation.data.conversations import ConversationError, parse_conversation
from conversation.data.observed_shares import observe, with_shares
from conversation.data.own_trees import remarks, training_tree
from conversation.data.trees import Tree, TreeError, format_tree, parse_tree


def tree_of(*nodes):
    return training_tree(parse_conversation(document(*nodes)))


def problems_of(*nodes):
    with pytest.raises(TreeError) as caught:
        tree_of(*nodes)
    return caught.value.problems


# --- the form of a document ------------------------------------------------------------------------------------------


def test_a_document_is_read_and_what_it_does_not_know_is_left_alone():
    conversation = parse_conversation({**document(), "folded": True})
    assert conversation.root.question == "What's a monad?"
    assert [each.id for each in conversation.children(conversation.root)] == ["ab"]
    little = document()
    for key in ("mark", "favourite", "corrected", "picked", "from_choice"):
        del little["nodes"]["a"][key]
    assert parse_conversation(little).root.picked == (0, 0, 0)


def broken(path, value):
    whole = document()
    put(whole, path, value)
    return whole


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "the document: is not an object"),
        (broken(["version"], 2), "version: is not 1"),
        (broken(["version"], True), "version: is not 1"),
        (broken(["id"], "../../etc/passwd"), "id: is not a UUID"),
        (broken(["id"], ID.upper()), "id: is not a UUID"),
        (broken(["id"], ID + "\n"), "id: is not a UUID"),
        (broken(["title"], "x" * 4001), "title: is not a text"),
        (broken(["revision"], -1), "revision: is not a whole number"),
        (broken(["revision"], 2**53), "revision: is not a whole number"),
        (broken(["nodes"], {}), "nodes: is not an object with at least one node"),
        (broken(["nodes", "a"], 7), "nodes.a: is not an object"),
        (broken(["nodes", "a", "id"], "z"), "is not the key under which it stands"),
        (broken(["nodes", "a", "question"], DELETE), "nodes.a.question: is missing"),
        (broken(["nodes", "a", "fragments"], ["x"] * 21), "nodes.a.fragments: is not a list of at most 20"),
        (broken(["nodes", "a", "fragments", 0], 1), "nodes.a.fragments"),
        (broken(["nodes", "a", "choices", 0, "confidence"], "0.5"), "nodes.a.choices[0].confidence: is not a number"),
        (broken(["nodes", "a", "choices", 0, "confidence"], float("nan")), "confidence: is not a number"),
        (broken(["nodes", "a", "choices", 0, "confidence"], 10**400), "confidence: is not a number"),
        (broken(["nodes", "a", "picked"], [0, 1]), "nodes.a.picked: is not a list of 3"),
        (broken(["nodes", "a", "state"], "half"), 'nodes.a.state: is not one of "whole"'),
        (broken(["nodes", "a", "mark"], True), "nodes.a.mark"),
        (broken(["nodes", "ab", "from_choice"], 3), "nodes.ab.from_choice"),
        (broken(["nodes", "ab", "parent"], "zzz"), "there is no node 'zzz'"),
        (broken(["nodes", "ab", "parent"], None), "2 have no parent"),
        (broken(["nodes", "a", "parent"], "ab"), "0 have no parent"),
        (broken(["nodes", "ab", "parent"], "abc"), "leads in a circle"),
        (broken(["nodes", "ab", "parent"], "ab"), "leads in a circle"),
        (broken(["current"], "zzz"), "current: there is no node"),
        (broken(["nodes", "a b"], {}), "an id has 1 to 100"),
    ],
)
def test_what_is_no_document_is_refused_with_its_place(value, words):
    with pytest.raises(ConversationError) as caught:
        parse_conversation(value)
    assert any(words in problem for problem in caught.value.problems)


def test_a_document_of_thousands_of_nodes_is_read_fast_and_of_too_many_refused():
    nodes = [node("n0", "Q?")]
    nodes += [node(f"n{i}", "Q?", f"n{i - 1}") for i in range(1, 5001)]
    assert len(parse_conversation(document(*nodes[:5000])).nodes) == 5000
    with pytest.raises(ConversationError, match="there are 5001, at most 5000"):
        parse_conversation(document(*nodes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_stands_in_a_document_it_is_read_or_refused(data):
    value = document()
    for _ in range(data.draw(st.integers(1, 3))):
        at = value
        while True:
            key = data.draw(st.sampled_from(sorted(at))) if isinstance(at, dict) and at else None
            if isinstance(at, list) and at:
                key = data.draw(st.integers(0, len(at) - 1))
            if key is None:
                break
            if data.draw(st.booleans()) or not isinstance(at[key], dict | list):
                at[key] = data.draw(JSON)
                break
            at = at[key]
    try:
        conversation = parse_conversation(value)
    except ConversationError as error:
        assert error.problems
    else:
        try:
            made = training_tree(conversation)
        except TreeError as error:
            assert error.problems
        else:
            assert parse_tree(made.data, made.tree.name, made.tree.domain) == made.tree


# --- a training tree -------------------------------------------------------------------------------------------------


def test_a_conversation_becomes_a_tree_that_the_reader_of_trees_accepts():
    made = tree_of()
    tree = made.tree
    assert (tree.question, tree.name, tree.domain) == ("What's a monad?", "monad_0f8fad5b", "conversations")
    assert [name for name, _, _ in tree.walk()] == ["monad_0f8fad5b", "a_example", "a_example_burrito"]
    example = tree.examples()[2]
    assert example.prompt.question == "Is it like a burrito?"
    assert [line.text for line in example.prompt.history][:2] == ["What's a monad?", "a says this."]
    assert made.warnings == ('"Is it like a burrito?" stands in the place of "ab limits?"',)


def test_an_own_question_takes_the_place_of_the_least_likely_choice_that_was_not_followed():
    root = node("a", "Q?")
    tree = tree_of(root, node("ab", "a limits?", "a", 2), node("abc", "Own?", "a")).tree
    texts = {choice.text: choice.confidence for choice in tree.nodes[tree.name].follow_ups}
    assert texts == {"a example?": "0.55", "Own?": "0.21", "a limits?": "0.16"}
    three = [node(f"ab{word}", f"a {word}?", "a", number) for number, (_, word) in enumerate(CHOICES)]
    assert any("no place" in problem for problem in problems_of(root, *three, node("own", "Own?", "a")))
    three[1]["mark"] = "bad"
    assert "Own?" in {
        c.text for c in tree_of(root, *three, node("own", "Own?", "a")).tree.nodes["q_0f8fad5b"].follow_ups
    }


def test_an_own_question_in_the_words_of_a_choice_is_that_choice_and_a_reworded_choice_keeps_its_place():
    root = node("a", "Q?")
    tree = tree_of(root, node("ab", "A WHY", "a")).tree
    assert [c.text for c in tree.nodes[tree.name].follow_ups] == ["a example?", "a why?", "a limits?"]
    assert "a_why" in tree.nodes
    made = tree_of(root, node("ab", "But why, really?", "a", 0))
    assert made.tree.nodes["q_0f8fad5b"].follow_ups[0].text == "But why, really?"


def test_what_is_unfinished_or_bad_is_left_out_with_all_below_it_and_said():
    root = node("a", "Q?")
    bad = node("ab", "a example?", "a", 0, mark="bad")
    draft = node("abcd", "a why?", "a", 1, state="draft", fragments=[], choices=[])
    made = tree_of(root, bad, node("abc", "ab why?", "ab", 1), draft)
    assert list(made.tree.nodes) == ["q_0f8fad5b"]
    assert [warning.split(":")[0] for warning in made.warnings] == [
        "left out, as it is marked as bad",
        "left out, as its answer is not whole",
    ]
    assert problems_of({**root, "mark": "bad"}) == ['"Q?" is marked as bad, and nothing is left without it']
    assert any("no whole answer" in each for each in problems_of({**root, "state": "draft"}))


def test_a_node_that_the_reader_leaves_out_stays_out_with_all_below_it():
    nodes = (node("a", "Q?"), node("ab", "a example?", "a", 0), node("abc", "ab why?", "ab", 1), node("x", "Own?", "a"))
    tree = training_tree(parse_conversation(document(*nodes)), ["ab"]).tree
    assert len(tree.nodes) == 2 and tree.nodes[tree.name].follow_ups[2].text == "Own?"


def test_of_several_answers_to_one_question_the_best_marked_then_the_newest_is_taken():
    root = node("a", "Q?")
    first, second = node("ab", "a why?", "a", 1), node("abc", "a why?", "a", 1)
    assert tree_of(root, first, second).tree.nodes["a_why"].fragments[0] == "abc says this."
    first["favourite"] = True
    assert tree_of(root, first, second).tree.nodes["a_why"].fragments[0] == "ab says this."
    second["mark"] = "good"
    assert tree_of(root, first, second).tree.nodes["a_why"].fragments[0] == "abc says this."


def test_targets_are_distinct_names_by_rule_where_the_models_cannot_stay():
    same = [{"text": text, "confidence": 0.3, "target": "same"} for text in ("Example?", "vs a functor?", "So what?")]
    odd = [{"text": text, "confidence": 0.3, "target": "Über Größe"} for text in ("Why?", "日本語?", "It is?")]
    tree = tree_of(node("a", "What's a monad?", choices=same), node("ab", "Example?", "a", 0, choices=odd)).tree
    assert [c.target for c in tree.nodes[tree.name].follow_ups] == ["same", "monad_vs_functor", "monad_what"]
    assert [c.target for c in tree.nodes["same"].follow_ups] == ["same_why", "same_node", "same_is"]


def test_confidences_have_two_decimals_and_fall():
    choices = [{"text": f"{v}?", "confidence": v, "target": f"t{i}"} for i, v in enumerate((0.1, 0.777, 0.2))]
    tree = tree_of(node("a", "Q?", choices=choices)).tree
    assert [c.confidence for c in tree.nodes[tree.name].follow_ups] == ["0.78", "0.20", "0.10"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"question": "q" * 61}, "the first question has 61 characters, at most 60"),
        ({"question": " "}, "the first question is empty"),
        ({"question": "a <escape> b"}, "control token <escape>"),
        ({"fragments": []}, "0 fragments, expected 1 to 4"),
        ({"fragments": ["x"] * 5}, "5 fragments"),
        ({"fragments": ["x" * 81]}, 'fragment 1 of the answer to "Q?" has 81 characters, at most 80'),
        ({"fragments": ["fine", " "]}, "fragment 2 of the answer"),
        ({"fragments": ["<end_of_turn>"]}, "control token <end_of_turn> inside fragment 1"),
        ({"choices": []}, "0 choices, expected 3"),
        ({"choices": [{"text": "x" * 41, "confidence": 0.5, "target": "t"}] * 3}, "choice 1 of the answer"),
        ({"choices": [{"text": "x", "confidence": 1.5, "target": "t"}] * 3}, "confidence 1.5, expected 0 to 1"),
    ],
)
def test_what_only_the_reader_can_put_right_is_a_problem_with_its_place(changed, words):
    assert any(words in problem for problem in problems_of(node("a", **{"question": "Q?", **changed})))


def test_an_own_question_that_is_too_long_for_a_follow_up_is_a_problem():
    found = problems_of(node("a", "Q?"), node("ab", "o" * 41, "a"))
    assert any("has 41 characters, at most 40" in problem for problem in found)


def test_the_checks_of_the_data_run_over_the_tree_and_those_beside_it():
    first = tree_of(node("a", "What's a monad?", fragments=["It is important to note this.", "Twice."])).tree
    other = training_tree(
        parse_conversation(
            document(node("b", "What's a monad?", fragments=["Twice."]), identifier=str(uuid.UUID(int=5)))
        )
    ).tree
    found = "\n".join(remarks(first, [first, other]))
    for words in (
        "an empty phrase",
        "the structural tests ask",
        "asked twice",
        "said twice",
        f"in conversations/{other.name}",
    ):
        assert words in found
    clean = tree_of(node("a", "What's a lens?")).tree
    assert remarks(clean, []) == []


def test_our_own_trees_are_laid_out_as_format_tree_does():
    """So a tree that is written again differs in nothing but what was changed."""
    for folder, spread in (("core_trees", False), ("conversation_trees", True)):
        for path in sorted((PROJECT / "data" / folder).rglob("*.json"))[::20]:
            text = path.read_text(encoding="utf-8")
            assert format_tree(json.loads(text), spread) == text


# --- what readers picked ---------------------------------------------------------------------------------------------


def monad_tree() -> Tree:
    return tree_of(node("a", "What's a monad?"), node("ab", "a example?", "a", 0)).tree


def reader(number, *nodes):
    return parse_conversation(document(*nodes, identifier=str(uuid.UUID(int=number))))


def test_shares_are_of_the_readers_who_went_on_each_with_one_vote():
    tree = monad_tree()
    root, child = node("a", "what's a MONAD"), node("ab", "a example?", "a", 0)
    readers = [
        reader(1, root, child),  # followed the first choice
        reader(2, {**root, "picked": [0, 3, 0]}),  # picked the second, again and again
        reader(3, {**root, "picked": [1, 0, 0]}, node("abc", "Own?", "a")),  # half a vote elsewhere
        reader(4, root),  # read it and left
        reader(5, node("a", "What's a functor?"), child),  # asked something else
        reader(
            6, {**root, "choices": [{"text": t, "confidence": 0.1, "target": t} for t in "xyz"], "picked": [9, 0, 0]}
        ),
    ]
    found = observe(tree, readers)
    assert list(found) == [tree.name]
    assert found[tree.name].readers == 3
    assert found[tree.name].shares == pytest.approx((1.5 / 3, 1 / 3, 0))


def test_nodes_below_are_matched_by_the_questions_on_the_way():
    tree = monad_tree()
    root, child = node("a", "What's a monad?"), node("ab", "a example?", "a", 0, picked=[0, 0, 1])
    found = observe(tree, [reader(1, root, child)])
    assert found["a_example"].shares == (0, 0, 1)
    elsewhere = node("ab", "a why?", "a", 1, picked=[0, 0, 1])
    assert "a_example" not in observe(tree, [reader(1, root, elsewhere)])


def test_shares_are_written_with_the_number_of_readers_the_likeliest_first_and_the_reader_takes_the_tree():
    made = tree_of(node("a", "What's a monad?"))
    readers = [reader(i, node("a", "What's a monad?", picked=[0, i % 2, 1 - i % 2])) for i in range(5)]
    content = json.loads(made.data)
    before = copy.deepcopy(content)
    changed = with_shares(content, observe(made.tree, readers), 5)
    assert content == before
    answer = changed["nodes"][made.tree.name]
    assert answer["readers"] == 5
    assert [(c["text"], c["confidence"]) for c in answer["choices"]] == [
        ("a limits?", 0.6),
        ("a why?", 0.4),
        ("a example?", 0),
    ]
    parse_tree(format_tree(changed).encode(), made.tree.name, made.tree.domain)
    assert with_shares(content, observe(made.tree, readers), 6) == content
