"""Token ids: load a tokenizer, encode prompts and examples, decode answers, compute the fingerprint.

Every tokenizer of the project comes from `load_tokenizer`. Every id for a model comes from `encode_prompt` and
`encode_example`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from conversation.errors import UserError
from conversation.format.calls import Answer, Example, FollowUp, Prompt, Utterance
from conversation.format.control_tokens import (
    CONTROL_PATTERN,
    CONTROL_TOKENS,
    Control,
    cut,
    is_control_name,
    names_to_cut,
    pattern_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROBES = (
    Example(
        Prompt(
            'What\'s λx.x? <escape> {a: "1"}',
            (Utterance("User", "α → β?"), Utterance("AI", "x[i] != 0.5  && f(x)\tnaïve 😀 日本語 <end_of_turn>")),
        ),
        Answer(
            ("O(n log n), not O(n²).", "'<' and '>' are not tags; 10,000 > 9,999."),
            (
                FollowUp("Why?", "0.61", "why_not"),
                FollowUp("vs C++?", "0.2", "vs_cpp"),
                FollowUp("Et après ?", "0.07", "x2_y"),
            ),
        ),
    ),
)
"""Fixed texts for fingerprint and audit: control tokens of the format and typed ones, code, accents, numbers."""


RESTATES = "restates_questions"
"""In tokenizer_config.json: the model begins its answers with the question in full (`Prompt.restates`)."""


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example, `<bos>` first. The answer begins at `num_prompt_tokens`."""

    ids: tuple[int, ...]
    num_prompt_tokens: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_answer_tokens(self) -> int:
        return len(self.ids) - self.num_prompt_tokens


def load_tokenizer(folder: Path, fix_mistral_regex: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. Raises UserError when it is missing or cannot be read.

    Only the audit passes `fix_mistral_regex=False`, to compare.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer (no tokenizer.json)", "a model folder includes its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, fix_mistral_regex=fix_mistral_regex, local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {error}") from None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder's tokenizer, which a merge copies. Subfolders are none, whatever their names."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and (path.name.startswith("tokenizer") or path.name == "special_tokens_map.json")
    )


def id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token."""
    return cast(int, tokenizer.convert_tokens_to_ids(token))  # a list comes back only for a list


def encode(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], to_cut: re.Pattern[str] | None = None
) -> list[int]:
    """Ids of rendered pieces, without `<bos>`. Only a Control piece becomes a control token.

    In a literal piece, the name of a control token is encoded in two parts, cut after its first character. So no
    tokenizer takes it for the token. The characters stay the same. Control tokens are those of the vocabulary: see
    `names_to_cut`. `to_cut`: the pattern that finds their names, where many texts are encoded.
    """
    pattern = to_cut or cut_pattern(tokenizer)
    if not any(pattern.search(piece) for piece in pieces if not isinstance(piece, Control)):
        return tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    for is_control, run in itertools.groupby(pieces, lambda piece: isinstance(piece, Control)):
        if is_control:
            ids += [id_of(tokenizer, piece) for piece in run]
        else:
            for part in cut("".join(run), pattern):
                ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def cut_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern that finds the names that `encode` cuts. It asks for the size of the vocabulary, which may have grown:
    with Gemma's that takes longer than to encode a short text."""
    return _cut_pattern(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _cut_pattern(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    """`size` is that of the tokenizer, which may grow."""
    return pattern_of(control_names(tokenizer))


def control_ids(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The control tokens of a vocabulary by id: every added token whose name a text may hold, special or not."""
    return _control_ids(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _control_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
    return {i: name for i, name in added.items() if is_control_name(name)}


def control_names(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What literal text may not hold whole, the longest first: see `names_to_cut`."""
    return names_to_cut(str(token.content) for token in tokenizer.added_tokens_decoder.values())


def special_names(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Of the control names those of special tokens: no value of an answer may contain one.

    Other added tokens it may contain: Gemma has `<b>` and `<table>` among them.
    """
    return names_to_cut(str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)


def answer_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern that finds what no value of an answer may contain."""
    return _answer_pattern(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _answer_pattern(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    return pattern_of(special_names(tokenizer))


def restates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model of this tokenizer begins its answers with the question in full: its tokenizer_config.json says
    so (`chat_format.write_chat_format`)."""
    return bool(tokenizer.init_kwargs.get(RESTATES))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids of a prompt to a model, in the form that it was trained on; `<bos>` first if the tokenizer has one."""
    return encode_exactly(tokenizer, replace(prompt, restates=restates(tokenizer)))


def encode_exactly(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, to_cut: re.Pattern[str] | None = None
) -> list[int]:
    """Ids of a prompt as it is, whatever the tokenizer's model was trained on."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + encode(tokenizer, prompt.pieces(), to_cut)


def encode_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, to_cut: re.Pattern[str] | None = None
) -> EncodedExample:
    """Ids of a training example: those of its prompt, then those of its answer."""
    prompt = encode_exactly(tokenizer, example.prompt, to_cut)
    return EncodedExample((*prompt, *encode(tokenizer, example.answer.pieces(), to_cut)), len(prompt))


def encode_examples(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[EncodedExample]:
    """`encode_example` of each, faster."""
    to_cut = cut_pattern(tokenizer)
    return [encode_example(tokenizer, example, to_cut) for example in examples]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # a list comes back only for a list of lists
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def spelled_out_token(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, int] | None:
    """The first control token spelled out in ordinary tokens, and its offset in the decoded text; or None.

    Such text looks valid once decoded, but no program that reads ids would find the token.
    """
    control_ids = {id_of(tokenizer, token) for token in CONTROL_TOKENS}
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
    """SHA-256 of the ids of the probe texts. Tokenizers that encode alike have the same one."""
    return hash_of_ids([[*encode_example(tokenizer, probe).ids] for probe in PROBES])


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def hash_of_ids(ids: list[list[int]]) -> str:
    """SHA-256 of the ids of some texts."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
