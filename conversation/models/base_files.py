"""What is wrong with the files of a base model: found before a training, so that the merge after it does not fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from conversation.errors import UserError, list_problems
from conversation.models.tokenizer import tokenizer_files
from conversation.models.weights import INDEX, load_config, tied_but_different, weight_files
from conversation.runs.files import read_json


def check_base_files(folder: Path) -> None:
    """Raises UserError that lists why a training on a model folder, a copy of it, or the merge would fail."""
    problems = [*_file_problems(folder), *_config_problems(folder)]
    if len(problems) == 1:
        raise UserError(f"{folder} {problems[0][0]}", problems[0][1])
    if problems:
        listed = list_problems([f"it {problem}" for problem, _ in problems])
        hints = "; ".join(dict.fromkeys(hint for _, hint in problems if hint))
        raise UserError(f"{folder} cannot be trained on:\n{listed}", hints)


def _file_problems(folder: Path) -> Iterator[tuple[str, str]]:
    """What is wrong with the files of a base model: (problem, what to do)."""
    if not (folder / "config.json").is_file():
        yield "is not a model folder: no config.json", ""
    if adapters := sorted(path.name for path in folder.glob("adapter_*") if path.suffix in (".json", ".safetensors")):
        yield f"contains adapters: {', '.join(adapters)}", "merge them into their base first, or move them away"
    index = folder / INDEX
    if not list(folder.glob("*.safetensors")) and not index.exists():
        yield "has no weights in safetensors", "other formats are not read: they can contain programs"
    elif not (folder / "model.safetensors").exists() and not index.exists():
        yield "has neither model.safetensors nor model.safetensors.index.json", "fetch or make the model again"
    elif not (folder / "model.safetensors").exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            yield f"has a broken {index.name}: it lists no weights", "fetch or make the model again"
        elif missing := sorted({str(name) for name in shards.values() if not (folder / str(name)).is_file()}):
            yield f"lacks weights that its index lists: {', '.join(missing)}", "fetch or make the model again"
    files = [path for path in (*tokenizer_files(folder), *weight_files(folder)) if path.exists()]
    if unreadable := [path.name for path in files if not os.access(path, os.R_OK)]:
        yield f"has files that cannot be read: {', '.join(unreadable)}", "make them readable"


def _config_problems(folder: Path) -> Iterator[tuple[str, str]]:
    """What in the config would make the merge differ or fail: (problem, what to do)."""
    if not (folder / "config.json").is_file():
        return
    config = read_json(folder / "config.json")
    if config.get("transformers_weights"):
        yield "names another file of weights in config.json: transformers_weights", "call it model.safetensors"
    if config.get("quantization_config"):
        yield "has quantized weights", "take the model that was not quantized: training and merging are in FP32"
    if parts := _other_parts(folder):
        problem = f"is not a model of text alone: its config.json has {', '.join(parts)}"
        yield problem, "take a base of text only, such as gemma-3-270m or gemma-3-1b-it"
    if tied_but_different(folder):
        problem = "ties its embeddings in config.json, but its weights contain two that differ"
        yield problem, "set tie_word_embeddings to false there"


def _other_parts(folder: Path) -> list[str]:
    """The parts of a model of text and images, or of text and sound, beside its language model; [] for text alone.

    The layers of a tower have the names of the language model's, so that one's adapters would be merged into the other.
    """
    try:
        config = load_config(folder)
    except UserError:  # `load_model` says what is broken
        return []
    if config.get_text_config() is config:
        return []
    return sorted(set(config.sub_configs) - {"text_config"}) or ["text_config"]
