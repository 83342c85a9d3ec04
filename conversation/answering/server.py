"""The server: the page, an API of its own for it, and the conversations as files. OpenAI's API is in `openai_api`.

The page gets an answer as server-sent events: `fragment`, then three times `choice`, then `done`; or `error`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from conversation.answering.answer_queue import AnswerQueue, Changed, Ending, QueueFull
from conversation.answering.asking import TEMPERATURE, ask, decoding_of, make_prompt, one_line
from conversation.answering.guard import Access, Guard
from conversation.answering.http_requests import MAX_DOCUMENT, JobResponse, event, read_object, results_or_pings
from conversation.answering.openai_api import openai_routes
from conversation.answering.openapi import describe
from conversation.answering.refusals import Refused, refusal_of
from conversation.data.conversations import ConversationError
from conversation.data.own_trees import MAX_ROOT_QUESTION
from conversation.data.quality import MAX_FOLLOW_UP, MAX_FRAGMENT
from conversation.data.trees import TreeError
from conversation.errors import UserError
from conversation.format.calls import MAX_FRAGMENTS, NUM_FOLLOW_UPS, FollowUp, Utterance
from conversation.runs.conversation_files import Conflict, ConversationFiles, NotThere
from conversation.runs.files import shown

WEB = Path(__file__).parent / "web"
LIMITS = {
    "question_root": MAX_ROOT_QUESTION,
    "question_follow_up": MAX_FOLLOW_UP,
    "fragment": MAX_FRAGMENT,
    "fragments": MAX_FRAGMENTS,
    "choices": NUM_FOLLOW_UPS,
}
"""What a training tree can hold, in characters and numbers. A longer question is answered, but cannot be trained."""


@dataclass(frozen=True)
class Service:
    """What the handlers work with. `name`: the model's id in the API, before it is loaded and after."""

    queue: AnswerQueue
    files: ConversationFiles
    name: str
    web: Path = WEB


def make_app(service: Service, access: Access) -> ASGIApp:
    """The whole server as an ASGI application."""
    own = OwnApi(service)
    routes = [
        Route("/", own.page),
        Route("/health", own.health),
        Route("/openapi.json", own.description),
        Route("/api/model", own.model),
        Route("/api/answer", own.answer, methods=["POST"]),
        Route("/api/conversations", own.conversations),
        Route("/api/conversations/{id}", own.conversation, methods=["GET", "PUT", "DELETE"]),
        Route("/api/conversations/{id}/training_tree", own.training_tree, methods=["POST"]),
        Route("/api/conversations/{id}/picked", own.picked, methods=["POST"]),
        *openai_routes(service.queue, service.name),
        Mount("/static", _Static(directory=service.web, check_dir=False)),
    ]
    handlers: dict[Any, Any] = dict.fromkeys(_EXPECTED, _answer_error)
    handlers |= {HTTPException: _answer_http_error, Exception: _answer_defect}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), access)


