"""The grammar of an answer in GBNF, for people who run llama.cpp themselves.

It comes from the constants that the parser and `grammar` use, and lets nothing through that the parser refuses. It
cannot count what was said before, so values may repeat. A "<" in a text is not followed by a small letter, so that no
control token is spelled out. Lengths are counted in steps of one or two characters, so that a value always ends.

Control tokens are written as `<[id]>`, which is exact; llama.cpp wants the end of the turn left to the sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from conversation.format.calls import MAX_FRAGMENTS, NUM_FOLLOW_UPS
from conversation.format.control_tokens import CONTROL_TOKENS, Control
from conversation.format.grammar import ADD_CHOICE, ADD_TEXT, CONFIDENCES, MAX_CHARACTERS, RESTATE, Call, Value

LINE_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""What ends a line, by `str.splitlines`; `grammar.is_one_line` allows none of them in a text."""
WHITE_SPACE = "\t\x1f \xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
"""What else `str.strip` removes: a text does not begin with it, so that it is not blank."""
_NAMES = {
    Value.RESTATED: "restated",
    Value.FRAGMENT: "fragment",
    Value.FOLLOW_UP: "question",
    Value.CONFIDENCE: "confidence",
    Value.TARGET: "target",
}


def gbnf(ids: Mapping[str, int], restates: bool = False) -> str:
    """The grammar, for a vocabulary in which `ids` gives the id of each control token of the format.

    `restates`: an answer begins with the question in full.
    """
    assert all(token[0] == "<" and token[1] in "abcdefghijklmnopqrstuvwxyz" for token in CONTROL_TOKENS)
    unit = f'( [^<{_escaped(LINE_BREAKS)}] | "<" [^<a-z{_escaped(LINE_BREAKS)}] )'
    first = f'( [^<{_escaped(LINE_BREAKS + WHITE_SPACE)}] | "<" [^<a-z{_escaped(LINE_BREAKS)}] )'
    whole, hundredths = sorted({number for number in CONFIDENCES if number >= "1"}), "[0-9] [0-9]"
    of_restating = {
        "restate": _call(RESTATE, ids),
        "restated": f"first unit{{0,{MAX_CHARACTERS[Value.RESTATED] - 1}}}",
    }
    rules = {
        "root": f"{'restate ' if restates else ''}text{{1,{MAX_FRAGMENTS}}} choice{{{NUM_FOLLOW_UPS}}}",
        "text": _call(ADD_TEXT, ids),
        "choice": _call(ADD_CHOICE, ids),
        "fragment": f"first unit{{0,{MAX_CHARACTERS[Value.FRAGMENT] - 1}}}",
        "question": f"first unit{{0,{MAX_CHARACTERS[Value.FOLLOW_UP] - 1}}}",
        "confidence": " | ".join([f'"0." {hundredths}', *map(_quoted, whole)]),
        "target": f'[a-z0-9] ( "_"? [a-z0-9] ){{0,{MAX_CHARACTERS[Value.TARGET] - 1}}}',
        "first": first,
        "unit": unit,
        **(of_restating if restates else {}),
    }
    return "".join(f"{name} ::= {rule}\n" for name, rule in rules.items())


def _call(call: Call, ids: Mapping[str, int]) -> str:
    parts = []
    for run, kind in itertools.zip_longest(call.forced_pieces(), call.values):
        for is_control, pieces in itertools.groupby(run, lambda piece: isinstance(piece, Control)):
            same = list(pieces)
            parts += [f"<[{ids[piece]}]>" for piece in same] if is_control else [_quoted("".join(same))]
        if kind:
            parts.append(_NAMES[kind])
    return " ".join(parts)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _escaped(characters: str) -> str:
    """Characters for a class in square brackets; a range keeps its hyphen."""
    return "".join(c if c == "-" else f"\\u{ord(c):04X}" for c in characters)
