"""The floors: imports point one way, and the lower floors do not import torch."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import PROJECT

FLOORS = ("format", "data", "runs", "models", "training", "answering")
"""From the ground up. A floor imports from itself and from those before it."""


def imports(path):
    """Every module of the package that a file imports, also inside functions and for types."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("conversation."):
            yield node.module


@pytest.mark.parametrize("floor", FLOORS)
def test_arrows_run_one_way(floor):
    below = FLOORS[: FLOORS.index(floor) + 1]
    for path in (PROJECT / "conversation" / floor).glob("*.py"):
        for module in imports(path):
            name = module.split(".")[1]
            assert name in ("errors", "environment") or name in below, f"{path.name} imports {module}"


@pytest.mark.parametrize("floor", FLOORS[:3])
def test_no_torch_below(floor):
    names = [path.stem for path in (PROJECT / "conversation" / floor).glob("*.py") if path.stem != "__init__"]
    code = "import sys; " + "; ".join(f"import conversation.{floor}.{name}" for name in names)
    code += "; sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_and_no_test_is_too_long_to_read_at_once():
    for path in (*(PROJECT / "conversation").rglob("*.py"), *(PROJECT / "tests").rglob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path


KEYS = r"""\b(record|training|merge|tests)\[["']|getattr\((\w+\.)?(record|training|merge)\b"""


def test_only_one_module_knows_the_keys_of_the_record():
    assert re.search(KEYS, 'loss = record["loss"]') and re.search(KEYS, "getattr(record.training, field)")
    paths = [*(PROJECT / "conversation").rglob("*.py"), *PROJECT.glob("*.py"), *(PROJECT / "scripts").glob("*.py")]
    for path in paths:
        if path != PROJECT / "conversation" / "runs" / "record.py":
            assert re.search(KEYS, path.read_text(encoding="utf-8")) is None, path


def test_the_table_of_what_can_go_wrong_names_tests_that_exist():
    table = (PROJECT / "tests" / "README.md").read_text(encoding="utf-8")
    defined = {
        node.name
        for path in (PROJECT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert set(re.findall(r"`(test_\w+)`", table)) - defined == set()
    assert [name for name in re.findall(r"\btests/\S+?\.py\b", table) if not (PROJECT / name).exists()] == []
