# shellcheck shell=bash
# Sourced by the scripts that need an environment. Runs in bash 3.2, without flock or GNU tools:
#   find_python                   prints the newest python that can make an environment
#   prepare_environment FILE...   makes .venv from the first requirements file (anew when that file changes), adds the
#                                 others, and prints its python. Takes a second when nothing changed. A second caller
#                                 waits for the first.

# Newest first: the tests ran under each. The pinned packages have wheels for 3.14, too, which nobody tried: as python3 only.
SUPPORTED_PYTHONS='python3.13 python3.12 python3.11'

# What another program left behind. PYTHONHOME, PYTHONPATH, PYTHONSAFEPATH hide packages; others change what Python does.
for name in ${!PYTHON@}; do
    case "$name" in PYTHONUNBUFFERED | PYTHONDONTWRITEBYTECODE | PYTHONPYCACHEPREFIX) ;; *) unset "$name" ;; esac
done
set +o noclobber # from SHELLOPTS, which is not handed on: a shell script like pyenv's python would end at its first test
export -n SHELLOPTS
# A closed stream becomes the null device: the next file opened would get its number and its output.
(true 7<&0) 2>/dev/null || exec </dev/null
(true 7>&1) 2>/dev/null || exec >/dev/null
(true 7>&2 2>/dev/null) || exec 2>/dev/null

find_python() {
    local name base found=''
    for name in $SUPPORTED_PYTHONS python3; do
        base=$(command -v "$name") || continue
        found="$found${found:+, }$name"
        "$base" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || continue
        echo "$base"
        return 0
    done
    if [ -z "$found" ]; then
        echo "error: there is no python3" >&2
    else
        echo "error: no Python from 3.11 to 3.14 with venv and ensurepip is here; tried: $found" >&2
    fi
    echo "hint: install Python 3.13, 3.12 or 3.11 with venv (Debian: apt-get install python3-venv)" >&2
    return 2
}

prepare_environment() {
    local venv="$PWD/.venv" base file wanted stamp
    if _something_is_missing "$venv" "$@"; then
        base=$(find_python) || return 2
        _lock_environment "$venv" "$base" || return 2
        if ! _is_made_from "$1" "$venv" || ! _runs "$venv"; then # the one that was waited for may have made it
            echo "Making $venv (once; downloads about 1 GB) ..." >&2
            rm -rf "$venv"
            "$base" -m venv "$venv" >&2 || return 2
        fi
        for file in "$@"; do
            _is_made_from "$file" "$venv" && continue
            stamp="$venv/$file.cksum"
            wanted=$(cksum <"$file")
            if ! _pip "$venv" --requirement "$file"; then
                echo "error: the packages of $file could not be installed into $venv" >&2
                echo "hint: see pip's message above; then run the same command again" >&2
                return 2
            fi
            if ! _holds "$venv" "$file"; then
                echo "error: pip did not install the packages of $file into $venv: a setting of it names another place" >&2
                echo "hint: find it with $venv/bin/python -m pip config list; then run the same command again" >&2
                return 2
            fi
            echo "$wanted" >"$stamp"
        done
        exec 8>&- # frees the lock
    fi
    echo "$venv/bin/python"
}

_is_made_from() { # FILE VENV
    [ "$(cat "$2/$1.cksum" 2>/dev/null)" = "$(cksum <"$1")" ]
}

_runs() { # VENV   not when its python was removed from the system, or the folder came from another machine
    "$1/bin/python" -c '' 2>/dev/null
}

_something_is_missing() { # VENV FILE...
    local venv="$1" file
    shift
    for file in "$@"; do
        _is_made_from "$file" "$venv" || return 0
    done
    ! _runs "$venv"
}

_lock_environment() { # VENV PYTHON   lock file descriptor 8, for as long as it is open. Python does it: macOS has no flock.
    if ! (exec 8>"$1.lock") 2>/dev/null; then
        echo "error: cannot write into $(dirname "$1")" >&2
        echo "hint: make it writable, or clone the project into a folder of yours" >&2
        return 2
    fi
    exec 8>"$1.lock"
    "$2" -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return 0
    echo "Another process is making $1: waiting for it ..." >&2
    "$2" -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX)' 2>/dev/null || true # a file system without locks: go on
}

_holds() { # VENV FILE   whether the environment has what the file pins
    "$1/bin/python" -c 'import sys
from importlib.metadata import version
for line in open(sys.argv[1], encoding="utf-8"):
    name, pinned, wanted = line.strip().partition("==")
    if pinned and name[0].isalnum() and version(name).split("+")[0] != wanted:
        sys.exit(1)' "$2" 2>/dev/null
}

_pip() ( # VENV FLAG...   a setting of the user's must not install it elsewhere, or nowhere
    python="$1/bin/python"
    shift
    unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_DRY_RUN PIP_PYTHON PIP_NO_DEPS PIP_REQUIREMENT
    PIP_USER=0 "$python" -m pip install --quiet --disable-pip-version-check "$@" >&2
)
