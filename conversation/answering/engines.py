"""One interface to a model that answers within the grammar, whichever program runs it.

- a merged folder, or a run folder: transformers, in FP32, on the GPU if there is one
- a .gguf file (export_conversation_model.py makes it): llama.cpp, through the package xllamacpp

Both write the same answer where they compute the same: one `Writer` chooses the tokens, the programs give the logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from conversation.answering.allowed_tokens import AllowedTokens
from conversation.answering.asking import check_room
from conversation.answering.constrained import Writer, Written
from conversation.answering.decoding import CONSTRAINED, Decoding
from conversation.answering.prefix_cache import Memory, PrefixCache, Stopped
from conversation.answering.vocabulary import FINGERPRINT_KEY, TransformersVocabulary, Vocabulary, fingerprint
from conversation.errors import UserError
from conversation.format.calls import Prompt, Utterance
from conversation.format.control_tokens import END_OF_TURN, Control
from conversation.format.grammar import RESTATE
from conversation.models.tokenizer import common_prefix_length
from conversation.runs.export_record import read_export
from conversation.runs.files import find_damage, shown
from conversation.runs.folder import RunFolder
from conversation_config import MAX_NEW_TOKENS, set_up_libraries

CONTEXT = 2048
"""Tokens of prompt and answer together, at most: the longest that the training takes, unless it is told otherwise."""
CELLS = 2 * CONTEXT
"""Tokens that llama.cpp keeps, of all prompts together; with Gemma 3 270M and FP16, 18 kB each."""
WITHIN_THE_GRAMMAR = ("constrained", "drawn", "contrast")


def never() -> bool:
    return False


class Engine(Protocol):
    """A model that answers. One caller at a time.

    `name`: what is shown. `program`: what it runs in, for people. `device`: where it computes, and why. `context`: in
    tokens, the longest prompt with MAX_NEW_TOKENS for its answer. The grammar bounds an answer in characters: one that
    is written letter by letter takes more tokens, and is written to its end.
    """

    name: str
    program: str
    device: str
    context: int

    def count_tokens(self, prompt: Prompt) -> int: ...

    def stream(
        self, prompt: Prompt, stopped: Callable[[], bool] = never, decoding: Decoding = CONSTRAINED
    ) -> Iterator[Written]:
        """Yields the calls of the answer's fragments, then of its three follow-ups, each as soon as it is whole.

        Between two tokens it asks `stopped`, and ends early, without an error, when that is true. Raises TooLong for a
        prompt that leaves no room for an answer, ValueError for a decoding outside the grammar.
        """

    def warm_up(self) -> None:
        """Read what all prompts begin with, so that the first question need not wait for it."""


class GrammarEngine:
    """An engine from a vocabulary and an empty memory of a model."""

    def __init__(
        self, name: str, program: str, device: str, context: int, vocabulary: Vocabulary, empty: Callable[[], Memory]
    ) -> None:
        self.name, self.program, self.device, self.context = name, program, device, context
        self.vocabulary = vocabulary
        self._tokens = AllowedTokens(vocabulary)
        self._cache = PrefixCache(empty)

    def count_tokens(self, prompt: Prompt) -> int:
        return len(self.vocabulary.encode_prompt(prompt))

    def stream(
        self, prompt: Prompt, stopped: Callable[[], bool] = never, decoding: Decoding = CONSTRAINED
    ) -> Iterator[Written]:
        if decoding.method not in WITHIN_THE_GRAMMAR:
            raise ValueError(f"an engine answers {' or '.join(WITHIN_THE_GRAMMAR)}, not {decoding.method}")
        contexts = [self._encoded(each) for each in decoding.prompts(prompt)]
        try:
            with self._cache.reader(contexts, stopped) as reader:
                calls = Writer(reader, self._tokens, decoding.contrast).calls(decoding.draw(0, *contexts[0]))
                yield from (written for written in calls if written.call is not RESTATE)  # of no use to a reader
        except Stopped:
            return

    def greedy(self, prompt: Prompt) -> list[int]:
        """The ids of the likeliest answer, free to leave the format, as `decoding.GREEDY`: up to and including
        `<end_of_turn>`, at most MAX_NEW_TOKENS."""
        (end,) = self.vocabulary.encode([Control(END_OF_TURN)])
        context = self._encoded(prompt)
        answer: list[int] = []
        with self._cache.reader([context[:-1]], never) as reader:
            while len(answer) < MAX_NEW_TOKENS and end not in answer[-1:]:
                answer.append(int(reader.logits([context[-1], *answer])[0].argmax()))
        return answer

    def warm_up(self) -> None:
        root, child = Prompt("x"), Prompt("x", (Utterance("User", "x"),))
        start = self.vocabulary.encode_prompt(root)
        start = start[: common_prefix_length(start, self.vocabulary.encode_prompt(child))]
        with self._cache.reader([start], never) as reader:
            reader.read_contexts()

    def _encoded(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt. Raises TooLong when no answer fits behind it."""
        ids = self.vocabulary.encode_prompt(prompt)
        check_room(len(ids), self.context)
        return ids


