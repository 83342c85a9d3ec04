#!/usr/bin/env bash
# Only the training, in the prepared environment; every flag goes to train_conversation.py (see its --help).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --help "* | *" -h "*) exec python3 "$here/train_conversation.py" --help ;; esac # needs no environment
source "$here/scripts/environment.sh"
python=$(cd "$here" && prepare_environment requirements.txt)
exec "$python" "$here/train_conversation.py" "$@"
