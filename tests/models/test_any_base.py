"""Bases of other families: their tokenizers, their control tokens, and the copies that have what the format needs."""

import json
import shutil

import pytest
import torch
from conftest import INPUTS, TOOLS, easy_lines, messages_of
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from conversation.answering.verdicts import judge
from conversation.data.examples import read_jsonl
from conversation.data.questions import Case
from conversation.errors import UserError
from conversation.format.calls import Answer, Example, FollowUp, Prompt, Utterance
from conversation.format.control_tokens import CONTROL_PATTERN, CONTROL_TOKENS, Control, cut, names_to_cut, pattern_of
from conversation.models import base_models, new_tokens
from conversation.models.audit import audit
from conversation.models.chat_format import chat_template
from conversation.models.tokenizer import control_ids, decode, encode, encode_prompt, load_tokenizer

TEXTS = [part for example in easy_lines() for part in CONTROL_PATTERN.split(example.text)]
RESERVED = [f"<|reserved_special_token_{number}|>" for number in range(12)]
CHAT_ML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def save_model(folder, size, kind="Llama", dtype=torch.bfloat16, **more):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **more},
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).save_pretrained(folder)
    return folder


def save_tokenizer(folder, built, special, plain=(), **names):
    from transformers import PreTrainedTokenizerFast

    built.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in str(built.pre_tokenizer) else [],
            show_progress=False,
        ),
    )
    if "byte_fallback=True" in str(built.model):
        content = json.loads(built.to_str())
        for byte in range(256):
            content["model"]["vocab"].setdefault(f"<0x{byte:02X}>", len(content["model"]["vocab"]))
        built = Tokenizer.from_str(json.dumps(content))
    built.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    PreTrainedTokenizerFast(tokenizer_object=built, **names).save_pretrained(folder)
    return len(load_tokenizer(folder))


def byte_level(normalizer=None):
    built = Tokenizer(models.BPE())
    if normalizer:
        built.normalizer = normalizer
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return built


def qwen(folder):
    """No bos, text in NFC, ChatML, other added tokens that are not special, more rows than tokens; bfloat16."""
    plain = ["<tool_call>", "</tool_call>", "<|fim_prefix|>"]
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    size = save_tokenizer(folder, byte_level(normalizers.NFC()), CHAT_ML, plain, **names)
    return save_model(folder, size + 3, "Qwen2")


def llama_2(folder):
    """A space in front of each text, bytes where a character has no token, no padding token, an untied head."""
    built = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    size = save_tokenizer(folder, built, ["<unk>", "<s>", "</s>"], **names)
    return save_model(folder, size, tie_word_embeddings=False, dtype=torch.float32)


