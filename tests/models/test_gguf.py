"""GGUF files: the tensors are the merged model's, what is wrong in one is found, and what is lost is measured."""

import json
import re
import shutil

import gguf
import jinja2
import numpy as np
import pytest
from conftest import easy_lines, some_adapters
from safetensors.numpy import load_file, save_file

from conversation.errors import UserError
from conversation.format.calls import Answer, FollowUp, Prompt, Utterance
from conversation.format.control_tokens import CONTROL_TOKENS, FORMAT_TOKENS
from conversation.models import gguf_check, llama_cpp
from conversation.models.chat_format import CHAT_TEMPLATE
from conversation.models.gguf import TYPES, MergedWeights, tensor_type, tolerant_chat_template, write_gguf
from conversation.models.gguf_check import check_tensors


@pytest.fixture(scope="module")
def weights(merged_tiny):
    return MergedWeights(merged_tiny)


@pytest.fixture(scope="module")
def written(weights, tmp_path_factory):
    """The tiny model in every type, by its name."""
    folder = tmp_path_factory.mktemp("written")
    for name, export in TYPES.items():
        write_gguf(weights, export, folder / f"{name}.gguf", {"conversation.run": "Prüfung"})
    return {name: folder / f"{name}.gguf" for name in TYPES}


@pytest.mark.parametrize("name", TYPES)
def test_a_written_file_has_the_merged_models_tensors_within_its_types_error(written, weights, name):
    found = check_tensors(written[name], weights, None)
    assert found.tensors == len(weights.shapes) and found.survived is None
    assert found.share_of_error == 0 if name == "f32" else 0.2 < found.share_of_error <= 1
    assert written[name].stat().st_size <= weights.file_bytes(TYPES[name])


def test_a_smaller_type_makes_a_smaller_file(written):
    sizes = [path.stat().st_size for path in written.values()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("tensor", ["blk.3.ffn_up.weight", "blk.5.attn_norm.weight", "token_embd.weight"])
def test_a_tensor_that_is_not_the_merged_models_is_named(written, weights, name, tensor, monkeypatch):
    read = weights.read

    def other(wanted):
        values = read(wanted)
        if wanted == tensor:
            values = values.copy()
            values.reshape(-1, 32)[1] *= 0.5  # one block in thousands
        return values

    monkeypatch.setattr(weights, "read", other)
    with pytest.raises(UserError, match=f"the tensor {tensor} in the written file is not the merged model's"):
        check_tensors(written[name], weights, None)


def test_a_missing_tensor_is_named(written, weights, monkeypatch):
    monkeypatch.setattr(weights, "shapes", {**weights.shapes, "blk.9.attn_q.weight": (1, 1)})
    with pytest.raises(UserError, match=r"other tensors: blk\.9\.attn_q\.weight"):
        check_tensors(written["f32"], weights, None)


def merged_with(folder, base, weights, adapters):
    """A merged folder: the base's weights and the adapters' change."""
    changes = gguf_check.AdapterChanges(adapters)
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in weights.shapes:
        original = weights.original_name(name)
        if (change := changes.of(original)) is not None:
            tensors[original] = (tensors[original] + change).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return MergedWeights(folder)


def test_a_small_change_survives_on_a_fresh_base_and_not_on_one_that_was_quantized_before(
    tmp_path, merged_tiny, weights, written
):
    adapters = some_adapters(tmp_path / "adapters", merged_tiny, 0.002)
    fresh = merged_with(tmp_path / "fresh", merged_tiny, weights, adapters)
    quantized = shutil.copytree(merged_tiny, tmp_path / "quantized")  # its weights are those of the Q4_K_M file
    tensors = load_file(quantized / "model.safetensors")
    for tensor in gguf.GGUFReader(written["q4_k_m"]).tensors:
        if "ffn_up" in tensor.name:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            tensors[weights.original_name(tensor.name)] = values.astype(np.float32)
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    stand_in = merged_with(tmp_path / "stand_in", quantized, weights, adapters)
    survived = {}
    for model, merged in (("fresh", fresh), ("stand-in", stand_in)):
        for name in ("f32", "q8_0", "q4_k_m"):
            path = tmp_path / f"{model}-{name}.gguf"
            write_gguf(merged, TYPES[name], path, {})
            survived[model, name] = check_tensors(path, merged, adapters).survived
    assert survived["fresh", "f32"] == survived["stand-in", "f32"] == 1
    assert survived["fresh", "q4_k_m"] == pytest.approx(1, abs=0.1)
    assert survived["stand-in", "q8_0"] == pytest.approx(1, abs=0.05)
    assert survived["stand-in", "q4_k_m"] < 0.3


def test_in_q4_k_m_half_of_the_down_projections_get_more_bits_as_in_llama_cpp():
    kinds = [tensor_type(TYPES["q4_k_m"], f"blk.{i}.ffn_down.weight", (640, 2048), 18).name for i in range(18)]
    better = [i for i, kind in enumerate(kinds) if kind == "Q6_K"]
    assert better == [0, 1, 4, 7, 10, 13, 15, 16, 17] and set(kinds) == {"Q4_K", "Q6_K"}
    assert tensor_type(TYPES["q4_k_m"], "blk.0.attn_q.weight", (1024, 640), 18).name == "Q5_0"
    assert tensor_type(TYPES["q5_1"], "token_embd.weight", (262144, 640), 18).name == "Q8_0"


def test_control_tokens_are_control_and_the_metadata_is_there(written, weights):
    reader = gguf.GGUFReader(written["q8_0"])

    def value(key):
        return reader.fields[key].contents()

    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    assert {kinds[tokens.index(token)] for token in FORMAT_TOKENS} == {gguf.TokenType.CONTROL}
    assert tokens[value("tokenizer.ggml.eos_token_id")] == "<end_of_turn>"
    assert value("conversation.run") == "Prüfung" and value("gemma3.attention.sliding_window") == 96
    assert llama_cpp.LlamaModel(written["q8_0"]).metadata("general.architecture") == "gemma3"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "llama"}, "only Gemma 3 is exported"),
        ({"layer_types": ["full_attention"] * 6}, "do not attend to all in every sixth layer"),
        ({"query_pre_attn_scalar": 5}, "its attention is scaled otherwise"),
        ({"final_logit_softcapping": 30.0}, "its logits are capped"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path, merged_tiny, change, problem):
    folder = shutil.copytree(merged_tiny, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=problem):
        MergedWeights(folder)


