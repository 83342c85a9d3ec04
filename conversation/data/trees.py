"""Conversation trees: read them, check them, walk them into examples.

A tree is one JSON file, `<domain>/<root>.json`: a root question and nodes, each with 1 to 4 texts and 3 choices. The
format is `data/conversation_tree.schema.json`, which `read_tree` enforces together with what a schema cannot say:
each target occurs once, and exactly one choice leads to every node but the root.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from conversation.data.tree_files import find_tree_files
from conversation.errors import UnusableData, UserError, list_problems
from conversation.format import strict_json
from conversation.format.calls import Answer, Example, FollowUp, Prompt, Utterance
from conversation.format.control_tokens import CONTROL_PATTERN
from conversation_config import PROJECT

if TYPE_CHECKING:
    import jsonschema


T = TypeVar("T")
PLACE = "trees are JSON files at <domain>/<root>.json"
SCHEMA_FILE = PROJECT / "data" / "conversation_tree.schema.json"


@dataclass(frozen=True)
class Tree:
    """A conversation tree. `nodes` maps a node's name to its answer; a choice's target may name a node or nothing.

    `also_asked`: other ways to ask the root question. `other_questions`: other ways to ask the follow-up that leads to
    a node, by its name. `other_texts`: other wordings of a node's texts, by its name.
    """

    name: str
    domain: str
    question: str
    nodes: dict[str, Answer]
    also_asked: tuple[str, ...] = ()
    other_texts: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    other_questions: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def questions(self) -> tuple[str, ...]:
        """Every way in which the root question is asked."""
        return (self.question, *self.also_asked)

    @property
    def questions_of_nodes(self) -> dict[str, tuple[str, ...]]:
        """Every way in which a node's question is asked, by its name; a child's first as the choice has it."""
        asked = {
            choice.target: (choice.text, *self.other_questions.get(choice.target, ()))
            for answer in self.nodes.values()
            for choice in answer.follow_ups
            if choice.target in self.nodes
        }
        return asked | {self.name: self.questions}

    def wordings(self, name: str) -> tuple[Answer, ...]:
        """Every wording of a node's answer; they share their follow-ups."""
        answer = self.nodes[name]
        return (answer, *(Answer(texts, answer.follow_ups) for texts in self.other_texts.get(name, ())))

    def walk(self) -> Iterator[tuple[str, Prompt, Answer]]:
        """Every node as (name, prompt, answer), depth first, children in the order of the choices that name them.

        The user's turn at a child is the text of the choice that leads to it, and at the root the root question.
        """
        todo = [(self.name, Prompt(self.question))]
        while todo:
            name, prompt = todo.pop()
            answer = self.nodes[name]
            yield name, prompt, answer
            history = (
                *prompt.history,
                Utterance("User", prompt.question),
                *(Utterance("AI", text) for text in answer.fragments),
            )
            children = [choice for choice in answer.follow_ups if choice.target in self.nodes]
            todo += [(choice.target, Prompt(choice.text, history)) for choice in reversed(children)]

    def examples(self, answers: str = "all", restates: bool = False) -> list[Example]:
        """The training examples; see `examples_of_nodes`."""
        return [example for _, example in self.examples_of_nodes(answers, restates)]

    def examples_of_nodes(self, answers: str = "all", restates: bool = False) -> list[tuple[str, Example]]:
        """The training examples with the names of their nodes, in the order of `walk`.

        A root with 6 questions and 3 wordings gives 6 examples, a child with 3 questions and 2 wordings gives 3. The
        history of a child takes the questions and wordings above it in turn. A tree without variants gives one example
        a node.

        `answers`: "all" takes a node's wordings in turn, so that each question and each wording occurs at least once;
        "first" answers with the node's first wording every time. Examples that are equal then count once.

        `restates`: each answer begins with the question in full (`question_in_full`), however it was asked.
        """
        examples: dict[Example, str] = {}
        paths: dict[str, tuple[str, ...]] = {self.name: ()}  # the nodes above a node
        asked = self.questions_of_nodes
        for number, (name, _, answer) in enumerate(self.walk()):
            paths.update({choice.target: (*paths[name], name) for choice in answer.follow_ups})
            wordings = self.wordings(name)
            for variant in range(max(len(wordings), len(asked[name]))):
                turn = number + variant
                history: list[Utterance] = []
                for above in paths[name]:
                    history.append(Utterance("User", _in_turn(asked[above], turn)))
                    history += [Utterance("AI", text) for text in _in_turn(self.wordings(above), turn).fragments]
                question = _in_turn(asked[name], variant)
                answer = wordings[0] if answers == "first" else _in_turn(wordings, variant)
                if restates:
                    in_full = question_in_full([asked[each][0] for each in (*paths[name], name)])
                    answer = replace(answer, restated=in_full)
                examples.setdefault(Example(Prompt(question, tuple(history), restates=restates), answer), name)
        return [(name, example) for example, name in examples.items()]


