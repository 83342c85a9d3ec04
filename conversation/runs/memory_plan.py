"""The memory that a training was expected to need, as part of its record."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a training was expected to need, in bytes, and how its frozen weights are held.

    `activations`: what autograd saves for the largest pass, of `tokens` packed tokens. `work`: what a pass has beside
    them at any moment, the head's block included. `program`: libraries and data (0 on a card). `left`: what was still
    free when weights and adapters were there.
    """

    frozen_weights: str
    weights: int
    adapters_and_optimizer: int
    activations: int
    work: int
    program: int
    left: int
    tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters_and_optimizer + self.activations + self.work + self.program

    def __str__(self) -> str:
        parts = {
            f"weights in {self.frozen_weights}": self.weights,
            "adapters and optimizer": self.adapters_and_optimizer,
            f"activations of {self.tokens} tokens": self.activations,
            "work": self.work,
            "program": self.program,
        }
        listed = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items() if value)
        return f"Memory plan: {self.total / 1e9:.2f} GB ({listed}); {self.left / 1e9:.2f} GB were still free."
