#!/usr/bin/env python3
"""LoRA-train a base model on conversation trees, in FP32.

    train_conversation.py --check_data                  validate data and tokenizer, print statistics, train nothing
    train_conversation.py                               the default recipe on FunctionGemma
    train_conversation.py --demo                        the short recipe on the embedded stand-in
    train_conversation.py --resume                      go on with the newest run, where it stopped
    accelerate launch --num_processes 2 train_conversation.py --gradient_accumulation_steps 4

Leaves in the run folder: training_data.jsonl and held_out_data.jsonl (what was trained on, what was not), checkpoints/
with final_lora/, run.json, metrics.jsonl, loss_curve.png, report.md, console.log.
Exit status: 0 trained; 1 tried and failed; 2 not started; 130 or 143 stopped by Ctrl-C or SIGTERM, with a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversation.console import console_kept
from conversation.data_quality import assess
from conversation.errors import CommandLine, UserError, list_problems, run_main
from conversation.examples import length_summary, read_training_data, split_by_tree, statistics_of, to_jsonl
from conversation.files import check_room, differing_file, sha256_file, shown, write_atomically
from conversation.function_calls import Example
from conversation.machine import environment
from conversation.publishing import bytes_of_attempts, keep_flags
from conversation.runs import RunFolder, hold, new_run_folder, newest_run, now, refuse_published
from conversation.trees import read_trees
from conversation_config import PROJECT, TrainingConfig, add_training_flags, quiet_libraries, training_config

if TYPE_CHECKING:
    from conversation.tokenizer import Audit, EncodedExample

IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # set by accelerate launch
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
HARMLESS_CHANGES = ("logging_steps", "save_steps")


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs, read and checked."""

    config: TrainingConfig
    base_folder: Path
    training: list[Example]
    held_out: list[Example]
    encoded_training: list[EncodedExample]
    encoded_held_out: list[EncodedExample]
    audit: Audit


def main() -> int:
    parser = CommandLine(__doc__)
    add_training_flags(parser)
    parser.add_argument(
        "--run_dir", type=Path, help="the run folder (default: a new one of today; with --resume: the newest)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest intact checkpoint of the run")
    parser.add_argument("--check_data", action="store_true", help="validate, print statistics, train nothing")
    parser.add_argument("--json", action="store_true", help="with --check_data: print one JSON object")
    parser.add_argument(
        "--check_room", action="store_true", help="with --check_data: the disk's room, too, once RETRAIN.sh has cleaned"
    )
    for dtype in ("fp16", "bf16"):
        parser.add_argument(f"--{dtype}", action="store_true", help="refused: this toolkit trains in FP32")
    args = parser.parse_args()
    refuse_half_precision(args)
    for name in ("json", "check_room"):
        if getattr(args, name) and not args.check_data:
            raise UserError(f"--{name} goes with --check_data")

    quiet_libraries()
    if args.check_data:
        prepared = prepare(settings(args, {}))
        print_statistics(prepared, as_json=args.json)
        if args.check_room:
            check_disk(new_run_folder(), prepared, bytes_of_attempts())
        return 0

    newest = newest_run() if args.resume and not args.run_dir else new_run_folder()
    run = RunFolder((args.run_dir or newest.path).resolve())
    recorded = recorded_run(run) if args.resume else {}
    refuse_published(run, recorded)
    check_run_folder(run, bool(recorded))
    with contextlib.ExitStack() as stack:
        begun = args.resume or run.retrain_flags.exists()
        if begun and IS_MAIN_PROCESS:  # from here on its log keeps every error
            stack.enter_context(hold(run.path))
            stack.enter_context(console_kept(run))
        prepared = prepare(settings(args, recorded))
        if not recorded:
            check_disk(run, prepared)
        if not begun and IS_MAIN_PROCESS:
            stack.enter_context(hold(run.path))
            stack.enter_context(console_kept(run))
        try:
            return train_in(run, prepared, recorded)
        except UserError:
            if not begun and IS_MAIN_PROCESS and not run.run_json.exists():
                shutil.rmtree(run.path)  # refused before the first record: nothing stays
            raise