def question_in_full(path: Sequence[str]) -> str:
    """What is asked, of what: the first, the last but one and the last of the questions from the root on.

    "What's a mutex?" then "Example?" becomes "What's a mutex? Example?".
    """
    return " ".join(dict.fromkeys((path[0], *path[-2:])))


def _in_turn(values: Sequence[T], number: int) -> T:
    return values[number % len(values)]


class TreeError(ValueError):
    """A file that is not a conversation tree; `problems` says what is wrong and where in the file."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


@cache
def _validator() -> jsonschema.Draft202012Validator:
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def parse_tree(data: bytes, name: str, domain: str) -> Tree:
    """Read a tree from a file's bytes. Raises TreeError with every problem found."""
    try:
        value = strict_json.loads(strict_json.decode_utf8(data))
    except strict_json.JsonError as error:
        raise TreeError([str(error)]) from None
    problems = [f"{_place(error.absolute_path)}: {_short(error)}" for error in _validator().iter_errors(value)]
    if problems:
        raise TreeError(sorted(problems))
    problems = _structure_problems(value, name)
    if problems:
        raise TreeError(problems)
    nodes = {
        node_name: Answer(
            tuple(node["texts"]),
            tuple(FollowUp(c["text"], f"{c['confidence']:.2f}", c["target"]) for c in node["choices"]),
        )
        for node_name, node in value["nodes"].items()
    }
    others = {
        node_name: tuple(map(tuple, node["other_texts"]))
        for node_name, node in value["nodes"].items()
        if "other_texts" in node
    }
    asked = {name: tuple(node["also_asked"]) for name, node in value["nodes"].items() if "also_asked" in node}
    return Tree(value["root"], domain, value["question"], nodes, tuple(value.get("also_asked", ())), others, asked)


def read_tree(path: Path) -> Tree:
    """Read one tree file; its folder names the domain. Raises TreeError, OSError."""
    return parse_tree(path.read_bytes(), path.stem, path.parent.name)


