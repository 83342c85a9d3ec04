#!/usr/bin/env python3
"""Draw data/statistics.png: domains, depth, lengths and confidences of the conversation trees."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.data.quality import MAX_FOLLOW_UP, MAX_FRAGMENT, assess
from conversation.data.trees import Tree, read_trees
from conversation.errors import run_main
from conversation_config import PROJECT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#dd8a2b", "#4d9a5b", "#8a8f98"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training_data", type=Path, default=PROJECT / "data" / "conversation_trees")
    parser.add_argument("--output", type=Path, default=PROJECT / "data" / "statistics.png")
    args = parser.parse_args()
    trees = read_trees(args.training_data)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"})
    layout = ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.12, hspace=0.05)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), facecolor="white", layout=layout)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_facecolor("white")
    draw_domains(axes[0, 0], trees)
    draw_turns(axes[0, 1], trees)
    draw_texts_per_node(axes[0, 2], trees)
    draw_lengths(axes[1, 0], trees)
    draw_confidences(axes[1, 1], trees)
    draw_gaps(axes[1, 2], trees)
    nodes = sum(len(tree.nodes) for tree in trees)
    figure.suptitle(f"{len(trees)} conversation trees, {nodes:,} examples", fontsize=14)
    figure.savefig(args.output, dpi=120, facecolor="white", metadata={"Software": None})
    return 0


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
    fragments = [len(text) for node in nodes for text in node.fragments]
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
    for rank, (name, colour) in enumerate((("first", BLUE), ("second", ORANGE), ("third", GREEN))):
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


def bars_of(axis: Axes, bars, labels) -> None:
    """Colour bars and label the end of each."""
    for bar in bars:
        bar.set_color(BLUE)
    axis.bar_label(bars, labels, padding=3, fontsize=9)
    axis.margins(y=0.12)


if __name__ == "__main__":
    run_main(main)
