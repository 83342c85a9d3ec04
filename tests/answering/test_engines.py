"""Engines: answers that stream, stop, and reuse what was read; the same from every program."""

import functools
import json
import shutil
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversation.answering import asking, decoding, engines
from conversation.answering.decoding import CONSTRAINED, GREEDY, Decoding, generate_answer
from conversation.answering.engines import CONTEXT, open_engine
from conversation.answering.llama_cpp_reading import GgufVocabulary
from conversation.answering.prefix_cache import PrefixCache
from conversation.answering.vocabulary import FINGERPRINT_KEY, TransformersVocabulary
from conversation.data.questions import THREE_CASES
from conversation.errors import UserError
from conversation.format.calls import Answer, FollowUp, Prompt, Utterance
from conversation.format.control_tokens import CONTROL_TOKENS, FORMAT_TOKENS, Control
from conversation.format.grammar import MAX_CHARACTERS, Value
from conversation.models import llama_cpp
from conversation.models.chat_format import write_chat_format
from conversation.models.gguf import TYPES, MergedWeights, write_gguf
from conversation.models.merged_model import write_manifest
from conversation.models.tokenizer import common_prefix_length, encode, load_tokenizer
from conversation.models.tokenizer import fingerprint as tokenizer_fingerprint
from conversation.models.weights import load_model
from conversation.runs.files import file_hashes

ROOT = Prompt("Why?")
HISTORY = (Utterance("User", "Why?"), Utterance("AI", "It depends."))
CHILD = Prompt("Example?", HISTORY)
SIBLING = Prompt("How?", HISTORY)
CONTRAST, DRAWN, BEST_OF_N = map(Decoding, ("contrast", "drawn", "best_of_n"))


def answer(engine, prompt, how=CONSTRAINED):
    """A whole answer."""
    parts = [written.content for written in engine.stream(prompt, decoding=how)]
    fragments = tuple(part for part in parts if isinstance(part, str))
    return Answer(fragments, tuple(part for part in parts if isinstance(part, FollowUp)))


def ids_of(engine, prompt):
    """The ids of the likeliest answer within the grammar, without `<end_of_turn>`."""
    return [token for written in engine.stream(prompt) for token in written.ids]


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """A random model ends no value by itself: values of a few characters take as many tokens, and not hundreds."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, length in ((Value.FRAGMENT, 9), (Value.FOLLOW_UP, 6), (Value.TARGET, 5)):
            patch.setitem(MAX_CHARACTERS, kind, length)
        for module in (engines, decoding, asking):
            patch.setattr(module, "MAX_NEW_TOKENS", 60)
        yield


@pytest.fixture(scope="module")
def merged(merged_tiny):
    return merged_tiny


@pytest.fixture(scope="module")
def in_f32(merged, tmp_path_factory):
    """The same model as a GGUF file in FP32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    metadata = {FINGERPRINT_KEY: tokenizer_fingerprint(load_tokenizer(merged)), "general.size_label": "3M"}
    write_gguf(MergedWeights(merged), TYPES["f32"], path, metadata)
    return path


@pytest.fixture(scope="module", params=["transformers", "llama.cpp"])
def engine(request, merged, in_f32):
    return open_engine(merged if request.param == "transformers" else in_f32)


def test_an_answer_streams_fragments_and_then_three_follow_ups(engine):
    parts = [written.content for written in engine.stream(ROOT)]
    fragments = [part for part in parts if isinstance(part, str)]
    follow_ups = parts[len(fragments) :]
    assert 1 <= len(fragments) <= 4 and len(follow_ups) == 3
    assert all(isinstance(part, FollowUp) for part in follow_ups)
    assert answer(engine, ROOT) == Answer(tuple(fragments), tuple(follow_ups))


@pytest.mark.parametrize("how", [CONSTRAINED, CONTRAST, GREEDY, DRAWN], ids=lambda how: how.method)
def test_an_engine_says_what_the_model_says(engine, merged, how):
    model, tokenizer = load_model(merged).eval(), load_tokenizer(merged)
    for prompt in (ROOT, CHILD, SIBLING, ROOT):
        expected = generate_answer(model, tokenizer, prompt, how)
        if how is GREEDY:
            assert engine.greedy(prompt) == expected
        else:
            ids = engine.vocabulary.encode(answer(engine, prompt, how).pieces())
            assert tokenizer.decode(ids) == tokenizer.decode(expected)
    if how is CONSTRAINED:
        assert [*ids_of(engine, ROOT), *tokenizer.convert_tokens_to_ids(["<end_of_turn>"])] == expected