def read_trees(folder: Path, domains: tuple[str, ...] = ()) -> list[Tree]:
    """Read every `<domain>/<root>.json` below `folder`, sorted by domain and name; only `domains` when given.

    Raises UserError that lists every problem of every file, and every tree that lies elsewhere.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder of conversation trees at {folder}")
    try:
        present = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if unknown := sorted(set(domains) - set(present)):
            hint = f"the domains in {folder} are: {', '.join(present)}"
            raise UserError(f"unknown domain: {', '.join(unknown)}", hint)
        files, problems = find_tree_files(folder, tuple(dict.fromkeys(domains)) or present)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    trees, hint = [], PLACE if problems else ""
    for path in files:
        try:
            trees.append(read_tree(path))
        except TreeError as error:
            problems += [f"{path}: {problem}" for problem in error.problems]
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
    problems += [f"{folder / name}: contains no tree" for name in dict.fromkeys(domains) if not _any_in(files, name)]
    if problems:
        message = f"the conversation trees have {len(problems)} problems:\n{list_problems(problems)}"
        raise UnusableData(message, hint, problems, trees)
    if not trees:
        raise UserError(f"no conversation tree in {folder}", PLACE)
    return sorted(trees, key=lambda tree: (tree.domain, tree.name))


def _any_in(files: list[Path], domain: str) -> bool:
    return any(path.parent.name == domain for path in files)


def read_listed_trees(path: Path, domains: tuple[str, ...] = ()) -> list[Tree]:
    """Read the trees that a text file lists, `<domain>/<root>` a line, from `core_trees` beside it; each once.

    Raises UserError for a name that is not there, and for what `read_trees` refuses.
    """
    try:
        lines = strict_json.decode_utf8(path.read_bytes()).splitlines()
    except strict_json.JsonError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if any(name.startswith(("{", "[")) for name in names):
        raise UserError(f"{path} is JSON, not a list of trees", "give a JSONL file a name that ends in .jsonl")
    trees = {f"{tree.domain}/{tree.name}": tree for tree in read_trees(path.with_name("core_trees"), domains)}
    wanted = [name for name in names if not domains or name.split("/")[0] in domains]
    if missing := [name for name in wanted if name not in trees]:
        raise UserError(f"{path} lists trees that are not there:\n{list_problems(missing)}")
    if not wanted:
        raise UserError(f"{path} lists no tree" + (f" of {', '.join(domains)}" if domains else ""))
    return [trees[name] for name in wanted]


def format_tree(value: dict[str, Any], spread: bool = True) -> str:
    """A tree's JSON laid out as the project's own files are. `spread`: a line for each text, as in the expert set."""

    def line(part: Any) -> str:
        return json.dumps(part, ensure_ascii=False)

    def block(opening: str, rows: list[str], closing: str, indent: int) -> str:
        return opening + "\n" + ",\n".join(" " * (indent + 2) + row for row in rows) + "\n" + " " * indent + closing

    def listed(rows: list[str]) -> str:
        return block("[", rows, "]", 6)

    nodes = []
    for name, node in value["nodes"].items():
        texts = listed([line(text) for text in node["texts"]]) if spread else line(node["texts"])
        rows = [f'"also_asked": {line(node["also_asked"])}'] if "also_asked" in node else []
        rows.append(f'"texts": {texts}')
        if "other_texts" in node:
            rows.append(f'"other_texts": {listed([line(each) for each in node["other_texts"]])}')
        rows.append(f'"choices": {listed([f"{{ {line(choice)[1:-1]} }}" for choice in node["choices"]])}')
        rows += [f'"readers": {node["readers"]}'] if "readers" in node else []
        nodes.append(f"{line(name)}: {block('{', rows, '}', 4)}")
    asked = [f'"{key}": {line(value[key])}' for key in ("question", "also_asked", "root") if key in value]
    return block("{", [*asked, f'"nodes": {block("{", nodes, "}", 2)}'], "}", 0) + "\n"


def _place(path: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return place.lstrip(".") or "the tree"


def _short(error: jsonschema.ValidationError) -> str:
    message = error.message if len(error.message) <= 200 else error.message[:120] + " ... " + error.message[-60:]
    described = error.schema.get("description") if isinstance(error.schema, dict) else None
    return f"{message} ({described})" if described else message


def _structure_problems(value: dict[str, Any], file_name: str) -> list[str]:
    """What the schema cannot say, for a value that the schema accepts."""
    problems = []
    root, nodes = value["root"], value["nodes"]
    if root not in nodes:
        return [f"root: there is no node {root!r}"]
    if root != file_name:
        problems.append(f"root: {root!r} does not match the file's name {file_name!r}")
    problems += _control_token_problems("question", value["question"])
    problems += _also_asked_problems("also_asked", value["question"], value.get("also_asked", []))
    offered = {choice["target"]: choice["text"] for node in nodes.values() for choice in node["choices"]}
    named_by: dict[str, str] = {}
    for name, node in nodes.items():
        place = f"nodes.{name}.also_asked"
        if name == root and "also_asked" in node:
            problems.append(f"{place}: other ways to ask the root question stand beside it, at the top")
        problems += _also_asked_problems(place, offered.get(name, ""), node.get("also_asked", []))
        for i, text in enumerate(node["texts"]):
            problems += _control_token_problems(f"nodes.{name}.texts[{i}]", text)
        for k, texts in enumerate(node.get("other_texts", [])):
            for i, text in enumerate(texts):
                problems += _control_token_problems(f"nodes.{name}.other_texts[{k}][{i}]", text)
        for i, choice in enumerate(node["choices"]):
            place = f"nodes.{name}.choices[{i}]"
            problems += _control_token_problems(f"{place}.text", choice["text"])
            if round(choice["confidence"], 2) != choice["confidence"]:
                problems.append(f"{place}.confidence: {choice['confidence']} has more than two decimals")
            target = choice["target"]
            if target == root:
                problems.append(f"{place}.target: {target!r} leads back to the root: a cycle")
            if target in named_by:
                problems.append(f"{place}.target: {target!r} is the target of {named_by[target]} too")
            named_by[target] = place
    orphans = [name for name in nodes if name != root and name not in named_by]
    problems += [f"nodes.{name}: an orphan, no choice leads to it" for name in orphans]
    if not problems:
        reached = _reached(root, nodes)
        cycle = [name for name in nodes if name not in reached]
        problems += [f"nodes.{name}: part of a cycle that the root does not reach" for name in cycle]
    return problems


def _also_asked_problems(place: str, question: str, also_asked: list[str]) -> list[str]:
    problems = []
    for i, other in enumerate(also_asked):
        problems += _control_token_problems(f"{place}[{i}]", other)
        if other in (question, *also_asked[:i]):
            problems.append(f"{place}[{i}]: {other!r} is asked already")
    return problems


def _reached(root: str, nodes: dict[str, Any]) -> set[str]:
    reached, todo = set(), [root]
    while todo:
        name = todo.pop()
        if name in nodes and name not in reached:
            reached.add(name)
            todo += [choice["target"] for choice in nodes[name]["choices"]]
    return reached


def _control_token_problems(place: str, text: str) -> list[str]:
    found = CONTROL_PATTERN.search(text)
    return [f"{place}: control token {found[0]} at character {found.start()}"] if found else []
