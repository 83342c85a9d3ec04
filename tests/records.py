"""Records of runs, made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from conversation.data.statistics import DataStatistics, LengthSummary, StructureCounts
from conversation.runs.files import write_json
from conversation.runs.folder import RunFolder
from conversation.runs.publishing import begin_attempt
from conversation.runs.record import AnswersResult, BaseIdentity, DataIdentity, Environment, RunRecord
from conversation_config import TrainingConfig


def some_record(**changes) -> RunRecord:
    """The record of a run that has just begun, with made-up identities."""
    lengths = LengthSummary.of([1, 2, 3])
    counts = StructureCounts(1, 1, 1, 3, {"1": 1}, {"1": 1}, 0)
    statistics = DataStatistics(
        **dataclasses.asdict(counts),
        training_examples=1,
        held_out_examples=0,
        token_lengths=lengths,
        answer_token_lengths=lengths,
        label_token_share=0.4,
        maximum_length=2048,
        examples_changed_by_fix_mistral_regex=0,
        first_change_by_fix_mistral_regex=None,
    )
    record = RunRecord(
        started="2026-01-02T03:04:05+00:00",
        config=TrainingConfig(),
        data=DataIdentity("s", "training", "held out", statistics),
        base_model=BaseIdentity("m", "weights", "config", "tokenizer", "fingerprint"),
        environment=Environment({}, {}, "c"),
        processes=1,
    )
    return dataclasses.replace(record, **changes)


def finished_attempt(root: Path, passed: bool = True) -> RunFolder:
    """An attempt at the end of its tests; it has no model."""
    tests = AnswersResult(passed, 3 if passed else 2, 1, 1, 1, "2026-01-02T04:04:05+00:00", {})
    run = begin_attempt(root, some_record(structural_tests=tests))
    write_json(run.structural_tests, {"passed": passed, "tests": [], "held_out": []})
    return run
