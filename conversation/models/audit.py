"""The audit of a tokenizer before every training and every test.

It trusts no warning and no flag. It checks the ids.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from conversation.errors import UserError, list_problems
from conversation.format.calls import Example
from conversation.format.control_tokens import END_OF_TURN, FORMAT_TOKENS, Control
from conversation.models.tokenizer import (
    PROBES,
    EncodedExample,
    answer_pattern,
    control_ids,
    decode,
    encode,
    encode_examples,
    fingerprint,
    id_of,
    load_tokenizer,
)
from conversation.models.weights import text_config

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
FORMS: tuple[Literal["NFC", "NFKC"], ...] = ("NFC", "NFKC")  # of Unicode, to which tokenizers normalise
GIVE_TOKENS = "give a model the tokens: python -m conversation.models.new_tokens MODEL NEW_FOLDER"


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
    folder: Path,
    examples: Sequence[Example],
    expected_fingerprint: str | None = None,
    failed: dict[int, str] | None = None,
) -> tuple[PreTrainedTokenizerBase, list[EncodedExample], Audit]:
    """Load a model folder's tokenizer, check it, and encode the examples with it.

    Raises UserError with the text, the ids and the expected ones, when: a control token is not one id, or not its id in
    Gemma's vocabulary; the padding token ends a turn; `<bos>` is not first, once; a control token of the vocabulary,
    typed by a user, becomes one; an answer contains one; the ids of an example do not decode to it, or the model has no
    embedding for one; the fingerprint is not the expected one. Lists all examples that fail; with `failed`, they are
    put there, by index, and not raised.
    """
    tokenizer = load_tokenizer(folder)
    check_control_tokens(tokenizer)
    rows = _num_embeddings(folder)
    _check_examples(tokenizer, rows, PROBES, encode_examples(tokenizer, PROBES))
    _check_typed_tokens(tokenizer)
    found = fingerprint(tokenizer)
    if expected_fingerprint is not None and found != expected_fingerprint:
        raise _failed(
            f"the tokenizer in {folder} is not that of the training: fingerprint {found[:12]}, "
            f"expected {expected_fingerprint[:12]}"
        )
    encoded = encode_examples(tokenizer, examples)
    if failed is None:
        _check_examples(tokenizer, rows, examples, encoded)
    else:
        failed.update(_failing(tokenizer, rows, examples, encoded))
    changed, first = _changed_by_flag(folder, examples, encoded)
    return tokenizer, encoded, Audit(found, len(examples), changed, first)


def lacks_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a copy with new tokens would help: a control token of the format, or padding of its own, is missing."""
    has_all = set(FORMAT_TOKENS) <= set(control_ids(tokenizer).values())
    return not has_all or tokenizer.pad_token_id in (None, id_of(tokenizer, END_OF_TURN))


