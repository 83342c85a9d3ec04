"""The shell scripts on other people's machines: old bash, no GNU tools, links, CDPATH, odd paths, closed streams.

bash 3.2, macOS's, could not be had here: no package registry has it. What breaks in it is therefore tested by
construction. A list of what bash 3.2 and BSD tools lack is searched for in every script, and the scripts run in the
nearest that a later bash offers: in its posix mode, with BASH_COMPAT=3.2, and with a PATH that has only what macOS has.
A run has a python that only writes down how it was called, so that all six stages take a second.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import PROJECT

SCRIPTS = ["RETRAIN.sh", "run_conversation_training.sh", "tests/run.sh", ".ci/run", "benchmarks/gpu.sh"]
SCRIPTS += [f"scripts/{path.name}" for path in sorted((PROJECT / "scripts").glob("*.sh"))]

LACKING = {
    "case conversion": (r"\$\{\w+(\[[^]]*\])?(,|\^)", "${flag,,}"),
    "transformation": (r"\$\{\w+(\[[^]]*\])?@[QEPAaUuLKk]\}", "${flag@Q}"),
    "negative length": (r"\$\{\w+:[^}:]*:\s*-", "${flag:0:-1}"),
    "arrays: unbound when empty": (
        r"\$\{\w+\[[@*]\]|^\s*(local |declare )?\w+\+?=\(",
        'run "${flags[@]}"',
    ),
    "associative array, reference": (r"\b(declare|typeset|local) -\w*[Agn]", "declare -A seen"),
    "mapfile": (r"\b(mapfile|readarray|coproc)\b", "mapfile -t lines"),
    "redirection of both": (r"&>>|\|&", "run &>> log"),
    "wait for any": (r"\bwait -\w", "wait -n"),
    "is it set": (r"(\[\[?|\btest) (! )?-[vR] ", "[[ -v flag ]]"),
    "time in printf": (r"printf\b.*%\([^)]*\)T", "printf '%(%Y)T'"),
    "file descriptor variable": (r"\{\w+\}[<>]", "exec {lock}>file"),
    "fall through": (r";;?&", "a) run ;;&"),
    "later shopt": (r"\bshopt -s \w*(globstar|lastpipe|inherit_errexit)", "shopt -s lastpipe"),
    "later variable": (r"\$\{?(BASHPID|EPOCH\w+|SRANDOM|BASH_ARGV0)\b", "$BASHPID"),
    "case in a command substitution": (r"\$\([^)]*\bcase\b", "x=$(case $y in a) run ;; esac)"),
    "source of a process substitution": (r"(\bsource|^\s*\.) <\(", "source <(run)"),
    "unicode escape": (r"\$'[^']*\\[uU]", r"$'\u2022'"),
    "GNU readlink": (r"\breadlink (-\w*[femn]|--\w)|\brealpath\b", 'readlink -f "$self"'),
    "GNU sed": (r"\bsed (-\w*[irs]|--\w)|\\[+?|]", "sed -i s/a/b/ file"),
    "GNU grep": (r"\bgrep (-\w*P|--\w)", "grep -P x"),
    "GNU date and stat": (r"\bdate (-d|--\w|-I)|%N|\bstat (-c|--\w)", "stat -c %s"),
    "not on macOS": (r"(?<!fcntl\.)\b(flock|timeout|nproc|tac|sha256sum|md5sum|setsid|shuf|gawk|wget)\b", "flock 8"),
    "GNU flags": (r"\b(xargs -r|sort -V|head -n -|mktemp --|cp --\w|find .*-printf|echo -e|env -S)", "echo -e x"),
    "exec by itself, so that a program's parent is the script": (
        r'\(cd [^()]*&& (?!exec )"\$python"',
        '(cd "$project" && "$python" -m conversation.runs.publishing lock 9)',
    ),
    "cd through CDPATH": (r"(?<!CDPATH='' )\bcd (?!(-P )?-- |\"\$project\")", 'cd "$(dirname "$0")"'),
}


def code_of(script):
    """The lines of a script without comments."""
    lines = (PROJECT / script).read_text(encoding="utf-8").splitlines()
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines]


@pytest.mark.parametrize("what", LACKING)
def test_no_script_uses_what_bash_3_2_or_macos_lacks(what):
    pattern, example = LACKING[what]
    assert re.search(pattern, example)
    assert [f"{script}: {line}" for script in SCRIPTS for line in code_of(script) if re.search(pattern, line)] == []


FAKE_PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$@" >>"$CALLS"
case "$*" in
*"publishing newest") echo "$ATTEMPT" ;;
*train_conversation.py*) mkdir -p "$ATTEMPT" ;;
esac
"""
STAGES = ["Environment", "Train", "Merge and verify", "Structural tests", "Evaluate", "Publish"]


