"""Frozen weights held in bfloat16, and widened to FP32, one matrix at a time, where they are used.

Most models are published in bfloat16. Widening such a number to FP32 and back changes nothing, so a matrix product with
the widened matrix is bit for bit that with an FP32 copy, at half the memory. Norms, biases, adapters, activations,
gradients and the loss are FP32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from conversation.errors import UserError
from conversation.models.weights import load_model, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDENED_AT_A_TIME = 2**26  # numbers of a matrix; a head is larger, and only an ordinary forward needs its product whole


def loses_bits(folder: Path) -> str | None:
    """The first tensor of a model folder that bfloat16 would change; None when it can hold all. Reads one at a time."""
    from safetensors import SafetensorError, safe_open

    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    tensor = None if file.get_slice(name).get_dtype() == "BF16" else file.get_tensor(name)
                    if tensor is not None and not torch.equal(tensor.bfloat16().to(tensor.dtype), tensor):
                        return name
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is broken: {error}", "fetch or make the model again") from None
    return None


def load_in_bfloat16(folder: Path) -> PreTrainedModel:
    """A causal language model whose matrices are held in bfloat16 and whose arithmetic is FP32.

    Every weight must fit into bfloat16: see `loses_bits`. Raises UserError when the model cannot be loaded.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    model = load_model(folder, "bfloat16")
    held = {
        id(module.weight) for module in model.modules() if type(module) is nn.Linear or isinstance(module, nn.Embedding)
    }
    for parameter in model.parameters():
        if id(parameter) not in held:
            parameter.data = parameter.data.float()
    with init_empty_weights(include_buffers=False):  # a buffer made in bfloat16 may have lost bits
        exact = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    for name, buffer in exact.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WidenedLinear
        elif isinstance(module, nn.Embedding):
            module.padding_idx = None  # it matters only to a gradient, and there is none
            module.__class__ = type(f"Widened{type(module).__name__}", (WidenedEmbedding, type(module)), {})
    model.config.dtype = torch.float32
    return model


class WidenedLinear(nn.Linear):
    """A frozen linear layer held in bfloat16: its product is that with its weight in the type of the input."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in features] -> [..., out features], in the type of `input`"""
        if input.numel() == 0:  # the shared-prefix step asks for the logits of no token
            return input.new_empty(*input.shape[:-1], self.out_features)
        rows = max(1, WIDENED_AT_A_TIME // self.in_features)
        blocks = self.weight.split(rows)
        biases = [None] * len(blocks) if self.bias is None else self.bias.split(rows)
        products = [_WidenedProduct.apply(input, *pair) for pair in zip(blocks, biases, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, -1)


class _WidenedProduct(torch.autograd.Function):
    """input weightᵀ + bias, with the weight, not its wide copy, saved for the backward pass."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(input, weight.to(input.dtype), bias)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (weight,) = ctx.saved_tensors
        return grad_output @ weight.to(grad_output.dtype), None, None


class WidenedEmbedding(nn.Embedding):
    """A frozen embedding held in bfloat16. Only the rows that are looked up are widened."""

    def forward(self, input: Tensor) -> Tensor:
        """ids [...] -> FP32 [..., width]"""
        if self.weight.dtype == torch.float32:
            return super().forward(input)
        ids, places = input.unique(return_inverse=True)
        rows = nn.functional.embedding(ids, self.weight).float()
        return torch.func.functional_call(self, {"weight": rows}, (places,))


@contextlib.contextmanager
def looking_like_float32(model: nn.Module) -> Iterator[None]:
    """Let weights held in bfloat16 have the type FP32 for a while, and no values.

    peft gives new adapters the type of the weights that they adapt; rounded adapters would not be those of FP32.
    """
    held: dict[Any, Tensor] = {p: p.data for p in model.parameters() if p.dtype == torch.bfloat16}
    for parameter, values in held.items():
        parameter.data = values.new_zeros((), dtype=torch.float32).expand(values.shape)
    try:
        yield
    finally:
        for parameter, values in held.items():
            parameter.data = values
