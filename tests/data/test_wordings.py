"""Several ways to ask and to answer: which examples a tree with other questions and other wordings gives."""

import copy
import json

import pytest

from conversation.data.examples import read_data
from conversation.data.trees import Tree, TreeError, format_tree, parse_tree
from conversation.format.calls import Example
from conversation_config import STARTER_TOPICS, TrainingConfig


def choices(*names):
    return [
        {"text": f"And {name}?", "confidence": value, "target": name}
        for name, value in zip(names, (0.52, 0.27, 0.1), strict=True)
    ]


def lock() -> dict:
    """A root with three questions and two wordings, a child with three and two, and a grandchild with one of each."""
    return {
        "question": "What's a lock?",
        "also_asked": ["Lock?", "Explain locks."],
        "root": "lock",
        "nodes": {
            "lock": {"texts": ["Root one."], "other_texts": [["Root two."]], "choices": choices("owner", "b", "c")},
            "owner": {
                "also_asked": ["Who has it?", "Whose is it?"],
                "texts": ["Owner one.", "More."],
                "other_texts": [["Owner two."]],
                "choices": choices("thread", "e", "f"),
            },
            "thread": {"texts": ["Thread one."], "choices": choices("g", "h", "i")},
        },
    }


def parse(value: dict) -> Tree:
    return parse_tree(json.dumps(value).encode(), "lock", "systems")


def told(example: Example) -> tuple[str, ...]:
    """The conversation, and the answer's first fragment."""
    spoken = [utterance.text for utterance in example.prompt.history]
    return (*spoken, example.prompt.question, example.answer.fragments[0])


def test_questions_and_wordings_take_turns_and_the_history_shows_them_all():
    examples = parse(lock()).examples_of_nodes()
    assert [name for name, _ in examples] == ["lock"] * 3 + ["owner"] * 3 + ["thread"]
    assert [told(example) for _, example in examples] == [
        ("What's a lock?", "Root one."),
        ("Lock?", "Root two."),
        ("Explain locks.", "Root one."),
        ("Lock?", "Root two.", "And owner?", "Owner one."),
        ("Explain locks.", "Root one.", "Who has it?", "Owner two."),
        ("What's a lock?", "Root two.", "Whose is it?", "Owner one."),
        ("Explain locks.", "Root one.", "Whose is it?", "Owner one.", "More.", "And thread?", "Thread one."),
    ]


def test_with_first_answers_every_question_gets_the_first_wording_after_any_history():
    tree = parse(lock())
    first = tree.examples("first")
    assert [example.prompt for example in first] == [example.prompt for example in tree.examples()]
    answers = {"lock": "Root one.", "owner": "Owner one.", "thread": "Thread one."}
    assert [(name, told(e)[-1]) for name, e in tree.examples_of_nodes("first")] == [
        (name, answers[name]) for name in ["lock"] * 3 + ["owner"] * 3 + ["thread"]
    ]


def test_with_first_answers_equal_examples_count_once():
    value = lock()
    del value["also_asked"], value["nodes"]["owner"]["also_asked"]
    value["nodes"]["lock"]["other_texts"] = [["Root two."], ["Root three."]]
    assert [told(example)[-1] for example in parse(value).examples()[:3]] == ["Root one.", "Root two.", "Root three."]
    names = [name for name, _ in parse(value).examples_of_nodes("first")]
    assert names == ["lock", "owner", "owner", "thread"]  # two histories of the owner; one question at the root


def test_the_setting_chooses_the_answers_of_a_training():
    counted = {}
    for answers in ("all", "first"):
        data = read_data(STARTER_TOPICS, answers=TrainingConfig(answers=answers).answers)
        counted[answers] = len({example.answer for example in data.examples}), len(data.examples)
    (every, examples), (first, as_many) = counted["all"], counted["first"]
    assert first == 60 * 4 and every == 60 * (3 + 3 * 2) and examples == as_many


@pytest.mark.parametrize(
    ("node", "questions", "said"),
    [
        ("owner", ["Who has it?", "Who has it?"], "nodes.owner.also_asked[1]: 'Who has it?' is asked already"),
        ("owner", ["And owner?"], "nodes.owner.also_asked[0]: 'And owner?' is asked already"),
        ("owner", ["A <escape>"], "nodes.owner.also_asked[0]: control token <escape> at character 2"),
        ("lock", ["A lock?"], "nodes.lock.also_asked: other ways to ask the root question stand beside it, at the top"),
        ("owner", "Who?", "nodes.owner.also_asked: 'Who?' is not of type 'array'"),
        ("owner", ["Q" * 61], "nodes.owner.also_asked[0]: "),
        ("owner", [" Who?"], "nodes.owner.also_asked[0]: "),
    ],
)
def test_other_questions_that_cannot_be_used_are_refused_with_their_place(node, questions, said):
    value = lock()
    value["nodes"][node]["also_asked"] = questions
    with pytest.raises(TreeError) as caught:
        parse(value)
    assert any(problem.startswith(said) for problem in caught.value.problems)


def test_the_same_question_asked_at_the_root_twice_is_refused():
    value = lock()
    value["also_asked"] = ["Lock?", "What's a lock?"]
    with pytest.raises(TreeError, match=r"also_asked\[1\]: \"What's a lock\?\" is asked already"):
        parse(value)


@pytest.mark.parametrize("spread", [True, False])
def test_a_tree_is_laid_out_with_its_other_questions(spread):
    value = lock()
    text = format_tree(copy.deepcopy(value), spread)
    assert json.loads(text) == value
    assert text.index('"Whose is it?"') < text.index('"Owner one."')
