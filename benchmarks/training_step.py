#!/usr/bin/env python3
"""What one optimizer step of 8 examples costs: our step beside the usual variants, and beside what the hardware allows.

    benchmarks/training_step.py                                   the table, on the embedded stand-in (about 30 minutes)
    benchmarks/training_step.py --variants completion,ours        only some of the variants (about 13 minutes)
    benchmarks/training_step.py --json > step.json                one JSON object; the table goes to standard error
    benchmarks/training_step.py --cuda_memory_gb 6                the same on a GPU, with no more memory than that
    benchmarks/training_step.py --tokens 2048                     examples of that many random tokens
    benchmarks/training_step.py --growth                          draw benchmarks/training_step.png (about 2 minutes)

Every variant has its own process, so that its peak memory is its own, with the same weights, the same adapters (LoRA
without dropout, B not zero) and the same batches. On a CPU they take turns, one step each, batch after batch, so that a
busy spell of the machine meets all of them; on a GPU, which they would have to share, they run one after another. The
first batch warms up and gives the gradients that are compared, with those of the plain computation whose loss is taken
in float64; the later ones are timed: forward, backward, AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from conversation.data.examples import read_training_data  # noqa: E402
from conversation.errors import CommandLine, UserError, run_main  # noqa: E402
from conversation.runs.machine import environment  # noqa: E402
from conversation.runs.record import now  # noqa: E402
from conversation_config import STAND_IN, TrainingConfig, set_up_libraries  # noqa: E402

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from conversation.training.prefix_tree import PrefixTree, TokenSequence

VARIANTS = {
    "original": "original recipe: one by one, all tokens",
    "completion": "the same, completion loss",
    "trl-1x8": "TRL SFTTrainer, 1 x 8",
    "trl-8x1": "TRL SFTTrainer, 8 x 1",
    "trl-1x8-kept": "TRL 1 x 8, no checkpointing",
    "ours": "ours: each shared token once",
}
DEFAULT_VARIANTS = tuple(name for name in VARIANTS if name != "trl-1x8-kept")
REFERENCE = "reference"  # not timed: the gradients of the completion loss that all variants but the first should have
EXAMPLES = 8
SHARED_TOKENS, ANSWER_TOKENS = 165, 209  # of an example of ours, which has 485 (means of 15 batches)
GROWTH_PLOT = Path(__file__).with_suffix(".png")


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--base_model", default=STAND_IN, help="hub name or local folder (default: %(default)s)")
    parser.add_argument("--training_data", type=Path, default=PROJECT / "data" / "conversation_trees")
    parser.add_argument("--tokens", type=int, help="examples of that many random tokens instead of the training data")
    parser.add_argument("--variants", default=",".join(DEFAULT_VARIANTS), help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each variant (default: %(default)s)")
    parser.add_argument("--trl_rounds", type=int, default=3, help="steps of TRL's variants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which examples make up the batches")
    parser.add_argument("--adapters", type=Path, help="adapters of a finished training (default: random ones)")
    parser.add_argument("--cuda_memory_gb", type=float, help="on a GPU: leave each variant no more memory than this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--growth", action="store_true", help="instead: draw how time grows, on a small random model")
    parser.add_argument("--growth_plot", type=Path, default=GROWTH_PLOT, help="with --growth: where to")
    args = parser.parse_args()
    names = args.variants.split(",")
    if unknown := set(names) - VARIANTS.keys():
        raise UserError(f"unknown: {', '.join(sorted(unknown))}", f"--variants takes {', '.join(VARIANTS)}")
    if min(args.rounds, args.trl_rounds) < 1:
        raise UserError("--rounds and --trl_rounds must be at least 1")
    set_up_libraries()
    if args.growth:
        growth = measure_growth(GROWTH)
        draw_growth(growth, args.growth_plot)
        print(json.dumps(growth) if args.json else f"drawn: {args.growth_plot}")
        return 0
    report = measure(names, args)
    print(table(report), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report))
    return 0


# --- the measurement -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What every variant is given."""

    base_folder: Path
    batches: list[list[TokenSequence]]  # the first one warms up
    adapters: Path | None  # of a finished training
    cuda_memory_gb: float | None
    folder: Path  # for gradients and what TRL writes


