"""The page as a tree: where a reader goes, what they delete, mark and correct, and what is fetched ahead."""

import re
import time

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
    eventually,
    fragments,
    grow,
    nodes,
    press,
)

# --- going -----------------------------------------------------------------------------------------------------------


def test_keys_go_to_parent_child_and_siblings(page):
    grow(page)
    for key, there in (
        ("h", PROTECTION),
        ("l", STOLEN),
        ("l", PROTECTION),  # round the end
        ("k", SECOND),
        ("j", PROTECTION),  # where one was last
        ("Shift+ArrowUp", SECOND),
        ("Shift+ArrowLeft", FIRST),
        ("Shift+ArrowRight", SECOND),
        ("Shift+ArrowUp", QUESTION),
        ("k", QUESTION),  # there is no parent
        ("Shift+ArrowDown", SECOND),
    ):
        press(page, key)
        assert page.inner_text("#question") == there, key
        assert page.evaluate("document.activeElement.id") == "question"


def test_the_map_shows_the_whole_tree_and_goes_by_click_and_as_a_tree_by_keys(page):
    grow(page)
    assert nodes(page) == [QUESTION, FIRST, SECOND, PROTECTION, STOLEN]
    levels = page.locator("[role=treeitem]").evaluate_all(
        "(items) => items.map((item) => item.ariaLevel + item.ariaPosInSet + item.ariaSetSize)"
    )
    assert levels == ["111", "212", "222", "312", "322"]
    assert page.locator("svg.lines path").count() == 4
    page.locator("[role=treeitem]", has_text=FIRST).click()
    arrived(page, FIRST)
    press(page, "m")
    for key, there in (
        ("ArrowDown", SECOND),
        ("ArrowRight", PROTECTION),
        ("End", STOLEN),
        ("ArrowLeft", SECOND),
        ("Home", QUESTION),
        ("ArrowUp", QUESTION),
    ):
        press(page, key)
        assert page.inner_text("#question") == there, key
        assert page.evaluate("document.activeElement.getAttribute('role')") == "treeitem"
    press(page, "End", "Enter")
    assert page.evaluate("document.activeElement.id") == "question"
    assert page.locator("[role=treeitem][tabindex='0']").count() == 1


def test_a_question_on_the_path_is_gone_to_by_click(page):
    grow(page)
    page.locator(".turn.past h2 button", has_text=SECOND).click()
    arrived(page, SECOND)
    assert page.locator(".turn").count() == 2


def test_search_finds_words_anywhere_and_leads_to_the_place(page):
    grow(page)
    press(page, "n")
    ask(page, "What's a mutex?")
    press(page, "/")
    page.keyboard.type("pakistan felled")
    page.locator(".hit").wait_for()
    assert page.locator(".hit mark").all_inner_texts() == ["Pakistan", "felled"]
    press(page, "Enter")
    arrived(page, SECOND)
    press(page, "/")
    page.keyboard.type("rout")
    page.locator(".hit").nth(1).wait_for()
    press(page, "ArrowDown", "ArrowUp", "ArrowDown")
    chosen = page.locator(".hit[aria-selected=true]")
    assert chosen.get_attribute("id") == page.get_attribute("[role=combobox]", "aria-activedescendant") == "hit-1"
    page.fill("[role=combobox]", "nothing like it")
    page.get_by_text("Nothing found").wait_for()
    press(page, "Escape")
    assert page.locator("dialog").count() == 0
    arrived(page, SECOND)


def test_the_shelf_lists_all_conversations_and_back_goes_to_the_one_before(page):
    ask(page)
    press(page, "n")
    ask(page, "What's a mutex?")
    shelf = page.locator("#shelf li")
    eventually(shelf.count, 2)
    assert shelf.first.inner_text().startswith("What's a mutex?")
    shelf.nth(1).locator("button").click()
    arrived(page, QUESTION)
    page.go_back()
    arrived(page, "What's a mutex?")


# --- changing --------------------------------------------------------------------------------------------------------


def test_a_branch_is_deleted_and_undo_brings_it_back(page, server):
    grow(page)
    press(page, "k", "Delete")
    page.locator(".notice", has_text="Deleted 3 answers.").wait_for()
    assert nodes(page) == [QUESTION, FIRST]
    server.document(lambda found: len(found["nodes"]) == 2)
    page.locator(".notice button", has_text="Undo").click()
    assert nodes(page) == [QUESTION, FIRST, SECOND, PROTECTION, STOLEN]
    arrived(page, SECOND)
    server.document(lambda found: len(found["nodes"]) == 5)
    press(page, "Delete", "z")
    assert len(nodes(page)) == 5