def test_a_seed_draws_an_answer_again_and_another_seed_another(engine):
    one, other = (Decoding("drawn", temperature=3.0, seed=seed) for seed in (1, 2))
    assert answer(engine, ROOT, one) == answer(engine, ROOT, one) != answer(engine, ROOT, other)


@pytest.fixture
def known(monkeypatch):
    """How many tokens of each prompt did not have to be read again."""
    found, begin = [], PrefixCache._begin

    def listening(cache, context):
        read = begin(cache, context)
        found.append(len(read.ids))
        return read

    monkeypatch.setattr(PrefixCache, "_begin", listening)
    return found


def test_the_prefix_of_a_parent_and_of_a_sibling_is_not_read_again(engine, known):
    history = (Utterance("User", "Who?"), Utterance("AI", "It is near."))
    prompts = [Prompt("Who?"), Prompt("Where?", history), Prompt("When?", history)]  # not asked by another test
    root, child, sibling = map(engine.vocabulary.encode_prompt, prompts)
    answer(engine, prompts[0])
    answer(engine, prompts[1])
    answer(engine, prompts[2])
    _, after_parent, after_sibling = known
    assert after_parent >= common_prefix_length(root, child) > 5
    assert after_sibling == common_prefix_length(child, sibling) > after_parent
    answer(engine, prompts[0])
    assert known[-1] >= len(root) - 1  # the branches left it whole


def test_a_warm_engine_has_read_what_all_prompts_begin_with(in_f32, known):
    engine = open_engine(in_f32)
    engine.warm_up()
    answer(engine, CHILD)
    child, root = (engine.vocabulary.encode_prompt(each) for each in (CHILD, ROOT))
    assert known == [0, common_prefix_length(child, root)]


def test_a_stopped_answer_ends_early_and_leaves_the_next_one_right(engine):
    whole = answer(engine, CHILD)
    asked = 0

    def after(number):
        def stopped():
            nonlocal asked
            asked += 1
            return asked > number

        return stopped

    for number in (0, 1, 15):
        asked = 0
        parts = list(engine.stream(CHILD, stopped=after(number)))
        assert len(parts) < 7 and asked == number + 1
    assert answer(engine, CHILD) == whole


def test_an_abandoned_stream_leaves_the_next_one_right(engine):
    whole = [answer(engine, each) for each in (ROOT, CHILD)]
    abandoned = engine.stream(ROOT)
    next(abandoned)
    assert answer(engine, CHILD) == whole[1]
    assert [*whole[0].fragments[1:], *whole[0].follow_ups] == [
        written.content for written in abandoned
    ]  # and can even be taken up again


@pytest.mark.parametrize("how", [GREEDY, BEST_OF_N, Decoding("sampled")], ids=lambda how: how.method)
def test_a_decoding_outside_the_grammar_is_refused(engine, how):
    with pytest.raises(ValueError, match="constrained or drawn"):
        next(engine.stream(ROOT, decoding=how))


def test_a_conversation_that_is_too_long_is_refused_in_a_sentence(engine):
    long = Prompt("Why?", tuple(Utterance("AI", "word " * 100) for _ in range(30)))
    assert engine.count_tokens(long) > CONTEXT
    with pytest.raises(UserError, match="the conversation is too long"):
        next(engine.stream(long))


