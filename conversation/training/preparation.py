"""The inputs of a training, read and checked before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.data.examples import TrainingData, read_data, split_by_tree, to_jsonl
from conversation.data.quality import assess
from conversation.data.statistics import DataStatistics, LengthSummary, count_structure
from conversation.data.trees import Tree
from conversation.errors import UserError, list_problems
from conversation.format.calls import Example
from conversation.models.audit import Audit, audit
from conversation.models.base_models import find_base_model
from conversation.models.device import decided_device
from conversation.models.tokenizer import EncodedExample
from conversation.models.weights import adapter_bytes, fp32_bytes, identify
from conversation.runs.files import check_disk_space
from conversation.runs.machine import environment, number_of_processes
from conversation.runs.record import DataIdentity, RunRecord, now
from conversation.runs.schedule import problem_with_rates
from conversation.training.training_set import TrainingSet, to_dataset
from conversation_config import DATA_SETS, KEPT_CHECKPOINTS, PROJECT, TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """The checked inputs of a training: settings, data, base model, token ids.

    `trees`: those that the examples are of, where they are of trees.
    """

    config: TrainingConfig
    base_folder: Path
    training: list[Example]
    held_out: list[Example]
    trees: list[Tree]
    encoded_training: list[EncodedExample]
    encoded_held_out: list[EncodedExample]
    tokenizer: PreTrainedTokenizerBase
    audit: Audit

    @property
    def steps(self) -> int:
        """Optimizer steps of the training."""
        return self.config.steps(len(self.training), number_of_processes())

    @property
    def training_set(self) -> TrainingSet:
        training, held_out = (
            to_dataset(encoded, [example.prompt.question for example in examples], self.config.loss_on)
            for encoded, examples in ((self.encoded_training, self.training), (self.encoded_held_out, self.held_out))
        )
        return TrainingSet(training, held_out if len(held_out) else None)

    def __str__(self) -> str:
        return f"{len(self.training)} examples to train on, {len(self.held_out)} held out; {self.audit}"

    @property
    def statistics(self) -> DataStatistics:
        encoded = self.encoded_training + self.encoded_held_out
        on_all = self.config.loss_on == "all"
        labels = sum(len(ids) - 1 if on_all else ids.num_answer_tokens for ids in encoded)
        return DataStatistics(
            **dataclasses.asdict(count_structure(self.training + self.held_out)),
            training_examples=len(self.training),
            held_out_examples=len(self.held_out),
            token_lengths=LengthSummary.of([len(ids) for ids in encoded]),
            answer_token_lengths=LengthSummary.of([ids.num_answer_tokens for ids in encoded]),
            label_token_share=round(labels / sum(len(ids) for ids in encoded), 4),
            maximum_length=self.config.max_length,
            examples_changed_by_fix_mistral_regex=self.audit.changed_by_flag,
            first_change_by_fix_mistral_regex=self.audit.first_change or None,
        )

    def record(self) -> RunRecord:
        """The record of a new run with these inputs."""
        return RunRecord(
            started=now(),
            config=self.config,
            data=DataIdentity(
                source=self.config.training_data,
                training_sha256=hashlib.sha256(to_jsonl(self.training)).hexdigest(),
                held_out_sha256=hashlib.sha256(to_jsonl(self.held_out)).hexdigest(),
                statistics=self.statistics,
            ),
            base_model=identify(self.base_folder, self.config.base_model, self.audit.fingerprint),
            environment=environment(str(decided_device())),
            processes=number_of_processes(),
        )


def prepare(config: TrainingConfig) -> Prepared:
    """Read and check data, base model and tokenizer. Raises UserError. On disk only the model cache may change."""
    if config.trackers:
        from conversation.training.trackers import check_trackers

        check_trackers(config.trackers)
    data = read_data(data_paths(config), config.domain_names, config.answers, config.reasoning == "restate")
    failed: dict[int, str] = {}
    try:
        base_folder = find_base_model(config.base_model)
        tokenizer, encoded, audited = audit(base_folder, data.examples, failed=failed)
    except UserError:
        data.check()  # what is wrong with the data is the nearer problem
        raise
    _check_data(data, encoded, failed, config.max_length)
    examples = data.examples
    training, held_out = split_by_tree(examples, config.held_out_share, data.same_root)
    rates, refused = problem_with_rates(config, config.steps(len(training), number_of_processes()))
    if refused:
        raise UserError(rates, "give --warmup_steps 0, or train longer")
    if rates:
        print(f"warning: {rates}", file=sys.stderr)
    ids_of = dict(zip((example.text for example in examples), encoded, strict=True))
    return Prepared(
        config,
        base_folder,
        training,
        held_out,
        data.trees,
        [ids_of[example.text] for example in training],
        [ids_of[example.text] for example in held_out],
        tokenizer,
        audited,
    )


def _check_data(
    data: TrainingData, encoded: Sequence[EncodedExample], failed: Mapping[int, str], max_length: int
) -> None:
    """Raises UserError that lists every line and node that cannot be used, whatever is wrong with it.

    `failed`: the examples that did not pass the audit, by index, and why.
    """
    too_long = {i: len(ids) for i, ids in enumerate(encoded) if len(ids) > max_length}
    if not failed and not too_long:
        data.check()
        return
    problems = [problem for error in data.unusable for problem in error.problems]
    hints = [error.hint for error in data.unusable if error.hint]
    for i, (place, example) in enumerate(zip(data.places, data.examples, strict=True)):
        asked = f"{place}, which asks {example.prompt.question!r}"
        if i in failed:
            problems.append(f"{asked}: the tokenizer audit failed: {failed[i]}")
        if i in too_long:
            problems.append(f"{asked}: {too_long[i]} tokens, more than {max_length}")
    if too_long:
        hints.append("nothing is cut silently: shorten what is too long, or raise --max_length")
    many = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    raise UserError(f"the training data has {many}:\n{list_problems(problems)}", "; ".join(dict.fromkeys(hints)))


def data_paths(config: TrainingConfig) -> tuple[Path, ...]:
    """Where the training data is: a set of the project's own, or a path from the working folder or from the project."""
    if config.training_data in DATA_SETS:
        if Path(name := config.training_data).exists():
            print(f"this is the project's set {name}; for the one here write ./{name}", file=sys.stderr)
        return DATA_SETS[config.training_data]
    path = Path(os.path.expanduser(config.training_data))
    return (PROJECT / path if not path.exists() and (PROJECT / path).exists() else path,)


