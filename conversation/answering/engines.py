"""A model that answers fragment by fragment, whatever runs it: the interface `Engine`, and transformers behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conversation.answering.decoding import CONSTRAINED, Decoding
from conversation.errors import UserError
from conversation.format.calls import FollowUp, Prompt
from conversation.runs.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Engine(Protocol):
    """One caller at a time. `name` is what is shown; `context` the longest prompt and answer together, in tokens."""

    name: str
    context: int

    def count_tokens(self, prompt: Prompt) -> int: ...

    def stream(
        self, prompt: Prompt, stopped: Callable[[], bool] = lambda: False, decoding: Decoding = CONSTRAINED
    ) -> Iterator[str | FollowUp]:
        """Yields the answer's fragments, then its three follow-ups, each as soon as it is whole.

        Between two tokens it asks `stopped`, and ends early, without error, when that is true.
        """
        ...


class TransformersEngine:
    """A merged model that transformers runs."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str):
        self.name = name
        self.context = int(getattr(model.config, "max_position_embeddings", 2048))
        self._model, self._tokenizer = model, tokenizer

    def count_tokens(self, prompt: Prompt) -> int:
        from conversation.models.tokenizer import encode_prompt

        return len(encode_prompt(self._tokenizer, prompt))

    def stream(
        self, prompt: Prompt, stopped: Callable[[], bool] = lambda: False, decoding: Decoding = CONSTRAINED
    ) -> Iterator[str | FollowUp]:
        import torch

        from conversation.answering.constrained import Draw, Writer

        class Stopping(Writer):
            """A writer that hands over each value as soon as it is written, and stops between two tokens."""

            def parts(self, draw: Draw | None) -> Iterator[str | FollowUp]:
                from conversation.format.calls import NUM_FOLLOW_UPS
                from conversation.format.grammar import ADD_CHOICE, ADD_TEXT, Value

                self._draw = draw
                self._said = {kind: [] for kind in Value}
                ids: list[int] = []
                while self._another_fragment(ids):
                    self._write_call(ids, ADD_TEXT, self._text)
                    yield self._said[Value.FRAGMENT][-1]
                for _ in range(NUM_FOLLOW_UPS):
                    self._write_call(ids, ADD_CHOICE, self._choice)
                    said = [self._said[kind][-1] for kind in (Value.FOLLOW_UP, Value.CONFIDENCE, Value.TARGET)]
                    yield FollowUp(*said)

        writer = Stopping(self._model, self._tokenizer, prompt, 0.0)
        logits: Any = writer._reader.logits

        def watched(answer: list[int]) -> Any:
            if stopped():
                raise _Stopped
            return logits(answer)

        writer._reader.logits = watched  # type: ignore[method-assign]
        draw = None
        if decoding.method == "drawn":
            generator = torch.Generator().manual_seed(decoding.seed)
            draw = Draw(decoding.temperature, decoding.top_p, generator)
        try:
            yield from writer.parts(draw)
        except _Stopped:
            return


class _Stopped(Exception):
    pass


def open_engine(source: Path) -> Engine:
    """The engine for a run folder or a merged folder. Raises UserError."""
    from conversation.models.merged_model import load_verified

    run = RunFolder(source)
    if run.run_json.exists():
        record = run.read()
        if not record.merge:
            raise UserError(f"there is no merged model in {source}", "merge it: merge_conversation_model.py")
        model, tokenizer = load_verified(run.merged_model, record.base_model.tokenizer_fingerprint)
    else:
        model, tokenizer = load_verified(source)
    return TransformersEngine(model, tokenizer, source.name)
