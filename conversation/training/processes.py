"""Several processes that train one run. The first decides for all."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

from conversation.errors import UserError
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
    """Meet the other processes. Raises UserError when they do not come."""
    from accelerate import PartialState
    from torch.distributed import DistError

    from conversation.models.device import training_device

    rank, size, address, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if not PartialState._shared_state:
        print(f"Process {rank} of {size} meets the others at {address}:{port} ...", file=sys.stderr, flush=True)
        atexit.register(_leave)
    try:
        return PartialState(cpu=training_device() == "cpu")
    except DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the {size} processes that WORLD_SIZE asks for do not meet at {address}:{port}: {reason}",
            "start them with accelerate launch or torchrun; for one process, unset WORLD_SIZE",
        ) from None


def _leave() -> None:
    """End the group in order: a thread of it that still runs while the interpreter ends would abort the process."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
