"""OpenAI's API: /v1/models and /v1/chat/completions, plain and streamed.

With the tools add_text and add_choice an answer is tool calls, as it was trained; without them it is text, one fragment
a line, with the follow-ups beside it in a field of its own, `follow_ups`. A call is whole or absent: `stop` and
`max_tokens` end an answer before the call that they would cut; `stop` can cut a text. Tokens are those of the calls as
the model wrote them, their syntax included. Follow-ups that `max_tokens` has no room for are left out of a text answer,
whose text is whole: it ends with "stop".
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from conversation.answering.answer_queue import AnswerQueue
from conversation.answering.asking import check_length
from conversation.answering.http_requests import JobResponse, read_object, results_or_pings, unless_gone
from conversation.answering.openai_requests import ChatRequest, parse_request
from conversation.answering.refusals import Refused, refusal_of
from conversation.format.calls import FollowUp
from conversation.format.grammar import ADD_CHOICE, ADD_TEXT

if TYPE_CHECKING:
    from conversation.answering.constrained import Written
    from conversation.answering.engines import Engine

Json = dict[str, Any]


@dataclass(frozen=True)
class _PromptRead:
    """The first result of a job: the prompt fits. `tokens`: its length."""

    tokens: int


@dataclass(frozen=True)
class _Part:
    """A piece of answer number `index`: a fragment or follow-up whose call is wanted, or some more of its text."""

    index: int
    content: str | FollowUp


@dataclass(frozen=True)
class _Finished:
    """Answer number `index` is at its end, for this reason in OpenAI's words, after so many tokens."""

    index: int
    reason: str
    tokens: int


@dataclass
class _Usage:
    prompt: int = 0
    completion: int = 0

    def as_json(self) -> Json:
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


def openai_routes(queue: AnswerQueue, name: str) -> list[Route]:
    """The routes of a server whose model has this id."""
    api = OpenAiApi(queue, name)
    return [
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
    ]


class OpenAiApi:
    def __init__(self, queue: AnswerQueue, name: str):
        self._queue, self._name = queue, name
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def chat_completions(self, request: Request) -> Response:
        asked = parse_request(await read_object(request))
        self._check_model(asked.model)
        client = request.client.host if request.client else ""
        job = self._queue.submit(work_for(asked), client)
        completion = _Completion(asked, self._name)
        if not asked.stream:

            async def whole() -> Response:
                async for result in job.results():
                    completion.add(result)
                return JSONResponse(completion.as_json())

            return await unless_gone(request, job, whole)

        async def events() -> AsyncIterator[bytes]:
            try:
                yield _data(completion.chunk({"role": "assistant", "content": None if asked.functions else ""}))
                async for result in results_or_pings(job):
                    if isinstance(result, bytes):
                        yield result
                    else:
                        for chunk in completion.add(result):
                            yield _data(chunk)
                for chunk in completion.last_chunks():
                    yield _data(chunk)
                yield b"data: [DONE]\n\n"
            except Exception as error:
                yield _data({"error": refusal_of(error).error(request.url.path)})

        async def prompt_read() -> Response:
            """The stream begins when its prompt was read: what is wrong with that still gets a status of its own."""
            completion.add(await job.next())
            return JobResponse(job, events())

        return await unless_gone(request, job, prompt_read)

    def _card(self) -> Json:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "conversation"}

    def _check_model(self, name: str) -> None:
        if name != self._name:
            problem = f"the model {name[:100]!r} is not served here, {self._name!r} is"
            raise Refused(404, problem, parameter="model", code="model_not_found")


# --- the work --------------------------------------------------------------------------------------------------------


def work_for(asked: ChatRequest) -> Callable[[Engine, Callable[[], bool]], Generator[Any, None, None]]:
    """Work for the queue: the prompt's length, then the parts of each answer and its end."""

    def work(engine: Engine, stopped: Callable[[], bool]) -> Generator[Any, None, None]:
        yield _PromptRead(check_length(engine, asked.prompt))
        for index, decoding in enumerate(asked.decodings):
            calls = _wanted(engine.stream(asked.prompt, stopped, decoding), asked.functions)
            tokens, reason = yield from _answer(calls, index, asked)
            if not stopped():
                yield _Finished(index, reason, tokens)

    return work


def _wanted(calls: Iterator[Written], functions: tuple[str, ...]) -> Iterator[Written]:
    """The calls of some functions; all of them for an answer as text."""
    for written in calls:
        if not functions or written.call.function in functions:
            yield written
        elif written.call is ADD_CHOICE:
            return  # only texts are wanted, and there are no more


