"""Ask a model. How its answer is chosen is a `Decoding`; everything that asks calls `generate_answer(s)`.

- greedy: the likeliest token each time, free to leave the format. What the structural tests judge.
- sampled: tokens drawn at a temperature, free as well.
- constrained: greedy within the grammar of the format. Always valid, nothing is repeated.
- drawn: tokens drawn at a temperature within the grammar.
- contrast: constrained, and what the question makes likely counts more than what is likely after any question.
- best_of_n: the constrained answer and n - 1 drawn within the grammar; the one that the question speaks for most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from conversation.format.calls import Prompt
from conversation.format.control_tokens import END_OF_TURN
from conversation.models.tokenizer import encode_prompt, id_of
from conversation_config import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from conversation.answering.constrained import Draw

Method = Literal["greedy", "sampled", "constrained", "drawn", "contrast", "best_of_n"]
METHODS: tuple[Method, ...] = get_args(Method)

PROMPTS_AT_A_TIME = 50
NEUTRAL_QUESTION = "Tell me something."
NEUTRAL_PROMPT = Prompt(NEUTRAL_QUESTION)
"""Asks for an answer about nothing in particular: what is likely here is likely after any question."""


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen. Raises ValueError for an option that cannot be right.

    `temperature`, `top_p` and `seed` count where tokens are drawn (sampled, drawn, best_of_n); `n` is the number of
    answers to choose from. `strength` is the a of contrast: (1 + a) log p(token | question) - a log p(token | neutral
    question). That is context-aware decoding of strength a (Shi et al. 2023, "Trusting your evidence"), and
    classifier-free guidance of scale 1 + a (Sanchez et al. 2023, "Stay on topic"), with a neutral question in the place
    of none. Contrastive decoding (Li et al. 2023) compares two models; only `constrained.PLAUSIBLE` is from there.
    """

    method: Method
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    strength: float = 0.5
    n: int = 5

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(f"unknown method {self.method!r}")
        if not 0 < self.temperature < math.inf:
            problems.append(f"the temperature must be greater than 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be greater than 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**63:
            problems.append(f"the seed must be at least 0 and less than 2^63, not {self.seed}")
        if not 0 < self.strength < math.inf:
            problems.append(f"the strength must be greater than 0, not {self.strength}")
        if self.n < 1:
            problems.append(f"n must be at least 1, not {self.n}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def contrast(self) -> float:
        """The strength of the contrast; 0 for the methods without one."""
        return self.strength if self.method == "contrast" else 0.0

    def prompts(self, prompt: Prompt) -> list[Prompt]:
        """What a model has to read: the prompt and, for contrast, the neutral one."""
        return [prompt, NEUTRAL_PROMPT] if self.contrast else [prompt]

    def draw(self, *more: int) -> Draw | None:
        """How tokens are drawn, with random numbers that depend on the seed and on `more`; None where the likeliest is
        taken."""
        if self.method not in ("sampled", "drawn", "best_of_n"):
            return None
        import numpy as np

        from conversation.answering.constrained import Draw

        return Draw(self.temperature, self.top_p, np.random.default_rng([self.seed, *more]))


GREEDY = Decoding("greedy")
SAMPLED = Decoding("sampled")
CONSTRAINED = Decoding("constrained")


def generate_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, decoding: Decoding = GREEDY
) -> list[int]:
    """The answer to a prompt: see `generate_answers`."""
    return generate_answers(model, tokenizer, [prompt], decoding)[0]


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding = GREEDY,
) -> list[list[int]]:
    """An answer to each prompt as token ids, up to and including `<end_of_turn>`.

    Greedy and sampled answers are made for at most 50 prompts at a time, and are cut after MAX_NEW_TOKENS tokens. The
    other methods ask one by one; their answers are valid, with fragments, follow-ups and targets that are all distinct.
    What is drawn depends on the seed and the prompt, not on what else is asked; a prompt that is asked twice gets two
    answers. (A base that the shared-prefix step does not know is asked by transformers, and what it samples depends on
    all prompts.)
    """
    return generate_with_each(model, tokenizer, prompts, [decoding])[decoding]


