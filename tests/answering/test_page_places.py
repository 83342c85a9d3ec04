"""Where one is and what one types there: addresses, questions in other words, corrections that were begun."""

from page_browser import (
    FIRST,
    QUESTION,
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

# --- places and addresses --------------------------------------------------------------------------------------------


def test_the_link_to_the_question_goes_to_it(page):
    ask(page)
    address = page.url
    page.locator(".skip").focus()
    press(page, "Enter")
    eventually(lambda: page.evaluate("document.activeElement.id"), "question")
    assert page.inner_text("#question") == QUESTION and page.url == address
    page.evaluate("location.hash = 'reading'")  # any other place on the page
    page.wait_for_timeout(200)
    assert page.inner_text("#question") == QUESTION


def test_an_address_that_only_the_server_knows_is_opened(browser, server):
    with a_page(browser, server) as one:
        grow(one)
        server.document(lambda found: len(found["nodes"]) == 5)
        path = one.url.split("/", 3)[3]
    with a_page(browser, server, path=path) as two:
        arrived(two, STOLEN)
        assert len(nodes(two)) == 5 and two.url.endswith(path)


def test_an_address_that_nobody_knows_is_said(browser, server):
    path = "#01234567-89ab-4cde-8f01-23456789abcd/x"
    with a_page(browser, server, path=path, expected=("404",)) as page:
        page.locator(".notice", has_text="There is no conversation of this address").wait_for()
        page.wait_for_url(server.url)  # it is looked for in the browser once more
        assert page.locator(".start").count() == 1


def test_the_way_back_from_a_new_conversation_leads_to_the_one_before(page):
    ask(page)
    press(page, "n")
    page.locator(".start").wait_for()
    page.go_back()
    arrived(page, QUESTION)
    press(page, "e")  # the first question in other words is a conversation of its own
    page.keyboard.type("Another one?")
    press(page, "Enter")
    arrived(page, "Another one?")
    page.go_back()
    arrived(page, QUESTION)


# --- what one types --------------------------------------------------------------------------------------------------


def test_a_question_in_other_words_is_for_its_own_place_alone(page):
    grow(page)
    page.locator("[role=treeitem]").first.click()
    press(page, "e")
    page.keyboard.type("Typed at the root?")
    page.locator("[role=treeitem]", has_text=FIRST).click()
    arrived(page, FIRST)
    assert page.inner_text("label[for=own-question]") == "Or ask your own"
    assert page.input_value("#own-question") == "Typed at the root?"
    page.focus("#own-question")
    press(page, "Enter")
    arrived(page, "Typed at the root?")
    assert nodes(page)[:3] == [QUESTION, FIRST, "Typed at the root?"], "it is asked where one is"


def test_a_question_in_other_words_outlives_its_conversation(page):
    ask(page)
    press(page, "e")
    page.keyboard.type("Something else?")
    page.click("#open-menu")
    page.get_by_text("Delete the conversation").click()
    page.locator(".start").wait_for()
    page.focus("#own-question")
    press(page, "Enter")
    arrived(page, "Something else?")


def test_a_correction_that_was_begun_is_there_again_when_one_comes_back(page):
    grow(page)
    press(page, "t")
    field = page.locator(".correction input").first
    field.fill("Half written")
    page.locator("[role=treeitem]", has_text=FIRST).click()
    arrived(page, FIRST)
    page.locator("[role=treeitem]", has_text=STOLEN).click()
    assert field.input_value() == "Half written"
    page.get_by_text("Add a fragment").focus()
    press(page, "t", "g", "Delete")  # no keys of the page while the focus is in the form
    assert field.input_value() == "Half written" and len(nodes(page)) == 5
    page.locator(".correction").get_by_text("Save").click()
    assert fragments(page)[0] == "Half written"


def test_a_correction_of_an_answer_that_another_tab_corrected_meanwhile_stands_beside_it(browser, server):
    context = browser.new_context(reduced_motion="reduce")
    with a_page(browser, server, context) as one:
        grow(one)
        server.document(lambda found: len(found["nodes"]) == 5)
        with a_page(browser, server, context, path=one.url.split("/", 3)[3]) as two:
            arrived(two, STOLEN)
            press(two, "t")
            two.locator(".correction input").first.fill("Of the second tab.")
            press(one, "t")
            one.locator(".correction input").first.fill("Of the first tab.")
            press(one, "Control+Enter")
            press(one, "f")
            two.locator(f"[aria-label='{STOLEN}, path marked']").wait_for()  # it knows of all that the first tab did
            server.document(lambda found: "Of the first tab." in str(found))
            press(two, "Control+Enter")
            two.locator(".notice", has_text="Both stay: yours stands beside it.").wait_for()
            assert fragments(two)[0] == "Of the second tab."
            found = server.document(lambda found: "Of the second tab." in str(found))
            twins = [each for each in found["nodes"].values() if each["question"] == STOLEN]
            assert [each["fragments"][0] for each in twins] == ["Of the first tab.", "Of the second tab."]
            assert twins[0]["parent"] == twins[1]["parent"] and twins[1]["from_choice"] == 1
    context.close()


def test_a_long_text_with_line_breaks_is_pasted_no_longer_than_one_can_type(page):
    page.evaluate(
        """() => { const data = new DataTransfer(); data.setData('text', 'two\\n' + 'x'.repeat(5000));
        document.getElementById('own-question').dispatchEvent(
            new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})); }"""
    )
    assert len(page.input_value("#own-question")) == 500
