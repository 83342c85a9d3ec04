"""export_conversation_model.py on a tiny model: what it leaves, what it refuses, what it never leaves half done."""

import dataclasses
import json
import shutil

import pytest
from conftest import easy_lines, run_script, some_adapters
from records import some_record
from scripts_at_work import finished

from conversation.answering import exporting
from conversation.answering.engines import open_engine
from conversation.answering.vocabulary import FINGERPRINT_KEY
from conversation.data.examples import to_jsonl
from conversation.data.questions import THREE_CASES
from conversation.errors import UserError
from conversation.format.calls import Prompt
from conversation.models.gguf import TYPES
from conversation.models.gguf_check import TensorCheck
from conversation.models.tokenizer import encode_prompt, fingerprint, load_tokenizer
from conversation.models.weights import load_model
from conversation.runs.export_record import Export, ExportedFile, read_export
from conversation.runs.files import sha256_file
from conversation.runs.folder import RunFolder
from conversation.runs.record import AnswersResult, BaseIdentity, MergeResult
from export_conversation_model import file_for_ollama

EXPORT = "export_conversation_model.py"


@pytest.fixture(scope="module")
def run(merged_tiny, tmp_path_factory):
    """A run whose merged model is the tiny one. It passed no structural test."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "2026-01-02")
    shutil.copytree(merged_tiny, run.merged_model)
    files = json.loads((run.merged_model / "conversation_model.json").read_text())["files"]
    record = some_record(
        base_model=BaseIdentity("tiny", "w", "c", "t", fingerprint(load_tokenizer(merged_tiny))),
        merge=MergeResult(3, 0.0, 1.0, 1, 1, files, {}, "2026-01-02T04:00:00+00:00"),
        structural_tests=AnswersResult(False, 0, 20, 0, 0, "2026-01-02T04:04:05+00:00", {}),
    )
    run.write(record)
    run.training_data.write_bytes(to_jsonl(easy_lines()[:5]))
    run.structural_tests.write_text(json.dumps({"tests": [], "held_out": []}))
    some_adapters(run.final_lora, merged_tiny, 0.01)
    return run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run, exported to two types, and what was said."""
    output = tmp_path_factory.mktemp("out") / "log"
    status, said = finished(EXPORT, "--run_dir", run.path, "--type", "F32,q8_0", output=output)
    assert status == 0, said
    return run, said


def test_it_leaves_verified_files_a_modelfile_a_grammar_and_a_section_of_the_report(exported):
    run, said = exported
    names = {path.name for path in run.exported.iterdir()}
    files = {f"conversation-2026-01-02-{kind}.gguf" for kind in ("f32", "q8_0")}
    assert names == files | {"Modelfile", "conversation.gbnf", "export.json"}
    export = read_export(run.export_json)
    assert [each.type for each in export.files] == ["f32", "q8_0"]
    for each in export.files:
        assert each.sha256 == sha256_file(run.exported / each.file)
        assert each.bytes == (run.exported / each.file).stat().st_size
        assert each.answers == 23 and each.held_out_questions == 20 and each.survived == pytest.approx(1, abs=0.1)
    f32, q8_0 = export.files
    assert f32.equal_tokens == f32.tokens and f32.equal_answers == 23 and f32.largest_gap == 0
    assert f32.survived == 1 and 0 < q8_0.share_of_error <= 1 and q8_0.equal_tokens > 0.5 * q8_0.tokens
    assert "\nDevice: cpu (" in said and said.startswith("Needs ") and "of disk (f32 " in said and "minutes" in said
    assert (run.exported / "Modelfile").read_text().startswith("FROM ./conversation-2026-01-02-q8_0.gguf\n")
    assert "root ::= text{1,4} choice{3}" in (run.exported / "conversation.gbnf").read_text()
    report = run.report.read_text()
    assert "## Exported for llama.cpp and Ollama" in report and "| [q8_0](gguf/" in report


def test_a_run_is_then_answered_for_by_its_q8_0_file(exported):
    run, _ = exported
    engine = open_engine(run.path)
    assert engine.device == "cpu (llama.cpp)"
    assert engine.name == "2026-01-02, q8_0" and engine.program.startswith("llama.cpp")
    alone = open_engine(run.exported / "conversation-2026-01-02-q8_0.gguf")
    assert list(engine.stream(Prompt("Why?"))) == list(alone.stream(Prompt("Why?")))


def test_the_modelfile_names_the_best_file_that_is_there_and_was_not_forced(tmp_path):
    names = [field.name for field in dataclasses.fields(ExportedFile)]
    f32, q8_0, forced = (
        ExportedFile(**{**dict.fromkeys(names), "type": kind, "file": f"{kind}.gguf", "forced": reasons})
        for kind, reasons in (("f32", ()), ("q8_0", ()), ("q5_1", ("reason",)))
    )
    export = Export("model", {}, (forced, f32, q8_0))
    (tmp_path / forced.file).touch()
    assert file_for_ollama(export, forced, tmp_path) == forced.file  # there is no other
    (tmp_path / f32.file).touch()
    assert file_for_ollama(export, forced, tmp_path) == f32.file
    (tmp_path / q8_0.file).touch()
    assert file_for_ollama(export, f32, tmp_path) == q8_0.file


def test_a_resumed_one_leaves_what_is_intact_and_makes_again_what_is_not(exported, tmp_path):
    copy = RunFolder(shutil.copytree(exported[0].path, tmp_path / "run"))
    flags = ("--run_dir", copy.path, "--type", "q8_0", "f32", "--resume")
    status, said = finished(EXPORT, *flags, output=tmp_path / "out")
    assert status == 0 and said == "Exported already.\n"
    q8_0 = copy.exported / "conversation-2026-01-02-q8_0.gguf"
    q8_0.write_bytes(q8_0.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="the exported model is broken"):
        open_engine(copy.path)
    status, said = finished(EXPORT, *flags, output=tmp_path / "out")
    assert status == 0 and "of disk (q8_0 " in said
    assert sha256_file(q8_0) == read_export(copy.export_json).files[-1].sha256


