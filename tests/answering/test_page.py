"""The page: what a reader asks, where they go, what they change. In a real browser, against a scripted server."""

import re

from page_browser import (
    FIRST,
    QUESTION,
    SECOND,
    a_page,
    arrived,
    ask,
    eventually,
    fragments,
    nodes,
    press,
)

# --- asking ----------------------------------------------------------------------------------------------------------


def test_an_answer_arrives_fragment_by_fragment_and_then_its_follow_ups(browser, serve):
    with a_page(browser, serve(pause=0.3)) as page:
        page.evaluate(
            """() => { window.counts = []; new MutationObserver(() => counts.push([
                document.querySelectorAll('.turn.now .fragment').length, document.querySelectorAll('.choice').length,
            ])).observe(document.getElementById('reading'), {childList: true, subtree: true}); }"""
        )
        ask(page)
        counts = page.evaluate("counts")
        assert [[n, 0] in counts for n in range(1, 5)] == [True] * 4
        assert [4, 1] in counts and [4, 3] in counts
        assert fragments(page)[0] == "By BGP, among tens of thousands of networks."
        choice = page.locator(".choice").first
        assert re.sub(r"\s+", " ", choice.inner_text()) in (
            "1 Which of several routes wins? 38 %",
            "1 Which of several routes wins? fetching 38 %",
            "1 Which of several routes wins? ready 38 %",
        )
        assert (
            page.locator(".choice .meter").first.evaluate("(bar) => getComputedStyle(bar).getPropertyValue('--share')")
            == "0.38"
        )
        spoken = page.locator("#live p").all_inner_texts()
        assert spoken[:4] == fragments(page)
        assert spoken[4].startswith("Follow-ups. 1: Which of several routes wins? 38 percent.")


def test_follow_ups_are_picked_by_key_and_by_click_and_own_questions_typed(page, server):
    ask(page)
    press(page, "2")
    arrived(page, SECOND)
    page.locator(".choice").first.click()
    arrived(page, "Is there no protection?")
    press(page, "o")
    page.keyboard.type("What of satellites?")
    press(page, "Enter")
    arrived(page, "What of satellites?")
    assert page.locator(".turn").count() == 4
    last = next(entry for entry in server.asked() if entry["question"] == "What of satellites?")
    assert [line["text"] for line in last["history"] if line["speaker"] == "User"] == [
        QUESTION,
        SECOND,
        "Is there no protection?",
    ]
    assert sum(line["speaker"] == "AI" for line in last["history"]) == 4 + 3 + 3
    document = server.document(lambda found: [node["state"] for node in found["nodes"].values()] == ["whole"] * 4)
    assert [node["from_choice"] for node in document["nodes"].values()] == [None, 1, 0, None]


def test_a_follow_up_that_was_answered_is_gone_to_and_not_asked_again(page, server):
    ask(page)
    press(page, "1")
    arrived(page, FIRST)
    press(page, "k")
    arrived(page, QUESTION)
    assert "answered" in page.locator(".choice").first.inner_text()

    def asked():
        return [entry["question"] for entry in server.asked()].count(FIRST)

    before = asked()  # twice, if what was fetched ahead had not begun to arrive when it was picked
    press(page, "1")
    arrived(page, FIRST)
    assert nodes(page) == [QUESTION, FIRST]
    assert asked() == before <= 2


def test_an_own_question_with_the_words_of_a_follow_up_follows_it(page, server):
    ask(page)
    press(page, "o")
    page.keyboard.type(FIRST.upper())
    press(page, "Enter")
    arrived(page, FIRST)
    assert [node["from_choice"] for node in server.document(lambda d: len(d["nodes"]) == 2)["nodes"].values()] == [
        None,
        0,
    ]


def test_a_follow_up_is_edited_before_it_is_asked(page, server):
    ask(page)
    page.locator(".choice-edit").nth(1).click()
    assert page.input_value("#own-question") == SECOND
    page.keyboard.type("Can I announce mine?")
    press(page, "Enter")
    arrived(page, "Can I announce mine?")


