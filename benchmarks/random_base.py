#!/usr/bin/env python3
"""Make a Gemma 3 with random weights, as an ordinary model folder: for measurements where no weights can be fetched.

    benchmarks/random_base.py FOLDER             the shape of Gemma 3 270M, vocabulary 262,144; 0.54 GB in bfloat16
    benchmarks/random_base.py FOLDER --tiny      four small layers, to try a measurement out

Both kinds of attention are in it, as in the real one. The tokenizer has the control tokens and a few words: it makes
the folder one that every script takes, and no text is measured with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conversation.errors import CommandLine, run_main
from conversation.format.control_tokens import CONTROL_PATTERN, CONTROL_TOKENS
from conversation_config import set_up_libraries

GEMMA_3_270M: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32_768,
}
"""google/gemma-3-270m, from its public config.json."""
TINY: dict[str, Any] = GEMMA_3_270M | {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}


def main() -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("folder", type=Path, help="where to; it must not exist yet")
    parser.add_argument("--tiny", action="store_true", help="a small one")
    args = parser.parse_args()
    make_base(args.folder, TINY if args.tiny else GEMMA_3_270M)
    return 0


def make_base(folder: Path, shape: dict[str, Any]) -> None:
    """A model folder with random weights in bfloat16, the same each time."""
    set_up_libraries()
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from conversation.models.tokenizer import PROBES

    make_tokenizer(folder, [probe.text for probe in PROBES])
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, **ids, tie_word_embeddings=True))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def make_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """A byte-fallback BPE tokenizer in Gemma's manner, trained on `texts`, as files in `folder`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    first = ["<pad>", "<eos>", "<bos>", "<unk>"]
    special = [*first, *(token for token in CONTROL_TOKENS if token not in first)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    literal = [part for text in texts for part in CONTROL_PATTERN.split(text)]
    tokenizer.train_from_iterator(
        literal, trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    )
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    content["model"]["merges"] = [  # as in Gemma's: every pair that makes a token, in the order of the ids
        [name[:cut], name[cut:]]
        for name in sorted(vocabulary, key=vocabulary.__getitem__)
        if name not in special
        for cut in range(1, len(name))
        if name[:cut] in vocabulary and name[cut:] in vocabulary
    ]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    fast.save_pretrained(folder)


if __name__ == "__main__":
    run_main(main)
