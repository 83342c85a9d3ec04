"""Memory: what is free against what is needed, said before the first step; what a resumed run keeps of it."""

import json

import pytest
import torch

from conversation.errors import UserError
from conversation.models import device
from conversation.training import memory
from conversation.training.memory import check_card_memory, load_progress, memory_sentence, save_progress
from conversation.training.micro_batches import TokenBudget
from conversation.training.prefix_tree import TokenSequence


def sequence(*ids: int) -> TokenSequence:
    return TokenSequence(ids, (False,) + (True,) * (len(ids) - 1))


STEP = [sequence(1, 2, *range(10 * i, 10 * i + 9)) for i in range(1, 5)]  # 2 common tokens, then 8 that are inputs


def test_a_step_that_fits_needs_no_sentence():
    assert memory_sentence(TokenBudget(34, 1e6, 10**9), [STEP]) == ""
    assert memory_sentence(TokenBudget(34, 1e6, 10**9), [[]]) == ""


def test_less_memory_than_a_whole_step_takes_is_said_with_both_figures_and_what_follows():
    said = memory_sentence(TokenBudget(12, 3e6, 60_000_000), [STEP, STEP[:2]])
    assert said.startswith("Memory: 60.0 MB are free, the largest step would take 170.0 MB: ")
    assert "a step passes in 4 parts (at most 4)" in said and "computed twice" not in said
    said = memory_sentence(TokenBudget(9, 3e6, 60_000_000), [STEP])
    assert said.endswith("; examples above 9 tokens are computed twice.")


def test_a_card_without_room_for_the_model_is_refused_before_the_run_folder_is_made(monkeypatch, tiny_folder):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (1_000_000, 6_000_000_000))
    monkeypatch.setattr(device, "_decided", device.Device("cpu", "no card"))
    check_card_memory(tiny_folder, 16)
    monkeypatch.setattr(device, "_decided", device.Device("cuda", "a card"))
    with pytest.raises(
        UserError, match=r"the card has 1\.0 MB of 6\.00 GB free, the model and its .* take \d"
    ) as refused:
        check_card_memory(tiny_folder, 16)
    assert "nvidia-smi" in refused.value.hint and "--device cpu" in refused.value.hint
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (100_000_000, 6_000_000_000))
    check_card_memory(tiny_folder, 16)


def test_a_resumed_run_keeps_its_token_budget_and_window_on_the_same_machine(tmp_path, monkeypatch, capsys):
    save_progress(tmp_path / "checkpoint-3", 0, TokenBudget(100, 1e6, 170_000_000), [2.5, 2.25])
    for now in (TokenBudget(500, 1e6, 850_000_000), TokenBudget(80, 1e6, 130_000_000)):
        budget, window = load_progress(tmp_path / "checkpoint-3", 0, now)
        assert (budget.tokens, budget.free_bytes, window) == (100, now.free_bytes, [2.5, 2.25])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memory, "machine", lambda: {"processor": "another"})
    assert load_progress(tmp_path / "checkpoint-3", 0, TokenBudget(500, 1e6, 850_000_000))[0].tokens == 500


def test_a_token_budget_that_no_longer_fits_is_given_up_and_that_is_said(tmp_path, capsys):
    save_progress(tmp_path, 1, TokenBudget(100, 1e6, 170_000_000), [])
    budget, _ = load_progress(tmp_path, 1, TokenBudget(60, 1e6, 100_000_000))
    assert budget.tokens == 60
    assert "Less memory is free than before (100.0 MB)" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_has_no_budget(tmp_path):
    measured = TokenBudget(60, 1e6, 100_000_000)
    assert load_progress(tmp_path, 0, measured) == (measured, [])
    save_progress(tmp_path, 0, measured, [1.0])
    assert set(json.loads((tmp_path / "progress_0.json").read_text())) == {"window", "token_budget", "machine"}
