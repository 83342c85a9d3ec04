"""Merge adapters into their base in FP32, and verify the result as read back from disk.

The merged folder is complete: config, weights with tied embeddings, tokenizer, a generation config that stops at the
end of the turn, the chat template of the training prompts, and the manifest `conversation_model.json`.
"""

from __future__ import annotations

import errno
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from conversation.errors import TRIED_AND_FAILED, UserError, out_of_memory
from conversation.format.calls import Prompt
from conversation.format.control_tokens import END_OF_TURN
from conversation.models.chat_format import write_chat_format
from conversation.models.device import training_device
from conversation.models.merged_model import write_manifest
from conversation.models.merged_weights import changes_of, write_merged
from conversation.models.tokenizer import encode_exactly, id_of, load_tokenizer, tokenizer_files
from conversation.models.weights import fp32_bytes, load_model
from conversation.runs.files import cannot_write, file_hashes, replace_folder
from conversation.runs.machine import give_memory_back, peak_memory_bytes
from conversation.runs.record import MergeResult, now
from conversation_config import MAX_NEW_TOKENS

COMPARED_LOGITS = 16  # positions at the end of each prompt; all of them would be 0.3 GB a prompt
COMPARED_TOKENS = 24  # of the greedy continuations
LOGIT_TOLERANCE = 2e-4
"""The largest difference of logits allowed to rounding, as a share of the largest logit; on the stand-in: 3e-6."""


def merge(
    base_folder: Path,
    adapters: Path,
    output: Path,
    prompts: Sequence[Prompt],
    adapter_files: dict[str, str],
    restates: bool = False,
) -> MergeResult:
    """Merge `adapters` into the model in `base_folder`, verify, and give the folder its final name, `output`.

    `adapter_files`: the hashes of the adapters, for the result. `restates`: the training's answers begin with the
    question in full.

    Raises UserError when the adapters do not fit the base, when a value is not finite, or when the model read back from
    disk differs from base and adapters. Then the final name is not touched.
    """
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer = load_tokenizer(base_folder)
    prompt_ids = [encode_exactly(tokenizer, replace(prompt, restates=restates)) for prompt in prompts]
    end_of_turn = id_of(tokenizer, END_OF_TURN)
    model = _with_adapters(base_folder, adapters)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = [_observe(model, ids, end_of_turn) for ids in prompt_ids]
    changes = changes_of(model)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_of_turn,
        pad_token_id=tokenizer.pad_token_id,
    )
    del model
    give_memory_back()
    try:
        try:
            part.mkdir(parents=True)
            write_merged(base_folder, part, changes, tied)
            settings.save_pretrained(part)
            for path in tokenizer_files(base_folder):
                shutil.copy(path, part)
            write_chat_format(part, load_tokenizer(part), restates)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            cause = error if isinstance(error, OSError) else OSError(_os_error(error), str(error))
            raise cannot_write(output, cause, fp32_bytes(base_folder)) from None
        give_memory_back()
        found = _verify(part, prompt_ids, expected, end_of_turn, tied)
        files = file_hashes(part)
        write_manifest(part, files)
        replace_folder(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    difference, largest = found
    return MergeResult(len(prompts), difference, largest, size, peak_memory_bytes(), files, adapter_files, now())


def _with_adapters(base_folder: Path, adapters: Path) -> PeftModel:
    try:
        return (
            PeftModel.from_pretrained(load_model(base_folder), adapters, local_files_only=True)
            .eval()
            .to(training_device())
        )
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if no_memory := out_of_memory(error):
            raise no_memory from None
        problem = str(error).splitlines()[0]
        raise UserError(
            f"the adapters in {adapters} do not fit the base model in {base_folder}: {problem}",
            "merge them into the base that they were trained on",
        ) from None


@torch.inference_mode()
def _observe(model: Any, ids: list[int], end_of_turn: int) -> tuple[torch.Tensor, list[int]]:
    """Logits at the last positions of a prompt [COMPARED_LOGITS, vocabulary], and the greedy continuation."""
    inputs = torch.tensor([ids], device=model.device)
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=COMPARED_LOGITS).logits[0].cpu()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=COMPARED_TOKENS, eos_token_id=end_of_turn, pad_token_id=0
    )
    attention = torch.ones_like(inputs)
    output = model.generate(input_ids=inputs, attention_mask=attention, generation_config=settings)
    return logits, output[0, len(ids) :].tolist()


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _verify(
    folder: Path,
    prompt_ids: Sequence[list[int]],
    expected: Sequence[tuple[torch.Tensor, list[int]]],
    end_of_turn: int,
    tied: bool,
) -> tuple[float, float]:
    """Read the saved model and compare it. `tied`: whether the base's embeddings are tied.

    Returns the largest difference of logits and the largest logit. Raises UserError when the models differ.
    """
    model = load_model(folder).eval().to(training_device())
    for name, tensor in model.named_parameters():
        if not math.isfinite(tensor.sum().item()):  # a sum needs no second tensor of this size
            raise UserError(f"the merged tensor {name} has a value that is not finite", "", TRIED_AND_FAILED)
    if tied:
        on_disk = {name for path in folder.glob("*.safetensors") for name in _tensor_names(path)}
        untied = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        if untied or any(name.startswith("lm_head") for name in on_disk):
            raise UserError("the merged model's embeddings are no longer tied", "", TRIED_AND_FAILED)
    differences, sizes, equal = [0.0], [0.0], True
    for ids, (logits, continuation) in zip(prompt_ids, expected, strict=True):
        found_logits, found_continuation = _observe(model, ids, end_of_turn)
        differences.append((found_logits - logits).abs().max().item())
        sizes.append(logits.abs().max().item())
        equal = equal and found_continuation == continuation
    difference, largest = (torch.tensor(each).max().item() for each in (differences, sizes))  # NaN stays, not in max()
    if not difference <= LOGIT_TOLERANCE * largest or not equal:
        raise UserError(
            f"the merged model is not base + adapters: logits differ by up to {difference:.2e} of {largest:.1f}, "
            f"greedy continuations are {'equal' if equal else 'different'}",
            "the final name was not touched",
            TRIED_AND_FAILED,
        )
    return difference, largest


def _os_error(error: SafetensorError) -> int:
    """The operating system's error number, which safetensors gives only in its message."""
    number = re.search(r"os error (\d+)", str(error))
    return int(number[1]) if number else errno.EIO
