"""The audit of a tokenizer before every training and every test.

It trusts no warning and no flag. It checks the ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.errors import UserError
from conversation.format.calls import Example
from conversation.format.control_tokens import END_OF_TURN, FORMAT_TOKENS, Control
from conversation.models.tokenizer import (
    PROBES,
    EncodedExample,
    decode,
    encode_example,
    fingerprint,
    id_of,
    load_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


GEMMA_VOCABULARY = 262_144
FUNCTION_GEMMA_IDS = {
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
    "<start_function_declaration>": 46,
    "<end_function_declaration>": 47,
    "<start_function_call>": 48,
    "<end_function_call>": 49,
    "<start_function_response>": 50,
    "<end_function_response>": 51,
    "<escape>": 52,
}
"""Checked for Gemma's vocabulary only."""


@dataclass(frozen=True)
class Audit:
    """The result of a passed audit."""

    fingerprint: str
    examples: int
    changed_by_flag: int
    first_change: str

    def __str__(self) -> str:
        flag = f"fix_mistral_regex changes {self.changed_by_flag} of {self.examples} examples"
        return f"tokenizer {self.fingerprint[:12]}; {flag}{': ' + self.first_change if self.first_change else ''}"


def audit(
    folder: Path, examples: Sequence[Example], expected_fingerprint: str | None = None
) -> tuple[PreTrainedTokenizerBase, list[EncodedExample], Audit]:
    """Load a model folder's tokenizer, check it, and encode the examples with it.

    Raises UserError with the text, the ids and the expected ones, when: a control token is not one id, or not its id in
    Gemma's vocabulary; the padding token ends a turn; `<bos>` is not first, once; a control token typed by a user
    becomes one; the ids of an example do not decode to it; the fingerprint is not the expected one.
    """
    tokenizer = load_tokenizer(folder)
    check_control_tokens(tokenizer)
    for probe in PROBES:
        _check_example(tokenizer, probe, encode_example(tokenizer, probe))
    found = fingerprint(tokenizer)
    if expected_fingerprint is not None and found != expected_fingerprint:
        raise _failed(
            f"the tokenizer in {folder} is not that of the training: fingerprint {found[:12]}, "
            f"expected {expected_fingerprint[:12]}"
        )
    encoded = [encode_example(tokenizer, example) for example in examples]
    for example, ids in zip(examples, encoded, strict=True):
        _check_example(tokenizer, example, ids)
    changed, first = _changed_by_flag(folder, examples, encoded)
    return tokenizer, encoded, Audit(found, len(examples), changed, first)


def check_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError unless each control token of the format is one id, and no two share one."""
    seen: dict[int, str] = {}
    for token in FORMAT_TOKENS:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise _failed(
                f"{token} becomes the ids {ids}, expected one id",
                "give a model the tokens: python -m conversation.models.new_tokens MODEL_FOLDER NEW_FOLDER",
            )
        if ids[0] in seen:
            raise _failed(f"{token} and {seen[ids[0]]} are both the id {ids[0]}")
        seen[ids[0]] = token
        if len(tokenizer) >= GEMMA_VOCABULARY and ids[0] != FUNCTION_GEMMA_IDS[token]:
            raise _failed(f"{token} is the id {ids[0]}, expected {FUNCTION_GEMMA_IDS[token]}")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == id_of(tokenizer, END_OF_TURN):
        raise _failed(f"the padding token is the id {tokenizer.pad_token_id}, expected one that does not end a turn")


def _check_example(tokenizer: PreTrainedTokenizerBase, example: Example, encoded: EncodedExample) -> None:
    ids = list(encoded.ids)
    where = f"in the example that asks {example.prompt.question!r}"
    bos = tokenizer.bos_token_id
    if bos is not None:
        if ids.count(bos) != 1 or ids[0] != bos:
            raise _failed(f"{where}: <bos> ({bos}) is at {[i for i, x in enumerate(ids) if x == bos]}, expected [0]")
        ids = ids[1:]
    text = example.text
    decoded = decode(tokenizer, ids)
    if decoded != text:
        at = next(
            (i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), min(len(decoded), len(text))
        )
        raise _failed(f"{where}: its ids decode to {decoded[at : at + 30]!r}, expected {text[at : at + 30]!r}")
    pieces = [*example.prompt.pieces(), *example.answer.pieces()]
    for token in FORMAT_TOKENS:
        in_ids = ids.count(id_of(tokenizer, token))
        in_text = sum(isinstance(piece, Control) and piece == token for piece in pieces)
        if in_ids != in_text:
            raise _failed(f"{where}: {token} occurs {in_ids} times in the ids, expected {in_text}")


def _changed_by_flag(folder: Path, examples: Sequence[Example], encoded: Sequence[EncodedExample]) -> tuple[int, str]:
    """How many examples have other ids without fix_mistral_regex, and the first difference."""
    plain = load_tokenizer(folder, fix_mistral_regex=False)
    changed, first = 0, ""
    for example, with_flag in zip(examples, encoded, strict=True):
        without = encode_example(plain, example)
        if without.ids != with_flag.ids:
            changed += 1
            if not first:
                at = next(i for i, (a, b) in enumerate(zip(with_flag.ids, without.ids, strict=False)) if a != b)
                ours, theirs = with_flag.ids[at : at + 4], without.ids[at : at + 4]
                first = f"{example.prompt.question!r}, token {at}: {list(ours)} with it, {list(theirs)} without"
    return changed, first


def _failed(problem: str, hint: str = "") -> UserError:
    return UserError(f"the tokenizer audit failed: {problem}", hint)
