"""The figures of what a model said, each on answers where one sees what it should be."""

import pytest

from conversation.data import figures
from conversation.format.calls import Answer, FollowUp


def answer(*fragments, texts=("Why?", "vs a stack?", "Who owns it?"), numbers=("0.5", "0.3", "0.1")):
    follow_ups = tuple(FollowUp(t, n, f"t{i}") for i, (t, n) in enumerate(zip(texts, numbers, strict=True)))
    return Answer(fragments, follow_ups)


STOCK = ("Example?", "Why?", "Downsides?")


def test_shares():
    answers = [answer("A lock.", "A lock.", "Its owner waits."), answer("A queue.", "It is like a queue.")]
    assert figures.equal_fragments(answers) == pytest.approx(1 / 5)
    assert figures.fragments_without_news(answers) == pytest.approx(2 / 3)
    assert figures.stock_only([answer("A."), answer("A.", texts=STOCK)]) == 0.5
    assert figures.commonest_confidences([answer("A."), answer("B."), answer("C.", numbers=("0.4", "0.3", "0.2"))]) == (
        pytest.approx(2 / 3)
    )
    assert figures.confidence_spread([answer("A.")]) == pytest.approx(0.4)
    assert figures.distinct_2([answer("a b c", "a b")]) == pytest.approx(2 / 3)


def test_nothing_to_count_is_none():
    for figure in (figures.equal_fragments, figures.stock_only, figures.distinct_2, figures.confidence_spread):
        assert figure([]) is None


def test_brier_score_and_kendalls_tau():
    assert figures.brier_score((1.0, 0.0, 0.0), 0) == 0
    assert figures.brier_score((0.5, 0.5, 0.0), 2) == pytest.approx(0.25 + 0.25 + 1)
    assert figures.brier_score((2.0, 1.0, 1.0), 0) == pytest.approx(0.25 + 2 * 0.0625)  # scaled to the sum 1
    assert figures.kendall_tau((3, 2, 1), (0.9, 0.5, 0.1)) == 1
    assert figures.kendall_tau((1, 2, 3), (0.9, 0.5, 0.1)) == -1
    assert figures.kendall_tau((1, 1, 1), (0.9, 0.5, 0.1)) == 0
