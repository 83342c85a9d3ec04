# Sourced by the scripts that need an environment:
#   prepare_environment FILE...   makes .venv from the first requirements file (anew when that file changes), adds the
#                                 others, and prints its python. Takes a second when nothing changed. A second caller
#                                 waits for the first.

prepare_environment() {
    local venv="$PWD/.venv" base file wanted stamp
    if command -v flock >/dev/null && _something_is_missing "$venv" "$@"; then
        if ! { exec 8>"$venv.lock"; } 2>/dev/null; then
            echo "error: cannot write into $(dirname "$venv")" >&2
            echo "hint: make it writable, or clone the project into a folder of yours" >&2
            return 2
        fi
        flock -n 8 || { echo "Another process is making $venv: waiting for it ..." >&2; flock 8; }
    fi
    if [ "$(cat "$venv/$1.cksum" 2>/dev/null)" != "$(cksum <"$1")" ]; then
        base=$(command -v python3.11 || command -v python3) || { echo "error: there is no python3" >&2; return 2; }
        if ! "$base" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "error: $base is older than Python 3.11, or has no venv module" >&2
            echo "hint: install Python 3.11 with venv (Debian: apt-get install python3.11-venv)" >&2
            return 2
        fi
        echo "Making $venv (once; downloads about 1 GB) ..." >&2
        rm -rf "$venv"
        "$base" -m venv "$venv" >&2 || return 2
    fi
    for file in "$@"; do
        stamp="$venv/$file.cksum" wanted=$(cksum <"$file")
        [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && continue
        if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$file" >&2; then
            echo "error: the packages of $file could not be installed into $venv" >&2
            echo "hint: see pip's message above; then run the same command again" >&2
            return 2
        fi
        echo "$wanted" >"$stamp"
    done
    exec 8>&- # frees the lock
    echo "$venv/bin/python"
}

_something_is_missing() {
    local venv="$1" file
    for file in "${@:2}"; do
        [ "$(cat "$venv/$file.cksum" 2>/dev/null)" = "$(cksum <"$file")" ] || return 0
    done
    return 1
}
