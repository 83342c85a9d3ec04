"""The benchmark of the time to a loss: sittings, what is measured and what is continued, one data set for all."""

import json

import pytest
import torch
from conftest import easy_lines, run_script

from benchmarks import time_to_loss
from benchmarks.time_to_loss import Curve, Point
from conversation.data.examples import to_jsonl
from conversation.errors import UserError
from conversation.runs.folder import RunFolder


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tiny_folder):
    data = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    data.write_bytes(to_jsonl(easy_lines()))
    shared = f"--base_model {tiny_folder} --training_data {data} --held_out_share 0.2 --lora_dropout 0 --max_steps 6"
    return ["--flags", f"{shared} --learning_rate 3e-3 --warmup_steps 2 --logging_steps 2 --save_steps 2"]


def measured(folder, *more):
    done = run_script("benchmarks/time_to_loss.py", "--folder", folder, *more, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "time_to_loss.json").read_text()), done.stdout


@pytest.mark.slow
def test_three_curves_in_two_sittings_and_what_is_continued_is_said(tmp_path, flags):
    tuned = ["--tuned_flags", "--max_steps 4 --learning_rate 1e-2 --warmup_steps 1 --logging_steps 2"]
    every = ["--same_every", "3", "--tuned_every", "2"]
    report, shown = measured(tmp_path, *flags, *tuned, *every, "--original_steps", "2", "--target", "3")
    first = torch.load(tmp_path / "original.pt")["seconds"]
    assert len(first) == 2 and "The original was measured for 2 steps. The rest is continued" in shown
    report, shown = measured(tmp_path, *flags, *tuned, *every, "--original_steps", "4", "--target", "3")
    state = torch.load(tmp_path / "original.pt")
    assert state["seconds"][:2] == first and len(state["seconds"]) == 4
    original, same, tuned_curve = report["curves"]
    assert [curve["name"] for curve in report["curves"]] == ["original", "same", "tuned"]
    assert [point["step"] for point in same["points"]] == [0, 3, 6] and same["measured_steps"] == 6
    assert [point["step"] for point in tuned_curve["points"]] == [0, 2, 4]
    assert (original["measured_steps"], original["steps"]) == (4, 6)
    assert [point["loss"] for point in original["points"]] == [point["loss"] for point in same["points"]]
    assert report["training_losses_apart"] < 1e-4  # no dropout: the same steps, but for rounding
    assert report["same_data"] and same["points"][0]["loss"] == tuned_curve["points"][0]["loss"]
    assert (tmp_path / "time_to_loss.png").read_bytes().startswith(b"\x89PNG")

    whole, _ = measured(tmp_path / "whole", *flags, *tuned, "--minutes", "0")
    assert whole["curves"] == []  # nothing is measured without time, and nothing fails
    config = time_to_loss.settings(flags[1])
    at_once = time_to_loss.train_original(config, tmp_path / "at_once.pt", 4, float("inf"))
    assert at_once["losses"] == state["losses"]  # two sittings are one training


def metrics(*entries):
    names = ("step", "seconds", "loss", "eval_loss", "eval_seconds")
    return [{name: value for name, value in zip(names, entry, strict=True) if value is not None} for entry in entries]


def test_held_out_passes_take_no_time_and_losses_in_between_are_interpolated(monkeypatch, tmp_path):
    logged = metrics(
        (0, 60.0, None, 4.0, 60.0),
        (5, 110.0, 3.0, None, None),
        (10, 160.0, 2.5, None, None),
        (10, 220.0, None, 2.0, 60.0),
    )
    run = RunFolder(tmp_path)
    (tmp_path / "run.json").touch()
    monkeypatch.setattr(RunFolder, "read_metrics", lambda self: logged)
    curve = time_to_loss.of_run("same", run)
    assert curve.points == [Point(0, 0.0, 4.0), Point(10, 100 / 60, 2.0)] and curve.seconds_per_step == 10.0
    assert curve.minutes_to(3.0) == pytest.approx(50 / 60) and curve.minutes_to(1.9) is None
    assert curve.minutes_to(5.0) == 0.0
    original = time_to_loss.continued(curve, [30.0, 20.0, 40.0])
    assert original.points == [Point(0, 0.0, 4.0), Point(10, (90 + 7 * 30) / 60, 2.0)]
    assert time_to_loss.losses_apart([3.5] * 5 + [2.0] * 4, logged) == 0.5  # the second window is not whole


def test_the_table_says_how_many_times_as_fast_and_what_must_not_be_compared():
    points = [Point(0, 0.0, 4.0), Point(10, 10.0, 2.0)]
    curves = [Curve("original", points, 60.0, 2, 10), Curve("tuned", [points[0], Point(2, 1.0, 2.0)], 30.0, 2, 2)]
    report = {"date": "today", "machine": {"processor": "p", "cores": 2}, "target": 2.0, "same_data": False}
    report |= {"minutes_to_target": {"original": 10.0, "tuned": 1.0}, "training_losses_apart": 0.01}
    shown = time_to_loss.table(report, curves)
    assert "| original | 2 of 10 | 60.00 | 2.0000 | 10.0 | 10.0 | 1.0 |" in shown
    assert "| tuned | 2 | 30.00 | 2.0000 | 1.0 | 1.0 | 10.0 |" in shown and "do not compare" in shown


def test_the_tuned_recipe_trains_on_the_data_of_the_others(flags):
    config = time_to_loss.settings(flags[1])
    asked = type("", (), {"tuned_recipe": "demo", "tuned_flags": "--max_steps 9"})
    tuned = time_to_loss.tuned_settings(config, asked)
    assert (tuned.training_data, tuned.base_model, tuned.held_out_share) == (
        config.training_data,
        config.base_model,
        config.held_out_share,
    )
    assert (tuned.max_steps, tuned.learning_rate, tuned.gradient_accumulation_steps) == (9, 1e-3, 4)
    with pytest.raises(UserError, match="changes the data: held_out_share"):
        asked.tuned_flags = "--held_out_share 0.5"
        time_to_loss.tuned_settings(config, asked)


def test_a_run_with_other_settings_is_not_continued(tmp_path, monkeypatch, flags):
    config = time_to_loss.settings(flags[1])
    run = RunFolder(tmp_path)
    (tmp_path / "run.json").touch()
    other = type("", (), {"config": time_to_loss.settings(""), "training": None})
    monkeypatch.setattr(RunFolder, "read", lambda self: other)
    with pytest.raises(UserError, match="trained with other settings"):
        time_to_loss.train(run, config, 0, float("inf"))
