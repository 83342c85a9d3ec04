"""The card of a model: the YAML that the hub reads, and text, from the record of the run."""

import dataclasses

import pytest
from huggingface_hub import ModelCard
from records import some_record

from conversation.runs.folder import RunFolder
from conversation.runs.model_card import CARD, hub_name, model_card, write_model_cards
from conversation.runs.record import AnswersResult, MergeResult, TrainingResult
from conversation_config import STAND_IN, TrainingConfig

TRAINED = TrainingResult(7, 3.0, 1.0, 2.5, 1.25, 60.0, 1.5, {"adapter_model.safetensors": "x"}, {}, "2026-01-02")
MERGED = MergeResult(3, 1e-6, 10.0, 10**9, 2 * 10**9, {"model.safetensors": "x"}, {}, "2026-01-02")
TESTED = AnswersResult(True, 3, 20, 18, 17, "2026-01-02", {})


def a_run(folder, base="google/functiongemma-270m-it", **changes):
    config = TrainingConfig(base_model=base)
    folder.mkdir(exist_ok=True)
    run = RunFolder(folder)
    run.write(some_record(config=config, training=TRAINED, merge=MERGED, structural_tests=TESTED, **changes))
    for made in (run.final_lora, run.merged_model):
        made.mkdir(parents=True)
    return run


def test_the_cards_head_holds_what_the_hub_reads_and_the_figures_of_the_run(tmp_path):
    run = a_run(tmp_path)
    write_model_cards(run)
    for folder, library, relation in (
        (run.final_lora, "peft", "adapter"),
        (run.merged_model, "transformers", "finetune"),
    ):
        head = ModelCard.load(folder / CARD).data
        assert head.base_model == "google/functiongemma-270m-it" and head.base_model_relation == relation
        assert head.library_name == library and head.license == "gemma" and "function-calling" in head.tags
        figures = {(each.dataset_name, each.metric_name): each.metric_value for each in head.eval_results}
        assert figures[("held-out trees", "cross entropy per label token, nats")] == 1.25
        assert figures[("structural tests", "passed, share of 3")] == 1.0
        assert figures[("held-out questions", "valid answers")] == 0.9
        assert figures[("held-out questions", "three distinct follow-ups")] == 0.85


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("owner/data:train", "owner/data"),
        ("owner/data@v1.0:small:train[:10%]", "owner/data"),
        ("data/core_trees:train", None),
        ("mine/train.jsonl", None),
        ("models/mine.gguf", None),
        (STAND_IN, "google/gemma-3-270m"),
        ("/somewhere/model", None),
        ("expert", None),
        ("a/b/c", None),
        ("~/model", None),
    ],
)
def test_only_a_name_on_the_hub_is_given_as_one_wherever_the_report_is_written(name, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(name) == wanted


def test_a_folder_on_this_machine_is_named_without_its_place_and_has_no_invented_licence(tmp_path):
    run = a_run(tmp_path / "run", base=str(tmp_path / "secret-place" / "my-base"))
    text = model_card(run, run.read(), "finetune")
    assert "my-base" in text and "secret-place" not in text and "license:" not in text
    head = ModelCard(text).data
    assert head.base_model is None and head.datasets is None


def test_a_card_is_written_again_with_new_figures_and_never_over_a_file_of_the_training(tmp_path):
    run = a_run(tmp_path)
    write_model_cards(run)
    before = (run.merged_model / CARD).read_text()
    run.write(dataclasses.replace(run.read(), structural_tests=None))
    write_model_cards(run)
    assert (run.merged_model / CARD).read_text() != before
    (run.final_lora / CARD).write_text("peft's")
    training = dataclasses.replace(TRAINED, adapter_files={CARD: "its hash"})
    run.write(dataclasses.replace(run.read(), training=training))
    write_model_cards(run)
    assert (run.final_lora / CARD).read_text() == "peft's"
