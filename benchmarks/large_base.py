#!/usr/bin/env python3
"""Train and merge a large base under a memory limit: does it fit, and was the memory plan right?

    .venv/bin/python benchmarks/large_base.py WORK_FOLDER --tokenizer MODEL_FOLDER --limit_gb 6

The base has the public configuration of Qwen2.5-1.5B and random bfloat16 weights. It is trained for two steps of eight
of the project's examples and merged, each in a process of its own. With --limit_gb a control group of its own (Linux,
as root) holds the training; the merge, which works in FP32, may use 1.5 times the model's FP32 size. What follows -- is
for train_conversation.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

QWEN = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151_936,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
"""Qwen/Qwen2.5-1.5B, from its public config.json."""


def main() -> None:
    from conversation.runs.folder import RunFolder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model folder whose tokenizer has the tokens")
    parser.add_argument("--layers", type=int, default=QWEN["num_hidden_layers"], help="fewer, for a quick look")
    parser.add_argument("--limit_gb", type=float, help="memory of the training, in GB")
    own, _, more = " ".join(sys.argv[1:]).partition(" -- ")
    args = parser.parse_args(own.split())
    base, run = args.work_folder / "base", args.work_folder / "run"
    if not base.exists():
        make_base(base, args.tokenizer, args.layers)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    train = "--training_data expert --domains programming --max_steps 2 --warmup_steps 0 --logging_steps 1".split()
    train += ["--held_out_share", "0", "--learning_rate", "1e-4", "--base_model", str(base), "--run_dir", str(run)]
    shutil.rmtree(run, ignore_errors=True)
    limited("train_conversation.py", [*train, *more.split()], args.limit_gb)
    limited("merge_conversation_model.py", ["--run_dir", str(run)], 1.5 * 2 * size / 1e9 if args.limit_gb else None)
    record = RunFolder(run).read()
    assert record.training and record.merge and record.training.memory_plan
    plan, peak = record.training.memory_plan, record.training.peak_memory_gb
    print(json.dumps({"shape": QWEN, "layers": args.layers, "limit_gb": args.limit_gb}))
    print(plan)
    print(f"training: peak {peak:.2f} GB, the plan was {plan.total / 1e9 / peak - 1:+.1%} off")
    ratio = record.merge.peak_memory_bytes / (2 * size)
    print(f"merge: peak {record.merge.peak_memory_bytes / 1e9:.2f} GB, {ratio:.2f} times the model's FP32 size")


def make_base(folder: Path, tokenizer: Path, layers: int) -> None:
    """A Qwen2 with random weights, in bfloat16, one file a layer. The larger vocabulary's last rows have no token."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from conversation.models.tokenizer import load_tokenizer, tokenizer_files

    config = Qwen2Config(**{**QWEN, "num_hidden_layers": layers}, dtype="bfloat16")
    config.architectures = ["Qwen2ForCausalLM"]
    config.bos_token_id = config.eos_token_id = config.pad_token_id = load_tokenizer(tokenizer).pad_token_id
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Qwen2ForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for path in tokenizer_files(tokenizer):
        shutil.copy(path, folder)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if name != "lm_head.weight":
            part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
            files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, named in files.items():
        made = {}
        for name, shape in named.items():
            norm = name.endswith("norm.weight")
            made[name] = torch.ones(shape) if norm else torch.empty(shape).normal_(std=0.02)
            made[name] = made[name].bfloat16()
        save_file(made, folder / file, {"format": "pt"})
    weight_map = {name: file for file, named in files.items() for name in named}
    total = 2 * sum(math.prod(shape) for name, shape in shapes.items() if name != "lm_head.weight")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def limited(script: str, flags: list[str], limit_gb: float | None) -> None:
    """Run a script of the project in a control group of its own, with a limit, if one is given."""
    group = None if limit_gb is None else make_group(int(limit_gb * 1e9))

    def enter() -> None:
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        done = subprocess.run([sys.executable, str(PROJECT / script), *flags], preexec_fn=enter, check=False)
    finally:
        if group:
            group.rmdir()
    if done.returncode:
        sys.exit(f"{script} ended with status {done.returncode}")


def make_group(limit: int) -> Path:
    """A control group below that of this process, with a memory limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        elif not controllers and (Path("/sys/fs/cgroup") / "cgroup.controllers").exists():
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        else:
            continue
        group = root / path.lstrip("/") / f"conversation-{os.getpid()}"
        try:
            group.mkdir(exist_ok=True)
            (group / name).write_text(str(limit))
        except OSError as error:
            sys.exit(f"{group / name}: {error.strerror}; run it as root, or without --limit_gb")
        return group
    sys.exit("there are no control groups for memory here: run it without --limit_gb")


if __name__ == "__main__":
    main()
