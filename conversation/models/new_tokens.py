"""Add the control tokens of the format to a model, each with a sensible first embedding.

`find_base_model` does it by itself for a base that lacks them, in the model cache. By hand:

    python -m conversation.models.new_tokens MODEL NEW_FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from conversation.errors import CommandLine, UserError, run_main
from conversation.format.control_tokens import CONTROL_TOKENS, END_OF_TURN, FORMAT_TOKENS
from conversation.models.audit import FUNCTION_GEMMA_IDS, GIVE_TOKENS, audit
from conversation.models.base_files import check_base_files
from conversation.models.gguf_weights import load_gguf
from conversation.models.tokenizer import control_ids, id_of, load_tokenizer
from conversation.models.weights import load_model
from conversation.runs.files import cannot_write, check_disk_space, make_folder, replace_folder
from conversation_config import set_up_libraries

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PADDING = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|finetune_right_pad_id|>")


def save_with_control_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    untrained: tuple[str, ...] = (),
    centred: bool = True,
) -> None:
    """Save model and tokenizer with every control token of the format as one id.

    A Gemma vocabulary has unused ids for them (46 to 52, `<unused40>` to `<unused46>`); any other vocabulary grows. A
    tokenizer without a padding token of its own gets one. One that puts a space in front of each text no longer does.
    The weights keep their type.
    New tokens, and those in `untrained`, start from the mean embedding of the words in their names (`centred`: see
    `_start_embedding`).
    """
    tokenizer, new = _with_control_tokens(tokenizer, folder)
    new += _with_padding(tokenizer, model)
    _save_tokenizer(tokenizer, folder)
    remove_prefix_space(folder)
    needed = max(tokenizer.get_vocab()[token] for token in (*new, *FORMAT_TOKENS)) + 1
    if needed > cast("nn.Embedding", model.get_input_embeddings()).num_embeddings:
        model.resize_token_embeddings(needed, mean_resizing=False)
    tokenizer = load_tokenizer(folder)
    for token in (*new, *untrained):
        _start_embedding(model, tokenizer, token, centred)
    model.save_pretrained(folder)


def _with_control_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer with all control tokens, and those that it lacked. `folder`: where it is or may be written."""
    added = control_ids(tokenizer).values()
    missing = [token for token in CONTROL_TOKENS if token not in added and token in FUNCTION_GEMMA_IDS]
    names = {FUNCTION_GEMMA_IDS[token]: token for token in missing}
    unused = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in names if i < len(tokenizer)}
    if missing and all(unused.get(i, "").startswith("<unused") for i in names):
        _save_tokenizer(tokenizer, folder)
        _rename_tokens(folder, {unused[i]: token for i, token in names.items()})
        tokenizer = load_tokenizer(folder)
    elif missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return tokenizer, missing


