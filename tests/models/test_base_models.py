"""Base models: a hub cache on disk, local folders, models without the tokens, and the error for a missing model."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import current_umask, easy_lines, lay_into_hub_cache, make_tiny_model, run_script, some_adapters
from safetensors.torch import load_file, save_file

from conversation.errors import UserError
from conversation.format.control_tokens import FORMAT_TOKENS
from conversation.models import base_models, new_tokens, weights
from conversation.models.audit import FUNCTION_GEMMA_IDS, audit, check_control_tokens
from conversation.models.tokenizer import load_tokenizer
from conversation_config import FUNCTION_GEMMA


def test_the_default_model_is_taken_from_the_hub_cache(tmp_path, tiny_folder):
    lay_into_hub_cache(tmp_path, tiny_folder)
    done = run_script("train_conversation.py", "--check_data", "--json", env={"HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] >= 1200


def test_without_access_nothing_is_touched_and_the_stand_in_is_offered(tmp_path):
    done = run_script("train_conversation.py", "--run_dir", tmp_path / "run", env={"HF_HOME": str(tmp_path / "empty")})
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert f"error: {FUNCTION_GEMMA} is not on this machine and the hub cannot be reached" in done.stderr
    assert "--base_model gemma-3-270m" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_without_weights_or_config_is_refused(tmp_path, tiny_folder):
    with pytest.raises(UserError, match="no config"):
        base_models.find_base_model(str(tmp_path))
    shutil.copy(tiny_folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="no weights in safetensors"):
        base_models.find_base_model(str(tmp_path))


def test_what_the_merge_would_stumble_over_is_refused_before_the_training_all_at_once(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"contains adapters: adapter_config.json, adapter_model.safetensors"):
        base_models.find_base_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(UserError, match=r"(?s)contains adapters.*has quantized weights"):
        base_models.find_base_model(str(folder))


def test_a_model_of_text_and_images_is_refused_before_the_training(tmp_path, tiny_folder):
    from transformers import AutoConfig, Gemma3Config, SiglipVisionConfig

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    images = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = AutoConfig.from_pretrained(tiny_folder)
    Gemma3Config(text_config=text.to_dict(), vision_config=images.to_dict()).save_pretrained(folder)
    with pytest.raises(UserError, match=r"is not a model of text alone: its config.json has vision_config"):
        base_models.find_base_model(str(folder))


def test_shards_that_are_missing_are_all_named(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    with pytest.raises(UserError, match=r"has neither model.safetensors nor"):
        base_models.find_base_model(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "c.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks weights that its index lists: b.safetensors, c.safetensors"):
        base_models.find_base_model(str(folder))
    index.write_text("{}")
    with pytest.raises(UserError, match="lists no weights"):
        base_models.find_base_model(str(folder))


def test_tied_embeddings_that_differ_on_disk_are_refused(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": tensors[name].clone()}, folder / "model.safetensors")
    assert base_models.find_base_model(str(folder)) == folder  # the same twice is only a waste
    save_file({**tensors, "lm_head.weight": tensors[name] + 1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"ties its embeddings in config.json, but its weights contain two that differ"):
        base_models.find_base_model(str(folder))


def test_only_the_weights_that_the_library_loads_are_those_of_a_base(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    save_file({"other": load_file(folder / "model.safetensors")["model.norm.weight"]}, folder / "model_ema.safetensors")
    assert base_models.find_base_model(str(folder)) == folder
    assert weights.weight_files(folder) == [folder / "model.safetensors"]
    assert weights.weights_hash(folder) == weights.weights_hash(tiny_folder)
    assert weights.fp32_bytes(folder) == weights.fp32_bytes(tiny_folder)
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "b.safetensors"}}))
    assert weights.weight_files(folder) == [folder / "b.safetensors"]


def test_weights_of_another_name_and_files_that_cannot_be_read_are_refused_before_a_training(
    tmp_path, tiny_folder, monkeypatch
):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "model.safetensors")  # root may read all
    with pytest.raises(UserError) as refused:
        base_models.find_base_model(str(folder))
    assert "it names another file of weights in config.json: transformers_weights" in str(refused.value)
    assert "it has files that cannot be read: model.safetensors" in str(refused.value)


def test_what_no_training_takes_is_not_copied_by_hand_either(tmp_path, tiny_folder, monkeypatch):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    some_adapters(tmp_path / "adapters", base, 0.1)
    shutil.copy(tmp_path / "adapters" / "adapter_model.safetensors", base)
    for source, words in ((base, "contains adapters: adapter_model.safetensors"), (tmp_path / "no", "there is no mod")):
        monkeypatch.setattr(sys, "argv", ["new_tokens", str(source), str(tmp_path / "new")])
        with pytest.raises(UserError, match=words):
            new_tokens.main()
    monkeypatch.setattr(sys, "argv", ["new_tokens", str(tiny_folder), str(tmp_path / "far" / "new")])
    with pytest.raises(UserError, match="there is no folder"):
        new_tokens.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "base"]


def test_an_id_for_which_the_model_has_no_embedding_is_refused_and_padding_rows_are_not(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    audit(folder, easy_lines()[:2])
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(UserError, match="the model has embeddings for 300 ids"):
        audit(folder, easy_lines()[:2])


def test_a_folder_in_the_place_of_a_hub_model_is_said(tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "model").symlink_to(tiny_folder)
    assert base_models.find_base_model("some/model") == tiny_folder.resolve()
    assert "some/model is the folder" in capsys.readouterr().err


def test_a_truncated_model_is_named(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"the model in {folder} cannot be loaded"):
        weights.load_model(folder)


def test_the_weights_hash_changes_with_one_bit(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    before = weights.weights_hash(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert weights.weights_hash(folder) != before


@pytest.fixture(scope="module")
def model_without_tokens(tmp_path_factory):
    """A tiny model whose tokenizer never heard of function calls."""
    from transformers import AutoTokenizer

    folder = make_tiny_model(tmp_path_factory.mktemp("plain") / "model", [e.text for e in easy_lines()])
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    lost = set(FORMAT_TOKENS[2:])
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] not in lost]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {f"zz{i}" if token in lost else token: i for token, i in vocabulary.items()}
    path.write_text(json.dumps(content))
    assert len(AutoTokenizer.from_pretrained(folder)("<escape>", add_special_tokens=False)["input_ids"]) > 1
    return folder


def test_a_tokenizer_without_the_control_tokens_does_not_pass_and_the_hint_says_what_to_do(model_without_tokens):
    with pytest.raises(UserError, match="expected one id") as caught:
        audit(model_without_tokens, [])
    assert "python -m conversation.models.new_tokens" in caught.value.hint


def test_help_names_the_command_that_gives_a_base_its_tokens():
    done = run_script("train_conversation.py", "--help")
    assert "python -m conversation.models.new_tokens MODEL NEW_FOLDER" in " ".join(done.stdout.split())


def test_a_model_is_given_the_control_tokens(model_without_tokens, tmp_path):
    tokenizer, model = load_tokenizer(model_without_tokens), weights.load_model(model_without_tokens)
    (tmp_path / "given").mkdir()
    new_tokens.save_with_control_tokens(model, tokenizer, tmp_path / "given")
    folder = base_models.find_base_model(str(tmp_path / "given"))
    check_control_tokens(load_tokenizer(folder))
    embeddings = weights.load_model(folder).get_input_embeddings().weight.detach()
    new = embeddings[load_tokenizer(folder).convert_tokens_to_ids("<start_function_call>")]
    assert new.norm() == pytest.approx(embeddings.norm(dim=1).median().item(), rel=0.1)


def make_copy_of(folder, new, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["new_tokens", str(folder), str(new)])
    return new_tokens.main()


def test_a_copy_is_given_a_padding_token_where_there_is_none_and_is_audited(
    model_without_tokens, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(model_without_tokens, tmp_path / "model")
    lose_padding(folder)
    assert make_copy_of(folder, tmp_path / "new", monkeypatch) == 0
    assert "the tokenizer audit passed" in capsys.readouterr().out
    given = load_tokenizer(base_models.find_base_model(str(tmp_path / "new")))
    assert given.pad_token == "<pad>" and given.pad_token_id not in (None, given.convert_tokens_to_ids("<end_of_turn>"))
    audit(tmp_path / "new", easy_lines())
    rows = weights.load_model(tmp_path / "new").get_input_embeddings().num_embeddings
    assert rows == max(given.get_vocab().values()) + 1
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "new").iterdir()}
    assert set(modes.values()) == {oct(0o666 & ~current_umask())}, modes


def lose_padding(folder):
    """Take the padding token from a model folder's tokenizer."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] != "<pad>"]
    content["model"]["vocab"] = {"zzpad" if t == "<pad>" else t: i for t, i in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({n: v for n, v in json.loads(path.read_text()).items() if n != "pad_token"}))
    assert load_tokenizer(folder).pad_token_id is None


