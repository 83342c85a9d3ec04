#!/usr/bin/env python3
"""How many minutes until the held-out loss is 1.329: the original recipe as described, ours with it, ours tuned.

    benchmarks/time_to_loss.py                              what is not measured yet, table and plot (about 6 hours)
    benchmarks/time_to_loss.py --minutes 60                 a sitting of an hour; the same command goes on from there
    benchmarks/time_to_loss.py --minutes 0                  measure nothing more: table and plot of what there is
    benchmarks/time_to_loss.py --same RUN                   a run that is there already, as ours with the same recipe

Three trainings of the stand-in on one split of the data, all from the same adapters:
- original: as it was described: one example at a time, logits of all tokens, 8 backward passes, AdamW, peft's layers;
- same: train_conversation.py with the same recipe, the default one;
- tuned: train_conversation.py with another recipe (--tuned_recipe, --tuned_flags), on the same data.
The original and ours with the same recipe take the same examples in the same order and compute the same gradient, but
for rounding and the draws of dropout. So the original is measured for --original_steps steps only; it is continued at
the median of their seconds, with the held-out loss of `same` after as many steps. Table and plot say so, and how far
the training losses of both are apart over the measured steps.

Minutes are those of the steps, checkpoints included: the passes over the held-out examples are left out. Between two of
these the loss is taken to run straight. Needs a quiet machine; the runs are in training-runs/time_to_loss.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from conversation.errors import CommandLine, UserError, run_main  # noqa: E402
from conversation.runs.files import make_folder, write_atomically, write_json  # noqa: E402
from conversation.runs.folder import RunFolder  # noqa: E402
from conversation.runs.machine import environment  # noqa: E402
from conversation.runs.record import now  # noqa: E402
from conversation_config import (  # noqa: E402
    RECIPES,
    STAND_IN,
    TrainingConfig,
    add_training_flags,
    flags_of,
    resolve_settings,
    set_up_libraries,
)

FOLDER = PROJECT / "training-runs" / "time_to_loss"
TARGET = 1.329  # what the default recipe reached after 7 epochs: training-runs/conversation/example-7-epochs-2026-11-22
OF_THE_DATA = ("base_model", "training_data", "held_out_share", "domains")  # the same for all three
SAVED_EVERY = 5  # steps of the original
CHILD = "import sys; from benchmarks.time_to_loss import train_and_look; train_and_look(int(sys.argv.pop(1)))"


@dataclass(frozen=True)
class Point:
    """The held-out loss, in nats a label token, after `step` steps, which took so many minutes."""

    step: int
    minutes: float
    loss: float


@dataclass(frozen=True)
class Curve:
    """A training. `seconds_per_step`: a median. `measured_steps`: the later ones are continued."""

    name: str
    points: list[Point]
    seconds_per_step: float
    measured_steps: int
    steps: int

    def minutes_to(self, loss: float) -> float | None:
        """When the loss is first that low; None when it never was."""
        for before, after in zip([self.points[0], *self.points], self.points, strict=False):
            if after.loss <= loss:
                share = 1.0 if before.loss <= loss else (before.loss - loss) / (before.loss - after.loss)
                return before.minutes + share * (after.minutes - before.minutes)
        return None


def main() -> int:
    args = parse_flags()
    config = settings(args.flags)
    tuned = tuned_settings(config, args)
    deadline = time.monotonic() + 60 * args.minutes
    make_folder(args.folder)
    same, tuned_run = RunFolder(args.same or args.folder / "same"), RunFolder(args.folder / args.tuned_name)
    if args.same and same.read().config != config:
        raise UserError(f"{args.same} was trained with other settings", "give its settings with --flags")
    if not args.same:
        train(same, config, args.same_every, deadline)
    train(tuned_run, tuned, args.tuned_every, deadline)
    original = args.folder / "original.pt"
    measured = train_original(config, original, args.original_steps, deadline)
    curves = [of_run("same", same), of_run(args.tuned_name, tuned_run)]
    if curves[0] and measured["seconds"]:
        curves.insert(0, continued(curves[0], measured["seconds"]))
    found = [curve for curve in curves if curve]
    report = {
        "date": now(),
        **asdict(environment()),
        "target": args.target,
        "settings": {"same": flags_of(config), args.tuned_name: flags_of(tuned)},
        "curves": [asdict(curve) for curve in found],
        "minutes_to_target": {curve.name: curve.minutes_to(args.target) for curve in found},
        "training_losses_apart": losses_apart(measured["losses"], same.read_metrics() if curves[0] else []),
        "same_data": same_data(same, tuned_run),
    }
    write_json(args.folder / "time_to_loss.json", report)
    print(table(report, found))
    if found:
        draw(found, args.target, args.folder / "time_to_loss.png")
    return 0


def parse_flags() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where runs and results are")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many; the same command goes on")
    parser.add_argument(
        "--target", type=float, default=TARGET, help="the held-out loss to reach (default: %(default)s)"
    )
    parser.add_argument(
        "--flags", default=f"--base_model {STAND_IN}", help="flags of train_conversation.py for all three"
    )
    parser.add_argument("--tuned_recipe", choices=tuple(RECIPES), default="demo", help="its settings, but the data's")
    parser.add_argument("--tuned_flags", default="", help="flags of train_conversation.py for the tuned one")
    parser.add_argument("--tuned_name", default="tuned", help="its run folder, so that several can be measured")
    parser.add_argument("--same", type=Path, help="a finished run to take as ours with the same recipe")
    parser.add_argument("--same_every", type=int, default=0, help="steps between held-out losses (0: each epoch)")
    parser.add_argument("--tuned_every", type=int, default=20, help="the same of the tuned one (default: %(default)s)")
    parser.add_argument("--original_steps", type=int, default=25, help="steps of the original (default: %(default)s)")
    return parser.parse_args()


def settings(flags: str) -> TrainingConfig:
    """What flags of train_conversation.py ask for. Raises UserError."""
    parser = CommandLine()
    add_training_flags(parser)
    return resolve_settings(parser.parse_args(shlex.split(flags)))


def tuned_settings(config: TrainingConfig, args: argparse.Namespace) -> TrainingConfig:
    """The tuned recipe and its flags, on the data of the others."""
    recipe = {name: value for name, value in RECIPES[args.tuned_recipe].items() if name not in OF_THE_DATA}
    started = TrainingConfig(**recipe)
    parser = CommandLine()
    add_training_flags(parser)
    given = vars(parser.parse_args(shlex.split(args.tuned_flags)))
    given.pop("recipe")
    if wrong := sorted(set(given) & set(OF_THE_DATA)):
        raise UserError(f"--tuned_flags changes the data: {', '.join(wrong)}", "give these with --flags, for all")
    try:
        return replace(started, **{name: getattr(config, name) for name in OF_THE_DATA}, **given)
    except ValueError as error:
        raise UserError(str(error)) from None


# --- the trainings -------------------------------------------------------------------------------------------------


def train(run: RunFolder, config: TrainingConfig, every: int, deadline: float) -> None:
    """Train, or go on, until it is done or the sitting is over. Raises UserError when the training fails."""
    record = run.read() if run.run_json.exists() else None
    if record and record.config != config:
        raise UserError(f"{run.path} was trained with other settings", "give another --folder or --tuned_name")
    if (record and record.training) or time.monotonic() >= deadline:
        return
    command = [sys.executable, "-c", CHILD, str(every), *flags_of(config), "--run_dir", str(run.path)]
    child = subprocess.Popen([*command, *["--resume"] * bool(record)], cwd=PROJECT, start_new_session=True)
    try:
        status = child.wait(deadline - time.monotonic())
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        child.send_signal(signal.SIGINT)
        status = child.wait()
        if isinstance(stopped, KeyboardInterrupt):
            raise
    if status not in (0, 130):
        raise UserError(f"the training in {run.path} ended with status {status}", "", 1)


def train_and_look(every: int) -> None:
    """train_conversation.py, which looks at the held-out loss every so many steps as well (0: after each epoch)."""
    set_up_libraries()
    import train_conversation
    from conversation.training import conversation_trainer

    plain = conversation_trainer.sft_config

    def looking(config: TrainingConfig, run: RunFolder, shared: bool, held_out: bool) -> Any:
        arguments = plain(config, run, shared, held_out)
        if every and held_out:
            arguments.eval_strategy, arguments.eval_steps = type(arguments.eval_strategy)("steps"), every
        return arguments

    conversation_trainer.sft_config = looking
    run_main(train_conversation.main)


def train_original(config: TrainingConfig, state_file: Path, until: int, deadline: float) -> dict[str, Any]:
    """Train as the original does, for `until` steps in all; go on where the last sitting stopped.

    Returns the `seconds` and the `losses` (nats a label token) of all steps so far. The steps of `same`: its examples,
    order, initial adapters, schedule of the rate, clipping.
    """
    nothing: dict[str, Any] = {"seconds": [], "losses": []}
    if not state_file.exists() and (time.monotonic() >= deadline or until < 1):
        return nothing
    set_up_libraries()
    import torch
    from peft import get_peft_model
    from transformers import get_scheduler, set_seed

    from benchmarks.training_step import one_by_one
    from conversation.models.adapters import lora_config
    from conversation.models.device import training_device
    from conversation.models.weights import load_model
    from conversation.training.batches import OptimizerStepBatches
    from conversation.training.preparation import prepare
    from conversation.training.training_set import token_sequence

    state = torch.load(state_file) if state_file.exists() else nothing
    if state.get("config", asdict(config)) != asdict(config):
        raise UserError(f"{state_file} is of other settings", "give another --folder")
    if len(state["seconds"]) >= until or time.monotonic() >= deadline:
        return state
    prepared = prepare(config)
    examples = [token_sequence(encoded, config.loss_on) for encoded in prepared.encoded_training]
    base = load_model(prepared.base_folder)
    set_seed(config.seed)
    model = get_peft_model(base, lora_config(config)).to(training_device()).train()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        adapters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=prepared.steps
    )
    if "random" in state:
        model.load_state_dict(state["adapters"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
    gradients, order = (
        one_by_one(config.loss_on == "all"),
        OptimizerStepBatches(len(examples), config.examples_per_step, config.seed),
    )
    while (step := len(state["seconds"])) < min(until, prepared.steps) and time.monotonic() < deadline:
        order.set_epoch(step // len(order))
        batch = [examples[i] for i in list(order)[step % len(order)]]
        started = time.perf_counter()
        loss = gradients(model, batch)
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(adapters.values(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state["losses"].append(loss.item())
        state["seconds"].append(time.perf_counter() - started)
        print(f"original, step {step + 1} of {until}: {state['seconds'][-1]:.1f} s", file=sys.stderr, flush=True)
        if len(state["seconds"]) % SAVED_EVERY == 0 or len(state["seconds"]) == until:
            kept = {"config": asdict(config), "seconds": state["seconds"], "losses": state["losses"]}
            kept |= {"adapters": {name: p.detach() for name, p in adapters.items()}, "random": torch.get_rng_state()}
            kept |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(kept, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    return state


# --- what they came to -----------------------------------------------------------------------------------------------


def of_run(name: str, run: RunFolder) -> Curve | None:
    """The curve of a run so far; None before its first held-out loss."""
    metrics = run.read_metrics() if run.run_json.exists() else []
    points, looking = [], 0.0
    windows: list[tuple[int, float]] = [(0, 0.0)]  # steps and seconds without the held-out passes
    for entry in metrics:
        looking += entry.get("eval_seconds", 0.0)
        if "eval_loss" in entry:
            points.append(Point(entry["step"], (entry["seconds"] - looking) / 60, entry["eval_loss"]))
        else:
            windows.append((entry["step"], entry["seconds"] - looking))
    if not points:
        return None
    rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(windows) if b[0] > a[0]]
    last = metrics[-1]["step"]
    return Curve(name, points, statistics.median(rates) if rates else 0.0, last, last)


def continued(same: Curve, seconds: list[float]) -> Curve:
    """The original: its own seconds, then their median for each step; the losses of ours with the same recipe."""
    median = statistics.median(seconds)

    def minutes(step: int) -> float:
        return (sum(seconds[:step]) + max(0, step - len(seconds)) * median) / 60

    points = [Point(point.step, minutes(point.step), point.loss) for point in same.points]
    return Curve("original", points, median, len(seconds), same.steps)


def losses_apart(original: list[float], metrics: list[dict[str, Any]]) -> float | None:
    """How far the training losses of the original and of ours are apart, window by window, at most."""
    windows, start, apart = [entry for entry in metrics if "loss" in entry], 0, []
    for entry in windows:
        if entry["step"] > len(original):
            break
        apart.append(abs(statistics.fmean(original[start : entry["step"]]) - entry["loss"]))
        start = entry["step"]
    return max(apart, default=None)


def same_data(*runs: RunFolder) -> bool:
    """Whether all runs so far trained on the same examples and held the same ones out."""
    records = [run.read() for run in runs if run.run_json.exists()]
    return len({(record.data.training_sha256, record.data.held_out_sha256) for record in records}) < 2


def table(report: dict[str, Any], curves: list[Curve]) -> str:
    """For people."""
    target, first = report["target"], next(iter(report["minutes_to_target"].values()), None)
    lines = [
        f"{report['date']}, {report['machine']['processor']}, {report['machine']['cores']} cores",
        "",
        f"| | steps measured | s/step | held-out loss at the end | minutes | minutes to {target} | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        took, last = curve.minutes_to(target), curve.points[-1]
        faster = f"{first / took:.1f}" if first and took else "-"
        steps = f"{curve.measured_steps} of {curve.steps}" if curve.measured_steps < curve.steps else curve.steps
        reached = "not reached" if took is None else f"{took:.1f}"
        lines.append(
            f"| {curve.name} | {steps} | {curve.seconds_per_step:.2f} | {last.loss:.4f} | {last.minutes:.1f} "
            f"| {reached} | {faster} |"
        )
    for curve in curves:
        if curve.name == "original" and curve.measured_steps < curve.steps:
            lines += [
                "",
                f"The original was measured for {curve.measured_steps} steps. The rest is continued: each later step "
                f"at their median, the held-out losses those of ours with the same recipe after as many steps.",
            ]
    if (apart := report["training_losses_apart"]) is not None:
        lines.append(f"Over its measured steps its training loss, by window, was at most {apart:.4f} from ours.")
    if not report["same_data"]:
        lines += ["", "**The runs were trained on different data, or held out different examples: do not compare.**"]
    return "\n".join(lines)


def draw(curves: list[Curve], target: float, path: Path) -> None:
    """Held-out loss over minutes; dashed where it is continued, not measured."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"original": "#8a8f98", "same": "#2f6db3"}
    figure = Figure(figsize=(8, 4.5), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        dashed = curve.measured_steps < curve.steps
        label = f"{curve.name}, {curve.measured_steps} steps measured" if dashed else curve.name
        points = [(point.minutes, point.loss) for point in curve.points]
        colour = colours.get(curve.name, "#dd8a2b")
        axes.plot(*zip(*points, strict=True), "--" if dashed else "-", color=colour, marker="o", ms=4, label=label)
    axes.axhline(target, color="#444444", linewidth=0.8, linestyle=":")
    axes.set(xlabel="minutes of training", ylabel="held-out loss, nats a completion token")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


if __name__ == "__main__":
    run_main(main)