def _with_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """Give the tokenizer and the model's config a padding token that ends no turn. Returns it where it is new."""
    if tokenizer.pad_token_id not in (None, id_of(tokenizer, END_OF_TURN)):
        return []
    taken = tokenizer.get_vocab()
    pad = next((token for token in PADDING if token in taken), PADDING[0])
    tokenizer.add_special_tokens({"pad_token": pad})
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return [] if pad in taken else [pad]


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer without its chat template: the format has its own."""
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def _rename_tokens(folder: Path, names: dict[str, str]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    for added in content["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _start_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str, centred: bool) -> None:
    """Set a token's embedding to the mean of those of `<`, the words in its name, and `>`, at the usual length.

    The length of what: a mean of words is the common part of all embeddings, whole, plus a shortened part of its own.
    `centred`: only the latter gets the median length of its kind. To stretch both is right where there is no common
    part to speak of, as in Gemma 3. In SmolLM2-135M the common part has a length of 2.2, the other of 2.3: stretched
    together, the new tokens are likelier than anything at almost any place (completion loss of 2 of our examples 16.2,
    loss of plain text 5.5; with `centred` 3.05 and 3.58, where the base alone has 3.58 too).

    The brackets matter for names of one word: without them `<escape>` would start as a copy of `escape`. The head is
    tied and frozen, so no adapter could make one likelier than the other. On the stand-in and 16 of our examples the
    base has a completion loss of 2.92 with this start, and 3.19 without the brackets.
    """
    import torch

    parts = ["<", token.strip("<>").replace("_", " "), ">"]
    word_ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
    token_id = id_of(tokenizer, token)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    matrices = [model.get_input_embeddings().weight] + ([] if tied else [model.get_output_embeddings().weight])
    with torch.no_grad():
        for weight in matrices:
            some = weight[:: max(1, len(weight) // 10_000)].float()
            common = some.mean(dim=0) if centred else torch.zeros_like(some[0])
            own = weight[word_ids].float().mean(dim=0) - common
            usual = (some - common).norm(dim=1).median()
            weight[token_id] = (common + own * (usual / own.norm())).to(weight.dtype)


def adds_prefix_space(folder: Path) -> bool:
    """Whether a model folder's tokenizer puts a space in front of each text, as Llama 2's does.

    Text between two control tokens would then not come back as it was.
    """
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return json.dumps(_without_prefix_space(content)) != json.dumps(content)
    except (OSError, ValueError, AttributeError, KeyError):
        return False  # `load_tokenizer` says what is broken


def remove_prefix_space(folder: Path) -> None:
    """Let a tokenizer encode text as it is, and decode it so."""
    if not adds_prefix_space(folder):
        return
    path = folder / "tokenizer.json"
    content = _without_prefix_space(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    dropped = ("add_prefix_space", "legacy", "add_dummy_prefix")  # the library would build the normalizer anew
    settings = {name: value for name, value in settings.items() if name not in dropped}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "tokenizer.model").unlink(missing_ok=True)


def _without_prefix_space(content: dict[str, Any]) -> dict[str, Any]:
    """The parsed tokenizer.json without what adds a space, and without what takes it away in decoding."""
    changed = {**content}
    for part, members in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        stages = content.get(part) or {}
        kept = [stage for stage in map(_as_it_is, stages.get(members, [stages] if stages else [])) if stage]
        changed[part] = {"type": "Sequence", members: kept} if members in stages else kept[0] if kept else None
    if changed["normalizer"] == content.get("normalizer") and changed["pre_tokenizer"] == content.get("pre_tokenizer"):
        return content  # nothing adds a space: what the decoder strips is its own matter
    return changed


def _as_it_is(stage: dict[str, Any]) -> dict[str, Any] | None:
    """A stage of a tokenizer that neither adds nor strips a first space; None when it did nothing else."""
    if stage["type"] == "Prepend" or (stage["type"] == "Strip" and "content" in stage):
        return None
    if stage.get("prepend_scheme") in ("always", "first"):
        return {**stage, "prepend_scheme": "never"}
    return {**stage, "add_prefix_space": False} if stage.get("add_prefix_space") else stage


def main() -> int:
    """A copy of a model with the control tokens of the format, each one id, audited. What a training on a base that
    lacks them does by itself, in the model cache."""
    parser = CommandLine(main.__doc__, prog="conversation.models.new_tokens")
    parser.add_argument("model", type=Path, help="a causal language model: a folder in safetensors, or a GGUF file")
    parser.add_argument("new_folder", type=Path, help="where the copy goes; must not exist")
    args = parser.parse_args()
    if args.new_folder.exists():
        raise UserError(f"{args.new_folder} exists already", "name another, or remove it")
    set_up_libraries()
    make_copy(*load_any(args.model), args.new_folder)
    print(f"{args.new_folder}: {', '.join(FORMAT_TOKENS)} are one id each; the tokenizer audit passed")
    return 0


def load_any(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, the weights in their own type, or of a GGUF file. Raises UserError."""
    if not source.exists():
        raise UserError(f"there is no model at {source}", "give a model folder in safetensors, or a GGUF file")
    if source.is_file():
        return load_gguf(source)
    check_base_files(source)
    return load_model(source, "auto"), load_tokenizer(source)


def make_copy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model and tokenizer with the control tokens, audit them, and only then give the folder its name.

    Raises UserError, and leaves nothing, when the copy does not pass or cannot be written.
    """
    from safetensors import SafetensorError

    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if not folder.parent.is_dir():
        raise UserError(f"there is no folder {folder.parent}", "make it first")
    check_disk_space(folder.parent, needed, "the copy")
    try:
        make_folder(part)
        give_control_tokens(model, tokenizer, part)
        replace_folder(part, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        cause = error if isinstance(error, OSError) else OSError(str(error))
        raise cannot_write(folder, cause, needed) from None
    except UserError as error:
        problem = str(error).replace(str(part), str(folder))
        raise UserError(f"{folder} was not made: {problem}", hint_after_copy(error.hint), error.exit_status) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def give_control_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model and tokenizer with the control tokens into an empty folder, and audit them. Raises UserError."""
    save_with_control_tokens(model, tokenizer, folder)
    audit(folder, [])


def hint_after_copy(hint: str) -> str:
    """The hint of a failed audit, without the advice to do what was just done."""
    return "this tokenizer does not give text back as it is; take another model" if hint in ("", GIVE_TOKENS) else hint


if __name__ == "__main__":
    run_main(main)
