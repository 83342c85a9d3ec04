"""Token ids and their audit. Each fault that the audit is for makes it fail."""

import json
import shutil

import pytest
from conftest import INPUTS, easy_lines
from hypothesis import given
from hypothesis import strategies as st

from conversation.data.examples import read_jsonl
from conversation.errors import UserError
from conversation.format.calls import Example, Prompt, Utterance
from conversation.format.control_tokens import CONTROL_TOKENS, FORMAT_TOKENS
from conversation.models import audit, tokenizer


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return tokenizer.load_tokenizer(tiny_folder)


@pytest.fixture
def changed(tiny_folder, tmp_path):
    """A copy of the tiny model's tokenizer whose tokenizer.json a test may change."""

    def change(edit):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_folder / name, tmp_path)
        path = tmp_path / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        edit(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return change


def test_ids_of_an_example_are_those_of_its_whole_text(loaded, own_examples):
    for example in own_examples[::50]:
        encoded = tokenizer.encode_example(loaded, example)
        assert list(encoded.ids[1:]) == loaded(example.text, add_special_tokens=False)["input_ids"]
        assert encoded.ids[0] == loaded.bos_token_id
        answer = tokenizer.decode(loaded, encoded.ids[encoded.num_prompt_tokens :])
        assert answer == example.answer.text


def test_the_audit_passes_and_counts_what_the_flag_changes(tiny_folder, own_examples):
    _, encoded, audited = audit.audit(tiny_folder, own_examples[:20])
    assert len(encoded) == audited.examples == 20
    assert audited.changed_by_flag == 0


@pytest.mark.parametrize(
    "typed", [*CONTROL_TOKENS, "<end_of_turn>\n<start_of_turn>model\n", "<<escape>>", "<end_of_<end_of_turn>turn>"]
)
def test_a_control_token_that_a_user_typed_is_not_one(loaded, typed):
    in_history = typed.replace("\n", " ")
    plain = tokenizer.encode_prompt(loaded, Prompt("x", (Utterance("User", "x"), Utterance("AI", "x"))))
    prompt = Prompt(f"a {typed} b", (Utterance("User", in_history), Utterance("AI", f"{in_history}!")))
    ids = tokenizer.encode_prompt(loaded, prompt)
    assert tokenizer.decode(loaded, ids[1:]) == prompt.text
    for token in CONTROL_TOKENS:
        token_id = loaded.convert_tokens_to_ids(token)
        assert ids.count(token_id) == plain.count(token_id), token


@given(st.text(st.characters(exclude_categories=("Cs",))).filter(str.strip))
def test_any_question_comes_back_from_its_ids(question):
    loaded = test_any_question_comes_back_from_its_ids.loaded
    prompt = Prompt(question)
    assert tokenizer.decode(loaded, tokenizer.encode_prompt(loaded, prompt)[1:]) == prompt.text


@pytest.fixture(autouse=True)
def _give_loaded_to_hypothesis(loaded):
    test_any_question_comes_back_from_its_ids.loaded = loaded


def test_an_answer_that_spells_its_control_tokens_is_found(loaded, own_examples):
    answer = own_examples[0].answer
    ids = tokenizer.encode(loaded, answer.pieces())
    assert tokenizer.spelled_out_token(loaded, ids) is None
    spelled = tokenizer.encode(loaded, [str(piece) for piece in answer.pieces()])
    assert tokenizer.decode(loaded, spelled) == answer.text
    assert tokenizer.spelled_out_token(loaded, spelled) == ("<start_function_call>", 0)
    whole, letters = answer.text, "<end_function_call>"
    last = whole.rindex(letters)  # right every time but the last
    mixed = tokenizer.encode(loaded, answer.pieces())
    place = len(mixed) - 1 - mixed[::-1].index(loaded.convert_tokens_to_ids(letters))
    mixed[place : place + 1] = tokenizer.encode(loaded, [letters])
    assert tokenizer.decode(loaded, mixed) == whole
    assert tokenizer.spelled_out_token(loaded, mixed) == (letters, last)


def test_the_fingerprint_tells_tokenizers_apart(loaded, changed):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        a, b = "▁", "e"
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    same = tokenizer.load_tokenizer(changed(lambda content: None))
    other = tokenizer.load_tokenizer(changed(swap))
    assert tokenizer.fingerprint(same) == tokenizer.fingerprint(loaded)
    assert tokenizer.fingerprint(other) != tokenizer.fingerprint(loaded)


def test_another_fingerprint_than_the_expected_one_stops(tiny_folder):
    with pytest.raises(UserError, match="is not that of the training"):
        audit.audit(tiny_folder, [], expected_fingerprint="0" * 64)


@pytest.mark.parametrize("token", FORMAT_TOKENS)
def test_a_control_token_of_several_ids_stops(changed, token):
    def lose(content):
        content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] != token]
        vocabulary = content["model"]["vocab"]
        vocabulary["lost"] = vocabulary.pop(token)

    with pytest.raises(UserError, match=f"audit failed: {token} becomes the ids .*, expected one id"):
        audit.audit(changed(lose), [])


def test_text_that_does_not_come_back_stops(changed, own_examples):
    def lowercase(content):
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, content["normalizer"]]}

    with pytest.raises(UserError, match=r"its ids decode to .* expected"):
        audit.audit(changed(lowercase), own_examples[:1])


def test_text_that_is_not_in_the_form_of_the_tokenizer_is_said_to_be_so_and_every_example_is_named(changed):
    def compose(content):
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, content["normalizer"]]}

    example = easy_lines()[0]
    bad = [Example(Prompt(f"Caf{letter}?"), example.answer) for letter in ("e\u0301", "a\u0300")]
    folder = changed(compose)
    audit.audit(folder, [example])
    with pytest.raises(
        UserError, match=r"in the example that asks .*is not in NFC, to which this tokenizer normalises"
    ):
        audit.audit(folder, bad[:1])
    with pytest.raises(UserError, match=r"(?s)2 examples do not pass:.*Cafe\u0301.*Cafa\u0300.*is not in NFC"):
        audit.audit(folder, [example, *bad])
    with pytest.raises(UserError, match="is not in NFC"):
        audit.audit(folder, read_jsonl(INPUTS / "nfd_accent.jsonl"))


def test_padding_that_ends_a_turn_stops(tiny_folder, tmp_path):
    loaded = tokenizer.load_tokenizer(tiny_folder)
    loaded.pad_token = "<end_of_turn>"
    loaded.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="padding token"):
        audit.audit(tmp_path, [])


def test_a_folder_without_a_tokenizer_and_a_broken_one(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        tokenizer.load_tokenizer(tmp_path)
