#!/usr/bin/env bash
# The tests, with everything they need: makes the environment, checks form and types, runs pytest.
#   tests/run.sh            the fast tests and those on the 270M stand-in
#   tests/run.sh -m slow    the long ones (see pyproject.toml); every flag goes to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
python=$(prepare_environment requirements.txt requirements-test.txt)
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest "$@"
