"""The way out: chat messages with tools that stock TRL trains on, and that are read back as they were."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, easy_lines

from conversation.data.examples import read_training_data, to_jsonl


def export(source, output, home="/nonexistent"):
    command = [sys.executable, "-m", "scripts.messages", str(source), str(output)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=PROJECT, env={**os.environ, "HF_HOME": str(home)}
    )


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    (folder / "easy.jsonl").write_bytes(to_jsonl(easy_lines()))
    output = folder / f"messages.{request.param}"
    done = export(folder / "easy.jsonl", output, folder / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"36 rows in {output}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["easy.jsonl", output.name]
    return output


def test_what_was_written_is_read_back_to_the_same_examples(exported):
    assert read_training_data(exported) == easy_lines()


def test_stock_trl_trains_two_steps_on_it(exported, tmp_path, tiny_folder):
    """With the chat template of another model family, as a user of another base has it."""
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    kind = {".jsonl": "json", ".parquet": "parquet"}[exported.suffix]
    rows = load_dataset(kind, data_files=str(exported), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    text = tokenizer.apply_chat_template(rows[2]["messages"], tools=rows[2]["tools"], tokenize=False)
    assert '{"name": "add_text", "arguments": {"content": "It is red."}}' in text
    assert '"arguments": {"text": "Why?", "confidence": 0.61, "target": "why"}}' in text and "null" not in text
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, logging_steps=1, per_device_train_batch_size=2,
        bf16=False, use_cpu=True, report_to=[], save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(model=str(tiny_folder), args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


def test_a_name_that_is_no_format_is_refused_and_nothing_is_written(tmp_path):
    done = export("starter", tmp_path / "out.csv")
    assert done.returncode == 2 and "neither .jsonl nor .parquet" in done.stderr and not list(tmp_path.iterdir())


def test_its_help_loads_nothing_heavy():
    code = "import sys; sys.argv = ['messages', '--help']; import runpy\n"
    code += "try: runpy.run_module('scripts.messages', run_name='__main__')\n"
    code += "except SystemExit: print(json.dumps(sorted({'torch', 'datasets', 'pyarrow'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", "import json; " + code], capture_output=True, text=True, cwd=PROJECT)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr
