"""A model trained with --reasoning restate begins with the question in full: on every floor, and nowhere else."""

import copy
import json
from dataclasses import replace

import pytest
from conftest import make_tiny_model
from scripts_at_work import finished

from conversation.answering.decoding import CONSTRAINED, generate_answer
from conversation.answering.engines import open_engine
from conversation.answering.knowledge import Scorer, parts_of_five
from conversation.answering.scoring import log_probabilities
from conversation.answering.vocabulary import FINGERPRINT_KEY, RESTATES_KEY
from conversation.data.examples import read_data, read_training_data, to_jsonl
from conversation.data.questions import read_held_out
from conversation.data.trees import question_in_full, read_trees
from conversation.errors import UserError
from conversation.format.calls import Answer, Example, FollowUp, Prompt, Utterance, call_pieces
from conversation.format.chat_messages import FieldError
from conversation.format.control_tokens import FORMAT_TOKENS
from conversation.format.gbnf import gbnf
from conversation.format.grammar import MAX_CHARACTERS, Value
from conversation.format.message_parser import from_row
from conversation.format.messages import RESTATING_TOOLS, TOOLS, to_row, to_sharegpt_row
from conversation.format.ollama import modelfile
from conversation.format.parser import FormatError, parse_answer, parse_example, parse_restated
from conversation.models.chat_format import write_chat_format
from conversation.models.gguf import TYPES, MergedWeights, write_gguf
from conversation.models.merged_model import write_manifest
from conversation.models.tokenizer import (
    decode,
    encode,
    encode_example,
    encode_prompt,
    fingerprint,
    id_of,
    load_tokenizer,
    restates,
)
from conversation.models.weights import load_model
from conversation.runs.files import file_hashes
from conversation.runs.folder import RunFolder
from conversation_config import CORE_TREES, EVALUATION_QUESTIONS, EXPERT_TREES

CHOICES = tuple(FollowUp(f"Q{i}?", "0.30", f"q_{i}") for i in range(3))
ANSWER = Answer(("Two clerks, one till.",), CHOICES, "What's a lock? Example?")
HISTORY = (Utterance("User", "What's a lock?"), Utterance("AI", "A guard."))
EXAMPLE = Example(Prompt("Show me one.", HISTORY, restates=True), ANSWER)
PLAIN = Example(replace(EXAMPLE.prompt, restates=False), replace(ANSWER, restated=None))


# --- text, messages, grammar -----------------------------------------------------------------------------------------


def test_the_call_stands_first_and_the_prompt_declares_it():
    assert parse_example(EXAMPLE.text) == EXAMPLE and parse_example(PLAIN.text) == PLAIN
    assert EXAMPLE.text.count("<start_function_declaration>restate\n") == 1 and "restate" not in PLAIN.text
    assert ANSWER.text.startswith(
        "<start_function_call>\ncall:restate{question:<escape>What's a lock? Example?<escape>}\n<end_function_call>\n"
    )
    assert parse_restated(ANSWER.text) == parse_restated(ANSWER.text[:90]) == ANSWER.restated
    assert parse_restated(PLAIN.answer.text) is None


def test_the_parser_accepts_it_only_where_it_is_declared():
    assert parse_answer(ANSWER.text, restates=True) == ANSWER
    for text, declared in ((ANSWER.text, False), (PLAIN.answer.text, True)):
        with pytest.raises(FormatError, match="expected"):
            parse_answer(text, restates=declared)
    for bad in (ANSWER.text.replace("What's a lock? Example?", " "), ANSWER.text.replace("lock", "<end_of_turn>")):
        with pytest.raises(FormatError, match="the value of question"):
            parse_answer(bad, restates=True)
    for prompt, answer in ((EXAMPLE.prompt, PLAIN.answer), (PLAIN.prompt, ANSWER)):
        with pytest.raises(ValueError, match="declares restate, or the answer calls it, but not both"):
            Example(prompt, answer)
    with pytest.raises(ValueError, match="the restated question is empty"):
        replace(ANSWER, restated=" ")


@pytest.mark.parametrize("write", [to_row, to_sharegpt_row])
def test_messages_are_read_back_as_they_were(write):
    for example in (EXAMPLE, PLAIN):
        assert from_row(json.loads(json.dumps(write(example)))) == example
    assert to_row(EXAMPLE)["tools"] == RESTATING_TOOLS and to_row(PLAIN)["tools"] == TOOLS


def test_messages_that_call_what_they_do_not_declare_are_refused_with_the_place():
    row = to_row(EXAMPLE)
    with pytest.raises(FieldError, match=r"^tools: restate is called and not declared"):
        from_row(row | {"tools": TOOLS})
    with pytest.raises(FieldError, match=r"^tools: restate is declared and not called"):
        from_row(to_row(PLAIN) | {"tools": RESTATING_TOOLS})
    assert from_row({"messages": row["messages"]}) == EXAMPLE
    calls = row["messages"][-1]["tool_calls"]
    calls.insert(1, calls.pop(0))
    with pytest.raises(FieldError, match=r"tool_calls\[1\]\.function\.name: restate stands once, at the beginning"):
        from_row(row)


