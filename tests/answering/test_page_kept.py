"""Nothing is lost: reload, a server that dies and comes back, two tabs, two browsers."""

import pytest
from page_browser import (
    FIRST,
    PROTECTION,
    QUESTION,
    ROOT,
    SECOND,
    STOLEN,
    a_page,
    arrived,
    ask,
    eventually,
    fragments,
    grow,
    node,
    nodes,
    press,
    tree,
)

GROWN = [QUESTION, FIRST, SECOND, PROTECTION, STOLEN]


def correct(page, text):
    press(page, "t")
    page.locator(".correction input").first.fill(text)
    press(page, "Control+Enter")
    page.locator(".turn.now .badges", has_text="corrected").wait_for()


def test_a_reload_comes_back_to_the_same_place(page):
    grow(page)
    press(page, "k", "g")
    page.reload()
    arrived(page, SECOND)
    assert nodes(page) == GROWN
    assert page.locator(".actions .good").get_attribute("aria-pressed") == "true"
    press(page, "2")
    arrived(page, STOLEN)


def test_a_reload_during_an_answer_keeps_what_came(page, server):
    server.let(2)
    page.fill("#own-question", QUESTION)
    press(page, "Enter")
    page.locator(".fragment").nth(1).wait_for()
    page.reload()
    page.locator(".unfinished", has_text="This answer is not whole").wait_for()
    assert fragments(page) == [
        "By BGP, among tens of thousands of networks.",
        "Neighbours announce prefixes they reach.",
    ]
    server.let()
    press(page, "r")
    arrived(page, QUESTION)
    assert len(nodes(page)) == 1


def test_without_a_server_one_goes_on_reading_and_it_gets_everything_when_it_is_back(page, server):
    grow(page)
    server.document(lambda found: len(found["nodes"]) == 5)
    server.kill()
    press(page, "k", "g")
    correct(page, "Corrected without a server.")
    page.locator(".status .light.away").wait_for()
    press(page, "o")
    page.keyboard.type("Who is there?")
    press(page, "Enter")
    page.locator(".unfinished", has_text="The server does not answer. What you do is kept in this browser.").wait_for()
    page.locator("#shelf", has_text="changes kept here").wait_for()
    page.click("#open-menu")
    press(page, "Escape", "n")
    page.fill("#own-question", "A whole new one?")
    press(page, "Enter")
    page.locator(".unfinished").wait_for()
    assert len(server.documents()) == 1
    server.start()
    eventually(lambda: len(server.documents()), 2)
    page.locator(".status .light:not(.away)").wait_for()

    def came(words):
        return words in str([document for document in server.documents() if document["title"] == QUESTION])

    eventually(lambda: came("Corrected without a server.") and came("Who is there?"), True)
    press(page, "r")
    arrived(page, "A whole new one?")


def test_a_page_that_was_closed_without_a_server_sends_what_it_kept_when_it_is_opened_again(browser, server):
    context = browser.new_context()
    with a_page(browser, server, context) as page:
        ask(page)
        server.document()
        server.kill()
        correct(page, "Corrected without a server.")
        page.locator("#shelf", has_text="changes kept here").wait_for()
        page.close()
    server.start()
    with a_page(browser, server, context):
        server.document(lambda found: "Corrected without a server." in str(found))
    context.close()


def test_a_conversation_deleted_without_a_server_is_deleted_there_later(page, server):
    ask(page)
    server.document()
    server.kill()
    press(page, "Delete")
    page.locator(".start").wait_for()
    server.start()
    eventually(server.documents, [])
    assert page.locator("#shelf li").count() == 0


def test_two_tabs_of_a_browser_see_each_others_changes_and_keep_their_places(browser, server):
    context = browser.new_context(reduced_motion="reduce")
    with a_page(browser, server, context) as one:
        grow(one)
        server.document(lambda found: len(found["nodes"]) == 5)
        with a_page(browser, server, context, path=one.url.split("/", 3)[3]) as two:
            arrived(two, STOLEN)
            press(two, "k", "k", "1")
            arrived(two, FIRST)
            press(two, "1")
            arrived(two, "Why the nearest exit?")
            one.locator("[role=treeitem]", has_text="Why the nearest exit?").wait_for()
            assert one.inner_text("#question") == STOLEN
            press(one, "g")
            correct(two, "Corrected in the second tab.")
            document = server.document(lambda found: "second tab" in str(found) and "good" in str(found))
            assert len(document["nodes"]) == 6
            press(two, "k", "k", "Delete")
            one.locator(".start").wait_for()
            assert one.get_by_text("This conversation was deleted in another tab.").first.is_visible()
    context.close()


