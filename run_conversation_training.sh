#!/usr/bin/env bash
# Only the training, in the prepared environment; every flag goes to train_conversation.py (see its --help).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/scripts/environment.sh"
python=$(cd "$here" && prepare_environment requirements.txt)
exec "$python" "$here/train_conversation.py" "$@"
