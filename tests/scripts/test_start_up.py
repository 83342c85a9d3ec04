"""What a script need not do before it begins: load what it does not use, read a file twice, ask for the same again."""

import subprocess
import sys

import pytest
from conftest import PROJECT

from conversation.data import trees
from conversation.models import tokenizer as tokens
from conversation.models.audit import audit
from conversation.training.preparation import prepare, print_statistics
from conversation_config import TrainingConfig

CHECKED = """import sys, train_conversation
sys.argv = ["train_conversation.py", "--check_data", "--base_model", *sys.argv[1:]]
assert train_conversation.main() == 0
print(*sorted({name.partition(".")[0] for name in sys.modules}))"""
NOT_NEEDED = {"trl", "peft", "accelerate", "datasets", "pyarrow", "pandas", "matplotlib", "gguf", "scipy", "starlette"}


def test_checking_data_loads_no_library_that_only_training_needs(tiny_folder, small_data):
    command = [sys.executable, "-c", CHECKED, str(tiny_folder), "--training_data", str(small_data)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "transformers" in loaded and loaded & NOT_NEEDED == set()


def test_checking_data_reads_each_tree_once(tiny_folder, monkeypatch, capsys):
    read, plain = [], trees.parse_tree
    monkeypatch.setattr(trees, "parse_tree", lambda data, name, domain: read.append(name) or plain(data, name, domain))
    prepared = prepare(TrainingConfig(base_model=str(tiny_folder)))
    print_statistics(prepared, as_json=False)
    assert "fit for training" in capsys.readouterr().out
    assert len(read) > 100 and len(read) == len(prepared.trees) == len(set(read))


@pytest.mark.parametrize("examples", [8, 80])
def test_the_audit_asks_for_the_size_of_the_vocabulary_as_often_for_many_examples(
    examples, tiny_folder, own_examples, monkeypatch
):
    kind, asked = type(tokens.load_tokenizer(tiny_folder)), []
    plain = kind.__len__
    monkeypatch.setattr(kind, "__len__", lambda self: asked.append(1) or plain(self))
    _, encoded, _ = audit(tiny_folder, own_examples[:examples])
    assert len(encoded) == examples and len(asked) < 60  # with Gemma's vocabulary each takes most of a millisecond


def test_many_examples_are_encoded_as_each_is(tiny_folder, own_examples):
    tokenizer = tokens.load_tokenizer(tiny_folder)
    chosen = [*tokens.PROBES, *own_examples[::50]]
    assert tokens.encode_examples(tokenizer, chosen) == [tokens.encode_example(tokenizer, each) for each in chosen]
