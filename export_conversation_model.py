#!/usr/bin/env python3
"""Export a merged model as GGUF, for llama.cpp and Ollama.

    export_conversation_model.py --type q8_0                   the newest run
    export_conversation_model.py --type q8_0 q5_1 --run_dir RUN
    export_conversation_model.py --type f16 --model FOLDER --output DIR     a merged model folder alone

Types: f32, f16, q8_0, q5_1, q4_k_m. Writes gguf/ into the run folder: a file for each type, a Modelfile for Ollama,
the grammar conversation.gbnf, and export.json; and a section of report.md. A file gets its name only after it was read
back: its tensors are the merged model's within the type's error, llama.cpp encodes the training's texts as the training
did, at least half of what the training changed is left, and the structural tests pass through llama.cpp. --force keeps
a file in spite of the last two. Needs xllamacpp: .venv/bin/python -m pip install -r requirements-use.txt
Exit status: 0 all exported and verified; 1 one was refused or failed; 2 not started.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from conversation.data.examples import read_jsonl
from conversation.data.questions import THREE_CASES, read_questions
from conversation.errors import GO_ON, TRIED_AND_FAILED, CommandLine, UserError, run_main
from conversation.format.gbnf import gbnf
from conversation.format.ollama import modelfile
from conversation.runs.console import logged_console
from conversation.runs.export_record import Export, ExportedFile, read_export, write_export
from conversation.runs.files import (
    check_disk_space,
    make_folder,
    read_json,
    real_path,
    remove_leftovers,
    sha256_file,
    shown,
    size,
    write_atomically,
)
from conversation.runs.folder import RunFolder, chosen_run
from conversation.runs.lock import locked_folder
from conversation.runs.record import RunRecord
from conversation.runs.report import write_report
from conversation_config import EXPORT_TYPES, HELD_OUT_QUESTIONS, add_device_flag, names_in, set_up_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPARED_EXAMPLES = 100
MILLISECONDS = {"f32": 133, "f16": 67, "q8_0": 47, "q5_1": 45, "q4_k_m": 42}
"""For a token, on one core of two (270M parameters, AVX2): for the estimate of the time."""
TOKENS = 150  # of an answer


def main() -> int:
    args = parse_flags()
    if args.check:
        from conversation.models.llama_cpp import library

        library()
        print(f"Can be exported to: {', '.join(args.type)}.")
        return 0
    if args.model:
        model = real_path(args.model)
        return export(args, model, args.output or model.parent / "gguf", None, None)
    run = chosen_run(args.run_dir)
    record = run.read()
    with (
        locked_folder(run.path),
        logged_console(run.console_log),
    ):  # of a published run, too: files are added to it, and nothing changed
        try:
            run.check_merged(record)
            status = export(args, run.merged_model, run.exported, run, record)
        except BaseException:
            with contextlib.suppress(UserError):  # it must not hide the reason
                write_report(run)  # some types may be exported
            raise
        write_report(run)
    return status


def parse_flags() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run_dir", type=Path, help="the run folder (default: the newest)")
    which.add_argument("--model", type=Path, help="a merged model folder")
    parser.add_argument("--type", nargs="+", required=True, metavar="TYPE", help=f"{', '.join(EXPORT_TYPES)}; several")
    parser.add_argument("--output", type=Path, help="with --model: the folder for the files (default: gguf, beside it)")
    parser.add_argument("--resume", action="store_true", help="leave the files that are there and intact")
    parser.add_argument("--force", action="store_true", help="keep a file that has lost what the model was trained on")
    parser.add_argument("--check", action="store_true", help="only check the types and that xllamacpp is there")
    add_device_flag(parser)
    args = parser.parse_args()
    args.type = [name.lower() for name in names_in(",".join(args.type))]
    if unknown := [name for name in args.type if name not in EXPORT_TYPES]:
        raise UserError(f"unknown type {unknown[0]!r}", f"known: {', '.join(EXPORT_TYPES)}")
    if not args.type:
        raise UserError("--type names no type", f"known: {', '.join(EXPORT_TYPES)}")
    if args.output and not args.model:
        raise UserError("--output goes with --model: a run has its own place", "leave it out")
    return args


def export(
    args: argparse.Namespace, folder: Path, output: Path, run: RunFolder | None, record: RunRecord | None
) -> int:
    """Export a merged folder to all types that are asked for. Raises UserError that names those that failed."""
    set_up_libraries()
    from conversation.answering.exporting import Exporter
    from conversation.models.device import use_device
    from conversation.models.gguf import TYPES, MergedWeights
    from conversation.models.llama_cpp import library
    from conversation.models.merged_model import MANIFEST, load_verified
    from conversation.models.tokenizer import restates

    library()
    weights = MergedWeights(folder)
    files = record.merge.files if record and record.merge else manifest_files(folder / MANIFEST)
    name = f"conversation-{record.started[:10]}" if record else "conversation"
    earlier = read_export(output / "export.json")
    done = earlier if earlier and earlier.model_files == files else Export(folder.name, files, ())
    types = [kind for kind in args.type if not (args.resume and is_exported(done, kind, output))]
    if not types:
        print("Exported already.")
        return 0
    say_what_it_takes(types, {kind: weights.file_bytes(TYPES[kind]) for kind in types}, output)
    print(f"Device: {use_device(args.device)}; llama.cpp computes on the CPU", flush=True)
    model, tokenizer = load_verified(folder, record.base_model.tokenizer_fingerprint if record else None)
    exporter = Exporter(
        folder,
        model,
        tokenizer,
        run.final_lora if run else None,
        read_questions(HELD_OUT_QUESTIONS),
        read_jsonl(run.training_data)[:COMPARED_EXAMPLES] if run else [],
        record.structural_tests.passed_tests if record and record.structural_tests else len(THREE_CASES),
        args.force,
    )
    make_folder(output, "name another with --output")
    remove_leftovers(output)
    write_atomically(output / "conversation.gbnf", gbnf(tokenizer.get_vocab(), restates(tokenizer)).encode())
    parameters = sum(math.prod(shape) for shape in weights.shapes.values())
    run_name = run.path.name if run and not run.is_attempt else None  # an attempt will be called otherwise
    metadata = metadata_of(record, run_name, files, parameters, tokenizer)
    failed: list[UserError] = []
    for kind in types:
        print(f"\n{name}-{kind}.gguf", flush=True)
        try:
            found = exporter.export(TYPES[kind], output / f"{name}-{kind}.gguf", metadata)
        except UserError as error:
            print(f"refused: {error}")
            failed.append(UserError(f"{kind}: {error}", error.hint))
            continue
        done = done.with_file(found)
        write_export(done, output / "export.json")
        write_atomically(
            output / "Modelfile", modelfile(file_for_ollama(done, found, output), restates(tokenizer)).encode()
        )
        print(f"Exported: {shown(output / found.file)}, {found}", flush=True)
    if failed:
        raise UserError("\n".join(map(str, failed)), failed[0].hint, TRIED_AND_FAILED)
    return 0


def file_for_ollama(export: Export, newest: ExportedFile, output: Path) -> str:
    """The name of the best file that is there and was not forced, as our server takes it; else of the newest one."""
    there = [each.file for each in export.best_first() if (output / each.file).is_file()]
    return there[0] if there else newest.file


def manifest_files(path: Path) -> dict[str, str]:
    """The files that a merged folder's manifest lists; `load_verified` checks them."""
    if not path.exists():
        raise UserError(f"{path.parent} is not a merged model", "merge_conversation_model.py makes one")
    return dict(read_json(path).get("files") or {})


