#!/usr/bin/env bash
# From nothing to a trained, merged, tested model.
#
#   ./RETRAIN.sh              FunctionGemma 270M, the default recipe (7 epochs)
#   ./RETRAIN.sh --demo       the embedded stand-in, a short recipe: no account, no GPU, 40 minutes on 2 cores
#   ./RETRAIN.sh --resume     go on with the newest attempt
#   ./RETRAIN.sh --export q8_0,f16    also as GGUF for llama.cpp and Ollama; beside other flags
#
# Every other flag goes to train_conversation.py (see its --help), for example --learning_rate 2e-5.
# --device cpu or --device cuda is for all stages.
# Exit status: 0 published, or nothing to resume; 1 tried and failed; 2 not started; 128 + n stopped by signal n; can be resumed.
case "${BASH_VERSION:+$-}" in *p*) ;; *) exec bash -p "$0" "$@" ;; esac # another shell; leftovers that -p ignores
set -euo pipefail
set +o posix # from POSIXLY_CORRECT, or called as sh
self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do # called through a link: the project is beside the file itself
    link=$(readlink -- "$self")
    case "$link" in /*) self=$link ;; *) self=$(dirname -- "$self")/$link ;; esac
done
project=$(CDPATH='' cd -- "$(dirname -- "$self")" && pwd -P)
# shellcheck source=scripts/stages.sh
source "$project/scripts/stages.sh" # stage, run, bookkeeping; reactions to a signal and to a failure

help_or_go_on "$@"
for flag in "$@"; do # takes --export TYPES out of the flags for the training, into `types`
    shift
    case "$types$flag" in
        --export) types=, ;;
        --export=*) types=${flag#*=} ;;
        ,*) types=$flag ;;
        *) set -- "$@" "$flag" ;;
    esac
done

stage "Environment" # .venv with the pinned packages, made once and after requirements.txt changes
prepare_python
one_retrain_at_a_time

stage "Train" # checks base, data and tokenizer before it writes anything
run train_conversation.py --attempt "$@"
attempt=$(bookkeeping newest)
[ -n "$attempt" ] || exit 0 # there was nothing to resume

stage "Merge and verify" # adapters + base -> merged_model_fp32, compared as read back from disk
run merge_conversation_model.py --run_dir "$attempt" --resume

stage "Structural tests" # three questions that gate, twenty held-out ones that inform
run test_conversation_model.py --run_dir "$attempt" --resume

stage "Evaluate" # a short look at what the answers are worth; it informs and gates nothing
run evaluate_conversation_model.py --run_dir "$attempt" --short --resume || echo "warning: not evaluated" >&2

refused=0
if [ -n "$types" ]; then # a type that is refused does not keep the run from being published
    stage "Export"       # GGUF for llama.cpp and Ollama, read back and asked
    run export_conversation_model.py --run_dir "$attempt" --type "$types" --resume || refused=1
fi

stage "Publish" # the attempt gets its name, and `latest` points at it
bookkeeping publish
exit "$refused"
