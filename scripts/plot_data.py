"""Draw the pictures of data/README.md: statistics.png of the expert trees, core_statistics.png of the core set."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.data.core import kind_of
from conversation.data.quality import MAX_FOLLOW_UP, MAX_FRAGMENT, assess
from conversation.data.trees import Tree, read_trees
from conversation.errors import run_main
from conversation_config import CORE_TREES, EXPERT_TREES, PROJECT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DATA = PROJECT / "data"
BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#dd8a2b", "#4d9a5b", "#8a8f98"
RANKS = (("first", BLUE), ("second", ORANGE), ("third", GREEN))
KIND_COLOURS = {
    "example": BLUE,
    "how": "#5b9bd5",
    "why": "#9cc3e6",
    "own": GREEN,
    "vs": ORANGE,
    "limit": "#b9bdc4",
    "use": GREY,
    "origin": "#5a5f68",
}
SHADES = (BLUE, "#5b9bd5", "#9cc3e6", "#c9deef", "#e3eef7")


def main() -> int:
    expert, core = read_trees(EXPERT_TREES), read_trees(CORE_TREES)
    draw(
        DATA / "statistics.png",
        f"The expert set: {len(expert)} conversation trees, {count_examples(expert):,} examples",
        expert,
        (draw_domains, draw_turns, draw_texts_per_node, draw_lengths, draw_confidences, draw_gaps),
    )
    draw(
        DATA / "core_statistics.png",
        f"The core set: {len(core)} topics, {count_examples(core):,} examples",
        core,
        (draw_kinds, draw_openers, draw_scores, draw_lengths, draw_triples, draw_texts_per_wording),
    )
    return 0


def draw(path: Path, title: str, trees: list[Tree], panels: Sequence[Callable[[Axes, list[Tree]], None]]) -> None:
    """Six panels under a title, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    plt.rcdefaults()
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"})
    layout = ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.12, hspace=0.05)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), facecolor="white", layout=layout)
    for axis, panel in zip(axes.flat, panels, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_facecolor("white")
        panel(axis, trees)
        if axis.get_ylim()[1] > 1000:
            axis.yaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(title, fontsize=14)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def count_examples(trees: list[Tree]) -> int:
    return sum(len(tree.examples()) for tree in trees)


# --- panels of either set --------------------------------------------------------------------------------------------


def draw_domains(axis: Axes, trees: list[Tree]) -> None:
    quality = assess(trees)
    domains = list(quality.trees_by_domain)[::-1]
    bars = axis.barh([name.replace("_", " ") for name in domains], [quality.examples_by_domain[d] for d in domains])
    bars_of(axis, bars, [f"{quality.examples_by_domain[d]} in {quality.trees_by_domain[d]} trees" for d in domains])
    axis.set_title("Examples by domain")
    axis.set_xlim(0, 1.35 * max(quality.examples_by_domain.values()))
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)


def draw_turns(axis: Axes, trees: list[Tree]) -> None:
    turns = assess(trees).examples_by_turn
    bars_of(axis, axis.bar(list(map(str, turns)), list(turns.values())), list(turns.values()))
    axis.set_title("Depth: examples by turn of the conversation")
    axis.set_xlabel("turn (1: the root question)")


def draw_texts_per_node(axis: Axes, trees: list[Tree]) -> None:
    counts = sorted(Counter(len(node.fragments) for tree in trees for node in tree.nodes.values()).items())
    total = sum(count for _, count in counts)
    bars = axis.bar([str(n) for n, _ in counts], [count for _, count in counts])
    bars_of(axis, bars, [f"{count / total:.0%}" for _, count in counts])
    axis.set_title("Fragments per answer")
    axis.set_xlabel("fragments")


