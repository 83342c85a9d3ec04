"""Variables, locales and streams that another program left behind: ignored, or refused by name, and nothing stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, easy_lines, lay_into_hub_cache, run_script

from conversation import environment, errors
from conversation.data.examples import to_jsonl
from conversation.errors import UserError
from conversation.runs.folder import RunFolder
from conversation_config import cache_folder

WHOLE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
WHOLE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        *(({name: "two"}, f"{name} must be a whole number, not 'two'") for name in list(WHOLE)[:4]),
        ({"RANK": "1.0"}, "RANK must be a whole number"),
        ({"RANK": "²"}, "RANK must be a whole number"),
        ({"RANK": "9" * 5000}, "RANK must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE must be at least 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        *(({**WHOLE, name: ""}, f"WORLD_SIZE is 2, but {name} is not set") for name in ("RANK", "LOCAL_RANK")),
        *(({**WHOLE, name: ""}, f"WORLD_SIZE is 2, but {name} is not set") for name in ("MASTER_ADDR", "MASTER_PORT")),
        ({**WHOLE, "RANK": "2"}, "RANK is 2, which does not go with WORLD_SIZE=2"),
        ({**WHOLE, "RANK": "-1"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({**WHOLE, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, which does not go with LOCAL_WORLD_SIZE=2"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3, which does not go with WORLD_SIZE=2"),
        ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_PORT must be a whole number"),
        ({**WHOLE, "MASTER_PORT": "70000"}, "MASTER_PORT must be a port"),
        ({**WHOLE, "MASTER_ADDR": "a..b"}, "MASTER_ADDR=a..b cannot be resolved"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but WORLD_SIZE is not set"),
        ({"PMI_SIZE": "x"}, "PMI_SIZE must be a whole number"),
        ({"ACCELERATE_MIXED_PRECISION": "BF16"}, "ACCELERATE_MIXED_PRECISION=BF16 is refused"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU=maybe is not supported"),
        *(({f"ACCELERATE_{name}": "true"}, f"ACCELERATE_{name}=true") for name in ("USE_FSDP", "USE_DEEPSPEED", "NEW")),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "ACCELERATE_TORCH_DEVICE=meta"),
        ({"HOME": "/home/\udcff"}, "HOME is not UTF-8"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "10.0.0.1"}, "accelerate launch was asked for several"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(variables, words):
    with pytest.raises(environment.Unusable) as refused:
        environment.check(True, dict(variables))
    assert str(refused.value).startswith(words) and refused.value.hint
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variables", "warning"),
    [
        ({"RANK": "1"}, "RANK=1 ignored: WORLD_SIZE is not set, so this is one process"),
        ({"RANK": "1", "LOCAL_RANK": "3"}, "RANK=1 and LOCAL_RANK=3 ignored: WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 ignored: WORLD_SIZE is 1, so"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 ignored"),
        ({"WORLD_SIZE": "", "RANK": " ", "LOCAL_RANK": "-1"}, None),
        ({**WHOLE, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, None),
        ({"MASTER_ADDR": "somewhere", "MASTER_PORT": "x"}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "False", "ACCELERATE_DYNAMO_BACKEND": "NO"}, None),
        ({"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_DEBUG_MODE": ""}, None),
    ],
)
def test_what_means_nothing_for_one_process_is_removed(variables, warning):
    warnings = environment.check(False, variables)
    assert variables == {}
    assert len(warnings) == (warning is not None) and all(text.startswith(warning) for text in warnings)


def test_what_the_launchers_set_is_left_alone_and_only_training_is_work_for_several():
    variables = {**WHOLE, "ACCELERATE_USE_CPU": "True", "ACCELERATE_CPU_AFFINITY": "1"}
    assert environment.check(True, variables) == [] and variables["RANK"] == "0" and len(variables) == 8
    del variables["LOCAL_WORLD_SIZE"]
    assert environment.check(True, variables) == [] and variables["LOCAL_WORLD_SIZE"] == "2"
    with pytest.raises(environment.Unusable, match="WORLD_SIZE is 2, but this is work for one process"):
        environment.check(False, variables)


def test_the_cache_is_where_a_variable_says_or_one_sentence_names_both(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "conversation-training"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    assert cache_folder() == tmp_path / ".cache" / "conversation-training"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "conversation-training"
    monkeypatch.delenv("XDG_CACHE_HOME")
    for home in (str(tmp_path / "missing"), "relative"):
        monkeypatch.setenv("HOME", home)
        with pytest.raises(UserError, match="HOME is not a folder, and XDG_CACHE_HOME is not set"):
            cache_folder()


def test_a_home_that_this_user_may_not_look_at_is_none(monkeypatch):
    """Left over from another user: `sudo -u`, a container with another uid."""

    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setenv("HOME", "/root/somewhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="HOME is not a folder, and XDG_CACHE_HOME is"):
        patch.setattr(os, "stat", refuse)
        cache_folder()


@pytest.mark.parametrize("script", ["train_conversation.py", "evaluate_conversation_model.py"])
def test_a_refusal_of_a_script_is_one_sentence_with_status_2_and_leaves_nothing(script, tmp_path):
    done = run_script(script, cwd=tmp_path, env={"WORLD_SIZE": "two"})
    assert done.returncode == 2
    assert done.stderr == "error: WORLD_SIZE must be a whole number, not 'two'\nhint: unset WORLD_SIZE\n"
    assert list(tmp_path.iterdir()) == []


def without_home(folder: Path) -> dict[str, str]:
    """Variables of a user without home and without an entry in the list of users."""
    folder.mkdir()
    no_entry = "import pwd\ndef unknown(user): raise KeyError(f'uid not found: {user}')\npwd.getpwuid = unknown\n"
    (folder / "sitecustomize.py").write_text(no_entry)
    variables = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    return {**variables, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONSAFEPATH": "1"},
        {"PYTHONPATH": "decoy"},
        {"PYTHONOPTIMIZE": "2"},
        {"PYTHONWARNINGS": "error"},
        {"PYTHONUTF8": "0", "LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"HOME": ""},
        {"WORLD_SIZE": "two", "COLUMNS": "1"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_help_comes_whatever_was_left_behind(variables, tmp_path):
    (tmp_path / "decoy" / "conversation").mkdir(parents=True)
    (tmp_path / "decoy" / "conversation" / "__init__.py").write_text("raise SystemExit('the decoy')")
    (tmp_path / "decoy" / "conversation_config.py").write_text("raise SystemExit('the decoy')")
    shown = run_script("merge_conversation_model.py", "--help", cwd=tmp_path, env=variables)
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    assert "Merge a run's adapters" in shown.stdout and "--run_dir" in shown.stdout


def test_without_home_and_user_entry_help_comes_and_the_stand_in_names_the_variables(tmp_path):
    variables, empty = without_home(tmp_path / "site"), tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "data.jsonl").write_bytes(to_jsonl(easy_lines()))
    checked = ["--check_data", "--base_model", "gemma-3-270m", "--training_data", str(tmp_path / "data.jsonl")]
    for flags, status in ((["--help"], 0), (checked, 2)):
        command = [sys.executable, str(PROJECT / "train_conversation.py"), *flags]
        done = subprocess.run(command, cwd=empty, env=variables, capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert "HOME is not a folder, and XDG_CACHE_HOME is not set" in done.stderr
    assert list(empty.iterdir()) == []


def test_a_warning_of_a_library_is_not_an_error(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, warnings; sys.path.insert(0, sys.argv[1])\nfrom conversation.errors import run_main\n"
        "run_main(lambda: warnings.warn('of a library') or 0)"
    )
    command = [sys.executable, str(tmp_path / "script.py"), str(PROJECT)]
    for odd in ({}, {"PYTHONWARNINGS": "error"}, {"PYTHONWARNINGS": "default,error::UserWarning"}):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **odd})
        assert done.returncode == 0 and "UserWarning: of a library" in done.stderr, done.stderr


LIBRARIES = {
    "somelib": 'import os\nWAIT = float(os.environ.get("SOMELIB_WAIT", 1))\nassert not os.environ.get("SOMELIB_OFF")\n',
    "needslib": "from somelib import nothing\n",
    "latelib": "try:\n    import somelib\nexcept Exception as error:\n    raise RuntimeError('above') from error\n",
}


@pytest.mark.parametrize(
    ("library", "variables", "said"),
    [
        ("somelib", {"SOMELIB_WAIT": "soon"}, "cannot be loaded: could not convert string to float: 'soon'"),
        ("latelib", {"SOMELIB_WAIT": "soon"}, "cannot be loaded: could not convert string to float: 'soon'"),
        ("needslib", {"PYTHONPATH": "/nowhere"}, "cannot be loaded: cannot import name 'nothing' from 'somelib' ("),
        ("somelib", {"SOMELIB_OFF": "1"}, "cannot be loaded: AssertionError"),
        ("tqdm", {"TQDM_MININTERVAL": "soon"}, "cannot be loaded: could not convert string to float: 'soon'"),
    ],
)
def test_a_variable_with_which_a_library_cannot_be_loaded_is_named(tmp_path, library, variables, said):
    for name, text in LIBRARIES.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "script.py").write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom conversation.errors import run_main\n"
        f"run_main(lambda: __import__('{library}') and 0)"
    )
    command = [sys.executable, str(tmp_path / "script.py"), str(PROJECT)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    ((name, value),) = variables.items()
    at_fault = library.replace("latelib", "somelib")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: the library {at_fault} {said}")
    assert done.stderr.endswith(f"; set here: {name}={value}\nhint: correct or unset it\n")


def test_a_defect_of_ours_keeps_its_traceback_whatever_is_loaded(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom conversation.errors import run_main\n"
        "run_main(lambda: int('x'))"
    )
    command = [sys.executable, str(tmp_path / "script.py"), str(PROJECT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "error: " not in done.stderr, done.stderr


@pytest.mark.parametrize(("code", "status"), [("a reason", 1), (3, 3), (None, 0), (0, 0)])
def test_a_script_that_exits_by_itself_gives_its_reason_and_status(code, status, monkeypatch, capsys):
    monkeypatch.setattr(errors.environment, "restart_if_misled", lambda: None)
    monkeypatch.setattr(errors.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit) as ended:
        errors.run_main(lambda: sys.exit(code))
    assert ended.value.code == status
    assert capsys.readouterr().err == ("a reason\n" if status == 1 else "")


def test_an_interactive_python_ends_like_any_other(tmp_path):
    done = run_script("merge_conversation_model.py", "--nonsense", cwd=tmp_path, env={"PYTHONINSPECT": "1"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2, done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_stops_nothing(closed, tmp_path):
    command = [sys.executable, str(PROJECT / "merge_conversation_model.py")]
    for flags, status in (["--help"], 0), (["--nonsense"], 2):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *command, *flags], capture_output=True, text=True
        )
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    code = "import os; from conversation.environment import open_missing_streams as o; o(); "
    code += f"f = open({str(tmp_path / 'file')!r}, 'w'); print('lost'); os.write(1, b'lost'); os.write(2, b'lost')"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=PROJECT).returncode == 0
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written_is_an_error(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom conversation.errors import run_main\n"
    code += "sys.argv[1:] = []\nrun_main(lambda: print('text') or 0)"
    (tmp_path / "script.py").write_text(code)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, str(tmp_path / "script.py"), str(PROJECT)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=variables)
    assert (done.returncode, done.stderr) == (1, "error: standard output cannot be written: No space left on device\n")


def test_the_path_of_an_attempt_does_not_go_through_the_encoding_of_a_terminal(tmp_path):
    attempt = tmp_path / "Prüfung" / "attempts" / "2026-11-26_10-00-00"
    attempt.mkdir(parents=True)
    command = [sys.executable, "-m", "conversation.runs.publishing", "--root", str(tmp_path / "Prüfung"), "newest"]
    for odd in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}, {"PYTHONIOENCODING": "utf-16"}):
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, env={**os.environ, **odd})
        assert (done.returncode, done.stdout) == (0, os.fsencode(attempt) + b"\n"), done.stderr


def test_a_training_in_a_strange_environment_is_a_whole_run(tmp_path, tiny_folder):
    """RANK left over, no home, no locale, warnings as errors, a cached base of the hub: the run folder is complete,
    nothing else is left, and no other machine was asked."""
    home = tmp_path / "Prüfung 日本"
    home.mkdir()
    (home / "daten.jsonl").write_bytes(to_jsonl(easy_lines()))
    variables = {**without_home(tmp_path / "site"), "RANK": "1", "LOCAL_RANK": "1", "PYTHONSAFEPATH": "1"}
    variables |= {"PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONUTF8": "0", "LC_ALL": "C"}
    variables |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "nonsense"}
    lay_into_hub_cache(tmp_path / "cache", tiny_folder)
    variables = {name: value for name, value in variables.items() if not name.startswith("HF_")}
    variables["HF_HOME"] = str(tmp_path / "cache")
    with open(tmp_path / "site" / "sitecustomize.py", "a") as file:
        file.write(f"import socket\ndef asked(*place, **options):\n    open({str(tmp_path / 'asked')!r}, 'a').write")
        file.write("(f'{place}')\n    raise OSError('no network')\nsocket.getaddrinfo = asked\n")
    command = [sys.executable, str(PROJECT / "train_conversation.py")]
    flags = [
        "--training_data",
        str(home / "daten.jsonl"),
        "--max_steps",
        "2",
        "--warmup_steps",
        "0",
        "--run_dir",
        "läuft",
    ]
    done = subprocess.run([*command, *flags], cwd=home, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "warning: RANK=1 and LOCAL_RANK=1 ignored: WORLD_SIZE is not set, so this is one process" in done.stderr
    assert sorted(path.name for path in home.iterdir()) == ["daten.jsonl", "läuft"]
    assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()
    run = RunFolder(home / "läuft")
    assert run.read().training.steps == 2 and run.read().data.source == str(home / "daten.jsonl")
    assert run.training_data.exists() and "Prüfung 日本" in run.report.read_text(encoding="utf-8")
    json.loads(run.metrics.read_text().splitlines()[-1])