class OwnApi:
    def __init__(self, service: Service):
        self._service, self._queue, self._files = service, service.queue, service.files

    async def page(self, request: Request) -> Response:
        return await _Static(directory=self._service.web, check_dir=False).get_response("index.html", request.scope)

    async def health(self, request: Request) -> Response:
        status = "ok" if self._queue.engine else "failed" if self._queue.failure else "loading"
        return JSONResponse({"status": status, "model": self._service.name}, 503 if status == "failed" else 200)

    async def description(self, request: Request) -> Response:
        return JSONResponse(describe())

    async def model(self, request: Request) -> Response:
        engine = self._queue.engine
        if not engine:
            raise Refused(503, "the model is not loaded yet", "ask again in a moment", code="loading", retry_after=1)
        about = {"name": engine.name, "engine": engine.program, "context": engine.context, "limits": LIMITS}
        return JSONResponse(about, headers=_FRESH)

    async def answer(self, request: Request) -> Response:
        body = await read_object(request)
        prompt = make_prompt(one_line(_text(body, "question"), "question"), _history(body), "question")
        prefetch = _field(body, "prefetch", bool, False)
        seed = _field(body, "seed", int, None)
        if seed is not None and not 0 <= seed < 2**63:
            raise Refused(400, "seed must be at least 0 and less than 2^63", parameter="seed")
        decoding = decoding_of(0.0 if seed is None else TEMPERATURE, 1.0, seed or 0)
        started = time.monotonic()
        job = self._queue.submit(ask(prompt, decoding), client_of(request), prefetch)

        async def events() -> AsyncIterator[bytes]:
            try:
                async for part in results_or_pings(job):
                    if isinstance(part, bytes):
                        yield part
                    elif isinstance(part, FollowUp):
                        choice = {"text": part.text, "confidence": part.probability, "target": part.target}
                        yield event("choice", choice)
                    else:
                        yield event("fragment", {"text": part})
                yield event("done", {"seconds": round(time.monotonic() - started, 3)})
            except Exception as error:
                yield event("error", {"error": refusal_of(error).error(request.url.path)})

        return JobResponse(job, events())

    # --- conversations ---

    async def conversations(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._files.overview), headers=_FRESH)

    async def conversation(self, request: Request) -> Response:
        identifier = request.path_params["id"]
        if request.method == "DELETE":
            await run_in_threadpool(self._files.delete, identifier)
            return Response(status_code=204)
        if request.method == "PUT":
            document = await read_object(request, MAX_DOCUMENT)
            kept = await run_in_threadpool(self._files.write, identifier, document)
            return JSONResponse({name: kept[name] for name in ("id", "revision", "changed")}, headers=_FRESH)
        return JSONResponse(await run_in_threadpool(self._files.read, identifier), headers=_FRESH)

    async def training_tree(self, request: Request) -> Response:
        body = await read_object(request, may_be_empty=True)
        leave_out = _field(body, "leave_out", list, [])
        if not all(isinstance(name, str) for name in leave_out):
            raise Refused(400, "leave_out is not a list of nodes' ids", parameter="leave_out")
        identifier = request.path_params["id"]
        path, _, warnings = await run_in_threadpool(self._files.save_training_tree, identifier, leave_out)
        return JSONResponse({"path": shown(path), "folder": shown(path.parent.parent), "warnings": warnings})

    async def picked(self, request: Request) -> Response:
        body = await read_object(request)
        node, choice = _text(body, "node"), _field(body, "choice", int, None)
        if choice is None:
            raise Refused(400, "choice is missing", parameter="choice")
        counts = await run_in_threadpool(self._files.count_picked, request.path_params["id"], node, choice)
        return JSONResponse({"picked": counts})


def client_of(request: Request) -> str:
    """Whom the queue takes for one client: an address."""
    return request.client.host if request.client else ""


class _Static(StaticFiles):
    """Files of the page. A browser asks each time whether they have changed, as an update changes several at once."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if "\0" in path:
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response


# --- what a body must hold -------------------------------------------------------------------------------------------

_FRESH = {"cache-control": "no-store"}


def _text(body: dict[str, Any], name: str) -> str:
    value = _field(body, name, str, None)
    if value is None:
        raise Refused(400, f"{name} is missing", parameter=name)
    return value


def _field(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        known = {str: "a text", bool: "true or false", int: "a whole number", list: "a list"}
        raise Refused(400, f"{name} is not {known[kind]}", parameter=name)
    return value


def _history(body: dict[str, Any]) -> list[Utterance]:
    history = []
    for number, line in enumerate(_field(body, "history", list, [])):
        place = f"history[{number}]"
        if not isinstance(line, dict) or line.get("speaker") not in ("User", "AI"):
            raise Refused(400, f'{place} is no object with the speaker "User" or "AI"', parameter=place)
        history.append(Utterance(line["speaker"], one_line(_text(line, "text"), f"{place}.text")))
    return history


# --- errors ----------------------------------------------------------------------------------------------------------

_EXPECTED = (
    *(Refused, QueueFull, Ending, Changed, UserError, OSError),
    *(Conflict, NotThere, TreeError, ConversationError),
)


async def _answer_error(request: Request, error: Exception) -> Response:
    path = request.url.path
    more: dict[str, Any] = {}
    if isinstance(error, Conflict):
        refused = Refused(409, str(error), "merge the two, or keep one under a new id")
        more = error.newer
    elif isinstance(error, NotThere):
        refused = Refused(404, str(error))
    elif isinstance(error, TreeError):
        refused = Refused(422, "this cannot be trained yet", "put right what is listed, then save it again")
        return JSONResponse({"error": {**refused.error(path), "problems": error.problems}}, 422)
    elif isinstance(error, ConversationError):
        refused = Refused(400, f"this is no conversation: {error.problems[0]}")
        return JSONResponse({"error": {**refused.error(path), "problems": error.problems}}, 400)
    else:
        refused = refusal_of(error)
    return JSONResponse({**more, "error": refused.error(path)}, refused.status, refused.headers)


async def _answer_defect(request: Request, error: Exception) -> Response:
    """The server shows the traceback itself."""
    refused = Refused(500, "the server made a mistake", "its console has the details")
    return Response(refused.body(request.url.path), 500, refused.headers, "application/json")


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    sentences = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not possible here"}
    refused = Refused(error.status_code, sentences.get(error.status_code, str(error.detail)))
    headers = {**refused.headers, **(error.headers or {})}
    return Response(refused.body(request.url.path), error.status_code, headers, "application/json")
