"""What is fetched ahead: the answers to likely follow-ups, which of them are taken, and which are given up."""

import re
import time

from page_browser import (
    FIRST,
    QUESTION,
    SECOND,
    THIRD,
    a_page,
    arrived,
    ask,
    counting_parts,
    eventually,
    fragments,
    press,
)


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
        shown = page.evaluate(
            """() => { document.querySelector('.choice').click();
            return [document.getElementById('question').innerText,
                ...['.turn', '.turn.now .choice'].map((what) => document.querySelectorAll(what).length)]; }"""
        )
        assert shown == [FIRST, 2, 3], "the whole answer is there before the click is over"
        gain = page.inner_text(".status .gain")
        assert re.fullmatch(
            r"Fetched ahead: 1, there after \d+ ms instead of \d+\.\d s \(median\); \d+(\.\d)? m?s not waited",
            gain,
        ), gain


def ended(server, question):
    """How each answer to a question has ended; None: it has not."""
    return [entry["ended"] for entry in server.asked() if entry["question"] == question]


def ask_and_hold_what_is_fetched_ahead(page, server):
    server.let(8)  # the whole first answer, with its end
    ask(page)
    eventually(lambda: ended(server, FIRST), [None])
    eventually(lambda: page.locator(".choice .state").first.inner_text(), "fetching")


def test_prefetching_is_given_up_when_the_reader_goes_elsewhere_and_a_running_one_is_taken_over(page, server):
    ask_and_hold_what_is_fetched_ahead(page, server)
    press(page, "o")
    page.keyboard.type("Something else?")
    press(page, "Enter")
    eventually(lambda: ended(server, FIRST), ["given up"])
    server.let(6)  # and now the whole of this one
    arrived(page, "Something else?")
    eventually(lambda: ended(server, "Something else?"), ["whole"])
    assert ended(server, FIRST) == ["given up"] and ended(server, SECOND) == []
    fetching = "Example of else?"
    eventually(lambda: ended(server, fetching), [None])
    eventually(lambda: page.locator(".choice .state").first.inner_text(), "fetching")
    have_come = counting_parts(page)
    server.let(1)
    have_come(1)
    press(page, "1")
    server.let(5)  # the rest; what is fetched ahead then has the same words, further down, and is held
    arrived(page, fetching)
    eventually(lambda: ended(server, fetching), ["whole", None])  # it was not asked a second time
    lines = [len(entry["history"]) for entry in server.asked() if entry["question"] == fetching]
    assert lines[0] < lines[1]
    eventually(lambda: page.locator(".choice .state").first.inner_text(), "fetching")
    press(page, "k")
    eventually(lambda: ended(server, fetching), ["whole", "given up"])


def test_a_click_counts_though_follow_ups_are_fetched_while_the_button_is_down(page, server):
    ask_and_hold_what_is_fetched_ahead(page, server)
    page.locator(".choice").nth(1).hover()
    page.mouse.down()
    server.let()
    eventually(lambda: page.locator(".choice .state").all_inner_texts(), ["ready"] * 3)
    page.mouse.up()
    arrived(page, SECOND)


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


def test_what_is_fetched_ahead_again_after_a_correction_is_taken_when_it_is_picked(page, server):
    ask_and_hold_what_is_fetched_ahead(page, server)
    press(page, "t")
    page.locator(".correction input").first.fill("Corrected.")
    press(page, "Control+Enter")
    eventually(lambda: ended(server, FIRST), ["given up", None])
    eventually(lambda: page.locator(".choice .state").first.inner_text(), "fetching")
    have_come = counting_parts(page)
    server.let(1)
    have_come(1)
    press(page, "1")
    server.let()
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
