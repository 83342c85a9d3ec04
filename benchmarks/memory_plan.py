#!/usr/bin/env python3
"""Was the memory plan right? Plan a training, take some steps, and compare with the peak.

    benchmarks/memory_plan.py                                    8 examples a step, on the embedded stand-in
    benchmarks/memory_plan.py --tokens 2048 --cuda_memory_gb 6   long examples of random tokens, on a GPU with 6 GB
    benchmarks/memory_plan.py --frozen_weights bfloat16          the base's weights held in bfloat16

Model, plan and steps are those of train_conversation.py (which adds TRL's Trainer around them).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.training_step import EXAMPLES, limit_cuda_memory, make_batches  # noqa: E402
from conversation.errors import TRIED_AND_FAILED, CommandLine, UserError, run_main  # noqa: E402
from conversation_config import STAND_IN, TrainingConfig, set_up_libraries  # noqa: E402


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--base_model", default=STAND_IN, help="hub name or local folder (default: %(default)s)")
    parser.add_argument("--training_data", type=Path, default=PROJECT / "data" / "conversation_trees")
    parser.add_argument("--tokens", type=int, help="examples of that many random tokens instead of the training data")
    parser.add_argument("--steps", type=int, default=3, help="steps to take (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which examples make up the steps")
    parser.add_argument("--frozen_weights", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--cuda_memory_gb", type=float, help="on a GPU: use no more memory than this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    set_up_libraries()
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        found = plan_and_measure(args)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise UserError("out of memory: not even one example passes alone", "", TRIED_AND_FAILED) from None
    print(json.dumps(found) if args.json else sentence(found))
    return 0


def plan_and_measure(args: Any) -> dict[str, Any]:
    """The plan of a training, by its parts, and the peak of its first steps, in bytes."""
    import torch

    from conversation.models.adapters import add_adapters
    from conversation.models.base_models import find_base_model
    from conversation.models.device import training_device
    from conversation.training.memory import peak_memory_gb
    from conversation.training.memory_plan import load_frozen, plan_memory
    from conversation.training.micro_batches import backward_in_micro_batches, measure_token_budget
    from conversation.training.shared_prefix import use_shared_prefix_attention

    torch.backends.cuda.matmul.allow_tf32 = False
    limit_cuda_memory(args.cuda_memory_gb)
    base_folder = find_base_model(args.base_model)
    config = TrainingConfig(base_model=args.base_model, frozen_weights=args.frozen_weights)
    batches = make_batches(base_folder, args, args.steps)
    model = add_adapters(load_frozen(base_folder, config), config).to(training_device()).train()
    use_shared_prefix_attention(model)
    budget = measure_token_budget(model)
    steps = [list(range(start, start + EXAMPLES)) for start in range(0, EXAMPLES * len(batches), EXAMPLES)]
    plan = plan_memory(model, [example for batch in batches for example in batch], steps, budget)
    tokens = budget.tokens
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    for batch in batches:
        backward_in_micro_batches(model, batch, 1 / sum(sum(each.is_label) for each in batch), budget)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "device": training_device(),
        "cuda_memory_gb": args.cuda_memory_gb,
        "tokens": args.tokens,
        "plan": dataclasses.asdict(plan),
        "plan_gb": plan.total / 1e9,
        "peak_gb": peak_memory_gb(),
        "budget_tokens": tokens,
        "budget_halved": budget.tokens != tokens,
    }


def sentence(found: dict[str, Any]) -> str:
    """For people."""
    plan, peak = found["plan_gb"], found["peak_gb"]
    halved = "; memory ran out in a step, which passed in smaller parts" if found["budget_halved"] else ""
    return (
        f"plan {plan:.2f} GB, peak {peak:.2f} GB: the plan was {plan / peak - 1:+.0%} off; weights in "
        f"{found['plan']['frozen_weights']}, passes of at most {found['budget_tokens']} tokens{halved}"
    )


if __name__ == "__main__":
    run_main(main)
