"""Conversations as files: whole or absent, no save lost, no path out of the folder."""

import json
import threading
import uuid

import pytest
from documents import ID, document, node

from conversation.data.conversations import ConversationError
from conversation.data.trees import TreeError, read_trees
from conversation.errors import UserError
from conversation.runs.conversation_files import Conflict, ConversationFiles, NotThere


@pytest.fixture
def files(tmp_path):
    return ConversationFiles(tmp_path / "conversations", tmp_path / "own_trees")


def test_a_document_is_kept_listed_and_deleted(files):
    assert files.overview() == []
    assert files.write(ID, document())["revision"] == 1
    assert files.read(ID)["nodes"] == document()["nodes"]
    (line,) = files.overview()
    assert (line["id"], line["title"], line["nodes"]) == (ID, "Monads", 3) and line["changed"].startswith("20")
    files.delete(ID)
    assert files.overview() == []
    for what in (files.read, files.delete):
        with pytest.raises(NotThere):
            what(ID)


def test_the_second_of_two_tabs_to_save_gets_the_newer_document(files):
    files.write(ID, document(title="first"))
    files.write(ID, document(title="second", revision=1))
    with pytest.raises(Conflict) as caught:
        files.write(ID, document(title="third", revision=1))
    assert (caught.value.newer["title"], caught.value.newer["revision"]) == ("second", 2)
    assert files.read(ID)["title"] == "second"


def test_of_many_who_save_at_once_one_wins_and_the_others_are_told(files):
    results = []

    def save(number):
        try:
            results.append(ConversationFiles(files._folder, files._own_trees).write(ID, document(title=str(number))))
        except Conflict as conflict:
            results.append(conflict)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [result for result in results if not isinstance(result, Conflict)]
    assert files.read(ID)["title"] == winner["title"] and len(results) == 8


def test_a_document_that_the_folder_lost_is_kept_whatever_its_revision(files):
    assert files.write(ID, document(revision=41))["revision"] == 42


def test_a_document_of_another_id_or_form_is_refused(files):
    with pytest.raises(ConversationError, match="is not the"):
        files.write(str(uuid.UUID(int=1)), document())
    with pytest.raises(ConversationError):
        files.write(ID, {})
    assert files.overview() == []


@pytest.mark.parametrize("name", ["../outside", "..", "", "a/b", ID.upper(), f"{ID}\n", f"{ID}.json", "%2e%2e", "\0"])
def test_no_id_leads_out_of_the_folder(files, name, tmp_path):
    (tmp_path / "outside.json").write_text("{}")
    for what in (files.read, files.delete, files.save_training_tree, lambda n: files.count_picked(n, "a", 0)):
        with pytest.raises(NotThere):
            what(name)
    assert (tmp_path / "outside.json").exists()


def test_picked_choices_are_counted_and_no_save_loses_them(files):
    files.write(ID, document())
    assert files.count_picked(ID, "a", 1) == [0, 1, 0]
    assert files.count_picked(ID, "a", 1) == [0, 2, 0]
    mine = document(revision=1)
    mine["nodes"]["a"]["picked"] = [1, 0, 0]
    files.write(ID, mine)  # counting made no new revision
    assert files.read(ID)["nodes"]["a"]["picked"] == [1, 2, 0]
    for name, choice in (("a", 3), ("a", -1), ("z", 0)):
        with pytest.raises(NotThere):
            files.count_picked(ID, name, choice)


def test_a_broken_file_is_named_passed_over_in_the_list_and_left_alone(files, tmp_path):
    files.write(ID, document())
    path = tmp_path / "conversations" / f"{ID}.json"
    path.write_text(path.read_text()[:100])
    assert files.overview() == []
    with pytest.raises(UserError, match="is broken"):
        files.read(ID)
    with pytest.raises(UserError, match="is broken"):
        files.write(ID, document())
    assert len(path.read_text()) == 100


def test_a_training_tree_is_saved_where_training_data_is_read_from(files, tmp_path):
    files.write(ID, document())
    path, made, warnings = files.save_training_tree(ID)
    assert path == tmp_path / "own_trees" / "conversations" / "monad_0f8fad5b.json"
    assert read_trees(tmp_path / "own_trees") == [made.tree]
    assert any("structural tests" in warning for warning in warnings)
    changed = document(node("a", "What's a lens?"), revision=1)
    files.write(ID, changed)
    files.save_training_tree(ID)  # again, under another question: the old tree is replaced
    assert [tree.question for tree in read_trees(tmp_path / "own_trees")] == ["What's a lens?"]
    files.write(ID, document(node("a", "q" * 61), revision=2))
    with pytest.raises(TreeError):
        files.save_training_tree(ID)
    assert [tree.question for tree in read_trees(tmp_path / "own_trees")] == ["What's a lens?"]


def test_a_broken_tree_beside_it_is_named(files, tmp_path):
    files.write(ID, document())
    folder = tmp_path / "own_trees" / "conversations"
    folder.mkdir(parents=True)
    (folder / "other.json").write_text("{")
    assert any("other.json is no training tree" in warning for warning in files.save_training_tree(ID)[2])


def test_a_full_disk_leaves_the_document_that_was_there(files, monkeypatch):
    files.write(ID, document(title="old"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        files.write(ID, document(title="new", revision=1))
    assert json.loads((files._folder / f"{ID}.json").read_text())["title"] == "old"


def test_a_full_disk_leaves_the_training_tree_that_was_there(files, monkeypatch, tmp_path):
    files.write(ID, document())
    files.save_training_tree(ID)
    files.write(ID, document(node("a", "What's a lens?"), revision=1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        files.save_training_tree(ID)
    assert [tree.question for tree in read_trees(tmp_path / "own_trees")] == [document()["nodes"]["a"]["question"]]


def test_a_document_that_another_tab_deletes_while_the_list_is_made_is_passed_over(files, monkeypatch):
    files.write(ID, document())
    kept = files._folder / f"{ID}.json"
    kept.write_text(json.dumps({name: value for name, value in files.read(ID).items() if name != "changed"}))
    assert len(files.overview()) == 1  # with the time of its file
    read = files._read

    def read_and_delete(identifier):
        found = read(identifier)
        kept.unlink()
        return found

    monkeypatch.setattr(files, "_read", read_and_delete)
    assert files.overview() == []
