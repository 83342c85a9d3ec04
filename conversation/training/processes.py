"""Several processes that train one run. The first decides for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conversation.runs.machine import number_of_processes

if TYPE_CHECKING:
    from accelerate import PartialState


def decided_by_first(value: str) -> str:
    """The value of the first process. Otherwise each would choose its own run folder."""
    if number_of_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _connect()
    return broadcast_object_list([value])[0]


def wait_for_first() -> None:
    """Wait until every process, the first included, has reached this point."""
    if number_of_processes() > 1:
        _connect().wait_for_everyone()


def _connect() -> PartialState:
    from accelerate import PartialState

    from conversation.models.weights import training_device

    return PartialState(cpu=training_device() == "cpu")
