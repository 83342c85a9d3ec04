"""The page from the real server: behind its guard, with its headers, its login and its conversation files."""

import json

import pytest
from page_browser import PATIENCE, arrived, eventually, press
from served import serving

from conversation.answering.guard import Access
from conversation.answering.server import WEB

KEY = "a-key-that-nobody-guesses"
QUESTION = "What's a monad?"


@pytest.fixture
def locked(tmp_path):
    with serving(tmp_path, access=Access(key=KEY), web=WEB) as found:
        yield found


def test_a_reader_types_the_key_asks_and_saves_a_tree(browser, locked):
    """Nothing stands between the browser and the server here: whatever header one sends, the other has to take."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.goto(locked.url)
    page.get_by_label("API key").fill(KEY)
    press(page, "Enter")
    page.locator(".start").wait_for()
    page.fill("#own-question", QUESTION)
    press(page, "Enter")
    arrived(page, QUESTION)
    press(page, "1")
    arrived(page, "Example?")
    press(page, "k")
    for number in range(4):  # more questions than a tree has places: one stays out
        press(page, "o")
        page.keyboard.type(f"Question {number}?")
        press(page, "Enter")
        arrived(page, f"Question {number}?")
        press(page, "k")
        arrived(page, QUESTION)
    press(page, "s")
    page.locator("dialog").get_by_text("Go on").click()
    page.locator(".notice", has_text="Saved as").wait_for()
    tree = json.loads(next((locked.folder / "own_trees").rglob("*.json")).read_text())
    assert next(iter(tree["nodes"].values()))["choices"][0]["text"] == "Example?"
    assert "Question 3?" not in str(tree)
    documents = list((locked.folder / "conversations").glob("*.json"))
    eventually(lambda: len(json.loads(documents[0].read_text())["nodes"]), 6)
    page.close()
    assert [fault for fault in faults if "401" not in fault] == []  # the login page's own status
