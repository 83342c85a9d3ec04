"""scripts/fuzz.py without its fuzzer: what a reader refuses as it should is no finding, and a defect is one."""

import contextlib
import importlib
import sys
import types

import pytest


@pytest.fixture
def fuzz(monkeypatch):
    atheris = types.ModuleType("atheris")
    atheris.instrument_imports = lambda include: contextlib.nullcontext()
    monkeypatch.setitem(sys.modules, "atheris", atheris)
    monkeypatch.delitem(sys.modules, "scripts.fuzz", raising=False)
    return importlib.import_module("scripts.fuzz")


def test_every_seed_passes_and_what_the_readers_refuse_is_no_finding(fuzz, tmp_path):
    fuzz.write_seeds(tmp_path)
    seeds = [path.read_bytes() for path in sorted(tmp_path.iterdir())][::5]
    bad = (b"", b"{", b'{"a": 1}', b'{"text": "x"}', b'{"messages": []}', b"\xff", b'{"prompt": 1, "text": 2}', b"[]")
    seeds += [bytes([kind]) + text for kind in range(len(fuzz.TARGETS)) for text in bad]
    for seed in seeds:
        for spoiled in (seed, seed[:-9], seed[:1] + seed[20:], seed.replace(b"escape", b"escap")):
            fuzz.one_input(spoiled)


def test_an_error_of_another_kind_is_a_finding(fuzz, monkeypatch):
    def defect(data):
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "TARGETS", (defect,))
    with pytest.raises(KeyError):
        fuzz.one_input(b"\0x")
