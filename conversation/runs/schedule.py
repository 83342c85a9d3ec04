"""The learning rate at each step, as transformers' schedules give it."""

from __future__ import annotations

import math

from conversation_config import POLYNOMIAL_END, TrainingConfig

OF_THE_WHOLE_LENGTH = ("cosine", "linear", "polynomial")  # the others do not depend on the length of the run


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of one optimizer step, counted from 1, in a run of so many."""
    done, warmup, peak = step - 1, config.warmup_steps, config.learning_rate
    kind = config.lr_scheduler_type
    if kind == "constant":
        return peak
    if done < warmup:
        return peak * done / warmup
    if kind == "constant_with_warmup":
        return peak
    if kind == "inverse_sqrt":
        scale = warmup or 10_000
        return peak / math.sqrt((done + scale - warmup) / scale)
    share = (done - warmup) / max(1, steps - warmup)
    if kind == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * share)))
    if kind == "polynomial":
        return POLYNOMIAL_END + (peak - POLYNOMIAL_END) * max(0.0, 1 - share)
    return peak * max(0.0, 1 - share)


def problem_with_rates(config: TrainingConfig, steps: int) -> tuple[str, bool]:
    """What is wrong with the rates of a run, or nothing; and whether the run must be refused for it."""
    if all(learning_rate(config, step, steps) == 0 for step in range(1, min(steps, 3) + 1)):
        problem = f"a training of {steps} steps would change nothing: every learning rate of it is 0, for the warm-up"
        return f"{problem} of {config.warmup_steps} steps begins with 0", True
    if config.lr_scheduler_type == "polynomial" and steps == config.warmup_steps:
        return f"a polynomial schedule of {steps} steps cannot be all warm-up: transformers divides by 0 there", True
    if config.lr_scheduler_type != "constant" and steps <= config.warmup_steps:
        highest = learning_rate(config, steps, steps)
        return (
            f"the warm-up of {config.warmup_steps} steps fills the run of {steps}: the learning rate only rises, "
            f"to {highest:.1e} instead of {config.learning_rate:.1e}",
            False,
        )
    return "", False


def after_a_longer_run(before: TrainingConfig, old: int, now: TrainingConfig, new: int) -> str:
    """What becomes of the learning rate when a run of `old` steps is made `new` steps long."""
    if now.lr_scheduler_type not in OF_THE_WHOLE_LENGTH:
        return "The learning rate goes on as before."
    next_rate, last_rate = learning_rate(now, old + 1, new), learning_rate(before, old, old)
    return (
        f"From here on the learning rate is that of a {now.lr_scheduler_type} schedule over {new} steps: "
        f"{next_rate:.1e} at step {old + 1}, after {last_rate:.1e} at step {old}."
    )
