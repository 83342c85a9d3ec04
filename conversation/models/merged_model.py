"""A merged model's folder, and the manifest that reveals later changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conversation.errors import UserError
from conversation.models.audit import audit
from conversation.models.device import training_device
from conversation.models.tokenizer import fingerprint, load_tokenizer
from conversation.models.weights import load_model
from conversation.runs.files import find_damage, read_json, shown, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "conversation_model.json"


def write_manifest(folder: Path, files: dict[str, str]) -> None:
    """Write the hashes of a merged folder's files and the fingerprint of its tokenizer."""
    write_json(folder / MANIFEST, {"tokenizer_fingerprint": fingerprint(load_tokenizer(folder)), "files": files})


def load_verified(
    folder: Path, expected_fingerprint: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a merged folder, on the device used for training.

    Raises UserError when it is no merged folder, when a file changed since the merge, and when the tokenizer is not
    that of the training.
    """
    if not folder.is_dir():
        raise UserError(f"there is no merged model at {folder}", "merge_conversation_model.py makes one")
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"{folder} is not a merged model: it has no {MANIFEST}", "merge_conversation_model.py makes one"
        )
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{folder / MANIFEST} is broken: it does not list the model's files", "merge it again")
    if damage := find_damage(folder, files):
        raise UserError(f"the merged model is broken: {damage}", "merge it again")
    tokenizer, _, found = audit(folder, [], expected_fingerprint or manifest.get("tokenizer_fingerprint"))
    print(f"{shown(folder)}: {found}")
    return load_model(folder).eval().to(training_device()), tokenizer