def measure(names: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Runs the variants and gathers what they came to; progress on standard error."""
    import torch

    from conversation.models.base_models import find_base_model
    from conversation.training.prefix_tree import build_prefix_tree

    rounds = {name: args.trl_rounds if name.startswith("trl") else args.rounds for name in names}
    base_folder = find_base_model(args.base_model)
    batches = make_batches(base_folder, args, 1 + max(rounds.values()))
    trees = [build_prefix_tree(batch) for batch in batches[1:]]
    report: dict[str, Any] = {
        "date": now(),
        **dataclasses.asdict(environment()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cuda_memory_gb": args.cuda_memory_gb,
        "base_model": args.base_model,
        "adapters": str(args.adapters) if args.adapters else "random",
        "examples_per_step": EXAMPLES,
        "batches": [
            {"tokens": tree.num_sequence_tokens, "distinct_tokens": tree.num_tokens, "labels": tree.num_labels}
            for tree in trees
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        say("the gradients to compare with")
        reference = Job(base_folder, batches[:1], args.adapters, args.cuda_memory_gb, Path(folder) / REFERENCE)
        report["reference_error"] = run_in_turns({REFERENCE: reference})[REFERENCE].get("error")
        jobs = {
            name: Job(base_folder, batches[: 1 + rounds[name]], args.adapters, args.cuda_memory_gb, Path(folder) / name)
            for name in names
        }
        taken = run_in_turns(jobs) if report["device"] == "cpu" else run_one_after_another(jobs)
        report["variants"] = summary(taken, report["batches"], Path(folder))
    if "ours" in taken and taken["ours"]["steps"]:
        rate = max(step["gflops"] for result in taken.values() for step in result["steps"])
        report["floor"] = floor(base_folder, trees, rate, taken["ours"]["steps"])
    return report


def make_batches(base_folder: Path, args: argparse.Namespace, count: int) -> list[list[TokenSequence]]:
    """`count` batches of 8 examples: of the training data or, with `--tokens`, of random tokens."""
    if args.tokens is not None:
        if args.tokens < 8:
            raise UserError("--tokens must be at least 8")
        return random_token_batches(base_folder, args.tokens, count, args.seed)
    return random_batches(base_folder, args.training_data, count, args.seed)


def random_token_batches(base_folder: Path, tokens: int, count: int, seed: int) -> list[list[TokenSequence]]:
    """`count` batches of 8 examples of `tokens` random tokens. All have the same developer turn; the rest is their own.

    With 485 tokens a batch has, within one in a hundred, as many tokens, distinct ones and labels as batches of ours.
    """
    from transformers import AutoConfig

    from conversation.training.prefix_tree import TokenSequence

    vocabulary, draw = AutoConfig.from_pretrained(base_folder).get_text_config().vocab_size, random.Random(seed)
    shared, answer = min(SHARED_TOKENS, tokens // 2), min(ANSWER_TOKENS, tokens // 2)
    developer = [draw.randrange(vocabulary) for _ in range(shared)]

    def example() -> TokenSequence:
        ids = (*developer, *(draw.randrange(vocabulary) for _ in range(tokens - shared)))
        return TokenSequence(ids, tuple(i >= tokens - answer for i in range(tokens)))

    return [[example() for _ in range(EXAMPLES)] for _ in range(count)]


def random_batches(base_folder: Path, data: Path, count: int, seed: int) -> list[list[TokenSequence]]:
    """`count` batches of 8 random examples, with completion loss; no example twice as long as there are enough."""
    from conversation.models.tokenizer import encode_example, load_tokenizer
    from conversation.training.training_set import token_sequence

    examples = read_training_data(data)
    if len(examples) < EXAMPLES:
        raise UserError(f"{data} has {len(examples)} examples, a step needs {EXAMPLES}")
    tokenizer = load_tokenizer(base_folder)
    drawn = random.Random(seed).sample(examples * -(-count * EXAMPLES // len(examples)), count * EXAMPLES)
    sequences = [token_sequence(encode_example(tokenizer, example), "completion") for example in drawn]
    return [sequences[i : i + EXAMPLES] for i in range(0, len(sequences), EXAMPLES)]


class Worker:
    """A variant in its process. `steps`: what each timed step took; `end`: peak memory, or the error that ended it."""

    def __init__(self, name: str, job: Job):
        job.folder.mkdir()
        context = multiprocessing.get_context("spawn")
        self.name, self.steps, self.end, self.ready = name, [], {}, False
        self.connection, other = context.Pipe()
        self.process = context.Process(target=run_variant, args=(name, job, other), daemon=True)
        self.process.start()
        other.close()

    def wait(self) -> bool:
        """Until it is ready for its next step; False when there is none."""
        if not self.ready and not self.end:
            message = self._receive()
            self.ready = message == "ready"
            self.end = {} if self.ready else message
        return self.ready

    def step(self, number: int) -> None:
        """Step 0 is the one that warms up."""
        self.connection.send("go")
        self.ready = False
        message = self._receive()
        if "seconds" not in message:
            self.end = message
            return
        if number:
            self.steps.append(message)
        what = f"step {number}" if number else "warm-up"
        say(f"{what}, {self.name}: {message['seconds']:.2f} s (matrix products: {message['gflops']:.0f} GFLOP/s)")

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return {"error": f"ended with status {self.process.exitcode}"}

    def result(self) -> dict[str, Any]:
        self.process.join()
        return {"steps": self.steps, **self.end}


def run_in_turns(jobs: dict[str, Job]) -> dict[str, dict[str, Any]]:
    """One step of each variant, then the next batch."""
    workers = [Worker(name, job) for name, job in jobs.items()]
    for number in range(max(len(job.batches) for job in jobs.values())):
        ready = [worker for worker in workers if worker.wait()]
        for worker in ready:
            worker.step(number)
            worker.wait()  # what it does between two steps is done before the next one's turn
    return {worker.name: worker.result() for worker in workers}


def run_one_after_another(jobs: dict[str, Job]) -> dict[str, dict[str, Any]]:
    taken = {}
    for name, job in jobs.items():
        worker = Worker(name, job)
        for number in range(len(job.batches)):
            if worker.wait():
                worker.step(number)
        worker.wait()
        taken[name] = worker.result()
    return taken


def summary(taken: dict[str, dict], batches: list[dict[str, int]], folder: Path) -> dict[str, dict[str, Any]]:
    """Per variant: seconds of each step, and what follows from them. Ratios are taken batch by batch."""
    ours = [step["seconds"] for step in taken.get("ours", {"steps": []})["steps"]]
    rows = {}
    for name, result in taken.items():
        seconds = [step["seconds"] for step in result["steps"]]
        row = {"seconds": seconds, "error": result.get("error"), "peak_memory_gb": result.get("peak_memory_gb")}
        if seconds:
            pairs = list(zip(seconds, batches, strict=False))
            row["median_seconds"] = statistics.median(seconds)
            row["label_tokens_per_second"] = statistics.median(batch["labels"] / s for s, batch in pairs)
            if ours:
                row["times_ours"] = statistics.median(s / o for s, o in zip(seconds, ours, strict=False))
        row["gradient_difference"] = gradient_difference(folder / name, folder / REFERENCE)
        rows[name] = row
    return rows


def gradient_difference(folder: Path, reference: Path) -> float | None:
    """|g - reference| / |reference| over all adapters, on the first batch; None if there is nothing to compare."""
    import torch

    paths = folder / "gradients.pt", reference / "gradients.pt"
    if folder.name == "original" or not all(path.exists() for path in paths):
        return None  # the original recipe has another loss
    ours, theirs = (torch.load(path) for path in paths)
    difference = sum((ours[name].double() - theirs[name].double()).square().sum() for name in theirs)
    return math.sqrt(difference / sum(gradient.double().square().sum() for gradient in theirs.values()))


def table(report: dict[str, Any]) -> str:
    """For people."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    batches = report["batches"]
    tokens, distinct, labels = (
        statistics.fmean(b[k] for b in batches) for k in ("tokens", "distinct_tokens", "labels")
    )
    lines = [
        f"{report['base_model']} in FP32 on {report['device']} ({report['machine']['processor']}, "
        f"{report['threads']} threads), {report['date']}",
        f"a step: {EXAMPLES} examples, {tokens:.0f} tokens, {distinct:.0f} of them distinct, {labels:.0f} label tokens",
        "",
        "| variant | s/step | x ours | label tokens/s | peak memory, GB | gradient differs by |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["variants"].items():
        if row["error"]:
            lines.append(f"| {VARIANTS[name]} | {row['error']} | | | | |")
            continue
        cells = [
            f"{row['median_seconds']:.2f} ({len(row['seconds'])})",
            number(row.get("times_ours"), ".2f"),
            f"{row['label_tokens_per_second']:.0f}",
            f"{row['peak_memory_gb']:.1f}",
            number(row["gradient_difference"], ".1e"),
        ]
        lines.append(f"| {VARIANTS[name]} | {' | '.join(cells)} |")
    if report.get("reference_error"):
        lines += ["", f"no gradient to compare with: {report['reference_error']}"]
    if "floor" in report:
        least = report["floor"]
        lines += [
            "",
            f"floor: {least['tflop']:.2f} TFLOP a step at {least['gflops']:.0f} GFLOP/s are {least['seconds']:.2f} s; "
            f"ours reaches {least['reached']:.0%} of it",
        ]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the variants, each in its own process ----------------------------------------------------------------------------


class Turns:
    """A worker's side of the conversation: wait for the word, take the time, tell it."""

    def __init__(self, connection: Connection, job: Job):
        self.connection, self.folder = connection, job.folder
        self.count, self.rates = 0, []

    def begin(self) -> None:
        self.connection.send("ready")
        self.connection.recv()
        self.rates.append(matrix_rate())
        self.started = _time()

    def keep_gradients(self, model) -> None:
        """Of the first step, which is not timed."""
        import torch

        if self.count == 0:
            gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
            torch.save(gradients, self.folder / "gradients.pt")

    def end(self) -> None:
        seconds = _time() - self.started
        self.connection.send({"seconds": seconds, "gflops": self.rates[-1]})
        self.count += 1


def _time() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_variant(name: str, job: Job, connection: Connection) -> None:
    """The whole life of a worker process."""
    os.dup2(2, 1)  # what libraries print must not mix with our output
    os.environ["HF_HUB_OFFLINE"] = "1"
    set_up_libraries()
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    from conversation.training.memory import peak_memory_gb

    torch.backends.cuda.matmul.allow_tf32 = False
    limit_cuda_memory(job.cuda_memory_gb)
    turns = Turns(connection, job)
    try:
        model = adapted_model(job.base_folder, job.adapters, fused=name == "ours")
        if name.startswith("trl"):
            run_trl(model, job, turns, per_device=8 if name == "trl-8x1" else 1, kept=name == "trl-1x8-kept")
        else:
            variants = {"original": one_by_one(True), "completion": one_by_one(False), REFERENCE: in_float64}
            run_loop(model, job, turns, variants.get(name) or sharing(model))
        connection.send({"peak_memory_gb": peak_memory_gb()})
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        connection.send({"error": "out of memory"})


def limit_cuda_memory(gb: float | None) -> None:
    """Leave this process no more of the card's memory than that."""
    import torch

    if gb and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gb * 1e9 / total))


