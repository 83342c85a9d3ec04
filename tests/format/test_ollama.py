"""The Modelfile for Ollama: its template, read by a small reader of Go templates, writes the trained prompts."""

import re

from conftest import easy_lines

from conversation.format.calls import Prompt
from conversation.format.ollama import modelfile

PART = re.compile(r"\{\{ (.*?) \}\}")


def read_template(template: str) -> list:
    """A tree of texts, values, ranges and conditions: the actions that the Modelfile uses, and no others."""
    parts = PART.split(template)
    stack: list[tuple[str, list]] = [("", [])]
    for number, part in enumerate(parts):
        if number % 2 == 0:
            stack[-1][1].append(("text", part))
        elif part == "end":
            action, children = stack.pop()
            stack[-1][1].append((action, children))
        elif part.startswith(("if ", "range ")):
            stack.append((part, []))
        else:
            stack[-1][1].append(("value", part))
    assert len(stack) == 1
    return stack[0][1]


def render(tree: list, messages: list[dict], dot=None, index: int | None = None) -> str:
    found = ""
    for action, inside in tree:
        if action == "text":
            found += inside
        elif action == "value":
            value = dot
            for name in inside.strip(".").split("."):
                value = value[name]
            found += value
        elif action == "range $i, $m := .Messages":
            found += "".join(render(inside, messages, message, i) for i, message in enumerate(messages))
        elif action == "range .ToolCalls":
            found += "".join(render(inside, messages, call, index) for call in dot["ToolCalls"])
        elif holds(action.removeprefix("if "), messages, dot, index):
            found += render(inside, messages, dot, index)
    return found


def holds(condition: str, messages, dot, index) -> bool:
    if condition == "gt (len .Messages) 1":
        return len(messages) > 1
    if condition == "eq (len (slice $.Messages $i)) 1":
        return len(messages[index:]) == 1
    if condition == "not (eq (len (slice $.Messages $i)) 1)":
        return len(messages[index:]) != 1
    if match := re.fullmatch(r'eq \.([\w.]+) "(\w+)"', condition):
        value = dot
        for name in match[1].split("."):
            value = value[name]
        return value == match[2]
    name = condition.removeprefix("not ")
    assert name in (".Content", ".ToolCalls")
    return bool(dot[name[1:]]) != condition.startswith("not ")


def messages_of(prompt: Prompt, as_calls: bool, between: str = "") -> list[dict]:
    """`between`: the content beside an answer's calls, what Ollama's parser found between them."""
    messages: list[dict] = []
    for line in prompt.history:
        if line.speaker == "User":
            messages.append({"Role": "user", "Content": line.text, "ToolCalls": []})
            continue
        if not as_calls:
            messages.append({"Role": "assistant", "Content": line.text, "ToolCalls": []})
            continue
        if messages[-1]["Role"] != "assistant":
            messages.append({"Role": "assistant", "Content": between, "ToolCalls": []})
        messages[-1]["ToolCalls"] += [
            {"Function": {"Name": "add_text", "Arguments": {"content": line.text}}},
            {"Function": {"Name": "add_choice", "Arguments": {}}},
        ]
    return [*messages, {"Role": "user", "Content": prompt.question, "ToolCalls": []}]


def test_the_template_writes_the_prompts_that_were_trained():
    text = modelfile("x-q8_0.gguf")
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    assert "{{-" not in template and "-}}" not in template  # a hyphen would take line breaks away
    tree = read_template(template)
    for example in easy_lines()[:6]:
        for as_calls in (True, False):
            assert render(tree, messages_of(example.prompt, as_calls)) == example.prompt.text
        assert render(tree, messages_of(example.prompt, True, between="\n\n\n")) == example.prompt.text


def test_it_stops_at_the_end_of_the_turn_and_draws_nothing():
    lines = modelfile("x-q8_0.gguf").splitlines()
    assert lines[0] == "FROM ./x-q8_0.gguf"
    assert {"PARAMETER stop <end_of_turn>", "PARAMETER temperature 0", "PARSER functiongemma"} <= set(lines)
    assert not any(line.startswith("RENDERER") for line in lines)
