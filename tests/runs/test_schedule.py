"""The learning rate of each step, and what is said about it."""

import pytest

from conversation.runs.schedule import after_a_longer_run, learning_rate, problem_with_rates
from conversation_config import TrainingConfig

SCHEDULES = ("cosine", "linear", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 3, 50])
def test_the_rates_are_those_of_transformers(kind, warmup):
    import torch
    from transformers import get_scheduler

    config = TrainingConfig(lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=1e-3)
    for steps in (1, 2, 3, 12):
        if kind == "polynomial" and steps == warmup:  # the library divides by zero after the last step
            assert problem_with_rates(config, steps)[1]
            continue
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        for step in range(1, steps + 1):
            expected = optimizer.param_groups[0]["lr"]
            assert learning_rate(config, step, steps) == pytest.approx(expected, rel=1e-9, abs=1e-15), (step, steps)
            optimizer.step()
            schedule.step()


def test_a_run_whose_only_rate_is_0_changes_nothing_and_one_that_only_warms_up_is_said_to():
    assert problem_with_rates(TrainingConfig(), 1)[1]
    assert problem_with_rates(TrainingConfig(warmup_steps=1), 1)[1]
    for config, steps in (
        (TrainingConfig(warmup_steps=0), 1),
        (TrainingConfig(lr_scheduler_type="constant"), 1),
        (TrainingConfig(), 51),
    ):
        assert problem_with_rates(config, steps) == ("", False)
    problem, nothing_changes = problem_with_rates(TrainingConfig(learning_rate=1e-3), 50)
    assert not nothing_changes and "only rises, to 9.8e-04 instead of 1.0e-03" in problem


def test_what_becomes_of_the_rate_of_a_longer_run_is_said():
    config = TrainingConfig(warmup_steps=0, learning_rate=1e-3)
    said = after_a_longer_run(config, 6, config, 12)
    assert "a cosine schedule over 12 steps: 5.0e-04 at step 7, after 6.7e-05 at step 6." in said
    constant = TrainingConfig(lr_scheduler_type="constant_with_warmup")
    assert after_a_longer_run(constant, 6, constant, 12) == "The learning rate goes on as before."
