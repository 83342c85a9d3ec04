"""What a client sends, read with limits on size and time; and answers to clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from conversation.answering.refusals import Refused
from conversation.format import strict_json

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from conversation.answering.answer_queue import Job

MAX_BODY = 1_000_000  # bytes of a question with its history; the longest that a model reads is a fraction of it
MAX_DOCUMENT = 8_000_000  # bytes of a conversation's document
MAX_DRAINED = 64_000_000  # bytes of a body that are read and dropped, so that the client sees why it was refused
BODY_SECONDS = 30.0
PING_SECONDS = 10.0  # between signs of life in a stream that waits: proxies close silent ones
GONE = 499  # nginx's status for a client that left; nobody reads it


async def read_body(request: Request, most: int = MAX_BODY) -> bytes:
    """The body. Raises Refused 413 when it is longer than `most`, 408 when it takes longer than BODY_SECONDS."""
    body = bytearray()
    read = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                read += len(part)
                if read <= most:
                    body += part
                elif read > MAX_DRAINED:
                    break
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds") from None
    except ClientDisconnect:
        raise Refused(GONE, "the client left") from None
    if read > most:
        raise Refused(413, f"the request is too long: at most {most} bytes are read", code="request_too_large")
    return bytes(body)


async def read_object(request: Request, most: int = MAX_BODY, may_be_empty: bool = False) -> dict[str, Any]:
    """The JSON object in a body; an empty one for no body, where that may be. Raises Refused."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    body = await read_body(request, most)
    if may_be_empty and not body:
        return {}
    if kind != "application/json":
        raise Refused(415, "the request is not JSON", "send it with content-type: application/json")
    try:
        value = await run_in_threadpool(_parse, body) if len(body) > 50_000 else _parse(body)
    except strict_json.JsonError as error:
        raise Refused(400, f"the request cannot be read: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused(400, "the request is not a JSON object", code="invalid_json")
    return value


def _parse(body: bytes) -> Any:
    return strict_json.loads(strict_json.decode_utf8(body, is_file=False))


def event(name: str, data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def results_or_pings(job: Job, ping: bytes = b": waiting\n\n") -> AsyncIterator[Any]:
    """A job's results; a ping, bytes, while there is none for a while."""
    with contextlib.suppress(StopAsyncIteration):
        while True:
            try:
                yield await asyncio.wait_for(job.next(), PING_SECONDS)
            except TimeoutError:
                yield ping


class JobResponse(StreamingResponse):
    """A stream of server-sent events from a job. When the client leaves, the job is cancelled."""

    def __init__(self, job: Job, events: AsyncIterator[bytes]):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def unless_gone(request: Request, job: Job, answer: Callable[[], Any]) -> Response:
    """What `answer()` returns; when the client leaves before, the job is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return await answering  # perhaps a stream: the job goes on
        job.cancel()
        return Response(status_code=GONE)
    except BaseException:
        job.cancel()
        raise
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