def recorded_run(run: RunFolder) -> dict[str, Any]:
    """What is known of the run that is resumed; nothing, when it was stopped before its first record."""
    if not run.run_json.exists() and run.console_log.exists():
        print(f"Nothing is recorded in {shown(run.path)} yet: starting from the first step, with the flags given.")
        return {}
    return run.read()


def refuse_half_precision(args: argparse.Namespace) -> None:
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by accelerate launch
    if precision != "no":
        raise UserError(f"mixed precision ({precision}) is refused", "train in FP32: --mixed_precision no")
    if args.fp16:
        raise UserError("FP16 is refused: Gemma 3's activations leave its range and turn to NaN", "train in FP32")
    if args.bf16:
        raise UserError("BF16 is refused: Turing cards have none, and a merged FP32 model needs FP32 adapters")


def settings(args: argparse.Namespace, recorded: dict[str, Any]) -> TrainingConfig:
    """The settings from the flags; with --resume those of the run, changed by the flags given."""
    for name in ("base_model", "training_data"):
        if hasattr(args, name):
            setattr(args, name, path_from_anywhere(getattr(args, name)))
    try:
        config = training_config(args)
        if not recorded:
            return config
        names = {spec.name for spec in dataclasses.fields(TrainingConfig)}
        given = {name: getattr(args, name) for name in names if hasattr(args, name)}
        return TrainingConfig(**{**recorded["config"], **given})
    except ValueError as error:
        raise UserError(str(error)) from None
    except (KeyError, TypeError):
        raise UserError("the run's run.json does not hold its settings: it is broken") from None


def path_from_anywhere(name: str) -> str:
    """A path in the working folder, absolute unless that is the project's, so that it is found from elsewhere, too."""
    path = Path(os.path.expanduser(name))
    return str(path.resolve()) if path.exists() and Path.cwd() != PROJECT else name


def data_path(config: TrainingConfig) -> Path:
    """Where the training data is: relative to the working folder or, if there is nothing, to the project."""
    path = Path(os.path.expanduser(config.training_data))
    return PROJECT / path if not path.exists() and (PROJECT / path).exists() else path


def prepare(config: TrainingConfig) -> Prepared:
    """Read and check base model, data and tokenizer. Raises UserError; changes nothing on disk but the model cache."""
    examples = read_training_data(data_path(config), config.domain_names)

    from conversation import base_models, tokenizer

    base_folder = base_models.find_base_model(config.base_model)
    _, encoded, audit = tokenizer.audit(base_folder, examples)
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
    training, held_out = split_by_tree(examples, config.held_out_share)
    by_text = dict(zip((example.text for example in examples), encoded, strict=True))
    return Prepared(
        config,
        base_folder,
        training,
        held_out,
        [by_text[example.text] for example in training],
        [by_text[example.text] for example in held_out],
        audit,
    )


def data_statistics(prepared: Prepared) -> dict[str, Any]:
    """What is in the data: structure, token lengths, share of label tokens, split, tokenizer."""
    encoded = prepared.encoded_training + prepared.encoded_held_out
    tokens = sum(len(ids) for ids in encoded)
    on_all = prepared.config.loss_on == "all"
    labels = sum(len(ids) - 1 if on_all else ids.num_answer_tokens for ids in encoded)
    return {
        **statistics_of(prepared.training + prepared.held_out),
        "training_examples": len(prepared.training),
        "held_out_examples": len(prepared.held_out),
        "token_lengths": length_summary([len(ids) for ids in encoded]),
        "answer_token_lengths": length_summary([ids.num_answer_tokens for ids in encoded]),
        "label_token_share": round(labels / tokens, 4),
        "longer_than_maximum": 0,  # prepare() raises otherwise
        "maximum_length": prepared.config.max_length,
        "tokenizer_fingerprint": prepared.audit.fingerprint,
        "examples_changed_by_fix_mistral_regex": prepared.audit.changed_by_flag,
        "first_change_by_fix_mistral_regex": prepared.audit.first_change or None,
    }


def print_statistics(prepared: Prepared, as_json: bool) -> None:
    found = data_statistics(prepared)
    path = data_path(prepared.config)
    whole_trees = path.is_dir() and not prepared.config.domain_names
    quality = assess(read_trees(path)) if whole_trees else None
    if as_json:
        print(json.dumps({**found, "quality": quality and quality.as_dict()}, ensure_ascii=False))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {item}" for key, item in value.items())
        print(f"{name.replace('_', ' '):40} {value}")
    if quality:
        print(quality)
    print("The data and the tokenizer are fit for training.")