def test_a_conversation_is_deleted_and_undo_brings_it_back(page, server):
    grow(page)
    server.document(lambda found: len(found["nodes"]) == 5)
    page.click("#open-menu")
    page.get_by_text("Delete the conversation").click()
    page.locator(".start").wait_for()
    eventually(server.documents, [])
    press(page, "Escape")
    page.locator(".notice button", has_text="Undo").click()
    arrived(page, STOLEN)
    server.document(lambda found: len(found["nodes"]) == 5)


def test_answers_and_paths_are_marked(page, server):
    grow(page)
    press(page, "g", "f", "k", "b")
    document = server.document(lambda found: [n["mark"] for n in found["nodes"].values()].count("bad") == 1)
    marks = {node["question"]: (node["mark"], node["favourite"]) for node in document["nodes"].values()}
    assert marks[STOLEN] == ("good", True) and marks[SECOND] == ("bad", False)
    labels = page.locator("[role=treeitem]").evaluate_all("(items) => items.map((item) => item.ariaLabel)")
    assert f"{STOLEN}, marked good, path marked" in labels and f"{SECOND}, marked bad" in labels
    page.locator("[role=treeitem]", has_text=FIRST).click()
    page.locator(".marked-paths button").click()
    arrived(page, STOLEN)
    press(page, "g")
    assert page.locator(".actions .good").get_attribute("aria-pressed") == "false"


def test_an_answer_is_corrected_in_place(page, server):
    grow(page)
    press(page, "k", "t")
    form = page.locator(".correction")
    form.get_by_label("Fragment 1", exact=True).fill("Yes.  Unless it filters. ")
    form.get_by_label("Remove fragment 3").click()
    form.get_by_label("Follow-up 1", exact=True).fill("No protection at all?")
    form.get_by_label("Confidence 1").fill("61 %")
    form.get_by_label("Target 1", exact=True).fill("no_protection")
    form.get_by_text("Save").click()
    assert fragments(page) == ["Yes. Unless it filters.", "A more specific prefix wins everywhere."]
    document = server.document(lambda found: any(node["corrected"] for node in found["nodes"].values()))
    node = next(node for node in document["nodes"].values() if node["corrected"])
    assert node["choices"][0] == {"text": "No protection at all?", "confidence": 0.61, "target": "no_protection"}
    assert "No protection at all?" in nodes(page), "the question that followed this choice has its words"
    press(page, "z")
    assert len(fragments(page)) == 3 and PROTECTION in nodes(page)


def test_a_correction_that_breaks_the_format_is_refused_with_the_place(page):
    ask(page)
    press(page, "t")
    form = page.locator(".correction")
    form.get_by_label("Fragment 2", exact=True).fill("Its <escape> is bad.")
    form.get_by_label("Confidence 2", exact=True).fill("1.2")
    form.get_by_label("Follow-up 3", exact=True).fill(FIRST)
    form.get_by_label("Target 1", exact=True).fill("Not a name")
    form.get_by_text("Save").click()
    problems = form.locator(".problem:visible").all_inner_texts()
    assert [problem.strip() for problem in problems] == [
        "Fragment 2 holds the control token <escape>.",
        "Target 1 is not lower case words joined by _.",
        "Confidence 2 is not between 0 and 1.",
        "Follow-up 3 is there already.",
    ]
    assert page.evaluate("document.activeElement.ariaLabel") == "Fragment 2"
    press(page, "Escape")
    assert fragments(page)[1] == "Neighbours announce prefixes they reach."


def test_model_and_user_texts_are_never_read_as_html(browser, server):
    with a_page(browser, server, expected=("TrustedHTML",)) as page:
        html_stays_text(page)


def html_stays_text(page):
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>?")
    assert page.inner_text("#question") == "<img src=x onerror=alert(1)><b>bold</b>?"
    assert page.locator("main img, main b, #map-panel b").count() == 0
    with_html = page.evaluate(
        "() => { try { document.body.innerHTML = '<i>x</i>'; return 'taken' } catch (error) { return error.name } }"
    )
    assert with_html == "TypeError", "the page's own policy refuses it"


# --- prefetching -----------------------------------------------------------------------------------------------------


