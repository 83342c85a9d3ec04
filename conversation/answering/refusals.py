"""What the server answers instead of doing it: a status, a sentence, and what to do."""

from __future__ import annotations

import json
import logging
from typing import Any

from conversation.errors import UserError

OPENAI = "/v1/"
_CODES = {400: "invalid_value", 401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


class Refused(Exception):
    """A request that is not done. `parameter` and `code` are for OpenAI's shape; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        hint: str = "",
        parameter: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.hint = status, message, hint
        self.parameter, self.code, self.retry_after = parameter, code or _CODES.get(status), retry_after

    @property
    def headers(self) -> dict[str, str]:
        found = {"cache-control": "no-store"}
        if self.retry_after is not None:
            found["retry-after"] = str(self.retry_after)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    def error(self, path: str) -> dict[str, Any]:
        """The error for an address: in OpenAI's shape below /v1/, else message and hint."""
        if not path.startswith(OPENAI):
            return {"message": self.message, "hint": self.hint}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "requests" if self.status == 429 else kind
        sentences = ". ".join(text for text in (self.message, self.hint) if text)
        return {"message": sentences, "type": kind, "param": self.parameter, "code": self.code}

    def body(self, path: str) -> bytes:
        return json.dumps({"error": self.error(path)}, ensure_ascii=False).encode()


def refusal_of(error: BaseException) -> Refused:
    """What to answer when a request ended with this error; a defect of ours is logged with its traceback."""
    from conversation.answering.answer_queue import Changed, Ending, QueueFull
    from conversation.answering.asking import TooLong

    if isinstance(error, Refused):
        return error
    if isinstance(error, QueueFull):
        return Refused(429, str(error), f"try again in {error.retry_after} seconds", retry_after=error.retry_after)
    if isinstance(error, Ending):
        return Refused(503, str(error), "ask again when it is back", code="server_ending", retry_after=5)
    if isinstance(error, Changed):
        return Refused(503, str(error), "ask again", code="interrupted")
    if isinstance(error, TooLong):
        return Refused(400, str(error), error.hint, "messages", "context_length_exceeded")
    if isinstance(error, UserError):
        return Refused(400 if error.exit_status == 2 else 500, str(error), error.hint)
    if isinstance(error, OSError):
        logging.getLogger(__name__).error("%s", error)
        return Refused(500, f"the disk: {error.strerror or error}")
    logging.getLogger(__name__).error("a request failed", exc_info=error)
    return Refused(500, "the server made a mistake", "its console has the details")
