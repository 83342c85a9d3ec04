# Sourced by the scripts that need an environment: prepare_environment REQUIREMENTS... prints its python.

prepare_environment() {
    local venv="${VIRTUAL_ENV_DIR:-$PWD/.venv}" base wanted
    wanted=$(cat "$@" | cksum)
    if [ "$(cat "$venv/requirements.cksum" 2>/dev/null)" != "$wanted" ]; then
        base=$(command -v python3.11 || command -v python3) || { echo "error: there is no python3" >&2; return 2; }
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $base is older than Python 3.11" >&2
            echo "hint: install Python 3.11 with its venv module" >&2
            return 2
        }
        echo "Making $venv from $* (once) ..." >&2
        rm -rf "$venv"
        "$base" -m venv "$venv" >&2
        local file
        for file in "$@"; do "$venv/bin/python" -m pip install --quiet --requirement "$file" >&2; done
        echo "$wanted" >"$venv/requirements.cksum"
    fi
    echo "$venv/bin/python"
}
