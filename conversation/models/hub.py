"""A model from the hub: from its cache on this machine, whatever is set, else downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from conversation.data.hub_client import cause, limit_waiting, what_is_set
from conversation.errors import UserError
from conversation_config import STAND_IN, cache_folder

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
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
        limit_waiting()
        return Path(snapshot_download(name, allow_patterns=FILES))
    except errors.GatedRepoError:
        raise UserError(
            f"no access to {name}: its licence has to be accepted first",
            f"accept it on the model's page and log in with `hf auth login`, or {STAND_IN_HINT}",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"the hub has no model {name}, or shows it only to those logged in{what_is_set()}", STAND_IN_HINT
        ) from None
    except Exception as error:  # whatever the client, its proxies, certificates and parsers raise
        if isinstance(error, OSError) and error.filename:  # a file of its cache
            problem = f"{name} cannot be fetched into the hub's cache: {error.strerror}: {error.filename}"
            raise UserError(problem, "set HF_HOME to a folder that can be written") from None
        raise UserError(
            f"{name} is not on this machine and the hub cannot be reached: {cause(error)}{what_is_set()}",
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
