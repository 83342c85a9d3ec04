"""scripts/environment.sh: made once, made whole, and by one process at a time."""

import os
import subprocess

import pytest
from conftest import PROJECT


@pytest.fixture
def prepare(tmp_path):
    """Starts prepare_environment in an empty folder whose requirements are none."""
    (tmp_path / "requirements.txt").write_text("# none\n")
    script = f'set -euo pipefail; source "{PROJECT}/scripts/environment.sh"; prepare_environment requirements.txt'

    def begin():
        pipe, environment = subprocess.PIPE, {**os.environ, "PIP_NO_INDEX": "1"}
        return subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, env=environment
        )

    return begin


def test_two_that_make_it_at_once_make_it_once(prepare, tmp_path):
    both = [prepare(), prepare()]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(tmp_path / ".venv" / "bin" / "python")}
    assert sum("Making " in err for _, err in outputs) == 1, outputs
    subprocess.run([outputs[0][0].strip(), "-c", ""], check=True)


def test_it_is_made_again_when_the_requirements_change_or_an_installation_was_cut(prepare, tmp_path):
    assert prepare().wait() == 0
    (tmp_path / ".venv" / "marker").touch()
    assert prepare().wait() == 0 and (tmp_path / ".venv" / "marker").exists()
    (tmp_path / "requirements.txt").write_text("# none at all\n")
    assert prepare().wait() == 0 and not (tmp_path / ".venv" / "marker").exists()
    (tmp_path / "requirements.txt").write_text("no-such-package-at-all==1.0\n")
    failing = prepare()
    assert failing.wait() != 0 and "could not be installed" in failing.stderr.read()
    assert prepare().wait() != 0  # what failed is not taken for done


def test_a_place_that_cannot_be_written_is_reported_plainly(prepare, tmp_path):
    (tmp_path / ".venv.lock").mkdir()  # root may write everywhere, but not into this
    process = prepare()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.startswith(f"error: cannot write into {tmp_path}\nhint: ") and len(errors.splitlines()) == 2
