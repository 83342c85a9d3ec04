"""The order of the examples. It is the same for one process and for several, and after a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler


class OptimizerStepBatches(Sampler[list[int]]):
    """This process's share of the examples of each optimizer step, shuffled anew each epoch.

    Step k of an epoch has the same examples for any number of processes: two with half the examples each train what one
    trains. A process's share of an epoch's last step may be smaller, or empty.
    """

    def __init__(self, num_examples: int, per_process: int, seed: int, process: int = 0, processes: int = 1):
        self.num_examples, self.per_step = num_examples, per_process * processes
        self.seed, self.process, self.processes = seed, process, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_examples // self.per_step)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_examples, generator=generator).tolist()
        for start in range(0, self.num_examples, self.per_step):
            yield order[start : start + self.per_step][self.process :: self.processes]


class MicroBatches(Sampler[list[int]]):
    """The same steps, each cut into micro-batches of at most `size` examples, as the Trainer accumulates them.

    Every process has equally many: where its share is too small for that, a batch is empty.
    """

    def __init__(self, steps: OptimizerStepBatches, size: int):
        self.steps, self.size = steps, size

    def set_epoch(self, epoch: int) -> None:
        self.steps.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(self._per_step())

    def __iter__(self) -> Iterator[list[int]]:
        for share, count in zip(self.steps, self._per_step(), strict=True):
            yield from (share[number * self.size : (number + 1) * self.size] for number in range(count))

    def _per_step(self) -> list[int]:
        """The micro-batches of each step: as many as the largest share of it, the first process's, needs."""
        starts = range(0, self.steps.num_examples, self.steps.per_step)
        sizes = [min(self.steps.per_step, self.steps.num_examples - start) for start in starts]
        largest = [math.ceil(size / self.steps.processes) for size in sizes]
        return [math.ceil(share / self.size) for share in largest]


class EpochDataLoader(DataLoader):
    """Passes the epoch to its batches. The Trainer calls `set_epoch` if it exists."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, OptimizerStepBatches | MicroBatches)
        self.batch_sampler.set_epoch(epoch)
