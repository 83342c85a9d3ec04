"""run.json as a value: the inputs of a run, and the results of its stages.

Only this module knows the keys of run.json and structural_tests.json: the names of the fields below. The record is
made with the run folder and contains the resolved settings. Each stage adds its result.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

from conversation.data.statistics import DataStatistics
from conversation.errors import UserError
from conversation.runs.memory_plan import MemoryPlan
from conversation.runs.schedule import after_a_longer_run
from conversation_config import TrainingConfig

T = TypeVar("T")


def now() -> str:
    """The time in ISO 8601, to the second, with the offset of the local time zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


NOW = ("the run has", "now")  # what a difference is between; hashes follow

# --- inputs of a run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseIdentity:
    """The base model: hashes of its files, and the fingerprint of its tokenizer's ids."""

    name: str
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str
    tokenizer_fingerprint: str

    def differences(self, other: BaseIdentity, words: tuple[str, str] = NOW) -> list[str]:
        """One sentence for each part of the model that differs. Its name and location do not count."""
        parts = {
            "weights_sha256": "the base model's weights",
            "config_sha256": "the base model's config.json",
            "tokenizer_sha256": "the file tokenizer.json",
            "tokenizer_fingerprint": "the tokenizer",
        }
        return _differences(parts, self, other, words)


@dataclass(frozen=True)
class DataIdentity:
    """The data: its source, hashes of the training and of the held-out lines, and counts."""

    source: str
    training_sha256: str
    held_out_sha256: str
    statistics: DataStatistics

    def differences(self, other: DataIdentity, words: tuple[str, str] = NOW) -> list[str]:
        """One sentence for each part of the data that differs. Its source does not count."""
        parts = {"training_sha256": "the training data", "held_out_sha256": "the held-out data"}
        return _differences(parts, self, other, words)


def _differences(parts: dict[str, str], before: object, current: object, words: tuple[str, str]) -> list[str]:
    pairs = ((what, getattr(before, name), getattr(current, name)) for name, what in parts.items())
    return [f"{what}: {words[0]} {old[:12]}, {words[1]} {new[:12]}" for what, old, new in pairs if old != new]


@dataclass(frozen=True)
class Environment:
    """Package versions, the machine, and the project's git commit (None outside a repository)."""

    versions: dict[str, str]
    machine: dict[str, str | int | float]
    git_commit: str | None


@dataclass(frozen=True)
class Start:
    """One start of the training: when, after which step of the run, and with which code."""

    time: str
    after_step: int
    git_commit: str | None


# --- results of its stages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingResult:
    """The figures of a finished training. Losses are in nats per label token; files map to SHA-256.

    `step`: "shared" or "plain", the step that it used; None in records of before there were two.
    """

    steps: int
    first_window_loss: float
    last_window_loss: float
    held_out_loss_before: float | None
    held_out_loss: float | None
    seconds: float
    peak_memory_gb: float
    adapter_files: dict[str, str]
    files: dict[str, str]
    finished: str
    step: str | None = None
    memory_plan: MemoryPlan | None = None

    def __str__(self) -> str:
        held_out = f", {self.held_out_loss:.3f} held out" if self.held_out_loss is not None else ""
        return (
            f"Trained {self.steps} steps in {self.seconds / 60:.1f} minutes: loss {self.first_window_loss:.3f} in the "
            f"first window, {self.last_window_loss:.3f} in the last{held_out}.{self._memory()}"
        )

    def _memory(self) -> str:
        if self.memory_plan is None:
            return ""
        error = self.memory_plan.total / 1e9 / self.peak_memory_gb - 1
        return f" Peak memory {self.peak_memory_gb:.2f} GB, the plan was {error:+.0%} off."


@dataclass(frozen=True)
class MergeResult:
    """The figures of a merge. Compare `largest_logit_difference`, which is absolute, with `largest_logit`."""

    prompts: int
    largest_logit_difference: float
    largest_logit: float
    model_bytes: int
    peak_memory_bytes: int
    files: dict[str, str]
    adapter_files: dict[str, str]
    finished: str

    def __str__(self) -> str:
        return (
            f"{self.model_bytes / 1e9:.2f} GB. On {self.prompts} prompts the logits differ from base + adapters by at "
            f"most {self.largest_logit_difference:.1e} (largest logit {self.largest_logit:.1f}), greedy continuations "
            f"are equal. Peak memory {self.peak_memory_bytes / 1e9:.2f} GB, "
            f"{self.peak_memory_bytes / self.model_bytes:.2f} times the model."
        )


@dataclass(frozen=True)
class AnswersResult:
    """The counts of passed structural tests and of valid answers to held-out questions."""

    passed: bool
    passed_tests: int
    held_out_questions: int
    held_out_valid: int
    held_out_distinct: int
    finished: str
    files: dict[str, str]


@dataclass(frozen=True)
class AskedQuestion:
    """One question, the answer, and the verdict. `position`: the offset of the first invalid character."""

    name: str
    question: str
    history: tuple[dict[str, str], ...]
    passed: bool
    problem: str | None
    position: int | None
    warnings: tuple[str, ...]
    distinct_choices: bool
    texts: tuple[str, ...] | None
    choices: tuple[dict[str, str | float], ...] | None
    output: str


