#!/usr/bin/env bash
# A GPU's figures in one command, within 9 minutes: see benchmarks/gpu.py, which gets every flag.
case "${BASH_VERSION:+$-}" in *p*) ;; *) exec bash -p "$0" "$@" ;; esac # another shell; leftovers that -p ignores
set -euo pipefail
project=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$project/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || {
    echo "error: there is no python3" >&2
    exit 2
}
exec "$python" "$project/benchmarks/gpu.py" "$@"
