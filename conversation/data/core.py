"""The kinds of the core set's follow-ups, read from their targets, and the stock forms of their texts.

The rules that targets and confidences keep are data/README.md's; `tests/core_rules.py` checks them.
"""

from __future__ import annotations

from collections.abc import Iterable

from conversation.format.calls import FollowUp

STOCK_FORMS = {
    "example": ("Example?", "Such as?", "In practice?", "Another example?"),
    "how": (
        "How?",
        "How does it work?",
        "How is it done?",
        "How do I choose?",
        "How do I avoid it?",
        "How is it measured?",
    ),
    "why": ("Why?", "Why use it?", "Why does it matter?", "Why is that?"),
    "limit": ("Downsides?", "When not?", "Limits?", "Objections?", "What can go wrong?"),
    "use": ("Who uses it?", "Where is it used?", "In everyday life?", "When do I need it?"),
    "origin": ("Who said that?", "Who invented it?", "Where does the name come from?"),
}
"""Short questions that fit any topic, by kind. Two more kinds name a thing of the topic: `vs` ("vs a semaphore?") and
`own` ("What if a thread forgets to unlock?")."""

_STOCK = frozenset(form.casefold() for forms in STOCK_FORMS.values() for form in forms)


def is_stock(text: str) -> bool:
    """Whether a follow-up is one of the stock forms, whatever its case."""
    return text.strip().casefold() in _STOCK


def kind_of(target: str, node: str) -> str:
    """The kind of the follow-up with this target, offered at a node of this name: the rule for targets, read back."""
    suffix = target.removeprefix(f"{node}_")
    if suffix in STOCK_FORMS:
        return suffix
    return "vs" if suffix.startswith("vs_") else "own"


def only_stock(follow_ups: Iterable[FollowUp]) -> bool:
    """Whether none of the follow-ups names a thing of the topic."""
    return all(is_stock(each.text) for each in follow_ups)