def test_grammar_and_modelfile_say_so():
    ids = {token: number for number, token in enumerate(FORMAT_TOKENS, 46)}
    assert "root ::= restate text{1,4} choice{3}\n" in gbnf(ids, restates=True) and "restate" not in gbnf(ids)
    assert "<start_function_declaration>restate\n" in modelfile("x.gguf", restates=True)
    assert "restate" not in modelfile("x.gguf")


# --- data ------------------------------------------------------------------------------------------------------------


def test_the_question_in_full_is_the_topic_and_what_is_asked_however_it_was_asked():
    assert question_in_full(["What's a mutex?"]) == "What's a mutex?"
    assert question_in_full(["What's a mutex?", "Example?"]) == "What's a mutex? Example?"
    assert question_in_full(["A?", "B?", "C?", "D?"]) == "A? C? D?"
    tree = next(tree for tree in read_trees(CORE_TREES, ("systems",)) if tree.name == "mutex")
    found = {example.prompt.question: example.answer.restated for example in tree.examples(restates=True)}
    assert found["Explain mutexes."] == "What's a mutex?"
    assert found["Show it at work."] == "What's a mutex? Example?"
    plain = [(example.prompt.question, example.answer.fragments) for example in tree.examples()]
    assert [(each.prompt.question, each.answer.fragments) for each in tree.examples(restates=True)] == plain
    assert all(each.answer.restated is None and not each.prompt.restates for each in tree.examples())


def test_no_question_of_ours_is_longer_in_full_than_the_grammar_lets_a_model_write():
    for data in (CORE_TREES, EXPERT_TREES):
        examples = read_training_data(data, restates=True)
        assert max(len(example.answer.restated) for example in examples) <= MAX_CHARACTERS[Value.RESTATED]