def check_space_for(prepared: Prepared, folder: Path, to_be_freed: int = 0) -> None:
    """Raises UserError when the disk of `folder` has no space for the training and the merged model.

    `to_be_freed`: bytes that are removed from that disk first.
    """
    adapters = adapter_bytes(prepared.base_folder, prepared.config.lora_r)
    checkpoint = 3 * adapters + 100_000  # weights and AdamW's two moments; the rest is small
    needed = (KEPT_CHECKPOINTS + 1) * checkpoint + adapters + fp32_bytes(prepared.base_folder)
    check_disk_space(folder, needed - to_be_freed, "training and the merged model after it")


def print_statistics(prepared: Prepared, as_json: bool) -> None:
    """Print what is in the data; of whole tree folders also how good it is, as far as a program can tell."""
    whole_trees = all(path.is_dir() for path in data_paths(prepared.config)) and not prepared.config.domain_names
    quality = assess(prepared.trees) if whole_trees and prepared.trees else None  # a data set's folder has none
    found = {**dataclasses.asdict(prepared.statistics), "tokenizer_fingerprint": prepared.audit.fingerprint}
    if as_json:
        print(json.dumps({**found, "quality": quality and quality.as_dict()}))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {item}" for key, item in value.items())
        print(f"{name.replace('_', ' '):40} {value}")
    if quality:
        print(quality)
    print("The data and the tokenizer are fit for training.")