def generate_with_each(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], decodings: Sequence[Decoding]
) -> dict[Decoding, list[list[int]]]:
    """For each decoding the answers of `generate_answers`. Those that are free share the reading of the prompts."""
    free = [each for each in dict.fromkeys(decodings) if each.method in ("greedy", "sampled")]
    encoded = [tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    answers = _free(model, tokenizer, encoded, free) if free else {}
    for decoding in decodings:
        if decoding not in answers:
            answers[decoding] = [
                _within_the_grammar(model, tokenizer, prompt, decoding, decoding.draw(before, *ids))
                for prompt, ids, before in zip(prompts, encoded, _asked_before(encoded), strict=True)
            ]
    return answers


def _asked_before(encoded: Sequence[tuple[int, ...]]) -> list[int]:
    """How often each of some prompts was asked before, among them."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for ids in encoded:
        found.append(seen[ids])
        seen[ids] += 1
    return found


def _free(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[tuple[int, ...]],
    decodings: Sequence[Decoding],
) -> dict[Decoding, list[list[int]]]:
    from conversation.answering.batch_generation import Asked, generate_batch
    from conversation.answering.token_losses import read_prefix_trees

    try:
        read_prefix_trees(model)
    except ValueError:  # a base whose prompts cannot be read as a tree
        return {decoding: _by_transformers(model, tokenizer, encoded, decoding) for decoding in decodings}
    times = _asked_before(encoded)
    asked = [
        Asked(ids, decoding.draw(before, *ids))
        for decoding in decodings
        for ids, before in zip(encoded, times, strict=True)
    ]
    end_of_turn = id_of(tokenizer, END_OF_TURN)
    found = iter(generate_batch(model, asked, end_of_turn, MAX_NEW_TOKENS, PROMPTS_AT_A_TIME))
    return {decoding: [next(found) for _ in encoded] for decoding in decodings}


def _by_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[tuple[int, ...]], decoding: Decoding
) -> list[list[int]]:
    """The same with transformers' `generate`; here what is sampled depends on the prompts that are asked together."""
    import torch
    from transformers import GenerationConfig

    end_of_turn, pad = tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.pad_token_id
    drawn = (
        {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        if decoding.method == "sampled"
        else {"do_sample": False}
    )
    settings = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end_of_turn, pad_token_id=pad, **drawn)
    generate: Any = model.generate  # PreTrainedModel's annotations leave it out
    by_length = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))  # so that little is padded
    answers: list[list[int]] = [[] for _ in encoded]
    for start in range(0, len(by_length), PROMPTS_AT_A_TIME):
        batch = by_length[start : start + PROMPTS_AT_A_TIME]
        width = max(len(encoded[place]) for place in batch)
        padding = [width - len(encoded[place]) for place in batch]
        ids = torch.tensor([[pad] * p + [*encoded[place]] for p, place in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in padding])
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(decoding.seed)
            output = generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
        for place, row in zip(batch, output[:, width:].tolist(), strict=True):
            answers[place] = row[: row.index(end_of_turn) + 1] if end_of_turn in row else row
    return answers


def _within_the_grammar(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, decoding: Decoding, draw: Draw | None
) -> list[int]:
    from conversation.answering import scoring
    from conversation.answering.allowed_tokens import allowed_tokens
    from conversation.answering.constrained import Writer
    from conversation.answering.reading import BatchReader

    contexts = [encode_prompt(tokenizer, each) for each in decoding.prompts(prompt)]
    reader = BatchReader(model, contexts, tokenizer.pad_token_id or 0)
    writer = Writer(reader, allowed_tokens(tokenizer), decoding.contrast)
    if decoding.method != "best_of_n":
        return writer.write(draw)
    answers = [writer.write(), *(writer.write(draw) for _ in range(decoding.n - 1))]
    found = scoring.scores(model, tokenizer, [(prompt, answer) for answer in answers])
    return answers[found.index(max(found))]
