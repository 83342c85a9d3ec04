"""Base models: a hub cache on disk, local folders, models without the tokens, and the error for a missing model."""

import json
import shutil

import pytest
from conftest import easy_lines, lay_into_hub_cache, make_tiny_model, run_script
from safetensors.torch import load_file, save_file

from conversation.errors import UserError
from conversation.format.control_tokens import FORMAT_TOKENS
from conversation.models import base_models, new_tokens, weights
from conversation.models.audit import FUNCTION_GEMMA_IDS, check_control_tokens
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


def test_a_model_without_the_control_tokens_is_refused_with_what_to_do(model_without_tokens):
    with pytest.raises(UserError, match="expected one id") as caught:
        base_models.find_base_model(str(model_without_tokens))
    assert "python -m conversation.models.new_tokens" in caught.value.hint


def test_a_model_is_given_the_control_tokens(model_without_tokens, tmp_path):
    tokenizer, model = load_tokenizer(model_without_tokens), weights.load_model(model_without_tokens)
    (tmp_path / "given").mkdir()
    new_tokens.save_with_control_tokens(model, tokenizer, tmp_path / "given")
    folder = base_models.find_base_model(str(tmp_path / "given"))
    check_control_tokens(load_tokenizer(folder))
    embeddings = weights.load_model(folder).get_input_embeddings().weight.detach()
    new = embeddings[load_tokenizer(folder).convert_tokens_to_ids("<start_function_call>")]
    assert new.norm() == pytest.approx(embeddings.norm(dim=1).median().item(), rel=0.1)


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