class Checkout:
    """A copy of the project with a python that writes down its calls."""

    def __init__(self, folder):
        left_out = shutil.ignore_patterns(
            ".git", ".venv", "training-runs", "__pycache__", ".*_cache", "tests", "*_trees"
        )
        shutil.copytree(PROJECT, folder, ignore=left_out)
        self.folder, self.calls = folder, folder.parent / "calls"
        self.attempt = folder / "training-runs" / "conversation" / "attempts" / "2026-11-26_10-00-00"
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)
        for name in ("requirements.txt", "requirements-use.txt"):
            with open(folder / name) as file:
                stamp = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True).stdout
            (folder / ".venv" / f"{name}.cksum").write_text(stamp)

    def run(self, *command, cwd=None, **variables):
        environment = {**os.environ, "CALLS": str(self.calls), "ATTEMPT": str(self.attempt), **variables}
        return subprocess.run(
            list(map(str, command)), cwd=cwd or self.folder, capture_output=True, text=True, env=environment, timeout=60
        )

    def check(self, done):
        """All six stages ran, each script was called in this checkout, and nothing was said beside."""
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert re.findall(r"^\[\d/6\] (.*)", done.stdout, re.M) == STAGES
        called = re.findall(r"^(/.*)/(\w+)\.py", self.calls.read_text(), re.M)
        names = [f"{name}_conversation_model" for name in ("merge", "test", "evaluate")]
        assert called == [(str(self.folder), name) for name in ["train_conversation", *names]]
        assert f"--run_dir {self.attempt} --resume" in self.calls.read_text()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "Prüfung mit  Leerzeichen [日本] $x")


@pytest.mark.parametrize(
    ("command", "variables"),
    [
        ([], {}),
        (["bash", "--posix"], {}),
        (["sh"], {}),
        ([], {"BASH_COMPAT": "3.2"}),
        ([], {"POSIXLY_CORRECT": "1"}),
        ([], {"SHELLOPTS": "noclobber:keyword"}),
        ([], {"BASH_FUNC_cd%%": '() { builtin cd "$@" && echo "now in $PWD"\n}'}),
        (
            [],
            dict.fromkeys(
                "name types number child stopped device project python attempt before refused link".split(), "1"
            ),
        ),
        ([], {"LC_ALL": "C"}),
        ([], {"CDPATH": "/tmp:/:."}),
    ],
)
def test_all_stages_run_in_an_odd_path_under_any_shell(checkout, command, variables):
    checkout.check(checkout.run(*command, "./RETRAIN.sh", **variables))
    checkout.calls.unlink()
    checkout.check(checkout.run(*command, "./RETRAIN.sh", "--resume", **variables))  # the lock file exists now


@pytest.mark.parametrize("flags", [["--device", "cpu"], ["--device=cpu", "--demo"]])
def test_the_device_that_is_asked_for_is_that_of_every_stage(checkout, flags):
    checkout.check(checkout.run("./RETRAIN.sh", *flags))
    called = [line for line in checkout.calls.read_text().splitlines() if "_conversation" in line]
    assert len(called) == 4 and all(line.endswith(" --device=cpu") for line in called), called