def llama_3(folder):
    """bos, no padding token, a family of reserved tokens."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *RESERVED]
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return save_model(folder, save_tokenizer(folder, byte_level(), special, **names))


def smol(folder):
    """The start of a ChatML turn is bos, its end is padding."""
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return save_model(folder, save_tokenizer(folder, byte_level(), [*CHAT_ML, "<repo_name>"], **names))


FAMILIES = (qwen, llama_2, llama_3, smol)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda make: make.__name__)
def family(request, tmp_path_factory):
    """(a base as it is published, the folder that a training uses, the model cache)"""
    base = request.param(tmp_path_factory.mktemp("base") / request.param.__name__)
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return base, base_models.find_base_model(str(base)), cache / "conversation-training"


def test_a_base_that_lacks_something_is_copied_once_with_what_it_lacks(family, monkeypatch, capsys):
    base, folder, cache = family
    assert folder.parent == cache and folder.name.startswith(f"{base.name}-")
    loaded, _, found = audit(folder, easy_lines())
    assert found.examples == len(easy_lines())
    assert loaded.pad_token_id not in (None, loaded.convert_tokens_to_ids("<end_of_turn>"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert base_models.find_base_model(str(base)) == folder and "Giving" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert {path.name for path in base.iterdir()}.isdisjoint({"prepared.json"})


def test_the_copy_keeps_type_and_rows_of_the_weights_and_new_rows_are_of_the_usual_size(family):
    base, folder, _ = family
    old, new = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert old.keys() == new.keys() and {t.dtype for t in old.values()} == {t.dtype for t in new.values()}
    loaded = load_tokenizer(folder)
    token = loaded.convert_tokens_to_ids("<start_function_call>")
    for name, tensor in old.items():
        if new[name].shape == tensor.shape and "embed" not in name and "lm_head" not in name:
            assert torch.equal(new[name], tensor)
        elif "embed" in name or "lm_head" in name:
            known = len(load_tokenizer(base))
            assert torch.equal(new[name][:known], tensor[:known])
            common = tensor.float().mean(dim=0)
            usual = (tensor.float() - common).norm(dim=1).median().item()
            assert (new[name][token].float() - common).norm().item() == pytest.approx(usual, rel=0.1)


def test_a_new_token_is_no_likelier_than_others_where_all_embeddings_have_much_in_common(tmp_path):
    base = smol(tmp_path / "smol")
    tensors = load_file(base / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    embeddings += 5 * embeddings[7] / embeddings[7].norm() * embeddings.norm(dim=1).median()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    new_tokens.make_copy(*new_tokens.load_any(base), tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")["model.embed_tokens.weight"].float()
    common = made.mean(dim=0)
    along = made @ (common / common.norm())
    token = load_tokenizer(tmp_path / "made").convert_tokens_to_ids("<start_function_call>")
    assert (along[token] - along.median()).abs() < 3 * along.std()


def test_text_comes_back_from_its_ids_as_it_is(family):
    loaded = load_tokenizer(family[1])
    for text in (" a", "a  b", "x", "naïve 日本 😀", "a\n\tb"):
        prompt = Prompt(text, (Utterance("User", " x"), Utterance("AI", "y")))
        ids = encode_prompt(loaded, prompt)
        assert decode(loaded, ids[loaded.bos_token_id is not None :]) == prompt.text


def test_no_added_token_of_the_base_that_a_user_types_becomes_one(family):
    loaded = load_tokenizer(family[1])
    plain = encode_prompt(loaded, Prompt("x", (Utterance("User", "x"),)))
    for name in control_ids(loaded).values():
        for typed in (name, f"a{name}b", name + name, f"{name[0]}{name}"):
            prompt = Prompt(typed, (Utterance("User", typed),))
            ids = encode_prompt(loaded, prompt)
            assert [i for i in ids if i in control_ids(loaded)] == [i for i in plain if i in control_ids(loaded)], name
            assert decode(loaded, ids[loaded.bos_token_id is not None :]) == prompt.text


def test_a_token_of_chat_ml_typed_in_training_data_stays_text(tmp_path):
    example = Example(Prompt("What does <|im_end|> do?"), easy_lines()[0].answer)
    lines = read_jsonl(INPUTS / "types_im_end.jsonl") if (INPUTS / "types_im_end.jsonl").exists() else []
    folder = tmp_path / "made"
    new_tokens.make_copy(*new_tokens.load_any(smol(tmp_path / "smol")), folder)
    loaded, encoded, _ = audit(folder, [example, *lines])
    typed = loaded.convert_tokens_to_ids("<|im_end|>")
    assert all(typed not in ids.ids for ids in encoded)


def test_the_chat_template_gives_the_ids_that_were_trained_whatever_is_typed(family):
    """Sanitised by the library: the very ids. Without that, too, no typed token becomes one."""
    loaded = load_tokenizer(family[1])
    template = chat_template(loaded)
    for name in ("plain", *control_ids(loaded).values()):
        prompt = Prompt(f"a {name}b{name}", (Utterance("User", name), Utterance("AI", f"{name}!")))
        options = {"tools": TOOLS, "add_generation_prompt": True, "chat_template": template}
        given = loaded.apply_chat_template(messages_of(prompt), **options, sanitize_control_tokens=True)["input_ids"]
        assert list(given) == encode_prompt(loaded, prompt), name
        as_it_is = loaded.apply_chat_template(messages_of(prompt), **options)["input_ids"]
        assert [i for i in as_it_is if i in control_ids(loaded)] == [i for i in given if i in control_ids(loaded)], name


def test_an_answer_with_a_special_token_of_the_base_is_no_answer_and_no_training_data(family):
    _, folder, _ = family
    loaded = load_tokenizer(folder)
    name = next(each for each in control_ids(loaded).values() if each not in CONTROL_TOKENS or each == "<unk>")
    good = easy_lines()[0].answer
    pieces = good.pieces()
    place = next(i for i, piece in enumerate(pieces) if piece == good.fragments[0])
    within = [*pieces[:place], "It is ", Control(name), *pieces[place + 1 :]]
    verdict = judge(Case("x", Prompt("x")), loaded, encode(loaded, within))
    assert not verdict.passed and name in str(verdict.problem)
    assert judge(Case("x", Prompt("x")), loaded, encode(loaded, pieces)).passed
    if name not in CONTROL_TOKENS:
        bad = Example(Prompt("x"), Answer((f"It ends with {name}.",), good.follow_ups))
        with pytest.raises(UserError, match=r"asks 'x': its answer contains .*, a control token of this base"):
            audit(folder, [bad])


def test_other_added_tokens_may_stand_in_an_answer(tmp_path):
    folder = tmp_path / "made"
    new_tokens.make_copy(*new_tokens.load_any(qwen(tmp_path / "qwen")), folder)
    choices = tuple(FollowUp(text, "0.3", text.lower()) for text in ("Why", "How", "When"))
    audit(folder, [Example(Prompt("What is <tool_call>?"), Answer(("A <tool_call> starts a call.",), choices))])


def test_a_base_that_changes_is_prepared_again_and_what_cannot_be_prepared_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = smol(tmp_path / "smol")
    first = base_models.find_base_model(str(base))
    shutil.rmtree(base)
    assert base_models.find_base_model(str(llama_3(base))) != first
    content = json.loads((base / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (base / "tokenizer.json").write_text(json.dumps(content))
    kept = sorted(path.name for path in first.parent.iterdir() if path.is_dir())
    with pytest.raises(UserError, match=r"smol cannot be a base: the tokenizer audit failed: .*decode to") as caught:
        base_models.find_base_model(str(base))
    assert "take another model" in caught.value.hint and caught.value.exit_status == 2
    assert sorted(path.name for path in first.parent.iterdir() if path.is_dir()) == kept


def test_a_file_that_is_no_gguf_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"bad.gguf cannot be a base: .* cannot be read as a model in GGUF"):
        base_models.find_base_model(str(tmp_path / "bad.gguf"))


def test_names_of_a_family_are_cut_by_what_stands_before_their_number():
    names = names_to_cut([*RESERVED, "<b>", "\n\n", "▁▁", "x", "<|im_end|>", "tool1", "tool2"])
    assert {"<|reserved_special_token_", "<b>", "<|im_end|>", "tool1", "tool2", *CONTROL_TOKENS} == set(names)
    assert list(map(len, names)) == sorted(map(len, names), reverse=True)


@pytest.mark.parametrize("text", ["<|a|>", "|a|", "<|a|>|a|", "aaa", "aaaa", "<<|a|>", "<|a", "", "<|aa|>"])
def test_what_is_cut_holds_no_name_whole_and_loses_nothing(text):
    pattern = pattern_of(names_to_cut(["<|a|>", "|a|", "aa"]))
    parts = cut(text, pattern)
    assert "".join(parts) == text and not any(map(pattern.search, parts))
