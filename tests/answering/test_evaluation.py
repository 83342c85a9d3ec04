"""An evaluation, sampled and with embeddings: every figure is that of the answers in its file."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from zlib import crc32

import pytest
from conftest import easy_lines, make_tiny_model

import evaluate_conversation_model as script
from conversation.answering import decoding, evaluation, relevance
from conversation.answering.decoding import CONSTRAINED, GREEDY, SAMPLED, Decoding
from conversation.data import figures
from conversation.data.examples import evenly_spread
from conversation.data.questions import read_held_out
from conversation.format.calls import Answer, Example, FollowUp
from conversation.models import device, merged_model
from conversation.models.tokenizer import encode, load_tokenizer
from conversation.models.weights import load_model
from conversation.runs.comparison import figures_table
from conversation.runs.evaluation_record import KindLosses, read_evaluation, write_evaluation
from conversation_config import EVALUATION_QUESTIONS

CASES = [case for path in EVALUATION_QUESTIONS for case in read_held_out(path)]
TRAINING = [Example(case.prompt, case.answer) for case in CASES for _ in range(2)][:-1]  # 199: no multiple of 100


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "base", [example.text for example in easy_lines()])


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


def said(number: int, how: Decoding) -> list[str]:
    """The pieces of what the model says to a question: of each decoding other answers break, and repeat themselves."""
    seed = number + {"greedy": 0, "sampled": 1, "constrained": 2}[how.method]
    if seed % (5 if how == SAMPLED else 9) == 0:
        return ["I think so."]
    texts = [f"It is {seed % 13} of all.", "Like a lock." if seed % 4 else "It's all.", "Like a lock."][: 1 + seed % 3]
    asked = (
        ("Example?", "Why?", "Downsides?") if seed % 4 == 0 else (f"Why {seed}?", "How?", "How?" if seed % 6 else "A?")
    )
    numbers = ("0.62", "0.21", "0.08") if seed % 3 else ("0.40", "0.35", f"0.{10 + seed % 7}")
    follow_ups = (FollowUp(*each, f"t{i % (3 if seed % 8 else 2)}") for i, each in enumerate(zip(asked, numbers)))  # noqa: B905
    return Answer(tuple(texts), tuple(follow_ups)).pieces()


def cosine(a: str, b: str) -> float:
    """Some number that depends on both texts."""
    return crc32(f"{a}|{b}".encode()) % 1000 / 1000


class StubEmbeddings:
    def similarities(self, pairs):
        return [cosine(*pair) for pair in pairs]


class StubScorer:
    """Finds texts likely at random; expects confidences in any order, of some cases none."""

    examples: list = []

    def __init__(self, model, tokenizer, restated=None):
        assert not restated, "no model here restates"
        StubScorer.examples = []

    def read_ahead(self, parts, examples):
        pass

    def log_probabilities(self, parts):
        return [float(crc32(repr(part).encode()) % 1000) for part in parts]

    def expected_confidences(self, cases):
        three = [tuple(crc32(f"{i} {n}".encode()) % 100 / 100 for n in range(3)) for i in range(len(cases))]
        return [None if i % 10 == 3 else found for i, found in enumerate(three)]

    def losses_by_kind(self, examples):
        StubScorer.examples.append(examples)
        return KindLosses(len(examples), 0.1, 0.2, 0.3, 0.4, 0.5)


@pytest.fixture
def stubs(monkeypatch, tokenizer):
    """A model that says what `said` says."""

    def generate(model, tokenizer, prompts, decodings):
        assert [case.prompt for case in CASES] == list(prompts)
        return {how: [encode(tokenizer, said(i, how)) for i in range(len(prompts))] for how in decodings}

    monkeypatch.setattr(evaluation, "generate_with_each", generate)
    monkeypatch.setattr(evaluation, "Scorer", StubScorer)
    monkeypatch.setattr(relevance, "is_installed", lambda: True)
    monkeypatch.setattr(relevance, "SentenceEmbeddings", StubEmbeddings)


def spoken(answer: dict) -> Answer | None:
    """The answer in the file, if it is a valid one."""
    if answer["texts"] is None:
        return None
    choices = (FollowUp(c["text"], f"{c['confidence']:.2f}", c["target"]) for c in answer["choices"])
    return Answer(tuple(answer["texts"]), tuple(choices))


def mean(values) -> float | None:
    present = [float(value) for value in values if value is not None]
    return fmean(present) if present else None


def figures_of(answers: list[dict]) -> dict:
    """Every figure, from the answers of a file."""
    valid = [found for each in answers if (found := spoken(each))]
    distinct = [
        all(len({getattr(f, what).casefold() for f in found.follow_ups}) == 3 for what in ("text", "target"))
        for found in valid
    ]
    roots = [each for each in answers if not each["history"]]
    later = [each for each in answers if each["history"]]
    return {
        "questions": len(answers),
        "valid": len(valid) / len(answers),
        "valid_sampled": mean(each["sampled_problem"] is None for each in answers if each["sampled"]),
        "breaks": dict(Counter(each["break_kind"] for each in answers if each["problem"])),
        "equal_fragments": figures.equal_fragments(valid),
        "fragments_without_news": figures.fragments_without_news(valid),
        "distinct_follow_ups": sum(distinct) / len(answers),
        "distinct_2": figures.distinct_2(valid),
        "stock_only": figures.stock_only(valid),
        "commonest_confidences": figures.commonest_confidences(valid),
        "confidence_spread": figures.confidence_spread(valid),
        "right_of_five": mean(each["right_of_five"] for each in answers),
        "right_of_five_roots": mean(each["right_of_five"] for each in roots),
        "right_of_five_follow_ups": mean(each["right_of_five"] for each in later),
        "follow_up_recall_at_1": mean(each["follow_up_rank"] == 1 for each in answers),
        "follow_up_reciprocal_rank": mean(1 / each["follow_up_rank"] for each in answers),
        "confidence_rank_agreement": mean(each["rank_agreement"] for each in answers),
        "brier_score": mean(each["brier_score"] for each in answers),
        "answer_relevance": mean(each["answer_relevance"] for each in answers),
        "follow_up_relevance": mean(each["follow_up_relevance"] for each in answers),
    }


def check(path: Path, how: Decoding, short: bool = False, embeddings: bool = True) -> dict:
    """Compare every figure in a file with its answers, and those with what was said and measured; return the file."""
    value = json.loads(path.read_text())
    assert (value["decoding"], value["short"], len(value["answers"])) == (how.method, short, len(CASES))
    for name, found in value["sets"].items():
        expected = figures_of([each for each in value["answers"] if name in (each["set_name"], "all")])
        assert set(expected) == set(found)
        for figure in expected:
            assert found[figure] == pytest.approx(expected[figure], abs=2e-4), (name, figure)
    confidences = StubScorer(None, None).expected_confidences(CASES)
    for i, (case, answer) in enumerate(zip(CASES, value["answers"], strict=True)):
        assert answer["output"] == "".join(said(i, how)) and answer["question"] == case.prompt.question
        assert answer["sampled"] is not short
        breaks = not short and len(said(i, SAMPLED)) == 1
        assert (answer["sampled_problem"] is not None) == breaks
        assert answer["expected_confidences"] == (list(confidences[i]) if confidences[i] else None)
        if confidences[i]:
            truth = [each.probability for each in case.answer.follow_ups]
            assert answer["rank_agreement"] == figures.kendall_tau(confidences[i], truth)
            assert answer["brier_score"] == pytest.approx(figures.brier_score(confidences[i], case.followed), abs=1e-4)
        else:
            assert answer["rank_agreement"] is answer["brier_score"] is None
        asked = " ".join([*(u.text for u in case.prompt.history if u.speaker == "User"), case.prompt.question])
        found = spoken(answer) if embeddings else None
        near = found and cosine(asked, " ".join(found.fragments))
        assert answer["answer_relevance"] == near
        assert answer["follow_up_relevance"] == (near and cosine(asked, " ".join(f.text for f in found.follow_ups)))
    return value


@pytest.mark.parametrize("how", [GREEDY, CONSTRAINED])
def test_every_figure_of_a_full_evaluation_is_that_of_the_answers_in_its_file(stubs, tokenizer, tmp_path, capsys, how):
    path = tmp_path / "evaluation.json"
    write_evaluation(evaluation.evaluate(None, tokenizer, "m", CASES, TRAINING, how), path)
    value = check(path, how)
    for figures_of_set in value["sets"].values():  # each figure has something to tell: none is 0, or all
        shares = [v for k, v in figures_of_set.items() if k not in ("questions", "breaks")]
        assert all(0 < abs(share) < 1 for share in shares), figures_of_set
    assert any("expected confidences of 10 of 100 questions" in note for note in value["notes"])
    assert len(capsys.readouterr().out.splitlines()) == 3  # a line for each stage


def test_without_the_embeddings_or_in_short_there_is_no_relevance_and_a_note_says_why(
    stubs, tokenizer, tmp_path, monkeypatch
):
    path = tmp_path / "evaluation.json"
    monkeypatch.setattr(relevance, "is_installed", lambda: False)
    write_evaluation(evaluation.evaluate(None, tokenizer, "m", CASES, TRAINING), path)
    assert relevance.MISSING in check(path, GREEDY, embeddings=False)["notes"]
    write_evaluation(evaluation.evaluate(None, tokenizer, "m", CASES, [], short=True), path)
    value = check(path, GREEDY, short=True, embeddings=False)
    assert relevance.MISSING not in value["notes"] and value["training_losses"] is None


def test_broken_embeddings_are_noticed_before_the_model_is_asked(stubs, tokenizer, monkeypatch):
    def broken():
        raise ImportError("half a package")

    monkeypatch.setattr(relevance, "SentenceEmbeddings", broken)
    monkeypatch.setattr(evaluation, "generate_with_each", lambda *given: pytest.fail("the model was asked"))
    with pytest.raises(ImportError, match="half a package"):
        evaluation.evaluate(None, tokenizer, "m", CASES, TRAINING)


def test_losses_are_of_all_questions_and_of_as_many_training_examples_evenly_spread(stubs, tokenizer):
    found = evaluation.evaluate(None, tokenizer, "m", CASES, TRAINING, short=True)
    questions, trained = StubScorer.examples
    assert questions == [Example(case.prompt, case.answer) for case in CASES]
    assert trained == evenly_spread(TRAINING, 100) and TRAINING.index(trained[-1]) > 190
    assert found.training_losses.examples == 100


def test_the_script_passes_its_decoding_on(stubs, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "set_up_libraries", lambda: None)
    monkeypatch.setattr(device, "use_device", lambda name: "cpu")
    monkeypatch.setattr(merged_model, "load_verified", lambda folder, fingerprint: (None, tokenizer))
    path = tmp_path / "found.json"
    flags = ["--model", str(tmp_path / "model"), "--decoding", "constrained", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["evaluate_conversation_model.py", *flags])
    assert script.main() == 0
    check(path, CONSTRAINED)
    assert "constrained" in capsys.readouterr().out


def test_a_model_is_asked_greedily_and_sampled(tiny, tokenizer, tmp_path, monkeypatch):
    """With nothing stubbed but the length of an answer."""
    monkeypatch.setattr(decoding, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(relevance, "is_installed", lambda: False)
    some = [case for case in CASES if case.is_root][:5]
    found = evaluation.evaluate(load_model(tiny).eval(), tokenizer, "m", some, TRAINING[:7])
    assert [answer.sampled for answer in found.answers] == [True] * 5 and found.sets["known"].valid_sampled == 0
    assert found.training_losses.examples == found.question_losses.examples == 5
    path = tmp_path / "evaluation.json"
    write_evaluation(found, path)
    assert read_evaluation(path) == found and "| decoding " in figures_table({"m": found})


def test_an_evaluation_on_resume_is_taken_for_no_other_than_it_is(stubs, tokenizer, tmp_path):
    run = SimpleNamespace(evaluation=tmp_path / "evaluation.json")
    full = evaluation.evaluate(None, tokenizer, "m", CASES, TRAINING)

    def why(there, short=False, decoding="greedy"):
        write_evaluation(dataclasses.replace(full, **there), run.evaluation)
        return script.why_evaluate_again(run, SimpleNamespace(short=short, decoding=decoding))

    assert why({}) is None and why({}, short=True) is None and why({"short": True}, short=True) is None
    assert why({"short": True}) == "only a short evaluation is there"
    assert why({"decoding": "constrained"}) == "the evaluation there is of constrained decoding"
    assert why({"decoding": "constrained"}, decoding="constrained") is None
    assert "greedy" in why({}, decoding="constrained")
    run.evaluation.unlink()
    again = script.why_evaluate_again(run, SimpleNamespace(short=False, decoding="greedy"))
    assert again == "the model has not been evaluated yet"
