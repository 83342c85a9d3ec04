"""A model from a GGUF file, its weights expanded to plain FP32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversation.errors import UserError, out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file. The weights are what its quantization has left, in FP32.

    Raises UserError when the file cannot be read, or the library does not know its kind of model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # the library raises whatever its parsers raise
        if no_memory := out_of_memory(error):
            raise no_memory from None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} cannot be read as a model in GGUF: {reason[0]}", "fetch it again") from None
    if hasattr(loaded.config, "quantization_config"):  # traces of the quantization make `save_pretrained` fail
        del loaded.config.quantization_config
    loaded.hf_quantizer = None
    loaded.is_quantized = False
    if loaded.generation_config is not None:
        loaded.generation_config.do_sample = False
    return loaded, tokenizer
