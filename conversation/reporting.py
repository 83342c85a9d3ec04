"""What a person reads after a run: the loss curve and report.md, made from the files of the run folder alone."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

from conversation.errors import UserError
from conversation.files import read_json, write_atomically
from conversation.runs import ATTEMPTS, RUN_NAME, RunFolder

TRAINING_COLOUR, HELD_OUT_COLOUR = "#1f77b4", "#d95f02"


def write_report(run: RunFolder) -> None:
    """Draw loss_curve.png and write report.md from what the run folder holds so far."""
    record = run.read()
    metrics = run.read_metrics()
    draw_loss_curve(metrics, record["config"]["loss_on"], run.loss_curve)
    tests = read_json(run.structural_tests) if record.get("structural_tests") else None
    write_atomically(run.report, _report(run, record, metrics, tests).encode())


def summary(record: dict[str, Any]) -> str:
    """A finished run in three lines, for the console."""
    training, tests = record["training"], record["structural_tests"]
    held_out = f", held out {training['held_out_loss']:.3f}" if training["held_out_loss"] is not None else ""
    return (
        f"Loss:      {training['first_window_loss']:.3f} to {training['last_window_loss']:.3f}{held_out}; "
        f"{training['steps']} steps in {training['seconds'] / 60:.1f} minutes\n"
        f"Tests:     {tests['passed_tests']} of 3 structural tests passed\n"
        f"Held out:  {tests['held_out_valid']} of {tests['held_out_questions']} questions answered in valid form, "
        f"{tests['held_out_distinct']} with three distinct follow-ups"
    )


def draw_loss_curve(metrics: list[dict[str, Any]], loss_on: str, path: Path) -> None:
    """Training and held-out loss over epochs, as a PNG on an opaque light ground, so that any viewer shows it."""
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
        # Points without a line while there are only two: a straight line between them would tell of a course unseen.
        style = {"marker": "o", "linestyle": "--" if len(held_out) > 2 else "none", "clip_on": False, "zorder": 3}
        axes.plot(*zip(*held_out, strict=True), color=HELD_OUT_COLOUR, label="held-out trees", **style)
        for epoch, loss in (held_out[0], held_out[-1]):
            place = {"xytext": (8, 8), "textcoords": "offset points", "color": HELD_OUT_COLOUR}
            axes.annotate(f"{loss:.3f}", (epoch, loss), **place)
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


def previous_run(run: RunFolder) -> dict[str, Any] | None:
    """The record of the published run before this one, with its folder's `name`; None when there is none."""
    root = run.path.parent.parent if run.path.parent.name == ATTEMPTS else run.path.parent
    started = run.read()["started"]
    found = []
    for path in root.glob(f"{RUN_NAME}/run.json"):
        try:
            record = RunFolder(path.parent).read()
        except UserError:
            continue  # a broken record of another run does not spoil this one's report
        if record.get("published") and record["started"] < started:
            found.append({**record, "name": path.parent.name})
    return max(found, key=lambda record: record["started"], default=None)


