"""The weights of base and adapters added up, in FP32, from file to file: never more than a shard in memory."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.models.weights import weight_files
from conversation.runs.files import read_json, write_json

SHARD_BYTES = 2 * 10**9
_FROM_THE_LAYER = re.compile(r"(?:^|\.)layers\.\d+\..+")  # what follows the prefix, which files and classes differ in


@dataclass(frozen=True)
class Change:
    """What an adapter adds to a weight: scaling x b a, with a [rank, in] and b [out, rank]."""

    a: Tensor
    b: Tensor
    scaling: float


def changes_of(model: PeftModel) -> dict[str, Change]:
    """The change of each adapted weight, by the weight's name from its layer on.

    Raises UserError when two have one name: they would be merged into one another.
    """
    changes: dict[str, Change] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.lora_A:
            (adapter,) = module.active_adapters
            pair: list[Any] = [module.lora_A[adapter], module.lora_B[adapter]]
            a, b = (layer.weight.detach().cpu() for layer in pair)
            weight = _from_the_layer(f"{name}.weight")
            if weight in changes:
                raise UserError(f"two adapted weights of the base are called {weight}", "take a base of text only")
            changes[weight] = Change(a, b, module.scaling[adapter])
    return changes


def _from_the_layer(name: str) -> str:
    found = _FROM_THE_LAYER.search(name)
    return found[0].lstrip(".") if found else name


def write_merged(base_folder: Path, folder: Path, changes: dict[str, Change], tied: bool) -> int:
    """Write the base's weights with the changes into `folder`, with the config that says so. Returns their bytes.

    Raises UserError when a value is not finite, or when a change fits no weight of the base; OSError and
    SafetensorError when the disk is full.
    """
    places = {
        name: path
        for path in weight_files(base_folder)
        for name in _names_in(path)
        if not (tied and name.endswith("lm_head.weight"))
    }
    found = Counter(map(_from_the_layer, places))
    for name in sorted(changes):
        if found[name] != 1:
            many = "two weights" if found[name] else "no weight"
            raise UserError(f"the base has {many} {name}, which the adapters change", "merge them into their own base")
    shards = _shards(places)
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _merged(places[name], name, changes.get(_from_the_layer(name))) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    config: dict[str, Any] = read_json(base_folder / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("torch_dtype", None)
            part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return total


def _names_in(path: Path) -> Iterator[str]:
    with safe_open(path, "pt") as file:
        yield from file.keys()


def _shards(places: dict[str, Path]) -> list[list[str]]:
    """The tensors in groups of at most SHARD_BYTES in FP32, or one larger tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, path in places.items():
        with safe_open(path, "pt") as file:
            needed = 4 * math.prod(file.get_slice(name).get_shape())
        if groups[-1] and filled + needed > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += needed
    return groups


def _merged(path: Path, name: str, change: Change | None) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor(name)
    tensor = tensor.to(torch.float32, copy=True) if change else tensor.float()
    if change:
        tensor += (change.b @ change.a) * change.scaling
    if not math.isfinite(tensor.sum().item()):  # a sum needs no second tensor of this size
        raise UserError(f"merging gives a value that is not finite, in {name}", "", TRIED_AND_FAILED)
    return tensor.contiguous()