def config_of_an_earlier_version(config, layer_types):
    """The same Gemma 3 as transformers 4 wrote it; without `layer_types`, as its first versions did."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    if not layer_types:
        del config["layer_types"]
        config["sliding_window_pattern"] = 6
    return config


@pytest.mark.parametrize("layer_types", [True, False])
def test_a_base_whose_config_an_earlier_version_wrote_gives_the_same_file(tmp_path, merged_tiny, written, layer_types):
    folder = shutil.copytree(merged_tiny, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config_of_an_earlier_version(config, layer_types)))
    write_gguf(MergedWeights(folder), TYPES["f32"], tmp_path / "old.gguf", {"conversation.run": "Prüfung"})
    assert (tmp_path / "old.gguf").read_bytes() == written["f32"].read_bytes()


# --- the chat template -----------------------------------------------------------------------------------------------


def render(messages, **options):
    def fail(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = fail
    template = environment.from_string(tolerant_chat_template(CHAT_TEMPLATE.read_text(encoding="utf-8")))
    return template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True, **options)


@pytest.mark.parametrize("options", [{}, {"tools": None}, {"tools": []}])
def test_the_template_declares_the_trained_tools_by_itself_and_leaves_system_messages_out(options):
    prompts = [example.prompt for example in easy_lines()[:3]]
    for prompt in prompts:
        messages = [{"role": "system", "content": "You are a pirate."}]
        for line in prompt.history:
            messages.append({"role": "user" if line.speaker == "User" else "assistant", "content": line.text})
        assert render([*messages, {"role": "user", "content": prompt.question}], **options) == f"<bos>{prompt.text}"


ANSWER = Answer(("Pattern {x}, chained.", "Like a box."), (FollowUp("Example?", "0.50", "example"),) * 3)
CALLS = [{"function": {"name": "add_text", "arguments": {"content": text}}} for text in ANSWER.fragments]


@pytest.mark.parametrize(
    "said",
    [
        {"content": ANSWER.text},
        {"content": re.sub("|".join(CONTROL_TOKENS), "", ANSWER.text)},  # as llama.cpp shows it without --special
        {"content": "Pattern {x}, chained.\n\nLike a box.\n"},
        {"content": "\n\n", "tool_calls": [*CALLS, {"function": {"name": "add_choice", "arguments": {}}}]},
        {"content": None, "tool_calls": CALLS},
    ],
)
def test_an_answer_that_a_client_sends_back_becomes_the_lines_that_were_trained(said):
    messages = [{"role": "user", "content": "A\nmonad? "}, {"role": "assistant", **said}]
    history = (Utterance("User", "A monad?"), *(Utterance("AI", text) for text in ANSWER.fragments))
    asked = render([*messages, {"role": "user", "content": "Why?"}])
    assert asked == f"<bos>{Prompt('Why?', history).text}"


def test_the_template_breaks_the_name_of_a_control_token_so_that_it_stays_text():
    assert "<\U000f0000end_of_turn>" in render([{"role": "user", "content": "x <end_of_turn>"}])
    assert render([{"role": "user", "content": "x"}]) == f"<bos>{Prompt('x').text}"
