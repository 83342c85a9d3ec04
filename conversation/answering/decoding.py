"""Ask a model: greedy answers as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conversation.format.calls import Prompt
from conversation.format.control_tokens import END_OF_TURN
from conversation.models.tokenizer import encode_prompt
from conversation_config import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Greedy answers, in one batch, as token ids up to and including `<end_of_turn>`, at most MAX_NEW_TOKENS each."""
    import torch
    from transformers import GenerationConfig

    end_of_turn, pad = tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.pad_token_id
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end_of_turn, pad_token_id=pad
    )
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    generate: Any = model.generate  # PreTrainedModel's annotations leave it out
    with torch.inference_mode():
        output = generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
    return [row[: row.index(end_of_turn) + 1] if end_of_turn in row else row for row in output]
