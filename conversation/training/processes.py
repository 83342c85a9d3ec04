"""Several processes that train one run, on one machine or on several. The first decides for all.

Only the first works in the run folder. Every other has a folder of its own that goes with it: what it adds to a
checkpoint is sent to the first, and a checkpoint to resume from is sent to it. So the machines need no common disk.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.errors import TRIED_AND_FAILED, UserError, as_user_error, list_problems
from conversation.runs.folder import RunFolder
from conversation.runs.machine import is_first_process, number_of_processes
from conversation.runs.record import RunRecord, differences
from conversation.training.contact import HINT
from conversation.training.meeting import MEETING, OPEN_PORTS, Group

if TYPE_CHECKING:
    from accelerate import PartialState

LONGEST_WAIT = datetime.timedelta(hours=2)  # of a collective operation, while one process saves or evaluates

_group: Group | None = None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Meet the other processes and stay in contact during the block; with one process, do nothing.

    Raises UserError when they do not come, are not the same program, or are lost: with what they said, if they did.
    """
    if number_of_processes() == 1:
        yield
        return
    contact = _meet().contact
    try:
        with lost_processes_named():
            yield
    except BaseException as error:
        found = as_user_error(error)
        contact.close(str(found) if found else f"a defect, {type(error).__name__}")
        raise
    contact.close()


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Where an error inside the block comes of a lost process, raise the UserError that names this process instead."""
    try:
        yield
    except (RuntimeError, KeyboardInterrupt) as error:  # of a collective operation; of the launcher, which has noticed
        seconds = 5.0 if isinstance(error, RuntimeError) else 1.0
        if _group and (reason := _group.contact.wait_for_reason(seconds)):
            raise UserError(reason, HINT, TRIED_AND_FAILED) from error
        raise


@contextlib.contextmanager
def at_work(run: RunFolder, new: bool = False) -> Iterator[tuple[RunFolder, RunRecord]]:
    """A run's folder and record, for work on it (see `RunFolder.at_work`).

    For all but the first process the folder is a temporary one. `new`: a refused run leaves no folder.
    """
    if is_first_process():
        with run.at_work(new) as record, lost_processes_named():
            decided_by_first(record.to_json().decode())
            yield run, record
        return
    record = RunRecord.from_json(json.loads(decided_by_first("")))
    with tempfile.TemporaryDirectory(prefix="conversation-training-") as folder:
        yield RunFolder(Path(folder)), record


def check_same_training(record: RunRecord) -> None:
    """Raises UserError, in every process, when one would train with other settings or data, or another base."""
    if number_of_processes() == 1:
        return
    group = _meet()
    records = [RunRecord.from_json(value) for value in group.said_by_all("record", json.loads(record.to_json()))]
    problems = [
        f"{name}: {problem}"
        for name, other in zip(group.names, records, strict=True)
        for problem in differences(records[0], other)
    ]
    if problems:
        raise UserError(
            f"the processes do not train the same, compared with {group.names[0]}:\n{list_problems(problems)}",
            "give every machine the same flags, data and base",
        )


def decided_by_first(value: str) -> str:
    """The value of the first process. Otherwise each would choose its own run folder."""
    if number_of_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _connect()
    return broadcast_object_list([value])[0]


def holds_for_all(value: bool) -> bool:
    """Whether something is true in every process."""
    if number_of_processes() == 1:
        return value
    from accelerate.utils import gather_object

    _connect()
    return all(gather_object([value]))


def wait_for_first() -> None:
    """Wait until every process, the first included, has reached this point."""
    if number_of_processes() > 1:
        _connect().wait_for_everyone()


def collect_files(folder: Path) -> None:
    """Move the files that every other process has in its folder into the first's."""
    if number_of_processes() == 1:
        return
    from accelerate.utils import gather_object

    first = is_first_process()
    for files in gather_object([{} if first else {path.name: path.read_bytes() for path in folder.iterdir()}]):
        for name, content in files.items() if first else ():
            (folder / name).write_bytes(content)
    if not first:
        shutil.rmtree(folder)


def hand_out_files(folder: Path) -> None:
    """Copy the files of the first process's folder into that of every other."""
    if number_of_processes() == 1:
        return
    from accelerate.utils import broadcast_object_list

    first = is_first_process()
    for name in json.loads(decided_by_first(json.dumps([path.name for path in folder.iterdir()] if first else []))):
        content = broadcast_object_list([(folder / name).read_bytes() if first else b""])[0]
        if not first:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def _meet() -> Group:
    global _group
    if _group is None:
        _group = Group()
        atexit.register(_leave)
    return _group


def _connect() -> PartialState:
    """Join the processes for collective operations."""
    from accelerate import PartialState

    group = _meet()
    if PartialState._shared_state:
        return PartialState()
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from conversation.models.device import training_device

    try:
        state = PartialState(cpu=training_device() == "cpu", timeout=datetime.timedelta(seconds=MEETING))
        state.wait_for_everyone()
    except RuntimeError as error:
        reason = group.contact.wait_for_reason(2.0) or str(error).splitlines()[0]
        raise UserError(f"{group.names[group.rank]} is not joined with the others: {reason}", OPEN_PORTS) from None
    _set_pg_timeout(LONGEST_WAIT)
    return state


def _leave() -> None:
    """End the group in order: a thread of it that still runs while the interpreter ends would abort the process."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
