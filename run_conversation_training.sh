#!/usr/bin/env bash
# Only the training, in the prepared environment; every flag goes to train_conversation.py (see its --help).
case "${BASH_VERSION:+$-}" in *p*) ;; *) exec bash -p "$0" "$@" ;; esac # another shell; leftovers that -p ignores
set -euo pipefail
set +o posix # from POSIXLY_CORRECT, or called as sh
self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do # called through a link: the project is beside the file itself
    link=$(readlink -- "$self")
    case "$link" in /*) self=$link ;; *) self=$(dirname -- "$self")/$link ;; esac
done
project=$(CDPATH='' cd -- "$(dirname -- "$self")" && pwd -P)
# shellcheck source=scripts/environment.sh
source "$project/scripts/environment.sh"
case " $* " in
    *" --help "* | *" -h "*) # needs no .venv
        python=$(find_python 2>/dev/null) || python=$project/.venv/bin/python
        [ ! -x "$python" ] || exec "$python" "$project/train_conversation.py" --help
        ;;
esac
python=$(cd "$project" && prepare_environment requirements.txt)
exec "$python" "$project/train_conversation.py" "$@"
