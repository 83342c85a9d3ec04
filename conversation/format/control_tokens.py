"""The control tokens of the format, those that no value may contain, and those of any other vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

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


_NUMBERED = re.compile(r"(.*\D)\d+\D*", re.DOTALL)
_FAMILY = 8  # so many names that differ in a number only are known by what stands before it
_BLANK = " \t\r\n\v\f\u2581"  # the last is how SentencePiece writes a space


def is_control_name(added: str) -> bool:
    """Whether an added token of a vocabulary is one that literal text may name, but not become: not white space, which
    is ordinary text, and no single character, which cannot be cut."""
    return len(added) > 1 and bool(added.strip(_BLANK))


def names_to_cut(added: Iterable[str]) -> tuple[str, ...]:
    """What must not stand whole in literal text, the longest first, for a vocabulary with these added tokens.

    All control names among them, special or not, and CONTROL_TOKENS. Of a family such as `<unused0>`, `<unused1>`, ...
    only `<unused` is listed.
    """
    names = {name for name in added if is_control_name(name)}
    stems = {name: found[1] for name in names if (found := _NUMBERED.fullmatch(name)) and len(found[1]) > 1}
    sizes = Counter(stems.values())
    listed = {stems[name] if sizes[stems.get(name, "")] >= _FAMILY else name for name in names}
    return tuple(sorted(listed | set(CONTROL_TOKENS), key=lambda name: (-len(name), name)))


def pattern_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the names; `names` come the longest first."""
    return re.compile("|".join(map(re.escape, names)))


def cut(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The text in parts of which none holds a name: each name is cut after its first character."""
    parts, start, found = [], 0, pattern.search(text)
    while found:
        end = found.start() + 1
        parts.append(text[start:end])
        start, found = end, pattern.search(text, end)  # names may overlap
    return [*parts, text[start:]]


class Control(str):
    """A control token in rendered text."""

    __slots__ = ()