@pytest.mark.parametrize("given", [["--export", "q8_0,f16"], ["--export=q8_0,f16"]])
def test_with_export_there_is_a_stage_more_and_its_flag_does_not_reach_the_training(checkout, given):
    for before, after in (([], []), (["--demo"], ["--seed", "3"]), (["--training_data", "a b"], [])):
        done = checkout.run("bash", "--posix", "./RETRAIN.sh", *before, *given, *after, BASH_COMPAT="3.2")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        stages = re.findall(r"^\[(\d/7)\] (.*)", done.stdout, re.M)
        assert [name for _, name in stages] == [*STAGES[:-1], "Export", STAGES[-1]]
        assert [number for number, _ in stages] == [f"{number}/7" for number in range(1, 8)]
        calls = checkout.calls.read_text().splitlines()
        checkout.calls.unlink()
        check, export = (call for call in calls if "export_conversation_model" in call)
        assert check.endswith("export_conversation_model.py --type q8_0,f16 --check") and check == calls[0]
        assert export.endswith(f"--run_dir {checkout.attempt} --type q8_0,f16 --resume")
        (training,) = [call for call in calls if "train_conversation" in call]
        assert training.endswith(" ".join(["train_conversation.py --attempt", *before, *after]))


SHELLS = ["dash", "posh", "mksh", "ksh", "yash", "zsh", "busybox"]