def _report(run: RunFolder, record: dict[str, Any], metrics: list[dict[str, Any]], tests: dict[str, Any] | None) -> str:
    parts = [
        f"# Training run of {record['started'][:10]}",
        _summary(record, tests),
        "![Training and held-out loss over epochs](loss_curve.png)",
        "## Figures",
        _figures(record, previous_run(run)),
        "## The three structural tests",
        _tests(tests),
        "## Held-out questions",
        _held_out(tests),
        "## What it was trained with",
        _settings(record),
        "## Repeat it",
        f"```\n{_command(record)}\n```\n",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(record: dict[str, Any], tests: dict[str, Any] | None) -> str:
    config, training = record["config"], record.get("training")
    if not training:
        return f"Training of `{config['base_model']}` under way or stopped: no final figures yet."
    text = (
        f"`{config['base_model']}`, LoRA-trained for {training['steps']} steps on "
        f"{record['data']['statistics']['training_examples']} examples: the training loss went from "
        f"{training['first_window_loss']:.3f} in the first window to {training['last_window_loss']:.3f} in the last"
    )
    if training["held_out_loss"] is not None:
        text += f", the loss on held-out trees is {training['held_out_loss']:.3f}"
    text += ". "
    if tests:
        text += f"**{tests['passed_tests']} of 3 structural tests passed.**"
    elif record.get("merge"):
        text += "The model is merged and verified, not tested yet."
    else:
        text += "Not merged yet."
    return text


def _figures(record: dict[str, Any], before: dict[str, Any] | None) -> str:
    """A table of this run's figures beside those of the run before."""
    rows = []
    for name, value in _figure_values(record).items():
        earlier = _figure_values(before).get(name, "") if before else ""
        rows.append(f"| {name} | {value} | {earlier} |" if before else f"| {name} | {value} |")
    head = f"| | this run | {before['name']} |\n|---|---|---|" if before else "| | this run |\n|---|---|"
    return "\n".join([head, *rows])


def _figure_values(record: dict[str, Any]) -> dict[str, str]:
    values: dict[str, str] = {}
    if training := record.get("training"):
        values["loss of the first window"] = f"{training['first_window_loss']:.4f}"
        values["loss of the last window"] = f"{training['last_window_loss']:.4f}"
        if training["held_out_loss"] is not None:
            if training["held_out_loss_before"] is not None:
                values["held-out loss before training"] = f"{training['held_out_loss_before']:.4f}"
            values["held-out loss after training"] = f"{training['held_out_loss']:.4f}"
        values["optimizer steps"] = str(training["steps"])
        values["training time"] = f"{training['seconds'] / 60:.1f} min"
        values["peak memory, training"] = f"{training['peak_memory_gb']:.2f} GB"
    if merge := record.get("merge"):
        difference = f"{merge['largest_logit_difference']:.1e} of {merge['largest_logit']:.1f}"
        values["largest logit difference, merged and read back"] = difference
        ratio = merge["peak_memory_bytes"] / merge["model_bytes"]
        values["peak memory, merging"] = f"{merge['peak_memory_bytes'] / 1e9:.2f} GB, {ratio:.2f} x the model"
    if tests := record.get("structural_tests"):
        values["structural tests passed"] = f"{tests['passed_tests']} of 3"
        values["held-out questions: valid answers"] = f"{tests['held_out_valid']} of {tests['held_out_questions']}"
        values["held-out questions: three distinct follow-ups"] = (
            f"{tests['held_out_distinct']} of {tests['held_out_questions']}"
        )
    return values


def _tests(tests: dict[str, Any] | None) -> str:
    if not tests:
        return "Not tested."
    parts = []
    for test in tests["tests"]:
        verdict = "passed" if test["passed"] else f"FAILED: {test['problem']}"
        parts.append(f"### {test['name']}: {test['question']}\n\n{verdict}")
        parts += [f"- warning: {warning}" for warning in test["warnings"]]
        output, position = test["output"], test["position"]
        if position is not None:
            output = f"{output[:position]}⟦stops being valid here⟧{output[position:]}"
        parts.append(f"```\n{output}\n```")
    return "\n\n".join(parts)


def _held_out(tests: dict[str, Any] | None) -> str:
    if not tests:
        return "Not asked."
    rows = ["| question | valid | answer | follow-ups |", "|---|---|---|---|"]
    for case in tests["held_out"]:
        said = " / ".join(case["texts"] or [])
        choices = " / ".join(choice["text"] for choice in case["choices"] or [])
        valid = "yes" if case["passed"] else case["problem"]
        rows.append("| " + " | ".join(_cell(text) for text in (case["question"], valid, said, choices)) + " |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _settings(record: dict[str, Any]) -> str:
    statistics = record["data"]["statistics"]
    rows = {
        **{name: value for name, value in record["config"].items() if value != ""},
        "examples (training, held out)": f"{statistics['training_examples']}, {statistics['held_out_examples']}",
        "tokens per example (median, max)": "{median}, {max}".format(**statistics["token_lengths"]),
        "share of label tokens": statistics["label_token_share"],
        "SHA-256 of the training data": record["data"]["training_sha256"],
        "SHA-256 of the base weights": record["base_model"]["weights_sha256"],
        "tokenizer fingerprint": record["tokenizer"]["fingerprint"],
        "git commit": _commits(record),
        "machine": ", ".join(f"{name}: {value}" for name, value in record["machine"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in record["versions"].items()),
        "started": _started(record),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(str(value))} |" for name, value in rows.items())])


def _commits(record: dict[str, Any]) -> str:
    """The code that trained, one commit after the other when it changed between the starts of the run."""
    commits = [str(start["git_commit"]) for start in record.get("starts", [])] or [str(record["git_commit"])]
    return ", then ".join(commit for commit, _ in itertools.groupby(commits))


def _started(record: dict[str, Any]) -> str:
    later = [f"{start['time']} after step {start['after_step']}" for start in record.get("starts", [])[1:]]
    return "; resumed ".join([record["started"], *later])


def _command(record: dict[str, Any]) -> str:
    """The training command, and what follows it when the run went through RETRAIN.sh."""
    if record.get("retrain_command"):
        return record["retrain_command"]
    command = list(record["command"])
    while "--run_dir" in command:  # that folder holds this run
        del command[(at := command.index("--run_dir")) : at + 2]
    if command[0] == "torchrun":
        return shlex.join([".venv/bin/torchrun", *command[1:]])
    return shlex.join([".venv/bin/python", *command])
