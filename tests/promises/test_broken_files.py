"""Promise: a truncated or changed file is found before it is used, and named; --resume takes what is intact."""

import json
import shutil

import pytest
from faults import FILE_FAULTS, flip_bit, truncate
from scripts_at_work import adapters, finished

from conversation.errors import UserError
from conversation.models import merged_model
from conversation.runs.files import file_hashes
from conversation.runs.folder import RunFolder
from conversation.runs.publishing import find_damaged_result
from conversation.training.checkpoints import newest_intact_checkpoint

TRAIN, MERGE, TEST = "train_conversation.py", "merge_conversation_model.py", "test_conversation_model.py"


# --- the merged folder -----------------------------------------------------------------------------------------------


def test_a_merged_folder_without_its_tokenizer_is_refused_in_a_sentence(trained, tmp_path):
    """Copied in part; or made by a tool whose manifest does not list it."""
    folder = shutil.copytree(RunFolder(trained).merged_model, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    status, output = finished(TEST, "--model", folder, output=tmp_path / "out")
    assert status == 2, output
    assert f"error: the merged model is broken: {folder / 'tokenizer.json'} is missing\nhint: merge it again" in output
    listed = folder / merged_model.MANIFEST
    manifest = json.loads(listed.read_text())
    del manifest["files"]["tokenizer.json"]
    listed.write_text(json.dumps(manifest))
    status, output = finished(TEST, "--model", folder, output=tmp_path / "out")
    assert status == 2, output
    assert f"error: {folder} has no tokenizer (no tokenizer.json)\nhint: a model folder includes its" in output


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FILE_FAULTS, ids=["flipped bit", "truncated", "missing"])
def test_any_broken_file_of_a_checkpoint_is_found_and_the_one_before_is_taken(trained, fault):
    checkpoints = RunFolder(trained).checkpoints
    newest, before = checkpoints / "checkpoint-12", checkpoints / "checkpoint-9"
    assert newest_intact_checkpoint(checkpoints) == (newest, [])
    names = sorted(path.name for path in newest.iterdir())
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "hashes.json"} <= set(names)
    for name in names:
        content = (newest / name).read_bytes()
        fault(newest / name)
        found, problems = newest_intact_checkpoint(checkpoints)
        if name == "hashes.json" and found == newest:
            pytest.fail("a changed list of hashes was believed")
        assert found == before and len(problems) == 1 and str(newest) in problems[0], name
        (newest / name).write_bytes(content)


def test_resuming_says_that_a_checkpoint_is_broken_and_ends_with_the_same_bytes(trained, untouched, tmp_path):
    run = RunFolder(trained)
    shutil.rmtree(run.final_lora)  # as if killed before the end
    flip_bit(run.checkpoints / "checkpoint-12" / "optimizer.pt")
    truncate(run.checkpoints / "checkpoint-9" / "adapter_model.safetensors")
    status, output = finished(TRAIN, "--run_dir", run.path, "--resume", output=tmp_path / "out")
    assert status == 0 and "Resuming from checkpoint-6." in output
    assert "warning: a checkpoint is not used: " in output and "optimizer.pt is broken" in output
    assert adapters(run.path) == adapters(untouched)


# --- adapters, merged model, base model ----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FILE_FAULTS, ids=["flipped bit", "truncated", "missing"])
def test_broken_final_adapters_are_not_merged_and_resuming_the_training_corrects_them(
    trained, untouched, tmp_path, fault
):
    run = RunFolder(trained)
    fault(run.final_lora / "adapter_model.safetensors")
    merged = file_hashes(run.merged_model)
    status, output = finished(MERGE, "--run_dir", run.path, output=tmp_path / "merge")
    assert status == 2 and "final_lora/adapter_model.safetensors" in output and "--resume" in output
    assert file_hashes(run.merged_model) == merged
    status, output = finished(TRAIN, "--run_dir", run.path, "--resume", output=tmp_path / "train")
    assert status == 0 and "adapter_model.safetensors" in output and "Resuming from checkpoint-12" in output
    assert adapters(run.path) == adapters(untouched)


def test_a_broken_merged_model_is_named_not_tested_not_published_and_merged_again(trained, tmp_path):
    run = RunFolder(trained)
    weights = run.merged_model / "model.safetensors"
    whole = weights.read_bytes()
    for fault in FILE_FAULTS:
        weights.write_bytes(whole)
        fault(weights)
        assert str(weights) in find_damaged_result(run, run.read())
    weights.write_bytes(whole)
    flip_bit(weights)
    status, output = finished(TEST, "--run_dir", run.path, output=tmp_path / "test")
    assert status == 2 and f"{weights} is broken" in output
    status, output = finished(TEST, "--model", run.merged_model, output=tmp_path / "alone")
    assert status == 2 and f"{weights} is broken" in output
    status, output = finished(MERGE, "--run_dir", run.path, "--resume", output=tmp_path / "merge")
    assert status == 0 and f"Merging, as {weights} is broken" in output and weights.read_bytes() == whole


