#!/bin/bash
# One process of a step, under srun: tell it which of how many it is, and turn its exit code into a file.
# srun ends all tasks as soon as one fails. So a process that stopped at a checkpoint must end with 0 here, or the
# others would be shot while they write theirs.
set -euo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$NANOCHAT_TASKS_PER_NODE
# One cluster binds a task to its own cores, another to all of the job's: so the cores it may use say too little.
cores=$(nproc) share=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < share ? cores : share))}

# On a node's own disk it is not there yet, and a container would not start without what is bound into it.
mkdir -p "$TMPDIR"

# A file that is there whole or not at all.
leave() {
  printf '%s\n' "$2" >"$NANOCHAT_JOB_FOLDER/.tmp-$RANK"
  mv "$NANOCHAT_JOB_FOLDER/.tmp-$RANK" "$NANOCHAT_JOB_FOLDER/$1"
}

# Slurm signals the first process of a task only, which this is. `wait` ends early when it does.
trainer='' told=''
trap 'signalled=yes told=yes; kill -USR1 "$trainer" 2>/dev/null || true' USR1 TERM

"$@" &
trainer=$!
while true; do
  signalled='' code=0
  wait "$trainer" || code=$?
  [[ -n $signalled ]] || break
done

# One that was told to stop may not have listened yet (138 is USR1), or was aborted by NCCL as another one was faster to
# end (134). Neither is a failure.
if [[ -n $told ]] && ((code == 138 || code == 134)); then code=75; fi
if ((code == 75)); then
  code=0
  if ((RANK == 0)); then leave STOPPED "$(date +%s)"; fi
elif ((code == 0)); then
  if ((RANK == 0)); then leave DONE "$(date +%s)"; fi
else
  leave "rank-$RANK.exit" "$(date +%s%N) $RANK $code $(hostname)"
fi
exit "$code"
