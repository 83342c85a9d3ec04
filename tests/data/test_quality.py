"""Every check is seen to fail on a small bad set of trees, and the project's own trees pass them all."""

import dataclasses
import json

import pytest
from conftest import TREES

from conversation.data.quality import LONG_PATH, Found, Place, Quality, assess, similar, words
from conversation.data.questions import THREE_CASES, read_questions
from conversation.data.trees import Tree, read_trees
from conversation.format.calls import Answer, FollowUp
from conversation_config import HELD_OUT_QUESTIONS

MIN_TREES, MIN_EXAMPLES, MIN_DOMAINS, MIN_TREES_PER_DOMAIN = 151, 1200, 5, 25
MIN_MEAN_GAP = 0.25  # between the largest and the smallest confidence of a node
MAX_VALUE_SHARE = 0.06  # of all confidences, for any single value
MIN_SHARE_OF_2_AND_4 = 0.10  # of the nodes, for those with 2 texts and for those with 4


def shortcomings(quality: Quality) -> list[str]:
    """Where a set falls short of what this project asks of its own expert trees; empty when nowhere."""
    shares = quality.texts_per_node
    demands = (
        (quality.trees >= MIN_TREES, f"{quality.trees} trees, not {MIN_TREES}"),
        (quality.examples >= MIN_EXAMPLES, f"{quality.examples} examples, not {MIN_EXAMPLES}"),
        (len(quality.trees_by_domain) >= MIN_DOMAINS, f"{len(quality.trees_by_domain)} domains, not {MIN_DOMAINS}"),
        *(
            (count >= MIN_TREES_PER_DOMAIN, f"{count} trees in {domain}, not {MIN_TREES_PER_DOMAIN}")
            for domain, count in quality.trees_by_domain.items()
        ),
        *(
            (shares.get(n, 0) >= MIN_SHARE_OF_2_AND_4, f"{shares.get(n, 0):.1%} of the nodes have {n} texts")
            for n in (2, 4)
        ),
        (1 in shares, "no node has a single text"),
        (max(shares, key=lambda n: shares[n]) == 3, "3 texts are not the commonest number"),
        (quality.trees_with_long_paths > 0, f"no path has {LONG_PATH} turns"),
        (quality.wide_nodes > 0, "no node has all three choices followed"),
        (quality.mean_confidence_gap >= MIN_MEAN_GAP, f"mean confidence gap {quality.mean_confidence_gap:.3f}"),
        (
            quality.commonest_confidence_share <= MAX_VALUE_SHARE,
            f"{quality.commonest_confidence_share:.1%} of the confidences are {quality.commonest_confidence}",
        ),
    )
    found = [problem for met, problem in demands if not met]
    for name in (
        "repeated_questions",
        "repeated_fragments",
        "unordered_confidences",
        "too_long",
        "boilerplate",
        "test_questions",
    ):
        found += [f"{name.replace('_', ' ')}: {item}" for item in getattr(quality, name)]
    return found


def answer(*texts, follow_ups=("Why so?", "Such as?", "Not when?"), confidences=("0.61", "0.2", "0.1"), targets="xyz"):
    return Answer(texts, tuple(map(FollowUp, follow_ups, confidences, targets)))


def below(*texts, targets="uvw", follow_ups=("How?", "Who?", "Where?")):
    return answer(*texts, follow_ups=follow_ups, targets=targets)


def tree(question, *texts, name="dns", domain="systems", nodes=(), **changes):
    return Tree(name, domain, question, {name: answer(*texts, **changes), **dict(nodes)})


LEAF = {"x": below("Speed.")}
GOOD = tree("What's DNS?", "It turns names into addresses.", "A resolver asks root, TLD and zone.", name="dns")
OTHER = tree("Mutex or semaphore?", "One owner, or a counter of permits.", domain="programming", name="mutex")


@pytest.fixture(scope="module")
def own_trees() -> list[Tree]:
    return read_trees(TREES)


@pytest.fixture(scope="module")
def own_quality(own_trees) -> Quality:
    return assess(own_trees)


def test_our_trees_have_what_was_asked_for(own_quality):
    assert shortcomings(own_quality) == []


def test_our_trees_have_no_near_duplicates(own_quality, own_trees):
    roots = {tree.question for tree in own_trees}
    assert [str(p) for p in own_quality.near_questions if {p.first.text, p.second.text} <= roots] == []
    # A conversation may echo itself (a formula and its other half); two trees may not say the same.
    assert [str(p) for p in own_quality.near_fragments if p.first.place.tree != p.second.place.tree] == []
    assert [str(item) for item in own_quality.repeated_follow_ups] == []


def test_our_confidences_fall_on_average_and_use_the_range(own_quality):
    first, second, third = own_quality.mean_confidence_by_rank
    assert first > second > third
    assert all(count > 100 for count in own_quality.followed_by_rank)


