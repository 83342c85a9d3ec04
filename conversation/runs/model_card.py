"""The README.md of a merged model and of adapters, with the YAML head that the hub reads, from the files of a run."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from conversation.errors import UserError
from conversation.runs.evaluation_record import read_evaluation
from conversation.runs.files import write_atomically
from conversation.runs.folder import RunFolder
from conversation.runs.record import RunRecord
from conversation_config import DATA_SETS, PROJECT, STAND_IN

CARD = "README.md"
EVALUATED = {"valid": "accuracy", "right_of_five": "accuracy", "answer_relevance": "cosine_similarity"}
"""The figures of an evaluation that a card tells, and the hub's types of them."""
STAND_IN_ORIGIN = "google/gemma-3-270m"  # on the hub; the stand-in is a 4-bit quantization of it
_OF_A_FILE = re.compile(r"\.(jsonl?|txt|csv|parquet|gz|zip|gguf|safetensors)$", re.IGNORECASE)
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"


def write_model_cards(run: RunFolder) -> None:
    """Write README.md into the run's adapters and into its merged model, as far as they are there."""
    record = run.read()
    if record.training and run.final_lora.is_dir() and CARD not in record.training.adapter_files:
        _write(run.final_lora, model_card(run, record, "adapter"))
    if record.merge and run.merged_model.is_dir() and CARD not in record.merge.files:
        _write(run.merged_model, model_card(run, record, "finetune"))


def _write(folder: Path, text: str) -> None:
    path = folder / CARD
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text.encode())


def model_card(run: RunFolder, record: RunRecord, relation: str) -> str:
    """A model card: YAML for the hub, and text for people. `relation` to the base: "adapter" or "finetune"."""
    from huggingface_hub import EvalResult, ModelCardData

    base = hub_name(record.config.base_model)
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Conversation by function calls",
            dataset_type=re.sub(r"\W+", "-", name),  # the hub groups by it
            dataset_name=name,
            metric_type=kind,
            metric_name=metric,
            metric_value=value,
        )
        for name, kind, metric, value in _metrics(run, record)
    ]
    more: dict[str, Any] = {"base_model_relation": relation} if base else {}
    if "gemma" in record.config.base_model.lower():
        more |= {"license": "gemma", "license_link": GEMMA_TERMS}
    head = ModelCardData(
        base_model=base,
        datasets=hub_name(record.data.source),
        eval_results=results or None,
        library_name="peft" if relation == "adapter" else "transformers",
        model_name=_title(record),
        pipeline_tag="text-generation",
        tags=["conversation", "function-calling", "lora", "text-generation"],
        **more,
    )
    return f"---\n{head.to_yaml().strip()}\n---\n\n{_body(run, record, relation)}"


def hub_name(name: str) -> str | None:
    """A model's or data set's name on the hub; None for what is on this machine only."""
    if name == STAND_IN:
        return STAND_IN_ORIGIN
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@[\w./-]+)?(:\S+)?", name)
    if not found or _OF_A_FILE.search(found[1]):
        return None
    # A name relative to the project is what a run has that was started there; its report may be written elsewhere.
    return None if any((root / found[1]).exists() for root in (Path.cwd(), PROJECT)) else found[1]


def _title(record: RunRecord) -> str:
    return f"{Path(record.config.base_model).name} for conversations by function calls"


def _metrics(run: RunFolder, record: RunRecord) -> list[tuple[str, str, str, float]]:
    """The figures of a run: (what it was measured on, type and name of the metric, value)."""
    found: list[tuple[str, str, str, float]] = []
    if (training := record.training) and training.held_out_loss is not None:
        name = "held-out trees"
        found.append((name, "loss", "cross entropy per label token, nats", round(training.held_out_loss, 4)))
    if tests := record.structural_tests:
        found.append(("structural tests", "accuracy", "passed, share of 3", round(tests.passed_tests / 3, 4)))
        if asked := tests.held_out_questions:
            name = "held-out questions"
            found.append((name, "accuracy", "valid answers", round(tests.held_out_valid / asked, 4)))
            found.append((name, "accuracy", "three distinct follow-ups", round(tests.held_out_distinct / asked, 4)))
    evaluation = None
    with contextlib.suppress(UserError):  # a broken one: the report names it
        evaluation = read_evaluation(run.evaluation)
    for name, figures in (evaluation.sets if evaluation else {}).items():
        how = "" if evaluation is None or evaluation.how == "greedy" else f" ({evaluation.how})"
        for metric, kind in EVALUATED.items():
            if (value := getattr(figures, metric)) is not None:
                found.append((f"evaluation questions, {name}{how}", kind, metric.replace("_", " "), round(value, 4)))
    return found


def _body(run: RunFolder, record: RunRecord, relation: str) -> str:
    config, training, examples = record.config, record.training, record.data.statistics.training_examples
    source = Path(record.data.source).name if record.data.source not in DATA_SETS else record.data.source
    base = hub_name(config.base_model) or Path(config.base_model).name
    what = "LoRA adapters for" if relation == "adapter" else "LoRA adapters merged into"
    rows = [f"| {name} | {metric} | {value:g} |" for name, _, metric, value in _metrics(run, record)]
    used = (
        "Load them onto that base with peft. The base needs the tokenizer and the control tokens of the training; the\n"
        "merged model has both."
        if relation == "adapter"
        else "It needs only transformers and torch. `apply_chat_template` with the tools `add_text` and `add_choice`\n"
        "gives the prompt of the training; `sanitize_control_tokens=True` is for text that others typed.\n"
        "`tokenizer.parse_response` reads the answer; `transformers serve` returns it as OpenAI tool calls."
    )
    own_terms = f"Gemma's terms of use apply: {GEMMA_TERMS}." if "gemma" in config.base_model.lower() else ""
    licence = own_terms or "The base model's licence applies to its weights, these included."
    steps = f"{training.steps} steps of {config.examples_per_step * record.processes} examples" if training else ""
    return "\n".join(
        [
            f"# {_title(record)}",
            "",
            f"{what} {base}. It answers a question by function calls: one to four short fragments (`add_text`), then",
            "three follow-up questions with confidence and target (`add_choice`).",
            *(["Before them it writes the question out in full (`restate`)."] if config.reasoning == "restate" else []),
            "",
            "## Use",
            "",
            used,
            "",
            "## Measured",
            "",
            *(["| on | what | value |", "|---|---|---|", *rows] if rows else ["Nothing yet."]),
            "",
            "What it says can be wrong. The figures count form and likeness to the data, not truth.",
            "",
            "## Training",
            "",
            f"- {steps}, {examples} examples of `{source}` (SHA-256 {record.data.training_sha256[:16]})",
            f"- LoRA rank {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout}; learning rate "
            f"{config.learning_rate:g} at its peak, {config.lr_scheduler_type}; FP32 arithmetic",
            f"- base weights SHA-256 {record.base_model.weights_sha256[:16]}; "
            + ", ".join(f"{name} {version}" for name, version in record.environment.versions.items()),
            "",
            "## Licence",
            "",
            licence,
            "",
        ]
    )