def test_likely_follow_ups_are_prefetched_and_there_at_once(browser, serve):
    server = serve(pause=0.15)
    with a_page(browser, server) as page:
        ask(page)
        eventually(lambda: page.locator(".choice .state").all_inner_texts(), ["ready"] * 3)
        assert [(e["question"], e["prefetch"]) for e in server.asked()] == [
            (QUESTION, False),
            (FIRST, True),
            (SECOND, True),
            (THIRD, True),
        ]
        wait = page.evaluate(
            """async () => { const start = performance.now(); document.querySelector('.choice').click();
            const count = (what) => document.querySelectorAll(what).length;
            while (count('.turn.now .choice') < 3 || count('.turn') < 2)
                await new Promise(requestAnimationFrame);
            return performance.now() - start; }"""
        )
        assert wait < 500, "an answer takes about a second"
        assert page.inner_text("#question") == FIRST
        gain = page.inner_text(".status .gain")
        assert re.fullmatch(
            r"Fetched ahead: 1, there after \d+ ms instead of \d\.\d s \(median\); \d+(\.\d)? m?s not waited",
            gain,
        ), gain


def test_prefetching_is_given_up_when_the_reader_goes_elsewhere_and_a_running_one_is_taken_over(browser, serve):
    server = serve(pause=0.4)
    with a_page(browser, server) as page:
        ask(page)
        page.locator(".choice .state", has_text="fetching").wait_for()
        press(page, "o")
        page.keyboard.type("Something else?")
        press(page, "Enter")
        arrived(page, "Something else?")
        log = {entry["question"]: entry["ended"] for entry in server.asked()}
        assert log[FIRST] == "given up" and log["Something else?"] == "whole" and SECOND not in log
        fetching = "Example of else?"
        eventually(lambda: page.locator(".choice .state").first.inner_text(), "fetching")
        time.sleep(1.0)  # a fragment or two have arrived by now
        press(page, "1")
        arrived(page, fetching)
        lines = [len(entry["history"]) for entry in server.asked() if entry["question"] == fetching]
        assert lines.count(min(lines)) == 1, "it was not asked a second time"
        eventually(lambda: page.locator(".choice .state").first.inner_text(), "fetching")
        deepest = max(server.asked(), key=lambda entry: len(entry["history"]))
        press(page, "k")
        eventually(lambda: next(e["ended"] for e in server.asked() if e["history"] == deepest["history"]), "given up")


def test_prefetching_can_be_switched_off(page, server):
    page.click("#open-menu")
    page.get_by_label("Fetch follow-ups ahead").uncheck()
    press(page, "Escape")
    ask(page)
    time.sleep(0.5)
    assert [entry["question"] for entry in server.asked()] == [QUESTION]
    page.reload()
    arrived(page, QUESTION)
    time.sleep(0.3)
    assert len(server.asked()) == 1


def test_what_is_fetched_ahead_again_after_a_correction_is_taken_when_it_is_picked(browser, serve):
    server = serve(pause=0.3)
    with a_page(browser, server) as page:
        ask(page)
        eventually(lambda: page.locator(".choice .state").first.inner_text(), "fetching")
        press(page, "t")
        page.locator(".correction input").first.fill("Corrected.")
        press(page, "Control+Enter")
        eventually(lambda: page.locator(".choice .state").first.inner_text(), "fetching")
        time.sleep(0.8)  # a fragment has arrived by now
        press(page, "1")
        arrived(page, FIRST)
        assert [e["question"] for e in server.asked() if "Corrected." in str(e["history"])].count(FIRST) == 1


def test_what_was_fetched_ahead_for_words_that_another_tab_corrected_is_not_taken(browser, server):
    context = browser.new_context(reduced_motion="reduce")
    with a_page(browser, server, context) as one, a_page(browser, server, context) as two:
        ask(one)
        eventually(lambda: one.locator(".choice .state").all_inner_texts(), ["ready"] * 3)
        two.locator("#shelf li button").click()
        arrived(two, QUESTION)
        press(two, "t")
        two.locator(".correction input").first.fill("Corrected.")
        press(two, "Control+Enter")
        eventually(lambda: fragments(one)[0], "Corrected.")

        def asked():
            return [e["history"][1]["text"] for e in server.asked() if e["question"] == FIRST]

        eventually(lambda: asked().count("Corrected."), 2)  # each tab once
        eventually(lambda: one.locator(".choice .state").all_inner_texts(), ["ready"] * 3)  # picked sooner, asked again
        press(one, "1")
        arrived(one, FIRST)
        assert asked().count("Corrected.") == 2
    context.close()


def test_who_asks_and_looks_at_another_tab_meanwhile_finds_follow_ups_fetched_on_coming_back(page, server):
    page.evaluate("Object.defineProperty(document, 'hidden', {get: () => window.away ?? true, configurable: true})")
    ask(page)
    time.sleep(0.3)
    assert [entry["question"] for entry in server.asked()] == [QUESTION]
    page.evaluate("() => { window.away = false; document.dispatchEvent(new Event('visibilitychange')); }")
    eventually(lambda: page.locator(".choice .state").all_inner_texts(), ["ready"] * 3)
