"""The inputs of a training, read and checked before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.data.examples import read_with_roots, split_by_tree, to_jsonl
from conversation.data.quality import assess
from conversation.data.statistics import DataStatistics, LengthSummary, count_structure
from conversation.data.trees import read_trees
from conversation.errors import UserError, list_problems
from conversation.format.calls import Example
from conversation.models.audit import Audit, audit
from conversation.models.base_models import find_base_model
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
    """The checked inputs of a training: settings, data, base model, token ids."""

    config: TrainingConfig
    base_folder: Path
    training: list[Example]
    held_out: list[Example]
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
            environment=environment(),
            processes=number_of_processes(),
        )


def prepare(config: TrainingConfig) -> Prepared:
    """Read and check data, base model and tokenizer. Raises UserError. On disk only the model cache may change."""
    if config.trackers:
        from conversation.training.trackers import check_trackers

        check_trackers(config.trackers)
    examples, same_root = read_with_roots(data_paths(config), config.domain_names)
    base_folder = find_base_model(config.base_model)
    tokenizer, encoded, audited = audit(base_folder, examples)
    too_long = [
        f"example {number}, which asks {example.prompt.question!r}: {len(ids)} tokens"
        for number, (example, ids) in enumerate(zip(examples, encoded, strict=True), 1)
        if len(ids) > config.max_length
    ]
    if too_long:
        raise UserError(
            f"{len(too_long)} examples are longer than {config.max_length} tokens:\n{list_problems(too_long)}",
            "nothing is cut silently: shorten them, or raise --max_length",
        )
    training, held_out = split_by_tree(examples, config.held_out_share, same_root)
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
        [ids_of[example.text] for example in training],
        [ids_of[example.text] for example in held_out],
        tokenizer,
        audited,
    )


def data_paths(config: TrainingConfig) -> tuple[Path, ...]:
    """Where the training data is: a set of the project's own, or a path from the working folder or from the project."""
    if config.training_data in DATA_SETS:
        if Path(name := config.training_data).exists():
            print(f"the project's set {name} is meant; for the one here write ./{name}", file=sys.stderr)
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
    paths = data_paths(prepared.config)
    whole_trees = all(path.is_dir() for path in paths) and not prepared.config.domain_names
    quality = assess([tree for path in paths for tree in read_trees(path)]) if whole_trees else None
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
