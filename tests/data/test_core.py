"""The core set keeps the rules that make it learnable, and the evaluation's questions stay out of all training data."""

import csv
import json
import re
from collections import Counter
from statistics import fmean

import pytest
from core_rules import confidences, opener_perplexity, rule_problems

from conversation.data.core import STOCK_FORMS, is_stock, kind_of, only_stock
from conversation.data.examples import read_training_data
from conversation.data.quality import assess, words
from conversation.data.questions import THREE_CASES, read_held_out, read_questions
from conversation.data.trees import read_listed_trees, read_trees
from conversation.format.calls import Answer, FollowUp
from conversation_config import (
    CORE_TREES,
    DATA_SETS,
    EVALUATION_QUESTIONS,
    EXPERT_TREES,
    HELD_OUT_QUESTIONS,
    SELECTED_TOPICS,
    STARTER_TOPICS,
)


@pytest.fixture(scope="module")
def trees():
    return read_trees(CORE_TREES)


@pytest.fixture(scope="module")
def nodes(trees):
    return [(name, answer) for tree in trees for name, answer in tree.nodes.items()]


@pytest.fixture(scope="module")
def card():
    """data/README.md, its line breaks as spaces."""
    return " ".join((CORE_TREES.parent / "README.md").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def scores():
    with (CORE_TREES.parent / "core_scores.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def held_out():
    return [case for path in EVALUATION_QUESTIONS for case in read_held_out(path)]


def test_600_topics_are_asked_six_ways_and_answered_three_their_children_three_and_two(trees):
    assert Counter(tree.domain for tree in trees) == dict.fromkeys(
        ("abstract_concepts", "computer_science", "philosophy", "programming", "systems"), 120
    )
    for tree in trees:
        assert len(tree.nodes) == 4, tree.name
        asked = tree.questions_of_nodes
        assert [len(asked[name]) for name in tree.nodes] == [6, 3, 3, 3], tree.name
        every = [tuple(words(question)) for questions in asked.values() for question in questions]
        assert len(every) == len(set(every)) and not [q for q in asked[tree.name][4:] if re.search(r'[\d"<>()]', q)]
        assert [len(tree.wordings(name)) for name in tree.nodes] == [3, 2, 2, 2], tree.name
        assert {choice.target for choice in tree.nodes[tree.name].follow_ups} == set(tree.nodes) - {tree.name}
        assert len(tree.examples()) == len({example.text for example in tree.examples()}) == 15
        assert {e.answer for e in tree.examples("first")} == set(tree.nodes.values()), tree.name


def test_targets_and_confidences_follow_from_what_can_be_seen(nodes):
    assert [problem for name, answer in nodes for problem in rule_problems(name, answer)] == []
    triples = Counter(tuple(each.confidence for each in answer.follow_ups) for _, answer in nodes)
    assert triples.most_common(1)[0][1] / len(nodes) < 0.25 and len(triples) > 12


def test_fragments_have_roles_and_few_openers(trees):
    roots = [answer.fragments for tree in trees for answer in tree.wordings(tree.name)]
    first, second, third = ([each[i] for each in roots if len(each) > i] for i in range(3))
    assert opener_perplexity(first) < 10 and opener_perplexity(second) < 30 and opener_perplexity(third) < 30
    every = [
        fragment
        for tree in trees
        for name in tree.nodes
        for answer in tree.wordings(name)
        for fragment in answer.fragments
    ]
    assert 5 < fmean(len(words(fragment)) for fragment in every) < 8 and max(map(len, every)) <= 56
    assert not [fragment for fragment in every if any(character.isdigit() for character in fragment)]
    assert {len(answer.fragments) for tree in trees for n in tree.nodes for answer in tree.wordings(n)} == {2, 3}
    assert [text for text, count in Counter(map(str.casefold, every)).items() if count > 1] == []


def test_follow_ups_are_of_few_kinds_and_most_answers_name_a_thing_of_the_topic(trees, nodes):
    answered = Counter(
        kind_of(choice.target, tree.name) for tree in trees for choice in tree.nodes[tree.name].follow_ups
    )
    assert answered["example"] >= 150 and answered["vs"] >= 80 and answered["why"] + answered["how"] >= 80
    assert sum(only_stock(answer.follow_ups) for _, answer in nodes) / len(nodes) < 1 / 3
    texts = [each.text for _, answer in nodes for each in answer.follow_ups]
    assert 0.4 < sum(map(is_stock, texts)) / len(texts) < 0.75


def test_the_lists_of_topics_are_even_over_the_domains_with_all_that_the_evaluation_knows(held_out):
    starter, selected = (read_listed_trees(path) for path in (STARTER_TOPICS, SELECTED_TOPICS))
    assert set(Counter(tree.domain for tree in starter).values()) == {12} and len(starter) == 60
    assert set(Counter(tree.domain for tree in selected).values()) == {60} and len(selected) == 300
    known, small, large = (
        {case.topic for case in held_out if case.set_name == "known"},
        {tree.name for tree in starter},
        {tree.name for tree in selected},
    )
    assert known <= small <= large


def test_some_starter_topics_have_a_name_that_is_written_otherwise_in_targets():
    """A model that has not seen such names copies a hyphen or a capital from the question into a target."""
    names = [tree.question.partition(" ")[2] for tree in read_listed_trees(STARTER_TOPICS)]
    assert sum("-" in name for name in names) >= 5 and sum(name != name.lower() for name in names) >= 5


def test_no_held_out_question_or_answer_is_in_any_training_data(held_out, trees):
    training = [example for path in DATA_SETS["both"] for example in read_training_data(path)]
    texts = {fragment.casefold() for example in training for fragment in example.answer.fragments}
    assert [c.topic for c in held_out if any(f.casefold() in texts for f in c.answer.fragments)] == []
    roots = {tuple(words(e.prompt.question)) for e in training if not e.prompt.history}
    asked = [case for case in held_out if case.is_root]
    assert [case.prompt.question for case in asked if tuple(words(case.prompt.question)) in roots] == []
    asked_in = {t.name: {tuple(words(q)) for each in t.questions_of_nodes.values() for q in each} for t in trees}
    asked = [case for case in held_out if case.set_name == "known"]
    assert [c.topic for c in asked if tuple(words(c.prompt.question)) in asked_in[c.topic]] == []
    kept_out = [*THREE_CASES, *read_questions(HELD_OUT_QUESTIONS)]
    asked = [case.prompt.question for case in kept_out if not case.prompt.history]
    assert [question for question in asked if tuple(words(question)) in roots] == []
    names = {tree.name for tree in trees}
    unseen = {case.topic for case in held_out if case.set_name == "unseen"}
    assert not unseen & names
    mentioned = {word for root in roots for word in root}
    single = {topic for topic in unseen if "_" not in topic}
    assert not single & mentioned


def test_the_held_out_sets_are_fifty_each_half_of_them_follow_ups(held_out):
    assert Counter((case.set_name, case.is_root) for case in held_out) == {
        (name, root): 25 for name in ("known", "unseen") for root in (True, False)
    }
    assert set(Counter((case.set_name, case.domain) for case in held_out).values()) == {10}
    assert all(0 <= case.followed < 3 for case in held_out)


# --- the card --------------------------------------------------------------------------------------------------------


def missing(card, *sentences):
    return [sentence for sentence in sentences if sentence not in card]


def test_the_card_tells_the_size_and_shape_of_the_core_set(card, trees, nodes):
    examples = [example for tree in trees for example in tree.examples()]
    starter, selected = (
        [example for tree in read_listed_trees(path) for example in tree.examples()]
        for path in (STARTER_TOPICS, SELECTED_TOPICS)
    )
    wordings = {
        part: [
            len(answer.fragments)
            for tree in trees
            for name in tree.nodes
            if (name == tree.name) == (part == "roots")
            for answer in tree.wordings(name)
        ]
        for part in ("roots", "children")
    }
    roots, children = Counter(wordings["roots"]), Counter(wordings["children"])
    texts = {choice.text for _, answer in nodes for choice in answer.follow_ups}
    asked_at_root = sum(not example.prompt.history for example in examples)
    assert roots.keys() == {3}
    assert not missing(
        card,
        f"{len(trees)} topics, {len(nodes):,} nodes, {len(examples):,} examples",
        f"`starter`, 60 of the core topics ({len(starter):,} examples)",
        f"`selected`, 300 of the core topics ({len(selected):,} examples)",
        f"{asked_at_root:,} examples ask a root, {len(examples) - asked_at_root:,} a child",
        f"{sum(wordings['roots'] + wordings['children']):,} fragments, all different,"
        f" in {roots.total() + children.total():,} wordings: the {roots[3]:,} of the roots have three each;"
        f" of the {children.total():,} of the children {children[2]:,} have two and {children[3]} three",
        f"{3 * len(nodes):,}, of which {len(texts):,} differ in text",
    )


def test_the_card_tells_the_lengths_and_confidences_of_the_core_set(card, trees):
    quality = assess(trees)
    question, fragment, follow_up = (
        f"{lengths.mean:.0f} ({lengths.max})"
        for lengths in (quality.question_lengths, quality.fragment_lengths, quality.follow_up_lengths)
    )
    first, second, third = quality.mean_confidence_by_rank
    between = sum(pair.first.place.tree != pair.second.place.tree for pair in quality.near_fragments)
    assert quality.repeated_fragments == quality.unordered_confidences == quality.repeated_follow_ups == ()
    assert not missing(
        card,
        f"root questions, first form {question}, fragments {fragment}, follow-ups {follow_up}",
        f"{first:.2f}, {second:.2f} and {third:.2f} on average, always falling,"
        f" {quality.mean_confidence_gap:.2f} from first to third",
        f"{len(quality.repeated_questions)} pairs of topics share an own or vs question",
        f"{between} pairs of fragments of different topics",
    )
    assert len(quality.boilerplate) == 6


def test_the_card_tells_the_kinds_openers_and_triples_of_the_core_set(card, trees, nodes):
    choices = [(kind_of(choice.target, name), choice) for name, answer in nodes for choice in answer.follow_ups]
    offered = Counter(kind for kind, _ in choices)
    answered = Counter(kind_of(c.target, tree.name) for tree in trees for c in tree.nodes[tree.name].follow_ups)
    for kind, count in offered.items():
        row = card[card.index(f'| {kind} | "') :].split("|")
        assert [cell.strip() for cell in row[3:5]] == [f"{count:,}", f"{answered[kind]:,}"], kind
    assert all(is_stock(choice.text) == (kind not in ("own", "vs")) for kind, choice in choices)
    compared = {(t.name, c.target) for t in trees for c in t.nodes[t.name].follow_ups if "_vs_" in c.target}
    both_ways = sum(
        (target[len(name) + 4 :], f"{target[len(name) + 4 :]}_vs_{name}") in compared for name, target in compared
    )
    perplexities = [
        opener_perplexity(a.fragments[i] for tree in trees for a in tree.wordings(tree.name)) for i in range(3)
    ]
    first, second, third = (f"{value:.1f}" for value in perplexities)
    assert not missing(
        card,
        f"{sum(is_stock(choice.text) for _, choice in choices) / len(choices):.0%}".replace(
            "%", " % of the follow-ups"
        ),
        f"In {both_ways} of the {answered['vs']} answered comparisons",
        f"{first}, {second} and {third}, where the expert answers",
    )
    triples = Counter(tuple(each.confidence for each in answer.follow_ups) for _, answer in nodes)
    cells = [f"| {' '.join(triple)} ({count}) |" for triple, count in triples.items()]
    assert not missing(card, f"The {len(triples)} triples", f"{len(nodes):,} answers have each", *cells)


def test_the_card_shows_a_core_tree_as_it_is(trees):
    text = (CORE_TREES.parent / "README.md").read_text(encoding="utf-8")
    shown = json.loads(text.split("```json\n")[1].split("```")[0])
    whole = json.loads((CORE_TREES / "systems" / f"{shown['root']}.json").read_text(encoding="utf-8"))
    assert shown == {**whole, "nodes": {name: whole["nodes"][name] for name in shown["nodes"]}}


def test_the_card_shows_an_expert_example_as_it_is():
    text = (CORE_TREES.parent / "README.md").read_text(encoding="utf-8")
    (shown,) = (part for part in text.split("```\n") if part.startswith("<start_of_turn>developer"))
    assert shown.rstrip("\n") in {example.text for example in read_training_data(EXPERT_TREES)}


def test_the_card_tells_the_marks_of_the_judges(card, trees, scores):
    places = [(row["domain"], row["topic"]) for row in scores]
    assert places == sorted(set(places)) and set(places) == {(tree.domain, tree.name) for tree in trees}
    assert {row[measure] for row in scores for measure in ("truth", "relevance")} <= {"0", "1", "2"}
    domains = sorted({domain for domain, _ in places})
    groups = [*([row for row in scores if row["domain"] == domain] for domain in domains), scores]
    for measure in ("truth", "relevance"):
        means = " | ".join(f"{fmean(int(row[measure]) for row in rows):.2f}" for rows in groups)
        assert f"| {measure} | {means} |" in card
    assert f"| topics marked | {' | '.join(str(len(rows)) for rows in groups)} |" in card
    best = sum(row["truth"] == row["relevance"] == "2" for row in scores)
    assert f"{best} of the {len(scores)} have both marks at 2" in card


def test_the_card_tells_how_the_sets_overlap(card, trees):
    expert = read_trees(EXPERT_TREES)
    names = {tree.name for tree in trees} & {tree.name for tree in expert}
    roots = {tuple(words(tree.question)) for tree in expert}
    shared = sum(any(tuple(words(question)) in roots for question in tree.questions) for tree in trees)
    assert f"{len(names)} topics have one name in both, and {shared} core topics are asked at a root" in card


# --- the rules themselves --------------------------------------------------------------------------------------------


def answer(*targets, numbers=("0.57", "0.22", "0.13")):
    return Answer(
        ("A.",), tuple(FollowUp(f"{i}?", n, t) for i, (t, n) in enumerate(zip(targets, numbers, strict=True)))
    )


def test_the_kind_of_a_follow_up_is_read_from_its_target():
    kinds = [kind_of(f"mutex_{suffix}", "mutex") for suffix in ("example", "vs_semaphore", "release", "limit")]
    assert kinds == ["example", "vs", "own", "limit"]


def test_confidences_fall_and_an_example_leads():
    for first in ("example", "how", "why", "own"):
        for third in ("own", "vs", "limit", "use", "origin"):
            numbers = [float(number) for number in confidences((first, "own", third))]
            assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == 3
    assert confidences(("example", "own", "vs")) == ("0.57", "0.22", "0.13")
    assert float(confidences(("own", "why", "origin"))[2]) < 0.1


def test_a_broken_rule_is_named():
    good = answer("mutex_example", "mutex_release", "mutex_vs_semaphore")
    assert rule_problems("mutex", good) == []
    assert "does not begin" in rule_problems("mutex", answer("mutex_example", "release", "mutex_vs_semaphore"))[0]
    wrong = answer("mutex_example", "mutex_release", "mutex_vs_semaphore", numbers=("0.44", "0.28", "0.17"))
    assert "expected 0.57, 0.22, 0.13" in rule_problems("mutex", wrong)[0]


def test_stock_forms_are_known_whatever_their_case():
    assert is_stock("example?") and is_stock(" Why? ") and not is_stock("vs a semaphore?")
    assert all(is_stock(form) for forms in STOCK_FORMS.values() for form in forms)


def test_opener_perplexity_is_one_for_one_opener_and_n_for_n():
    assert opener_perplexity(["A b.", "a c."]) == pytest.approx(1)
    assert opener_perplexity(["A b.", "The c.", "It d."]) == pytest.approx(3)
