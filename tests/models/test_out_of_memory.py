"""Memory that runs out is said in one sentence, wherever it happens; no file is blamed for it."""

import pytest
import torch

from conversation.errors import UserError, as_user_error
from conversation.models import merging
from conversation.models.gguf_weights import load_gguf
from conversation.models.weights import load_model

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB\nmore"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_is_said_and_neither_base_nor_adapters_are_blamed(tiny_folder, monkeypatch, error):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fail(*_, **__):
        raise error

    def tried(work):
        with pytest.raises((UserError, RuntimeError, MemoryError)) as caught:
            work()
        found = as_user_error(caught.value)
        assert str(found).startswith("there is too little memory") and found.exit_status == 1
        assert "\n" not in str(found)

    tried(fail)  # wherever it comes from
    monkeypatch.setattr(PeftModel, "from_pretrained", fail)
    tried(lambda: merging._with_adapters(tiny_folder, tiny_folder))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    tried(lambda: load_model(tiny_folder))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    tried(lambda: load_gguf(tiny_folder / "model.gguf"))


def test_another_error_of_torch_is_not_taken_for_too_little_memory():
    assert as_user_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
