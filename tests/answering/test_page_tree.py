"""The page as a tree: where a reader goes, what they delete, mark and correct."""

from page_browser import (
    FIRST,
    PROTECTION,
    QUESTION,
    SECOND,
    STOLEN,
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
    page.locator(".notice", has_text="Deleted 3 answers.").hover()  # while the pointer is on it, it stays
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
    page.locator(".notice", has_text="Deleted").hover()
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
