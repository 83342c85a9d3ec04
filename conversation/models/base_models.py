"""Where base weights come from: the hub, a local folder, a GGUF file, or the embedded stand-in.

A base that lacks what the format needs is copied, once, into the model cache, and the copy has it: the control tokens,
a padding token, a tokenizer that adds no space.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from conversation.errors import UserError
from conversation.models.audit import check_control_tokens, lacks_tokens
from conversation.models.base_files import check_base_files
from conversation.models.hub import from_hub
from conversation.models.model_cache import cached_model
from conversation.models.new_tokens import adds_prefix_space, give_control_tokens, hint_after_copy, load_any
from conversation.models.stand_in import prepare_stand_in
from conversation.models.tokenizer import load_tokenizer, tokenizer_files
from conversation.models.weights import weight_files
from conversation_config import PROJECT, STAND_IN, cache_folder

PREPARATION = "1"  # counts versions of the preparation


def find_base_model(name: str) -> Path:
    """The local folder of a base model, with config, safetensors and tokenizer.

    `name`: the stand-in's name, a local folder, a GGUF file, or a hub name, from the hub's cache or downloaded.
    Raises UserError with a remedy when there is none.
    """
    if name == STAND_IN:
        if Path(name).exists():
            print(f"this is the stand-in; for the {name} here write ./{name}", file=sys.stderr)
        return prepare_stand_in()
    folder = Path(os.path.expanduser(name))
    if not folder.exists() and (PROJECT / folder).is_dir():
        folder = PROJECT / folder  # named by a run that was started in the project's folder
    if folder.is_dir():
        if _is_hub_name(name):
            print(f"{name} is the folder {folder.resolve()}, not the hub's model", file=sys.stderr)
        return _checked(folder.resolve())
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        return _prepared(folder.resolve())
    if not _is_hub_name(name):
        raise UserError(f"unknown base model: {name}", f"give a hub name, a local folder, a GGUF file, or {STAND_IN}")
    return _checked(from_hub(name))


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _checked(folder: Path) -> Path:
    """The folder. Raises UserError that lists why a training on it, or the merge after it, would fail."""
    check_base_files(folder)
    tokenizer = load_tokenizer(folder)
    if lacks_tokens(tokenizer) or adds_prefix_space(folder):
        return _prepared(folder)
    check_control_tokens(tokenizer)
    return folder


def _prepared(source: Path) -> Path:
    """The cached copy of a base, a folder or a GGUF file, that has what the format needs. The weights keep their type.

    Raises UserError that says why a copy cannot be made good; then nothing stays.
    """
    files = [source] if source.is_file() else [*weight_files(source), *tokenizer_files(source)]
    files += [path for path in (source / "config.json", source / "generation_config.json") if path.is_file()]
    seen = [PREPARATION, *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)]
    digest = hashlib.sha256("\n".join(seen).encode()).hexdigest()
    folder = cache_folder() / f"{source.stem if source.is_file() else _short_name(source)}-{digest[:12]}"
    needed = 8 * source.stat().st_size if source.is_file() else 2 * sum(path.stat().st_size for path in files)

    def make(part: Path) -> None:
        print(f"Giving {source.name} what the format needs, once, in {folder} ...", file=sys.stderr, flush=True)
        try:
            give_control_tokens(*load_any(source), part)
        except UserError as error:
            problem = str(error).replace(str(part), str(source))
            raise UserError(f"{source} cannot be a base: {problem}", hint_after_copy(error.hint)) from None

    return cached_model(folder, "base", {"source_sha256": digest}, needed, make)


def _short_name(folder: Path) -> str:
    """A name for the copy of a folder; of one in the hub's cache, that of the model."""
    hub = next((part for part in folder.parts if part.startswith("models--")), "")
    return hub.rpartition("--")[2] or folder.name
