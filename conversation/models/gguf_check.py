"""A written GGUF file, read back and compared with the merged model: its tensors, and what is left of the training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from conversation.errors import TRIED_AND_FAILED, UserError
from conversation.models.gguf import MergedWeights

LARGEST_ERROR = {
    Type.F32: 0.0,
    Type.F16: 2**-11,
    Type.Q8_0: 1 / 220,
    Type.Q6_K: 1 / 20,
    Type.Q5_1: 1 / 28,
    Type.Q5_0: 1 / 14,
    Type.Q4_K: 1 / 5,
}
"""The largest error that a type may make, as a share of the largest value of a block (one value where a type has no
blocks): half a step of its scale, and room for the rounding of the scale itself. Q5_0 has a whole step at one end. The
K types choose their scales by the squared error, so that theirs have no bound: what was seen, and a fifth more."""
ROWS = 8192
SMALLEST = {Type.F16: 2**-24}
SMALLEST_OF_A_BLOCK = 2**-18
"""What is lost of small values: FP16 has steps of 2^-24 there, and a block's scale, in FP16, counts up to 128 times."""


@dataclass(frozen=True)
class TensorCheck:
    """How near the tensors of a file are to the merged model's.

    `share_of_error`: the largest error, as a share of what its type may make. `survived`: how much of the adapters'
    change is in the file, 1 being all of it; None without the adapters. `survived_by_type`: the same, by type of
    tensor.
    """

    tensors: int
    share_of_error: float
    survived: float | None
    survived_by_type: dict[str, float]


def check_tensors(path: Path, weights: MergedWeights, adapters: Path | None) -> TensorCheck:
    """Compare every tensor of a file with the merged model's.

    With d the adapters' change of a weight and e the error of the file, the share that survived is <d + e, d> / <d, d>,
    over all adapted weights: rounding that knows nothing of d leaves 1, a base whose values lie where the type rounds
    to leaves 0. Raises UserError when a tensor is missing or further away than its type allows.
    """
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if different := sorted(set(found) ^ set(weights.shapes)):
        raise UserError(f"the written file has other tensors: {', '.join(different[:3])}", "", TRIED_AND_FAILED)
    changes = AdapterChanges(adapters) if adapters else None
    worst = 0.0
    kept: dict[str, list[float]] = {}
    for name, tensor in found.items():
        expected = weights.read(name)
        change = changes.of(weights.original_name(name)) if changes else None
        for rows in _row_groups(expected.shape):
            values = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
            error = values.astype(np.float32, copy=False) - expected[rows]
            share = _share_of_error(error, expected[rows], tensor.tensor_type)
            if not share <= 1:
                raise UserError(
                    f"the tensor {name} in the written file is not the merged model's: an error of {share:.2g} times "
                    f"what {tensor.tensor_type.name} may make",
                    "",
                    TRIED_AND_FAILED,
                )
            worst = max(worst, share)
            if change is not None:
                products = kept.setdefault(tensor.tensor_type.name, [0.0, 0.0])
                whole = float(np.vdot(change[rows], change[rows]))
                products[0] += float(np.vdot(error, change[rows])) + whole
                products[1] += whole
    by_type = {kind: left / whole for kind, (left, whole) in sorted(kept.items()) if whole}
    whole = sum(products[1] for products in kept.values())
    survived = sum(products[0] for products in kept.values()) / whole if whole else None
    return TensorCheck(len(found), worst, survived, by_type)


def _row_groups(shape: tuple[int, ...]) -> list[slice]:
    """The rows of a tensor, some at a time: the embeddings would be 2 GB in between."""
    return [slice(start, start + ROWS) for start in range(0, shape[0], ROWS)]


def _share_of_error(error: NDArray[np.float32], expected: NDArray[np.float32], kind: Type) -> float:
    """The largest error of a tensor, as a share of what its type may make; infinite or NaN for a value that is not
    finite."""
    if kind is Type.F32:
        return 0.0 if not error.any() else float("inf")
    block = 1 if kind is Type.F16 else gguf.GGML_QUANT_SIZES[kind][0]
    largest = np.abs(expected).reshape(-1, block).max(1)
    found = np.abs(error).reshape(-1, block).max(1)
    allowed = LARGEST_ERROR[kind] * largest + SMALLEST.get(kind, SMALLEST_OF_A_BLOCK)
    return float((found / allowed).max())


class AdapterChanges:
    """What the adapters of a run add to the weights of the base: scaling B A."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            self._tensors = load_file(folder / "adapter_model.safetensors")
            self._scaling = float(config["lora_alpha"]) / float(config["r"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"the adapters in {folder} cannot be read: {error}", "train with --resume") from None

    def of(self, name: str) -> NDArray[np.float64] | None:
        """The change [out, in] of a weight of the merged model; None where there is none."""
        start = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (self._tensors.get(f"{start}.lora_{letter}.weight") for letter in "AB")
        if a is None or b is None:
            return None
        return self._scaling * (b.astype(np.float64) @ a.astype(np.float64))
