"""Where base weights come from: the hub, a local folder, or the embedded stand-in."""

from __future__ import annotations

import os
from pathlib import Path

from conversation.errors import UserError
from conversation.models.audit import check_control_tokens
from conversation.models.stand_in import prepare_stand_in
from conversation.models.tokenizer import load_tokenizer
from conversation_config import PROJECT, STAND_IN, cache_folder


def find_base_model(name: str) -> Path:
    """The local folder of a base model, with config, safetensors and tokenizer.

    `name`: the stand-in's name, a local folder, or a hub name, from the hub's cache or downloaded.
    Raises UserError with a remedy when there is none.
    """
    if name == STAND_IN:
        return prepare_stand_in()
    folder = Path(os.path.expanduser(name))
    if not folder.exists() and (PROJECT / folder).is_dir():
        folder = PROJECT / folder  # named by a run that was started in the project's folder
    if folder.is_dir():
        return _checked(folder.resolve())
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"unknown base model: {name}", f"give a hub name, a local folder, or {STAND_IN}")
    return _checked(_from_hub(name))


def _from_hub(name: str) -> Path:
    if not any(os.environ.get(variable) for variable in ("HF_HOME", "HF_HUB_CACHE")):
        cache_folder()  # without a home, the hub's cache would be a folder `~` in the working folder
    from huggingface_hub import errors, snapshot_download

    stand_in = f"or train the stand-in, which needs no account: --base_model {STAND_IN}"
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except errors.GatedRepoError:
        raise UserError(
            f"no access to {name}: its licence has to be accepted first",
            f"accept it on the model's page and log in with `hf auth login`, {stand_in}",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"the hub has no model {name}, or shows it only to those logged in", stand_in) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{name} is not on this machine and the hub cannot be reached",
            f"connect to the network, {stand_in}",
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{name} cannot be downloaded: {error}", stand_in) from None


def _checked(folder: Path) -> Path:
    """The folder. Raises UserError unless it has weights in safetensors and a tokenizer with the control tokens."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: no config.json")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no weights in safetensors", "other formats are not read: they can contain programs"
        )
    check_control_tokens(load_tokenizer(folder))
    return folder
