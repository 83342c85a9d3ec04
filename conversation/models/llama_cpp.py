"""llama.cpp in this process: its C interface, in the shared library of the package xllamacpp.

The package's own Python interface is that of llama.cpp's server: it takes requests and gives sampled tokens, and no
logits. Its shared library exports the C interface of llama.h, which is called here with ctypes. The layout of two
structures depends on the version. It is pinned, and `_check_layout` compares the defaults that the library gives with
those of that version, so that another version is refused in a sentence and never misread.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.runs.files import shown

VERSION = "2026.10.11549"
INSTALL = f"install it: .venv/bin/python -m pip install xllamacpp=={VERSION}"
NORMAL, CONTROL, USER_DEFINED = 1 << 2, 1 << 3, 1 << 4
"""Attributes of tokens, llama.h's enum llama_token_attr."""
GGML_F32 = 0
NO_FLASH_ATTENTION = 0
NO_SLOT = 1  # llama_decode: the memory is full


class _ModelParams(ctypes.Structure):
    """llama_model_params: of no field of it anything but the default is needed. Longer than it is."""

    _fields_ = [("before", c_void_p * 2), ("n_gpu_layers", c_int32), ("rest", c_int8 * 492)]


class _ContextParams(ctypes.Structure):
    """llama_context_params, longer than it is: it is passed in memory, where what follows does not matter."""

    _fields_ = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *((name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, c_int32) for name in ("type_k", "type_v")),
        *((name, c_void_p) for name in ("abort_callback", "abort_callback_data", "not_used_here")),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("rest", c_int8 * 370),
    ]


_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "pooling_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "type_k": 1,
    "type_v": 1,
    "abort_callback": None,
    "not_used_here": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
}


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_seq_max": (c_uint32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_get_text": (c_char_p, [c_void_p, c_int32]),
    "llama_vocab_get_attr": (c_int32, [c_void_p, c_int32]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
}


@functools.cache
def library() -> Any:
    """The shared library, ready to use, and silent. Raises UserError when it is absent or another version."""
    try:
        import xllamacpp
        import xllamacpp.xllamacpp as extension
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "xllamacpp"
        problem = "llama.cpp's package, xllamacpp, " + ("is not installed" if absent else f"cannot be loaded: {error}")
        raise UserError(problem, INSTALL) from None
    if xllamacpp.__version__ != VERSION:
        raise UserError(f"xllamacpp is version {xllamacpp.__version__}, and {VERSION} is needed", INSTALL)
    found = ctypes.CDLL(extension.__file__)
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(found, name)
        except AttributeError:
            raise UserError(
                f"this build of xllamacpp does not export {name}: it cannot be used here", INSTALL
            ) from None
        function.restype, function.argtypes = result, arguments
    _check_layout(found.llama_context_default_params())
    found.llama_log_set(_silent, None)
    found.llama_backend_init()
    return found


def _check_layout(defaults: _ContextParams) -> None:
    """Raises UserError unless the fields are where this module expects them."""
    if wrong := [name for name, value in _DEFAULTS.items() if getattr(defaults, name) != value]:
        raise UserError(f"the structures of this build of xllamacpp are others: {', '.join(wrong)}", INSTALL)


@_LOG
def _silent(level: int, text: bytes, _: Any) -> None:
    """Takes llama.cpp's log, which would go to standard error; the last errors are kept for a message."""
    if level == 4 and text:  # GGML_LOG_LEVEL_ERROR
        _errors.append(text.decode(errors="replace").strip())
        del _errors[:-3]


_errors: list[str] = []


