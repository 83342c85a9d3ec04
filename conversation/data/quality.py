"""How good a set of conversation trees is, as far as a program can tell.

`assess` counts and compares: sizes per domain, shapes, lengths, confidences, repeated and nearly repeated questions and
fragments, boilerplate. The figures inform; what this project asks of its own trees is in tests/data/test_quality.py.
Whether a text is true, and whether it answers its question, only a reader can tell.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from conversation.data.core import is_stock
from conversation.data.statistics import LengthSummary
from conversation.data.trees import Tree
from conversation.errors import list_problems
from conversation.format.calls import Answer

MAX_FRAGMENT, MAX_FOLLOW_UP = 80, 40  # characters
LONG_PATH = 4  # turns
NEAR_QUESTION, NEAR_FRAGMENT = 0.5, 0.55
"""Similarities from which two texts are reported. Below them, pairs in our trees share words and not what they say."""
BOILERPLATE = re.compile(
    r"it(?:'s| is) (?:important|worth|essential|crucial) (?:to|noting)|important to (?:note|remember)|worth noting"
    r"|there are (?:many|several|various|a number of)|plays? an? (?:\w+ )?role in|a wide (?:range|variety)"
    r"|in (?:conclusion|summary|today's world)|as an ai|delve into|it depends on (?:many|various|several)"
    r"|generally speaking|needless to say|at the end of the day|when it comes to",
    re.IGNORECASE,
)
TEST_SUBJECT = re.compile(
    r"\bmonad(?:s|ic)?\b|\bcap\b.*\b(?:theorem|conjecture|principle)|\bcap\W*$|\bbrewer\b|consisten.*availab.*partition"
    r"|^\W*(?:an? )?examples?\W*$",
    re.IGNORECASE,
)
"""What the structural tests ask about (`questions.THREE_CASES`): no tree may have it as its root question."""


@dataclass(frozen=True)
class Place:
    """The place of a text: `domain/tree` and the node."""

    tree: str
    node: str

    def __str__(self) -> str:
        return f"{self.tree}: {self.node}"


@dataclass(frozen=True)
class Found:
    """A text that somebody should look at."""

    text: str
    place: Place

    def __str__(self) -> str:
        return f"{self.place}: {self.text!r}"


@dataclass(frozen=True)
class Pair:
    """Two texts that say the same, or nearly. `similarity` is 1 for texts that differ in case and punctuation only."""

    similarity: float
    first: Found
    second: Found

    def __str__(self) -> str:
        return f"{self.similarity:.2f}  {self.first}  and  {self.second}"


@dataclass(frozen=True)
class Quality:
    """What `assess` found. Shares are of nodes, except `commonest_confidence_share`, which is of all confidences."""

    trees: int
    examples: int
    trees_by_domain: dict[str, int]
    examples_by_domain: dict[str, int]
    texts_per_node: dict[int, float]  # number of texts -> share
    examples_by_turn: dict[int, int]
    trees_with_long_paths: int
    wide_nodes: int  # all three choices are followed
    followed_by_rank: tuple[int, ...]  # how often the first, the second, the third choice is followed
    question_lengths: LengthSummary
    fragment_lengths: LengthSummary
    follow_up_lengths: LengthSummary
    mean_confidence_gap: float
    mean_confidence_by_rank: tuple[float, ...]
    commonest_confidence: str
    commonest_confidence_share: float

    repeated_questions: tuple[Pair, ...]
    repeated_fragments: tuple[Pair, ...]
    unordered_confidences: tuple[Found, ...]
    too_long: tuple[Found, ...]
    boilerplate: tuple[Found, ...]
    test_questions: tuple[Found, ...]
    repeated_follow_ups: tuple[Found, ...]
    near_questions: tuple[Pair, ...]
    near_fragments: tuple[Pair, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        domains = ", ".join(
            f"{domain} {count} ({self.examples_by_domain[domain]})" for domain, count in self.trees_by_domain.items()
        )
        texts = ", ".join(f"{n}: {share:.0%}" for n, share in self.texts_per_node.items())
        confidences = " / ".join(f"{value:.2f}" for value in self.mean_confidence_by_rank)
        lines = [
            f"Trees (examples) by domain: {domains}.",
            f"Texts per node: {texts}. Paths of {LONG_PATH} or more turns in {self.trees_with_long_paths} trees;"
            f" {self.wide_nodes} nodes with all three choices followed.",
            f"Confidences: {confidences} on average, mean gap {self.mean_confidence_gap:.2f}; commonest value"
            f" {self.commonest_confidence} ({self.commonest_confidence_share:.1%}).",
        ]
        for title, items in (
            ("Questions twice in a domain", self.repeated_questions),
            ("Fragments twice", self.repeated_fragments),
            ("Confidences that do not fall", self.unordered_confidences),
            (f"Texts over {MAX_FRAGMENT} or follow-ups over {MAX_FOLLOW_UP} characters", self.too_long),
            ("Boilerplate", self.boilerplate),
            ("Root questions that the structural tests ask", self.test_questions),
            ("Follow-ups offered twice in a tree, or asked already", self.repeated_follow_ups),
            ("Questions that are nearly the same", self.near_questions),
            ("Fragments that are nearly the same", self.near_fragments),
        ):
            if items:
                lines.append(f"{title}: {len(items)}\n{list_problems([str(item) for item in items], shown=5)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Node:
    """A node with what leads to it."""

    place: Place
    domain: str
    asked: tuple[str, ...]  # the questions on the path, the node's own last
    questions: tuple[str, ...]  # every way to ask the node's own; none where that is a stock form
    answer: Answer
    wordings: tuple[tuple[str, ...], ...]
    followed: tuple[bool, ...]  # per choice: whether its target is a node


def assess(trees: Sequence[Tree]) -> Quality:
    """Count and compare the texts of at least one tree; about half a second for 1,500 nodes."""
    nodes = [node for tree in trees for node in _nodes(tree)]
    answers = [node.answer for node in nodes]
    asked = [Found(question, node.place) for node in nodes for question in node.questions]
    fragments = [Found(text, node.place) for node in nodes for texts in node.wordings for text in texts]
    follow_ups = [Found(choice.text, node.place) for node in nodes for choice in node.answer.follow_ups]
    domain_of = {node.place: node.domain for node in nodes}
    roots = {node.place for node in nodes if len(node.asked) == 1}

    def comparable(pair: Pair) -> bool:
        """A root needs no context and is compared everywhere; another question depends on its path and its domain."""
        places = {pair.first.place, pair.second.place}
        return places <= roots or len({domain_of[place] for place in places}) == 1

    same_questions, near_questions = _split(filter(comparable, similar(asked, NEAR_QUESTION)))
    same_fragments, near_fragments = _split(similar(fragments, NEAR_FRAGMENT))
    confidences = Counter(f"{choice.probability:.2f}" for answer in answers for choice in answer.follow_ups)
    value, times = confidences.most_common(1)[0]
    turns = Counter(len(node.asked) for node in nodes)
    return Quality(
        trees=len(trees),
        examples=len(nodes),
        trees_by_domain=_counts(tree.domain for tree in trees),
        examples_by_domain=_counts(node.domain for node in nodes),
        texts_per_node={
            n: round(count / len(nodes), 4) for n, count in _counts(len(answer.fragments) for answer in answers).items()
        },
        examples_by_turn=dict(sorted(turns.items())),
        trees_with_long_paths=len({node.place.tree for node in nodes if len(node.asked) >= LONG_PATH}),
        wide_nodes=sum(all(node.followed) for node in nodes),
        followed_by_rank=tuple(map(sum, zip(*(node.followed for node in nodes), strict=True))),
        question_lengths=LengthSummary.of([len(tree.question) for tree in trees]),
        fragment_lengths=LengthSummary.of([len(item.text) for item in fragments]),
        follow_up_lengths=LengthSummary.of([len(item.text) for item in follow_ups]),
        mean_confidence_gap=round(fmean(max(values) - min(values) for values in map(_probabilities, answers)), 4),
        mean_confidence_by_rank=tuple(
            round(fmean(rank), 4) for rank in zip(*map(_probabilities, answers), strict=True)
        ),
        commonest_confidence=value,
        commonest_confidence_share=round(times / confidences.total(), 4),
        repeated_questions=same_questions,
        repeated_fragments=same_fragments,
        unordered_confidences=tuple(
            Found(" / ".join(choice.confidence for choice in node.answer.follow_ups), node.place)
            for node in nodes
            if any(first <= second for first, second in pairwise(_probabilities(node.answer)))
        ),
        too_long=tuple(item for item in fragments if len(item.text) > MAX_FRAGMENT)
        + tuple(item for item in follow_ups if len(item.text) > MAX_FOLLOW_UP),
        boilerplate=tuple(item for item in fragments + follow_ups if BOILERPLATE.search(item.text)),
        test_questions=tuple(item for item in asked if item.place in roots and TEST_SUBJECT.search(item.text)),
        repeated_follow_ups=tuple(_repeated_follow_ups(nodes)),
        near_questions=near_questions,
        near_fragments=near_fragments,
    )


def words(text: str) -> list[str]:
    """The words and signs of a text, without case and punctuation: `0.1` and `isn't` are one, `C++` is c, + and +."""
    return re.findall(r"\w+(?:[.'’]\w+)*|[^\w\s.,;:!?'\"‘’“”()…–—]", text.casefold()) or [text]


def similar(texts: Sequence[Found], threshold: float) -> list[Pair]:
    """Every pair of texts at least `threshold` > 0 alike, the most alike first.

    The similarity is the Jaccard index of the two sets of words, each word weighing ln(1 + texts / texts with it), so
    that sharing "0.3" counts for more than sharing "is"; 1 only for the same words in the same order. Pairs are found
    through their rare words (the prefix filter of Chaudhuri, Ganti and Kaushik, 2006), not by trying all.
    """
    sequences = [words(item.text) for item in texts]
    bags = [frozenset(sequence) for sequence in sequences]
    frequency = Counter(word for bag in bags for word in bag)
    weight = {word: math.log1p(len(texts) / count) for word, count in frequency.items()}
    total = [math.fsum(weight[word] for word in bag) for bag in bags]
    with_word: dict[str, list[int]] = defaultdict(list)
    pairs = []
    for i, bag in enumerate(bags):
        rest, candidates = total[i], set()
        for word in sorted(bag, key=lambda word: (frequency[word], word)):
            if rest < threshold * total[i] * (1 - 1e-9):
                break  # a text that shares only what is left cannot reach the threshold
            candidates.update(with_word[word])
            with_word[word].append(i)
            rest -= weight[word]
        for j in sorted(candidates):
            shared = math.fsum(weight[word] for word in bag & bags[j])
            similarity = shared / (total[i] + total[j] - shared)
            if similarity >= threshold:
                if sequences[i] == sequences[j]:
                    similarity = 1.0
                else:
                    similarity = min(round(similarity, 4), 0.9999)
                pairs.append(Pair(similarity, texts[j], texts[i]))
    return sorted(pairs, key=lambda pair: -pair.similarity)


def _split(pairs: Iterator[Pair] | list[Pair]) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """(the same but for case and punctuation, nearly the same)"""
    found = list(pairs)
    return tuple(p for p in found if p.similarity == 1), tuple(p for p in found if p.similarity < 1)


def _nodes(tree: Tree) -> Iterator[_Node]:
    for name, prompt, answer in tree.walk():
        before = tuple(utterance.text for utterance in prompt.history if utterance.speaker == "User")
        followed = tuple(choice.target in tree.nodes for choice in answer.follow_ups)
        place = Place(f"{tree.domain}/{tree.name}", name)
        questions = tree.questions if name == tree.name else () if is_stock(prompt.question) else (prompt.question,)
        wordings = tuple(each.fragments for each in tree.wordings(name))
        yield _Node(place, tree.domain, (*before, prompt.question), questions, answer, wordings, followed)


def _repeated_follow_ups(nodes: Sequence[_Node]) -> Iterator[Found]:
    """Follow-ups that a reader of the tree has met before: offered at another node of it, or asked on the path."""
    offered: dict[tuple[str, ...], set[Place]] = defaultdict(set)
    for node in nodes:
        asked = {tuple(words(question)) for question in node.asked}
        for choice in node.answer.follow_ups:
            if is_stock(choice.text):
                continue  # a stock form may be asked of everything
            key = tuple(words(choice.text))
            if key in asked or (node.place.tree, *key) in offered:
                yield Found(choice.text, node.place)
            offered[node.place.tree, *key].add(node.place)


def _counts(items: Iterator[Any]) -> dict[Any, int]:
    return dict(sorted(Counter(items).items()))


def _probabilities(answer: Answer) -> list[float]:
    return [choice.probability for choice in answer.follow_ups]
