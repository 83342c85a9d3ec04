"""A model from the hub: from its cache on this machine, whatever is set, else downloaded."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from conversation.errors import UserError
from conversation_config import STAND_IN, cache_folder, hub_settings

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
SECONDS = 30  # without an answer of the hub; its client would wait forever
STAND_IN_HINT = f"train the stand-in, which needs no account: --base_model {STAND_IN}"


def from_hub(name: str) -> Path:
    """The folder of a model in the hub's cache. The network is used only when the model is not there, or not whole.

    Raises UserError, whatever the hub's client raises, and names what was set.
    """
    if not any(os.environ.get(variable) for variable in ("HF_HOME", "HF_HUB_CACHE")):
        cache_folder()  # without a home, the hub's cache would be a folder `~` in the working folder
    if cached := _cached(name):
        return cached
    from huggingface_hub import errors, snapshot_download

    try:
        _limit_waiting()
        return Path(snapshot_download(name, allow_patterns=FILES))
    except errors.GatedRepoError:
        raise UserError(
            f"no access to {name}: its licence has to be accepted first",
            f"accept it on the model's page and log in with `hf auth login`, or {STAND_IN_HINT}",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"the hub has no model {name}, or shows it only to those logged in{_set()}", STAND_IN_HINT
        ) from None
    except Exception as error:  # whatever the client, its proxies, certificates and parsers raise
        raise UserError(
            f"{name} is not on this machine and the hub cannot be reached: {_cause(error)}{_set()}",
            f"connect to the network, correct or unset what is set, or {STAND_IN_HINT}",
        ) from None


def _cached(name: str) -> Path | None:
    """The model's folder in the cache when it is whole; looks at the disk only."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        wanted = ["config.json", "tokenizer.json", *shards]
        return folder if all((folder / file).is_file() for file in wanted) else None
    except Exception:  # not there, or broken: the hub is asked
        return None


def _limit_waiting() -> None:
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


def _cause(error: BaseException) -> str:
    """The first cause of an error, as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    if "outgoing traffic has been disabled" in text or "offline mode" in text.lower():
        return "offline mode"
    lines = text.splitlines()
    line = re.sub(r"//[^/@\s]*@", "//...@", lines[0] if lines else "").rstrip(".")
    return f"{line[:200]} ({type(error).__name__})" if line else type(error).__name__


def _set() -> str:
    found = hub_settings(os.environ)
    return f"; set here: {', '.join(found)}" if found else ""
