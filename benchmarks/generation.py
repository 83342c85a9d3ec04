#!/usr/bin/env python3
"""Seconds for the free answers of many prompts: transformers' `generate`, and the project's own batch.

    benchmarks/generation.py MERGED_MODEL                              50 held-out questions, 60 and 300 tokens
    benchmarks/generation.py MERGED_MODEL --methods greedy sampled     both decodings of each question
    benchmarks/generation.py MERGED_MODEL --ways ours                  one way alone: its peak memory means something

Both ways answer the same questions in the same process, in turn, `--rounds` times; the ratio is the median of the
rounds' ratios. Greedy answers of both ways are compared; a few may differ after a tie of two tokens in FP32.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from conversation.errors import CommandLine, run_main  # noqa: E402
from conversation_config import EVALUATION_QUESTIONS, MAX_NEW_TOKENS, set_up_libraries  # noqa: E402

WAYS = ("transformers", "ours")


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("model", type=Path, help="a merged folder")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, nargs="+", default=[60, MAX_NEW_TOKENS], help="the longest answer")
    parser.add_argument("--methods", nargs="+", choices=("greedy", "sampled"), default=["greedy"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    set_up_libraries()
    import torch

    from conversation.answering import decoding
    from conversation.data.questions import read_held_out
    from conversation.models.merged_model import load_verified
    from conversation.models.tokenizer import encode_prompt

    model, tokenizer = load_verified(args.model)
    cases = [case for path in EVALUATION_QUESTIONS for case in read_held_out(path)]
    step = max(1, len(cases) // args.prompts)  # spread over both files
    prompts = [case.prompt for case in cases[::step]][: args.prompts]
    methods = [decoding.Decoding(method) for method in args.methods]
    ids = [tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    print(f"{len(prompts)} prompts, {sum(map(len, ids))} tokens, {torch.get_num_threads()} threads, {model.device}")
    for tokens in args.tokens:
        decoding.MAX_NEW_TOKENS = tokens
        seconds: dict[str, list[float]] = {way: [] for way in args.ways}
        greedy = {}
        for _ in range(args.rounds):
            for way in args.ways:
                start = time.monotonic()
                if way == "ours":
                    found = decoding.generate_with_each(model, tokenizer, prompts, methods)
                else:
                    found = {each: decoding._by_transformers(model, tokenizer, ids, each) for each in methods}
                seconds[way].append(time.monotonic() - start)
                greedy[way] = found.get(decoding.GREEDY)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
                said = sum(len(answer) for answers in found.values() for answer in answers)
                print(f"{tokens} tokens, {way}: {seconds[way][-1]:.1f} s for {said}; {peak:.2f} GB so far", flush=True)
        if len(args.ways) == 2:
            ratio = median(theirs / ours for theirs, ours in zip(*(seconds[way] for way in WAYS), strict=True))
            same = sum(a == b for a, b in zip(*(greedy[way] or [] for way in WAYS), strict=True))
            print(
                f"{tokens} tokens: {ratio:.2f} times as fast; {same} of {len(greedy['ours'] or [])} greedy ones equal"
            )
    return 0


if __name__ == "__main__":
    run_main(main)