def check_run_folder(run: RunFolder, resume: bool) -> None:
    """Refuse to start a run in a folder that holds anything but what a run leaves before its first record."""
    if resume or not run.path.exists() or not IS_MAIN_PROCESS:
        return
    files = (run.console_log, run.training_data, run.held_out_data, run.retrain_flags)
    ours = {".lock", *(path.name for path in files)}
    if run.run_json.exists():
        raise UserError(f"{shown(run.path)} holds a run already", "go on with it: --resume; or name another --run_dir")
    if others := [
        path.name for path in run.path.iterdir() if path.name not in ours and not path.name.endswith(".part")
    ]:
        raise UserError(f"{shown(run.path)} is not empty: it holds {others[0]}", "name a new folder with --run_dir")


def check_disk(run: RunFolder, prepared: Prepared, to_be_freed: int = 0) -> None:
    """Raises UserError when the disk has no room for what training leaves, and the merged model after it.

    `to_be_freed`: bytes that will be removed from that disk before.
    """
    from conversation import base_models, training

    adapters = base_models.adapter_bytes(prepared.base_folder, prepared.config.lora_r)
    checkpoint = 3 * adapters + 100_000  # weights and AdamW's two moments; the rest is small
    merged = base_models.fp32_bytes(prepared.base_folder)
    needed = (training.KEPT_CHECKPOINTS + 1) * checkpoint + adapters + merged
    check_room(run.path, needed - to_be_freed, "training and the merged model after it")


def steps_of(config: dict[str, Any], examples: int) -> int:
    """Optimizer steps of a training, as the Trainer counts them."""
    if config["max_steps"] > 0:
        return config["max_steps"]
    per_step = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * PROCESSES
    return math.ceil(config["num_train_epochs"] * math.ceil(examples / per_step))


def mismatches(recorded: dict[str, Any], current: dict[str, Any], examples: int) -> list[str]:
    """Each difference between a run and what it would be resumed with that would make it another run."""
    found = []
    length = ("num_train_epochs", "max_steps")
    for name, value in current["config"].items():
        before = recorded["config"].get(name)
        if before != value and name in HARMLESS_CHANGES:
            print(f"--{name} is now {value}, was {before}: harmless, the run goes on")
        elif before != value and name not in length:
            found.append(f"--{name}: the run has {before}, now {value}")
    if any(recorded["config"].get(name) != current["config"][name] for name in length):
        before, steps = (steps_of(record["config"], examples) for record in (recorded, current))
        if steps < before:
            found.append(f"the run is {before} steps long, now {steps}: it can be made longer, not shorter")
        elif steps > before:
            print(f"The run is now {steps} steps long, was {before}: harmless, it goes on.")
    if (before := recorded.get("processes", 1)) != current["processes"]:
        found.append(f"processes: the run has {before}, now {current['processes']}")
    for section, key, what in (
        ("data", "training_sha256", "the training data"),
        ("data", "held_out_sha256", "the held-out data"),
        ("base_model", "weights_sha256", "the base model's weights"),
        ("base_model", "config_sha256", "the base model's config.json"),
        ("tokenizer", "fingerprint", "the tokenizer"),
        ("tokenizer", "file_sha256", "the file tokenizer.json"),
    ):
        before, value = recorded.get(section, {}).get(key), current[section][key]
        if before != value:
            found.append(f"{what}: the run has {str(before)[:12]}, now {value[:12]}")
    return found


def command(before: list[str]) -> list[str]:
    """The command that repeats the run: that of its beginning, and what it was resumed with."""
    launcher = ["torchrun", "--nproc_per_node", str(PROCESSES)] if PROCESSES > 1 else []
    now = [*launcher, Path(sys.argv[0]).name, *given_flags()]
    return now if before in (now, []) or now[: len(before)] == before else [*before, *given_flags()]


def this_start(checkpoint: Path | None, git_commit: str | None) -> dict[str, Any]:
    """For run.json: when this process began to train, after which step of the run, and with which code."""
    after = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    return {"time": now(), "after_step": after, "git_commit": git_commit}


