"""What the cache of prompts keeps, and what it gives up."""

import numpy as np
import pytest
from transformers import DynamicCache

from conversation.answering import prefix_cache
from conversation.answering.prefix_cache import PrefixCache
from conversation.answering.reading import TransformersMemory
from conversation.models.weights import load_model


def test_a_prompt_whose_reading_broke_off_is_read_anew(merged_tiny):
    """As when a GPU has no memory left in the middle of a pass: some layers have read the tokens, others have not."""
    model = load_model(merged_tiny).eval()
    cache = PrefixCache(lambda: TransformersMemory(model))
    contexts = [[2, 30, 31, 32, 33], [2, 30, 40]]

    def read(answer):
        with cache.reader(contexts, lambda: False) as reader:
            return reader.logits(answer)

    expected = read([50, 51])
    for contexts[0] in ([2, 30, 31, 32, 33], [2, 30, 31, 34, 35, 36]):  # one that is kept, and one that is new
        for calls in (0, 2, 5):  # of four layers, for each of two contexts
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(DynamicCache, "update", failing_after(calls, DynamicCache.update))
                with pytest.raises(RuntimeError, match="out of memory"):
                    read([50, 51])
            found = read([50, 51])
            assert found[1] == pytest.approx(expected[1], abs=1e-4)
            if contexts[0][3] == 32:
                assert found[0] == pytest.approx(expected[0], abs=1e-4)


def failing_after(calls, function):
    left = iter(range(calls))

    def failing(*arguments, **options):
        if next(left, None) is None:
            raise RuntimeError("out of memory")
        return function(*arguments, **options)

    return failing


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
