"""The server's API as an OpenAPI document, at /openapi.json."""

from __future__ import annotations

from typing import Any

from conversation.answering.openai_requests import MAX_ANSWERS, MAX_STOPS, MAX_TOKENS
from conversation.data.conversations import MAX_CHARACTERS, MAX_NODES, MAX_TEXTS, VERSION
from conversation.format.calls import NUM_FOLLOW_UPS

Json = dict[str, Any]


def describe() -> Json:
    """The document, of OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Conversation model", "version": "1"},
        "paths": {
            "/health": {
                "get": {**_reads("Whether the model is loaded", _ref("Health"), errors=(503,)), "security": []}
            },
            "/api/model": {"get": _reads("The model", _ref("Model"), errors=(503,))},
            "/api/answer": {
                "post": {
                    **_does("An answer as server-sent events: fragment, choice, done, error", _ref("Question")),
                    "responses": {
                        "200": {"description": "events", "content": {"text/event-stream": {"schema": _EVENT}}},
                        **_errors(400, 408, 413, 415, 429, 503),
                    },
                }
            },
            "/api/conversations": {
                "get": _reads("The conversations, newest first", {"type": "array", "items": _ref("ConversationLine")})
            },
            "/api/conversations/{id}": {
                "parameters": [_ID],
                "get": _reads("A conversation", _ref("Conversation"), errors=(404,)),
                "put": _sends("Keep a conversation", _ref("Conversation"), _ref("Kept"), (404, 408, 409, 413, 415)),
                "delete": {
                    "summary": "Delete a conversation",
                    "responses": {"204": {"description": "deleted"}, **_errors(404)},
                },
            },
            "/api/conversations/{id}/training_tree": {
                "parameters": [_ID],
                "post": _sends(
                    "Save it as a training tree",
                    _object({"leave_out": {"type": "array", "items": _TEXT}}, optional=("leave_out",)),
                    _ref("TrainingTree"),
                    (404, 408, 413, 415, 422),
                    required=False,
                ),
            },
            "/api/conversations/{id}/picked": {
                "parameters": [_ID],
                "post": _sends(
                    "Count a picked choice (for clients that keep no document; the page counts in its own)",
                    _object({"node": _TEXT, "choice": _number("integer", 0, NUM_FOLLOW_UPS - 1)}),
                    _object({"picked": _PICKED}),
                    (404, 408, 413, 415),
                ),
            },
            "/v1/models": {"get": _reads("OpenAI: the model in a list", _list_of(_ref("OpenAIModel")))},
            "/v1/models/{model}": {
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": _TEXT}],
                "get": _reads("OpenAI: the model", _ref("OpenAIModel"), errors=(404,)),
            },
            "/v1/chat/completions": {"post": _chat_completions()},
        },
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],  # a server on this machine alone may have no key
    }


_TEXT: Json = {"type": "string"}
_EVENT: Json = {"type": "object", "properties": {"event": _TEXT, "data": _TEXT}, "required": ["data"]}
_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "format": "uuid", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
}
_PICKED = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 2**53 - 1},
    "minItems": NUM_FOLLOW_UPS,
    "maxItems": NUM_FOLLOW_UPS,
}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _number(kind: str, least: float, most: float) -> Json:
    return {"type": kind, "minimum": least, "maximum": most}


def _object(properties: Json, optional: tuple[str, ...] = ()) -> Json:
    needed = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": needed}


def _list_of(item: Json) -> Json:
    return _object({"object": {"const": "list"}, "data": {"type": "array", "items": item}})


def _json(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(*statuses: int) -> Json:
    return {str(status): _json("refused", _ref("Error")) for status in (*statuses, 401, 403, 421, 500)}


def _reads(summary: str, schema: Json, errors: tuple[int, ...] = ()) -> Json:
    return {"summary": summary, "responses": {"200": _json("found", schema), **_errors(*errors)}}


def _does(summary: str, body: Json, required: bool = True) -> Json:
    content = {"application/json": {"schema": body}}
    return {"summary": summary, "requestBody": {"required": required, "content": content}}


def _sends(summary: str, body: Json, answer: Json, errors: tuple[int, ...], required: bool = True) -> Json:
    return {**_does(summary, body, required), "responses": {"200": _json("done", answer), **_errors(400, *errors)}}


def _chat_completions() -> Json:
    answers = {
        "application/json": {"schema": _ref("ChatCompletion")},
        "text/event-stream": {"schema": _EVENT},
    }
    return {
        **_does("OpenAI: an answer, as tool calls or as text", _ref("ChatRequest")),
        "responses": {
            "200": {"description": "answered", "content": answers},
            **_errors(400, 404, 408, 413, 415, 429, 503),
        },
    }


def _schemas() -> Json:
    text = {"type": "string", "maxLength": MAX_CHARACTERS}
    choice = _object({"text": text, "confidence": {"type": "number"}, "target": text})
    node = _object(
        {
            "id": {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,100}$"},
            "parent": {"type": ["string", "null"]},
            "question": text,
            "fragments": {"type": "array", "items": text, "maxItems": MAX_TEXTS},
            "choices": {"type": "array", "items": choice, "maxItems": MAX_TEXTS},
            "from_choice": {"enum": [0, 1, 2, None]},
            "state": {"enum": ["whole", "draft"]},
            "mark": {"enum": ["good", "bad", None]},
            "favourite": {"type": "boolean"},
            "corrected": {"type": "boolean"},
            "picked": _PICKED,
            "created": text,
        },
        optional=("from_choice", "mark", "favourite", "corrected", "picked"),
    )
    conversation = _object(
        {
            "version": {"const": VERSION},
            "id": _ID["schema"],
            "title": text,
            "created": text,
            "revision": {"type": "integer", "minimum": 0, "maximum": 2**53 - 1},
            "current": text,
            "nodes": {
                "type": "object",
                "description": "by their ids; one has no parent, and all others hang from it",
                "minProperties": 1,
                "maxProperties": MAX_NODES,
                "additionalProperties": _ref("Node"),
            },
        }
    )
    utterance = _object({"speaker": {"enum": ["User", "AI"]}, "text": _TEXT})
    revision = {"type": "integer"}
    return {
        "Error": _object({"error": _object({"message": _TEXT})}),
        "Health": _object({"status": {"enum": ["ok", "loading", "failed"]}, "model": _TEXT}),
        "Model": _object({"name": _TEXT, "engine": _TEXT, "context": revision, "limits": {"type": "object"}}),
        "Question": _object(
            {
                "question": {"type": "string", "pattern": "\\S"},
                "history": {"type": "array", "items": utterance},
                "prefetch": {"type": "boolean", "description": "wait behind all others"},
                "seed": {
                    **_number("integer", 0, 2**63 - 1),
                    "description": "draw another answer; without it the likeliest one is written",
                },
            },
            optional=("history", "prefetch", "seed"),
        ),
        "Conversation": conversation,
        "ConversationLine": _object(
            {"id": _TEXT, "title": _TEXT, "nodes": revision, "revision": revision, "changed": _TEXT}
        ),
        "Node": node,
        "Kept": _object({"id": _TEXT, "revision": revision, "changed": _TEXT}),
        "TrainingTree": _object({"path": _TEXT, "folder": _TEXT, "warnings": {"type": "array", "items": _TEXT}}),
        "OpenAIModel": _object({"id": _TEXT, "object": {"const": "model"}, "created": revision, "owned_by": _TEXT}),
        "ChatRequest": {
            "type": "object",
            "description": "as OpenAI's; the last message is the user's question",
            "required": ["model", "messages"],
            "properties": {
                "model": _TEXT,
                "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
                "tools": {"type": "array", "items": {"type": "object"}},
                "tool_choice": {"anyOf": [{"enum": ["auto", "required", "none"]}, {"type": "object"}]},
                "stream": {"type": "boolean"},
                "stream_options": _object({"include_usage": {"type": "boolean"}}, optional=("include_usage",)),
                "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS}]},
                "max_tokens": _number("integer", 1, MAX_TOKENS),
                "max_completion_tokens": _number("integer", 1, MAX_TOKENS),
                "n": _number("integer", 1, MAX_ANSWERS),
                "temperature": _number("number", 0, 2),
                "top_p": _number("number", 0, 1),
                "seed": _number("integer", -(2**63), 2**63 - 1),
            },
        },
        "ChatCompletion": _object(
            {
                "id": _TEXT,
                "object": {"const": "chat.completion"},
                "created": revision,
                "model": _TEXT,
                "choices": {"type": "array", "items": {"type": "object"}},
                "usage": {"type": "object"},
                "system_fingerprint": {"type": "null"},
            }
        ),
    }
