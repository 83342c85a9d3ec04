#!/usr/bin/env bash
# The tests, with everything they need: makes the environment, checks form and types, runs pytest.
#   tests/run.sh            the fast tests and those on the 270M stand-in
#   tests/run.sh -m slow    the long ones (see pyproject.toml); every flag goes to pytest
case "${BASH_VERSION:+$-}" in *p*) ;; *) exec bash -p "$0" "$@" ;; esac # see RETRAIN.sh
set -euo pipefail
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
python=$(prepare_environment requirements.txt requirements-use.txt requirements-test.txt)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$(dirname -- "$python")/shellcheck" --external-sources \
    RETRAIN.sh run_conversation_training.sh scripts/*.sh benchmarks/*.sh tests/run.sh .ci/run
# Two files of tests at a time, each with one thread: most tests are too small for two.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