def quantize(values: NDArray[np.float32], ggml_type: int, size: int) -> NDArray[np.uint8]:
    """A matrix [rows, columns] in a type of ggml, as `size` bytes."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    result = np.empty(size, dtype=np.uint8)
    rows, columns = values.shape
    written = library().ggml_quantize_chunk(ggml_type, values.ctypes.data, result.ctypes.data, 0, rows, columns, None)
    if written != size:
        raise UserError(f"a tensor takes {written} bytes in llama.cpp's type {ggml_type}, expected {size}", "", 1)
    return result


class LlamaModel:
    """The model of a GGUF file, read by llama.cpp. Raises UserError when it cannot be loaded."""

    def __init__(self, path: Path):
        self._context = self._memory = None
        self._library = llama = library()
        _errors.clear()
        self._model = llama.llama_model_load_from_file(os.fsencode(path), llama.llama_model_default_params())
        if not self._model:
            reason = _errors[0] if _errors else "llama.cpp does not say why"
            raise UserError(f"{shown(path)} cannot be loaded: {reason}", "export it again, or name another file")
        self._vocabulary = llama.llama_model_get_vocab(self._model)
        self.tokens: int = llama.llama_vocab_n_tokens(self._vocabulary)

    def make_context(self, cells: int, sequences: int, exact: bool, threads: int) -> None:
        """Memory for several sequences, before the first `decode`.

        `cells`: how many tokens all sequences together can have; what they have in common is counted once. `exact`:
        keys and values in FP32 and no flash attention, to be compared with another program.
        """
        llama = self._library
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = cells, sequences, True
        params.n_outputs_max = sequences  # of logits: the default makes room for a batch of them, 0.5 GB
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = GGML_F32
            params.flash_attn_type = NO_FLASH_ATTENTION
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError(f"llama.cpp has no memory for {cells} tokens", "", TRIED_AND_FAILED)
        if llama.llama_n_seq_max(self._context) != sequences or llama.llama_n_ctx(self._context) < cells:
            raise UserError("llama.cpp did not take what it was told", INSTALL, TRIED_AND_FAILED)
        self._memory = llama.llama_get_memory(self._context)

    def __del__(self) -> None:
        for free, name in (("llama_free", "_context"), ("llama_model_free", "_model")):
            if pointer := getattr(self, name, None):
                getattr(self._library, free)(pointer)
                setattr(self, name, None)

    @property
    def longest(self) -> int:
        """The context that the model was trained for."""
        return int(self._library.llama_model_n_ctx_train(self._model))

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata, as text."""
        buffer = ctypes.create_string_buffer(4096)
        length = self._library.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode(errors="replace")

    # --- its tokens ---

    def token_names(self) -> list[str]:
        """What stands in the vocabulary for each token, with ▁ for a space."""
        get, vocabulary = self._library.llama_vocab_get_text, self._vocabulary
        return [(get(vocabulary, token) or b"").decode(errors="replace") for token in range(self.tokens)]

    def token_attributes(self) -> list[int]:
        get, vocabulary = self._library.llama_vocab_get_attr, self._vocabulary
        return [get(vocabulary, token) for token in range(self.tokens)]

    @property
    def bos(self) -> int:
        return int(self._library.llama_vocab_bos(self._vocabulary))

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text in which no control token is seen as one."""
        data = text.encode()
        buffer = (c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), buffer, len(buffer), False, False)
        if count < 0:
            raise UserError(f"llama.cpp cannot encode a text of {len(data)} bytes", "", TRIED_AND_FAILED)
        return buffer[:count]

    # --- its memory ---

    def decode(self, sequence: int, start: int, ids: Sequence[int]) -> NDArray[np.float32] | None:
        """Read at most 512 tokens into a sequence, from the position `start`. Returns the logits [vocabulary] after
        the last; None when the memory is full (then nothing was read)."""
        count = len(ids)
        sequence_id = ctypes.pointer(c_int32(sequence))
        batch = _Batch(
            count,
            (c_int32 * count)(*ids),
            None,
            (c_int32 * count)(*range(start, start + count)),
            (c_int32 * count)(*[1] * count),
            (POINTER(c_int32) * count)(*[sequence_id] * count),
            (c_int8 * count)(*[0] * (count - 1), 1),
        )
        status = self._library.llama_decode(self._context, batch)
        if status == NO_SLOT:
            return None
        if status != 0:
            raise UserError(f"llama.cpp cannot read {count} tokens: status {status}", "", TRIED_AND_FAILED)
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.tokens,)).copy()

    def cut(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        self._library.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a sequence begin with the first `length` tokens of another. They share them."""
        self._library.llama_memory_seq_cp(self._memory, source, target, 0, length)
