"""The page for everybody: by keyboard alone, for screen readers, on a phone, in dark and light."""

import pytest
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

PHONE = {"viewport": {"width": 375, "height": 740}, "has_touch": True, "is_mobile": True}


def violations(page):
    """What axe finds, as (rule, the first places)."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe checks accessibility").Axe()
    found = axe.run(page).response["violations"]
    return [
        (each["id"], [node["target"] for node in each["nodes"]][:5], each["nodes"][0]["failureSummary"])
        for each in found
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [{}, PHONE], ids=["desktop", "phone"])
def test_axe_finds_no_violation_anywhere(browser, serve, scheme, device):
    server = serve()
    with a_page(browser, server, color_scheme=scheme, **device) as page:
        assert violations(page) == [], "start"
        grow(page)
        press(page, "g", "f")
        page.locator(".choice .state", has_text="ready").nth(2).wait_for(state="attached")
        assert violations(page) == [], "a tree"
        press(page, "t")
        page.fill("[aria-label='Target 2']", "No name")
        press(page, "Control+Enter")
        page.locator(".problem:visible").wait_for()
        assert violations(page) == [], "a correction with a problem"
        press(page, "Escape", "?")
        page.locator("dialog").wait_for()
        assert violations(page) == [], "the keys"
        press(page, "Escape", "/")
        page.keyboard.type("route")
        page.locator(".hit").first.wait_for()
        assert violations(page) == [], "search"
        press(page, "Escape")
        page.click("#open-menu")
        page.locator("#menu").wait_for()
        assert violations(page) == [], "the menu"
        press(page, "Escape", "k", "Delete")
        page.locator(".notice").wait_for()
        assert violations(page) == [], "a notice"
        server.kill()
        press(page, "o")
        page.keyboard.type("Who is there?")
        press(page, "Enter")
        page.locator(".unfinished").wait_for()
        assert violations(page) == [], "no server"
        if device:
            press(page, "m")
            assert violations(page) == [], "the map as a panel"


def test_fifty_steps_by_keyboard_alone(page, server):
    """A reader without a pointer: every step is a key or a typed text, and the focus is never lost."""
    steps = []

    def step(*keys, reads=None, typed=None):
        if typed:
            page.keyboard.type(typed)
        press(page, *keys)
        if reads:
            arrived(page, reads)
        steps.append(keys)
        assert page.evaluate("document.activeElement !== document.body"), (
            f"the focus is lost after step {len(steps)}: {keys}"
        )

    step("Enter", typed=QUESTION, reads=QUESTION)
    step("1", reads=FIRST)
    step("1", reads="Why the nearest exit?")
    step("k", reads=FIRST)
    step("Shift+ArrowUp", reads=QUESTION)
    step("2", reads=SECOND)
    step("1", reads=PROTECTION)
    step("g")
    step("k", reads=SECOND)
    step("2", reads=STOLEN)
    step("h", reads=PROTECTION)
    step("l", reads=STOLEN)
    step("f")
    step("b")
    step("b")
    step("o")
    step("Enter", typed="Was it found out?", reads="Was it found out?")
    step("r")
    page.locator(".siblings", has_text="2 of 2").wait_for()
    arrived(page, "Was it found out?")
    step("t")
    step("Control+Enter", typed="Corrected by keyboard.")
    assert "Corrected by keyboard." in fragments(page)[0]
    step("z")
    step("Delete")
    step("z")
    step("e")
    step("Enter", typed="Who found it out?", reads="Who found it out?")
    step("/")
    step("Enter", typed="pakistan", reads=SECOND)
    step("m")
    step("Home", reads=QUESTION)
    step("ArrowRight", reads=FIRST)
    step("ArrowDown", reads="Why the nearest exit?")
    step("End", reads="Who found it out?")
    step("ArrowLeft", reads=STOLEN)
    step("Enter", reads=STOLEN)
    step("?")
    step("Escape")
    step("Tab")
    step("n")
    step("Enter", typed="What's a mutex?", reads="What's a mutex?")
    step("2", reads="What if a thread forgets to unlock?")
    step("k", reads="What's a mutex?")
    step("s")
    page.locator(".notice", has_text="Saved as").wait_for()
    step("c")
    step("ArrowDown")
    step("Tab")
    step("Enter", reads=STOLEN)
    step("Shift+ArrowUp", reads=SECOND)
    step("Shift+ArrowUp", reads=QUESTION)
    step("3", reads="Can a big site vanish altogether?")
    step("g")
    step("k", reads=QUESTION)
    assert len(steps) >= 50
    eventually(lambda: sorted(len(document["nodes"]) for document in server.documents()), [2, 10])


def test_single_keys_can_be_switched_off_and_do_nothing_while_one_types(page):
    ask(page)
    press(page, "o")
    page.keyboard.type("1 g b?")
    assert page.input_value("#own-question") == "1 g b?" and len(nodes(page)) == 1
    page.fill("#own-question", "")
    press(page, "Escape")
    page.click("#open-menu")
    page.get_by_label("Keys of one character").uncheck()
    press(page, "Escape", "1", "g", "Delete")
    page.locator(".start").wait_for()  # Delete is no character
    press(page, "Control+z")
    arrived(page, QUESTION)
    assert nodes(page) == [QUESTION] and page.locator(".actions .good").get_attribute("aria-pressed") == "false"


def test_on_a_phone_nothing_is_wider_than_the_screen_and_map_and_shelf_are_panels(browser, server):
    with a_page(browser, server, reduced_motion="no-preference", **PHONE) as page:

        def fits():
            assert page.evaluate("document.documentElement.scrollWidth") <= 375
            wide = "(all) => all.filter((e) => e.getBoundingClientRect().right > 376).map((e) => e.outerHTML)"
            assert page.locator("main :visible").evaluate_all(wide) == []

        fits()
        page.locator(".pill", has_text="What's a deadlock?").tap()
        arrived(page, "What's a deadlock?")
        fits()
        picked = page.locator(".choice .text").nth(1).inner_text()
        page.locator(".choice").nth(1).tap()
        arrived(page, picked)
        fits()
        page.locator(".actions .correct").tap()
        page.locator(".correction").wait_for()
        fits()
        page.locator(".correction").get_by_text("Cancel").tap()
        assert not page.locator("[role=tree]").is_visible()
        page.locator("#open-map").tap()
        page.locator("[role=tree]").wait_for()  # the click comes after the tap
        assert page.evaluate("document.activeElement.ariaLabel") == "Close the map", "the focus is in the panel"
        page.locator("#open-shelf").tap()
        page.locator("[role=tree]").wait_for(state="hidden")
        page.locator("#shelf").wait_for()
        press(page, "Escape")
        page.locator("#shelf").wait_for(state="hidden")
        page.locator("#open-map").tap()
        page.locator("[role=treeitem]", has_text="What's a deadlock?").tap()
        arrived(page, "What's a deadlock?")
        page.locator("#map-panel").wait_for(state="hidden")
        page.locator("#open-shelf").tap()
        page.locator("#shelf button", has_text="New").tap()
        page.locator(".start").wait_for()
        small = "(all) => all.filter((e) => e.getBoundingClientRect().height < 24).map((e) => e.outerHTML)"
        assert page.locator("button:visible").evaluate_all(small) == [], "what one taps is at least 24 pixels high"


def test_the_theme_follows_the_system_and_can_be_chosen(browser, server):
    with a_page(browser, server, color_scheme="dark") as page:
        ground = "getComputedStyle(document.documentElement).backgroundColor"
        dark = page.evaluate(ground)
        page.click("#open-menu")
        page.get_by_label("Light").check()
        light = page.evaluate(ground)
        assert dark != light
        page.reload()
        page.locator(".start").wait_for()
        assert page.evaluate(ground) == light
        page.emulate_media(color_scheme="light")
        page.click("#open-menu")
        page.get_by_label("Dark").check()
        assert page.evaluate(ground) == dark


def test_nothing_moves_for_who_asked_for_it(browser, server):
    moving = "document.getAnimations().length"
    with a_page(browser, server, reduced_motion="reduce") as page:
        page.evaluate(
            "window.most = 0; setInterval(() => { most = Math.max(most, document.getAnimations().length) }, 5)"
        )
        ask(page)
        assert page.evaluate("most") == 0 and page.evaluate(moving) == 0