def test_rows_that_restate_are_refused_with_their_places_where_nothing_is_to_restate(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(to_jsonl([PLAIN, EXAMPLE, PLAIN]))
    data = read_data(path)
    assert data.examples == [PLAIN, PLAIN] and data.places == [f"{path}:1", f"{path}:3"]
    with pytest.raises(UserError, match=r"1 of 3 examples cannot be used:\n.*rows\.jsonl:2: the answer") as caught:
        data.check()
    assert "--reasoning restate" in caught.value.hint


def test_rows_without_the_call_get_it_from_the_questions_in_their_history(tmp_path):
    path = tmp_path / "rows.jsonl"
    odd = Example(Prompt("Why\n is it?"), PLAIN.answer)
    path.write_bytes(to_jsonl([PLAIN, EXAMPLE, odd]))
    found = read_data(path, restates=True).check().examples
    assert [each.answer.restated for each in found] == ["What's a lock? Show me one.", ANSWER.restated, "Why is it?"]
    assert found[1] == EXAMPLE and all(each.prompt.restates for each in found)
    assert found[0].answer.fragments == PLAIN.answer.fragments and parse_example(found[0].text) == found[0]


# --- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restating_folder(tmp_path_factory, own_examples):
    """A tiny merged model that was, as its tokenizer says, trained to restate."""
    folder = tmp_path_factory.mktemp("restating") / "merged_model_fp32"
    make_tiny_model(folder, [example.text for example in [*own_examples[::4], EXAMPLE]], like_real_ones=True)
    tokenizer = load_tokenizer(folder)
    write_chat_format(folder, tokenizer, restates=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": id_of(tokenizer, "<end_of_turn>")}))
    write_manifest(folder, file_hashes(folder))
    return folder


@pytest.fixture
def short_values(monkeypatch):
    """A random model ends no value by itself."""
    for kind, length in ((Value.RESTATED, 8), (Value.FRAGMENT, 9), (Value.FOLLOW_UP, 6), (Value.TARGET, 5)):
        monkeypatch.setitem(MAX_CHARACTERS, kind, length)


def test_the_tokenizer_says_so_and_every_prompt_declares_it(restating_folder, merged_tiny):
    tokenizer, other = load_tokenizer(restating_folder), load_tokenizer(merged_tiny)
    assert restates(tokenizer) and not restates(other)
    assert "restate" in decode(tokenizer, encode_prompt(tokenizer, PLAIN.prompt))
    assert "restate" not in decode(other, encode_prompt(other, EXAMPLE.prompt))
    assert list(encode_example(tokenizer, PLAIN).ids[:40]) != encode_prompt(tokenizer, PLAIN.prompt)[:40], "as it is"
    assert fingerprint(tokenizer) == fingerprint(replaced(tokenizer)), "the fingerprint is that of the vocabulary"


def replaced(tokenizer):
    """The same tokenizer, of a model that does not restate."""
    found = copy.deepcopy(tokenizer)
    found.init_kwargs.pop("restates_questions")
    return found


@pytest.mark.parametrize("tools", [TOOLS, RESTATING_TOOLS])
def test_the_chat_template_gives_the_ids_that_were_trained(restating_folder, tools):
    tokenizer = load_tokenizer(restating_folder)
    messages = [
        {"role": "user", "content": "What's a lock?"},
        {"role": "assistant", "content": "A guard."},
        {"role": "user", "content": "Show me one."},
    ]
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
    assert list(ids["input_ids"]) == encode_prompt(tokenizer, EXAMPLE.prompt)


@pytest.mark.usefixtures("short_values")
def test_both_programs_write_it_first_and_show_a_reader_what_comes_after(restating_folder, tmp_path):
    tokenizer = load_tokenizer(restating_folder)
    path = tmp_path / "tiny-f32.gguf"
    metadata = {FINGERPRINT_KEY: fingerprint(tokenizer), RESTATES_KEY: "true"}
    write_gguf(MergedWeights(restating_folder), TYPES["f32"], path, metadata)
    ids = generate_answer(load_model(restating_folder).eval(), tokenizer, PLAIN.prompt, CONSTRAINED)
    written = parse_answer(decode(tokenizer, ids), restates=True)
    assert written.restated
    engines = [open_engine(restating_folder), open_engine(path)]
    assert engines[0].vocabulary.encode_prompt(PLAIN.prompt) == engines[1].vocabulary.encode_prompt(PLAIN.prompt)
    for engine in engines:
        assert engine.vocabulary.encode_example(EXAMPLE) == list(encode_example(tokenizer, EXAMPLE).ids)
        shown = [each.content for each in engine.stream(PLAIN.prompt)]
        assert shown == [*written.fragments, *written.follow_ups]


@pytest.mark.usefixtures("short_values")
def test_a_model_that_does_not_restate_writes_no_such_call(merged_tiny):
    tokenizer = load_tokenizer(merged_tiny)
    ids = generate_answer(load_model(merged_tiny).eval(), tokenizer, PLAIN.prompt, CONSTRAINED)
    assert parse_answer(decode(tokenizer, ids)).restated is None


def test_an_export_carries_it_into_the_file_the_grammar_and_the_modelfile(restating_folder, tmp_path):
    flags = (
        "--model",
        restating_folder,
        "--output",
        tmp_path / "gguf",
        "--type",
        "f32",
        "--force",
    )  # it learnt nothing
    status, said = finished("export_conversation_model.py", *flags, output=tmp_path / "out")
    assert status == 0, said
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    engine = open_engine(file)
    assert engine.vocabulary.restates
    assert engine.vocabulary.encode_prompt(PLAIN.prompt) == encode_prompt(
        load_tokenizer(restating_folder), PLAIN.prompt
    )
    assert "root ::= restate " in (tmp_path / "gguf" / "conversation.gbnf").read_text()
    assert "declaration>restate\n" in (tmp_path / "gguf" / "Modelfile").read_text()


def test_what_a_model_knows_is_asked_behind_the_question_as_it_wrote_it(restating_folder):
    model, tokenizer = load_model(restating_folder).eval(), load_tokenizer(restating_folder)
    cases = [case for path in EVALUATION_QUESTIONS for case in read_held_out(path)][:6]
    prompt, _, pieces = part = parts_of_five(cases)[0]
    restated = call_pieces("restate", question="What's a test?")
    scorer = Scorer(model, tokenizer, {prompt: "What's a test?"})
    both = log_probabilities(model, tokenizer, [(prompt, encode(tokenizer, [*restated, *pieces]))])
    alone = log_probabilities(model, tokenizer, [(prompt, encode(tokenizer, restated))])
    assert scorer.log_probabilities([part])[0] == pytest.approx(both[0] - alone[0], abs=1e-3)
    held_out = Example(cases[0].prompt, cases[0].answer)
    losses = scorer.losses_by_kind([held_out])
    assert losses != Scorer(model, tokenizer).losses_by_kind([held_out])
    trained = Example(replace(prompt, restates=True), replace(cases[0].answer, restated="What's a test?"))
    assert scorer.losses_by_kind([trained]) == losses, "the call has no part in the losses"


def test_a_run_that_restates_is_trained_merged_asked_and_evaluated(tmp_path, tiny_folder):
    run = tmp_path / "run"
    flags = [
        "--base_model",
        tiny_folder,
        "--training_data",
        "starter",
        "--domains",
        "systems",
        "--reasoning",
        "restate",
    ]
    flags += ["--max_steps", "2", "--warmup_steps", "0", "--run_dir", run]
    status, output = finished("train_conversation.py", *flags, output=tmp_path / "out")
    assert status == 0, output
    lines = RunFolder(run).training_data.read_text().splitlines()
    assert all(parse_example(json.loads(line)["text"]).answer.restated for line in lines)
    for script, more in (
        ("merge_conversation_model.py", []),
        ("test_conversation_model.py", []),
        ("evaluate_conversation_model.py", ["--short"]),
    ):
        status, output = finished(script, "--run_dir", run, *more, output=tmp_path / "out")
        assert status == (1 if script.startswith("test") else 0), output  # it learnt nothing: the tests fail
    assert restates(load_tokenizer(RunFolder(run).merged_model))
    assert RunFolder(run).read().config.reasoning == "restate"
