# shellcheck shell=bash disable=SC2154 # RETRAIN.sh sets `project`
# Sourced by RETRAIN.sh, which sets `project`: its stages, and the reactions to a signal and to a failure.

# shellcheck source=scripts/environment.sh
source "$project/scripts/environment.sh"
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT # left over: a retrain is one process
root=$project/training-runs/conversation
stages=$(grep -c '^stage "' "$project/RETRAIN.sh")
number=0 name='' child='' stopped=0 resumed=no before='' attempt='' device='' types=''

# help_or_go_on FLAG...   print the help and exit, refuse a flag that is not for RETRAIN.sh, or note whether to resume
#                         and on which device
help_or_go_on() {
    local flag previous=''
    for flag in "$@"; do
        [ "$previous" != --device ] || device=$flag
        previous=$flag
        case "$flag" in
            --resume) resumed=yes ;;
            --device=*) device=${flag#--device=} ;;
            -h | --help) sed -n -e '1d' -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$project/RETRAIN.sh"; exit 0 ;;
            --run_dir* | --check_data | --json | --attempt)
                printf 'error: %s is not for RETRAIN.sh\nhint: it goes to train_conversation.py\n' "$flag" >&2
                exit 2
                ;;
        esac
    done
}

# stage NAME   begin the next stage, unless a signal has come
stage() {
    if [ "$stopped" -ne 0 ]; then
        echo "Stopped; go on with: ./RETRAIN.sh --resume"
        exit "$stopped"
    fi
    [ "$number" -gt 0 ] || [ -z "$types" ] || stages=$((stages + 1)) # Export is indented, and not counted above
    number=$((number + 1)) name=$1
    printf '\n[%s/%s] %s\n' "$number" "$stages" "$name"
}

# prepare_python   the environment's python, in `python`; with --export, llama.cpp is a part of it
prepare_python() {
    if [ -z "$types" ]; then
        python=$(cd "$project" && prepare_environment requirements.txt)
        return
    fi
    python=$(cd "$project" && prepare_environment requirements.txt requirements-use.txt)
    "$python" "$project/export_conversation_model.py" --type "$types" --check # before the training, not after it
}

# bookkeeping COMMAND   see conversation/runs/publishing.py
bookkeeping() {
    (cd "$project" && exec "$python" -m conversation.runs.publishing "$@") # exec: its parent is this shell, in any bash
}

# one_retrain_at_a_time   take a lock that lasts as long as this shell or a child of it, then note the newest attempt
one_retrain_at_a_time() {
    if ! (mkdir -p "$root/attempts" && exec 9<>"$root/attempts/.lock") 2>/dev/null; then
        printf 'error: cannot write into %s\n' "$root" >&2
        echo "hint: make it writable, or clone the project into a folder of yours" >&2
        exit 2
    fi
    exec 9<>"$root/attempts/.lock" # also for reading: it names its owner
    bookkeeping lock 9
    before=$(bookkeeping newest)
}

# run SCRIPT FLAG...   run a script of the project as a child, on the device that was asked for. A signal that stops
#                      RETRAIN.sh reaches it, so that it can save its work. RETRAIN.sh then ends with its status and
#                      begins no further stage.
run() {
    local script="$project/$1" status=0
    shift
    set -m
    "$python" "$script" "$@" ${device:+"--device=$device"} &
    child=$!
    set +m
    wait "$child" || status=$? # a signal to us ends this wait, but not the child
    while kill -0 "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    child=''
    return "$status"
}

_stop() { # SIGNAL
    stopped=$((128 + $(kill -l "$1")))
    [ -z "$child" ] || kill "-$1" "$child" 2>/dev/null || true
}

_failed() { # STATUS
    # Status 2 of the training: nothing was begun. Otherwise there is an attempt, with the reason in its log.
    if [ "$number" -lt 2 ] || { [ -z "$attempt" ] && [ "$1" -eq 2 ]; }; then return 0; fi
    [ -n "$attempt" ] || attempt=$(bookkeeping newest) || true
    [ -n "$attempt" ] || return 0
    # The training may end before it has made its attempt. Then there is nothing to report.
    if [ "$number" -eq 2 ] && [ "$resumed" = no ] && [ "$attempt" = "$before" ]; then return 0; fi
    printf '%s RETRAIN.sh: stage %s/%s %s ended with status %s\n' \
        "$(date '+%Y-%m-%d %H:%M:%S')" "$number" "$stages" "$name" "$1" >>"$attempt/console.log" || true
    echo "The attempt stays in $attempt, with its console.log. Earlier published runs are untouched." >&2
    [ ! -e "$attempt/report.md" ] || echo "Report: $attempt/report.md" >&2
}

for signal in HUP INT TERM USR1 USR2 XCPU; do # the last three: a batch system announces the end of the time
    # shellcheck disable=SC2064 # expanded now
    trap "_stop $signal" "$signal"
done
trap '_failed $?' ERR
