"""Figures of a model's answers: repetition, stock follow-ups, confidences. Plain text in, numbers out.

A figure is a share in [0, 1], or None where there is nothing to count; Kendall's tau is in [-1, 1], the Brier score in
[0, 2]. They are over valid answers; how many are valid is a figure of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean

from conversation.data.core import only_stock
from conversation.format.calls import Answer

FUNCTION_WORDS = frozenset(
    """a about after all also an and any are as at be because been before being both but by can could did do does done
    down each either else even ever every few for from had has have he her here hers him his how i if in into is it its
    itself just less like many may me might more most much must my neither never no none nor not now of off often on
    once one only or other our out over own per same say she should since so some such than that the their them then
    there these they this those through to too under unless unlike until up upon us use used uses very was we were what
    when where whether which while who whose why will with within without would yet you your example""".split()
)
"""English words that carry no content of their own, and the markers of an example."""


def share(flags: Iterable[bool]) -> float | None:
    """The share of the flags that are set."""
    counted = list(flags)
    return sum(counted) / len(counted) if counted else None


def content_words(text: str) -> set[str]:
    """The words of a text that are not function words, in lower case."""
    return set(re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text.casefold())) - FUNCTION_WORDS


def equal_fragments(answers: Sequence[Answer]) -> float | None:
    """The share of fragments that equal an earlier one of the same answer, letter case aside."""
    return share(
        fragment.strip().casefold() in {earlier.strip().casefold() for earlier in answer.fragments[:i]}
        for answer in answers
        for i, fragment in enumerate(answer.fragments)
    )


def fragments_without_news(answers: Sequence[Answer]) -> float | None:
    """The share of fragments after the first that add no content word to those before them in the same answer."""
    return share(
        not content_words(fragment) - set().union(*map(content_words, answer.fragments[:i]))
        for answer in answers
        for i, fragment in enumerate(answer.fragments)
        if i > 0
    )


def distinct_2(answers: Sequence[Answer]) -> float | None:
    """Distinct pairs of neighbouring words over all pairs in all fragments (distinct-2 of Li et al. 2016)."""
    pairs = [
        pair
        for answer in answers
        for fragment in answer.fragments
        for words in [re.findall(r"\w+(?:['’-]\w+)*", fragment.casefold())]
        for pair in pairwise(words)
    ]
    return len(set(pairs)) / len(pairs) if pairs else None


def commonest_confidences(answers: Sequence[Answer]) -> float | None:
    """The share of answers that have the commonest triple of confidences."""
    triples = Counter(tuple(each.probability for each in answer.follow_ups) for answer in answers)
    return triples.most_common(1)[0][1] / len(answers) if answers else None


def stock_only(answers: Sequence[Answer]) -> float | None:
    """The share of answers whose three follow-ups are all stock forms (`data.core.STOCK_FORMS`)."""
    return share(only_stock(answer.follow_ups) for answer in answers)


def confidence_spread(answers: Sequence[Answer]) -> float | None:
    """The mean difference between an answer's largest and smallest confidence."""
    spreads = [max(p) - min(p) for p in ([each.probability for each in answer.follow_ups] for answer in answers)]
    return fmean(spreads) if spreads else None


def brier_score(confidences: Sequence[float], followed: int) -> float:
    """The sum over the follow-ups of (confidence - 1 for the one that is followed, 0 for another) squared (Brier 1950).

    The confidences are scaled to the sum 1, as a tree follows one of the three.
    """
    total = sum(confidences) or 1.0
    return sum((value / total - (i == followed)) ** 2 for i, value in enumerate(confidences))


def kendall_tau(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Kendall's tau-a of two sequences of numbers: 1 for the same order, -1 for the reverse (Kendall 1938)."""
    pairs = [(i, j) for i in range(len(ours)) for j in range(i)]
    signs = [(ours[i] - ours[j]) * (theirs[i] - theirs[j]) for i, j in pairs]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(pairs)
