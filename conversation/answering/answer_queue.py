"""One model, many who ask: requests wait here, and one thread works on them, one after the other.

Who waits is served in turn by client, so that ten requests of one do not hold up the first of another. Prefetches come
after all others, and the one at work is put back when somebody asks in earnest; it goes on later where it was. The
thread opens the engine first: requests may wait while the model loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from conversation.answering.refusals import Refused, refusal_of
from conversation.errors import UserError

if TYPE_CHECKING:
    from conversation.answering.engines import Engine

Work = Callable[["Engine", Callable[[], bool]], Generator[Any, None, None]]
"""What a request asks of the engine: it yields results, and ends early when its second argument returns true."""

MAX_WAITING = 64
MAX_WAITING_OF_ONE = 32  # of one client, so that another still finds room
MAX_PREFETCHES = 32
SECONDS_OF_AN_ANSWER = 5.0  # the first guess; then the mean of the answers given
_END = object()


class QueueFull(Exception):
    """Too many wait. `retry_after`: seconds until there may be room."""

    def __init__(self, retry_after: int):
        self.retry_after = retry_after
        super().__init__("too many requests are waiting")


class Ending(Exception):
    """The server is ending and takes no more requests."""

    def __init__(self) -> None:
        super().__init__("the server is ending")


class Changed(Exception):
    """A prefetch that was put back came out different the second time."""

    def __init__(self) -> None:
        super().__init__("the prefetch was interrupted")


class Job:
    """A request in the queue. Its results arrive in the event loop of the one that submitted it."""

    def __init__(self, work: Work, client: str, prefetch: bool):
        self.work, self.client, self.prefetch = work, client, prefetch
        self.cancelled = False
        self.sent: list[Any] = []  # results of a prefetch, to be skipped when it goes on
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, result: Any) -> None:
        """From the working thread: hand over a result, an exception, or the end."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)

    async def next(self) -> Any:
        """The next result. Raises StopAsyncIteration at the end, and what the work raised."""
        result = await self._results.get()
        if result is _END:
            raise StopAsyncIteration
        if isinstance(result, BaseException):
            raise result
        return result

    async def results(self) -> AsyncIterator[Any]:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield await self.next()

    def cancel(self) -> None:
        """Nobody waits for the results any more: generation stops before the next token."""
        self.cancelled = True


class _Waiting:
    """Jobs by client, taken in turn: the client that was served last comes last."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Job]] = OrderedDict()

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in list(self._of.values()) for job in list(jobs))

    def __len__(self) -> int:
        return sum(not job.cancelled for job in self)

    def of(self, client: str) -> int:
        return sum(not job.cancelled for job in list(self._of.get(client, ())))

    def add(self, job: Job, first: bool = False) -> None:
        self._drop_cancelled()
        jobs = self._of.setdefault(job.client, deque())
        jobs.appendleft(job) if first else jobs.append(job)

    def take(self) -> Job | None:
        self._drop_cancelled()
        if not self._of:
            return None
        client, jobs = self._of.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._of[client] = jobs  # behind the others
        return job

    def _drop_cancelled(self) -> None:
        """Who left takes neither memory, a prompt may have a megabyte, nor its client's turn."""
        live = ((client, deque(job for job in jobs if not job.cancelled)) for client, jobs in self._of.items())
        self._of = OrderedDict((client, jobs) for client, jobs in live if jobs)


class AnswerQueue:
    """The queue and its thread. `submit` is for the event loop; the rest may be called from anywhere.

    `engine`: None until it is open. `failure`: what `open_engine` raised, for the one who runs the server; every
    request is then refused.
    """

    def __init__(self, open_engine: Callable[[], Engine]):
        self.engine: Engine | None = None
        self.failure: BaseException | None = None
        self._open_engine = open_engine
        self._asked, self._prefetches = _Waiting(), _Waiting()
        self._change = threading.Condition()
        self._current: Job | None = None
        self._ending = False
        self._seconds = SECONDS_OF_AN_ANSWER
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Work, client: str, prefetch: bool = False) -> Job:
        """Let a request wait for its turn. Raises QueueFull, Ending, and Refused without an engine."""
        job = Job(work, client, prefetch)
        with self._change:
            if self._ending:
                raise self._why_not()
            waiting = self._prefetches if prefetch else self._asked
            most = MAX_PREFETCHES if prefetch else MAX_WAITING
            if len(waiting) >= most or waiting.of(client) >= min(most, MAX_WAITING_OF_ONE):
                raise QueueFull(max(1, round(self._seconds * len(self._asked))))
            waiting.add(job)
            self._change.notify()
        return job

    @property
    def waiting(self) -> int:
        """How many requests wait, without prefetches."""
        with self._change:
            return len(self._asked)

    def end(self) -> None:
        """Take no more, and give up what waits; what is at work is finished."""
        with self._change:
            self._ending = True
            for waiting in (self._asked, self._prefetches):
                while job := waiting.take():
                    job.put(self._why_not())
            if self._current and self._current.prefetch:
                self._current.put(Ending())
                self._current.cancel()
            self._change.notify()

    def _why_not(self) -> Exception:
        """What a request is told that is not taken, or given up."""
        if self.failure:
            return Refused(503, "the model cannot be loaded", "the server's console says why", code="not_loaded")
        return Ending()

    def stop(self, seconds: float = 5.0) -> None:
        """End at once: the answer at work stops before its next token. Waits so long for the thread."""
        self.end()
        with self._change:
            if self._current:
                self._current.put(Ending())
                self._current.cancel()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    # --- the working thread ---

    def _run(self) -> None:
        try:
            self.engine = self._open_engine()
        except BaseException as error:
            self.failure = error
            self.end()
            return
        while job := self._next():
            started = time.monotonic()
            if self._work_on(self.engine, job) and not job.prefetch:
                self._seconds += 0.2 * (time.monotonic() - started - self._seconds)

    def _next(self) -> Job | None:
        """Waits for the next job; None at the end."""
        with self._change:
            self._current = None
            while not (job := self._asked.take() or self._prefetches.take()):
                if self._ending:
                    return None
                self._change.wait()
            self._current = job
            return job

    def _work_on(self, engine: Engine, job: Job) -> bool:
        """Whether the job came to its end."""
        put_back = False

        def stopped() -> bool:
            nonlocal put_back
            put_back = put_back or (job.prefetch and self._somebody_asks())
            return job.cancelled or put_back

        try:
            with contextlib.closing(job.work(engine, stopped)) as results:
                for number, result in enumerate(results):
                    if job.cancelled:
                        return False
                    if number >= len(job.sent):
                        job.sent += [result] if job.prefetch else []
                        job.put(result)
                    elif result != job.sent[number]:
                        raise Changed
        except BaseException as error:  # whatever it is: without this thread all others would wait for ever
            job.put(error if isinstance(error, Changed | UserError) else refusal_of(error))
            return False
        if put_back and not job.cancelled:
            with self._change:
                if not self._ending:
                    self._prefetches.add(job, first=True)
                    return False
            job.put(Ending())
            return False
        job.put(_END)
        return not job.cancelled

    def _somebody_asks(self) -> bool:
        with self._change:
            return len(self._asked) > 0
