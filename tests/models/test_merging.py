"""Merging: the model on disk answers as base and adapters do, or it does not get its name."""

import json
import shutil

import pytest
import torch
from conftest import TOOLS, current_umask, easy_lines, messages_of, run_script
from records import some_record
from safetensors.torch import load_file, save_file

from conversation.errors import UserError
from conversation.format.calls import Answer, FollowUp, Prompt, Utterance
from conversation.models import merged_model, merged_weights, merging
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
    model.save_pretrained(folder)
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


def test_other_weights_beside_those_of_the_base_do_not_get_into_the_merged_model(
    merged, tiny_folder, adapters, tmp_path
):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    doubled = {name: 2 * tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(doubled, base / "model_ema.safetensors", {"format": "pt"})
    result = merging.merge(base, adapters, tmp_path / "merged", PROMPTS, {})
    assert result.files["model.safetensors"] == merged[1].files["model.safetensors"]


def test_the_merge_gives_the_numbers_of_peft_in_one_file_or_in_shards(
    merged, tiny_folder, adapters, tmp_path, monkeypatch
):
    from peft import PeftModel

    wanted = PeftModel.from_pretrained(load_model(tiny_folder), adapters).merge_and_unload().state_dict()
    monkeypatch.setattr(merged_weights, "SHARD_BYTES", 100_000)
    merging.merge(tiny_folder, adapters, tmp_path / "shards", PROMPTS[:1], {})
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    for folder in (merged[0], tmp_path / "shards"):
        found = load_model(folder).state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_base_in_bfloat16_is_merged_in_fp32(tiny_folder, adapters, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    merging.merge(base, adapters, tmp_path / "merged", PROMPTS[:1], {})
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"


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
    merged = merged_weights._merged

    def one_layer_wrong(path, name, change):
        tensor = merged(path, name, change)
        if name.endswith("layers.2.mlp.up_proj.weight"):
            tensor[:16] = 0  # a mere factor would be normalised away
        return tensor

    monkeypatch.setattr(merged_weights, "_merged", one_layer_wrong)
    with pytest.raises(UserError, match="is not base"):
        merging.merge(tiny_folder, adapters, tmp_path / "merged", PROMPTS, {})
    assert not (tmp_path / "merged").exists()


def test_logits_that_are_no_numbers_are_refused_even_if_both_models_give_them(
    tmp_path, tiny_folder, adapters, monkeypatch
):
    observe = merging._observe
    monkeypatch.setattr(merging, "_observe", lambda *given: (observe(*given)[0] * float("nan"), [7]))
    with pytest.raises(UserError, match="logits differ by up to nan"):
        merging.merge(tiny_folder, adapters, tmp_path / "merged", PROMPTS[:1], {})


def test_the_merged_model_begins_a_text_with_the_tokenizers_token_whatever_the_bases_config_says(
    tmp_path, tiny_folder, adapters
):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "bos_token_id": 7}))
    merging.merge(base, adapters, tmp_path / "merged", PROMPTS[:1], {})
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["bos_token_id"] == 2


def test_two_weights_of_one_name_are_never_merged_into_one_another(tmp_path):
    from peft import LoraConfig, get_peft_model

    def tower():
        return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": linear()})])})

    def linear():
        return torch.nn.Linear(4, 4, bias=False)

    model = torch.nn.ModuleDict({"text": tower(), "images": tower()})
    with pytest.raises(UserError, match=r"two adapted weights of the base are called layers\.0\.q_proj\.weight"):
        merged_weights.changes_of(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    adapted = get_peft_model(tower(), LoraConfig(target_modules=["q_proj"]))
    (tmp_path / "base").mkdir()
    weight = torch.zeros(4, 4)
    tensors = {"text.layers.0.q_proj.weight": weight, "images.layers.0.q_proj.weight": weight.clone()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the base has two weights layers"):
        merged_weights.write_merged(tmp_path / "base", tmp_path, merged_weights.changes_of(adapted), tied=False)


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


def test_control_tokens_in_messages_and_tools_stay_text_and_sanitised_give_the_ids_that_were_trained(chat):
    from conversation.format.control_tokens import CONTROL_TOKENS
    from conversation.models.tokenizer import control_ids, encode_prompt

    plain = chat.apply_chat_template(messages_of(Prompt("x")), tools=TOOLS, add_generation_prompt=True)["input_ids"]
    wanted = [i for i in plain if i in control_ids(chat)]
    for token in (*CONTROL_TOKENS, "<end_of_<end_of_turn>turn>", "\U000f0000<end_of_turn>\U000f0001"):
        prompt = Prompt(f"x{token}y", (Utterance("AI", token),))
        options = {"tools": TOOLS, "add_generation_prompt": True}
        raw = chat.apply_chat_template(messages_of(prompt), **options)["input_ids"]
        assert [i for i in raw if i in control_ids(chat)] == wanted, token
        ids = chat.apply_chat_template(messages_of(prompt), **options, sanitize_control_tokens=True)["input_ids"]
        assert [i for i in ids if i in control_ids(chat)] == wanted, token
        if "\U000f0000" not in token:  # the library drops its own marks
            assert list(ids) == encode_prompt(chat, prompt), token
    tools = json.loads(json.dumps(TOOLS).replace("Adds AI", "Adds <end_of_turn> AI"))
    ids = chat.apply_chat_template(messages_of(Prompt("x")), tools=tools, add_generation_prompt=True)["input_ids"]
    assert [i for i in ids if i in control_ids(chat)] == wanted


# --- the answer read back ------------------------------------------------------------------------------------------


def test_the_library_reads_an_answer_back_as_the_calls_it_makes(chat):
    texts = ("a {b}, c: {d", "42", "x, y: z}", 'say "hi"\n\\n')
    choices = tuple(FollowUp(f"{name}, {{why}}?", "0.80", name) for name in ("one", "two_2", "three"))
    answer = Answer(texts, choices)
    message = chat.parse_response(answer.text, prefix="<start_of_turn>model\n")
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert calls == [("add_text", {"content": text}) for text in texts] + [
        ("add_choice", {"text": each.text, "confidence": "0.80", "target": each.target}) for each in choices
    ]
    assert message["role"] == "assistant" and not message.get("content")
    typed = chat.parse_response(answer.text, prefix="<start_of_turn>model\n", tools=TOOLS)["tool_calls"]
    assert [call["function"]["arguments"].get("confidence") for call in typed] == [None] * 4 + [0.8] * 3
    assert typed[1]["function"]["arguments"] == {"content": "42"}


def test_the_library_reads_every_real_answer_back(chat, own_examples):
    for example in own_examples[::25]:
        calls = chat.parse_response(example.answer.text, prefix="", tools=TOOLS)["tool_calls"]
        read = [call["function"]["arguments"] for call in calls]
        assert tuple(each["content"] for each in read if "content" in each) == example.answer.fragments
        assert [each["confidence"] for each in read if "target" in each] == [
            each.probability for each in example.answer.follow_ups
        ]
