"""The page's conversations as files, `<id>.json` each, and the training trees made from them.

Every write is whole or not done. A document has a revision, and is only replaced by one that was made from it: of two
tabs, or of two servers on one folder, the second to save is told of the first. Picked choices are counted in the file
and make no new revision, as no text changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conversation.data.conversations import IDENTIFIER, Conversation, ConversationError, parse_conversation
from conversation.data.own_trees import OwnTree, remarks, training_tree
from conversation.data.trees import Tree, TreeError, read_tree
from conversation.errors import UserError
from conversation.format import strict_json
from conversation.runs.files import make_folder, shown, write_atomically

Document = dict[str, Any]
MAX_DOCUMENTS = 10_000


class Conflict(Exception):
    """The document was saved by another meanwhile; `newer` is what is kept."""

    def __init__(self, newer: Document):
        self.newer = newer
        super().__init__("this conversation was saved by another tab meanwhile")


class NotThere(Exception):
    """There is no such document, node or choice."""


class ConversationFiles:
    """The documents in one folder. May be used by several threads."""

    def __init__(self, folder: Path, own_trees: Path):
        self._folder, self._own_trees = folder, own_trees
        self._threads = threading.Lock()

    def overview(self) -> list[Document]:
        """A line on each document, the one changed last first. A file that is broken is passed over."""
        lines = []
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(NotThere, UserError):
                document, conversation = self._read(path.stem)
                lines.append(
                    {
                        "id": conversation.id,
                        "title": conversation.title,
                        "nodes": len(conversation.nodes),
                        "revision": conversation.revision,
                        "changed": document["changed"] if "changed" in document else _changed(path),
                    }
                )
        return sorted(lines, key=lambda line: str(line["changed"]), reverse=True)

    def read(self, identifier: str) -> Document:
        """Raises NotThere, and UserError for a broken file."""
        return self._read(identifier)[0]

    def write(self, identifier: str, document: Document) -> Document:
        """Keep a document; returns it with its new revision.

        Raises ConversationError for what is no document of this id, Conflict when the kept one has another revision.
        A document that is not there is kept whatever its revision: the page may know one that this folder lost.
        """
        conversation = parse_conversation(document)
        if conversation.id != identifier:
            raise ConversationError([f"id: {conversation.id!r} is not the {identifier!r} of the address"])
        with self._locked():
            with contextlib.suppress(NotThere):
                kept, kept_conversation = self._read(identifier)
                if kept_conversation.revision != conversation.revision:
                    raise Conflict(kept)
                document = _with_picked(document, kept_conversation)
            if not self._path(identifier).exists() and len(list(self._folder.glob("*.json"))) >= MAX_DOCUMENTS:
                raise UserError(f"{shown(self._folder)} holds {MAX_DOCUMENTS} conversations", "delete some of them")
            return self._write(identifier, document, conversation.revision + 1)

    def delete(self, identifier: str) -> None:
        """Raises NotThere."""
        with self._locked():
            self._existing(identifier).unlink()

    def count_picked(self, identifier: str, node: str, choice: int) -> list[int]:
        """Count that a reader picked this choice of a node; returns the node's counts. Raises NotThere."""
        with self._locked():
            document, conversation = self._read(identifier)
            found = conversation.nodes.get(node)
            if found is None or not 0 <= choice < min(len(found.choices), len(found.picked)):
                raise NotThere(f"there is no choice {choice} at a node {node[:100]!r}")
            picked = [count + (number == choice) for number, count in enumerate(found.picked)]
            document["nodes"][node]["picked"] = picked
            self._write(identifier, document, conversation.revision)
            return picked

    def save_training_tree(self, identifier: str, leave_out: Collection[str] = ()) -> tuple[Path, OwnTree, list[str]]:
        """Make a training tree, without the nodes of some ids, and keep it: (its path, the tree, all warnings).

        Raises NotThere, TreeError.
        """
        made = training_tree(self._read(identifier)[1], leave_out)
        folder = self._own_trees / made.tree.domain
        make_folder(folder, "name another with --data_dir")
        path = folder / f"{made.tree.name}.json"
        with self._locked():
            write_atomically(path, made.data)
            for old in folder.glob(f"*_{identifier[:8]}.json"):  # its first question may have changed
                if old != path:
                    old.unlink()
            others, broken = _readable_trees(folder, path)
        return path, made, [*made.warnings, *remarks(made.tree, others), *broken]

    # --- a file ---

    def _path(self, identifier: str) -> Path:
        if not IDENTIFIER.fullmatch(identifier):
            raise NotThere("the id of a conversation is a UUID in lower case")
        return self._folder / f"{identifier}.json"

    def _existing(self, identifier: str) -> Path:
        path = self._path(identifier)
        if not path.is_file():
            raise NotThere("there is no conversation of this id")
        return path

    def _read(self, identifier: str) -> tuple[Document, Conversation]:
        path = self._existing(identifier)
        try:
            document = strict_json.loads(strict_json.decode_utf8(path.read_bytes()))
            return document, parse_conversation(document)
        except FileNotFoundError:
            raise NotThere("there is no conversation of this id") from None
        except OSError as error:
            raise UserError(f"{shown(path)} cannot be read: {error.strerror}") from None
        except (strict_json.JsonError, ConversationError) as error:
            raise UserError(f"{shown(path)} is broken: {error}", "correct it, or move it away") from None

    def _write(self, identifier: str, document: Document, revision: int) -> Document:
        changed = datetime.now(UTC).isoformat(timespec="milliseconds")
        document = {**document, "revision": revision, "changed": changed}
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(self._path(identifier), f"{text}\n".encode())
        return document

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, of all threads and, where the file system has locks, of all processes."""
        make_folder(self._folder, "name another with --data_dir")
        with self._threads, open(self._folder / ".lock", "a") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _changed(path: Path) -> str:
    """When a file was changed. Raises NotThere when it is deleted meanwhile."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="milliseconds")
    except FileNotFoundError:
        raise NotThere("there is no conversation of this id") from None


def _with_picked(document: Document, kept: Conversation) -> Document:
    """A document whose counts of picked choices are at least those that are kept: the page may not have seen them."""
    nodes = dict(document["nodes"])
    for name, node in kept.nodes.items():
        if name in nodes and any(node.picked):
            given = nodes[name].get("picked") or (0,) * len(node.picked)
            nodes[name] = {**nodes[name], "picked": [max(pair) for pair in zip(given, node.picked, strict=True)]}
    return {**document, "nodes": nodes}


def _readable_trees(folder: Path, but: Path) -> tuple[list[Tree], list[str]]:
    """The other trees of a folder, and a sentence on each that cannot be read."""
    trees, problems = [], []
    for path in sorted(folder.glob("*.json")):
        if path != but:
            try:
                trees.append(read_tree(path))
            except TreeError as error:
                problems.append(f"{shown(path)} is no training tree: {error.problems[0]}")
            except OSError as error:
                problems.append(f"{shown(path)} cannot be read: {error.strerror}")
    return trees, problems
