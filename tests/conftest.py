"""A tiny Gemma 3 with its own small tokenizer, made here: both kinds of attention, control tokens, seconds to train."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.random_base import make_tokenizer
from conversation.format.calls import Answer, Example, FollowUp, Prompt, Utterance
from conversation_config import FUNCTION_GEMMA

pytest_plugins = ["scripts_at_work", "page_browser"]

PROJECT = Path(__file__).resolve().parent.parent
INPUTS = PROJECT / "tests" / "inputs"  # small inputs that failed once, and lines with hard contents
MORE_LINES = PROJECT.parent / "shared" / "data" / "conversation_sample_300.jsonl"
TREES = PROJECT / "data" / "conversation_trees"

LEARNS = "--max_steps 90 --learning_rate 5e-3 --warmup_steps 10 --lora_r 32 --lora_alpha 64 --lora_dropout 0".split()
"""A training of half a minute on `easy_data_with_real_prompts`, after which the tiny model passes the three tests."""

EASY_CHOICES = (("Why?", "0.61", "why"), ("Example?", "0.25", "example"), ("Cost?", "0.08", "cost"))

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


LONGEST = ("test_stand_in.py", "test_interruption.py", "test_shared_prefix.py", "test_training.py", "test_processes.py")


def pytest_collection_modifyitems(items):
    """Files of minutes come first: else one process would work on the last of them alone."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def own_examples():
    """The project's own training examples."""
    from conversation.data.examples import read_training_data

    return read_training_data(TREES)


@pytest.fixture(scope="session")
def real_lines(own_examples) -> list[str]:
    """Training lines to round-trip: those of the project's trees, and lines with what is hard to parse.

    More of these where a sample lies beside the checkout.
    """
    lines = [json.dumps({"text": example.text}) for example in own_examples]
    for path in (INPUTS / "sample_lines.jsonl", MORE_LINES):
        if path == MORE_LINES and not path.exists():
            continue
        lines += path.read_text(encoding="utf-8").splitlines()
    return lines


def make_tiny_model(folder: Path, texts: list[str], seed: int = 0, like_real_ones: bool = False) -> Path:
    """A Gemma 3 of four layers (sliding and full attention) with random weights, as an ordinary model folder.

    `like_real_ones`: of six layers, of which the last attends to all, as llama.cpp expects, and rows of 256, which are
    a block of its K types.
    """
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    make_tokenizer(folder, texts)
    size = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=size,
        hidden_size=256 if like_real_ones else 64,
        intermediate_size=256 if like_real_ones else 128,
        num_hidden_layers=6 if like_real_ones else 4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=96,
        layer_types=["sliding_attention"] * 5 + ["full_attention"]
        if like_real_ones
        else ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=4096,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # large enough for frozen weights to pass signals, and for a sure tied head
            torch.nn.init.normal_(parameter, std=0.4 if parameter.shape[0] == size else 0.12)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, own_examples) -> Path:
    """A tiny base model's folder."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    return make_tiny_model(folder, [example.text for example in own_examples[::4]])


@pytest.fixture(scope="session")
def merged_tiny(tmp_path_factory, own_examples) -> Path:
    """A tiny Gemma 3 that llama.cpp can run, as a merged folder."""
    from conversation.models.chat_format import write_chat_format
    from conversation.models.merged_model import write_manifest
    from conversation.models.tokenizer import id_of, load_tokenizer
    from conversation.runs.files import file_hashes

    folder = tmp_path_factory.mktemp("merged_tiny") / "merged_model_fp32"
    make_tiny_model(folder, [example.text for example in own_examples[::4]], like_real_ones=True)
    write_chat_format(folder, load_tokenizer(folder))
    generation = {"eos_token_id": id_of(load_tokenizer(folder), "<end_of_turn>")}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_manifest(folder, file_hashes(folder))
    return folder


def some_adapters(folder: Path, model_folder: Path, size: float) -> Path:
    """Random adapters on the up projections of a model; what they change has a standard deviation of about `size`."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    generator = np.random.default_rng(0)
    tensors = {}
    for name, weight in load_file(model_folder / "model.safetensors").items():
        if "up_proj" in name:
            start, (rows, columns) = f"base_model.model.{name.removesuffix('.weight')}", weight.shape
            tensors[f"{start}.lora_A.weight"] = generator.normal(size=(4, columns)).astype(np.float32)
            tensors[f"{start}.lora_B.weight"] = generator.normal(size=(rows, 4), scale=size / 4).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory, own_examples) -> Path:
    """A JSONL file of 24 real examples from several trees."""
    from conversation.data.examples import to_jsonl

    path = tmp_path_factory.mktemp("data") / "small.jsonl"
    path.write_bytes(to_jsonl(own_examples[:24]))
    return path