def draw_lengths(axis: Axes, trees: list[Tree]) -> None:
    nodes = [node for tree in trees for node in tree.nodes.values()]
    step = range(0, MAX_FRAGMENT + 4, 4)
    follow_ups = [len(choice.text) for node in nodes for choice in node.follow_ups]
    fragments = [
        len(text) for tree in trees for name in tree.nodes for each in tree.wordings(name) for text in each.fragments
    ]
    axis.hist(follow_ups, step, color=ORANGE, alpha=0.75, label=f"follow-ups (at most {MAX_FOLLOW_UP})")
    axis.hist(fragments, step, color=BLUE, alpha=0.75, label=f"answer fragments (at most {MAX_FRAGMENT})")
    axis.set_title("Lengths of the texts")
    axis.set_xlabel("characters")
    axis.set_ylabel("texts")
    axis.legend(frameon=False, loc="upper left", fontsize=9)
    axis.set_xlim(0, MAX_FRAGMENT + 4)
    axis.margins(y=0.3)


def draw_confidences(axis: Axes, trees: list[Tree]) -> None:
    nodes = [node for tree in trees for node in tree.nodes.values()]
    step = [i / 100 - 0.005 for i in range(0, 102, 2)]
    for rank, (name, colour) in enumerate(RANKS):
        values = [node.follow_ups[rank].probability for node in nodes]
        axis.hist(values, step, color=colour, alpha=0.7, label=f"{name} (mean {sum(values) / len(values):.2f})")
    axis.set_title("Confidence of the three follow-ups")
    axis.set_xlabel("confidence")
    axis.set_ylabel("follow-ups")
    axis.set_xlim(0, 0.9)
    axis.legend(frameon=False, fontsize=9)


def draw_gaps(axis: Axes, trees: list[Tree]) -> None:
    values = [[choice.probability for choice in node.follow_ups] for tree in trees for node in tree.nodes.values()]
    gaps = [max(three) - min(three) for three in values]
    mean = sum(gaps) / len(gaps)
    axis.hist(gaps, [i / 100 - 0.005 for i in range(0, 102, 4)], color=GREY)
    axis.axvline(mean, color="black", linewidth=1)
    axis.margins(y=0.15)
    axis.text(mean + 0.015, axis.get_ylim()[1] * 0.98, f"mean {mean:.2f}", va="top")
    axis.set_title("Confidence gap within an answer")
    axis.set_xlabel("largest minus smallest confidence")
    axis.set_ylabel("answers")
    axis.set_xlim(0, 0.9)


# --- panels of the core set ------------------------------------------------------------------------------------------


def draw_kinds(axis: Axes, trees: list[Tree]) -> None:
    places = [
        Counter(kind_of(answer.follow_ups[i].target, name) for tree in trees for name, answer in tree.nodes.items())
        for i in range(3)
    ]
    stacked(axis, [[(kind, place[kind], colour) for kind, colour in KIND_COLOURS.items()] for place in places])
    axis.set_title("Kinds of the three follow-ups")


def draw_openers(axis: Axes, trees: list[Tree]) -> None:
    answers = [answer.fragments for tree in trees for answer in tree.wordings(tree.name)]
    places = []
    for i in range(3):
        found = Counter(
            fragments[i].split()[0].strip(",:").replace("Such", "Such as")
            for fragments in answers
            if len(fragments) > i
        )
        common = [(word, count) for word, count in found.most_common(5) if count > 0.03 * found.total()]
        rest = found.total() - sum(count for _, count in common)
        parts = [(word, count, colour) for (word, count), colour in zip(common, SHADES, strict=False)]
        places.append([*parts, ("others", rest, GREY)] if rest else parts)
    stacked(axis, places)
    axis.set_title("First word of a root's three fragments")