@dataclass(frozen=True)
class AnswersReport:
    """structural_tests.json: every question asked, the three tests first."""

    tests: tuple[AskedQuestion, ...]
    held_out: tuple[AskedQuestion, ...]

    def counts(self) -> dict[str, Any]:
        """The fields of AnswersResult but for `files`."""
        return {
            "passed": all(test.passed for test in self.tests),
            "passed_tests": sum(test.passed for test in self.tests),
            "held_out_questions": len(self.held_out),
            "held_out_valid": sum(asked.passed for asked in self.held_out),
            "held_out_distinct": sum(asked.distinct_choices for asked in self.held_out),
            "finished": now(),
        }

    def to_json(self, counts: dict[str, Any]) -> dict[str, Any]:
        """The object in structural_tests.json: the counts, for a reader, then the questions."""
        return {**counts, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> AnswersReport:
        """Raises ValueError that names the wrong keys. The counts are not read: run.json has them."""
        return from_json(AnswersReport, {name: value.get(name) for name in ("tests", "held_out")})


# --- the record -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """run.json. A result is None until its stage finishes, and again after an earlier stage is repeated."""

    started: str
    config: TrainingConfig
    data: DataIdentity
    base_model: BaseIdentity
    environment: Environment
    processes: int
    starts: tuple[Start, ...] = ()
    training: TrainingResult | None = None
    merge: MergeResult | None = None
    structural_tests: AnswersResult | None = None
    published: str | None = None

    @property
    def started_at(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(self.started)

    def with_start(self, after_step: int) -> RunRecord:
        """The record with one more start of the training, after a step. The results of all stages are dropped."""
        start = Start(now(), after_step, self.environment.git_commit)
        return dataclasses.replace(self, starts=(*self.starts, start), training=None, merge=None, structural_tests=None)

    @property
    def commits(self) -> list[str]:
        """The commits that trained, in order; of equal neighbours only one."""
        commits = [str(start.git_commit) for start in self.starts] or [str(self.environment.git_commit)]
        return [commit for commit, _ in itertools.groupby(commits)]

    def to_json(self) -> bytes:
        """The bytes of run.json, their own SHA-256 included."""
        value = dataclasses.asdict(self)
        return (json.dumps({**value, "sha256": _hash(value)}, indent=2, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_json(value: dict[str, Any]) -> RunRecord:
        """Raises ValueError with the reason when the value is not a record."""
        value = dict(value)
        if value.pop("sha256", None) != _hash(value):
            raise ValueError("its content does not match its SHA-256")
        return from_json(RunRecord, value)


def from_json(kind: type[T], value: Any) -> T:
    """A value of one of the classes above from parsed JSON. Raises ValueError that names the wrong keys."""
    from pydantic import ValidationError

    adapter = _adapter(cast("type", kind))  # mypy takes a type variable's class for not hashable
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the object'}: {e['msg']}" for e in error.errors()]
        raise ValueError("; ".join(problems[:5])) from None


@cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- resuming -------------------------------------------------------------------------------------------------------

HARMLESS_CHANGES = ("logging_steps", "save_steps", "frozen_weights", "report_to")
LENGTH = ("num_train_epochs", "max_steps")


def changes_on_resume(record: RunRecord, current: RunRecord) -> list[str]:
    """The harmless changes when a run resumes with the settings of `current`: one sentence each.

    Raises UserError that names each change that would make it another run.
    """
    harmless, refused = [], []
    for spec in dataclasses.fields(TrainingConfig):
        before, value = getattr(record.config, spec.name), getattr(current.config, spec.name)
        if before != value and spec.name in HARMLESS_CHANGES:
            harmless.append(f"--{spec.name} is now {value}, was {before}: harmless, the run goes on")
        elif before != value and spec.name not in LENGTH:
            refused.append(f"--{spec.name}: the run has {before}, now {value}")
    before, steps = (
        each.config.steps(current.data.statistics.training_examples, current.processes) for each in (record, current)
    )
    if steps < before:
        refused.append(f"the run is {before} steps long, now {steps}: it can be made longer, not shorter")
    elif steps > before:
        rate = after_a_longer_run(record.config, before, current.config, steps)
        harmless.append(f"The run is now {steps} steps long, was {before}: it goes on. {rate}")
    before, device = (str(each.environment.machine.get("device", "")) for each in (record, current))
    if before.split(" ")[0] != device.split(" ")[0] and before:
        harmless.append(f"The run is now on the device {device}, was on {before}: it goes on, rounded differently.")
    if record.processes != current.processes:
        refused.append(f"processes: the run has {record.processes}, now {current.processes}")
    refused += record.data.differences(current.data) + record.base_model.differences(current.base_model)
    if refused:
        problems = "\n".join(f"  {problem}" for problem in refused)
        raise UserError(
            f"the run cannot be resumed with other settings:\n{problems}",
            "leave the flags out to go on as before, or train a new run",
        )
    return harmless


# --- several processes ----------------------------------------------------------------------------------------------


def differences(first: RunRecord, other: RunRecord) -> list[str]:
    """What two processes of one training would do differently: a sentence each. Names of data and base do not count."""
    words = ("the first has", "this one")
    found = []
    for spec in dataclasses.fields(TrainingConfig):
        one, two = getattr(first.config, spec.name), getattr(other.config, spec.name)
        if one != two and spec.name not in ("training_data", "base_model"):
            found.append(f"--{spec.name}: {words[0]} {one}, {words[1]} {two}")
    found += first.data.differences(other.data, words)
    return found + first.base_model.differences(other.base_model, words)
