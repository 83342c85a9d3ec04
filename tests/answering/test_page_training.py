"""A conversation as training data: which conversation, which version, which of its questions and answers."""

import json
from itertools import pairwise

from page_browser import a_page, ask, node, press, tree


def test_a_training_tree_is_made_of_the_conversation_that_was_open_when_it_was_asked_for(page, server):
    ask(page)
    first = server.document()["id"]
    with page.expect_request("**/training_tree") as request, server.held():
        press(page, "g", "s", "n")
        page.locator(".start").wait_for()
    assert first in request.value.url
    page.locator(".notice", has_text="Saved as").wait_for()


def test_a_training_tree_is_not_made_of_an_older_version_when_the_server_refuses_the_newer(browser, server):
    with a_page(browser, server, expected=("413",)) as page:
        ask(page)
        server.document(lambda found: "'whole'" in str(found))
        body = json.dumps({"error": {"message": "the document is too large"}})
        page.route("**/api/conversations/*", lambda route: route.fulfill(status=413, body=body))
        press(page, "g", "s")
        page.locator(".notice.error", has_text="The document is too large.").wait_for()
        assert page.locator(".notice", has_text="Saved as").count() == 0


def test_of_many_remarks_about_a_training_tree_three_are_shown_and_the_rest_counted(page):
    ask(page)
    for number, last in ((4, "Remark 3."), (60, "Remark 2. And 57 more remarks.")):
        told = {"path": "own.json", "warnings": [f"Remark {each}." for each in range(number)]}
        page.route("**/training_tree", lambda route, _, told=told: route.fulfill(json=told))
        press(page, "s")
        page.locator(".notice", has_text="Saved as own.json. Remark 0. Remark 1. Remark 2.").filter(
            has_text=last
        ).wait_for()


# --- what fits into one ----------------------------------------------------------------------------------------------


def test_an_own_question_that_no_tree_takes_is_said(page):
    ask(page)
    press(page, "o")
    page.keyboard.type("A question of one's own that has more than forty characters?")
    press(page, "Enter")
    page.locator(".turn.now .actions").wait_for()
    page.click("#open-menu")
    page.locator("#menu button", has_text="Export as tree file").click()
    page.locator("dialog", has_text="characters, 40 fit").filter(has_text="ask the questions in other words").wait_for()


def choices_of(*those):
    return [{"text": text, "confidence": 0.5 - i / 10, "target": f"t_{i}"} for i, text in enumerate(those)]


def test_a_question_that_stays_out_stays_out_with_all_its_answers(modules):
    own = [node(f"own{i}", question="Mine?", created=f"2026-{i}", choices=choices_of("d", "e", "f")) for i in range(2)]
    followed = [
        node(f"n{i}", question=each, from_choice=i, choices=choices_of("d", "e", "f")) for i, each in enumerate("ABC")
    ]
    document = tree(node("root", None, choices=choices_of(*"ABC")), *followed, *own)
    code = "return (await import('/static/tree_file.js')).toTree(given[0], new Set(given[1]))"
    crowded = modules(code, [document, []])["crowded"][0]["questions"]
    assert [(each["question"], each["ids"]) for each in crowded][3:] == [("Mine?", ["own0", "own1"])]
    assert modules(code, [document, crowded[3]["ids"]])["crowded"] == []


def test_page_and_server_take_the_same_of_two_answers(modules):
    """conversation/data/own_trees.py: good before favourite before corrected before the newest."""
    marks = [{}, {"corrected": True}, {"favourite": True}, {"favourite": True, "corrected": True}, {"mark": "good"}]
    code = """const { nodes } = (await import('/static/tree_file.js')).toTree(given).tree;
    return Object.values(nodes).map((each) => each.texts[0]);"""
    root = node("root", None, choices=choices_of(*"ABC"))
    for worse, better in pairwise(marks):
        asked = {"question": "A", "from_choice": 0, "choices": choices_of(*"def")}
        twins = node("a", text="better", created="1", **asked | better), node("b", text="worse", **asked | worse)
        assert modules(code, tree(root, *twins)) == ["text", "better"]
