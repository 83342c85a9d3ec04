"""Every path, name and hyperparameter, once.

Precedence: a flag on the command line, then the recipe that `--recipe` names, then the defaults below. With `--resume`
the settings of the run take the place of the defaults, unless `--recipe original` asks for these. What a run really
used is in its `run.json`. Importing this module is cheap: no torch, no transformers.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from conversation.environment import home_folder
from conversation.errors import UserError

PROJECT = Path(__file__).resolve().parent
TRAINING_RUNS = PROJECT / "training-runs" / "conversation"
CONVERSATIONS = PROJECT / "training-runs" / "conversations"  # of the page; its server keeps them
OWN_TREES = PROJECT / "training-runs" / "own_trees"  # training trees made from them, for --training_data
HELD_OUT_QUESTIONS = PROJECT / "data" / "held_out_questions.jsonl"
EVALUATION_QUESTIONS = tuple(PROJECT / "data" / "evaluation" / f"{name}.jsonl" for name in ("known", "unseen"))
CORE_TREES, EXPERT_TREES = PROJECT / "data" / "core_trees", PROJECT / "data" / "conversation_trees"
STARTER_TOPICS, SELECTED_TOPICS = (PROJECT / "data" / f"{name}_topics.txt" for name in ("starter", "selected"))
"""Lists of core topics: <domain>/<topic>, a line each."""
DATA_SETS = {
    "core": (CORE_TREES,),
    "expert": (EXPERT_TREES,),
    "both": (CORE_TREES, EXPERT_TREES),
    "selected": (SELECTED_TOPICS,),
    "starter": (STARTER_TOPICS,),
}
"""The project's own training data, by the names that --training_data takes. What each is for: data/README.md."""

FUNCTION_GEMMA = "google/functiongemma-270m-it"
STAND_IN = "gemma-3-270m"

ANSWERS = ("all", "first")
REASONING = ("none", "restate")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEPT_CHECKPOINTS = 3
MAX_EPOCHS = 100_000
POLYNOMIAL_END = 1e-7  # where the polynomial schedule of transformers ends
MAX_NEW_TOKENS = 300  # an answer of 4 + 3 calls takes about 200 tokens


EXPORT_TYPES = ("f32", "f16", "q8_0", "q5_1", "q4_k_m")
"""The types of GGUF files, by llama.cpp's names in small letters; the smaller, the later."""