def test_two_tabs_without_a_server_lose_nothing(browser, server):
    context = browser.new_context(reduced_motion="reduce")
    with a_page(browser, server, context) as one, a_page(browser, server, context) as two:
        ask(one)
        two.locator("#shelf li button").click()
        arrived(two, QUESTION)
        server.document(lambda found: "'whole'" in str(found))  # killed before it has answered, it would refuse later
        server.kill()
        two.evaluate("BroadcastChannel.prototype.postMessage = () => {}")  # the other tab hears nothing
        correct(two, "Corrected in the second tab.")
        press(one, "g")
        eventually(lambda: fragments(one)[0], "Corrected in the second tab.")
        one.close()
        server.start()
        two.reload()
        arrived(two, QUESTION)
        assert fragments(two)[0] == "Corrected in the second tab."
        assert two.locator(".actions .good").get_attribute("aria-pressed") == "true"
    context.close()


def test_two_browsers_that_changed_one_conversation_keep_both_changes(browser, server):
    with a_page(browser, server, expected=("409",)) as one, a_page(browser, server, expected=("409",)) as two:
        grow(one)
        server.document(lambda found: len(found["nodes"]) == 5)
        two.reload()
        two.locator("#shelf li button").click()
        arrived(two, STOLEN)
        correct(one, "Corrected in the first browser.")
        server.document(lambda found: "first browser" in str(found))
        press(two, "k", "k", "3")
        two.locator(
            ".notice", has_text="This conversation was changed elsewhere, too. Both changes are kept."
        ).wait_for()  # it comes last, and passes
        arrived(two, "Can a big site vanish altogether?")
        document = server.document(lambda found: len(found["nodes"]) == 6)
        assert "Corrected in the first browser." in str(document)
        assert len(nodes(two)) == 6


def test_one_answer_that_two_browsers_changed_stands_twice(browser, server):
    with a_page(browser, server, expected=("409",)) as one, a_page(browser, server, expected=("409",)) as two:
        grow(one)
        server.document(lambda found: len(found["nodes"]) == 5)
        two.reload()
        two.locator("#shelf li button").click()
        arrived(two, STOLEN)
        correct(one, "Corrected in the first browser.")
        server.document(lambda found: "first browser" in str(found))
        correct(two, "Corrected in the second browser.")
        two.locator(
            ".notice", has_text="One answer was changed in both places: it stands twice, side by side."
        ).wait_for()
        document = server.document(lambda found: len(found["nodes"]) == 6)
        twins = [node for node in document["nodes"].values() if node["question"] == STOLEN]
        assert {node["fragments"][0] for node in twins} == {
            "Corrected in the first browser.",
            "Corrected in the second browser.",
        }
        assert twins[0]["parent"] == twins[1]["parent"]


# --- the merge itself ------------------------------------------------------------------------------------------------


@pytest.fixture
def merge(modules):
    """The page's merge as a function of (base, ours, theirs)."""
    code = "return (await import('/static/merge.js')).merge(...given)"
    return lambda *documents: modules(code, list(documents))


def test_a_merge_keeps_what_either_side_added_and_drops_what_one_side_deleted(merge):
    base = tree(ROOT, node("a"), node("b"))
    met = merge(base, tree(ROOT, node("a"), node("ours")), tree(ROOT, node("b"), node("theirs")))
    assert set(met["doc"]["nodes"]) == {"root", "ours", "theirs"} and met["copies"] == [] and met["both"]