def is_exported(export: Export, kind: str, output: Path) -> bool:
    """Whether a file of this type was exported from this model, and is intact."""
    file = next((each for each in export.files if each.type == kind), None)
    path = output / file.file if file else None
    return bool(file and path and path.is_file() and sha256_file(path) == file.sha256)


def say_what_it_takes(types: list[str], sizes: dict[str, int], output: Path) -> None:
    """Say how much disk space and time it takes. Raises UserError when the disk has not that much."""
    questions = len(THREE_CASES) + len(read_questions(HELD_OUT_QUESTIONS))
    seconds = sum(20 + questions * TOKENS * MILLISECONDS[kind] / 1000 for kind in types)
    parts = ", ".join(f"{kind} {size(sizes[kind])}" for kind in types)
    print(
        f"Needs {size(sum(sizes.values()))} of disk ({parts}) and about {seconds / 60:.0f} minutes on a quiet machine.",
        flush=True,
    )
    check_disk_space(output, sum(sizes.values()), "the export")


def metadata_of(
    record: RunRecord | None,
    run_name: str | None,
    files: dict[str, str],
    parameters: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, str]:
    """What a file says about its origin: licence, base, run, fingerprint; and whether it restates questions."""
    from conversation.answering.vocabulary import FINGERPRINT_KEY, RESTATES_KEY
    from conversation.models.tokenizer import fingerprint, restates

    found = {
        "general.name": "Conversation model",
        "general.description": "Answers a question in short texts, and predicts three follow-up questions.",
        "general.license": "gemma",
        "general.license.name": "Gemma Terms of Use",
        "general.license.link": "https://ai.google.dev/gemma/terms",
        "general.size_label": f"{parameters / 1e6:.0f}M",
        FINGERPRINT_KEY: fingerprint(tokenizer),
        RESTATES_KEY: str(restates(tokenizer)).lower(),
    }
    found |= {f"conversation.sha256.{name}": digest for name, digest in files.items() if name.endswith(".safetensors")}
    if record:
        found |= {
            "general.base_model.0.name": record.base_model.name,
            "conversation.base_weights_sha256": record.base_model.weights_sha256,
            "conversation.run": run_name or record.started,
            "conversation.training_data_sha256": record.data.training_sha256,
            "conversation.git_commit": ", ".join(record.commits),
        }
    return found


if __name__ == "__main__":
    run_main(main, hint=GO_ON)