def test_a_copy_that_does_not_pass_the_whole_audit_is_not_called_good_and_nothing_stays(
    model_without_tokens, tmp_path, monkeypatch
):
    """A tokenizer without capital letters: its control tokens alone look right."""
    folder = shutil.copytree(model_without_tokens, tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    normalizers = [{"type": "Lowercase"}, content["normalizer"]]
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    path.write_text(json.dumps(content))
    for _ in range(2):
        with pytest.raises(UserError, match="new was not made: the tokenizer audit failed") as caught:
            make_copy_of(folder, tmp_path / "new", monkeypatch)
        assert caught.value.exit_status == 2 and caught.value.hint and "new_tokens" not in caught.value.hint
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_copy_that_cannot_be_written_leaves_nothing(model_without_tokens, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    model, tokenizer = weights.load_model(model_without_tokens), load_tokenizer(model_without_tokens)
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot write .*new: No space left"):
        new_tokens.make_copy(model, tokenizer, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_unprepared_gemma_vocabulary_has_unused_ids_for_the_tokens(tmp_path, tiny_folder):
    """The ids that Gemma leaves unused are renamed; nothing grows."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    swap = {}
    tokens = {i: token for token, i in content["model"]["vocab"].items()}
    for token, wanted in FUNCTION_GEMMA_IDS.items():
        if token in FORMAT_TOKENS[:2]:
            continue
        swap[token] = tokens[wanted]  # the token at Gemma's id gives way to an unused one
        swap[tokens[wanted]] = f"<unused{wanted - 6}>"
    vocabulary = {swap.get(token, token): i for token, i in content["model"]["vocab"].items()}
    content["model"]["vocab"] = vocabulary
    content["model"]["merges"] = []
    special = [t for t in vocabulary if t.startswith("<") and not t.startswith("<0x")]
    content["added_tokens"] = [
        {"id": vocabulary[t], "content": t, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for t in special
        if t not in FORMAT_TOKENS[2:]
    ]
    path.write_text(json.dumps(content), encoding="utf-8")
    size = len(load_tokenizer(folder))
    (tmp_path / "given").mkdir()
    new_tokens.save_with_control_tokens(weights.load_model(folder), load_tokenizer(folder), tmp_path / "given")
    given = load_tokenizer(tmp_path / "given")
    assert len(given) == size
    for token in FORMAT_TOKENS[2:]:
        assert given.convert_tokens_to_ids(token) == FUNCTION_GEMMA_IDS[token]


def test_disk_space_is_counted_in_fp32_whatever_the_weights_are_stored_in(tmp_path, tiny_folder):
    tensors = load_file(tiny_folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert weights.fp32_bytes(tmp_path) == weights.fp32_bytes(tiny_folder)
    assert weights.fp32_bytes(tmp_path) == sum(4 * tensor.numel() for tensor in tensors.values())
