"""Keys and focus: input methods, held keys, other layouts, and where the focus goes when its place vanishes."""

import pytest
from page_browser import FIRST, QUESTION, SECOND, a_page, arrived, ask, eventually, fragments, grow, nodes, press

FOCUS = "document.activeElement.id"
PHONE = {"viewport": {"width": 375, "height": 740}, "has_touch": True, "is_mobile": True}
KEY = """(element, [key, more]) => element.dispatchEvent(
    new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true, ...more}))"""


def key(page, place, name, **more):
    page.locator(place).first.evaluate(KEY, [name, more])


def test_keys_of_an_input_method_do_not_act_on_the_page(page):
    ask(page)
    press(page, "t")
    page.locator(".correction input").first.fill("変")
    key(page, ".correction input", "Escape", isComposing=True)
    assert page.locator(".correction input").first.input_value() == "変"
    press(page, "Escape", "e")
    key(page, "#own-question", "Escape", isComposing=True)
    assert page.evaluate(FOCUS) == "own-question" and page.input_value("#own-question") == QUESTION
    press(page, "Escape", "/")
    page.keyboard.type("route")
    page.locator(".hit").first.wait_for()
    key(page, "[role=combobox]", "Enter", isComposing=True)
    assert page.locator("dialog").count() == 1
    press(page, "Escape")
    page.click("#open-menu")
    page.get_by_text("Rename the conversation").click()
    key(page, "#dialog-text", "Enter", isComposing=True)
    key(page, "#dialog-text", "Enter", keyCode=229)
    assert page.locator("dialog").count() == 1
    press(page, "Escape")
    key(page, "#question", "Delete", isComposing=True)
    assert nodes(page) == [QUESTION]


def test_a_key_that_is_held_deletes_once_and_goes_on_going(page):
    grow(page)
    key(page, "#question", "Delete", repeat=True)
    key(page, "#question", "1", repeat=True)
    assert len(nodes(page)) == 5
    key(page, "#question", "k", repeat=True)
    arrived(page, SECOND)
    press(page, "Delete")
    assert len(nodes(page)) == 2


@pytest.mark.parametrize("typed", ["п", "γ", "ל"])
def test_on_layouts_of_other_letters_a_key_counts_by_its_place(page, typed):
    ask(page)
    key(page, "#question", typed, code="KeyG")
    assert page.locator(".actions .good").get_attribute("aria-pressed") == "true"
    key(page, "#question", typed, code="KeyZ", ctrlKey=True)
    assert page.locator(".actions .good").get_attribute("aria-pressed") == "false"
    key(page, "#question", "é", code="Digit2")
    arrived(page, QUESTION)


def test_what_is_wrong_with_a_field_is_its_description(page):
    ask(page)
    press(page, "t")
    form = page.locator(".correction")
    described = """() => document.activeElement.getAttribute('aria-describedby').split(' ')
        .map((id) => document.getElementById(id).textContent.trim()).join(' ')"""
    for label, text, problem in (
        ("Fragment 3", "An <escape>.", "Fragment 3 holds the control token <escape>."),
        ("Target 2", "No name", "Target 2 is not lower case words joined by _."),
        ("Follow-up 3", "", "Follow-up 3 is empty."),
    ):
        field = form.get_by_label(label, exact=True)
        before = field.input_value()
        field.fill(text)
        press(page, "Control+Enter")
        assert page.evaluate("document.activeElement.ariaLabel") == label and page.evaluate(described) == problem
        field.fill(before)
    form.get_by_label("Remove fragment 1").click()
    ids = form.locator("input").evaluate_all("(all) => all.map((each) => each.getAttribute('aria-describedby'))")
    assert all(page.locator(f".correction p#{each}").count() == 1 for each in ids)
    assert len(set(ids[:3])) == 3


def test_the_focus_goes_on_where_its_place_vanishes(browser, serve):
    with a_page(browser, serve(pause=0.1)) as page:
        ask(page)
        press(page, "?")  # while follow-ups are fetched, which draws the column anew
        page.locator(".choice .state", has_text="ready").nth(2).wait_for()
        press(page, "Escape")
        assert page.evaluate(FOCUS) == "question"
        press(page, "t")
        page.get_by_label("Remove fragment 2").focus()
        press(page, "Enter")
        assert page.evaluate("document.activeElement.ariaLabel") == "Fragment 2"
        page.get_by_label("Remove fragment 3").focus()
        press(page, "Enter")
        assert page.evaluate("document.activeElement.ariaLabel") == "Fragment 2"
        press(page, "Escape", "e")
        page.locator(".composer button", has_text="Cancel").focus()
        press(page, "Enter")
        assert page.evaluate(FOCUS) == "own-question"
        press(page, "Escape", "Delete")
        page.get_by_label("Close this notice").focus()
        press(page, "Enter")
        assert page.evaluate(FOCUS) == "question"