def easy_lines() -> list[Example]:
    """Short examples, with and without history. A tiny model learns their form within a minute."""
    words = ("red", "blue", "green", "dark", "warm", "cold", "long", "thin", "soft", "hard", "near", "far")
    choices = tuple(FollowUp(text, number, name) for text, number, name in EASY_CHOICES)
    examples = []
    for word in words:
        history = (
            Utterance("User", f"What's {word}?"),
            Utterance("AI", f"It is {word}."),
            Utterance("AI", f"Like {word} ink."),
        )
        for prompt in (Prompt(f"What's {word}?"), Prompt(f"{word.title()} theorem?"), Prompt("Example?", history)):
            examples.append(Example(prompt, Answer((f"It is {word}.",), choices)))
    return examples


@pytest.fixture(scope="session")
def standin_folder() -> Path:
    """The real 270M stand-in, prepared once per machine."""
    from conversation.models.stand_in import prepare_stand_in

    return prepare_stand_in()


def run_script(script: str, *flags: object, cwd: Path | None = None, env: dict | None = None, **options):
    """Run a script of the project as a user would; return the finished process, with its output as text."""
    command = [sys.executable, str(PROJECT / script), *map(str, flags)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd or PROJECT, env={**os.environ, **(env or {})}, **options
    )


def easy_data_with_real_prompts(own_examples: list[Example]) -> list[Example]:
    """Easy and real prompts, all with the same answer: only its form is to be learnt."""
    answer = Answer(("It depends.",), easy_lines()[0].answer.follow_ups)
    return [Example(example.prompt, answer) for example in [*easy_lines(), *own_examples[::12]]]


def make_home(target: Path, own_examples: list[Example]) -> Path:
    """A copy of the project with easy data. RETRAIN.sh really runs in it, in the environment of these tests."""
    from conversation.data.examples import to_jsonl

    left_out = shutil.ignore_patterns(".git", ".venv", "training-runs", "__pycache__", ".cache", ".*_cache", "tests")
    shutil.copytree(PROJECT, target, ignore=left_out)
    (target / "easy.jsonl").write_bytes(to_jsonl(easy_data_with_real_prompts(own_examples)))
    environment = target / ".venv"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    stamp = subprocess.run(["cksum"], stdin=open(target / "requirements.txt"), capture_output=True, text=True).stdout
    (environment / "requirements.txt.cksum").write_text(stamp)
    return target


def current_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def lay_into_hub_cache(home, model_folder, name=FUNCTION_GEMMA):
    """Make a hub cache, as a download leaves it, with a model folder under a hub name."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add_text",
            "description": "Adds AI response text to current node.",
            "parameters": {
                "type": "object",
                "properties": {"content": {"type": "string", "description": "Response text"}},
                "required": ["content"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add_choice",
            "description": "Adds one predicted user response choice.",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": "User's response text"},
                    "confidence": {"type": "number", "description": "Confidence 0.0-1.0"},
                    "target": {"type": "string", "description": "Target node name"},
                },
                "required": ["text", "confidence", "target"],
            },
        },
    },
]


def messages_of(prompt: Prompt) -> list[dict]:
    """A prompt as the messages that a chat program would send."""
    messages = []
    for utterance in prompt.history:
        if utterance.speaker == "User":
            messages.append({"role": "user", "content": utterance.text})
            continue
        call = {"type": "function", "function": {"name": "add_text", "arguments": {"content": utterance.text}}}
        if messages and messages[-1]["role"] == "assistant":
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    return [*messages, {"role": "user", "content": prompt.question}]
