"""Token ids: load a tokenizer, audit it, take its fingerprint, encode prompts and examples, decode answers.

Every tokenizer of the project comes from `load_tokenizer`, and every id that a model is trained or asked with from
`encode_prompt` and `encode_example`. No warning and no flag is trusted: `audit` looks at the ids.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.errors import UserError
from conversation.function_calls import (
    CONTROL_PATTERN,
    CONTROL_TOKENS,
    END_OF_TURN,
    FORMAT_TOKENS,
    Answer,
    Choice,
    Control,
    Example,
    Prompt,
    Utterance,
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
"""Checked wherever the vocabulary is Gemma's."""

PROBES = (
    Example(
        Prompt(
            'What\'s λx.x? <escape> {a: "1"}',
            (Utterance("User", "α → β?"), Utterance("AI", "x[i] != 0.5  && f(x)\tnaïve 😀 日本語 <end_of_turn>")),
        ),
        Answer(
            ("O(n log n), not O(n²).", "'<' and '>' are not tags; 10,000 > 9,999."),
            (
                Choice("Why?", "0.61", "why_not"),
                Choice("vs C++?", "0.2", "vs_cpp"),
                Choice("Et après ?", "0.07", "x2_y"),
            ),
        ),
    ),
)
"""Fixed texts for fingerprint and audit: control tokens in place and typed by a user, code, accents, numbers."""


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example, `<bos>` first; those from `num_prompt_tokens` on are the answer."""

    ids: tuple[int, ...]
    num_prompt_tokens: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_answer_tokens(self) -> int:
        return len(self.ids) - self.num_prompt_tokens


def load_tokenizer(folder: Path, fix_mistral_regex: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. Raises UserError when it is missing or cannot be read.

    `fix_mistral_regex=False` is for the audit alone, which compares the two.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer (no tokenizer.json)", "a model folder holds its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, fix_mistral_regex=fix_mistral_regex, local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {error}") from None


def encode(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> list[int]:
    """Ids of rendered pieces, without `<bos>`. Only a Control piece becomes a control token.

    In a literal piece the name of a control token is cut after its first character, so that no tokenizer, whatever it
    counts as special, can take it for the token; the characters stay the same.
    """
    if not any(CONTROL_PATTERN.search(piece) for piece in pieces if not isinstance(piece, Control)):
        return tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, Control):
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            cuts = [0, *(found.start() + 1 for found in CONTROL_PATTERN.finditer(piece)), len(piece)]
            for start, end in itertools.pairwise(cuts):
                ids += tokenizer(piece[start:end], add_special_tokens=False)["input_ids"]
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids of a prompt, `<bos>` first where the tokenizer has one."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + encode(tokenizer, prompt.pieces())


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> EncodedExample:
    """Ids of a training example: those of its prompt, then those of its answer."""
    prompt = encode_prompt(tokenizer, example.prompt)
    return EncodedExample((*prompt, *encode(tokenizer, example.answer.pieces())), len(prompt))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def spelled_out_token(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, int] | None:
    """The first control token that the ids spell out in ordinary tokens instead of using its id, and the character of
    the decoded text at which it stands; None if there is none.

    Such text looks valid once it is decoded, and is not: no program that reads ids would find the token.
    """
    control_ids = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS}
    run: list[int] = []
    for number, token_id in enumerate([*ids, None]):
        if token_id is not None and token_id not in control_ids:
            run.append(token_id)
            continue
        if run and (found := CONTROL_PATTERN.search(decode(tokenizer, run))):
            return found[0], len(decode(tokenizer, ids[: number - len(run)])) + found.start()
        run = []
    return None


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the ids of the probe texts: the same for tokenizers that encode alike."""
    ids = [[*encode_example(tokenizer, probe).ids] for probe in PROBES]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


@dataclass(frozen=True)
class Audit:
    """What the audit found, beyond that the tokenizer is fit for training."""

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

    Raises UserError with the text, the ids and what was expected, when: a control token is not one id, or not the id
    that Gemma's vocabulary gives it; the padding token ends a turn; `<bos>` does not stand first, once; a control token
    that a user typed becomes one; the ids of an example do not decode to it; the fingerprint is not the expected one.
    """
    tokenizer = load_tokenizer(folder)
    check_control_tokens(tokenizer)
    for probe in PROBES:
        _check_example(tokenizer, probe, encode_example(tokenizer, probe))
    found = fingerprint(tokenizer)
    if expected_fingerprint is not None and found != expected_fingerprint:
        raise _failed(
            f"the tokenizer in {folder} is not the one of the training: fingerprint {found[:12]}, "
            f"expected {expected_fingerprint[:12]}"
        )
    encoded = [encode_example(tokenizer, example) for example in examples]
    for example, ids in zip(examples, encoded, strict=True):
        _check_example(tokenizer, example, ids)
    changed, first = _changed_by_flag(folder, examples, encoded)
    return tokenizer, encoded, Audit(found, len(examples), changed, first)


def check_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError unless each control token of the format is one id of its own."""
    seen: dict[int, str] = {}
    for token in FORMAT_TOKENS:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise _failed(
                f"{token} becomes the ids {ids}, expected one id",
                "give a model the tokens: python -m conversation.base_models MODEL_FOLDER NEW_FOLDER",
            )
        if ids[0] in seen:
            raise _failed(f"{token} and {seen[ids[0]]} are both the id {ids[0]}")
        seen[ids[0]] = token
        if len(tokenizer) >= GEMMA_VOCABULARY and ids[0] != FUNCTION_GEMMA_IDS[token]:
            raise _failed(f"{token} is the id {ids[0]}, expected {FUNCTION_GEMMA_IDS[token]}")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(END_OF_TURN):
        raise _failed(f"the padding token is the id {tokenizer.pad_token_id}, expected one that does not end a turn")


def _check_example(tokenizer: PreTrainedTokenizerBase, example: Example, encoded: EncodedExample) -> None:
    ids = list(encoded.ids)
    where = f"in the example that asks {example.prompt.question!r}"
    bos = tokenizer.bos_token_id
    if bos is not None:
        if ids.count(bos) != 1 or ids[0] != bos:
            raise _failed(
                f"{where}: <bos> ({bos}) stands at {[i for i, x in enumerate(ids) if x == bos]}, expected [0]"
            )
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
        in_ids = ids.count(tokenizer.convert_tokens_to_ids(token))
        in_text = sum(isinstance(piece, Control) and piece == token for piece in pieces)
        if in_ids != in_text:
            raise _failed(f"{where}: {token} stands {in_ids} times in the ids, expected {in_text}")


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
