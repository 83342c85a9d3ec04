"""export.json as a value: the GGUF files of a run, and what their verification found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from conversation.runs.files import read_value, write_json
from conversation.runs.record import from_json

PREFERRED = ("q8_0", "q5_1", "f16", "f32", "q4_k_m")
"""Q8_0 first: hardly anything of the training is lost in it, and a token takes a third of the time of FP32."""


@dataclass(frozen=True)
class ExportedFile:
    """One file. What the figures are: `models.gguf_check.TensorCheck`, `answering.agreement.Agreement`.

    `forced`: the reasons for which it would have been refused without --force.
    """

    type: str
    file: str
    bytes: int
    sha256: str
    share_of_error: float
    survived: float | None
    survived_by_type: dict[str, float]
    passed_tests: int
    held_out_questions: int
    held_out_valid: int
    held_out_distinct: int
    answers: int
    equal_answers: int
    tokens: int
    equal_tokens: int
    largest_gap: float
    seconds: float
    forced: tuple[str, ...]
    finished: str

    def __str__(self) -> str:
        survived = "" if self.survived is None else f" {self.survived:.1%} of the training's change survived;"
        return (
            f"{self.bytes / 1e6:.0f} MB;{survived} {self.passed_tests} of 3 structural tests, "
            f"{self.held_out_valid} of {self.held_out_questions} held-out answers valid; "
            f"{self.equal_tokens} of {self.tokens} tokens are the merged model's, the largest gap is "
            f"{self.largest_gap:.3f} nats"
        )


@dataclass(frozen=True)
class Export:
    """export.json. `model_files`: the hashes of the merged model that the files were made from."""

    model: str
    model_files: dict[str, str]
    files: tuple[ExportedFile, ...]

    def with_file(self, file: ExportedFile) -> Export:
        """With one more file, in the place of an earlier one of its type."""
        return dataclasses.replace(self, files=(*(f for f in self.files if f.type != file.type), file))

    def best_first(self) -> list[ExportedFile]:
        """The files that were not forced, in the order of PREFERRED."""
        by_type = {each.type: each for each in self.files if not each.forced}
        return [by_type[kind] for kind in PREFERRED if kind in by_type]


def write_export(export: Export, path: Path) -> None:
    """Write export.json, whole or not at all."""
    write_json(path, dataclasses.asdict(export))


def read_export(path: Path) -> Export | None:
    """export.json, or None where there is none. Raises UserError when it is broken."""
    if not path.exists():
        return None
    return read_value(path, partial(from_json, Export), "remove it, and export again")
