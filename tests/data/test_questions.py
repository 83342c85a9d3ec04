"""Files of held-out questions: what is read, and what is refused with its line and what was expected."""

import json

import pytest

from conversation.data.questions import read_held_out, read_questions
from conversation.errors import UserError
from conversation_config import EVALUATION_QUESTIONS

CASE = json.loads(EVALUATION_QUESTIONS[0].read_text(encoding="utf-8").splitlines()[0])


@pytest.mark.parametrize("followed", [3, 7, -1, True, 1.0, "1", None])
def test_a_case_that_follows_none_of_its_three_follow_ups_is_refused(tmp_path, followed):
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(CASE) + "\n" + json.dumps({**CASE, "followed": followed}) + "\n")
    with pytest.raises(UserError, match=r"cases\.jsonl:2: .*followed must be 0, 1 or 2"):
        read_held_out(path)


def test_a_line_that_is_no_case_or_question_is_told_what_it_lacks(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({name: value for name, value in CASE.items() if name != "topic"}) + "\n")
    with pytest.raises(UserError, match="1 lines are no cases of an evaluation") as caught:
        read_held_out(path)
    for name in CASE:
        assert f'"{name}": ' in str(caught.value)
    path.write_text("{}\n")
    with pytest.raises(UserError, match="1 lines are no questions") as caught:
        read_questions(path)
    assert '"question": ' in str(caught.value) and '"topic"' not in str(caught.value)
