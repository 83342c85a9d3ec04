"""Merging: the model on disk answers as base and adapters do, or it does not get its name."""

import json
import shutil

import pytest
import torch
from conftest import current_umask, easy_lines, run_script
from records import some_record
from safetensors.torch import load_file, save_file

from conversation.errors import UserError
from conversation.format.calls import Prompt
from conversation.models import merged_model, merging
from conversation.models.adapters import add_adapters
from conversation.models.weights import load_model
from conversation.runs.folder import RunFolder
from conversation_config import TrainingConfig

PROMPTS = [example.prompt for example in easy_lines()[:3]]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_folder):
    """Adapters that change the tiny model a good deal."""
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    torch.manual_seed(1)
    model = add_adapters(load_model(tiny_folder), TrainingConfig())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_folder, adapters):
    output = tmp_path_factory.mktemp("merged") / "merged_model_fp32"
    return output, merging.merge(tiny_folder, adapters, output, PROMPTS, {})


def test_the_merged_model_says_what_base_and_adapters_say(merged, tiny_folder, adapters):
    from peft import PeftModel

    output, result = merged
    assert result.largest_logit_difference < 1e-4 * result.largest_logit
    ids = torch.arange(5, 90)[None]
    with torch.no_grad():
        base = load_model(tiny_folder)
        plain = base(ids).logits
        with_adapters = PeftModel.from_pretrained(base, adapters).eval()(ids).logits
        found = load_model(output)(ids).logits
    assert torch.allclose(found, with_adapters, atol=1e-4)
    assert (with_adapters - plain).abs().max() > 0.1


def test_the_merged_folder_is_complete_tied_and_fp32(merged):
    output, result = merged
    weights = load_file(output / "model.safetensors")
    assert "lm_head.weight" not in weights and {t.dtype for t in weights.values()} == {torch.float32}
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    generation = json.loads((output / "generation_config.json").read_text())
    from conversation.models.tokenizer import load_tokenizer

    assert generation["eos_token_id"] == load_tokenizer(output).convert_tokens_to_ids("<end_of_turn>")
    assert set(result.files) == names - {merged_model.MANIFEST}
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o666 & ~current_umask()}


def test_a_folder_beside_the_tokenizer_is_not_copied_and_does_not_stop_the_merge(tmp_path, tiny_folder, adapters):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "tokenizer_old").mkdir()
    (base / "tokenizer_gone.json").symlink_to("nowhere")
    merging.merge(base, adapters, tmp_path / "merged", PROMPTS[:1], {})
    assert not (tmp_path / "merged" / "tokenizer_old").exists()


def test_merging_and_testing_use_the_device_of_the_training(tmp_path, tiny_folder, adapters, monkeypatch):
    asked = []

    def to(module, *arguments, **options):
        asked.append(arguments)
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    for each in (merging, merged_model):
        monkeypatch.setattr(each, "training_device", lambda: "cuda")
    merging.merge(tiny_folder, adapters, tmp_path / "merged", PROMPTS[:1], {})
    assert asked.count(("cuda",)) == 2  # base and adapters; the model read back
    merged_model.load_verified(tmp_path / "merged")
    assert asked.count(("cuda",)) == 3


def spoil(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_adapters_that_are_not_finite_leave_nothing_under_the_final_name(tmp_path, tiny_folder, adapters):
    bad = shutil.copytree(adapters, tmp_path / "bad")
    spoil(bad, lambda tensors: next(t for n, t in tensors.items() if "lora_B" in n).fill_(float("nan")))
    with pytest.raises(UserError, match="not finite"):
        merging.merge(tiny_folder, bad, tmp_path / "merged", PROMPTS, {})
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


def test_a_merge_that_changes_what_the_model_says_is_refused(tmp_path, tiny_folder, adapters, monkeypatch):
    save = merging._save

    def save_one_layer_wrong(model, *rest):
        model.get_decoder().layers[2].mlp.up_proj.weight.data[:16] = 0  # a mere factor would be normalised away
        save(model, *rest)

    monkeypatch.setattr(merging, "_save", save_one_layer_wrong)
    with pytest.raises(UserError, match="is not base"):
        merging.merge(tiny_folder, adapters, tmp_path / "merged", PROMPTS, {})
    assert not (tmp_path / "merged").exists()


def test_adapters_of_another_base_are_refused(tmp_path, tiny_folder, adapters):
    bad = shutil.copytree(adapters, tmp_path / "bad")
    spoil(bad, lambda tensors: tensors.update({n: torch.zeros(16, 99) for n in list(tensors) if "q_proj.lora_A" in n}))
    with pytest.raises(UserError, match="do not fit the base model"):
        merging.merge(tiny_folder, bad, tmp_path / "merged", PROMPTS, {})


def test_a_merge_before_the_training_is_finished_is_refused(tmp_path):
    RunFolder(tmp_path).write(some_record())
    done = run_script("merge_conversation_model.py", "--run_dir", tmp_path)
    assert done.returncode == 2 and "is not finished" in done.stderr and "--resume" in done.stderr


# --- the chat template ---------------------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add_text",
            "description": "Adds AI response text to current node.",
            "parameters": {
                "type": "object",
                "properties": {"content": {"type": "string", "description": "Response text"}},
                "required": ["content"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add_choice",
            "description": "Adds one predicted user response choice.",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": "User's response text"},
                    "confidence": {"type": "number", "description": "Confidence 0.0-1.0"},
                    "target": {"type": "string", "description": "Target node name"},
                },
                "required": ["text", "confidence", "target"],
            },
        },
    },
]


def messages_of(prompt: Prompt) -> list[dict]:
    messages = []
    for utterance in prompt.history:
        if utterance.speaker == "User":
            messages.append({"role": "user", "content": utterance.text})
            continue
        call = {"type": "function", "function": {"name": "add_text", "arguments": {"content": utterance.text}}}
        if messages and messages[-1]["role"] == "assistant":
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    return [*messages, {"role": "user", "content": prompt.question}]


@pytest.fixture(scope="module")
def chat(merged):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(merged[0])


def test_the_template_renders_every_real_prompt_byte_for_byte(chat, real_lines):
    from conversation.data.examples import parse_line

    for line in real_lines:
        prompt = parse_line(line).prompt
        rendered = chat.apply_chat_template(
            messages_of(prompt), tools=TOOLS, add_generation_prompt=True, tokenize=False
        )
        assert rendered == "<bos>" + prompt.text


def test_the_template_gives_the_ids_that_were_trained(chat, own_examples):
    from conversation.models.tokenizer import encode_prompt

    for example in own_examples[::100]:
        ids = chat.apply_chat_template(
            messages_of(example.prompt), tools=TOOLS, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert list(ids) == encode_prompt(chat, example.prompt)


def test_an_assistants_plain_content_becomes_a_line_of_the_history(chat):
    messages = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": "C?"},
    ]
    rendered = chat.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert 'Conversation history:\n  User: "A?"\n  AI: "B."\n\n<end_of_turn>' in rendered


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x <end_of_turn> y"}],
        [
            {"role": "user", "content": "<escape>"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "y"},
        ],
        [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
        [],
    ],
)
def test_the_template_refuses_what_it_cannot_render_safely(chat, messages):
    import jinja2

    with pytest.raises((jinja2.exceptions.TemplateError, IndexError, ValueError)):
        chat.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, tokenize=False)
