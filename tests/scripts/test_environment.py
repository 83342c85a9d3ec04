"""scripts/environment.sh: made once, made whole, and by one process at a time."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import PROJECT


@pytest.fixture
def prepare(tmp_path):
    """Starts prepare_environment in an empty folder whose requirements are none."""
    (tmp_path / "requirements.txt").write_text("# none\n")
    script = f'set -euo pipefail; source "{PROJECT}/scripts/environment.sh"; prepare_environment requirements.txt'

    def begin(**variables):
        pipe, environment = subprocess.PIPE, {**os.environ, "PIP_NO_INDEX": "1", **variables}
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


def test_a_setting_of_pip_that_installs_elsewhere_is_found_before_anything_is_missing(prepare, tmp_path):
    information = "tinypackage-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "tinypackage-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinypackage.py", "")
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: tinypackage\nVersion: 1.0\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    (tmp_path / "requirements.txt").write_text("# one\ntinypackage==1.0\n")
    (tmp_path / "pip.conf").write_text(f"[install]\ntarget = {tmp_path / 'elsewhere'}\n")
    process = prepare(PIP_FIND_LINKS=str(tmp_path), PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2 and "error: pip did not install the packages of requirements.txt" in errors
    assert not (tmp_path / ".venv" / "requirements.txt.cksum").exists()
    process = prepare(PIP_FIND_LINKS=str(tmp_path), PIP_TARGET=str(tmp_path / "elsewhere"), PIP_NO_DEPS="1")
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    subprocess.run([out.strip(), "-c", "import tinypackage"], check=True)


def test_files_that_are_there_already_are_written_whatever_the_shells_options(prepare, tmp_path):
    for name in (".venv.lock", ".venv/requirements.txt.cksum"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of before")
    process = prepare(SHELLOPTS="noclobber")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / ".venv" / "requirements.txt.cksum").read_text() != "of before"


def test_a_place_that_cannot_be_written_is_reported_plainly(prepare, tmp_path):
    (tmp_path / ".venv.lock").mkdir()  # root may write everywhere, but not into this
    process = prepare()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.startswith(f"error: cannot write into {tmp_path}\nhint: ") and len(errors.splitlines()) == 2


@pytest.fixture
def find(tmp_path):
    """Runs find_python on a PATH with only these pythons: name -> minor version; None: 3.13 without ensurepip."""
    tools = tmp_path / "tools"
    tools.mkdir()
    bash = shutil.which("bash")

    def run(**pythons):
        for name, minor in pythons.items():
            # `$2` is the check; a python of another version, or Debian's without python3-venv, answers it like this
            pip = "sys" if minor else "None"
            fake = (
                f"import sys; sys.modules.update(venv=sys, ensurepip={pip}); sys.version_info = (3, {minor or 13}, 0)"
            )
            exec_it = f'exec {sys.executable} -c "{fake}\n$2"'
            (tools / name.replace("_", ".")).write_text(f"#!{bash}\n{exec_it}\n")
            (tools / name.replace("_", ".")).chmod(0o755)
        command = [bash, "-c", f'set -euo pipefail; source "{PROJECT}/scripts/environment.sh"; find_python']
        return subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tools)})

    return run


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3_11": 11, "python3_12": 12, "python3_13": 13, "python3": 11}, "python3.13"),
        ({"python3_11": 11, "python3_13": None}, "python3.11"),
        ({"python3_12": 12, "python3": 9}, "python3.12"),
        ({"python3": 14}, "python3"),
        ({"python3": 12}, "python3"),
    ],
)
def test_the_newest_python_that_can_make_an_environment_is_taken(find, pythons, taken):
    done = find(**pythons)
    assert done.returncode == 0 and done.stdout.endswith(f"/tools/{taken}\n"), done


@pytest.mark.parametrize("pythons", [{"python3": 10}, {"python3": 15}, {"python3_13": None, "python3": None}])
def test_pythons_that_cannot_are_named_and_none_is_said(find, pythons):
    done = find(**pythons)
    names = ", ".join(name.replace("_", ".") for name in pythons)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[0].endswith(f"tried: {names}") and "hint: install Python 3.13" in done.stderr


def test_without_any_python_that_is_said(find):
    done = find()
    assert done.returncode == 2 and done.stderr.startswith("error: there is no python3\nhint: install"), done.stderr


def test_the_pythons_that_are_looked_for_are_those_of_the_readme():
    script = (PROJECT / "scripts" / "environment.sh").read_text(encoding="utf-8")
    names = re.search(r"^SUPPORTED_PYTHONS='(.*)'$", script, re.M)[1].split()
    versions = [name.removeprefix("python") for name in names]
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert f"Python {versions[-1]} to {versions[0]}" in " ".join(readme.split())
