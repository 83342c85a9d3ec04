"""Conversations leave the page as files and come back; what the tree reader says of them."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_browser import (
    FIRST,
    PROTECTION,
    QUESTION,
    SECOND,
    STOLEN,
    THIRD,
    a_page,
    arrived,
    ask,
    fragments,
    grow,
    nodes,
    press,
)

from conversation.data.trees import TreeError, parse_tree
from conversation_config import PROJECT


def menu(page, item):
    page.click("#open-menu")
    page.locator("#menu button", has_text=re.compile(f"^{item}")).click()


def exported(page, item):
    """(name, text) of the file that a menu item gives."""
    with page.expect_download() as download:
        menu(page, item)
    return download.value.suggested_filename, open(download.value.path(), encoding="utf-8").read()


def choose(page, name, text):
    with page.expect_file_chooser() as chooser:
        menu(page, "Import")
    chooser.value.set_files([{"name": name, "mimeType": "text/plain", "buffer": text.encode()}])


def own(page, question):
    press(page, "o")
    page.keyboard.type(question)
    press(page, "Enter")
    arrived(page, question)


def read(name, text):
    return parse_tree(text.encode(), name.removesuffix(".json"), "own")


# --- tree files ------------------------------------------------------------------------------------------------------


def test_a_conversation_is_exported_as_a_tree_that_the_reader_accepts(page):
    grow(page)
    press(page, "k", "k")
    own(page, "What of satellites?")
    name, text = exported(page, "Export as tree file")
    tree = read(name, text)
    assert name == "internet_find_route.json" and tree.question == QUESTION
    walked = {prompt.question: (len(prompt.history), answer.fragments) for _, prompt, answer in tree.walk()}
    assert set(walked) == {QUESTION, FIRST, SECOND, PROTECTION, STOLEN, "What of satellites?"}
    assert walked[STOLEN][0] == 1 + 4 + 1 + 3
    root = tree.nodes[tree.name]
    assert [each.text for each in root.follow_ups] == [FIRST, SECOND, "What of satellites?"], "the likeliest stay"
    assert root.follow_ups[2].confidence == "0.13"


def test_an_own_question_takes_the_place_of_the_least_likely_choice_that_nobody_followed(page):
    ask(page)
    own(page, "What of satellites?")
    press(page, "k", "3")
    arrived(page, THIRD)
    tree = read(*exported(page, "Export as tree file"))
    assert [each.text for each in tree.nodes[tree.name].follow_ups] == [FIRST, "What of satellites?", THIRD]


def test_drafts_second_answers_and_bad_ones_stay_out_of_a_tree(page):
    grow(page)
    press(page, "b", "h", "t")
    page.locator(".correction input").first.fill("Corrected.")
    press(page, "Control+Enter")
    page.locator(".badges", has_text="corrected").wait_for()
    press(page, "r")
    page.locator(".siblings", has_text="3 of 3").wait_for()
    arrived(page, PROTECTION)
    name, text = exported(page, "Export as tree file")
    tree = read(name, text)
    answers = {prompt.question: answer.fragments[0] for _, prompt, answer in tree.walk()}
    assert set(answers) == {QUESTION, FIRST, SECOND, PROTECTION} and answers[PROTECTION] == "Corrected."
    page.locator(".notice", has_text="2 answers stay out of the tree").wait_for()


def test_where_more_than_three_questions_follow_an_answer_the_reader_decides_which_stay(page):
    ask(page)
    for key, asked in (("1", FIRST), ("2", SECOND), ("3", THIRD)):
        press(page, key)
        arrived(page, asked)
        press(page, "k")
        arrived(page, QUESTION)
    own(page, "What of satellites?")
    menu(page, "Export as tree file")
    dialog = page.locator("dialog")
    dialog.locator("text=3 of 3 places taken.").wait_for()
    assert dialog.get_by_label("What of satellites?").is_disabled()
    dialog.get_by_label(SECOND).uncheck()
    dialog.get_by_label("What of satellites?").check()
    with page.expect_download() as download:
        dialog.get_by_text("Go on").click()
    tree = read(download.value.suggested_filename, open(download.value.path()).read())
    assert {prompt.question for _, prompt, _ in tree.walk()} == {QUESTION, FIRST, "What of satellites?", THIRD}


def test_what_does_not_fit_into_a_tree_is_said(page):
    ask(page, "A question that is " + "much " * 12 + "too long?")
    menu(page, "Export as tree file")
    page.locator("dialog", has_text="The first question has 88 characters, 60 fit.").wait_for()


@pytest.mark.parametrize("name", ["core_trees/systems/mutex", "conversation_trees/systems/bgp_routing"])
def test_the_projects_own_trees_come_in_and_go_out_the_same(page, name):
    text = (PROJECT / "data" / f"{name}.json").read_text()
    choose(page, "tree.json", text)
    value = json.loads(text)
    arrived(page, value["question"])
    assert len(nodes(page)) == len(value["nodes"])
    again = read(*exported(page, "Export as tree file"))
    walk = [
        (prompt.question, prompt.history, answer.fragments, [(c.text, c.confidence) for c in answer.follow_ups])
        for _, prompt, answer in again.walk()
    ]
    tree = parse_tree(text.encode(), value["root"], "own")
    assert walk == [
        (prompt.question, prompt.history, answer.fragments, [(c.text, c.confidence) for c in answer.follow_ups])
        for _, prompt, answer in tree.walk()
    ]
    assert {c.target for _, _, answer in again.walk() for c in answer.follow_ups} == {
        c.target for _, _, answer in tree.walk() for c in answer.follow_ups
    }


# --- Markdown and complete copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", ["Export as Markdown", "Export a complete copy"])
def test_everything_goes_out_and_comes_back(page, server, item):
    grow(page)
    press(page, "g", "f", "k", "b")
    own(page, "What of <b>*satellites*</b> & co.?")
    name, text = exported(page, item)
    document = server.document(lambda found: len(found["nodes"]) == 6 and "'draft'" not in str(found))
    page.click("#open-menu")
    page.locator("#menu button", has_text="Delete the conversation").click()
    page.locator(".start").wait_for()
    choose(page, name, text)
    arrived(page, "What of <b>*satellites*</b> & co.?" if "copy" in item else QUESTION)
    again = server.document(lambda found: found["id"] != document["id"])
    assert comparable(again) == comparable(document)


def comparable(document):
    """The tree without ids and dates."""
    kept = ("question", "fragments", "choices", "from_choice", "state", "mark", "favourite", "corrected")

    def below(parent):
        found = sorted((n for n in document["nodes"].values() if n["parent"] == parent), key=lambda n: n["created"])
        return [[{key: node[key] for key in kept}, below(node["id"])] for node in found]

    return [document["title"], below(None)]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "{", "it is no JSON"),
        ("a.json", "[]", "the file is no conversation tree: it has no nodes"),
        ("a.json", '{"question": "Q?", "root": "constructor", "nodes": {}}', "root: there is no node constructor"),
        (
            "a.json",
            '{"question": "Q?", "root": "a", "nodes": {"a": {"texts": [1], "choices": []}}}',
            "a, fragments 0: is empty",
        ),
        ("a.json", '{"version": 1, "nodes": {"a": {"id": "a", "parent": "b"}}}', "has no parent"),
        ("a.md", "# Title\n\nwords", "line 3: there is no question above it"),
        ("a.md", "## 1 Q?\n\n## 1.2.1 R?", "line 3: there is no question 1.2"),
        ("a.md", "nothing", "line 1: there is no question above it"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_place(page, name, text, problem):
    choose(page, name, text)
    page.locator(".notice.error", has_text=f"{name} was not imported:").filter(has_text=problem).wait_for()


# --- fuzzing ---------------------------------------------------------------------------------------------------------


def texts(limit):
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=limit)


good_names = st.sampled_from(["a", "b_1", "constructor", "hasownproperty", "x" * 60, "same"])
names = good_names | texts(8)
choices = st.fixed_dictionaries(
    {"text": texts(50), "confidence": st.floats(-0.5, 1.5) | st.sampled_from([0.5, 0.25]), "target": names}
)
answers = st.fixed_dictionaries({"texts": st.lists(texts(90), max_size=5), "choices": st.lists(choices, max_size=4)})
good_lines = st.sampled_from(["A lock.", "Why?", "é😀 < {x} `*_", "x" * 40, "1. #", "- a\\b"])
own_questions = good_lines | st.sampled_from(["x" * 41, "Why <escape> it?", "x" * 70, "😀" * 41])
good_choice = st.fixed_dictionaries(
    {"text": good_lines, "confidence": st.sampled_from([0, 0.5, 0.37, 1]), "target": good_names}
)
TREE_OF = """
const { fromTree, toTree, ImportProblem } = await import('/static/tree_file.js');
try {
  return { tree: toTree(fromTree(given).doc) };
} catch (error) {
  if (error instanceof ImportProblem) return { refused: error.problems };
  throw error;
}
"""
FUZZED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@FUZZED
@given(
    st.fixed_dictionaries({"question": texts(70), "root": names, "nodes": st.dictionaries(names, answers, max_size=4)})
    | st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | texts(5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    )
)
def test_the_page_takes_a_tree_file_only_if_the_reader_does(modules, value):
    found = modules(TREE_OF, value)
    if "tree" in found:
        root = value["root"]
        parse_tree(json.dumps(value).encode(), root, "own")


good_answers = st.fixed_dictionaries(
    {
        "fragments": st.lists(good_lines, min_size=1, max_size=4),
        "choices": st.lists(good_choice, min_size=3, max_size=3, unique_by=lambda c: c["text"].lower()),
    }
)


@st.composite
def documents(draw):
    """A conversation document of up to eight nodes, whole and not, with every kind of mark."""
    nodes = {}
    for i in range(draw(st.integers(1, 8))):
        parent = None if i == 0 else f"n{draw(st.integers(0, i - 1))}"
        answer = draw(good_answers)
        place = draw(st.sampled_from([None, 0, 1, 2])) if parent else None
        question = nodes[parent]["choices"][place]["text"] if place is not None else draw(own_questions)
        nodes[f"n{i}"] = {
            "id": f"n{i}",
            "parent": parent,
            "question": question,
            **answer,
            "from_choice": place,
            "state": draw(st.sampled_from(["whole", "whole", "whole", "draft"])),
            "mark": draw(st.sampled_from([None, None, "good", "bad"])),
            "favourite": draw(st.booleans()),
            "corrected": draw(st.booleans()),
            "picked": [0, 0, 0],
            "created": f"2026-11-26T12:00:0{i}.000Z",
        }
    return {
        "version": 1,
        "id": "d",
        "title": draw(good_lines),
        "created": "2026-11-26T12:00:00.000Z",
        "revision": 0,
        "current": "n0",
        "nodes": nodes,
    }


@FUZZED
@given(documents())
def test_every_tree_that_the_page_makes_is_one_that_the_reader_accepts(modules, document):
    made = modules("return (await import('/static/tree_file.js')).toTree(given)", document)
    if made["problems"] or made["crowded"]:
        return
    try:
        tree = parse_tree(json.dumps(made["tree"]).encode(), made["name"], "own")
    except TreeError as error:
        raise AssertionError(f"{error} in {made['tree']}") from error
    assert len(tree.nodes) + made["left"] == len(document["nodes"])


@FUZZED
@given(documents())
def test_markdown_and_copies_lose_nothing(modules, document):
    code = """const { readText } = await import('/static/exchange.js');
    const { toMarkdown } = await import('/static/markdown.js');
    const { toDocumentFile } = await import('/static/document_file.js');
    return [readText(toMarkdown(given)).doc, readText(toDocumentFile(given)).doc];"""
    for again in modules(code, document):
        assert comparable(again) == comparable(document)


# --- training trees --------------------------------------------------------------------------------------------------


def test_a_training_tree_is_saved_on_the_server_and_what_is_missing_is_said(page, server):
    ask(page)
    press(page, "s")
    page.locator(
        ".notice", has_text="Saved as training-runs/own_trees/own/tree.json. One fragment occurs twice."
    ).wait_for()


def test_a_training_tree_that_the_server_refuses_is_said_with_its_problems(browser, server):
    with a_page(browser, server, expected=("422",)) as page:
        ask(page)
        menu(page, "Rename the conversation")
        page.fill("#dialog-text", "refused")
        press(page, "Enter")
        assert page.inner_text("#title") == "refused"
        press(page, "s")
        page.locator("dialog .problems", has_text="nodes.a: too few texts").wait_for()
        assert fragments(page)