def test_the_pencil_of_a_follow_up_keeps_the_focus_while_others_are_fetched(browser, serve):
    with a_page(browser, serve(pause=0.1)) as page:
        ask(page)
        page.locator(".choice-edit").nth(2).focus()
        page.locator(".choice .state", has_text="ready").nth(2).wait_for()
        assert page.evaluate("document.activeElement.title") == "Edit before asking"


def test_a_focus_that_goes_behind_a_panel_closes_it(browser, server):
    with a_page(browser, server, **PHONE) as page:
        ask(page)
        page.locator("#open-shelf").tap()
        page.locator("#shelf li button").wait_for()  # the click comes after the tap
        page.locator("#shelf li button").focus()
        press(page, "Tab")
        page.locator("#shelf").wait_for(state="hidden")
        page.locator("#open-map").tap()
        page.locator("#map-panel").wait_for()
        press(page, "o")
        page.locator("#map-panel").wait_for(state="hidden")
        assert page.evaluate(FOCUS) == "own-question"


def test_the_map_of_a_wide_window_does_not_cover_it_when_it_gets_narrow(page):
    ask(page)
    press(page, "m")
    page.set_viewport_size({"width": 375, "height": 740})
    eventually(lambda: page.locator("#map-panel").is_visible(), False)


def test_escape_leaves_the_line_and_stops_no_answer_of_another_conversation(page, server):
    server.let(1)
    page.fill("#own-question", QUESTION)
    press(page, "Enter")
    page.locator(".fragment").first.wait_for()
    press(page, "n", "Escape")
    assert page.evaluate(FOCUS) == "question"
    page.locator("#shelf li button").click()
    page.locator(".fragment").first.wait_for()
    server.let()
    arrived(page, QUESTION)
    assert len(fragments(page)) == 4


def test_a_notice_that_stays_is_not_pushed_out_and_passing_ones_are(page):
    page.evaluate(
        """async () => { const { notify } = await import('/static/notices.js');
        notify('An error.', {kind: 'error'});
        for (let i = 1; i < 6; i++) notify(`Passing ${i}.`);
        notify('Once.', {topic: 'a'}); notify('Twice.', {topic: 'b'}); notify('Thrice.', {topic: 'a'}); }"""
    )
    assert page.locator(".notice p").all_inner_texts() == ["An error.", "Twice.", "Thrice."]


def test_search_finds_a_conversation_by_its_title(page):
    ask(page)
    page.click("#open-menu")
    page.get_by_text("Rename the conversation").click()
    page.fill("#dialog-text", "Zebra")
    press(page, "Enter", "n", "Escape", "/")
    page.keyboard.type("zebra")
    page.locator(".hit", has_text="Zebra").wait_for()
    press(page, "Enter")
    arrived(page, QUESTION)


def test_a_dialog_stays_when_a_text_in_it_is_selected_beyond_its_edge(page):
    ask(page)
    page.click("#open-menu")
    page.get_by_text("Rename the conversation").click()
    box = page.locator("#dialog-text").bounding_box()
    page.mouse.click(box["x"] + 90, box["y"] + box["height"] / 2)  # else the selected text would be dragged
    page.mouse.move(box["x"] + 40, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert page.locator("dialog").count() == 1
    page.mouse.click(2, 400)
    assert page.locator("dialog").count() == 0


def test_who_scrolled_up_to_read_stays_there_while_an_answer_arrives(browser, server):
    with a_page(browser, server, viewport={"width": 700, "height": 300}) as page:
        server.let(8)
        ask(page)
        eventually(lambda: len(server.asked()), 2)  # the first follow-up is fetched ahead, and nothing of it arrives
        page.keyboard.press("1")
        eventually(lambda: server.asked()[1]["ended"], "given up")
        server.let(2)
        page.locator(".turn.now .fragment").nth(1).wait_for()
        page.evaluate("addEventListener('wheel', () => { window.turned = true; }, {passive: true})")
        page.mouse.move(200, 120)
        page.mouse.wheel(0, -5000)
        eventually(lambda: page.evaluate("window.turned"), True)
        server.let()
        arrived(page, FIRST)
        assert page.locator("#reading").evaluate("(place) => place.scrollTop") < 5