def draw_scores(axis: Axes, trees: list[Tree]) -> None:
    with (DATA / "core_scores.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    domains = sorted({tree.domain for tree in trees}, reverse=True)
    for offset, (measure, colour) in zip((0.2, -0.2), (("truth", BLUE), ("relevance", ORANGE)), strict=True):
        means = []
        for domain in domains:
            values = [int(row[measure]) for row in rows if row["domain"] == domain]
            means.append(sum(values) / len(values))
        bars = axis.barh([i + offset for i in range(len(domains))], means, 0.36, color=colour, label=measure)
        axis.bar_label(bars, [f"{mean:.2f}" for mean in means], padding=3, fontsize=9)
    axis.set_yticks(range(len(domains)), [domain.replace("_", " ") for domain in domains])
    axis.set_title(f"Judges' marks, {len(rows)} topics")
    axis.set_xlabel("mean mark (0 to 2)")
    axis.set_xlim(0, 2.3)
    axis.set_xticks((0, 1, 2))
    axis.set_ylim(-0.6, len(domains) + 0.35)
    axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)


def draw_triples(axis: Axes, trees: list[Tree]) -> None:
    answers = [answer for tree in trees for answer in tree.nodes.values()]
    found = Counter(tuple(choice.probability for choice in answer.follow_ups) for answer in answers)
    commonest = found.most_common()
    for rank, (name, colour) in enumerate(RANKS):
        values = [triple[rank] for triple, _ in commonest]
        axis.scatter(
            range(1, len(values) + 1),
            values,
            [14 + count / 3 for _, count in commonest],
            color=colour,
            alpha=0.8,
            label=name,
        )
    axis.set_title(f"The {len(commonest)} confidence triples, commonest first")
    axis.set_xlabel("triple (area: answers that have it)")
    axis.set_ylabel("confidence")
    axis.set_xticks(range(1, len(commonest) + 1, 2))
    axis.set_ylim(0, 0.85)
    axis.legend(frameon=False, fontsize=9, ncols=3, loc="upper left", markerscale=0.6)


def draw_texts_per_wording(axis: Axes, trees: list[Tree]) -> None:
    counts: list[Counter[int]] = [Counter(), Counter()]
    for tree in trees:
        for name in tree.nodes:
            counts[name != tree.name].update(len(answer.fragments) for answer in tree.wordings(name))
    for offset, (name, count, colour) in zip(
        (-0.2, 0.2), (("roots", counts[0], BLUE), ("children", counts[1], ORANGE)), strict=True
    ):
        bars = axis.bar([i + offset for i in range(2)], [count[2], count[3]], 0.36, color=colour, label=name)
        axis.bar_label(bars, [f"{count[2]:,}", f"{count[3]:,}"], padding=3, fontsize=9)
    axis.set_xticks((0, 1), ("2", "3"))
    axis.set_title("Fragments per wording of an answer")
    axis.set_xlabel("fragments")
    axis.set_ylabel("wordings")
    axis.margins(y=0.12)
    axis.legend(frameon=False, fontsize=9, loc="upper right")


# --- drawing ---------------------------------------------------------------------------------------------------------


def stacked(axis: Axes, places: Sequence[Sequence[tuple[str, int, str]]]) -> None:
    """One full bar for the first, second and third place, parted in (name, count, colour)."""
    for y, parts in enumerate(places):
        left, total = 0.0, sum(count for _, count, _ in parts)
        for name, count, colour in parts:
            width = count / total
            axis.barh(y, width, 0.7, left, color=colour, edgecolor="white", linewidth=1)
            narrow = width < 0.02 * len(name) + 0.02
            axis.text(
                left + width / 2,
                y,
                "" if width < 0.03 else name if narrow else f"{name}\n{width:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                rotation=90 if narrow else 0,
                color="white" if sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) < 430 else "black",
            )
            left += width
    axis.set_yticks(range(len(places)), [name for name, _ in RANKS][: len(places)])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_visible(False)
    axis.spines[["bottom", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def bars_of(axis: Axes, bars, labels) -> None:
    """Colour bars and label the end of each."""
    for bar in bars:
        bar.set_color(BLUE)
    axis.bar_label(bars, labels, padding=3, fontsize=9)
    axis.margins(y=0.12)


if __name__ == "__main__":
    run_main(main)
