"""benchmarks/decodings.py on a tiny model: every method answers, and the figures are those of its answers."""

import json

from conftest import run_script

from conversation.answering.decoding import METHODS
from conversation.format.parser import parse_answer


def test_every_way_to_answer_is_measured_on_both_sets(untouched, tmp_path):
    out = tmp_path / "answers.json"
    done = run_script("benchmarks/decodings.py", untouched / "merged_model_fp32", "--every", "25", "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [(row["set"], row["method"]) for row in found] == [(s, m) for s in ("known", "unseen") for m in METHODS]
    for row in found:
        assert len(row["answers"]) == 2 and row["seconds"] > 0
        if row["method"] not in ("greedy", "sampled"):
            assert (row["valid"], row["equal_fragments"], row["distinct_follow_ups"]) == (1, 0, 1), row
            answers = [parse_answer(each["output"]) for each in row["answers"]]
            assert all(len({each.text for each in answer.follow_ups}) == 3 for answer in answers)
        assert f"| {row['set']} | {row['method']} |" in done.stdout