def test_a_merge_keeps_a_deleted_branch_below_which_the_other_side_asked(merge):
    base = tree(ROOT, node("a"), node("b", "a"))
    met = merge(base, tree(ROOT), tree(*base["nodes"].values(), node("c", "b")))
    assert set(met["doc"]["nodes"]) == {"root", "a", "b", "c"}


def test_a_merge_takes_each_change_of_a_node_and_both_when_they_collide(merge):
    base = tree(ROOT, node("a"))
    met = merge(base, tree(ROOT, node("a", mark="good")), tree(ROOT, node("a", text="new", picked=[0, 2, 0])))
    assert met["doc"]["nodes"]["a"] == node("a", text="new", mark="good", picked=[0, 2, 0]) and met["copies"] == []
    met = merge(base, tree(ROOT, node("a", picked=[1, 1, 0])), tree(ROOT, node("a", picked=[0, 2, 0])))
    assert met["doc"]["nodes"]["a"]["picked"] == [1, 3, 0]
    both = [tree(ROOT, node("a", picked=[0, 1, 0])) for _ in range(2)]  # the server has it; its answer was lost
    assert merge(base, *both)["doc"]["nodes"]["a"]["picked"] == [0, 1, 0]
    without = tree(ROOT, {key: value for key, value in node("a").items() if key != "picked"})
    assert merge(without, tree(ROOT, node("a", picked=[0, 1, 0])), without)["doc"]["nodes"]["a"]["picked"] == [0, 1, 0]
    met = merge(base, tree(ROOT, node("a", text="ours")), tree(ROOT, node("a", text="theirs")))
    copy = met["doc"]["nodes"][met["copies"][0]]
    assert met["doc"]["nodes"]["a"]["fragments"] == ["theirs"] and copy["fragments"] == ["ours"]
    met = merge(base, tree(node("root", None, "ours")), tree(node("root", None, "theirs")))
    assert met["doc"]["nodes"][met["copies"][0]]["parent"] == "root", "a tree has one root"


def test_a_merge_takes_the_whole_answer_over_its_draft(merge):
    draft = node("a", state="draft")
    whole = node("a", fragments=["text", "more"])
    for ours, theirs in ((draft, whole), (whole, draft)):
        met = merge(tree(ROOT), tree(ROOT, ours), tree(ROOT, theirs))
        assert met["doc"]["nodes"]["a"] == whole and met["copies"] == []


def test_any_merge_is_one_tree_and_loses_no_words(merge):
    from random import Random

    random = Random(17)

    def changed(document):
        nodes = dict(document["nodes"])
        for _ in range(random.randrange(5)):
            name = random.choice(list(nodes))
            what = random.random()
            if what < 0.4:
                new = f"n{random.randrange(10**9)}"
                nodes[new] = node(new, name)
            elif what < 0.6:
                nodes[name] = {**nodes[name], "fragments": [f"text {random.randrange(10**9)}"]}
            elif what < 0.7:
                nodes[name] = {**nodes[name], "mark": random.choice(["good", "bad"]), "question": f"{what}?"}
            elif name != "root":
                gone = {name}
                while below := {each for each in nodes if nodes[each]["parent"] in gone} - gone:
                    gone |= below
                nodes = {each: nodes[each] for each in nodes if each not in gone}
        return {**document, "nodes": nodes, "current": random.choice(list(nodes))}

    for _ in range(300):
        base = changed(changed(tree(ROOT)))
        ours, theirs = changed(base), changed(base)
        if random.random() < 0.2:  # below a parent that is nowhere
            text = base["nodes"]["root"]["fragments"][0]
            ours["nodes"] |= {"o": node("o", "nowhere", text), "p": node("p", "o", text)}
        met = merge(random.choice([base, base, None]), ours, theirs)["doc"]
        assert [each["id"] for each in met["nodes"].values() if each["parent"] is None] == ["root"]
        assert all(each["parent"] in met["nodes"] for each in met["nodes"].values() if each["parent"])
        assert met["current"] in met["nodes"]
        words = {each["fragments"][0] for each in met["nodes"].values()}
        for side in (ours, theirs):
            new = {each["fragments"][0] for each in side["nodes"].values()} - {
                each["fragments"][0] for each in base["nodes"].values()
            }
            assert new <= words