def test_a_base_that_changed_since_the_training_is_not_merged_with(trained, tiny_folder, easy_data, tmp_path):
    run = RunFolder(trained)
    for name, part in (("model.safetensors", "weights"), ("config.json", "config.json")):
        base = shutil.copytree(tiny_folder, tmp_path / f"changed {name}")
        if name == "config.json":
            (base / name).write_text((base / name).read_text().replace("10000.0", "20000.0").replace("96", "48"))
        else:
            flip_bit(base / name)
        status, output = finished(MERGE, "--run_dir", run.path, "--base_model", base, output=tmp_path / "out")
        assert status == 2 and f"the base model's {part}: the run has" in output, output
    truncate(base / "model.safetensors")
    shutil.copy(tiny_folder / "config.json", base)
    flags = ["--base_model", base, "--training_data", easy_data, "--run_dir", tmp_path / "new"]
    status, output = finished(TRAIN, *flags, output=tmp_path / "out")
    assert status == 2 and str(base) in output and "fetch or make" in output and not (tmp_path / "new").exists()


# --- run.json, metrics, data, verdicts -----------------------------------------------------------------------------


def test_any_changed_byte_of_the_record_is_found(trained):
    run = RunFolder(trained)
    whole = run.run_json.read_bytes()
    record = run.read()
    believed = []
    for position in range(0, len(whole), 3):
        for mask in (1, 4, 16):
            changed = bytearray(whole)
            changed[position] ^= mask
            run.run_json.write_bytes(changed)
            try:
                if run.read() != record:
                    believed.append(changed[position - 10 : position + 10])
            except UserError as error:
                assert str(run.run_json) in str(error)
    assert not believed


@pytest.mark.parametrize("script", [MERGE, TEST, TRAIN])
def test_a_broken_record_stops_every_stage_by_name(trained, tmp_path, script):
    run = RunFolder(trained)
    run.run_json.write_text(run.run_json.read_text().replace('"lora_r": 16', '"lora_r": 17'))
    resume = ["--resume"] if script == TRAIN else []
    status, output = finished(script, "--run_dir", run.path, *resume, output=tmp_path / "out")
    assert status == 2 and f"error: {run.run_json} is broken" in output


@pytest.mark.parametrize("fault", FILE_FAULTS, ids=["flipped bit", "truncated", "missing"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "training_data.jsonl"])
def test_broken_metrics_or_data_are_named_and_written_again(trained, untouched, tmp_path, name, fault):
    run = RunFolder(trained)
    fault(run.path / name)
    with pytest.raises(UserError, match=f"{name} is (broken|missing)"):
        run.read_metrics()
    if fault is not flip_bit:
        return  # what follows is the same for all
    status, output = finished(MERGE, "--run_dir", run.path, output=tmp_path / "merge")
    assert status == 2 and f"{name} is broken" in output
    status, output = finished(TRAIN, "--run_dir", run.path, "--resume", output=tmp_path / "train")
    assert status == 0 and f"{name} is broken" in output
    losses = [[e["loss"] for e in RunFolder(path).read_metrics() if "loss" in e] for path in (run.path, untouched)]
    assert losses[0] == losses[1] and adapters(run.path) == adapters(untouched)


def test_a_merged_folders_own_manifest_is_read_with_care(untouched, tmp_path):
    merged = shutil.copytree(RunFolder(untouched).merged_model, tmp_path / "merged")
    manifest = merged / merged_model.MANIFEST
    whole = manifest.read_text()
    for content in ("", "[]", "{", '{"files": 5}', '{"files": {"model.safetensors": 5}}', '{"a": NaN}', "{}"):
        manifest.write_text(content)
        status, output = finished("test_conversation_model.py", "--model", merged, output=tmp_path / "out")
        assert status == 2 and ("broken" in output or "is not a merged model" in output), (content, output)
    manifest.write_text(whole)
    status, output = finished("test_conversation_model.py", "--model", merged, output=tmp_path / "out")
    assert status == 1, output  # whole again, it is asked


def test_a_base_model_whose_header_names_another_tensor_is_refused(tiny_folder, flags, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    assert content.count(b"layers.1.mlp.up_proj") == 1
    weights.write_bytes(content.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.tp_proj"))
    other = ["--base_model", base, *flags[2:]]
    status, output = finished(TRAIN, "--run_dir", tmp_path / "run", *other, output=tmp_path / "out")
    assert status == 2 and "missing are model.layers.1.mlp.up_proj.weight" in output
    assert not (tmp_path / "run" / "run.json").exists()
