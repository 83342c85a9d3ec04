"""Engines: answers that stream, stop, and reuse what was read; the same from every program."""

import shutil

import numpy as np
import pytest

from conversation.answering import prefix_cache
from conversation.answering.constrained import common_length
from conversation.answering.decoding import (
    BEST_OF_N,
    CONSTRAINED,
    CONTRAST,
    DRAWN,
    GREEDY,
    Decoding,
    generate_answer,
)
from conversation.answering.engines import CONTEXT, open_engine
from conversation.answering.prefix_cache import PrefixCache
from conversation.errors import UserError
from conversation.format.calls import Answer, FollowUp, Prompt, Utterance
from conversation.models.merged_model import write_manifest
from conversation.models.tokenizer import load_tokenizer
from conversation.models.weights import load_model
from conversation.runs.files import file_hashes

ROOT = Prompt("Why?")
HISTORY = (Utterance("User", "Why?"), Utterance("AI", "It depends."))
CHILD = Prompt("Example?", HISTORY)
SIBLING = Prompt("How?", HISTORY)


@pytest.fixture(scope="module")
def merged(tiny_folder, tmp_path_factory):
    """The tiny model as a merged folder."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("merged") / "merged_model_fp32")
    write_manifest(folder, file_hashes(folder))
    return folder


@pytest.fixture(scope="module")
def engine(merged):
    return open_engine(merged)


def test_an_answer_streams_fragments_and_then_three_follow_ups(engine):
    parts = list(engine.stream(ROOT))
    fragments = [part for part in parts if isinstance(part, str)]
    follow_ups = parts[len(fragments) :]
    assert 1 <= len(fragments) <= 4 and len(follow_ups) == 3
    assert all(isinstance(part, FollowUp) for part in follow_ups)
    assert engine.answer(ROOT) == Answer(tuple(fragments), tuple(follow_ups))


@pytest.mark.parametrize("how", [CONSTRAINED, CONTRAST, GREEDY, DRAWN], ids=lambda how: how.method)
def test_an_engine_says_what_the_model_says(engine, merged, how):
    model, tokenizer = load_model(merged).eval(), load_tokenizer(merged)
    for prompt in (ROOT, CHILD, SIBLING, ROOT):
        expected = generate_answer(model, tokenizer, prompt, how)
        if how is GREEDY:
            assert engine.greedy(prompt) == expected
        else:
            ids = engine.vocabulary.encode(engine.answer(prompt, how).pieces())
            assert tokenizer.decode(ids) == tokenizer.decode(expected)
    if how is CONSTRAINED:
        assert engine.constrained(ROOT) == generate_answer(model, tokenizer, ROOT, how)


def test_a_seed_draws_an_answer_again_and_another_seed_another(engine):
    one, other = (Decoding("drawn", temperature=3.0, seed=seed) for seed in (1, 2))
    assert engine.answer(ROOT, one) == engine.answer(ROOT, one) != engine.answer(ROOT, other)


def test_the_prefix_of_a_parent_and_of_a_sibling_is_not_read_again(engine):
    length = engine.count_tokens
    engine.answer(ROOT)
    engine.answer(CHILD)
    after_parent = engine.reused_tokens
    engine.answer(SIBLING)
    after_sibling = engine.reused_tokens
    root, child, sibling = (engine.vocabulary.encode_prompt(each) for each in (ROOT, CHILD, SIBLING))
    assert after_parent >= common_length(root, child) > 0.5 * length(ROOT)
    assert after_sibling == common_length(child, sibling) > after_parent
    engine.answer(ROOT)
    assert engine.reused_tokens >= length(ROOT) - 1  # the branches left it whole


def test_a_warm_engine_has_read_what_all_prompts_begin_with(merged):
    engine = open_engine(merged)
    engine.warm_up()
    engine.answer(CHILD)
    child, root = (engine.vocabulary.encode_prompt(each) for each in (CHILD, ROOT))
    assert engine.reused_tokens == common_length(child, root)


def test_a_stopped_answer_ends_early_and_leaves_the_next_one_right(engine):
    whole = engine.answer(CHILD)
    asked = 0

    def after(number):
        def stopped():
            nonlocal asked
            asked += 1
            return asked > number

        return stopped

    for number in (0, 1, 25):
        asked = 0
        parts = list(engine.stream(CHILD, stopped=after(number)))
        assert len(parts) < 7 and asked == number + 1
    assert engine.answer(CHILD) == whole


def test_an_abandoned_stream_leaves_the_next_one_right(engine):
    whole = [engine.answer(each) for each in (ROOT, CHILD)]
    abandoned = engine.stream(ROOT)
    next(abandoned)
    assert engine.answer(CHILD) == whole[1]
    assert [*whole[0].fragments[1:], *whole[0].follow_ups] == list(abandoned)  # and can even be taken up again


def test_only_the_last_prompts_are_kept(monkeypatch):
    monkeypatch.setattr(prefix_cache, "KEPT", 3)
    living = set()

    class Tokens:
        """Remembers its tokens. Its logits are those."""

        def __init__(self, ids=()):
            self.ids = list(ids)
            living.add(self)

        def extend(self, ids):
            self.ids += ids
            return np.array(self.ids, dtype=np.float32)

        def cut(self, length):
            assert length < len(self.ids)
            del self.ids[length:]

        def copy(self, length):
            return Tokens(self.ids[:length])

        def free(self):
            living.remove(self)

    cache = PrefixCache(Tokens)
    generator = np.random.default_rng(0)
    for _ in range(300):
        context = [0, *generator.integers(0, 3, size=generator.integers(1, 8)).tolist()]
        with cache.reader([context], lambda: False) as reader:
            for _ in range(3):
                answer = generator.integers(0, 3, size=generator.integers(1, 6)).tolist()
                assert reader.logits(answer).tolist() == [[*context, *answer]]
        assert len(living) <= 3
    assert len(living) == 3


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