def test_no_question_kept_for_testing_is_a_root_of_ours(own_trees):
    kept = {tuple(words(case.prompt.question)) for case in (*THREE_CASES, *read_questions(HELD_OUT_QUESTIONS))}
    assert [tree.question for tree in own_trees if tuple(words(tree.question)) in kept] == []


def test_figures_of_a_small_set():
    deep = tree(
        "What's DNS?",
        "It turns names into addresses.",
        nodes={
            "x": below("Names move, addresses differ.", targets="abc"),
            "y": below("example.com → 192.0.2.1.", "A record.", targets="def"),
            "z": below("Inside one host.", targets="ghi"),
            "a": below("By changing a record.", targets="jkl"),
            "l": below("Nobody does.", targets="mno"),
        },
    )
    found = assess([deep, OTHER])
    assert (found.trees, found.examples) == (2, 7)
    assert found.trees_by_domain == {"programming": 1, "systems": 1}
    assert found.examples_by_domain == {"programming": 1, "systems": 6}
    assert found.texts_per_node == {1: 0.8571, 2: 0.1429}
    assert found.examples_by_turn == {1: 2, 2: 3, 3: 1, 4: 1}
    assert (found.trees_with_long_paths, found.wide_nodes, found.followed_by_rank) == (1, 1, (2, 1, 2))
    assert found.mean_confidence_gap == 0.51
    assert found.mean_confidence_by_rank == (0.61, 0.2, 0.1)
    assert (found.commonest_confidence, found.commonest_confidence_share) == ("0.61", 0.3333)
    assert found.fragment_lengths.max == len("One owner, or a counter of permits.")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("trees", 150, "150 trees, not 151"),
        ("examples", 1199, "1199 examples, not 1200"),
        ("trees_by_domain", {"a": 200, "b": 24, "c": 50, "d": 50, "e": 50}, "24 trees in b, not 25"),
        ("trees_by_domain", {"a": 200, "b": 50, "c": 50, "d": 50}, "4 domains, not 5"),
        ("texts_per_node", {1: 0.05, 2: 0.09, 3: 0.7, 4: 0.16}, "9.0% of the nodes have 2 texts"),
        ("texts_per_node", {1: 0.05, 2: 0.25, 3: 0.7}, "0.0% of the nodes have 4 texts"),
        ("texts_per_node", {2: 0.2, 3: 0.6, 4: 0.2}, "no node has a single text"),
        ("texts_per_node", {1: 0.05, 2: 0.5, 3: 0.3, 4: 0.15}, "3 texts are not the commonest number"),
        ("trees_with_long_paths", 0, "no path has 4 turns"),
        ("wide_nodes", 0, "no node has all three choices followed"),
        ("mean_confidence_gap", 0.2499, "mean confidence gap 0.250"),
        ("commonest_confidence_share", 0.0601, "6.0% of the confidences are 0.19"),
    ],
)
def test_a_set_that_falls_short_is_told_where(own_quality, field, value, problem):
    changed = dataclasses.replace(own_quality, **{field: value, "commonest_confidence": "0.19"})
    assert shortcomings(changed) == [problem]


@pytest.mark.parametrize(
    ("field", "trees", "text"),
    [
        ("repeated_questions", [GOOD, tree("what's DNS", "A phone book.", name="dns_again")], "what's DNS"),
        (
            "repeated_questions",
            [
                GOOD,
                tree("What's a URL?", "An address.", name="url", follow_ups=("What's DNS?", "D?", "E?"), nodes=LEAF),
            ],
            "What's DNS?",
        ),
        ("repeated_fragments", [GOOD, tree("Why names?", "it turns names into addresses", name="why")], "it turns"),
        ("unordered_confidences", [tree("What's DNS?", "A.", confidences=("0.5", "0.5", "0.1"))], "0.5 / 0.5 / 0.1"),
        ("unordered_confidences", [tree("What's DNS?", "A.", confidences=("0.2", "0.5", "0.1"))], "0.2 / 0.5 / 0.1"),
        ("too_long", [tree("What's DNS?", "A" * 81)], "A" * 81),
        ("too_long", [tree("What's DNS?", "A.", follow_ups=("B" * 41, "C?", "D?"))], "B" * 41),
        ("boilerplate", [tree("What's DNS?", "It is important to know the root.")], "It is important"),
        ("boilerplate", [tree("What's DNS?", "There are many servers.")], "There are many"),
        ("repeated_follow_ups", [tree("What's DNS?", "A.", follow_ups=("What's DNS", "B?", "C?"))], "What's DNS"),
        (
            "repeated_follow_ups",
            [tree("What's DNS?", "A.", nodes={"x": below("B.", follow_ups=("Not when?", "C?", "D?"))})],
            "Not when?",
        ),
    ],
)
def test_texts_to_look_at_are_found(field, trees, text):
    found = getattr(assess(trees), field)
    said = str(found[-1].second if field.startswith("repeated_") and field != "repeated_follow_ups" else found[-1])
    assert len(found) == 1
    assert text in said
    assert f"{trees[-1].domain}/{trees[-1].name}" in said