def open_engine(source: Path, device: str | None = None) -> GrammarEngine:
    """The engine for a .gguf file, a merged folder or a run folder. `device`: --device; a .gguf file needs the CPU.

    Of a run folder, an exported file is taken if there is one of this model and llama.cpp is installed: the best
    (`Export.best_first`). Raises UserError when there is no model, when it is broken, when it is another one, and when
    it cannot compute on that device.
    """
    if not source.exists():
        raise UserError(f"there is no model at {shown(source)}", "name a run folder, a merged folder or a .gguf file")
    source = source.resolve()
    if source.is_file():
        return _llama_cpp(source, source.stem, device)
    run = RunFolder(source)
    if not run.run_json.exists():
        return _transformers(source, source.name, None, device)
    record = run.read()
    if not record.merge:
        raise UserError(f"there is no merged model in {shown(source)}", "merge it: merge_conversation_model.py")
    if file := _exported(run, record.merge.files):
        return _llama_cpp(file, f"{source.name}, {file.stem.rpartition('-')[2]}", device)
    return _transformers(run.merged_model, source.name, record.base_model.tokenizer_fingerprint, device)


def _exported(run: RunFolder, merged: dict[str, str]) -> Path | None:
    """The best exported file of a run's merged model. Raises UserError when it is not what was verified."""
    export = read_export(run.export_json)
    if export is None or export.model_files != merged or find_spec("xllamacpp") is None:
        return None
    if not (best := export.best_first()):
        return None
    if damage := find_damage(run.exported, {best[0].file: best[0].sha256}):
        raise UserError(f"the exported model is broken: {damage}", "export it again: export_conversation_model.py")
    return run.exported / best[0].file


def _transformers(folder: Path, name: str, fingerprint: str | None, device: str | None) -> GrammarEngine:
    set_up_libraries()
    from conversation.answering.reading import TransformersMemory
    from conversation.models.device import use_device
    from conversation.models.merged_model import load_verified

    used = str(use_device(device))
    model, tokenizer = load_verified(folder, fingerprint)
    longest = getattr(model.config, "max_position_embeddings", CONTEXT)
    program = f"transformers, FP32, {model.device.type}"
    vocabulary = TransformersVocabulary(tokenizer)
    return GrammarEngine(name, program, used, min(CONTEXT, longest), vocabulary, lambda: TransformersMemory(model))


def _llama_cpp(path: Path, name: str, device: str | None) -> GrammarEngine:
    """Raises UserError when the file is no GGUF, is of another model, or has another tokenizer than the training."""
    if device == "cuda":
        raise UserError(
            f"--device cuda, but llama.cpp computes on the CPU here, and {shown(path)} is for llama.cpp",
            "leave --device out, or name a merged folder with --model",
        )
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{shown(path)} is not a GGUF file", "export_conversation_model.py makes one")
    from conversation.answering.llama_cpp_reading import SEQUENCES, GgufVocabulary, LlamaMemories
    from conversation.models.llama_cpp import LlamaModel

    model = LlamaModel(path)
    vocabulary = GgufVocabulary(model, path)
    trained = model.metadata(FINGERPRINT_KEY)
    if trained != (found := fingerprint(vocabulary)):
        raise UserError(
            f"the tokenizer in {shown(path)} is not that of the training: fingerprint {found[:12]}, expected "
            f"{trained[:12] if trained else 'one, and the file has none'}",
            "name a file that export_conversation_model.py made",
        )
    exact = model.metadata("general.file_type") == "0"  # all FP32
    model.make_context(CELLS, SEQUENCES, exact, threads())
    program = f"llama.cpp, {model.metadata('general.size_label') or path.suffix}"
    context = min(CONTEXT, model.longest)
    return GrammarEngine(name, program, "cpu (llama.cpp)", context, vocabulary, LlamaMemories(model).empty)


def threads() -> int:
    """Threads for llama.cpp: OMP_NUM_THREADS, or the cores that this process may use. Its threads spin while they
    wait, so that more of them than there are free cores take several times as long."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdecimal() and int(named) > 0:
        return int(named)
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