def check_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError unless each control token of the format is one id, and no two share one."""
    seen: dict[int, str] = {}
    for token in FORMAT_TOKENS:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise _failed(
                f"{token} becomes the ids {ids}, expected one id",
                GIVE_TOKENS,
            )
        if ids[0] not in control_ids(tokenizer):
            raise _failed(f"{token} is an ordinary token, which a text can become", GIVE_TOKENS)
        if ids[0] in seen:
            raise _failed(f"{token} and {seen[ids[0]]} are both the id {ids[0]}")
        seen[ids[0]] = token
        if len(tokenizer) >= GEMMA_VOCABULARY and ids[0] != FUNCTION_GEMMA_IDS[token]:
            raise _failed(f"{token} is the id {ids[0]}, expected {FUNCTION_GEMMA_IDS[token]}")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == id_of(tokenizer, END_OF_TURN):
        problem = f"the padding token is the id {tokenizer.pad_token_id}, expected one that does not end a turn"
        raise _failed(problem, GIVE_TOKENS)


def _num_embeddings(folder: Path) -> int | None:
    """How many token ids the model of a folder has embeddings for; None without a config, or when it does not say."""
    if not (folder / "config.json").is_file():
        return None
    size = getattr(text_config(folder), "vocab_size", None)
    return size if isinstance(size, int) else None


def _check_examples(
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    examples: Sequence[Example],
    encoded: Sequence[EncodedExample],
) -> None:
    problems = [
        f"in the example that asks {examples[i].prompt.question!r}: {problem}"
        for i, problem in _failing(tokenizer, rows, examples, encoded).items()
    ]
    if len(problems) > 1:
        raise _failed(f"{len(problems)} examples do not pass:\n{list_problems(problems)}")
    if problems:
        raise _failed(problems[0])


def _failing(
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    examples: Sequence[Example],
    encoded: Sequence[EncodedExample],
) -> dict[int, str]:
    """What is wrong with the examples that do not pass, by index."""
    found = enumerate(zip(examples, encoded, strict=True))
    names, refused = control_ids(tokenizer), answer_pattern(tokenizer)
    problems = {
        i: _example_problem(tokenizer, rows, names, refused, example, list(ids.ids)) for i, (example, ids) in found
    }
    return {i: problem for i, problem in problems.items() if problem}


def _example_problem(
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    names: Mapping[int, str],
    refused: re.Pattern[str],
    example: Example,
    ids: list[int],
) -> str | None:
    """What is wrong with an example's ids. `names`: of control tokens, by id; `refused`: what no answer contains."""
    if rows is not None and max(ids) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        return f"{token!r} is the id {max(ids)}, the model has embeddings for {rows} ids"
    bos = tokenizer.bos_token_id
    if bos is not None:
        if ids.count(bos) != 1 or ids[0] != bos:
            return f"<bos> ({bos}) is at {[i for i, x in enumerate(ids) if x == bos]}, expected [0]"
        ids = ids[1:]
    text = example.text
    decoded = decode(tokenizer, ids)
    if decoded != text:
        at = next(
            (i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), min(len(decoded), len(text))
        )
        found = f"its ids decode to {decoded[at : at + 30]!r}, expected {text[at : at + 30]!r}"
        for form in FORMS:
            if unicodedata.normalize(form, text) == decoded:
                return f"the text is not in {form}, to which this tokenizer normalises: {found}"
        return found
    for value in (*example.answer.fragments, *(each.text for each in example.answer.follow_ups)):
        if control := refused.search(value):
            return f"its answer contains {control[0]}, a control token of this base"
    return _miscounted(names, [*example.prompt.pieces(), *example.answer.pieces()], ids)


def _miscounted(names: Mapping[int, str], pieces: Sequence[str], ids: Sequence[int]) -> str | None:
    """Which control token of the vocabulary is more or less often in the ids than as a Control piece; or None."""
    in_ids = Counter(names[i] for i in ids if i in names)
    in_text = Counter(str(piece) for piece in pieces if isinstance(piece, Control))
    for name in [*in_text, *in_ids]:
        if in_ids[name] != in_text[name]:
            return f"{name} occurs {in_ids[name]} times in the ids, expected {in_text[name]}"
    return None


def _check_typed_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError when a control token of the vocabulary, typed by a user, becomes that token."""
    names = control_ids(tokenizer)
    pieces = [" ".join(names.values())]
    if problem := _miscounted(names, pieces, encode(tokenizer, pieces)):
        raise _failed(f"typed by a user, {problem}", "take another model: this vocabulary cannot tell text from tokens")


def _changed_by_flag(folder: Path, examples: Sequence[Example], encoded: Sequence[EncodedExample]) -> tuple[int, str]:
    """How many examples have other ids without fix_mistral_regex, and the first difference."""
    plain = load_tokenizer(folder, fix_mistral_regex=False)
    changed, first = 0, ""
    for example, with_flag, without in zip(examples, encoded, encode_examples(plain, examples), strict=True):
        if without.ids != with_flag.ids:
            changed += 1
            if not first:
                at = next(i for i, (a, b) in enumerate(zip(with_flag.ids, without.ids, strict=False)) if a != b)
                ours, theirs = with_flag.ids[at : at + 4], without.ids[at : at + 4]
                first = f"{example.prompt.question!r}, token {at}: {list(ours)} with it, {list(theirs)} without"
    return changed, first


def _failed(problem: str, hint: str = "") -> UserError:
    return UserError(f"the tokenizer audit failed: {problem}", hint)