def given_flags() -> list[str]:
    """The flags of this command but those that say where the run is."""
    flags = [flag for flag in sys.argv[1:] if flag != "--resume"]
    if "--run_dir" in flags:
        place = flags.index("--run_dir")
        del flags[place : place + 2]
    return [flag for flag in flags if not flag.startswith("--run_dir=")]


def train_in(run: RunFolder, prepared: Prepared, recorded: dict[str, Any]) -> int:
    """Train in a run folder that this process holds."""
    import hashlib

    from conversation import base_models, reporting, training

    config = prepared.config
    training_data, held_out_data = to_jsonl(prepared.training), to_jsonl(prepared.held_out)
    record = {
        "started": recorded.get("started") or now(),
        "command": command(recorded.get("command", [])),
        "config": config.as_dict(),
        "data": {
            "source": config.training_data,
            "training_sha256": hashlib.sha256(training_data).hexdigest(),
            "held_out_sha256": hashlib.sha256(held_out_data).hexdigest(),
            "statistics": data_statistics(prepared),
        },
        "base_model": {
            "name": config.base_model,
            "weights_sha256": base_models.weights_hash(prepared.base_folder),
            "config_sha256": sha256_file(prepared.base_folder / "config.json"),
        },
        "tokenizer": {
            "fingerprint": prepared.audit.fingerprint,
            "file_sha256": sha256_file(prepared.base_folder / "tokenizer.json"),
        },
        "processes": PROCESSES,
        **environment(),
    }
    checkpoint = None
    if recorded:
        if problems := mismatches(recorded, record, len(prepared.training)):
            raise UserError(
                f"the run cannot be resumed with other settings:\n{list_problems(problems)}",
                "repeat the flags of the run, or start a new one without --resume",
            )
        if done := recorded.get("training"):
            problem = differing_file(run.final_lora, done["adapter_files"])
            problem = problem or differing_file(run.path, done.get("files", {}))
            if problem is None and done["steps"] >= steps_of(record["config"], len(prepared.training)):
                print("The training is done already.")
                if IS_MAIN_PROCESS:
                    reporting.write_report(run)  # it may have been stopped between record and report
                return 0
            if problem:
                print(f"warning: the training goes on from a checkpoint: {problem}", file=sys.stderr)
        checkpoint, problems = training.newest_intact_checkpoint(run.checkpoints)
        for problem in problems:
            print(f"warning: a checkpoint is not used: {problem}", file=sys.stderr)
        if IS_MAIN_PROCESS:
            training.drop_newer_checkpoints(run.checkpoints, checkpoint)
        print(
            f"Resuming from {checkpoint.name}." if checkpoint else "No intact checkpoint: starting from the first step."
        )
    model = training.trainable(base_models.load_model(prepared.base_folder), config)
    if IS_MAIN_PROCESS:
        write_atomically(run.training_data, training_data)
        write_atomically(run.held_out_data, held_out_data)
        if run.retrain_flags.exists():
            keep_flags(run, given_flags())
        starts = [*recorded.get("starts", []), this_start(checkpoint, record["git_commit"])]
        # what an earlier end left in the last three is over
        run.update(**record, starts=starts, training=None, merge=None, structural_tests=None)
        print(f"Run folder: {shown(run.path)}")
        print(f"{len(prepared.training)} examples to train on, {len(prepared.held_out)} held out; {prepared.audit}")

    data = training.TrainingSet(
        [training.token_sequence(ids, config.loss_on) for ids in prepared.encoded_training],
        [training.token_sequence(ids, config.loss_on) for ids in prepared.encoded_held_out],
        [example.prompt.question for example in prepared.training],
    )
    result = training.train(model, data, config, run, checkpoint)
    if IS_MAIN_PROCESS:
        files = {path.name: sha256_file(path) for path in (run.metrics, run.training_data, run.held_out_data)}
        run.update(training={**dataclasses.asdict(result), "files": files, "finished": now()})
        reporting.write_report(run)
        print(
            f"Trained {result.steps} steps in {result.seconds / 60:.1f} minutes: loss {result.first_window_loss:.3f} "
            f"in the first window, {result.last_window_loss:.3f} in the last"
            + (f", {result.held_out_loss:.3f} held out." if result.held_out_loss is not None else ".")
        )
    return 0


if __name__ == "__main__":
    run_main(main)