def test_what_is_no_model_is_refused_in_a_sentence(tmp_path, merged):
    with pytest.raises(UserError, match="there is no model at"):
        open_engine(tmp_path / "absent")
    with pytest.raises(UserError, match="is not a merged model"):
        open_engine(tmp_path)
    broken = shutil.copytree(merged, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is broken"):
        open_engine(broken)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.json is broken"):
        open_engine(tmp_path)


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def test_llama_cpp_has_the_vocabulary_of_the_tokenizer(merged, in_f32):
    theirs = GgufVocabulary(llama_cpp.LlamaModel(in_f32), in_f32)
    ours = TransformersVocabulary(load_tokenizer(merged))
    assert set(theirs.plain) ^ set(ours.plain) == set() and theirs.escape == ours.escape
    assert [theirs.texts[token] for token in ours.plain] == [ours.texts[token] for token in ours.plain]


PIECES = st.lists(
    st.one_of(
        st.sampled_from([Control(token) for token in FORMAT_TOKENS]),
        st.sampled_from([*CONTROL_TOKENS, "<0x41>", "▁", "  ", "\n\n", "<", ">"]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
        st.text("abc <>_\n", max_size=12),
    ),
    max_size=8,
)


@settings(max_examples=400, deadline=None)
@given(pieces=PIECES)
def test_llama_cpp_encodes_any_text_as_the_tokenizer_does(merged, in_f32, pieces):
    ours, theirs = _both(merged, in_f32)
    assert theirs.encode(pieces) == encode(ours, pieces)


@functools.cache
def _both(merged, in_f32):
    return load_tokenizer(merged), GgufVocabulary(llama_cpp.LlamaModel(in_f32), in_f32)


def test_a_full_memory_forgets_the_oldest_prompt_and_not_the_answer(in_f32, monkeypatch):
    def prompt(letter, length):
        return Prompt("Why?", (Utterance("AI", f"{letter}7" * length),))  # hardly merged: two tokens

    whole = open_engine(in_f32)
    prompts = [prompt(letter, 40) for letter in "QXZKJV"]
    expected = [answer(whole, each) for each in prompts]
    dropped = []
    monkeypatch.setattr(PrefixCache, "_drop_one", _counted(PrefixCache._drop_one, dropped))
    monkeypatch.setattr(engines, "CELLS", 256)
    assert sum(map(whole.count_tokens, prompts)) > 2 * 256
    small = open_engine(in_f32)
    assert [answer(small, each) for each in prompts] == expected
    assert dropped and all(dropped)
    with pytest.raises(UserError, match="no memory for a text of this length"):
        answer(small, prompt("Q", 200))
    assert not dropped[-1] and answer(small, prompts[0]) == expected[0]


def _counted(method, results):
    def counted(self):
        results.append(method(self))
        return results[-1]

    return counted


def test_without_the_package_a_sentence_says_how_to_install_it(in_f32, monkeypatch):
    llama_cpp.library.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UserError, match="is not installed") as refused:
        open_engine(in_f32)
    assert "-m pip install xllamacpp==" in refused.value.hint
    monkeypatch.undo()
    monkeypatch.setattr("xllamacpp.__version__", "2020.1.1")
    with pytest.raises(UserError, match=r"version 2020.1.1, and 2026\S+ is needed"):
        open_engine(in_f32)
    monkeypatch.undo()
    monkeypatch.setitem(llama_cpp._DEFAULTS, "n_batch", 2047)
    with pytest.raises(UserError, match="structures of this build of xllamacpp are others: n_batch"):
        open_engine(in_f32)
    monkeypatch.undo()
    assert answer(open_engine(in_f32), ROOT)


def test_a_file_that_is_no_model_of_ours_is_refused_in_a_sentence(tmp_path, merged, in_f32):
    other = tmp_path / "other.gguf"
    for content, problem in ((b"", "is not a GGUF file"), (b"GGUF" + bytes(64), "cannot be loaded")):
        other.write_bytes(content)
        with pytest.raises(UserError, match=problem):
            open_engine(other)
    other.write_bytes(in_f32.read_bytes()[:-4096])
    with pytest.raises(UserError, match=r"cannot be loaded: .*(corrupted|incomplete|bounds)"):
        open_engine(other)
    for metadata in ({}, {FINGERPRINT_KEY: "0" * 64}):
        write_gguf(MergedWeights(merged), TYPES["q8_0"], other, metadata)
        with pytest.raises(UserError, match="is not that of the training: fingerprint"):
            open_engine(other)
    foreign = in_f32.read_bytes().replace(b"<start_function_call>", b"<start_function_cell>")
    other.write_bytes(foreign)
    with pytest.raises(UserError, match="is another model: its vocabulary has no <start_function_call>"):
        open_engine(other)


def test_it_computes_where_the_flag_says_or_says_why_not(merged, in_f32):
    assert open_engine(merged, "cpu").device == "cpu (as --device says)"
    assert open_engine(in_f32, "cpu").device == "cpu (llama.cpp)"
    with pytest.raises(UserError, match=r"--device cuda, but llama\.cpp computes on the CPU here"):
        open_engine(in_f32, "cuda")


@pytest.mark.standin
@pytest.mark.slow
def test_the_real_model_says_the_same_ids_in_both_programs(standin_folder, tmp_path):
    folder = shutil.copytree(standin_folder, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    generation = {"eos_token_id": tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_chat_format(folder, tokenizer)
    write_manifest(folder, file_hashes(folder))
    path = tmp_path / "real-f32.gguf"
    write_gguf(MergedWeights(folder), TYPES["f32"], path, {FINGERPRINT_KEY: tokenizer_fingerprint(tokenizer)})
    one, other = open_engine(folder), open_engine(path)
    for case in THREE_CASES:
        assert ids_of(other, case.prompt) == ids_of(one, case.prompt)
        assert other.greedy(case.prompt)[:30] == one.greedy(case.prompt)[:30]
