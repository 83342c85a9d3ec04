"""The hub's client: a limit to its waiting, and what an error of it comes from."""

from __future__ import annotations

import os

from conversation.errors import first_cause
from conversation_config import hub_settings, without_passwords

SECONDS = 30  # without an answer of the hub; its client would wait for ever


def limit_waiting() -> None:
    """Give each request a time limit. The client has none for some, so a silent proxy would block it forever."""
    from huggingface_hub.utils import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limit(request) -> None:
        limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
        request.extensions["timeout"] = {part: seconds or SECONDS for part, seconds in limits.items()}

    def client():
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], limit]}
        return made

    set_client_factory(client)


def cause(error: BaseException) -> str:
    """The first cause of an error, as one line."""
    error = first_cause(error)
    text = str(error).strip()
    if "outgoing traffic has been disabled" in text or "offline mode" in text.lower():
        return "offline mode"
    lines = text.splitlines()
    line = without_passwords(lines[0] if lines else "").rstrip(".")
    return f"{line[:200]} ({type(error).__name__})" if line else type(error).__name__


def what_is_set() -> str:
    """What is set for the hub and the network, as the end of a sentence; "" for nothing."""
    found = hub_settings(os.environ)
    return f"; set here: {', '.join(found)}" if found else ""
