"""The loss curve of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversation.runs.files import write_atomically

TRAINING_COLOUR, HELD_OUT_COLOUR = "#1f77b4", "#d95f02"


def draw_loss_curve(metrics: list[dict[str, Any]], loss_on: str, path: Path) -> None:
    """Draw training and held-out loss over epochs as a PNG. Its background is opaque white, for any viewer."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [(entry["epoch"], entry["loss"]) for entry in metrics if "loss" in entry]
    held_out = [(entry["epoch"], entry["eval_loss"]) for entry in metrics if "eval_loss" in entry]
    figure = Figure(figsize=(8, 4.5), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
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
