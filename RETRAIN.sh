#!/usr/bin/env bash
# From nothing to a trained, merged, tested model.
#
#   ./RETRAIN.sh              FunctionGemma 270M, the default recipe (7 epochs)
#   ./RETRAIN.sh --demo       the embedded stand-in, a short recipe: no account, no GPU, under 40 minutes on 2 cores
#   ./RETRAIN.sh --resume     go on with the newest attempt, at the stage and step where it stopped
#
# Every other flag goes to train_conversation.py (see its --help), say --learning_rate 2e-5.
# Exit status: 0 published; 1 tried and failed; 2 not started; 129, 130 or 143 stopped, to be resumed.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

stages=6 stage= stopped=0
stage() {
    [ "$stopped" -eq 0 ] || { echo "Stopped; go on with: ./RETRAIN.sh --resume"; exit "$stopped"; }
    stage="$1/$stages $2"
    printf '\n[%s/%s] %s\n' "$1" "$stages" "$2"
}
fail() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 2; }

resume=() flags=() before= # flags: those given now
for flag in "$@"; do
    case "$flag" in
        -h | --help) sed -n '2,/^set -e/{/^set -e/!s/^# \{0,1\}//p}' RETRAIN.sh; exit 0 ;;
        --resume) resume=(--resume) ;;
        --run_dir* | --check_data | --check_room | --json) fail "$flag is not for RETRAIN.sh" "it goes to train_conversation.py" ;;
        *)
            case "$before" in # a path is meant from where RETRAIN.sh was called
                --training_data | --base_model) [ "$from" = "$PWD" ] || [ ! -e "$from/$flag" ] || flag="$from/$flag" ;;
            esac
            case "$flag" in
                --training_data=* | --base_model=*)
                    path=${flag#*=}
                    [ "$from" = "$PWD" ] || [ ! -e "$from/$path" ] || flag="${flag%%=*}=$from/$path"
                    ;;
            esac
            flags+=("$flag")
            ;;
    esac
    before=$flag
done

# 1. The environment: .venv with the pinned packages, made once and again when requirements.txt changes.
stage 1 "Environment"
source scripts/environment.sh
python=$(prepare_environment requirements.txt)

# One retrain at a time: the lock lives as long as this shell or a child of it does.
root=training-runs/conversation
{ mkdir -p "$root/attempts" && exec 9<>"$root/attempts/.lock"; } 2>/dev/null || # read, too: who holds it
    fail "cannot write into $root" "make it writable, or clone the project to where you may write"
"$python" -m conversation.publishing lock 9

# Each stage runs as a child that Ctrl-C, SIGTERM and a closed terminal reach, so that it can save its work; RETRAIN.sh
# ends as it does, and begins no further stage.
child=
stop() { stopped=$2; [ -z "$child" ] || kill "-$1" "$child" 2>/dev/null || true; }
trap 'stop HUP 129' HUP
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
run() {
    local status=0
    set -m
    "$@" &
    child=$!
    set +m
    wait "$child" || status=$? # a signal to us ends this wait, and not the child
    while kill -0 "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    child=
    return "$status"
}

# 2. Base model, data and tokenizer: everything is checked before anything is touched.
stage 2 "Base model, data, tokenizer"
if [ ${#resume[@]} -eq 0 ]; then
    run "$python" train_conversation.py --check_data --check_room "${flags[@]}"
    attempt=$("$python" -m conversation.publishing begin -- "${flags[@]}")
    resume_training=()
else
    attempt=$("$python" -m conversation.publishing newest)
    if [ -z "$attempt" ]; then
        [ -e "$root/latest" ] || fail "there is no attempt to resume" "begin one: ./RETRAIN.sh"
        echo "Nothing to resume: no attempt is under way, the last published run is $root/latest"
        exit 0
    fi
    kept=$("$python" -m conversation.publishing flags "$attempt") # quoted for the shell; the training keeps new ones
    eval "flags=($kept \"\${flags[@]}\")"
    resume_training=(--resume)
    [ -e "$attempt/run.json" ] || resume_training=() # stopped before the training's first record
fi
echo "Attempt: $attempt"
failed() {
    printf '%s RETRAIN.sh: stage %s ended with status %s\n' "$(date '+%F %T')" "$stage" "$1" >>"$attempt/console.log" || true
    echo "The attempt is kept in $attempt with its console.log; what was published before is untouched." >&2
    [ ! -e "$attempt/report.md" ] || echo "Report: $attempt/report.md" >&2
}
trap 'failed $?' ERR

stage 3 "Train"
run "$python" train_conversation.py --run_dir "$attempt" "${resume_training[@]}" "${flags[@]}"

stage 4 "Merge and verify"
run "$python" merge_conversation_model.py --run_dir "$attempt" "${resume[@]}"

stage 5 "Structural tests"
run "$python" test_conversation_model.py --run_dir "$attempt" "${resume[@]}"

stage 6 "Publish"
published=$("$python" -m conversation.publishing publish "$attempt" "$(printf '%q ' ./RETRAIN.sh "${flags[@]}" | sed 's/ $//')")
trap - ERR
printf 'Published: %s (and %s/latest)\nReport:    %s/report.md\n' "$published" "$root" "$published"