@pytest.mark.parametrize("shell", SHELLS)
def test_any_shell_hands_a_script_to_bash(checkout, shell):
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    command = [shell, "sh"] if shell == "busybox" else [shell]
    checkout.check(checkout.run(*command, "RETRAIN.sh"))
    for script in SCRIPTS:
        if not script.startswith("scripts/"):  # those are sourced
            first = next(line for line in code_of(script) if line.strip())
            assert first == 'case "${BASH_VERSION:+$-}" in *p*) ;; *) exec bash -p "$0" "$@" ;; esac', script


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "USR1", "USR2", "XCPU"])
def test_a_signal_to_retrain_reaches_its_script_and_no_further_stage_begins(checkout, name):
    number = signal.Signals[f"SIG{name}"]
    python = checkout.folder / ".venv" / "bin" / "python"
    waits = f"trap 'kill $!; exit {128 + number}' {name}; sleep 20 & : >\"$CALLS.waits\"; wait ;;"
    python.write_text(FAKE_PYTHON.replace('mkdir -p "$ATTEMPT" ;;', f'mkdir -p "$ATTEMPT"; {waits}'))
    environment = {**os.environ, "CALLS": str(checkout.calls), "ATTEMPT": str(checkout.attempt)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heed = partial(signal.signal, number, signal.SIG_DFL)  # the tests may run under nohup, which ignores SIGHUP
    process = subprocess.Popen(["./RETRAIN.sh"], cwd=checkout.folder, env=environment, preexec_fn=heed, **streams)
    while process.poll() is None and not checkout.calls.with_suffix(".waits").exists():
        time.sleep(0.01)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "[2/6] Train" in out and "Merge" not in out


def test_links_cdpath_and_the_working_folder_have_no_effect(checkout, tmp_path):
    (tmp_path / "-bin" / "scripts").mkdir(parents=True)
    (tmp_path / "-bin" / "retrain").symlink_to(os.path.relpath(checkout.folder / "RETRAIN.sh", tmp_path / "-bin"))
    (tmp_path / "again").symlink_to("-bin/retrain")
    (tmp_path / "decoy" / "-bin").mkdir(parents=True)
    elsewhere = str(tmp_path / "decoy")
    checkout.check(checkout.run("sh", "-c", "./again", cwd=tmp_path, CDPATH=elsewhere))
    for name in ("RETRAIN.sh", "run_conversation_training.sh"):  # a path that does not begin with . or /
        (tmp_path / "decoy" / checkout.folder.name).mkdir(exist_ok=True)
        done = checkout.run("bash", f"{checkout.folder.name}/{name}", "--help", cwd=tmp_path, CDPATH=elsewhere)
        assert done.returncode == 0, done.stderr
    (tmp_path / "training").symlink_to(checkout.folder / "run_conversation_training.sh")
    done = checkout.run("bash", "training", "--demo", cwd=tmp_path, CDPATH=elsewhere)
    assert done.returncode == 0, done.stderr
    assert checkout.calls.read_text().splitlines()[-1] == f"{checkout.folder}/train_conversation.py --demo"
    shown = checkout.run(tmp_path / "training", "--help", cwd="/", CDPATH=elsewhere)
    assert shown.returncode == 0 and "--learning_rate" in shown.stdout


def test_help_needs_no_python_of_the_systems_where_the_environment_is_there(checkout, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "mkdir"):
        (tools / name).symlink_to(shutil.which(name))
    shown = checkout.run("bash", "./run_conversation_training.sh", "--help", PATH=str(tools))
    assert shown.returncode == 0 and "train_conversation.py --help" in checkout.calls.read_text(), shown.stderr
    assert shown.stderr == ""


@pytest.mark.parametrize("script", ["tests/run.sh", ".ci/run"])
def test_cdpath_does_not_lead_the_tests_elsewhere(script, tmp_path):
    home, decoy = tmp_path / "project", tmp_path / "decoy"
    for folder in (home, decoy):
        (folder / "scripts").mkdir(parents=True)
        (folder / "tests").mkdir()
        (folder / ".ci").mkdir()
        (folder / "scripts" / "environment.sh").write_text(f"echo '{folder.name}'; exit 0\n")
        shutil.copy(PROJECT / "tests" / "run.sh", folder / "tests")
    shutil.copy(PROJECT / ".ci" / "run", home / ".ci")
    environment = {**os.environ, "CDPATH": str(decoy)}
    done = subprocess.run([script], cwd=home, env=environment, capture_output=True, text=True, executable=home / script)
    assert (done.returncode, done.stdout) == (0, "project\n"), done.stderr
    done = subprocess.run(["bash", script], cwd=home, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "project\n"), done.stderr


def test_it_runs_with_the_tools_of_macos_alone(checkout, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "sh", "dirname", "cat", "cksum", "sed", "grep", "mkdir", "rm", "date"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").symlink_to(sys.executable)
    bsd = f'#!/bin/sh\n[ "$1" != -- ] || shift\n[ $# = 1 ] || exit 1\nexec {shutil.which("readlink")} "$1"\n'
    (tools / "readlink").write_text(bsd)  # no flag but --
    (tools / "readlink").chmod(0o755)
    (tmp_path / "link").symlink_to(checkout.folder / "RETRAIN.sh")
    checkout.check(checkout.run(tmp_path / "link", PATH=str(tools)))


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_stop_nothing_and_nothing_is_written_into_files(checkout, closed):
    python = checkout.folder / ".venv" / "bin" / "python"
    look = 'for number in 0 1 2; do [ -e /dev/fd/$number ] || echo "no stream $number" >>"$CALLS"; done\n'
    python.write_text(FAKE_PYTHON.replace("#!/bin/sh\n", f"#!/bin/sh\n{look}"))
    done = checkout.run("sh", "-c", f'"$0" {closed}', "./RETRAIN.sh")
    assert done.returncode == 0, done.stderr
    assert "publish" in checkout.calls.read_text().splitlines()[-1]
    assert "no stream" not in checkout.calls.read_text()  # no child's first file gets the number of a stream
    assert (checkout.folder / "training-runs/conversation/attempts/.lock").read_bytes() == b""
    shown = checkout.run("sh", "-c", f'"$0" --help {closed}', "./run_conversation_training.sh")
    assert shown.returncode == 0, shown.stderr


def test_python_variables_of_another_program_do_not_reach_the_scripts(checkout):
    python = checkout.folder / ".venv" / "bin" / "python"
    python.write_text(FAKE_PYTHON.replace('echo "$@"', 'env >>"$CALLS.env"; echo "$@"'))
    odd = {"PYTHONHOME": "/nowhere", "PYTHONPATH": "/nowhere", "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "x"}
    odd |= {"PYTHONIOENCODING": "nonsense", "PYTHONINSPECT": "1", "WORLD_SIZE": "2", "RANK": "1"}
    checkout.check(checkout.run("./RETRAIN.sh", PYTHONUNBUFFERED="1", **odd))
    seen = checkout.calls.with_suffix(".env").read_text()
    assert "PYTHONUNBUFFERED=1" in seen
    assert not re.search(rf"^({'|'.join(odd)})=", seen, re.M)
    shown = checkout.run("./run_conversation_training.sh", "--help", **odd)
    assert shown.returncode == 0 and "--learning_rate" in shown.stdout, shown.stderr


STOPPED = FAKE_PYTHON.replace('mkdir -p "$ATTEMPT"', "exit 130")


def test_a_training_stopped_before_it_made_its_attempt_says_nothing_of_an_older_one(checkout):
    python = checkout.folder / ".venv" / "bin" / "python"
    python.write_text(STOPPED)
    checkout.attempt.mkdir(parents=True)
    done = checkout.run("./RETRAIN.sh", "--demo")
    assert (done.returncode, done.stderr) == (130, "")
    assert list(checkout.attempt.iterdir()) == []
    done = checkout.run("./RETRAIN.sh", "--resume")  # here it is the attempt that goes on
    assert done.returncode == 130 and f"The attempt stays in {checkout.attempt}" in done.stderr
    assert "Train ended with status 130" in (checkout.attempt / "console.log").read_text()
    failed = STOPPED.replace("exit 130", 'mkdir -p "$ATTEMPT.new"; exit 1')
    python.write_text(failed.replace('echo "$ATTEMPT"', 'ls -d "$ATTEMPT"* | tail -n 1'))
    done = checkout.run("./RETRAIN.sh", "--demo")  # its own attempt, and it failed
    assert done.returncode == 1 and f"The attempt stays in {checkout.attempt}.new" in done.stderr, done.stderr


def test_a_checkout_with_autocrlf_has_the_line_endings_that_bash_needs(tmp_path):
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    names = [".gitattributes", *SCRIPTS, "requirements.txt", "train_conversation.py", "data/starter_topics.txt"]
    for name in names:
        (origin / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, origin / name)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-c", "core.autocrlf=true"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"], ["clone", "-q", ".", str(clone)]):
        subprocess.run([*git, *command], cwd=origin, env=environment, check=True, capture_output=True)
    for name in names:
        assert b"\r" not in (clone / name).read_bytes(), name
    shown = subprocess.run(["./RETRAIN.sh", "--help"], cwd=clone, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("From nothing")


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" || exit 77; cd "$0"; exec "$@"'


def test_a_checkout_on_a_read_only_disk_is_said_plainly_and_helps_all_the_same(checkout):
    def run(*command):
        return checkout.run("unshare", "--mount", "sh", "-c", READ_ONLY, checkout.folder, *command)

    if not shutil.which("unshare") or run("true").returncode != 0:
        pytest.skip("mounting is not allowed here")
    shown = run("./RETRAIN.sh", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("From nothing"), shown.stderr
    refused = run("./RETRAIN.sh")
    assert refused.returncode == 2
    expected = f"error: cannot write into {checkout.folder}/training-runs/conversation\n"
    assert refused.stderr == expected + "hint: make it writable, or clone the project into a folder of yours\n"
    shutil.rmtree(checkout.folder / ".venv")
    refused = run("./run_conversation_training.sh")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: cannot write into {checkout.folder}\nhint: "), refused.stderr
    assert not (checkout.folder / "training-runs").exists()
