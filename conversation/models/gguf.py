"""Writes a merged model as a GGUF file, for llama.cpp and Ollama.

Gemma 3 only, in the layout of llama.cpp's own converter: names of tensors, norm weights plus 1, a vocabulary of type
`llama` with scores in the order of the ids. Control tokens are of type CONTROL: typed by a user, they stay text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from conversation.errors import UserError
from conversation.format import calls
from conversation.format.messages import TOOLS
from conversation.models.llama_cpp import quantize
from conversation.models.weights import text_config
from conversation.runs.files import read_json, shown
from conversation_config import EXPORT_TYPES

SWA_PERIOD = 6
"""Every sixth layer attends to all: llama.cpp computes Gemma 3 so, whatever its file says."""
TOLERANT_MESSAGES = Path(calls.__file__).with_name("tolerant_messages.jinja")
VOCABULARY_BYTES = 12_000_000  # tokens, scores, types and metadata of Gemma's vocabulary; at most
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0, Type.Q5_1: Type.F16, Type.Q8_0: Type.F16, Type.Q5_0: Type.F16}
"""Where rows are no whole number of blocks: of 256 for the K types, of 32 for the others."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class ExportType:
    """A type of file: what llama.cpp calls it, and the type of most of its matrices."""

    name: str
    file_type: gguf.LlamaFileType
    matrices: Type


