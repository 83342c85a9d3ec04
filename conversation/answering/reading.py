"""How a model of transformers reads: several contexts at once, or one of which keys and values are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from conversation.answering.constrained import Scores
from conversation.models.tokenizer import common_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BatchReader:
    """Contexts, padded on the left, and the same answer after each of them (see `constrained.Reader`)."""

    def __init__(self, model: PreTrainedModel, contexts: Sequence[list[int]], pad: int):
        width = max(map(len, contexts))
        self._model = model
        self._contexts = torch.tensor([[pad] * (width - len(each)) + each for each in contexts])
        self._mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in contexts])
        self._cache = DynamicCache()  # without a config: sliding layers, too, keep all, so that it can be cut anywhere
        self._read: list[int] = []

    def logits(self, answer: list[int]) -> Scores:
        """The logits [contexts, vocabulary] after a non-empty answer, in float32.

        Keys and values of what was read before are kept: only what is new is computed.
        """
        known = min(common_prefix_length(self._read, answer), len(answer) - 1)
        if self._read:
            self._cache.crop(known - len(self._read))
        new = torch.tensor([answer[known:]]).expand(len(self._contexts), -1)
        if not self._read:
            new = torch.cat([self._contexts, new], 1)
        mask = torch.nn.functional.pad(self._mask, (0, len(answer)), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(
                input_ids=new.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        self._read = list(answer)
        return logits[:, -1].float().cpu().numpy()


class TransformersMemory:
    """Keys and values of a sequence that a model has read (see `prefix_cache.Memory`)."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache | None = None):
        self._model = model
        self._cache = cache or DynamicCache()

    def extend(self, ids: Sequence[int]) -> Scores:
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.tensor([list(ids)], device=self._model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[0, -1].float().cpu().numpy()

    def cut(self, length: int) -> None:
        self._cache.crop(length - self._cache.get_seq_length())

    def copy(self, length: int) -> TransformersMemory:
        """Copies the keys and values: reading on changes neither memory through the other."""
        cache = DynamicCache()
        layers: list[Any] = self._cache.layers  # each is a DynamicLayer: the cache was made without a config
        for number, layer in enumerate(layers):
            cache.update(layer.keys[..., :length, :], layer.values[..., :length, :], number)
        return TransformersMemory(self._model, cache)

    def free(self) -> None:
        self._cache = DynamicCache()
