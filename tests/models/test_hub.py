"""The hub: a cached model needs no network, whatever is set; else one sentence names what was set."""

import os
import socket
import sys
from types import SimpleNamespace

import pytest
from conftest import lay_into_hub_cache, run_script

from conversation.data.hub_client import cause
from conversation.errors import UserError
from conversation.models import hub
from conversation_config import FUNCTION_GEMMA, hub_settings

SETTINGS = {
    "a socks proxy": {"ALL_PROXY": "socks://127.0.0.1:1080"},
    "a socks5 proxy": {"all_proxy": "socks5://127.0.0.1:1080"},
    "a proxy that is no address": {"HTTPS_PROXY": "::::"},
    "a proxy without anyone": {"HTTPS_PROXY": "http://127.0.0.1:9"},
    "an endpoint without anyone": {"HF_ENDPOINT": "http://127.0.0.1:9"},
    "an endpoint that is no address": {"HF_ENDPOINT": "nonsense"},
    "a certificate that is not there": {"SSL_CERT_FILE": "/nowhere/ca.pem", "HF_ENDPOINT": "https://127.0.0.1:9"},
    "a token with a line end": {"HF_TOKEN": "hf_a\nb", "HF_ENDPOINT": "http://127.0.0.1:9"},
    "offline": {"HF_HUB_OFFLINE": "1"},
    "offline, and a proxy": {"TRANSFORMERS_OFFLINE": "1", "ALL_PROXY": "socks://127.0.0.1:1080"},
}
ONE_PROCESS = """
import os, sys
from conversation.errors import UserError
from conversation_config import set_up_libraries, FUNCTION_GEMMA
set_up_libraries()
from huggingface_hub import constants
from conversation.models import hub
try:
    print("found", hub.from_hub(FUNCTION_GEMMA))
except UserError as error:
    print("error:", error)
    print("hint:", error.hint)
"""


def ask(home, settings) -> str:
    import subprocess

    from conftest import PROJECT

    plain = {n: v for n, v in os.environ.items() if n not in hub_names() and not n.startswith("HF_")}
    env = {**plain, "HF_HOME": str(home), "PYTHONPATH": str(PROJECT), **settings}
    done = subprocess.run([sys.executable, "-c", ONE_PROCESS], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def hub_names():
    return [setting.split("=")[0] for setting in hub_settings(os.environ)]


@pytest.mark.parametrize("what", SETTINGS)
def test_whatever_is_set_a_cached_model_is_found_and_without_it_the_settings_are_named(tmp_path, what):
    said = ask(tmp_path / "empty", SETTINGS[what])
    assert said.startswith(f"error: {FUNCTION_GEMMA} is not on this machine and the hub cannot be reached: "), said
    for name, value in SETTINGS[what].items():
        assert f"{name}={'...' if 'TOKEN' in name else value}" in said
    assert "--base_model gemma-3-270m" in said and len(said.splitlines()) == 2 and "hf_a" not in said
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    cached = lay_into_hub_cache(tmp_path / "full", folder)
    assert ask(tmp_path / "full", SETTINGS[what]).strip() == f"found {cached}"


def test_a_model_that_is_not_whole_in_the_cache_is_asked_for(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x-1.safetensors"}}')
    lay_into_hub_cache(tmp_path / "full", folder)
    said = ask(tmp_path / "full", SETTINGS["a socks proxy"])
    assert "cannot be reached" in said and "ALL_PROXY=socks://127.0.0.1:1080" in said


def test_a_setting_with_which_the_client_cannot_be_loaded_is_named(tmp_path):
    done = run_script("train_conversation.py", "--check_data", env={"HF_HUB_ETAG_TIMEOUT": "soon"}, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        "error: the library huggingface_hub cannot be loaded" in done.stderr
        and "HF_HUB_ETAG_TIMEOUT=soon" in done.stderr
    )


def test_a_hub_that_never_answers_is_given_up(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        monkeypatch.setattr(sys.modules[__name__], "ONE_PROCESS", ONE_PROCESS.replace("try:", "hub.SECONDS = 1\ntry:"))
        assert "cannot be reached" in ask(tmp_path, settings)


def test_passwords_and_tokens_are_not_shown():
    shown = hub_settings({"HTTPS_PROXY": "http://me:secret@proxy:1", "HF_TOKEN": "hf_x", "HOME": "/", "HF_HOME": ""})
    assert shown == ["HF_TOKEN=...", "HTTPS_PROXY=http://...@proxy:1"]
    with_at = {"HTTPS_PROXY": "http://me:se@cr@et@proxy:1", "HTTP_PROXY": "http://proxy:1/a@b"}
    assert hub_settings(with_at) == ["HTTPS_PROXY=http://...@proxy:1", "HTTP_PROXY=http://proxy:1/a@b"]
    assert cause(OSError("no way to http://me:se@cr@et@proxy:1")) == "no way to http://...@proxy:1 (OSError)"
    assert hub_settings({f"HF_{name}_DISABLE_PROGRESS_BARS": "1" for name in ("HUB", "DATASETS")}) == []  # ours


def test_whatever_the_client_raises_is_one_sentence(monkeypatch):
    import huggingface_hub

    class Unheard(Exception):
        pass

    def fail(*arguments, **options):
        raise Unheard("of\nthat")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot be reached: of \(Unheard\); set here: .*HF_HUB_OFFLINE=1"):
        hub.from_hub("some/model")


def test_a_cache_that_cannot_be_written_is_not_taken_for_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", "/root/.cache/huggingface/token")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"cache: Permission denied: /root/.cache/huggingface/token") as refused:
        hub.from_hub("some/model")
    assert refused.value.hint == "set HF_HOME to a folder that can be written"


def test_a_licence_that_is_not_accepted_is_said_with_what_to_do(monkeypatch):
    import huggingface_hub

    def gated(*arguments, local_files_only=False, **options):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        answer = SimpleNamespace(headers={}, request=None)
        raise huggingface_hub.errors.GatedRepoError("403 Client Error. Cannot access gated repo", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(UserError) as refused:
        hub.from_hub(FUNCTION_GEMMA)
    assert str(refused.value) == f"no access to {FUNCTION_GEMMA}: its licence has to be accepted first"
    assert "accept it on the model's page and log in with `hf auth login`" in refused.value.hint
    assert "--base_model gemma-3-270m" in refused.value.hint and refused.value.exit_status == 2