def test_a_model_that_fails_its_tests_through_llama_cpp_gets_no_file_unless_it_is_forced(merged_tiny, tmp_path):
    flags = ("--model", merged_tiny, "--output", tmp_path / "gguf", "--type", "q8_0")
    status, said = finished(EXPORT, *flags, output=tmp_path / "out")
    assert status == 1 and "of 3 structural tests passed, and 3 of the merged model's" in said and "--force" in said
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["conversation.gbnf"]
    status, said = finished(EXPORT, *flags, "--force", output=tmp_path / "out")
    assert status == 0 and "warning: through llama.cpp" in said
    (file,) = read_export(tmp_path / "gguf" / "export.json").files
    assert file.survived is None and len(file.forced) == 1 and (tmp_path / "gguf" / file.file).exists()


@pytest.fixture
def exporter(merged_tiny):
    def make(force=False):
        model, tokenizer = load_model(merged_tiny).eval(), load_tokenizer(merged_tiny)
        return exporting.Exporter(merged_tiny, model, tokenizer, None, [], [], 0, force)

    return make


def test_a_type_in_which_the_training_is_lost_is_refused_before_anything_is_asked(exporter, tmp_path, monkeypatch):
    lost = TensorCheck(1, 0.5, 0.12, {"Q4_K": 0.08, "Q5_0": 0.26})
    monkeypatch.setattr(exporting, "check_tensors", lambda *_: lost)
    monkeypatch.setattr(exporting, "open_engine", None)
    with pytest.raises(UserError, match=r"only 12% of what the training changed is left \(8% in Q4_K, 26% in Q5_0\)"):
        exporter().export(TYPES["q4_k_m"], tmp_path / "x.gguf", {})
    assert list(tmp_path.iterdir()) == []


def test_other_ids_and_another_answer_are_refused(exporter, tmp_path, monkeypatch, merged_tiny):
    metadata = {FINGERPRINT_KEY: fingerprint(load_tokenizer(merged_tiny))}
    path, f32 = tmp_path / "x.gguf", TYPES["f32"]
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "encode_prompt", lambda *_: [1, 2, 3])
        with pytest.raises(UserError, match='encodes "What\'s a monad\\?" otherwise than the training, from token'):
            exporter().export(f32, path, metadata)
    with monkeypatch.context() as patch:  # the same ids, and then one more
        patch.setattr(exporting, "encode_prompt", lambda *given: [*encode_prompt(*given), 9])
        length = len(encode_prompt(load_tokenizer(merged_tiny), THREE_CASES[0].prompt))
        with pytest.raises(UserError, match=rf"from token {length} on: \[\], expected \[9\]"):
            exporter().export(f32, path, metadata)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "open_engine", lambda part: Muddled(open_engine(part)))
        with pytest.raises(UserError, match="says a token that the merged model likes less by"):
            exporter(force=False).export(f32, path, metadata)
    assert list(tmp_path.iterdir()) == []


class Muddled:
    """An engine that says one other token."""

    def __init__(self, engine):
        self.engine, self.vocabulary = engine, engine.vocabulary

    def greedy(self, prompt):
        return [*self.engine.greedy(prompt)[:20], 300]


def test_what_cannot_be_exported_is_refused_before_it_begins(merged_tiny, untouched, tmp_path):
    broken = shutil.copytree(merged_tiny, tmp_path / "broken")
    run = shutil.copytree(untouched, tmp_path / "run")  # its console.log gets the reason
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1])
    for flags, problem in (
        (["--run_dir", run, "--type", "q3_x"], "unknown type 'q3_x'"),
        (["--run_dir", run, "--type", ","], "--type names no type"),
        (["--run_dir", run], "required: --type"),
        (["--run_dir", tmp_path, "--type", "f32"], "is not a run folder"),
        (["--run_dir", run, "--type", "f32"], "do not attend to all in every sixth layer"),
        (["--run_dir", run, "--type", "f32", "--output", tmp_path], "--output goes with --model"),
        (["--model", tmp_path, "--type", "f32"], "is missing"),
        (["--model", broken, "--type", "f32"], "is broken"),
    ):
        status, said = finished(EXPORT, *flags, output=tmp_path / "out")
        assert status == 2 and problem in said and said.count("error: ") == 1, said
    assert not (run / "gguf").exists() and not (tmp_path / "gguf").exists()


def test_the_log_has_the_reason_of_a_refused_export_and_a_report_that_fails_too_does_not_hide_it(untouched, tmp_path):
    run = RunFolder(shutil.copytree(untouched, tmp_path / "run"))
    run.metrics.write_text("{\n")
    status, said = finished(EXPORT, "--run_dir", run.path, "--type", "f32", output=tmp_path / "out")
    assert status == 2 and "do not attend to all in every sixth layer" in said and "metrics" not in said, said
    assert "do not attend to all in every sixth layer" in run.console_log.read_text()


def test_too_little_disk_space_is_said_beforehand(run, tmp_path):
    full = (("no_space_on_any_disk",),)
    status, said = finished(EXPORT, "--run_dir", run.path, "--type", "f16", output=tmp_path / "out", faults=full)
    assert status == 2 and "free, the export needs" in said


def test_a_check_needs_no_run():
    done = run_script(EXPORT, "--check", "--type", "q8_0,f16")
    assert (done.returncode, done.stdout) == (0, "Can be exported to: q8_0, f16.\n"), done.stderr
