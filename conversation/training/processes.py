"""Several processes that train one run, on one machine or on several. The first decides for all.

Only the first works in the run folder. Every other has a temporary folder: what it adds to a checkpoint is sent to the
first, and a checkpoint to resume from is sent to it. So the machines need no common disk. The folder goes with the
process, unless that is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.errors import TRIED_AND_FAILED, UserError, as_user_error, list_problems
from conversation.runs.folder import RunFolder
from conversation.runs.machine import is_first_process, number_of_processes
from conversation.runs.record import RunRecord, differences
from conversation.training.peer_monitor import HINT
from conversation.training.rendezvous import OPEN_PORTS, RENDEZVOUS_SECONDS, Group, rendezvous

if TYPE_CHECKING:
    from accelerate import PartialState

LONGEST_WAIT = datetime.timedelta(hours=2)  # of a collective operation, while one process saves or evaluates

_group: Group | None = None
_asked: BaseException | None = None  # the last error for which a lost process was looked for


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Meet the other processes and stay in contact during the block; with one process, do nothing.

    Raises UserError when they do not come, when they are not the same program, and when one fails or is lost: then it
    names that one, and what it said.
    """
    if number_of_processes() == 1:
        yield
        return
    monitor = _rendezvous().monitor
    try:
        with peer_loss_as_user_error():
            yield
    except BaseException as error:
        found = as_user_error(error)
        monitor.close(str(found) if found else f"a defect, {type(error).__name__}")
        raise
    monitor.close()


@contextlib.contextmanager
def peer_loss_as_user_error() -> Iterator[None]:
    """Where an error inside the block comes of a lost process, raise the UserError that names this process instead."""
    try:
        yield
    except RuntimeError as error:  # of a collective operation
        _raise_reason(error, 5.0)
        raise
    except KeyboardInterrupt as error:
        if error.args == (signal.SIGTERM,):  # of the launcher, which has noticed; any other signal is the user's
            _raise_reason(error, 0.5 if is_first_process() else 1.0)  # the first hears of it first
        raise


def _raise_reason(error: BaseException, seconds: float) -> None:
    """Raise a UserError that names the process that was lost, if one is within so many seconds.

    An error asks once: blocks are nested, and the others end meanwhile.
    """
    global _asked
    if _group is None or error is _asked:
        return
    _asked = error
    try:
        reason = _group.monitor.wait_for_reason(seconds)
    except KeyboardInterrupt:  # the launcher ends this process, too
        if not (reason := _group.monitor.reason):
            raise
    if reason:
        raise UserError(reason, HINT, TRIED_AND_FAILED) from error


@contextlib.contextmanager
def at_work(run: RunFolder, new: bool = False) -> Iterator[tuple[RunFolder, RunRecord]]:
    """A run's folder and record, for work on it (see `RunFolder.at_work`).

    For all but the first process the folder is a temporary one. `new`: a refused run leaves no folder.
    """
    if is_first_process():
        with run.at_work(new) as record, peer_loss_as_user_error():
            broadcast_from_first(record.to_json().decode())
            yield run, record
        return
    record = RunRecord.from_json(json.loads(broadcast_from_first("")))
    with tempfile.TemporaryDirectory(prefix="conversation-training-", ignore_cleanup_errors=True) as folder:
        _rendezvous().monitor.temporary = Path(folder)
        yield RunFolder(Path(folder)), record


def check_same_training(record: RunRecord) -> None:
    """Raises UserError, in every process, when one would train with other settings or data, or another base."""
    if number_of_processes() == 1:
        return
    group = _rendezvous()
    records = [RunRecord.from_json(value) for value in group.all_gather("record", json.loads(record.to_json()))]
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


def broadcast_from_first(value: str) -> str:
    """The value of the first process, in every process: a name, a decision, a record."""
    if number_of_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _connect()
    return broadcast_object_list([value])[0]


def all_true(value: bool) -> bool:
    """Whether something is true in every process."""
    if number_of_processes() == 1:
        return value
    from accelerate.utils import gather_object

    _connect()
    return all(gather_object([value]))


def barrier() -> None:
    """Wait until every process has reached this point."""
    if number_of_processes() > 1:
        _connect().wait_for_everyone()


def gather_files(folder: Path) -> None:
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


def broadcast_files(folder: Path) -> None:
    """Copy the files of the first process's folder into that of every other."""
    if number_of_processes() == 1:
        return
    from accelerate.utils import broadcast_object_list

    first = is_first_process()
    for name in json.loads(broadcast_from_first(json.dumps([path.name for path in folder.iterdir()] if first else []))):
        content = broadcast_object_list([(folder / name).read_bytes() if first else b""])[0]
        if not first:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def _rendezvous() -> Group:
    global _group
    if _group is None:
        _group = rendezvous()
        atexit.register(_leave)
    return _group


def _connect() -> PartialState:
    """Join the processes for collective operations."""
    from accelerate import PartialState

    group = _rendezvous()
    if PartialState._shared_state:
        return PartialState()
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from conversation.models.device import training_device

    try:
        state = PartialState(cpu=training_device() == "cpu", timeout=datetime.timedelta(seconds=RENDEZVOUS_SECONDS))
        state.wait_for_everyone()
    except RuntimeError as error:
        if reason := group.monitor.wait_for_reason(2.0):
            raise UserError(reason, HINT, TRIED_AND_FAILED) from None
        problem = f"{group.names[group.rank]} is not joined with the others: {str(error).splitlines()[0]}"
        raise UserError(problem, OPEN_PORTS) from None
    _set_pg_timeout(LONGEST_WAIT)
    return state


def _leave() -> None:
    """End the group in order: a thread of it that still runs while the interpreter ends would abort the process."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