_FILE_TYPES = (
    (gguf.LlamaFileType.ALL_F32, Type.F32),
    (gguf.LlamaFileType.MOSTLY_F16, Type.F16),
    (gguf.LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    (gguf.LlamaFileType.MOSTLY_Q5_1, Type.Q5_1),
    (gguf.LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
)
TYPES = {name: ExportType(name, *types) for name, types in zip(EXPORT_TYPES, _FILE_TYPES, strict=True)}


def tensor_type(export: ExportType, name: str, shape: tuple[int, ...], layers: int) -> Type:
    """The type of a tensor, by llama.cpp's rules (llama_tensor_get_type) for models of this kind.

    Vectors stay F32. The embeddings, which are the head, too, are Q6_K in any quantized file but Q8_0. In Q4_K_M half
    of the value and down projections are Q6_K.
    """
    if len(shape) < 2:
        return Type.F32
    wanted = export.matrices
    if wanted in (Type.Q5_1, Type.Q4_K) and name == "token_embd.weight":
        wanted = Type.Q6_K
    elif wanted is Type.Q4_K and re.search(r"attn_v|ffn_down", name):
        layer = int(name.split(".")[1])
        if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
            wanted = Type.Q6_K
    while shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        wanted = FALLBACKS[wanted]
    return wanted


class MergedWeights:
    """The tensors of a merged Gemma 3 folder, by their names and with their values in GGUF, all in FP32.

    Raises UserError for another architecture, and for a Gemma 3 that llama.cpp would compute otherwise.
    """

    def __init__(self, folder: Path):
        self.config: dict[str, Any] = text_config(folder).to_dict()
        if self.config.get("model_type") != "gemma3_text":
            raise UserError(
                f"only Gemma 3 is exported, and {shown(folder)} is {self.config.get('model_type')!r}",
                "llama.cpp's own convert_hf_to_gguf.py knows other models",
            )
        self.folder = folder
        self.layers: int = self.config["num_hidden_layers"]
        self._check_config()
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, self.layers)
        self._places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for name, shape in _shapes(path).items():
                found = names.get_name(name, try_suffixes=(".weight",))
                if found is None:
                    raise UserError(f"{path} has a tensor that Gemma 3 does not know: {name}", "merge the model again")
                self._places[found], self.shapes[found] = (path, name), shape
        if "output.weight" in self.shapes:
            raise UserError(f"the embeddings of {shown(folder)} are not tied", "Gemma 3 in llama.cpp has no other head")

    def _check_config(self) -> None:
        config = self.config
        expected = [
            "full_attention" if i % SWA_PERIOD == SWA_PERIOD - 1 else "sliding_attention" for i in range(self.layers)
        ]
        problems = []
        if config["layer_types"] != expected:
            problems.append("its layers do not attend to all in every sixth layer")
        if config.get("query_pre_attn_scalar") != config.get("head_dim"):
            problems.append("its attention is scaled otherwise")
        if config.get("attn_logit_softcapping") or config.get("final_logit_softcapping"):
            problems.append("its logits are capped")
        if any(rope.get("rope_type", "default") != "default" for rope in config["rope_parameters"].values()):
            problems.append("its positions are scaled")
        if problems:
            raise UserError(
                f"llama.cpp computes {shown(self.folder)} otherwise: {'; '.join(problems)}", "serve the merged folder"
            )

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor's values as the file has them: norm weights plus 1."""
        from safetensors import safe_open

        path, original = self._places[name]
        with safe_open(path, "numpy") as file:
            values = file.get_tensor(original).astype(np.float32, copy=False)
        return values + np.float32(1) if original.endswith("norm.weight") else values

    def original_name(self, name: str) -> str:
        """What the merged folder calls a tensor."""
        return self._places[name][1]

    def file_bytes(self, export: ExportType) -> int:
        """How long the file will be, at most."""
        return VOCABULARY_BYTES + sum(
            _nbytes(tensor_type(export, name, shape, self.layers), shape) for name, shape in self.shapes.items()
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is broken: {error}", "merge the model again") from None


def _nbytes(kind: Type, shape: tuple[int, ...]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def write_gguf(weights: MergedWeights, export: ExportType, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the model as a GGUF file. `metadata`: further keys and their texts.

    Raises UserError for a tokenizer of another kind or a type that cannot be quantized, OSError when it cannot write.
    """
    writer = gguf.GGUFWriter(path, "gemma3")
    try:
        _write_config(writer, weights.config)
        writer.add_file_type(export.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_tokenizer(writer, weights.folder, weights.config["vocab_size"])
        template = (weights.folder / "chat_template.jinja").read_text(encoding="utf-8")
        writer.add_chat_template(tolerant_chat_template(template))
        writer.add_base_model_count(sum(key == "general.base_model.0.name" for key in metadata))
        for key, value in metadata.items():
            writer.add_string(key, value)
        kinds = {name: tensor_type(export, name, shape, weights.layers) for name, shape in weights.shapes.items()}
        for name, shape in weights.shapes.items():
            kind = kinds[name]
            stored = shape if kind in (Type.F32, Type.F16) else gguf.quant_shape_to_byte_shape(shape, kind)
            dtype = {Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.uint8)
            writer.add_tensor_info(
                name, stored, np.dtype(dtype), _nbytes(kind, shape), None if kind in (Type.F32, Type.F16) else kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in kinds.items():
            writer.write_tensor_data(_encoded(weights.read(name), kind))
    finally:
        writer.close()


def _encoded(values: NDArray[np.float32], kind: Type) -> NDArray[Any]:
    if kind is Type.F32:
        return values
    if kind is Type.F16:
        return values.astype(np.float16)
    size = _nbytes(kind, values.shape)
    return quantize(values, kind, size).reshape(gguf.quant_shape_to_byte_shape(values.shape, kind))


def _write_config(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])


def _write_tokenizer(writer: gguf.GGUFWriter, folder: Path, embeddings: int) -> None:
    """The vocabulary of tokenizer.json, filled up to the number of `embeddings`: a byte-fallback BPE in Gemma's manner.

    Raises UserError for another kind.
    """
    content = read_json(folder / "tokenizer.json")
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UserError(f"the tokenizer of {shown(folder)} is not one of Gemma's kind", "serve the merged folder")
    added = {token["id"]: token for token in content["added_tokens"]}
    names = {number: name for name, number in model["vocab"].items()}
    names |= {number: token["content"] for number, token in added.items()}
    tokens, kinds = [], []
    for number in range(max(names) + 1):
        name = names.get(number, f"<unused-{number}>")
        kind = gguf.TokenType.NORMAL if number in names else gguf.TokenType.UNUSED
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
        elif _BYTE.fullmatch(name):
            kind = gguf.TokenType.BYTE
        if kind == gguf.TokenType.USER_DEFINED:  # it is looked for in the text as it stands, before spaces become ▁
            name = name.replace("▁", " ")
        tokens.append(name.encode())
        kinds.append(kind)
    kinds[_id_of(names, model.get("unk_token"))] = gguf.TokenType.UNKNOWN
    missing = embeddings - len(tokens)
    tokens += [f"<unused-{len(tokens) + number}>".encode() for number in range(missing)]
    kinds += [gguf.TokenType.UNUSED] * missing
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    settings = read_json(folder / "tokenizer_config.json")
    generation = read_json(folder / "generation_config.json")
    writer.add_bos_token_id(_id_of(names, settings["bos_token"]))
    writer.add_pad_token_id(_id_of(names, settings["pad_token"]))
    writer.add_unk_token_id(_id_of(names, settings["unk_token"]))
    writer.add_eos_token_id(generation["eos_token_id"])  # the end of the turn: where every program stops
    writer.add_eot_token_id(generation["eos_token_id"])


def _id_of(names: Mapping[int, str], token: str | None) -> int:
    """The id of a token by its name."""
    return next(number for number, name in names.items() if name == token)


def tolerant_chat_template(template: str) -> str:
    """The chat template of a merged folder, for programs that ask less carefully (`tolerant_messages.jinja`).

    llama.cpp's server tries a template without tools before it starts: the trained ones are declared when none are
    given.
    """
    tools = [tool["function"] for tool in TOOLS]
    return (
        "{%- if not tools -%}{%- set tools = " + json.dumps(tools) + " -%}{%- endif -%}\n"
        f"{TOLERANT_MESSAGES.read_text(encoding='utf-8')}{template}"
    )