def _answer(calls: Iterator[Written], index: int, asked: ChatRequest) -> Generator[_Part, None, tuple[int, str]]:
    """Yields the parts of an answer; returns its tokens and why it ended."""
    tokens, text = 0, _Text(asked.stops)
    for written in calls:
        is_choice = written.call is ADD_CHOICE
        if asked.max_tokens is not None and tokens + len(written.ids) > asked.max_tokens:
            if not asked.functions:
                yield from _parts(index, text.end())
            return tokens, "stop" if is_choice and not asked.functions else "length"
        tokens += len(written.ids)
        if asked.functions:
            if any(stop in written.values[0] for stop in asked.stops):
                return tokens, "stop"
            yield _Part(index, written.content)
        elif is_choice:
            yield from _parts(index, text.end(), written.content)
        else:
            yield from _parts(index, text.add(written.values[0]))
            if text.is_stopped:
                return tokens, "stop"
    if not asked.functions:
        yield from _parts(index, text.end())
    return tokens, "tool_calls" if asked.functions else "stop"


def _parts(index: int, *contents: str | FollowUp) -> Iterator[_Part]:
    return (_Part(index, content) for content in contents if content)


class _Text:
    """A text that grows by lines and ends before the first of some stop texts. What may be the beginning of one is held
    back until it is known."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops, self._held, self._is_empty = stops, "", True
        self.is_stopped = False

    def add(self, line: str) -> str:
        """What can be sent, now that there is another line."""
        text = self._held + ("" if self._is_empty else "\n") + line
        self._is_empty = False
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        sent = len(text) - max(begun, default=0)
        self._held = text[sent:]
        return text[:sent]

    def end(self) -> str:
        """What was held back, when no more lines come."""
        held, self._held = self._held, ""
        return held


# --- what is sent ----------------------------------------------------------------------------------------------------


@dataclass
class _Completion:
    """A completion as it grows, and its chunks."""

    asked: ChatRequest
    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    usage: _Usage = field(default_factory=_Usage)
    answers: dict[int, list[str | FollowUp]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, result: Any) -> list[Json]:
        """Take in a result of the work; the chunks that it makes."""
        if isinstance(result, _PromptRead):
            self.usage.prompt = result.tokens
            return []
        chunks = []
        parts = self.answers.setdefault(result.index, [])
        if result.index and not parts and result.index not in self.reasons:
            first = {"role": "assistant", "content": None if self.asked.functions else ""}
            chunks.append(self.chunk(first, result.index))
        if isinstance(result, _Finished):
            self.reasons[result.index] = result.reason
            self.usage.completion += result.tokens
            extra = {} if self.asked.functions else {"follow_ups": _follow_ups(parts)}
            return [*chunks, self.chunk(extra, result.index, result.reason)]
        parts.append(result.content)
        if self.asked.functions:
            number = len(parts) - 1
            call = {"index": number, **_tool_call(self.id, result.index, number, result.content)}
            return [*chunks, self.chunk({"tool_calls": [call]}, result.index)]
        if isinstance(result.content, str):
            chunks.append(self.chunk({"content": result.content}, result.index))
        return chunks

    def chunk(self, delta: Json, index: int = 0, reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def last_chunks(self) -> list[Json]:
        if not self.asked.include_usage:
            return []
        return [{**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage.as_json()}]

    def as_json(self) -> Json:
        choices = []
        for index, reason in sorted(self.reasons.items()):
            parts = self.answers[index]
            message: Json = {"role": "assistant", "content": None, "refusal": None}
            if self.asked.functions:
                calls = [_tool_call(self.id, index, number, part) for number, part in enumerate(parts)]
                message |= {"tool_calls": calls} if calls else {"content": ""}
            else:
                message["content"] = "".join(part for part in parts if isinstance(part, str))
                message["follow_ups"] = _follow_ups(parts)
            choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": reason})
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage.as_json()}

    def _head(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }


def _tool_call(completion: str, index: int, number: int, part: str | FollowUp) -> Json:
    name, arguments = (ADD_TEXT.function, {"content": part}) if isinstance(part, str) else _choice_call(part)
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{completion[9:25]}_{index}_{number}", "type": "function", "function": function}


def _choice_call(part: FollowUp) -> tuple[str, Json]:
    return ADD_CHOICE.function, _as_json(part)


def _follow_ups(parts: list[str | FollowUp]) -> list[Json]:
    return [_as_json(part) for part in parts if isinstance(part, FollowUp)]


def _as_json(part: FollowUp) -> Json:
    return {"text": part.text, "confidence": part.probability, "target": part.target}


def _data(value: Json) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