def test_a_good_set_has_nothing_to_look_at():
    found = assess([GOOD, OTHER])
    lists = [value for value in dataclasses.asdict(found).values() if value == ()]
    assert len(lists) == 9


def test_the_same_question_may_be_asked_in_two_domains_below_the_root_only():
    mutex = tree("Mutex?", "A lock.", domain="programming", nodes=LEAF)
    trees = [tree("What's DNS?", "Names.", nodes=LEAF), mutex]
    assert assess(trees).repeated_questions == ()
    trees = [tree("What's DNS?", "Names."), tree("What's DNS?", "A lock.", domain="programming")]
    assert len(assess(trees).repeated_questions) == 1


@pytest.mark.parametrize(
    "question",
    [case.prompt.question for case in THREE_CASES]
    + ["what is a monad", "Monads?", "Explain monads", 'What does "monadic" mean?', "Why do monads exist?"]
    + ["What's the CAP theorem?", "cap theorem", "CAP?", "What did Brewer's theorem say?", "Show me an example: CAP?"]
    + ["Why not consistency, availability and partition tolerance?"],
)
def test_a_root_that_asks_what_the_structural_tests_ask_is_found(question):
    found = assess([OTHER, tree(question, "Something.")])
    assert [item.text for item in found.test_questions] == [question]
    assert any(problem.startswith("test questions") for problem in shortcomings(found))


def test_monads_and_cap_may_be_mentioned_below_a_root():
    nodes = {"x": below("It chains.", follow_ups=("CAP theorem?", "B?", "C?"))}
    trees = [tree("What's a functor?", "Half a monad.", follow_ups=("And a monad?", "D?", "E?"), nodes=nodes)]
    assert assess([OTHER, *trees, tree("What's a baseball cap good for?", "Shade.")]).test_questions == ()


def test_near_duplicates_are_named_with_their_similarity(own_trees):
    """A root that an earlier state of our trees had twice, in two domains, in other words."""
    second = tree("Why isn't 0.1 + 0.2 equal to 0.3?", "0.1 in binary never ends.", domain="computer_science", name="f")
    (pair,) = (pair for pair in assess([*own_trees, second]).near_questions if "0.1" in pair.second.text)
    assert 0.5 <= pair.similarity < 1
    assert (pair.first.text, pair.second.text) == ("Why is 0.1 + 0.2 not 0.3?", second.question)
    assert str(pair).startswith(f"{pair.similarity:.2f}  programming/float_tenth_sum: float_tenth_sum: ")


def test_similar_finds_the_same_pairs_as_comparing_all(own_trees):
    """The index skips no pair that is alike enough."""
    fragments = [text for tree in own_trees for node in tree.nodes.values() for text in node.fragments]
    texts = [Found(text, Place("t", str(i))) for i, text in enumerate(fragments[:300])]
    found = similar(texts, 0.15)
    alike = {
        (pair.first.place.node, pair.second.place.node) for pair in similar(texts, 1e-9) if pair.similarity >= 0.15
    }
    assert {(pair.first.place.node, pair.second.place.node) for pair in found} == alike
    assert len(alike) > 10


def test_similarity_tells_code_from_code():
    one, two, three = (Found(text, Place("t", "n")) for text in ("Example in C?", "Example in C++?", "example in c"))
    assert [pair.similarity == 1 for pair in similar([one, two], 0.01)] == [False]
    assert [pair.similarity == 1 for pair in similar([one, three], 0.01)] == [True]


def test_the_result_prints_for_people_and_as_json(own_quality):
    assert "computer_science" in str(own_quality)
    assert len(str(own_quality).splitlines()) < 30
    assert json.loads(json.dumps(own_quality.as_dict()))["trees"] == own_quality.trees
    bad = assess([GOOD, tree("What's DNS?", "There are many servers.", name="dns_again")])
    assert 'Questions twice in a domain: 1\n  1.00  systems/dns: dns: "What\'s DNS?"' in str(bad)
    assert "Boilerplate: 1\n  systems/dns_again: dns_again: 'There are many servers.'" in str(bad)


def test_the_card_tells_the_true_figures(own_quality):
    card = (TREES.parent / "README.md").read_text(encoding="utf-8")
    assert f"{own_quality.trees} trees, {own_quality.examples:,} examples" in card
    for domain, trees in own_quality.trees_by_domain.items():
        row = f"| {domain.replace('_', ' ')} | {trees} | {own_quality.examples_by_domain[domain]} |"
        assert row in card, f"data/README.md lacks {row}"