def adapted_model(base_folder: Path, trained: Path | None, fused: bool):
    """The base with the default recipe's adapters, without dropout, in our layers or peft's; the same in each process.

    LoRA's B starts at zero, which would leave A without a gradient to compare: unless the adapters are those of a
    finished training, it is small instead.
    """
    import torch
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    from conversation.models.adapters import add_adapters, lora_config
    from conversation.models.weights import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_model(base_folder)
    torch.manual_seed(0)
    config = TrainingConfig(lora_dropout=0.0)
    model = add_adapters(base, config) if fused else get_peft_model(base, lora_config(config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    if trained:
        set_peft_model_state_dict(model, load_file(trained / "adapter_model.safetensors"))
    return model.to(device).train()


def run_loop(model, job: Job, turns: Turns, gradients: Callable) -> None:
    """A step is what `gradients(model, batch)` does, then AdamW. Returns after the last batch."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    for batch in job.batches:
        turns.begin()
        gradients(model, batch)
        turns.keep_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        turns.end()


def sharing(model, max_tokens: int | None = None) -> Callable:
    """Our step, in micro-batches that fit the free memory, or of `max_tokens`."""
    from conversation.training.micro_batches import TokenBudget, backward_in_micro_batches, measure_token_budget
    from conversation.training.shared_prefix import use_shared_prefix_attention

    use_shared_prefix_attention(model)
    budget = TokenBudget(max_tokens) if max_tokens else measure_token_budget(model)

    def gradients(model, batch: list[TokenSequence]) -> None:
        labels = sum(sum(sequence.is_label) for sequence in batch)
        backward_in_micro_batches(model, batch, 1 / labels, budget)

    return gradients


def one_by_one(loss_on_all: bool) -> Callable:
    """The original recipe: per device 1, accumulation 8; transformers' own loss over full logits."""
    import torch

    def gradients(model, batch: list[TokenSequence]) -> torch.Tensor:
        """Returns the loss in nats a label token, too."""
        labels = sum(len(s.ids) - 1 if loss_on_all else sum(s.is_label) for s in batch)
        total = torch.zeros((), device=model.device)
        for sequence in batch:
            ids = torch.tensor([sequence.ids], device=model.device)
            marks = torch.tensor([sequence.is_label], device=model.device)
            targets = ids if loss_on_all else ids.masked_fill(~marks, -100)
            loss = model(input_ids=ids, labels=targets, num_items_in_batch=labels, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        return total

    return gradients


def in_float64(model, batch: list[TokenSequence]) -> None:
    """The plain computation with its loss in float64: torch's FP32 cross entropy is off by up to 5e-4 on a CPU."""
    import torch

    labels = sum(sum(sequence.is_label) for sequence in batch)
    for sequence in batch:
        ids = torch.tensor(sequence.ids, device=model.device)
        marks = torch.tensor(sequence.is_label, device=model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][marks[1:]].double()
        (torch.nn.functional.cross_entropy(logits, ids[marks], reduction="sum") / labels).backward()


def run_trl(model, job: Job, turns: Turns, per_device: int, kept: bool) -> None:
    """TRL's SFTTrainer as it comes, but for FP32, the order of the examples and their full length.

    `kept` turns its activation checkpointing off, which is on by default. The gradient is not clipped, as nowhere here.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from conversation.models.tokenizer import load_tokenizer

    class Timed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.begin()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            turns.keep_gradients(model)

        def on_step_end(self, args, state, control, **kwargs):
            turns.end()

    examples = [sequence for batch in job.batches for sequence in batch]
    arguments = SFTConfig(
        output_dir=str(job.folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=EXAMPLES // per_device,
        max_steps=len(job.batches),
        learning_rate=1e-5,
        max_grad_norm=0.0,
        completion_only_loss=True,
        max_length=None,
        bf16=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **({"gradient_checkpointing": False} if kept else {}),
    )
    columns = {
        "input_ids": [list(s.ids) for s in examples],
        "completion_mask": [list(map(int, s.is_label)) for s in examples],
    }
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=load_tokenizer(job.base_folder),
        callbacks=[Timed()],
    )
    trainer.train()


# --- the floor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """A decoder of attention and gated MLP, as Gemma, Llama and Qwen are."""

    width: int
    mlp_width: int
    heads: int
    key_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # of each layer; None sees everything
    vocabulary: int
    rank: int

    @classmethod
    def of(cls, config: Any, rank: int) -> ModelShape:
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        return cls(
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            windows=tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types),
            vocabulary=config.vocab_size,
            rank=rank,
        )


def needed_flop(shape: ModelShape, tree: PrefixTree) -> int:
    """Floating-point operations of the matrix products that the loss and the adapters' gradients of a batch need.

    A product of [m, k] with [k, n] is 2 m k n operations. Each distinct token is computed once, forward and back once;
    elementwise work is not counted. Left out, as no gradient needs it: the gradient of the frozen weights; that of the
    first layer's input; in the last layer, the queries and all that follows them of tokens that predict no label.
    """
    queries, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    positions = tree.position_ids[0]
    total = 0
    for layer, window in enumerate(shape.windows):
        first, last = layer == 0, layer == len(shape.windows) - 1
        used = positions[tree.predicting] if last else positions
        seen = (used + 1) if window is None else (used + 1).clamp(max=window)
        # scores and values forward; back: the gradients of probabilities, values, queries and keys
        total += 6 * 2 * queries * int(seen.sum())
        total += _linear_flop(len(used), shape.width, queries, shape.rank, input_gradient=not first)
        total += 2 * _linear_flop(len(positions), shape.width, keys, shape.rank, input_gradient=not first)
        total += _linear_flop(len(used), queries, shape.width, shape.rank)
        total += 2 * _linear_flop(len(used), shape.width, shape.mlp_width, shape.rank)
        total += _linear_flop(len(used), shape.mlp_width, shape.width, shape.rank)
    return total + 2 * 2 * len(tree.predicting) * shape.width * shape.vocabulary


def _linear_flop(tokens: int, inputs: int, outputs: int, rank: int, input_gradient: bool = True) -> int:
    """A frozen linear layer with LoRA: forward, the gradients of A and B, and that of the input if it is needed."""
    frozen = 2 * inputs * outputs * (2 if input_gradient else 1)
    low_rank = 2 * rank * ((inputs + outputs) * 2 + outputs + (inputs if input_gradient else 0))
    return tokens * (frozen + low_rank)


def floor(
    base_folder: Path, trees: Sequence[PrefixTree], rate: float, steps: list[dict[str, float]]
) -> dict[str, float]:
    """The medians of the floor over our timed steps: each step's arithmetic over `rate`, in GFLOP/s.

    `rate` is the best that the machine showed before any step of the run: on shared cores the rate of a moment may be
    half of it, and dividing by that one would flatter us.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_folder).get_text_config()
    flop = [needed_flop(ModelShape.of(config, TrainingConfig().lora_r), tree) for tree in trees[: len(steps)]]
    seconds = [f / (rate * 1e9) for f in flop]
    return {
        "tflop": statistics.median(flop) / 1e12,
        "gflops": rate,
        "seconds": statistics.median(seconds),
        "reached": statistics.median(s / step["seconds"] for s, step in zip(seconds, steps, strict=True)),
    }


def matrix_rate() -> float:
    """The machine's FP32 rate in large square matrix products now, the best of eight, in GFLOP/s."""
    import torch

    size, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    product, taken = torch.empty_like(a), []
    for _ in range(8):
        started = _time()
        torch.mm(a, b, out=product)
        taken.append(_time() - started)
    return 2 * size**3 / min(taken) / 1e9


# --- growth ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """What --growth varies around a small random model and random examples; lengths as in our data."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    depths: tuple[int, ...] = (0, 1, 2, 4, 6, 8)
    vocabularies: tuple[int, ...] = (4_096, 16_384, 65_536, 262_144)
    vocabulary: int = 32_768
    width: int = 128
    developer_tokens: int = 120
    turn_tokens: int = 55  # of one question and answer of the history
    question_tokens: int = 15
    answer_tokens: int = 170
    repeats: int = 2


GROWTH = Growth()
LINES = {
    "original": ("original recipe", "#8a8f98", "-"),
    "completion": ("the same, completion loss", "#dd8a2b", "-"),
    "ours": ("ours, examples of different trees", "#2f6db3", "-"),
    "ours, one tree": ("ours, examples with one history", "#2f6db3", ":"),
}


def measure_growth(growth: Growth) -> dict[str, Any]:
    """Panel -> x -> line -> seconds of a step without optimizer, the best of some."""
    panels: dict[str, dict[int, dict[str, float]]] = {"examples": {}, "turns of history": {}, "vocabulary": {}}
    model = small_model(growth, growth.vocabulary)
    for count in growth.batch_sizes:
        panels["examples"][count] = _step_times(model, growth, count, depth=2)
    for depth in growth.depths:
        panels["turns of history"][depth] = _step_times(model, growth, EXAMPLES, depth)
    for vocabulary in growth.vocabularies:
        panels["vocabulary"][vocabulary] = _step_times(small_model(growth, vocabulary), growth, EXAMPLES, depth=2)
    return {"date": now(), **dataclasses.asdict(environment()), "seconds": panels}


def small_model(growth: Growth, vocabulary: int):
    """A Gemma 3 of four layers with random weights, and adapters."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from conversation.models.adapters import add_adapters

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=growth.width,
        intermediate_size=4 * growth.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=growth.width // 4,
        sliding_window=512,
    )
    model = add_adapters(Gemma3ForCausalLM(config), TrainingConfig(lora_dropout=0.0))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def random_examples(growth: Growth, count: int, depth: int, one_tree: bool, vocabulary: int) -> Iterator[TokenSequence]:
    """Examples that share the developer turn and, of one tree, also their history."""
    from conversation.training.prefix_tree import TokenSequence

    draw = random.Random(0)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, vocabulary) for _ in range(number))

    developer, history = tokens(growth.developer_tokens), tokens(depth * growth.turn_tokens)
    for _ in range(count):
        own = history if one_tree else tokens(len(history))
        prompt = developer + own + tokens(growth.question_tokens)
        ids = prompt + tokens(growth.answer_tokens)
        yield TokenSequence(ids, tuple(i >= len(prompt) for i in range(len(ids))))


def _step_times(model, growth: Growth, count: int, depth: int) -> dict[str, float]:
    from conversation.training.tree_attention import ATTENTION_NAME

    ours = sharing(model, max_tokens=2**40)
    variants = {"original": one_by_one(True), "completion": one_by_one(False), "ours": ours, "ours, one tree": ours}
    causal_lm = model.get_base_model()
    times = {}
    for line in LINES:
        batch = list(random_examples(growth, count, depth, line == "ours, one tree", causal_lm.config.vocab_size))
        causal_lm.set_attn_implementation(ATTENTION_NAME if line.startswith("ours") else "sdpa")
        taken = []
        for _ in range(growth.repeats):
            started = _time()
            variants[line](model, batch)
            taken.append(_time() - started)
            model.zero_grad()
        times[line] = min(taken)
    say(f"{count} examples, {depth} turns, vocabulary {causal_lm.config.vocab_size}: {times}")
    return times


def draw_growth(growth: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), facecolor="white", layout="constrained")
    titles = {"examples": "examples in a step", "turns of history": "turns of history", "vocabulary": "vocabulary size"}
    for axis, (panel, points) in zip(figure.subplots(1, 3), growth["seconds"].items(), strict=True):
        sizes = [int(size) for size in points]
        for line, (label, color, style) in LINES.items():
            axis.plot(sizes, [point[line] for point in points.values()], style, color=color, marker="o", ms=4)
            axis.lines[-1].set_label(label)
        axis.set_xlabel(titles[panel])
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        if panel == "vocabulary":
            axis.set_xscale("log", base=4)
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        else:
            axis.set_xticks(sizes)
    figure.axes[0].set_ylabel("seconds per step")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    run_main(main)
