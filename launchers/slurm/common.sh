# What the job scripts share. They source it with `home`, the repository's folder, set; the working directory is the one
# that sbatch was typed in, on storage that all nodes see.

readonly STOPPED=75 # the exit code of a run that has saved because it was told to stop: type the same command again

fail() { # CODE MESSAGE
    echo "error: $2" >&2
    exit "$1"
}

train() { # LAUNCHER ARGUMENT...: train on all tasks of the job, requeue it if it was stopped, and end with its code
    prepare_environment
    find_run_folder "$@"
    local before code
    before=$(newest_checkpoint)
    trap 'cancelled=yes' TERM # from scancel, a preemption or the time limit itself: it is not for us to requeue then
    run_tasks "$@"
    if ((code != STOPPED)); then
        rm -f "$idle_file"
        exit "$code"
    elif [[ -z ${cancelled:-} ]] && ! stop_file_was_made; then
        requeue_unless_idle "$before"
    fi
    exit "$STOPPED"
}

prepare_environment() {
    if [[ -d $home/.venv ]]; then PATH=$home/.venv/bin:$PATH; fi
    export PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes it from sbatch since 22.05
    fi
    if [[ -z ${MASTER_ADDR:-} ]] && ((SLURM_JOB_NUM_NODES > 1)); then
        local first # the address at which Slurm itself reaches the first node; its name need not resolve everywhere
        read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
        export MASTER_ADDR
    fi
}

find_run_folder() { # also finds what is wrong with the command line, once and not on every rank
    local settings
    settings=$(python3 "$@" --print-config) || exit
    run=$(python3 -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run"])' <<< "$settings")
    mkdir -p "$run" || exit 73
    code_file=$run/.slurm-$SLURM_JOB_ID.code
    idle_file=$run/.slurm-$SLURM_JOB_ID.idle
}

newest_checkpoint() {
    find "$run/checkpoints" -maxdepth 1 -name 'step-*' 2> /dev/null | sort | tail -n 1 || true
}

run_tasks() { # LAUNCHER ARGUMENT...; sets `code` to that of the task that was first to fail, or 0
    rm -f "$code_file"
    code=0
    # a rank that is done waits two minutes for the others, one that has failed takes them down
    srun --kill-on-bad-exit=1 --wait=120 bash "$home/launchers/slurm/task.sh" "$code_file" python3 "$@" || code=$?
    if ((code != 0)) && [[ -z ${cancelled:-} ]]; then # tasks that were killed could not tidy up
        srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
            bash -c 'rm -rf -- "${TMPDIR:-/tmp}/nextscale-$SLURM_JOB_ID".*' || true
    fi
    if [[ -s $code_file ]]; then code=$(< "$code_file"); fi
    rm -f "$code_file"
}

stop_file_was_made() { # by a user, who does not want the run to go on by itself
    tail -n 1 "$run/history.jsonl" 2> /dev/null | grep -q '"event": "stop".*/stop was made'
}

requeue_unless_idle() { # CHECKPOINT: the newest one before this attempt
    local job=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi # not the whole array
    if [[ $(newest_checkpoint) != "$1" ]]; then
        rm -f "$idle_file"
    elif [[ -e $idle_file ]]; then
        rm -f "$idle_file"
        fail "$STOPPED" "stopped twice without a step between, so not requeued; give job $job a longer --time"
    else
        touch "$idle_file"
    fi
    echo "stopped; job $job is requeued and goes on from its newest checkpoint"
    scontrol requeue "$job" || fail "$STOPPED" "job $job cannot be requeued; the same sbatch command goes on from there"
}
