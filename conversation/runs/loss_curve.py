"""The loss curve of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversation.runs.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING_COLOUR, HELD_OUT_COLOUR = "#1f77b4", "#d95f02"


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, with an opaque white background, for any viewer.

    Its settings are matplotlib's own. A matplotlibrc of the user's, or in the working folder, may ask for LaTeX.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_loss_curve(metrics: list[dict[str, Any]], loss_on: str, path: Path) -> None:
    """Draw training and held-out loss over epochs as a PNG."""
    import io

    training = [(entry["epoch"], entry["loss"]) for entry in metrics if "loss" in entry]
    held_out = [(entry["epoch"], entry["eval_loss"]) for entry in metrics if "eval_loss" in entry]
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    if training:
        axes.plot(*zip(*training, strict=True), color=TRAINING_COLOUR, linewidth=1.8, label="training, by window")
    if held_out:
        # Two points get no line: it would suggest a course that nobody measured.
        style: dict[str, Any] = {"marker": "o", "linestyle": "--" if len(held_out) > 2 else "none"}
        style |= {"color": HELD_OUT_COLOUR, "clip_on": False, "zorder": 3}
        axes.plot(*zip(*held_out, strict=True), label="held-out trees", **style)
        for epoch, loss in (held_out[0], held_out[-1]):
            axes.annotate(
                f"{loss:.3f}", (epoch, loss), xytext=(8, 8), textcoords="offset points", color=HELD_OUT_COLOUR
            )
    counted = "completion" if loss_on == "completion" else "all"
    axes.set(xlabel="epoch", ylabel=f"loss per token ({counted} tokens), nats", ylim=(0, None))
    axes.set_xlim(0, max((epoch for epoch, _ in training + held_out), default=1) * 1.08)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if training or held_out:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
