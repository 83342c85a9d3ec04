"""The weights of a model folder, loaded in FP32, measured, hashed."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversation.errors import UserError, list_problems, out_of_memory
from conversation.runs.files import read_json, sha256_file
from conversation.runs.record import BaseIdentity
from conversation_config import LORA_TARGETS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files with a model folder's weights, by the library's rule: model.safetensors, else the shards of the index.

    Others may lie beside them: averaged weights, the same ones for another program. Nothing reads those.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    shards = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).is_file() else None
    return sorted({folder / str(name) for name in shards.values()}) if isinstance(shards, dict) else []


def adapter_bytes(folder: Path, rank: int) -> int:
    """Size of a model's FP32 LoRA adapters: `rank` numbers for each row and each column of the adapted weights."""
    adapted = [shape for name, shape in _shapes(folder).items() if set(LORA_TARGETS) & set(name.split(".")[-2:-1])]
    return 4 * sum(rank * sum(shape) for shape in adapted)


def fp32_bytes(folder: Path) -> int:
    """Size of a model folder's weights in FP32, whatever their type on disk."""
    return 4 * sum(math.prod(shape) for shape in _shapes(folder).values())


def _shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of every tensor of a model folder, by name. The values are not read."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "numpy") as file:
                shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is broken: {error}", "fetch or make the model again") from None
    return shapes


def tied_but_different(folder: Path) -> bool:
    """Whether the config ties the embeddings while the weights contain a head that differs from the inputs'."""
    from safetensors import SafetensorError, safe_open

    places: dict[str, Path] = {}
    try:
        for path in weight_files(folder):
            with safe_open(path, "pt") as file:
                places.update(dict.fromkeys(file.keys(), path))
        heads = [name for name in places if name.endswith("lm_head.weight")]
        inputs = [name for name in places if name.endswith("embed_tokens.weight")]
        if len(heads) != 1 or len(inputs) != 1:
            return False
        found = []
        for name in (heads[0], inputs[0]):
            with safe_open(places[name], "pt") as file:
                found.append(file.get_tensor(name))
    except (SafetensorError, OSError):
        return False  # `load_model` says what is broken
    if found[0].shape == found[1].shape and bool((found[0] == found[1]).all()):
        return False
    try:
        return bool(text_config(folder).tie_word_embeddings)
    except UserError:  # `load_model` says what is broken
        return False


def load_config(folder: Path) -> PreTrainedConfig:
    """A model folder's config as the library reads it. Raises UserError when it cannot."""
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise UserError(f"{folder / 'config.json'} is missing", "fetch or make the model again")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers and validators raise
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}", "fetch or make the model again") from None
    return config


def text_config(folder: Path) -> PreTrainedConfig:
    """The part of a model's config that is about its language model. Raises UserError as `load_config` does.

    Not the file's own keys: earlier versions wrote others (`rope_theta`, not `rope_parameters`; no `layer_types`), and
    what equals a default may be left out.
    """
    return load_config(folder).get_text_config()


def weights_hash(folder: Path) -> str:
    """SHA-256 of a model folder's weights: of its safetensors file, or of the hashes of its shards."""
    digests = [sha256_file(path) for path in weight_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def identify(folder: Path, name: str, tokenizer_fingerprint: str) -> BaseIdentity:
    """The identity of the model in a folder. Raises OSError when a file is missing."""
    return BaseIdentity(
        name=name,
        weights_sha256=weights_hash(folder),
        config_sha256=sha256_file(folder / "config.json"),
        tokenizer_sha256=sha256_file(folder / "tokenizer.json"),
        tokenizer_fingerprint=tokenizer_fingerprint,
    )


def load_model(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """Load a causal language model from safetensors, in FP32 unless `dtype` says otherwise ("auto": as it is stored).

    Raises UserError when the files are broken or do not match: the library would invent a missing tensor.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,  # returns a pair, against the library's annotation
        )
    except Exception as error:  # the library raises whatever its parsers and validators raise
        if no_memory := out_of_memory(error):
            raise no_memory from None
        raise UserError(f"the model in {folder} cannot be loaded: {error}", "fetch or make it again") from None
    model, info = loaded
    for problem in ("missing", "mismatched"):
        if keys := sorted(map(str, info[f"{problem}_keys"])):
            raise UserError(
                f"the weights in {folder} do not fit its config.json: {problem} are {list_problems(keys, 3).strip()}",
                "fetch or make the model again",
            )
    return model
