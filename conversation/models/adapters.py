"""LoRA adapters that cost no more than their matrix products.

peft computes `base(x) + lora_B(lora_A(x)) * scaling` in three passes over an output far wider than the rank, and three
more for the gradient. Here the product itself adds to the output (`addmm_`), forwards and backwards. In every other
respect the adapters are peft's: names, files, merging, and the numbers up to rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from conversation.models.frozen_weights import looking_like_float32
from conversation_config import LORA_TARGETS, TrainingConfig


def lora_config(config: TrainingConfig) -> LoraConfig:
    """Adapters on every projection, by the settings."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )


def add_adapters(model: nn.Module, config: TrainingConfig) -> PeftModel:
    """The model with fresh LoRA adapters. Everything else is frozen, and saving it saves the adapters alone.

    By itself peft would ask the hub, at each checkpoint, for the config of the base as it was named. Where that has
    another vocabulary than the copy that is trained, it would save the embeddings, too.
    """
    lora = lora_config(config)
    lora._register_custom_module({nn.Linear: FusedLoraLinear})  # peft's hook for custom layers
    with looking_like_float32(model):
        adapted: Any = get_peft_model(model, lora)  # a method of it is replaced below
    lora.base_model_name_or_path = config.base_model  # as it was named, not where it lies on this machine
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


class FusedLoraLinear(Linear):
    """peft's LoRA layer. `_LowRankLinear` computes it when one adapter is active on a frozen layer, else peft does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in features] -> [..., out features]"""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base = self.get_base_layer()
        special = args or kwargs or self.disable_adapters or self.merged or self.lora_variant
        if special or len(names) != 1 or self.lora_bias[names[0]] or base.weight.requires_grad:
            return super().forward(x, *args, **kwargs)
        (name,) = names
        dropout = self.lora_dropout[name]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _LowRankLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name], rate)


class _LowRankLinear(torch.autograd.Function):
    """x weightᵀ + bias + scaling (dropout(x) aᵀ) bᵀ.

    The backward pass needs only the mask of the dropout, a byte per number of x, and x itself, which all projections
    of it share. A product with nn.Dropout's output would save that output and its mask for each projection.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, rate: float
    ) -> Tensor:
        """x [..., in], weight [out, in], bias [out], a [rank, in], b [out, rank] -> [..., out]"""
        # The same draw as nn.Dropout's on a CPU: the same seed gives the same masks.
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - rate) if rate else None
        low = _flat(_dropped(x, mask)) @ a.T
        output = nn.functional.linear(x, weight.to(x.dtype), bias)  # a weight may be held in bfloat16
        ctx.scaling = scaling / (1 - rate)
        output.view(-1, output.shape[-1]).addmm_(low, b.T, alpha=ctx.scaling)
        ctx.save_for_backward(x, mask, low, weight, a, b)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        x, mask, low, weight, a, b = ctx.saved_tensors
        grad = _flat(grad_output)
        grad_low = (grad @ b).mul_(ctx.scaling)
        grad_a = grad_low.T @ _flat(_dropped(x, mask))
        grad_b = (low.T @ grad).mul_(ctx.scaling).T  # the faster order for the matrix library
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
            if mask is None:
                grad_x.addmm_(grad_low, a)
            else:
                grad_x.add_(_dropped(grad_low @ a, _flat(mask)))
            grad_x = grad_x.view_as(x)
        return grad_x, None, None, grad_a, grad_b, None, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros where the mask is False, not scaled up."""
    return x if mask is None else torch.where(mask, x, 0.0)
