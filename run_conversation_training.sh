#!/usr/bin/env bash
# Only the training, in the prepared environment; every flag goes to train_conversation.py (see its --help).
set -euo pipefail
self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do # called through a link: the project is beside the file itself
    link=$(readlink "$self")
    case "$link" in /*) self=$link ;; *) self=$(dirname "$self")/$link ;; esac
done
project=$(CDPATH='' cd -- "$(dirname -- "$self")" && pwd -P)
case " $* " in *" --help "* | *" -h "*) exec python3 "$project/train_conversation.py" --help ;; esac # needs no environment
source "$project/scripts/environment.sh"
python=$(cd "$project" && prepare_environment requirements.txt)
exec "$python" "$project/train_conversation.py" "$@"