def test_the_limits_are_shown_while_typing_and_text_stays_on_one_line(page):
    page.fill("#own-question", "x" * 61)
    assert page.inner_text("#counter") == "1 too many for a tree"
    page.fill("#own-question", "😀" * 60)
    assert page.inner_text("#counter") == "60 / 60"
    page.fill("#own-question", "")
    page.evaluate(
        """() => { const data = new DataTransfer(); data.setData('text', 'two\\nlines');
        document.getElementById('own-question').dispatchEvent(
            new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})); }"""
    )
    assert page.input_value("#own-question") == "two lines"
    page.fill("#own-question", "")
    ask(page)
    assert page.inner_text("#counter") == "0 / 40"


def test_stop_keeps_what_came_and_the_draft_can_be_asked_again(page, server):
    server.let(2)
    page.fill("#own-question", QUESTION)
    press(page, "Enter")
    page.locator(".fragment").nth(1).wait_for()
    press(page, "Escape")
    page.locator(".unfinished").wait_for()
    assert len(fragments(page)) == 2
    eventually(lambda: server.asked()[0]["ended"], "given up")
    eventually(
        lambda: [(node["state"], len(node["fragments"])) for node in server.document()["nodes"].values()],
        [("draft", 2)],
    )
    server.let()
    press(page, "r")
    arrived(page, QUESTION)
    assert len(fragments(page)) == 4 and len(nodes(page)) == 1


def test_asking_again_keeps_another_answer_beside_the_first_and_the_same_one_once(page, server):
    ask(page)
    press(page, "1")
    arrived(page, FIRST)
    press(page, "r")
    page.locator(".siblings", has_text="2 of 2").wait_for()
    arrived(page, FIRST)
    assert fragments(page)[3].startswith("Drawn with seed") and nodes(page) == [QUESTION, FIRST, FIRST]
    press(page, "o")
    page.keyboard.type("Always the same?")
    press(page, "Enter")
    arrived(page, "Always the same?")
    press(page, "r")
    page.get_by_text("The model gave the same answer again").first.wait_for()
    assert nodes(page) == [QUESTION, FIRST, FIRST, "Always the same?"]


def test_picks_are_counted_also_without_a_server(page, server):
    ask(page)
    server.document()
    for _ in range(3):
        press(page, "2")
        arrived(page, SECOND)
        press(page, "k")
        arrived(page, QUESTION)

    def counts(wanted):
        return lambda document: next(iter(document["nodes"].values()))["picked"] == wanted

    server.document(counts([0, 3, 0]))
    server.kill()
    press(page, "2")
    arrived(page, SECOND)
    server.start()
    server.document(counts([0, 4, 0]))


def test_a_question_is_edited_and_asked_anew_beside_the_old_one(page):
    ask(page)
    press(page, "1")
    arrived(page, FIRST)
    press(page, "e")
    assert page.input_value("#own-question") == FIRST
    page.keyboard.type("Which route wins?")
    press(page, "Enter")
    arrived(page, "Which route wins?")
    assert nodes(page) == [QUESTION, FIRST, "Which route wins?"]
    assert page.inner_text(".siblings").split() == ["2", "of", "2"]


def test_a_server_that_is_busy_is_asked_again_and_failures_are_said(browser, server):
    with a_page(browser, server, expected=("429", "400")) as page:
        busy_broken_and_failing(page)


def busy_broken_and_failing(page):
    ask(page, "Is it busy now?")
    press(page, "n")
    page.fill("#own-question", "Is it broken?")
    press(page, "Enter")
    page.locator(".unfinished", has_text="The answer broke off. What had come is kept.").wait_for()
    assert len(fragments(page)) == 1
    press(page, "Escape", "n")
    page.fill("#own-question", "Is it failing?")
    press(page, "Enter")
    page.locator(".unfinished", has_text="The engine cannot answer this. Ask another question.").wait_for()
