#!/bin/bash
# One task of a job: task.sh CODE_FILE COMMAND... runs the command with private temporary folders, and leaves its exit
# code in CODE_FILE if it is the first to fail.
#
# srun does not tell that code. It ends the other tasks when one fails, also when all of them have saved and are about
# to end with 75, and then reports the highest code of all, that of a task which it has killed itself.
set -uo pipefail
code_file=$1
shift

trap '' USR1     # until Python has a handler, which it may set: an ignored signal is one that the command starts with
trap : TERM INT  # the command gets it as well; this shell outlives it

scratch=$(mktemp -d "${TMPDIR:-/tmp}/nextscale-$SLURM_JOB_ID.XXXXXX") || exit 73 # for this user only
trap 'rm -rf -- "$scratch"' EXIT
export TMPDIR=$scratch TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
# What DeepSpeed compiles is kept, but for each node: nodes that build in one folder wait for each other's locks, and
# may differ in their processors.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/torch_extensions/$SLURMD_NODENAME}

"$@"
code=$?

if ((code != 0)) && (set -o noclobber && echo "$code" > "$code_file") 2> /dev/null && ((code > 128)); then
    rm -rf -- "$scratch"
    # killed: the others cannot save without it, so they need no time to
    scancel --quiet --signal=KILL "$SLURM_JOB_ID.$SLURM_STEP_ID"
fi
if ((code == 75)); then exit 0; fi # for srun no failure: the others are to end in their own time
exit "$code"
