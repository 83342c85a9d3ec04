"""Tree files on disk: every one is read, refused or named; ours among them."""

import json
import os
from pathlib import Path

import pytest
from conftest import INPUTS, TREES
from test_trees import dns

from conversation.data.examples import read_training_data
from conversation.data.trees import Tree, read_listed_trees, read_trees
from conversation.errors import UserError
from conversation.format.parser import parse_example
from conversation_config import TrainingConfig


@pytest.fixture(scope="module")
def own_trees() -> list[Tree]:
    return read_trees(TREES)


def write(folder: Path, domain: str, name: str, **changes) -> Path:
    path = folder / domain / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    value = dns() | {"root": name} | changes
    value["nodes"][name] = value["nodes"].pop("dns")
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_trees_are_read_in_the_order_of_domain_and_name(tmp_path):
    for domain, name in (("systems", "tcp"), ("programming", "zipper"), ("systems", "dns"), ("programming", "await")):
        write(tmp_path, domain, name)
    read = [(tree.domain, tree.name) for tree in read_trees(tmp_path)]
    assert read == [("programming", "await"), ("programming", "zipper"), ("systems", "dns"), ("systems", "tcp")]
    assert [t.name for t in read_trees(tmp_path, ("systems", "programming"))] == ["await", "zipper", "dns", "tcp"]
    assert [t.name for t in read_trees(tmp_path, ("systems",))] == ["dns", "tcp"]


def test_bad_files_are_told_all_at_once_with_file_and_place(tmp_path):
    write(tmp_path, "systems", "dns")
    long = write(tmp_path, "systems", "tcp", question="Q" * 61)
    broken = tmp_path / "systems" / "udp.json"
    broken.write_text("{")
    with pytest.raises(UserError) as caught:
        read_trees(tmp_path)
    assert "2 problems" in str(caught.value)
    assert f"{long}: question: " in str(caught.value)
    assert f"{broken}: not JSON" in str(caught.value)


def test_a_folder_without_trees_and_an_unknown_domain_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no conversation tree"):
        read_trees(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        read_trees(tmp_path / "nowhere")
    write(tmp_path, "systems", "dns")
    with pytest.raises(UserError, match="unknown domain: poetry") as caught:
        read_trees(tmp_path, ("systems", "poetry"))
    assert "systems" in caught.value.hint


def test_every_file_of_the_folder_is_read_or_refused_or_named(tmp_path, capsys):
    good = write(tmp_path, "systems", "dns")
    content = good.read_bytes()
    (tmp_path / "systems" / "more").mkdir()
    misplaced = {
        "tcp.json": "is not in a domain's folder",
        "lines.JSONL": "is no tree; a JSONL file is given by its own path",
        "systems/more/udp.json": "is too deep",
        "systems/more/ip.JSON": "ends in .JSON",
        "systems/arp.JSON": "ends in .JSON, rename it",
        "systems/smtp.json.gz": "is compressed: unpack it",
    }
    for name in misplaced:
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "systems" / "pipe.json")
    with pytest.raises(UserError) as caught:
        read_trees(tmp_path)
    for name, reason in {**misplaced, "systems/pipe.json": "is not a file"}.items():
        assert f"{tmp_path / name}: {reason}" in str(caught.value), name
    assert "7 problems" in str(caught.value) and "<domain>/<root>.json" in caught.value.hint
    for name in (*misplaced, "systems/pipe.json"):
        (tmp_path / name).unlink()
    (tmp_path / ".git").mkdir()
    for name in ("README.md", "systems/._dns.json", "systems/dns.json~", "systems/more/notes.txt", ".git/x.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "systems" / "elsewhere").symlink_to(tmp_path / "systems" / "more")
    capsys.readouterr()
    assert [tree.name for tree in read_trees(tmp_path)] == ["dns"]
    said = capsys.readouterr().err
    names = ".git/, README.md, systems/._dns.json, systems/dns.json~, systems/elsewhere/, systems/more/notes.txt"
    assert said == f"passed over in {tmp_path}: {names}\n"
    read_trees(tmp_path)
    assert capsys.readouterr().err == ""  # once is enough


def test_trees_beside_their_places_are_all_named():
    with pytest.raises(UserError, match="3 problems") as caught:
        read_trees(INPUTS / "trees_beside")
    for name in ("await_mechanism.json", "more/borrow_checker.json", "closure_capture.JSON"):
        assert name in str(caught.value)


def test_a_domain_given_twice_counts_once_and_an_empty_one_is_refused(tmp_path):
    write(tmp_path, "systems", "dns")
    assert [tree.name for tree in read_trees(tmp_path, ("systems", "systems"))] == ["dns"]
    assert TrainingConfig(domains="systems, systems,").domain_names == ("systems",)
    (tmp_path / "programming").mkdir()
    assert len(read_trees(tmp_path)) == 1
    with pytest.raises(UserError, match="programming: contains no tree"):
        read_trees(tmp_path, ("systems", "programming"))
    with pytest.raises(ValueError, match="--domains names no domain"):
        TrainingConfig(domains=" ,")


def test_a_list_of_trees_counts_each_once_and_what_is_no_list_is_said(tmp_path):
    write(tmp_path / "core_trees", "systems", "dns")
    listed = tmp_path / "topics.txt"
    listed.write_text("systems/dns\n\nsystems/dns\n")
    assert [tree.name for tree in read_listed_trees(listed)] == ["dns"]
    listed.write_text("systems/a\nsystems/b\n")
    with pytest.raises(UserError, match=r"systems/a\n  systems/b"):
        read_listed_trees(listed)
    for content, reason in (
        (b"\xff", "not UTF-8"),
        ("systems/dns".encode("utf-16"), "this is UTF-16"),
        (b'{"text": "x"}', "is JSON, not a list of trees"),
        (b"\n", "lists no tree"),
    ):
        listed.write_bytes(content)
        with pytest.raises(UserError, match=reason) as caught:
            read_listed_trees(listed)
        assert str(listed) in str(caught.value)


def test_a_tree_in_another_encoding_is_recognised(tmp_path):
    path = write(tmp_path, "systems", "dns")
    path.write_bytes(path.read_bytes().decode().encode("utf-16-le"))
    with pytest.raises(UserError, match=r"dns\.json: this is UTF-16"):
        read_trees(tmp_path)


def test_our_trees_become_one_example_per_node_in_the_same_order_each_time(own_trees):
    examples = read_training_data(TREES)
    assert examples == [example for tree in own_trees for example in tree.examples()]
    assert len(examples) == sum(len(tree.nodes) for tree in own_trees) >= 1200
    assert len({example.text for example in examples}) == len(examples)


def test_our_examples_round_trip_and_ask_the_choice_that_leads_to_them(own_trees):
    for tree in own_trees:
        leads_to = {choice.target: choice.text for answer in tree.nodes.values() for choice in answer.follow_ups}
        for name, prompt, answer in tree.walk():
            assert prompt.question == leads_to.get(name, tree.question)
            assert answer == tree.nodes[name]
        for example in tree.examples():
            assert parse_example(example.text) == example


def test_training_on_some_domains_leaves_the_others_out(own_trees):
    chosen = read_training_data(TREES, ("philosophy",))
    assert len(chosen) == sum(len(tree.nodes) for tree in own_trees if tree.domain == "philosophy")
