"""The grammar in GBNF, in llama.cpp's own grammar engine: it writes valid answers only, and those that were trained."""

import ctypes

import numpy as np
import pytest

from conversation.format.control_tokens import CONTROL_TOKENS, END_OF_TURN, ESCAPE
from conversation.format.gbnf import gbnf
from conversation.format.parser import parse_answer
from conversation.models import llama_cpp
from conversation.models.gguf import TYPES, MergedWeights, write_gguf
from conversation.models.tokenizer import decode, encode, id_of, load_tokenizer


class Candidate(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float)]


class Candidates(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.POINTER(Candidate)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    ]


class Grammar:
    """llama.cpp's sampler for a grammar, and what it has written so far."""

    def __init__(self, model, text):
        self.llama, self.size = llama_cpp.library(), model.tokens
        self.llama.llama_sampler_init_grammar.restype = ctypes.c_void_p
        self.llama.llama_sampler_init_grammar.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
        self.llama.llama_sampler_apply.argtypes = [ctypes.c_void_p, ctypes.POINTER(Candidates)]
        self.llama.llama_sampler_accept.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        self.llama.llama_sampler_free.argtypes = [ctypes.c_void_p]
        self.sampler = self.llama.llama_sampler_init_grammar(model._vocabulary, text.encode(), b"root")
        assert self.sampler, llama_cpp._errors

    def allowed(self):
        """The tokens that may be next."""
        rows = (Candidate * self.size)(*[(token, 0.0, 0.0) for token in range(self.size)])
        candidates = Candidates(rows, self.size, -1, False)
        self.llama.llama_sampler_apply(self.sampler, ctypes.byref(candidates))
        return [row.id for row in candidates.data[: candidates.size] if row.logit == 0.0]

    def accept(self, token):
        self.llama.llama_sampler_accept(self.sampler, token)

    def __del__(self):
        self.llama.llama_sampler_free(self.sampler)


@pytest.fixture(scope="module")
def tokenizer(merged_tiny):
    return load_tokenizer(merged_tiny)


@pytest.fixture(scope="module")
def model(merged_tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(MergedWeights(merged_tiny), TYPES["q8_0"], path, {})
    return llama_cpp.LlamaModel(path)


def test_it_writes_answers_that_were_trained(model, tokenizer, own_examples):
    text = gbnf(tokenizer.get_vocab())
    for example in own_examples[::150]:
        grammar = Grammar(model, text)
        for token in encode(tokenizer, example.answer.pieces()):
            assert token in grammar.allowed(), example.answer.text
            grammar.accept(token)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_it_writes_is_a_valid_answer_even_when_control_tokens_are_likely(model, tokenizer, seed):
    grammar, generator = Grammar(model, gbnf(tokenizer.get_vocab())), np.random.default_rng(seed)
    control = {id_of(tokenizer, token) for token in CONTROL_TOKENS}
    spelled = set(encode(tokenizer, ["<end_of_turn>", "<pad>"]))  # in ordinary letters
    end, escape = id_of(tokenizer, END_OF_TURN), id_of(tokenizer, ESCAPE)
    answer: list[int] = []
    while end not in (allowed := grammar.allowed()):
        assert len(answer) < 3000
        likely = [token for token in allowed if token in control | spelled and (token != escape or seed % 2)]
        answer.append(int(generator.choice(likely if likely and generator.random() < 0.5 else allowed)))
        grammar.accept(answer[-1])
    assert {tokenizer.convert_ids_to_tokens(token) for token in allowed} <= {END_OF_TURN, "<eos>"}  # and nothing else
    parse_answer(decode(tokenizer, [*answer, end]).replace("\ufffd", "?"))
