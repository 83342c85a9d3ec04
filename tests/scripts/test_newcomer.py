"""What a person on a strange machine does: the README's commands, from an archive, as nobody in particular.

An unpacked `git archive` in a path with a space and an umlaut, without .git; a user without root, with an empty
home; LANG=C; umask 027; RETRAIN.sh through a symbolic link. The environment is really made: this needs the
package index.
"""

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from conftest import LEARNS, PROJECT, easy_data_with_real_prompts

from conversation.data.examples import to_jsonl
from conversation.format.parser import parse_answer

STRANGER = 54_321  # a user id that no machine has an entry for
KEPT = re.compile(r"PIP_.*|SSL_.*|.*_CA_BUNDLE|(?i:.*_proxy)|OMP_NUM_THREADS|HF_HUB_OFFLINE")


class Newcomer:
    def __init__(self, folder: Path):
        self.folder, self.home, self.project = folder, folder / "home", folder / "Übungs Rechner"
        self.home.mkdir()
        stashed = subprocess.run(["git", "stash", "create"], cwd=PROJECT, capture_output=True, text=True).stdout.strip()
        archive = folder / "archive.tar"
        made = subprocess.run(["git", "archive", "--output", archive, stashed or "HEAD"], cwd=PROJECT)
        if made.returncode != 0:
            pytest.skip("this checkout has no git history to make an archive of")
        with tarfile.open(archive) as file:
            file.extractall(self.project, filter="data")

    def owns_everything(self) -> None:
        for path in (self.folder, *self.folder.rglob("*")):
            os.chown(path, STRANGER, STRANGER, follow_symlinks=False)

    def does(self, *command: object, cwd: Path | None = None, status: int = 0) -> str:
        """Run a command as the newcomer; return its output. The status must be as expected, without traceback."""
        who = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
        who += ["--bounding-set=-all", "--inh-caps=-all"]
        umask = ["sh", "-c", 'umask 027; exec "$@"', "sh"]
        kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
        done = subprocess.run(
            [*(who if os.geteuid() == 0 else []), *umask, *map(str, command)],
            cwd=cwd or self.project,
            env={**kept, "HOME": str(self.home), "LANG": "C", "PATH": "/usr/local/bin:/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        out, errors = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        assert done.returncode == status and "Traceback" not in errors, f"{command}\n{out[-3000:]}\n{errors[-3000:]}"
        return out


@pytest.fixture
def newcomer(tiny_folder, own_examples):
    folder = Path(tempfile.mkdtemp(prefix="newcomer-"))  # pytest's own folders are closed to other users
    folder.chmod(0o755)
    try:
        person = Newcomer(folder)
        shutil.copytree(tiny_folder, folder / "base")
        (folder / "easy.jsonl").write_bytes(to_jsonl(easy_data_with_real_prompts(own_examples)))
        (folder / "to it").symlink_to(person.project / "RETRAIN.sh")
        if os.geteuid() == 0:
            if not shutil.which("setpriv"):
                pytest.skip("no setpriv, to become another user")
            person.owns_everything()
        yield person
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_the_commands_of_the_readme_work_for_a_newcomer(newcomer):
    base, python = newcomer.folder / "base", ".venv/bin/python"
    said = newcomer.does(
        "./to it", "--base_model", "base", "--training_data", "easy.jsonl", *LEARNS, cwd=newcomer.folder
    )
    assert "3 of 3 structural tests passed" in said and "Device: cpu" in said
    run = newcomer.project / "training-runs" / "conversation" / "latest"
    assert '"git_commit": null' in (run / "run.json").read_text(encoding="utf-8")
    open_to_all = [path.name for path in run.resolve().rglob("*") if path.stat().st_mode & 0o007]
    assert open_to_all == [] and (run / "merged_model_fp32" / "model.safetensors").stat().st_mode & 0o777 == 0o640

    trees = ["--training_data", "data/conversation_trees"]
    checked = newcomer.does(python, "train_conversation.py", "--check_data", "--base_model", base, *trees)
    assert "fit for training" in checked
    newcomer.does(python, "-m", "scripts.examples", "data/conversation_trees", newcomer.folder / "examples.jsonl")
    only = ["--domains", "programming,systems", "--max_steps", "2", "--warmup_steps", "0"]
    assert "Trained 2 steps" in newcomer.does("./run_conversation_training.sh", "--base_model", base, *only)
    newcomer.does(python, "-m", "conversation.models.new_tokens", base, newcomer.folder / "with tokens")

    readme = (newcomer.project / "docs" / "python.md").read_text(encoding="utf-8")
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "apply_chat_template" in block
    )
    parse_answer(newcomer.does(python, "-c", example).strip())  # raises unless the answer is valid

    tests = newcomer.does("tests/run.sh", "tests/format")
    assert re.search(r"^\d+ passed", tests, re.M), tests[-2000:]
    assert {path.name for path in newcomer.home.iterdir()} <= {".cache", ".config"}
    assert not [path for path in newcomer.project.rglob("*.part")]


@pytest.mark.slow
def test_help_and_refusals_reach_a_newcomer_before_anything_is_made(newcomer):
    assert "From nothing" in newcomer.does("./to it", "--help", cwd=newcomer.folder)
    assert "--learning_rate" in newcomer.does("./run_conversation_training.sh", "--help")
    for name in ("train_conversation", *(f"{stage}_conversation_model" for stage in ("merge", "test", "evaluate"))):
        assert "usage" in newcomer.does("python3", f"{name}.py", "--help", cwd=newcomer.project)
    assert sorted(path.name for path in newcomer.home.iterdir()) == []
    assert not (newcomer.project / ".venv").exists()
