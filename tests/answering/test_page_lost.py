"""What must not get lost: undo, drafts, storage that fails, a server that went back in time."""

import json

import pytest
from page_browser import (
    FIRST,
    QUESTION,
    ROOT,
    a_page,
    arrived,
    ask,
    eventually,
    fragments,
    kept,
    node,
    nodes,
    press,
    tree,
    until,
)


def begin(page, question=QUESTION):
    """Asks, and does not wait for more than the first fragment."""
    page.fill("#own-question", question)
    press(page, "Enter")
    page.locator(".fragment").first.wait_for()


# --- undo ------------------------------------------------------------------------------------------------------------


def test_undo_takes_back_what_its_step_changed_and_nothing_that_came_since(page, server):
    server.let(1)
    begin(page)
    press(page, "g")
    server.let()
    arrived(page, QUESTION)
    press(page, "z")
    page.locator(".notice", has_text="Undone: the mark.").wait_for()
    assert len(fragments(page)) == 4 and page.locator(".choice").count() == 3
    document = server.document(lambda found: "'whole'" in str(found) and "'good'" not in str(found))
    assert [node["mark"] for node in document["nodes"].values()] == [None]


TREE = "const tree = await import('/static/conversation.js');"


def test_undo_of_a_deletion_whose_parents_were_deleted_meanwhile_makes_no_orphan(modules):
    code = """
    const undo = await import('/static/undo.js');
    const steps = new undo.Undo();
    const without = tree.withoutBranch(given, "b");
    steps.record(given, without, "the deletion");
    return [undo.undone(without, steps.take(without)), undo.undone(tree.withoutBranch(without, "a"),
        (steps.record(given, without, "again"), steps.take(without)))];
    """
    back, orphaned = modules(TREE + code, tree(ROOT, node("a"), node("b", "a"), node("c", "b"), current="b"))
    assert set(back["nodes"]) == {"root", "a", "b", "c"} and back["current"] == "b"
    assert set(orphaned["nodes"]) == {"root"} and orphaned["current"] == "root"


def test_an_orphan_does_not_stop_a_merge(modules):
    base, theirs = tree(ROOT), tree(ROOT, node("theirs"))
    met = modules(
        "return (await import('/static/merge.js')).merge(...given)",
        [base, tree(ROOT, node("a", "gone"), node("b", "a")), theirs],
    )
    assert set(met["doc"]["nodes"]) == {"root", "theirs"}


# --- answers that are asked again ------------------------------------------------------------------------------------


def test_asking_a_draft_again_without_a_server_keeps_what_had_come(page, server):
    server.let(2)
    begin(page)
    page.locator(".fragment").nth(1).wait_for()
    server.kill()
    page.locator(".unfinished").wait_for()
    came = fragments(page)
    press(page, "r")
    page.locator(".unfinished", has_text="The server does not answer").wait_for()
    assert fragments(page) == came and len(came) == 2
    server.start()
    press(page, "r")
    arrived(page, QUESTION)
    assert fragments(page)[: len(came)] == came and len(nodes(page)) == 1


def test_a_draft_keeps_its_parts_until_as_many_have_come_again(modules):
    code = """
    const parts = [[["one"], []], [["one", "two"], []], [["one", "new"], [1]]];
    const state = "asking";
    return parts.map(([fragments, choices]) => tree.received(given, "a", { fragments, choices, state }).nodes.a);
    """
    draft = tree(ROOT, node("a", state="draft", fragments=["old", "older"]))
    shown = [each["fragments"] for each in modules(TREE + code, draft)]
    assert shown == [["old", "older"], ["one", "two"], ["one", "new"]]
    whole = "return tree.received(given, 'a', { fragments: ['short'], choices: [], state: 'whole' }).nodes.a"
    assert modules(TREE + whole, draft)["fragments"] == ["short"]


def test_the_same_answer_again_leaves_the_reader_where_they_went(page, server):
    ask(page)
    press(page, "o")
    page.keyboard.type("Always the same?")
    press(page, "Enter")
    arrived(page, "Always the same?")
    with server.held():
        press(page, "r")
        page.locator(".siblings", has_text="2 of 2").wait_for()
        press(page, "k")
    page.get_by_text("The model gave the same answer again").first.wait_for()
    assert page.inner_text("#question") == QUESTION and nodes(page) == [QUESTION, "Always the same?"]


def test_an_answer_goes_on_in_a_conversation_that_is_left_and_come_back_to(page, server):
    server.let(1)
    begin(page)
    press(page, "n")
    page.locator(".start").wait_for()
    server.let(2)
    eventually(lambda: [len(each["fragments"]) for each in kept(page)[0]["doc"]["nodes"].values()], [3])
    page.locator("#shelf li button").click()
    page.locator(".fragment").nth(2).wait_for()
    server.let()
    arrived(page, QUESTION)
    assert len(fragments(page)) == 4
    server.document(lambda found: "'whole'" in str(found))


BACKGROUND = """
const { Library } = await import('/static/library.js');
const [document, first] = given;
const records = new Map([["x", { id: "x", doc: document, base: null, unsent: false, deleted: false, writes: 1 }]]);
const slow = () => new Promise((resolve) => setTimeout(resolve, 5));
const store = {
  kept: true,
  all: async () => [],
  async get(id) { const found = records.get(id); await slow(); return found; },
  async change(id, change) {
    await slow();
    const before = records.get(id);
    records.set(id, { ...change(before), writes: before.writes + 1 });
    return records.get(id);
  },
};
let mine = null; // what the reader has open
const page = { mine: () => mine, changed: (id, doc) => (mine = doc), met() {}, sent() {}, listed() {} };
const library = new Library(store, page);
const open = () => library.open("x").then((doc) => (mine = doc));
const whole = { fragments: ["one", "two"], state: "whole" };
const end = () => library.update("x", (doc) => tree.changeNode(doc, "root", whole));
await Promise.all(first === "open" ? [open(), end()] : [end(), open()]);
await library.save(tree.changeNode(mine, "root", { mark: "good" }));
return [mine, records.get("x").doc].map(({ nodes }) => nodes.root);
"""


@pytest.mark.parametrize("first", ["open", "end"])
def test_who_comes_back_in_the_moment_an_answer_ends_has_its_end(modules, first):
    draft = tree(node("root", None, state="draft", fragments=["one"]))
    shown, stored = modules(TREE + BACKGROUND, [draft, first])
    assert shown["fragments"] == stored["fragments"] == ["one", "two"] and stored["state"] == "whole"


# --- storage that fails ----------------------------------------------------------------------------------------------

FULL = "IDBObjectStore.prototype.put = () => { throw new DOMException('', 'QuotaExceededError'); };"


def test_a_full_storage_is_said_and_the_server_still_gets_everything(browser, server):
    with a_page(browser, server) as page:
        ask(page)
        server.document()
        page.evaluate(f"() => {{ {FULL} }}")
        press(page, "g")
        page.locator(".notice.error", has_text="This browser keeps nothing any more").wait_for()
        server.document(lambda found: "'good'" in str(found))
        press(page, "1")
        arrived(page, FIRST)
        server.document(lambda found: len(found["nodes"]) == 2)
        assert page.locator(".notice.error").count() == 1


def test_a_storage_that_was_closed_is_opened_again(browser, server):
    with a_page(browser, server) as page:
        ask(page)
        server.document()
        page.evaluate(
            """() => { const begin = IDBDatabase.prototype.transaction; let broken = true;
            IDBDatabase.prototype.transaction = function (...given) {
                if (this.closedForTest ??= broken && !(broken = false)) throw new DOMException('', 'InvalidStateError');
                return begin.apply(this, given); }; }"""
        )
        press(page, "g")
        server.document(lambda found: "'good'" in str(found))
        assert page.locator(".notice.error").count() == 0
        eventually(lambda: "'good'" in str(kept(page)), True)


def test_what_a_page_left_behind_cannot_keep_the_next_one_from_starting(browser, server):
    context = browser.new_context()
    with a_page(browser, server, context, expected=("JSON", "undefined")) as page:
        ask(page)
        page.evaluate("localStorage.setItem('conversation.left x', '{broken')")
        context.add_init_script(FULL)
        page.reload()
        arrived(page, QUESTION)
    context.close()


REFUSED = """
const refuse = () => { throw new DOMException('', 'SecurityError'); };
window.BroadcastChannel = class { constructor() { refuse(); } };
indexedDB.open = refuse;
navigator.locks.request = async () => refuse();
Object.defineProperty(window, 'localStorage', { get: refuse });
"""


def test_a_browser_that_refuses_cookies_and_storage_asks_and_sends(browser, server):
    context = browser.new_context()
    context.add_init_script(REFUSED)
    with a_page(browser, server, context) as page:
        page.locator(".notice.error", has_text="This browser keeps nothing for this page").wait_for()
        ask(page)
        press(page, "g")
        server.document(lambda found: "'good'" in str(found))
        page.reload()
        arrived(page, QUESTION)
        assert page.locator(".actions .good").get_attribute("aria-pressed") == "true"
    context.close()


# --- the server ------------------------------------------------------------------------------------------------------


def test_a_server_whose_folder_went_back_in_time_gets_everything_again(page, server):
    ask(page)
    server.document(lambda found: "'whole'" in str(found))
    file = next(server.folder.glob("*.json"))
    old = file.read_text()
    press(page, "1")
    arrived(page, FIRST)
    server.document(lambda found: len(found["nodes"]) == 2 and "'draft'" not in str(found))
    eventually(lambda: any(record["unsent"] for record in kept(page)), False)
    file.write_text(old)
    page.reload()
    arrived(page, FIRST)
    server.document(lambda found: len(found["nodes"]) == 2 and found["revision"] > json.loads(old)["revision"])
    assert nodes(page) == [QUESTION, FIRST]


def test_a_change_whose_sending_failed_once_is_sent_again_though_the_server_was_never_away(browser, server):
    with a_page(browser, server, expected=("ERR_FAILED",)) as page:
        page.clock.install()
        ask(page)
        page.clock.run_for(2000)
        server.document(lambda found: "'whole'" in str(found))
        page.route("**/api/conversations/*", lambda route: route.abort())
        press(page, "g")
        with page.expect_event("requestfailed"):
            page.clock.run_for(2000)
        page.unroute("**/api/conversations/*")
        page.clock.run_for(20_000)
        server.document(lambda found: "'good'" in str(found))


def test_a_conversation_that_the_server_got_without_our_hearing_of_it_is_deleted_there(browser, server):
    with a_page(browser, server, expected=("ERR_FAILED",)) as page:

        def unheard(route):
            if route.request.method == "PUT":
                route.fetch()
                route.abort()
            else:
                route.continue_()

        page.route("**/api/conversations/*", unheard)
        ask(page)
        until(page, server.documents)
        press(page, "Delete")
        page.locator(".start").wait_for()
        until(page, lambda: not server.documents())
