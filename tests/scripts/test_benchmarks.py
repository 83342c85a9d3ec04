"""The benchmarks run and count correctly: a step's variants compute equal gradients, and its floor is right.

Both ways to generate answer the same prompts; a served answer that is not whole is found.
"""

import dataclasses
import io
import json

import pytest
import requests
import torch
from conftest import run_script
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import serving, training_step
from benchmarks.training_step import EXAMPLES, Growth, ModelShape, needed_flop, random_examples, sharing, small_model
from conversation.training.prefix_tree import TokenSequence, build_prefix_tree

SMALL = Growth(
    batch_sizes=(1, 3), depths=(0, 1), vocabularies=(64, 256), vocabulary=256, width=32, answer_tokens=20, repeats=1
)


def test_a_run_prints_a_table_for_people_and_one_json_object_for_programs(tiny_folder, small_data):
    flags = ["--base_model", tiny_folder, "--training_data", small_data, "--rounds", 1, "--trl_rounds", 1, "--json"]
    done = run_script("benchmarks/training_step.py", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = report["variants"]
    assert list(rows) == ["original", "completion", "trl-1x8", "trl-8x1", "ours"]
    for name, row in rows.items():
        assert row["error"] is None and len(row["seconds"]) == 1 and row["peak_memory_gb"] > 0.1, name
        assert row["times_ours"] == pytest.approx(row["seconds"][0] / rows["ours"]["seconds"][0])
        assert row["label_tokens_per_second"] == pytest.approx(report["batches"][0]["labels"] / row["seconds"][0])
        assert f"| {training_step.VARIANTS[name]} | {row['seconds'][0]:.2f} (1) |" in done.stderr
    for name in ("completion", "trl-1x8", "trl-8x1", "ours"):
        assert 0 < rows[name]["gradient_difference"] < 1e-5, name
    assert rows["original"]["gradient_difference"] is None  # another loss
    assert report["floor"]["reached"] == pytest.approx(report["floor"]["seconds"] / rows["ours"]["seconds"][0])
    assert done.stderr.rstrip().endswith("of it")


@pytest.mark.parametrize("benchmark", ["training_step", "memory_plan"])
@pytest.mark.parametrize("tokens", ["0", "7"])
def test_examples_too_short_for_a_prompt_and_an_answer_are_refused(tiny_folder, benchmark, tokens):
    done = run_script(f"benchmarks/{benchmark}.py", "--base_model", tiny_folder, "--tokens", tokens)
    assert done.returncode == 2 and done.stderr == "error: --tokens must be at least 8\n"


def test_a_variant_that_runs_out_of_memory_is_a_row_and_not_the_end():
    batch = {"tokens": 10, "distinct_tokens": 8, "labels": 4}
    taken = {
        "trl-8x1": {"steps": [], "error": "out of memory"},
        "completion": {"steps": [{"seconds": 6.0}, {"seconds": 9.0}], "peak_memory_gb": 2.0},
        "ours": {"steps": [{"seconds": 2.0}, {"seconds": 1.0}], "peak_memory_gb": 1.0},
    }
    rows = training_step.summary(taken, [batch, batch], training_step.Path("/nowhere"))
    assert rows["completion"]["times_ours"] == 6.0  # the median of 6 / 2 and 9 / 1
    machine = {"machine": {"processor": "p"}, "threads": 1, "device": "cpu", "date": "today", "base_model": "m"}
    shown = training_step.table({**machine, "batches": [batch], "variants": rows})
    assert "| TRL SFTTrainer, 8 x 1 | out of memory |" in shown
    assert "| the same, completion loss | 7.50 (2) | 6.00 |" in shown


def test_a_worker_that_dies_is_reported(tmp_path):
    job = training_step.Job(tmp_path / "no model", [[]], None, None, tmp_path / "ours")
    worker = training_step.Worker("ours", job)
    assert not worker.wait()
    assert worker.result()["error"] == "ended with status 1"


def test_the_floor_is_what_a_count_by_hand_gives():
    shape = ModelShape(width=2, mlp_width=3, heads=2, key_heads=1, head_dim=4, windows=(2, None), vocabulary=10, rank=1)
    tree = build_prefix_tree(
        [
            TokenSequence((1, 2, 3, 4), (False, False, False, True)),
            TokenSequence((1, 2, 5, 6), (False, False, True, True)),
        ]
    )  # 1 and 2, then 3 or 5: four tokens at the positions 0, 1, 2, 2, of which 2, 3 and 5 predict labels
    attention_first = 12 * 8 * (1 + 2 + 2 + 2)  # 6 products of 2 x heads x head_dim for each visible pair; window 2
    first = (
        4 * (2 * 2 * 8 + 2 * (2 + 8 + 8 + 8 + 2))  # queries: weight forward only; x A, (xA) B, B's, xA's, A's gradients
        + 2 * 4 * (2 * 2 * 4 + 2 * (2 + 4 + 4 + 4 + 2))  # keys and values
        + 4 * (2 * 2 * 8 * 2 + 2 * 3 * (8 + 2))  # output: weight forward and back; 3 products each for A and B
        + 3 * 4 * (2 * 2 * 3 * 2 + 2 * 3 * (2 + 3))  # gate, up, down
    )
    attention_last = 12 * 8 * (2 + 3 + 3)
    last = (
        2 * 3 * (2 * 2 * 8 * 2 + 2 * 3 * (8 + 2))  # queries and output, of the three tokens that predict
        + 2 * 4 * (2 * 2 * 4 * 2 + 2 * 3 * (2 + 4))
        + 3 * 3 * (2 * 2 * 3 * 2 + 2 * 3 * (2 + 3))
    )
    head = 2 * 3 * (2 * 2 * 10)  # logits, and the gradient of the hidden states
    assert needed_flop(shape, tree) == attention_first + first + attention_last + last + head


def test_the_floor_is_below_what_our_step_computes_but_not_far():
    growth = dataclasses.replace(SMALL, answer_tokens=60)
    model = small_model(growth, 2048)
    batch = list(random_examples(growth, EXAMPLES, 2, one_tree=False, vocabulary=2048))
    gradients = sharing(model, max_tokens=10_000)

    def in_place_product(summand, a, b, **options):  # which the counter would pass over
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counted:
        gradients(model, batch)
    needed = needed_flop(ModelShape.of(model.config, 16), build_prefix_tree(batch))
    assert needed < counted.get_total_flops() < 1.5 * needed  # the rest: scores again, hidden pairs, last layer


@pytest.mark.slow
def test_growth_draws_its_three_panels(tmp_path):
    grown = training_step.measure_growth(SMALL)
    assert {panel: list(points) for panel, points in grown["seconds"].items()} == {
        "examples": [1, 3],
        "turns of history": [0, 1],
        "vocabulary": [64, 256],
    }
    training_step.draw_growth(json.loads(json.dumps(grown)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_examples_of_one_tree_share_their_history():
    trees = [
        build_prefix_tree(list(random_examples(SMALL, 4, 2, one_tree, vocabulary=10_000))) for one_tree in (False, True)
    ]
    history = 2 * SMALL.turn_tokens
    assert trees[0].num_tokens - trees[1].num_tokens == 3 * history
    assert trees[0].num_sequence_tokens - trees[0].num_tokens == 3 * SMALL.developer_tokens + 4  # and 4 last labels


def test_both_ways_to_generate_are_measured_on_the_same_prompts(untouched):
    flags = ["--prompts", 3, "--tokens", 4, "--methods", "greedy", "sampled", "--rounds", 2]
    done = run_script("benchmarks/generation.py", untouched / "merged_model_fp32", *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-6].startswith("3 prompts, ")
    assert [line.split(":")[0] for line in lines[-5:-1]] == ["4 tokens, transformers", "4 tokens, ours"] * 2
    assert lines[-1].endswith(" times as fast; 3 of 3 greedy ones equal")


def test_serving_measures_a_reader_alone_and_readers_at_once(untouched):
    """The tiny model's answers are whole, as the server's decoding cannot leave the format."""
    flags = ["--answers", 4, "--readers", 2, "--minutes", 0.01]
    done = run_script("benchmarks/serving.py", untouched / "merged_model_fp32", *flags, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [each["root"] for each in report["alone"]] == [True, False, False, True]
    assert len(report["together"]) >= 2 and report["start_seconds"] > 0
    assert 0 <= report["memory"]["files_mb"] <= report["memory"]["resident_mb"]
    for each in report["alone"] + report["together"]:
        assert each["problem"] is None and 0 < each["first_fragment"] < each["whole"]
    assert "| one reader, root | 2 | 0 |" in serving.table(report)


def test_an_answer_that_is_not_whole_is_named(monkeypatch):
    def problem(*parts, code=200):
        """What is said of an answer of these fragments (texts) and choices (pairs of text and target); done or not."""
        lines = []
        for part in parts:
            name, data = "fragment", {"text": part}
            if part == "done":
                name, data = "done", {}
            elif isinstance(part, tuple):
                name, data = "choice", {"text": part[0], "confidence": 0.4, "target": part[1]}
            lines += [f"event: {name}", f"data: {json.dumps(data)}", ""]
        response = requests.Response()
        response.status_code, response.raw = code, io.BytesIO("\n".join(lines).encode())
        monkeypatch.setattr(requests, "post", lambda *_, **__: response)
        return serving.ask("http://127.0.0.1/", "Q?", [])[0].problem

    choices = [("Why?", "a_why"), ("How?", "a_how"), ("Example?", "a_example")]
    assert problem("A.", "B.", *choices, "done") is None
    assert problem("A.", "A.", *choices, "done") == "Q?: something is said twice"
    assert problem("A.", *choices[:2], ("how?", "a_other"), "done") == "Q?: something is said twice"
    assert problem("A.", *choices[:2], ("Where?", "a_how"), "done") == "Q?: something is said twice"
    assert problem("A.", choices[0], "done") == "Q?: 1 follow-ups, expected 3"
    assert problem("A.", *choices) == "Q?: the answer broke off"
    assert "429" in problem(code=429)


def test_more_readers_than_one_address_may_have_are_refused(tmp_path):
    done = run_script("benchmarks/serving.py", tmp_path, "--readers", 33)
    assert done.returncode == 2 and "--readers from 1 to 32" in done.stderr
