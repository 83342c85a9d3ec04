"""The control tokens of the format, and those that no value may contain."""

from __future__ import annotations

import re

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
START_DECLARATION = "<start_function_declaration>"
END_DECLARATION = "<end_function_declaration>"
START_CALL = "<start_function_call>"
END_CALL = "<end_function_call>"
ESCAPE = "<escape>"
FORMAT_TOKENS = (START_OF_TURN, END_OF_TURN, START_DECLARATION, END_DECLARATION, START_CALL, END_CALL, ESCAPE)
"""The control tokens used by the format."""
CONTROL_TOKENS = FORMAT_TOKENS + (
    "<start_function_response>",
    "<end_function_response>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<mask>",
)
"""Every token with a special meaning in FunctionGemma. No value of an answer may contain one."""
CONTROL_PATTERN = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))


class Control(str):
    """A control token in rendered text."""

    __slots__ = ()