def setting(default: Any, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of one training run; each field is a flag of `train_conversation.py`."""

    base_model: str = setting(
        FUNCTION_GEMMA,
        f"hub name, local folder, GGUF file, or {STAND_IN} for the embedded stand-in; a base that lacks the control "
        "tokens is copied with them into the model cache (by hand: python -m conversation.models.new_tokens MODEL "
        "NEW_FOLDER)",
    )
    training_data: str = setting(
        "expert",
        f"one of the project's own sets ({', '.join(DATA_SETS)}), a folder of conversation trees, a JSONL or Parquet "
        "file, or a data set of the hub as owner/name:split",
    )
    domains: str = setting("", "train on these domains of the trees only, separated by commas; none: on all")
    answers: str = setting(
        "all",
        "the wordings of a tree's answers that are learnt: all, in turn; first: every question gets the first one, "
        "which is then seen more often",
        choices=ANSWERS,
    )
    reasoning: str = setting(
        "none",
        "what an answer begins with; restate: the question written out in full, in a call of its own",
        choices=REASONING,
    )
    loss_on: str = setting("completion", "tokens that the loss counts", choices=("completion", "all"))
    step: str = setting(
        "auto",
        "how a step computes the loss: shared prefixes once, or as TRL does; auto: shared if the base model allows it",
        choices=("auto", "shared", "plain"),
    )
    held_out_share: float = setting(0.1, "share of the examples, by whole trees, kept for the held-out loss")

    num_train_epochs: float = setting(7.0, "passes over the training data")
    max_steps: int = setting(-1, "stop after this many optimizer steps (-1: as num_train_epochs says)")
    learning_rate: float = setting(1e-5, "peak learning rate of AdamW")
    lr_scheduler_type: str = setting(
        "cosine",
        "course of the learning rate after the warm-up",
        choices=("cosine", "linear", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    )
    warmup_steps: int = setting(50, "steps over which the learning rate rises from 0")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "the gradient is scaled down to this norm when it is longer (0: never)")
    per_device_train_batch_size: int = setting(1, "examples per device and accumulation step")
    gradient_accumulation_steps: int = setting(8, "accumulation steps per optimizer step")
    max_length: int = setting(2048, "longest example in tokens; a longer one is an error, never cut")

    frozen_weights: str = setting(
        "auto",
        "how the base's weights are held: bfloat16, which takes half the memory and is refused where it would change "
        "a weight, or float32; auto: bfloat16 when FP32 copies would not fit. Arithmetic is FP32",
        choices=("auto", "float32", "bfloat16"),
    )
    lora_r: int = setting(16, "rank of the adapters")
    lora_alpha: int = setting(32, "the adapters' output is scaled by alpha / rank")
    lora_dropout: float = setting(0.05, "dropout on the adapters' input")

    logging_steps: int = setting(5, "the logged loss is the mean over a window of this many steps")
    save_steps: int = setting(50, "steps between checkpoints; the newest 3 are kept")
    report_to: str = setting(
        "none",
        "trackers that get the metrics, by transformers' names, with commas: tensorboard, wandb, trackio, ...",
    )
    seed: int = setting(42, "seed of adapters, order of the data and dropout")

    def __post_init__(self) -> None:
        """Raises ValueError that lists every setting that cannot be right."""
        problems = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"--{spec.name} must be finite, not {value}")
            elif isinstance(value, int) and value >= 2**32:
                problems.append(f"--{spec.name} must be less than 2^32, not {value}")
        for name in ("learning_rate", "max_length", "lora_r", "lora_alpha", "logging_steps", "save_steps"):
            if not getattr(self, name) > 0:
                problems.append(f"--{name} must be greater than 0, not {getattr(self, name)}")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                problems.append(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed"):
            if not getattr(self, name) >= 0:
                problems.append(f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("held_out_share", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"--{name} must be at least 0 and less than 1, not {getattr(self, name)}")
        if self.max_steps != -1 and self.max_steps < 1:
            problems.append(f"--max_steps must be at least 1, or -1, not {self.max_steps}")
        if not 0 < self.num_train_epochs <= MAX_EPOCHS:
            problems.append(
                f"--num_train_epochs must be greater than 0 and at most {MAX_EPOCHS}, not {self.num_train_epochs}"
            )
        if self.domains and not self.domain_names:
            problems.append(f"--domains names no domain: {self.domains!r}")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            problems.append(
                f"--lr_scheduler_type polynomial ends at {POLYNOMIAL_END}: --learning_rate must be greater, "
                f"not {self.learning_rate}"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def domain_names(self) -> tuple[str, ...]:
        return names_in(self.domains)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `report_to`; none of them for "none"."""
        return tuple(name for name in names_in(self.report_to) if name != "none")

    @property
    def examples_per_step(self) -> int:
        """Examples per optimizer step and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def steps(self, examples: int, processes: int = 1) -> int:
        """Optimizer steps of a training on so many examples, as transformers' Trainer counts them."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * math.ceil(examples / (self.examples_per_step * processes)))


RECIPES: dict[str, dict[str, Any]] = {
    "original": {},
    "demo": {
        "base_model": STAND_IN,
        "training_data": "starter",  # 60 topics; the evaluation asks about 50 of them
        "answers": "first",  # a root's is seen 8 times, a child's 4; several would each be half learnt
        "reasoning": "restate",  # new words for a known question then lead to what was learnt
        "max_steps": 300,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "lora_dropout": 0.0,  # few passes: it would cost time and prevent nothing
        "held_out_share": 0.02,
    },
    "tuned": {
        "training_data": "selected",  # 300 topics, the starter topics among them
        "num_train_epochs": 3.0,
        "learning_rate": 1e-3,
        "warmup_steps": 30,
        "lora_dropout": 0.0,
        "held_out_share": 0.02,
    },
}
"""Named sets of settings. `original`: the defaults. `demo`: a short recipe that teaches the stand-in the format and 60
topics, on two CPU cores. `tuned`: 300 topics, 3.5 hours there. What was tried, and gave what: benchmarks/recipes.md."""


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of TrainingConfig, with its help and default, `--recipe` and `--demo`."""
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--recipe", choices=tuple(RECIPES), help="a named set of settings (default: original)")
    recipe.add_argument(
        "--demo", action="store_const", const="demo", dest="recipe", help=f"--recipe demo: {RECIPES['demo']}"
    )
    for spec in fields(TrainingConfig):
        kind = type(spec.default)
        parser.add_argument(
            f"--{spec.name}",
            type=kind,
            default=argparse.SUPPRESS,
            choices=spec.metadata.get("choices"),
            metavar=None if spec.metadata.get("choices") else kind.__name__.upper(),
            help=f"{spec.metadata['help']} (default: {spec.default if spec.default != '' else 'none'})",
        )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """`--device`, of every script that computes. It is no setting of a run: a run may go on elsewhere."""
    help_text = "where to compute (default: a card if there is one, else the CPU)"
    parser.add_argument("--device", choices=("cpu", "cuda"), help=help_text)


def resolve_settings(args: argparse.Namespace, recorded: TrainingConfig | None = None) -> TrainingConfig:
    """The settings that parsed flags ask for; `recorded`: those of the run that is resumed. Raises UserError."""
    start = TrainingConfig() if args.recipe == "original" else recorded or TrainingConfig()
    given = {spec.name: getattr(args, spec.name) for spec in fields(TrainingConfig) if hasattr(args, spec.name)}
    for name in ("base_model", "training_data"):
        if name in given:
            given[name] = path_from_anywhere(given[name])
    try:
        return replace(start, **{**RECIPES[args.recipe or "original"], **given})
    except ValueError as error:
        raise UserError(str(error)) from None


def flags_of(config: TrainingConfig) -> list[str]:
    """The flags that give these settings: the fewest, whichever recipe that takes."""
    found = []
    for name, recipe in RECIPES.items():
        start = TrainingConfig(**recipe)
        flags = [] if not recipe else ["--demo"] if name == "demo" else ["--recipe", name]
        for spec in fields(TrainingConfig):
            if (value := getattr(config, spec.name)) != getattr(start, spec.name):
                dashed = isinstance(value, str) and value.startswith("-")  # would be taken for a flag
                flags += [f"--{spec.name}={value}"] if dashed else [f"--{spec.name}", str(value)]
        found.append(flags)
    return min(found, key=len)


def names_in(text: str) -> tuple[str, ...]:
    """The names in a list with commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def path_from_anywhere(name: str) -> str:
    """A path in the working folder, absolute unless that is the project's, so that it is found from elsewhere, too."""
    if found := folder_and_rest(name):
        return f"{path_from_anywhere(found[0])}:{found[1]}"
    path = Path(os.path.expanduser(name))
    named = name in (*DATA_SETS, STAND_IN)
    if not path.exists() or Path.cwd() == PROJECT or named:
        return name
    return str(path.resolve() if path.resolve().exists() else path.absolute())  # what a pipe's link names is no path


def folder_and_rest(name: str) -> tuple[str, str] | None:
    """A data set's folder and what stands after its colon, as in `folder:train[:10%]`; None for any other name."""
    for i, character in enumerate(name):
        if i and character == ":" and name[i + 1 :] and Path(name[:i]).is_dir():
            return name[:i], name[i + 1 :]
    return None


def cache_folder() -> Path:
    """Where what is made once a machine stays. Raises UserError when no variable gives a place."""
    named = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    if named.is_absolute():  # the specification ignores a relative one
        return named / "conversation-training"
    if home := home_folder():
        return home / ".cache" / "conversation-training"
    raise UserError(
        "there is no place for the model cache: HOME is not a folder, and XDG_CACHE_HOME is not set",
        "set XDG_CACHE_HOME to a folder that can be written",
    )


def without_passwords(text: str) -> str:
    """A text whose addresses show no user and no password."""
    return re.sub(r"//[^/\s]*@", "//...@", text)


def hub_settings(environ: Mapping[str, str]) -> list[str]:
    """What is set for the hub's client and the network, as NAME=value; passwords and tokens are not shown."""
    found = []
    for name, value in sorted(environ.items()):
        if not value or not _OF_THE_HUB.fullmatch(name) or _NOT_OF_THE_NETWORK.fullmatch(name):
            continue
        hidden = "..." if "TOKEN" in name else without_passwords(value)[:100]
        found.append(f"{name}={hidden}")
    return found


_OF_THE_HUB = re.compile(
    r"(HF|HUGGINGFACE|HUGGING_FACE)_.*|TRANSFORMERS_(OFFLINE|CACHE)|(?i:(all|https?|no)_proxy)|SSL_CERT_(FILE|DIR)"
    r"|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSLKEYLOGFILE"
)
_NOT_OF_THE_NETWORK = re.compile(r".*_DISABLE_(PROGRESS_BARS|TELEMETRY)")


def set_up_libraries() -> None:
    """Settings that libraries read when they are loaded; what the user has set stays.

    OpenMP's threads sleep while they wait for each other. Beside one busy program an answer or a step then takes about
    0.6 of the time; on quiet cores up to a tenth more (benchmarks/README.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each training otherwise
    os.environ["MPLBACKEND"] = "agg"  # plots are files; a notebook's leftover would fail
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import huggingface_hub.constants  # noqa: F401 - it reads variables: what is wrong with them is said at once
