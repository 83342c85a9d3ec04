"""The table of recipes: a row for each trial that is recorded."""

import json

from conftest import PROJECT, run_script

TRIALS = PROJECT / "benchmarks" / "recipes.jsonl"


def test_the_table_has_a_row_for_every_recorded_trial():
    trials = [json.loads(line) for line in TRIALS.read_text(encoding="utf-8").splitlines()]
    done = run_script("benchmarks/recipes.py", "--table")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert rows[0][:5] == ["trial", "steps", "examples", "minutes", "last window"]
    assert [row[0] for row in rows[2:]] == [trial["name"] for trial in trials]
    for row, trial in zip(rows[2:], trials, strict=True):
        assert row[4] == f"{trial['last_window_loss']:.3f}"
        assert row[5] == f"{trial['losses']['training']['fragments']:.2f}"
