"""The examples of a training as `datasets.Dataset`s of ready-made tokens, in TRL's columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conversation.models.tokenizer import EncodedExample
from conversation.training.prefix_tree import TokenSequence

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # TRL's label of a token that the loss does not count


@dataclass(frozen=True)
class TrainingSet:
    """The examples to train on, and those held out (None: there are none).

    Columns: `input_ids`; `completion_mask`, 1 for each token that the loss counts; `question`, which names the example
    in errors. TRL makes `labels` of the mask.
    """

    training: Dataset
    held_out: Dataset | None


def token_sequence(encoded: EncodedExample, loss_on: str) -> TokenSequence:
    """The ids of an example, with the label tokens marked: the answer's, or all but the first."""
    first_label = encoded.num_prompt_tokens if loss_on == "completion" else 1
    return TokenSequence(encoded.ids, tuple(i >= first_label for i in range(len(encoded.ids))))


def to_dataset(encoded: Sequence[EncodedExample], questions: Sequence[str], loss_on: str) -> Dataset:
    """One row an example, in memory, in the order given."""
    from datasets import Dataset

    sequences = [token_sequence(example, loss_on) for example in encoded]
    return Dataset.from_dict(
        {
            "input_ids": [list(sequence.ids) for sequence in sequences],
            "completion_mask": [[int(label) for label in sequence.is_label] for sequence in sequences],
            "question": list(questions),
        }
    )


def sequence_of(row: dict[str, Any]) -> TokenSequence:
    """The example in a row that TRL has prepared: `input_ids`, and `labels` with IGNORED where the loss is not."""
    return TokenSequence(tuple(row["input_ids"]), tuple(label != IGNORED for label in row["labels"]))
